"""From a calibrated program and a `Precision` to an `Assignment`: losses, costs, the solver, and running."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qcompiler import sensitivity
from qcompiler.errors import RecipeError
from qcompiler.ir import loops
from qcompiler.ir.program import Program
from qcompiler.passes import _regions
from qcompiler.precision import knapsack, latency, layers, policies, repair
from qcompiler.precision.assignment import Assignment, Choice
from qcompiler.precision.config import Precision
from qcompiler.precision.knapsack import Config, Problem
from qcompiler.precision.measured import Measured
from qcompiler.samples import Samples


class Losses(Protocol):
    """What losses come from, as `qcompiler.Sensitivity` has it."""

    def table(self) -> Mapping[str, Mapping[str, float]]:
        """Layer id -> candidate name -> additive loss."""

    def measure(self, config: Mapping[str, str]) -> float:
        """The loss of a configuration {layer id: candidate name}."""


def assignment_of(program: Program, recipe: Any, samples: Samples) -> Assignment:
    """What a recipe's `precision` comes to for a program.

    Args:
      program: partitioned and calibrated, without observers.
      recipe: a `qcompiler.Recipe` with `precision`.
      samples: kept from calibration.

    Raises:
      RecipeError: the budget cannot be kept to, there is nothing to choose for, or a file speaks of other layers.
    """
    found = [e for part in loops.nested(program) for e in part.eqns if _regions.is_region(e)]
    regions = {e.params["id"]: e for e in found}
    if isinstance(recipe.precision, Assignment):
        recipe.precision.check(regions)
        return recipe.precision
    precision = recipe.precision
    ruled = [region for region, e in regions.items() if recipe.rule_for(region, _regions.weight_shape(e)) is not None]
    losses = sensitivity.analyze(
        program,
        samples,
        recipe,
        candidates=precision.by_name,
        metric=precision.metric,
        batches=precision.samples,
    )
    times = None
    if precision.measures_latency:
        free = layers.free_layers(layers.layers_of(program), ruled)
        times = latency.measure(free, precision.by_name, recipe)
    return decide(program, precision, losses, times, ruled)


def problem_of(
    program: Program,
    precision: Precision,
    losses: Mapping[str, Mapping[str, float]],
    times: latency.Latencies | None = None,
    ruled: Sequence[str] = (),
) -> Problem:
    """The optimization problem of a program.

    Args:
      program: partitioned, without observers.
      precision: candidates, budgets.
      losses: layer id -> candidate -> additive loss; a candidate whose loss is no finite number is left out.
      times: measured latencies, where budgets or weights are of them.
      ruled: ids of layers that rules of the user decide.

    Raises:
      RecipeError: there are no layers, or a layer's losses are not known.
    """
    free = layers.free_layers(layers.layers_of(program), ruled)
    candidates = precision.by_name
    if unknown := [layer.id for layer in free if layer.id not in losses]:
        raise RecipeError(f"no losses are known for layer {unknown[0]}")
    usable = {n.id: {c: x for c in candidates if math.isfinite(x := losses[n.id][c])} for n in free}
    costs: dict[str, dict[str, dict[str, float]]] = {}
    elements = sum(layer.elements for layer in free)
    for layer in free:
        for name in usable[layer.id]:
            found = layers.static_costs(layer, candidates[name])
            # The budget is of an average, so that costs are what each layer adds to it.
            found["weight_bits"] /= elements
            if times is not None:
                found["latency_ms"] = times.ms(layer, name)
                if candidates[name].is_float:
                    found["latency_ms"] += times.conversion_ms(layers.entering(free, layer))
            for resource, cost in found.items():
                costs.setdefault(resource, {}).setdefault(layer.id, {})[name] = cost
    edges = []
    if times is not None:
        edges = layers.conversions_of(free, candidates, lambda n: {"latency_ms": times.conversion_ms(n)})
    problem = Problem(usable, costs, precision.budget, layers.groups_of(free, candidates), edges)
    if precision.accuracy_weight is None:
        return problem
    exchange = _exchange(problem, precision.speed, precision.accuracy_weight)
    return dataclasses.replace(problem, weights={precision.speed: exchange})


def _exchange(problem: Problem, speed: str, alpha: float) -> float:
    """What one unit of speed is worth in loss: (1 - alpha) / alpha times the ratio of the spans."""
    of_speed = problem.costs[speed]
    span = lambda table: sum(max(row.values()) - min(row.values()) for row in table.values())
    speeds = {n: {c: of_speed[n][c] for c in row} for n, row in problem.losses.items()}
    return (1 - alpha) / alpha * span(problem.losses) / (span(speeds) or 1.0)


def decide(
    program: Program,
    precision: Precision,
    losses: Losses,
    times: latency.Latencies | None = None,
    ruled: Sequence[str] = (),
) -> Assignment:
    """The precision of every layer that no rule decides; see `problem_of` for the arguments.

    Raises:
      RecipeError: the budget cannot be kept to, or there is nothing to choose for.
    """
    problem = problem_of(program, precision, losses.table(), times, ruled)
    if precision.policy == "top20_int16":
        start = policies.top_sensitive(problem)
    elif precision.policy == "uniform":
        start = policies.uniform(problem)
    else:
        start = knapsack.solve(problem)
    steps = precision.repair_steps if precision.policy == "budget" else 1
    measure = Measured(losses.measure, problem, precision.checkpoint)
    found = repair.repair(problem, start, measure, steps)
    return _explained(problem, precision, found, start, times)


def _explained(
    problem: Problem,
    precision: Precision,
    found: repair.Repaired,
    start: Config,
    times: latency.Latencies | None = None,
) -> Assignment:
    """The assignment of a configuration, with a reason for every layer."""
    config = found.config
    reported = [r for r in problem.costs if r in (*problem.budget, *problem.weights, "weight_bytes")]
    reason = _Reasons(problem, precision, config, start)
    return Assignment(
        candidates=precision.by_name,
        layers={
            layer: Choice(
                candidate,
                dict(problem.losses[layer]),
                {r: problem.costs[r][layer][candidate] for r in reported},
                reason(layer),
            )
            for layer, candidate in config.items()
        },
        policy=precision.policy,
        metric=precision.metric_name,
        budget=precision.budget,
        totals={r: problem.cost(config, r) for r in reported},
        predicted_loss=problem.loss(config),
        measured_loss=found.loss,
        measurements=found.measurements,
        noise=times.noise if times is not None else None,
    )


class _Reasons:
    """Why each layer has its type, in a few words."""

    def __init__(self, problem: Problem, precision: Precision, config: Config, start: Config) -> None:
        self.problem, self.candidates, self.config, self.start = problem, precision.by_name, config, start
        # Sensitive is what loses much in the type that it can least afford.
        worst = {layer: max(row.values()) for layer, row in problem.losses.items()}
        order = sorted(worst, key=worst.__getitem__, reverse=True)
        self.rank = {layer: k for k, layer in enumerate(order, 1)}

    def __call__(self, layer: str) -> str:
        now = self.config[layer]
        parts = [self._sensitivity(layer), *self._alternatives(layer, now)]
        activation = self.candidates[now].activation
        if activation is not None and activation.bits > 8:
            parts.append(f"{now} costs 2 products")
        shared = [g for g in self.problem.groups if layer in g.layers]
        parts += [f"must {g.why} alike: {len(g.layers)} layers" for g in shared]
        if self.start[layer] != now:
            parts.append(f"was {self.start[layer]} before runs measured better")
        return "; ".join(parts)

    def _sensitivity(self, layer: str) -> str:
        rank, count = self.rank[layer], len(self.rank)
        if rank == 1:
            return "most sensitive"
        return "least sensitive" if rank == count else f"{rank} of {count} in sensitivity"

    def _alternatives(self, layer: str, now: str) -> list[str]:
        """What the next worse candidate would lose, and the next better one gain."""
        row = self.problem.losses[layer]
        order = sorted(row, key=row.__getitem__)
        at = order.index(now)
        found = []
        if at + 1 < len(order):
            found.append(f"{order[at + 1]} would lose {row[order[at + 1]] - row[now]:.2g} more")
        if at > 0:
            found.append(f"{order[at - 1]} would lose {row[now] - row[order[at - 1]]:.2g} less")
        return found
