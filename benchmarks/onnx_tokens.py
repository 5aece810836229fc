"""Rules of the ONNX exporter for what transformers add: products of any axes, softmax, norms, masks, embeddings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import helper

from benchmarks import onnx_patterns
from benchmarks.onnx_graph import Exporter, NoOnnxRule, Value, plain
from qcompiler.ir import _compat
from qcompiler.ir.identity import source_of


def dot_general(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    """MatMul of `[batch..., m, k]` and `[batch..., k, n]`; a constant right side without a batch is one matrix."""
    (contracted, batch) = eqn.params["dimension_numbers"]
    shapes = [tuple(v.aval.shape) for v in eqn.invars]
    free = [
        tuple(a for a in range(len(shape)) if a not in (*c, *b))
        for shape, c, b in zip(shapes, contracted, batch, strict=True)
    ]
    sizes = [lambda axes, s=s: tuple(s[a] for a in axes) for s in shapes]
    depth = math.prod(sizes[0](contracted[0]))
    columns = math.prod(sizes[1](free[1]))
    lead = sizes[0](batch[0])
    # A matrix of weights multiplies tensors of any rank as they are.
    rows = (math.prod(sizes[0](free[0])),) if batch[0] else sizes[0](free[0])
    left = _arranged(e, eqn, operands[0], shapes[0], (*batch[0], *free[0], *contracted[0]), (*lead, *rows, depth))
    right = _arranged(e, eqn, operands[1], shapes[1], (*batch[1], *contracted[1], *free[1]), (*lead, depth, columns))
    before, after = (*lead, *rows, columns), tuple(eqn.outvars[0].aval.shape)
    result = e.emit("MatMul", [left, right])
    return plain(eqn, result if before == after else e.emit("Reshape", [result, e.shape(eqn, before, after)]))


def _arranged(
    e: Exporter, eqn: Any, operand: Any, shape: tuple[int, ...], order: tuple[int, ...], wanted: tuple[int, ...]
) -> str:
    """An operand with its axes in this order, then in this shape."""
    if isinstance(operand, np.ndarray):
        return e.constant(np.transpose(operand, order).reshape(wanted))
    arranged, name = tuple(shape[a] for a in order), e.name(operand, order)
    return name if arranged == wanted else e.emit("Reshape", [name, e.shape(eqn, arranged, wanted)])


def softmax(e: Exporter, eqn: Any, operands: list[Any]) -> Value | None:
    """Softmax, where a division is the last of one."""
    found = onnx_patterns.softmax_of(e.program, eqn)
    if found is None or not isinstance(scores := e.read(found[0]), Value):
        return None
    return Value(e.emit("Softmax", [scores.name], axis=scores.order.index(found[1])), scores.order)


def layer_norm(e: Exporter, eqn: Any, operands: list[Any]) -> Value | None:
    """LayerNormalization, where a product, or the addition of a constant to it, is the last of one."""
    bias = None
    if eqn.primitive.name == "add":
        bias = next((o for o in operands if isinstance(o, np.ndarray)), None)
        made = [e.program.producer.get(v) for v in eqn.invars if not isinstance(v, _compat.Literal)]
        eqn = next((p for p in made if p is not None and p.primitive.name == "mul"), None)
        if bias is None or eqn is None:
            return None
    found = onnx_patterns.layer_norm_of(e.program, eqn)
    if found is None:
        return None
    x, scale = e.read(found.x), e.read(found.scale)
    width = eqn.outvars[0].aval.shape[-1]
    if not all(_is_row(array, width) for array in (scale, bias) if array is not None):
        return None
    rows = [np.broadcast_to(np.ravel(array), (width,)) for array in (scale, bias) if array is not None]
    inputs = [e.name(x), *(e.constant(row) for row in rows)]
    return plain(eqn, e.emit("LayerNormalization", inputs, axis=-1, epsilon=found.epsilon))


def _is_row(array: Any, width: int) -> bool:
    """Whether a constant has one element, or one per feature along its last axis."""
    return isinstance(array, np.ndarray) and (array.size == 1 or array.shape[-1:] == (width,) == (array.size,))


def erfc(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    """`erfc(-x / s)` as `1 + erf(x / s)`, in which runtimes know GELU; any other as `1 - erf`."""
    one = e.constant(np.ones((), eqn.outvars[0].aval.dtype))
    product = e.program.producer.get(eqn.invars[0])
    if product is not None and product.primitive.name == "mul":
        inner, factor = (e.program.producer.get(product.invars[0]), e.read(product.invars[1]))
        if inner is not None and inner.primitive.name == "neg" and isinstance(factor, np.ndarray) and not factor.ndim:
            x = e.read(inner.invars[0])
            scaled = e.emit("Div", [x.name, e.constant(np.asarray(1 / factor, factor.dtype))])
            return Value(e.emit("Add", [e.emit("Erf", [scaled]), one]), x.order)
    return Value(e.emit("Sub", [one, e.emit("Erf", [operands[0].name])]), operands[0].order)


def rsqrt(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    """The reciprocal of the root."""
    return Value(e.emit("Reciprocal", [e.emit("Sqrt", [operands[0].name])]), operands[0].order)


def select_n(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    """Where, of two cases."""
    which, *cases = operands
    if len(cases) != 2 or which.name is None or eqn.invars[0].aval.dtype != np.bool_:
        raise NoOnnxRule(f"no ONNX for a choice among {len(cases)} at {source_of(eqn)}")
    return plain(eqn, e.emit("Where", [e.name(which), e.name(cases[1]), e.name(cases[0])]))


def convert(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    """Cast."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(eqn.params["new_dtype"]))
    return Value(e.emit("Cast", [operands[0].name], to=element), operands[0].order)


def gather(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    """Gather of whole rows: an embedding."""
    table, indices = operands
    numbers = eqn.params["dimension_numbers"]
    rank = len(eqn.outvars[0].aval.shape)
    rows = (
        tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"][1:]) == tuple(eqn.invars[0].aval.shape[1:])
        and tuple(numbers.offset_dims) == tuple(range(rank - len(eqn.invars[0].aval.shape) + 1, rank))
    )
    if not rows:
        raise NoOnnxRule(f"no ONNX for a gather that is no embedding at {source_of(eqn)}")
    last = e.constant(np.asarray([len(eqn.invars[1].aval.shape) - 1], np.int64))
    return plain(eqn, e.emit("Gather", [e.name(table), e.emit("Squeeze", [e.name(indices), last])], axis=0))
