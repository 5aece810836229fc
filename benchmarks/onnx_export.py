"""A folded float program as an ONNX model, for the peers that run ONNX.

    program = simplify, fold_norms of a trace  ->  onnx.ModelProto, images NHWC in, the batch size left open

Written for what convnets come to after `fold_norms`: convolutions, pools, joins, elementwise functions, a dense head.
Channels-last convolutions become ONNX's channels-first ones with a transpose where the images come in and none between
layers: a value carries the order in which ONNX holds its axes, and only what must agree is transposed.

`jax2onnx` (0.17.1, jax 0.10.2) is no help here: it exports a ResNet's max pool without its explicit padding (flax's
`max_pool`), or as a four-dimensional pool that onnxruntime refuses (`reduce_window_max`), and drops transposes that
residual joins need, so that the exported model does not load.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompiler.ir import Program, _compat
from qcompiler.ir.identity import source_of

OPSET = 17


class NoOnnxRule(Exception):
    """An equation that this exporter has no ONNX for; the message says which and where."""


@dataclasses.dataclass(frozen=True)
class _Value:
    """An array of the graph: its ONNX name and which axis of the program's array each ONNX axis is."""

    name: str
    order: tuple[int, ...]


class _Exporter:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[Any] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.values: dict[Any, _Value | np.ndarray] = {}
        self._transposed: dict[tuple[str, tuple[int, ...]], str] = {}
        self._count = 0

    # Values

    def read(self, atom: Any) -> _Value | np.ndarray:
        """What an operand is: a value of the graph, or a constant."""
        return np.asarray(atom.val) if isinstance(atom, _compat.Literal) else self.values[atom]

    def name(self, value: _Value | np.ndarray, order: tuple[int, ...] | None = None) -> str:
        """The ONNX name under which a value can be read with its axes in `order` (None: the program's)."""
        if isinstance(value, np.ndarray):
            array = value if value.ndim == 0 or order is None else np.transpose(value, order)
            return self.constant(array)
        order = tuple(range(len(value.order))) if order is None else order
        if value.order == order:
            return value.name
        key = (value.name, order)
        if key not in self._transposed:
            self._transposed[key] = self.emit("Transpose", [value.name], perm=[value.order.index(a) for a in order])
        return self._transposed[key]

    def constant(self, array: Any) -> str:
        """A new initializer."""
        name = f"c{len(self.initializers)}"
        self.initializers[name] = np.ascontiguousarray(array)
        return name

    def emit(self, op: str, inputs: list[str], **attributes: Any) -> str:
        """A new node; returns the name of its result."""
        self._count += 1
        name = f"v{self._count}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op}_{self._count}", **attributes))
        return name

    # The whole

    def run(self) -> onnx.ModelProto:
        program = self.program
        self.values.update((v, np.asarray(program.weights[n])) for v, n in program.weight_of.items())
        names = [f"input{i}" for i in range(len(program.input_vars))]
        for name, var in zip(names, program.input_vars, strict=True):
            self.values[var] = _Value(name, tuple(range(len(var.aval.shape))))
        for eqn in program.eqns:
            operands = [self.read(v) for v in eqn.invars]
            if all(isinstance(o, np.ndarray) for o in operands):
                results = [np.asarray(r) for r in _compat.bind(eqn, operands)]
            else:
                results = [self._rule(eqn)(self, eqn, operands)]
            self.values.update(zip(eqn.outvars, results, strict=True))
        outputs = [self.emit("Identity", [self.name(self.read(v))]) for v in program.outvars]
        inputs = [_info(n, v) for n, v in zip(names, program.input_vars, strict=True)]
        graph = helper.make_graph(
            self._live(outputs),
            "program",
            inputs,
            [_info(n, v) for n, v in zip(outputs, program.outvars, strict=True)],
        )
        read = {name for node in graph.node for name in node.input}
        graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in self.initializers.items() if n in read)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        return model

    def _rule(self, eqn: Any) -> Callable[..., Any]:
        name = eqn.primitive.name
        if name not in _RULES:
            raise NoOnnxRule(f"no ONNX for {name} at {source_of(eqn)}")
        return _RULES[name]

    def _live(self, outputs: list[str]) -> list[Any]:
        """The nodes that the results need: some are made and then superseded by one for a whole pattern."""
        needed = set(outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        return kept[::-1]


def export(program: Program) -> onnx.ModelProto:
    """A float program of images as ONNX, float32, opset 17.

    Args:
      program: traced at any batch size, which is axis 0 of every input and result; simplified, norms folded.

    Raises:
      NoOnnxRule: an equation that there is no ONNX for here.
    """
    return _Exporter(program).run()


def _info(name: str, var: Any) -> Any:
    """Name, type and shape of an input or result; the batch size is open."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(var.aval.dtype))
    return helper.make_tensor_value_info(name, element, ["batch", *var.aval.shape[1:]])


def _order_of(operands: list[Any], rank: int) -> tuple[int, ...]:
    """The order that elementwise operands meet in: that of the first which is no constant and not in plain order."""
    plain = tuple(range(rank))
    return next((o.order for o in operands if isinstance(o, _Value) and o.order != plain), plain)


def _elementwise(op: str) -> Callable[..., _Value]:
    def rule(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
        order = _order_of(operands, len(eqn.outvars[0].aval.shape))
        return _Value(e.emit(op, [e.name(o, order) for o in operands]), order)

    return rule


def _is(value: Any, number: float) -> bool:
    """Whether a constant is this number everywhere."""
    return isinstance(value, np.ndarray) and bool(np.all(np.isclose(value, number, rtol=1e-6, atol=0)))


def _max(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
    x, other = operands if isinstance(operands[0], _Value) else operands[::-1]
    if _is(other, 0.0):
        return _Value(e.emit("Relu", [x.name]), x.order)
    return _elementwise("Max")(e, eqn, operands)


def _min(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
    """`min(max(x, 0), c)` is a clip, which quantizers know as a convolution's activation."""
    inner = next((p for v in eqn.invars if (p := _producer(e, v)) is not None and p.primitive.name == "max"), None)
    top = next((o for o in operands if isinstance(o, np.ndarray) and o.ndim == 0), None)
    if inner is not None and top is not None:
        bounds = [e.read(v) for v in inner.invars]
        x = next((b for b in bounds if isinstance(b, _Value)), None)
        low = next((b for b in bounds if isinstance(b, np.ndarray) and b.ndim == 0), None)
        if x is not None and low is not None:
            return _Value(e.emit("Clip", [x.name, e.constant(low), e.constant(top)]), x.order)
    return _elementwise("Min")(e, eqn, operands)


def _producer(e: _Exporter, atom: Any) -> Any:
    return None if isinstance(atom, _compat.Literal) else e.program.producer.get(atom)


def _clamp(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
    low, x, high = operands
    return _Value(e.emit("Clip", [x.name, e.name(low), e.name(high)]), x.order)


def _scaled(op: str) -> Callable[..., _Value]:
    """A product or quotient: a mean where the other operand undoes the count of a sum over the map."""

    def rule(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
        total = _producer(e, eqn.invars[0])
        if total is not None and total.primitive.name == "reduce_sum":
            x, axes = e.read(total.invars[0]), tuple(total.params["axes"])
            count = math.prod(total.invars[0].aval.shape[a] for a in axes)
            if x.order[2:] == axes and _is(operands[1], count if op == "Div" else 1 / count):
                return _Value(e.emit("Flatten", [e.emit("GlobalAveragePool", [x.name])], axis=1), (0, 1))
        return _elementwise(op)(e, eqn, operands)

    return rule


def _conv(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
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
    return _Value(result, tuple(numbers.out_spec))


def _pool(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
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
        return _Value(e.emit("MaxPool", [e.name(x, order)], **windows), order)
    mean = e.emit("AveragePool", [e.name(x, order)], count_include_pad=1, **windows)
    count = np.asarray(math.prod(sizes), eqn.outvars[0].aval.dtype)
    return _Value(e.emit("Mul", [mean, e.constant(count)]), order)


def _reduce_sum(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
    axes = e.constant(np.asarray(eqn.params["axes"], np.int64))
    return _plain(eqn, e.emit("ReduceSum", [e.name(operands[0]), axes], keepdims=0))


def _reduce_max(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
    return _plain(eqn, e.emit("ReduceMax", [e.name(operands[0])], axes=list(eqn.params["axes"]), keepdims=0))


def _plain(eqn: Any, name: str) -> _Value:
    """A result in the program's own order of axes."""
    return _Value(name, tuple(range(len(eqn.outvars[0].aval.shape))))


def _dot(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
    ((left, right), (batch, _)) = eqn.params["dimension_numbers"]
    a, b = operands
    ranks = tuple(len(v.aval.shape) for v in eqn.invars)
    if batch or ranks[1] != 2 or len(left) != 1 or left[0] != ranks[0] - 1:
        raise NoOnnxRule(f"no ONNX for a dot over axes {left} and {right} at {source_of(eqn)}")
    return _plain(eqn, e.emit("MatMul", [e.name(a), e.name(b, (0, 1) if right[0] == 0 else (1, 0))]))


def _shape(eqn: Any) -> np.ndarray:
    """The shape of a result for Reshape: 0 keeps the batch, whatever it is."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if not before or not after or before[0] != after[0]:
        raise NoOnnxRule(f"no ONNX for a reshape that moves the batch axis at {source_of(eqn)}")
    return np.asarray([0, *after[1:]], np.int64)


def _reshape(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
    return _plain(eqn, e.emit("Reshape", [e.name(operands[0]), e.constant(_shape(eqn))]))


def _broadcast_in_dim(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
    shape, axes = eqn.params["shape"], tuple(eqn.params["broadcast_dimensions"])
    before = eqn.invars[0].aval.shape
    if not axes or axes[0] != 0 or before[0] != shape[0]:
        raise NoOnnxRule(f"no ONNX for a broadcast along the batch axis at {source_of(eqn)}")
    sizes = dict(zip(axes, before, strict=True))
    ones = np.asarray([0, *(sizes.get(a, 1) for a in range(1, len(shape)))], np.int64)
    result = e.emit("Reshape", [e.name(operands[0]), e.constant(ones)])
    if tuple(ones[1:]) != tuple(shape[1:]):
        result = e.emit("Expand", [result, e.constant(np.asarray([1, *shape[1:]], np.int64))])
    return _plain(eqn, result)


def _transpose(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
    permutation = tuple(eqn.params["permutation"])
    return _Value(operands[0].name, tuple(permutation.index(a) for a in operands[0].order))


def _concatenate(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
    order = _order_of(operands, len(eqn.outvars[0].aval.shape))
    axis = order.index(eqn.params["dimension"])
    return _Value(e.emit("Concat", [e.name(o, order) for o in operands], axis=axis), order)


def _pad(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
    x, value = operands
    config = [eqn.params["padding_config"][a] for a in x.order]
    if any(lo < 0 or hi < 0 or inner for lo, hi, inner in config):
        raise NoOnnxRule(f"no ONNX for cropping or interior padding at {source_of(eqn)}")
    pads = np.asarray([lo for lo, _, _ in config] + [hi for _, hi, _ in config], np.int64)
    return _Value(e.emit("Pad", [x.name, e.constant(pads), e.name(value)]), x.order)


def _square(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
    return _Value(e.emit("Mul", [operands[0].name] * 2), operands[0].order)


def _same(e: _Exporter, eqn: Any, operands: list[Any]) -> _Value:
    return operands[0]


_RULES: dict[str, Callable[..., Any]] = {
    "add": _elementwise("Add"),
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
    "sqrt": _elementwise("Sqrt"),
    "abs": _elementwise("Abs"),
    "neg": _elementwise("Neg"),
    "square": _square,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
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
