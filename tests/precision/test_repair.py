"""Configurations near the predicted optimum are run: where losses do not add up, a better one is found."""

import numpy as np
import pytest

from qcompiler.errors import RecipeError
from qcompiler.precision import knapsack, policies
from qcompiler.precision.knapsack import Group, Problem
from qcompiler.precision.repair import neighbours, repair

BITS = {"int4": 4, "int8": 8}


def _problem(losses, budget, **fields):
    bits = {n: {c: BITS[c] for c in row} for n, row in losses.items()}
    return Problem(losses, {"bits": bits}, {"bits": budget}, **fields)


def _chain(count=6, seed=0):
    """Layers of which half may be int8."""
    rng = np.random.default_rng(seed)
    losses = {f"l{k}": {"int4": rng.uniform(0.5, 1.5), "int8": 0.01} for k in range(count)}
    return _problem(losses, 4 * count + 4 * (count // 2))


def test_two_layers_that_lose_much_together_are_separated():
    """The layers of least loss would both be int4, but one behind the other they lose five more: four times the sum."""
    losses = {"a": 0.1, "b": 0.2, "c": 0.5, "d": 0.9}
    problem = _problem({n: {"int4": loss, "int8": 0.01} for n, loss in losses.items()}, 24)
    start = knapsack.solve(problem)
    assert start == {"a": "int4", "b": "int4", "c": "int8", "d": "int8"}

    def measure(config):
        return problem.loss(config) + (5.0 if config["a"] == config["b"] == "int4" else 0.0)

    found = repair(problem, start, measure, measurements=20)
    best = min(map(measure, knapsack.enumerate_configs(problem)))
    assert found.config == {"a": "int4", "b": "int8", "c": "int4", "d": "int8"}
    assert found.loss == best and found.first > 4 * found.loss
    assert problem.allows(found.config)


@pytest.mark.parametrize("seed", range(6))
def test_random_interactions_are_repaired_to_within_five_percent(seed):
    """Pairs of neighbouring int4 layers lose up to as much again as the layers themselves."""
    problem = _chain(8, seed)
    extra = np.random.default_rng(seed).uniform(0.0, 1.0, 8)

    def measure(config):
        low = [c == "int4" for c in config.values()]
        return problem.loss(config) + sum(x for x, a, b in zip(extra, low, low[1:], strict=False) if a and b)

    best = min(map(measure, knapsack.enumerate_configs(problem)))
    found = repair(problem, knapsack.solve(problem), measure, measurements=64)
    assert found.loss <= found.first and found.loss <= 1.05 * best


def test_losses_that_add_up_leave_nothing_to_repair():
    problem = _chain()
    start = knapsack.solve(problem)
    found = repair(problem, start, problem.loss, measurements=100)
    assert found.config == start and found.loss == found.first
    assert found.measurements == 1 + len(list(neighbours(problem, start)))


def test_the_number_of_measurements_is_kept_and_none_is_made_twice():
    problem, seen = _chain(), []

    def measure(config):
        seen.append(tuple(config.values()))
        return -float(len(seen))  # always better, so that the search never ends by itself

    found = repair(problem, knapsack.solve(problem), measure, measurements=13)
    assert found.measurements == len(seen) == len(set(seen)) == 13 and found.loss == -13.0
    assert repair(problem, knapsack.solve(problem), lambda config: 0.0, measurements=1).measurements == 1


def test_neighbours_keep_to_budget_and_groups():
    losses = {n: {"int4": 0.1 * k, "int8": 0.0} for k, n in enumerate("abcd", 1)}
    problem = _problem(losses, 24, groups=[Group(("a", "c"), BITS)])
    start = knapsack.solve(problem)
    found = list(neighbours(problem, start))
    assert found and all(problem.allows(c) and c != start for c in found)
    assert {tuple(c.values()) for c in found} <= {tuple(c.values()) for c in knapsack.enumerate_configs(problem)}


def test_resources_with_weights_count_beside_the_measured_loss():
    """A configuration that measures a little better and takes much more of a weighted resource is no better."""
    losses = {"a": {"int4": 0.1, "int8": 0.0}}
    problem = Problem(losses, {"bits": {"a": BITS}}, weights={"bits": 1.0})
    start = knapsack.solve(problem)
    assert start == {"a": "int4"} and repair(problem, start, problem.loss).config == start


def test_uniform_is_the_best_single_type_within_the_budget():
    problem = _chain()
    assert set(policies.uniform(problem).values()) == {"int4"}
    with pytest.raises(RecipeError, match="none of int4, int8 for all layers keeps to bits <= 1"):
        policies.uniform(_problem(problem.losses, 1))


def test_the_most_sensitive_fifth_is_raised():
    losses = {f"l{k}": {"int8": float(k % 7), "int16": 0.0} for k in range(10)}
    found = policies.top_sensitive(Problem(losses))
    assert [n for n, c in found.items() if c == "int16"] == ["l5", "l6"]
    grouped = policies.top_sensitive(Problem(losses, groups=[Group(("l0", "l6"), {"int8": 8, "int16": 16})]))
    assert [n for n, c in grouped.items() if c == "int16"] == ["l0", "l5", "l6"]
    with pytest.raises(RecipeError, match="l0 has no int16 among its candidates int8"):
        policies.top_sensitive(Problem({"l0": {"int8": 0.0}}))


def test_baselines_spend_the_budget_and_keep_to_it():
    problem = _chain(8)
    magnitude = {n: float(k) for k, n in enumerate(problem.losses)}
    found = policies.by_magnitude(problem, magnitude)
    assert [n for n, c in found.items() if c == "int8"] == ["l4", "l5", "l6", "l7"]
    draws = [policies.at_random(problem, seed) for seed in range(8)]
    assert all(map(problem.allows, draws)) and len({tuple(d.values()) for d in draws}) > 1
    assert policies.at_random(problem, 3) == draws[3]
