"""An ONNX graph under construction from a program: values that carry the order of their axes, nodes, initializers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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
class Value:
    """An array of the graph: its ONNX name and which axis of the program's array each ONNX axis is."""

    name: str
    order: tuple[int, ...]


class Exporter:
    """Replays a program's equations as ONNX nodes.

    Attributes:
      program: what is exported.
      rules: primitive -> `(exporter, equation, operands)` to its result.
      fixed: keep the program's batch size; else axis 0 of everything is a batch of any size.
    """

    def __init__(self, program: Program, rules: Mapping[str, Callable[..., Any]], fixed: bool) -> None:
        self.program = program
        self.rules = rules
        self.fixed = fixed
        self.nodes: list[Any] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.values: dict[Any, Value | np.ndarray] = {}
        self._transposed: dict[tuple[str, tuple[int, ...]], str] = {}
        self._count = 0

    # Values

    def read(self, atom: Any) -> Value | np.ndarray:
        """What an operand is: a value of the graph, or a constant."""
        return np.asarray(atom.val) if isinstance(atom, _compat.Literal) else self.values[atom]

    def name(self, value: Value | np.ndarray, order: tuple[int, ...] | None = None) -> str:
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

    def made(self, value: Value) -> Any:
        """The node that makes a value; None for an input."""
        return next((n for n in reversed(self.nodes) if value.name in n.output), None)

    # The whole

    def run(self) -> onnx.ModelProto:
        program = self.program
        self.values.update((v, np.asarray(program.weights[n])) for v, n in program.weight_of.items())
        names = [f"input{i}" for i in range(len(program.input_vars))]
        for name, var in zip(names, program.input_vars, strict=True):
            self.values[var] = Value(name, tuple(range(len(var.aval.shape))))
        for eqn in program.eqns:
            operands = [self.read(v) for v in eqn.invars]
            if all(isinstance(o, np.ndarray) for o in operands):
                results = [np.asarray(r) for r in _compat.bind(eqn, operands)]
            else:
                results = [self._rule(eqn)(self, eqn, operands)]
            self.values.update(zip(eqn.outvars, results, strict=True))
        outputs = [self.emit("Identity", [self.name(self.read(v))]) for v in program.outvars]
        inputs = [self._info(n, v) for n, v in zip(names, program.input_vars, strict=True)]
        graph = helper.make_graph(
            self._live(outputs),
            "program",
            inputs,
            [self._info(n, v) for n, v in zip(outputs, program.outvars, strict=True)],
        )
        read = {name for node in graph.node for name in node.input}
        graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in self.initializers.items() if n in read)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        return model

    def _rule(self, eqn: Any) -> Callable[..., Any]:
        name = eqn.primitive.name
        if name not in self.rules:
            raise NoOnnxRule(f"no ONNX for {name} at {source_of(eqn)}")
        return self.rules[name]

    def _live(self, outputs: list[str]) -> list[Any]:
        """The nodes that the results need: some are made and then superseded by one for a whole pattern."""
        needed = set(outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        return kept[::-1]

    def _info(self, name: str, var: Any) -> Any:
        """Name, type and shape of an input or result."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(var.aval.dtype))
        shape = tuple(var.aval.shape)
        return helper.make_tensor_value_info(name, element, shape if self.fixed else ["batch", *shape[1:]])

    def shape(self, eqn: Any, before: tuple[int, ...], after: tuple[int, ...]) -> str:
        """The shape for Reshape, as a constant; 0 keeps a batch of any size.

        Raises:
          NoOnnxRule: the batch is open and the reshape moves it.
        """
        if self.fixed:
            return self.constant(np.asarray(after, np.int64))
        if not before or not after or before[0] != after[0]:
            raise NoOnnxRule(f"no ONNX for a reshape that moves the batch axis at {source_of(eqn)}")
        return self.constant(np.asarray([0, *after[1:]], np.int64))


def plain(eqn: Any, name: str) -> Value:
    """A result in the program's own order of axes."""
    return Value(name, tuple(range(len(eqn.outvars[0].aval.shape))))
