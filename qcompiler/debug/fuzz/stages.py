"""One function at the stages of the compiler that the checks compare."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from qcompiler.backends import lax_int
from qcompiler.debug import reference
from qcompiler.ir import _compat, replay, tracing
from qcompiler.ir.program import Builder, Program, build
from qcompiler.passes.assign_precision import assign_precision
from qcompiler.passes.equalize import equalize
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.fold_zero_points import fold_zero_points
from qcompiler.passes.fuse import fuse
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.observe import Collector, observe, without_observers
from qcompiler.passes.partition import partition
from qcompiler.passes.simplify import simplify
from qcompiler.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Stages:
    """One function at the stages that the checks compare."""

    float: Program
    fused: Program
    folded: Program

    @functools.cached_property
    def lowered(self) -> Program:
        """Codes in, codes out: integers only."""
        return lax_int.lower(self.folded, io="int")

    @functools.cached_property
    def watched(self) -> Program:
        """Float inputs in; out comes the result of every equation of `folded`, lowered."""
        return lax_int.lower(_every_result(self.folded))


def compile_stages(
    fun: Callable[..., Any], weights: Any, inputs: Sequence[Any], recipe: Recipe | None = None, stats: Any = None
) -> Stages:
    """Compiles `fun(weights, *inputs)`, calibrated on these inputs (or with `stats`)."""
    recipe = recipe or Recipe()
    names = tuple(f"x{k}" for k in range(len(inputs)))
    traced = fold_norms(simplify(tracing.trace(fun, weights, tuple(inputs), parameter_names=names)))
    program = partition(equalize(traced) if recipe.equalizes else traced)
    program = _calibrated(observe(program), inputs) if stats is None else program.replace(stats=stats)
    program = assign_precision(without_observers(program), recipe)
    fused = fuse(insert_qdq(program, recipe.estimator_for))
    return Stages(traced, fused, fold_zero_points(fused))


def _calibrated(program: Program, inputs: Sequence[Any]) -> Program:
    """The program with `stats` of one batch, its floats computed in NumPy: nothing is compiled."""

    def read(stored: Sequence[Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def watch(eqn: Any, values: list[Any]) -> None:
            if eqn.primitive.name == "qc_observe":
                found[eqn.params["id"]] = values[0]

        reference.evaluate_floats(program.jaxpr, [*program.weights.values(), *stored], watch)
        return found

    collector = Collector(program)
    collector.add(read, list(inputs))
    return program.replace(stats=collector.stats)


def _every_result(program: Program) -> Program:
    """The program whose results are those of all its equations, in order."""

    def make(builder: Builder, *inputs: Any) -> list[Any]:
        seen: list[Any] = []

        def rule(eqn: Any, values: list[Any]) -> list[Any]:
            results = _compat.bind(eqn, values)
            seen.extend(results)
            return results

        replay.evaluate(program.jaxpr, [*(builder.get(n) for n in program.weights), *inputs], rule)
        return seen

    fields = {"stats": program.stats, "notes": program.notes, "stage": program.stage}
    return build(make, program.weights, program.input_avals, program.signature, **fields)
