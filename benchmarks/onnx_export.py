"""A folded float program as an ONNX model, for the peers that run ONNX.

    program = simplify, fold_norms of a trace  ->  onnx.ModelProto, images NHWC in, the batch size left open or fixed

Written for what convnets come to after `fold_norms` (convolutions, pools, joins, elementwise functions, a dense head)
and, with a fixed batch size, transformers (`onnx_tokens.py`).
Channels-last convolutions become ONNX's channels-first ones with a transpose where the images come in and none between
layers: a value carries the order in which ONNX holds its axes, and only what must agree is transposed.

`jax2onnx` (0.17.1, jax 0.10.2) is no help here: it exports a ResNet's max pool without its explicit padding (flax's
`max_pool`), or as a four-dimensional pool that onnxruntime refuses (`reduce_window_max`), and drops transposes that
residual joins need, so that the exported model does not load.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper

from benchmarks import onnx_tokens
from benchmarks.onnx_graph import Exporter, NoOnnxRule, Value, plain
from qcompiler.ir import Program, _compat
from qcompiler.ir.identity import source_of


def export(program: Program, fixed: bool = False) -> onnx.ModelProto:
    """A float program as ONNX, float32, opset 17, inputs named `input0`, `input1`...

    Args:
      program: simplified, norms folded.
      fixed: keep the batch size that the program was traced at; else it is left open, being axis 0 of every input,
        result and value in between.

    Raises:
      NoOnnxRule: an equation that there is no ONNX for here.
    """
    return Exporter(program, _RULES, fixed).run()


def _order_of(operands: list[Any], rank: int) -> tuple[int, ...]:
    """The order that elementwise operands meet in: that of the first which is no constant and not in plain order."""
    plain = tuple(range(rank))
    return next((o.order for o in operands if isinstance(o, Value) and o.order != plain), plain)


def _elementwise(op: str) -> Callable[..., Value]:
    def rule(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
        order = _order_of(operands, len(eqn.outvars[0].aval.shape))
        return Value(e.emit(op, [_operand(e, o, order) for o in operands]), order)

    return rule


def _operand(e: Exporter, operand: Any, order: tuple[int, ...]) -> str:
    """Its name with its axes in this order; a row of constants has one axis, as onnxruntime wants a bias."""
    plain_row = isinstance(operand, np.ndarray) and order == tuple(range(operand.ndim)) and operand.ndim > 1
    if plain_row and operand.shape[-1] == operand.size:
        return e.constant(operand.ravel())
    return e.name(operand, order)


def _is(value: Any, number: float) -> bool:
    """Whether a constant is this number everywhere."""
    return isinstance(value, np.ndarray) and bool(np.all(np.isclose(value, number, rtol=1e-6, atol=0)))


def _max(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    x, other = operands if isinstance(operands[0], Value) else operands[::-1]
    if _is(other, 0.0):
        return Value(e.emit("Relu", [x.name]), x.order)
    return _elementwise("Max")(e, eqn, operands)


def _min(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    """`min(max(x, 0), c)` is a clip, which quantizers know as a convolution's activation."""
    inner = next((p for v in eqn.invars if (p := _producer(e, v)) is not None and p.primitive.name == "max"), None)
    top = next((o for o in operands if isinstance(o, np.ndarray) and o.ndim == 0), None)
    if inner is not None and top is not None:
        bounds = [e.read(v) for v in inner.invars]
        x = next((b for b in bounds if isinstance(b, Value)), None)
        low = next((b for b in bounds if isinstance(b, np.ndarray) and b.ndim == 0), None)
        if x is not None and low is not None:
            return Value(e.emit("Clip", [x.name, e.constant(low), e.constant(top)]), x.order)
    return _elementwise("Min")(e, eqn, operands)


def _producer(e: Exporter, atom: Any) -> Any:
    return None if isinstance(atom, _compat.Literal) else e.program.producer.get(atom)


