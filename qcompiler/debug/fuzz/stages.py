"""One function at the stages of the compiler that the checks compare."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from qcompiler import pipeline
from qcompiler.backends import lax_int
from qcompiler.debug import reference
from qcompiler.ir import _compat, loops, replay, tracing
from qcompiler.ir.program import Builder, Program, build
from qcompiler.passes.observe import Collector, reader
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
    program = tracing.trace(fun, weights, tuple(inputs), parameter_names=names)
    run = lambda program, *names: functools.reduce(lambda p, name: pipeline.PASSES[name](p, recipe), names, program)
    traced = run(program, "simplify", "fold_norms")
    program = run(traced, *(["equalize"] if recipe.equalizes != "nowhere" else []), "partition", "observe")
    program = _calibrated(program, inputs) if stats is None else program.replace(stats=stats)
    fused = run(program, "assign_precision", "insert_qdq", "fuse")
    return Stages(traced, fused, run(fused, "fold_zero_points"))


def _calibrated(program: Program, inputs: Sequence[Any]) -> Program:
    """The program with `stats` of one batch, its floats computed in NumPy: nothing is compiled, but bodies of loops."""

    def read(stored: Sequence[Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def watch(eqn: Any, values: list[Any]) -> None:
            if eqn.primitive.name == "qc_observe":
                found[eqn.params["id"]] = values[0]

        reference.evaluate_floats(program.jaxpr, [*program.weights.values(), *stored], watch)
        return found

    collector = Collector(program)
    collector.add(reader(program) if loops.loops_of(program) else read, list(inputs))
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
