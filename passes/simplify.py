"""Folds what depends on weights alone, merges equal equations, drops those that do nothing or are not needed.

    s = rsqrt(var + 1e-5); y = x * broadcast(s)        ->      y = x * w        (w a weight, computed now)

Primitives that others can spell are spelled so (`_canonical`). Afterwards a constant operand of an elementwise op is a
scalar literal, or a weight with size-one dimensions where it broadcasts; no constant is blown up to the size of a
batch. Outputs stay the same, op by op, bit for bit (but that XLA compiles a division by a number or a repeated array
as a product with its reciprocal).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from qcompiler.ir import _compat, classes, replay
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, build
from qcompiler.passes import _canonical, _norms, _unroll


def simplify(program: Program) -> Program:
    """See the module's docstring.

    Notes `deviations`: weight name -> the standard deviation that it divides by (as a list that broadcasts against the
    weight), where its value was computed from one: `rsqrt(var + eps) * gamma`, or `sqrt(var + eps)`.
    """
    program = _unroll.unroll(program)
    constants = Constants(program)
    ids = program.ids
    deviations: dict[str, Any] = dict(program.notes.get("deviations", {}))
    simplified = build(
        lambda builder, *inputs: _Replay(program, constants, ids, builder, deviations).run(inputs),
        program.weights,
        program.input_avals,
        program.signature,
        stats=program.stats,
        notes=program.notes,
        stage="simplify",
    )
    return simplified.note("deviations", {n: d for n, d in deviations.items() if n in simplified.weights})


class _Constant:
    """Stands for a constant variable until an equation that depends on inputs reads it."""

    def __init__(self, var: Any) -> None:
        self.var = var


class _Replay:
    def __init__(
        self, program: Program, constants: Constants, ids: dict[Any, str], builder: Builder, deviations: dict[str, Any]
    ) -> None:
        self.program, self.constants, self.ids, self.builder = program, constants, ids, builder
        self.deviations = deviations
        self.seen: dict[Any, Sequence[Any]] = {}
        self.kept_alive: list[Any] = []

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        args = [*(_Constant(v) for v in self.program.invars[: len(self.program.weights)]), *inputs]
        return [self.whole(v) for v in replay.evaluate(self.program.jaxpr, args, self.rule)]

    def rule(self, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        if all(v in self.constants for v in eqn.outvars):
            return [_Constant(v) for v in eqn.outvars]
        values = [
            np.asarray(x, v.aval.dtype)[()] if isinstance(v, _compat.Literal) else x
            for v, x in zip(eqn.invars, values, strict=True)
        ]
        elementwise = eqn.primitive.name in classes.ELEMENTWISE
        shape = eqn.outvars[0].aval.shape
        # A constant that spreads the other operands out (an outer product) keeps its shape.
        varying = [v.aval.shape for v in eqn.invars if v not in self.constants]
        elementwise = elementwise and np.broadcast_shapes(*varying) == shape
        # What clamp bounds is never a number.
        small = [elementwise and not (eqn.primitive.name == "clamp" and k == 1) for k in range(len(values))]
        pairs = zip(values, small, strict=True)
        values = [self.compact(v, shape, eqn.primitive.name) if s else self.whole(v) for v, s in pairs]
        same = _does_nothing(eqn, values)
        if same is not None:
            return [same]
        spelled = _canonical.canonical(eqn, values, self.constants)
        return self.merged(eqn, values) if spelled is None else spelled

    def merged(self, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        """Binds the equation, or returns the results of an equal one before it."""
        if eqn.primitive.name in _compat.RANDOM or _compat.has_side_effects(eqn) or _compat.sub_jaxprs(eqn):
            return _compat.bind(eqn, values)
        # Bytes tell -0.0 from 0.0.
        operands = tuple((v.dtype.str, v.tobytes()) if isinstance(v, np.generic) else id(v) for v in values)
        try:
            key = (eqn.primitive, tuple(sorted(eqn.params.items())), operands)
            hash(key)
        except TypeError:
            return _compat.bind(eqn, values)
        if key not in self.seen:
            self.kept_alive.extend(values)
            self.seen[key] = _compat.bind(eqn, values)
        return self.seen[key]

    def whole(self, value: Any) -> Any:
        """The value itself; a constant as a weight, without its repeats, which are spread out again in the program."""
        if not isinstance(value, _Constant):
            return value
        number, shape = self.constants.uniform(value.var), value.var.aval.shape
        if number is not None:
            return lax.broadcast(number[()], shape) if shape else number[()]
        array = self.constants.value(value.var)
        if value.var in self.program.weight_of:
            return self.weight(value.var, array)
        small = _without_repeats(array)
        if small.shape == array.shape:
            return self.weight(value.var, array)
        return lax.broadcast_in_dim(self.weight(value.var, small), shape, tuple(range(len(shape))))

    def compact(self, value: Any, shape: tuple[int, ...], primitive: str) -> Any:
        """A constant operand of an elementwise op: a scalar, or a weight with size-one dimensions where it repeats."""
        if not isinstance(value, _Constant):
            return value
        number = self.constants.uniform(value.var)
        if number is not None and primitive != "select_n":
            return number[()]
        if number is not None or primitive in ("select_n", "clamp"):
            return self.whole(value)
        array = self.constants.value(value.var)
        return self.weight(value.var, _without_repeats(array) if array.ndim == len(shape) else array)

    def weight(self, var: Any, array: Any) -> Any:
        """The weight that holds a constant, under its own name if it is a weight already."""
        known = self.builder.get(self.ids[var].removeprefix("weight:"))
        if known is not None and known.shape == array.shape:
            return known
        name = self.ids[var].removeprefix("weight:")
        name += "" if array.shape == var.aval.shape else ":" + "x".join(map(str, array.shape))
        if (
            name not in self.deviations
            and (deviation := _norms.deviation_of(self.program, self.constants, var)) is not None
        ):
            self.deviations[name] = _without_repeats(deviation).tolist()
        return self.builder.weight(name, array)


def _without_repeats(array: np.ndarray) -> np.ndarray:
    """The array with every dimension along which it repeats, bit for bit, cut to size one."""
    array = np.ascontiguousarray(array)
    for axis in range(array.ndim if array.size else 0):
        first = array.take([0], axis=axis)
        if (
            array.shape[axis] > 1
            and np.ascontiguousarray(np.broadcast_to(first, array.shape)).tobytes() == array.tobytes()
        ):
            array = np.ascontiguousarray(first)
    return array


def _does_nothing(eqn: _compat.JaxprEqn, values: list[Any]) -> Any | None:
    """The operand that equals the result, or None."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    first = values[0] if values else None
    if len(eqn.outvars) != 1:
        return None
    if name in ("convert_element_type", "reshape", "broadcast_in_dim", "squeeze", "copy", "copy_p", "name"):
        same = not isinstance(first, np.generic) and jax.typeof(first).shape == out.shape
        if name == "reshape" and eqn.params.get("dimensions") is not None:
            return None
        return first if same and jax.typeof(first).dtype == out.dtype else None
    if name == "transpose" and tuple(eqn.params["permutation"]) == tuple(range(out.ndim)):
        return first
    if name in ("mul", "div", "max", "min"):
        neutral = {"mul": 1.0, "div": 1.0, "max": -np.inf, "min": np.inf}[name]
        for value, other in (values, values[::-1]) if name != "div" else (values,):
            if isinstance(other, np.generic) and other == neutral and not isinstance(value, np.generic):
                typed = jax.typeof(value)
                if typed.shape == out.shape and typed.dtype == out.dtype:
                    return value
    return None