def _clamp(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    low, x, high = operands
    return Value(e.emit("Clip", [x.name, e.name(low), e.name(high)]), x.order)


def _scaled(op: str) -> Callable[..., Value]:
    """A product or quotient: a mean where the other operand undoes the count of a sum over the map."""
    whole = {"Mul": onnx_tokens.layer_norm, "Div": onnx_tokens.softmax}[op]

    def rule(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
        if (found := whole(e, eqn, operands)) is not None:
            return found
        total = _producer(e, eqn.invars[0])
        if total is not None and total.primitive.name == "reduce_sum":
            x, axes = e.read(total.invars[0]), tuple(total.params["axes"])
            count = math.prod(total.invars[0].aval.shape[a] for a in axes)
            if x.order[2:] == axes and _is(operands[1], count if op == "Div" else 1 / count):
                return Value(e.emit("Flatten", [e.emit("GlobalAveragePool", [x.name])], axis=1), (0, 1))
        return _elementwise(op)(e, eqn, operands)

    return rule


def _add(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    """A sum; a constant per channel that is added to a convolution becomes the bias of one."""
    values = [o for o in operands if isinstance(o, Value)]
    bias = next((o for o in operands if isinstance(o, np.ndarray)), None)
    made = e.made(values[0]) if len(values) == 1 else None
    if made is not None and made.op_type == "Conv" and len(made.input) == 2 and bias is not None:
        order, channels = values[0].order, eqn.outvars[0].aval.shape[values[0].order[1]]
        if bias.size == 1 or (bias.ndim == len(order) and bias.shape[order[1]] == bias.size):
            attributes = {a.name: helper.get_attribute_value(a) for a in made.attribute}
            row = e.constant(np.broadcast_to(bias.ravel(), (channels,)))
            return Value(e.emit("Conv", [*made.input, row], **attributes), order)
    return onnx_tokens.layer_norm(e, eqn, operands) or _elementwise("Add")(e, eqn, operands)


def _conv(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    p = eqn.params
    if set(p["lhs_dilation"]) != {1} or p["batch_group_count"] != 1 or min(map(min, p["padding"])) < 0:
        raise NoOnnxRule(f"no ONNX for a transposed, batch-grouped or cropping conv at {source_of(eqn)}")
    x, kernel = operands
    numbers = p["dimension_numbers"]
    result = e.emit(
        "Conv",
        [e.name(x, tuple(numbers.lhs_spec)), e.name(kernel, tuple(numbers.rhs_spec))],
        strides=list(p["window_strides"]),
        pads=[lo for lo, _ in p["padding"]] + [hi for _, hi in p["padding"]],
        dilations=list(p["rhs_dilation"]),
        group=p["feature_group_count"],
    )
    return Value(result, tuple(numbers.out_spec))


def _pool(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    p, (x,) = eqn.params, operands
    sizes = p["window_dimensions"]
    still = [a for a, size in enumerate(sizes) if size == 1]
    if len(sizes) != 4 or len(still) < 2 or set(p["base_dilation"]) | set(p["window_dilation"]) != {1}:
        raise NoOnnxRule(f"no ONNX for a {len(sizes)}-D or dilated pool at {source_of(eqn)}")
    batch, channels = 0, still[-1]
    order = (batch, channels, *(a for a in range(4) if a not in (batch, channels)))
    spatial = order[2:]
    windows = {
        "kernel_shape": [sizes[a] for a in spatial],
        "strides": [p["window_strides"][a] for a in spatial],
        "pads": [p["padding"][a][0] for a in spatial] + [p["padding"][a][1] for a in spatial],
    }
    if eqn.primitive.name == "reduce_window_max":
        return Value(e.emit("MaxPool", [e.name(x, order)], **windows), order)
    mean = e.emit("AveragePool", [e.name(x, order)], count_include_pad=1, **windows)
    count = np.asarray(math.prod(sizes), eqn.outvars[0].aval.dtype)
    return Value(e.emit("Mul", [mean, e.constant(count)]), order)


def _reduce_sum(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    axes = e.constant(np.asarray(eqn.params["axes"], np.int64))
    return plain(eqn, e.emit("ReduceSum", [e.name(operands[0]), axes], keepdims=0))


def _reduce_max(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    return plain(eqn, e.emit("ReduceMax", [e.name(operands[0])], axes=list(eqn.params["axes"]), keepdims=0))


def _reshape(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    before, after = (tuple(v.aval.shape) for v in (eqn.invars[0], eqn.outvars[0]))
    return plain(eqn, e.emit("Reshape", [e.name(operands[0]), e.shape(eqn, before, after)]))


def _broadcast_in_dim(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    shape, axes = tuple(eqn.params["shape"]), tuple(map(int, eqn.params["broadcast_dimensions"]))
    before = tuple(eqn.invars[0].aval.shape)
    if not e.fixed and (not axes or axes[0] != 0 or before[0] != shape[0]):
        raise NoOnnxRule(f"no ONNX for a broadcast along the batch axis at {source_of(eqn)}")
    sizes = dict(zip(axes, before, strict=True))
    ones = tuple(sizes.get(a, 1) for a in range(len(shape)))
    result = e.name(operands[0])
    if ones != before:
        result = e.emit("Reshape", [result, e.shape(eqn, before, ones)])
    if ones != shape:
        # Expand keeps what stands where it is given a 1.
        expanded = shape if e.fixed else (1, *shape[1:])
        result = e.emit("Expand", [result, e.constant(np.asarray(expanded, np.int64))])
    return plain(eqn, result)


def _transpose(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    permutation = tuple(eqn.params["permutation"])
    return Value(operands[0].name, tuple(permutation.index(a) for a in operands[0].order))


def _concatenate(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    order = _order_of(operands, len(eqn.outvars[0].aval.shape))
    axis = order.index(eqn.params["dimension"])
    return Value(e.emit("Concat", [e.name(o, order) for o in operands], axis=axis), order)


def _pad(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    x, value = operands
    config = [eqn.params["padding_config"][a] for a in x.order]
    if any(lo < 0 or hi < 0 or inner for lo, hi, inner in config):
        raise NoOnnxRule(f"no ONNX for cropping or interior padding at {source_of(eqn)}")
    pads = np.asarray([lo for lo, _, _ in config] + [hi for _, hi, _ in config], np.int64)
    return Value(e.emit("Pad", [x.name, e.constant(pads), e.name(value)]), x.order)


def _square(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    return Value(e.emit("Mul", [operands[0].name] * 2), operands[0].order)


def _same(e: Exporter, eqn: Any, operands: list[Any]) -> Value:
    return operands[0]


_RULES: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": _elementwise("Sub"),
    "mul": _scaled("Mul"),
    "div": _scaled("Div"),
    "max": _max,
    "min": _min,
    "clamp": _clamp,
    "logistic": _elementwise("Sigmoid"),
    "tanh": _elementwise("Tanh"),
    "exp": _elementwise("Exp"),
    "erf": _elementwise("Erf"),
    "erfc": onnx_tokens.erfc,
    "sqrt": _elementwise("Sqrt"),
    "rsqrt": onnx_tokens.rsqrt,
    "lt": _elementwise("Less"),
    "gt": _elementwise("Greater"),
    "select_n": onnx_tokens.select_n,
    "convert_element_type": onnx_tokens.convert,
    "gather": onnx_tokens.gather,
    "abs": _elementwise("Abs"),
    "neg": _elementwise("Neg"),
    "square": _square,
    "conv_general_dilated": _conv,
    "dot_general": onnx_tokens.dot_general,
    "reduce_window_max": _pool,
    "reduce_window_sum": _pool,
    "reduce_sum": _reduce_sum,
    "reduce_max": _reduce_max,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "pad": _pad,
    "copy": _same,
    "stop_gradient": _same,
}
