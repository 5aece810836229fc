"""Runs a program with observers, and gives the values at them; loops run step by step, so that each step is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler import ops
from qcompiler.ir import _compat, loops, replay
from qcompiler.ir.program import Program

#: `(weights, inputs)` to `(outputs, {value id: array})`. In a loop's body a value has a leading dimension of steps.
Runner = Callable[[list[Any], list[Any]], tuple[list[Any], dict[str, Any]]]


def runner(program: Program) -> Runner:
    """A function that runs a program with observers; compiled as a whole where there are no loops.

    A body that never runs gives nothing.
    """
    inside = {id(eqn): [_Observed(body) for body in loops.bodies(program, eqn)] for eqn in loops.loops_of(program)}

    def run(weights: list[Any], inputs: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        found: dict[str, Any] = {}

        def rule(eqn: _compat.JaxprEqn, values: list[Any]) -> list[Any] | None:
            if eqn.primitive is ops.observe_p:
                found[eqn.params["id"]] = values[0]
            if id(eqn) not in inside:
                return None
            seen: dict[str, list[Any]] = {}
            results = _RUN[eqn.primitive.name](eqn, values, inside[id(eqn)], seen)
            found.update((key, np.stack(arrays)) for key, arrays in seen.items())
            return results

        return replay.evaluate(program.jaxpr, [*weights, *inputs], rule, keep_source=False), found

    return run if inside else jax.jit(run)


class _Observed:
    """A body that is run step by step."""

    def __init__(self, body: loops.Body) -> None:
        self.body, self.program = body, body.program
        self._run = runner(body.program)

    def __call__(self, inputs: Sequence[Any], seen: dict[str, list[Any]]) -> list[Any]:
        outputs, found = self._run(list(self.program.weights.values()), list(inputs))
        for key, value in found.items():
            seen.setdefault(key, []).append(np.asarray(value))
        return outputs

    def tie(self, inputs: range, seen: dict[str, list[Any]]) -> None:
        """Gives what is carried in, and what the body makes of it, the same values, so that they get one encoding."""
        producer, users = self.program.producer, self.program.users
        marks = lambda eqns: [e.params["id"] for e in eqns if e is not None and e.primitive is ops.observe_p]
        for place, out in zip(inputs, self.program.outvars, strict=False):
            entry = marks(eqn for eqn, _ in users.get(self.program.input_vars[place], ()))
            made = marks([producer.get(out)] if isinstance(out, _compat.Var) else [])
            if entry and made and entry[0] in seen and made[0] in seen:
                both = [seen[entry[0]][0], *seen[made[0]]]
                seen[entry[0]], seen[made[0]] = both, list(both)


def _scan(eqn: _compat.JaxprEqn, values: list[Any], found: list[_Observed], seen: dict[str, list[Any]]) -> list[Any]:
    (step,) = found
    places = loops.carried(eqn)
    fixed = [values[k] for k in step.body.reads[: loops.held_by(eqn, step.body)]]
    carry, stacked = values[places.start : places.stop], values[places.stop :]
    rows: list[Any] = [None] * eqn.params["length"]
    for t in reversed(range(len(rows))) if eqn.params["reverse"] else range(len(rows)):
        out = step([*fixed, *carry, *(x[t] for x in stacked)], seen)
        carry, rows[t] = out[: len(carry)], out[len(carry) :]
    step.tie(range(len(fixed), len(fixed) + len(carry)), seen)
    if not rows:
        return [*carry, *(np.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars[len(carry) :])]
    return [*carry, *(jax.numpy.stack(ys) for ys in zip(*rows, strict=True))]


def _while(eqn: _compat.JaxprEqn, values: list[Any], found: list[_Observed], seen: dict[str, list[Any]]) -> list[Any]:
    condition, step = found
    fixed = [[values[k] for k in part.body.reads[: loops.held_by(eqn, part.body)]] for part in found]
    carry = values[loops.carried(eqn).start :]
    while bool(condition([*fixed[0], *carry], seen)[0]):
        carry = step([*fixed[1], *carry], seen)
    step.tie(range(len(fixed[1]), len(fixed[1]) + len(carry)), seen)
    return list(carry)


def _cond(eqn: _compat.JaxprEqn, values: list[Any], found: list[_Observed], seen: dict[str, list[Any]]) -> list[Any]:
    taken = found[min(max(int(values[0]), 0), len(found) - 1)]
    return taken([values[k] for k in taken.body.reads], seen)


_RUN = {"scan": _scan, "while": _while, "cond": _cond}
