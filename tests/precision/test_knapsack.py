"""The solver against enumeration and against dynamic programming, and what it says where nothing is feasible."""

import itertools
import math

import numpy as np
import pytest

from qcompiler.errors import RecipeError
from qcompiler.precision import knapsack
from qcompiler.precision.knapsack import Conversion, Group, Problem

TYPES = ("int4", "int8", "int16")
BITS = {"int4": 4, "int8": 8, "int16": 16}


def _tables(rng, layers, types=TYPES):
    """Losses that fall with the bits, over several magnitudes, and sizes of layers."""
    sizes = {f"l{k}": int(rng.integers(1, 40)) for k in range(layers)}
    losses = {n: {c: 10.0 ** rng.uniform(-6, 0) / BITS[c] for c in types} for n in sizes}
    return losses, {n: {c: BITS[c] * size for c in types} for n, size in sizes.items()}


def _random_problem(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 6))
    losses, bits = _tables(rng, count)
    time = {n: {c: rng.uniform(0.1, 1.0) for c in row} for n, row in bits.items()}
    names = list(losses)
    label = {"int4": "a8", "int8": "a8", "int16": "a16"}
    groups = [Group((names[0], names[-1]), label)] if seed % 2 else []
    convert = {
        (p, q): {"time": rng.uniform(0, 0.5), "bits": rng.uniform(0, 20)}
        for p in ("a8", "a16")
        for q in ("a8", "a16")
        if p != q
    }
    edges = [Conversion(a, b, label, convert) for a, b in itertools.pairwise(names)] if seed % 3 else []
    budget = {
        "bits": rng.uniform(0.35, 0.9) * sum(row["int16"] for row in bits.values()),
        "time": rng.uniform(0.4, 0.9) * count,
    }
    weights = {"time": 10.0 ** rng.uniform(-4, 0)} if seed % 4 == 0 else {}
    return Problem(losses, {"bits": bits, "time": time}, budget, groups, edges, weights)


@pytest.mark.parametrize("seed", range(24))
def test_the_optimum_is_that_of_enumeration(seed):
    """Two budgets; groups, conversions and weighted resources in some."""
    problem = _random_problem(seed)
    allowed = knapsack.enumerate_configs(problem)
    if not allowed:
        with pytest.raises(RecipeError, match="no configuration"):
            knapsack.solve(problem)
        return
    best = min(map(problem.objective, allowed))
    found = knapsack.solve(problem)
    assert problem.allows(found)
    # Sums of float64 in another order, and the solver's gap of 1e-11 of the largest loss.
    assert problem.objective(found) == pytest.approx(best, rel=1e-9, abs=1e-11)


def test_most_random_problems_are_feasible():
    """Or the test above would show little."""
    assert sum(bool(knapsack.enumerate_configs(_random_problem(seed))) for seed in range(24)) >= 16


def _by_dynamic_programming(losses, costs, budget):
    """Least loss of a multiple-choice knapsack with integer costs: best[b] over layers so far that cost b in all."""
    best = np.zeros(budget + 1)
    for layer, row in losses.items():
        following = np.full(budget + 1, np.inf)
        for candidate, loss in row.items():
            cost = costs[layer][candidate]
            if cost <= budget:
                shifted = best[: budget + 1 - cost] + loss
                following[cost:] = np.minimum(following[cost:], shifted)
        best = following
    return best.min()


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_is_that_of_dynamic_programming(seed):
    """Forty layers, whose 3**40 configurations nobody enumerates."""
    losses, bits = _tables(np.random.default_rng(seed), 40)
    budget = int(0.5 * sum(row["int16"] for row in bits.values()))
    found = knapsack.choose(losses, {"bits": bits}, {"bits": budget})
    problem = Problem(losses, {"bits": bits}, {"bits": budget})
    assert problem.allows(found)
    assert problem.loss(found) == pytest.approx(_by_dynamic_programming(losses, bits, budget), rel=1e-9)


def _along_a_chain(losses, convert):
    """Least loss plus conversions of a chain of layers (Viterbi): best[c] over the layers so far that end in c."""
    rows = list(losses.values())
    best = dict(rows[0])
    for row in rows[1:]:
        best = {c: loss + min(best[b] + convert(b, c) for b in best) for c, loss in row.items()}
    return min(best.values())


@pytest.mark.parametrize("seed", range(4))
def test_conversions_along_a_chain_are_those_of_dynamic_programming(seed):
    rng = np.random.default_rng(seed)
    losses, _ = _tables(rng, 25)
    label = {c: c for c in TYPES}
    cost = {(b, c): {"time": rng.uniform(0.0, 0.2)} for b in TYPES for c in TYPES if b != c}
    names = list(losses)
    edges = [Conversion(a, b, label, cost) for a, b in itertools.pairwise(names)]
    free = {n: dict.fromkeys(TYPES, 0.0) for n in names}
    problem = Problem(losses, {"time": free}, conversions=edges, weights={"time": 1.0})
    best = _along_a_chain(losses, lambda b, c: cost.get((b, c), {"time": 0.0})["time"])
    assert problem.objective(knapsack.solve(problem)) == pytest.approx(best, rel=1e-9)


def test_without_a_budget_every_layer_gets_its_best():
    losses, _ = _tables(np.random.default_rng(0), 12)
    assert knapsack.choose(losses, {}, {}) == {n: min(row, key=row.get) for n, row in losses.items()}


def test_a_conversion_that_costs_more_than_it_gains_keeps_neighbours_alike():
    """The middle layer alone is better in int16 by 0.2; two conversions at 0.15 each undo that, at 0.05 they do not."""
    losses = {n: {"int8": 0.3, "int16": 0.1 if n == "b" else 0.4} for n in "abc"}
    free = {n: {"int8": 0.0, "int16": 0.0} for n in "abc"}
    label = {"int8": 8, "int16": 16}

    def solved(each):
        cost = {(8, 16): {"time": each}, (16, 8): {"time": each}}
        edges = [Conversion("a", "b", label, cost), Conversion("b", "c", label, cost)]
        return knapsack.choose(losses, {"time": free}, {}, conversions=edges, weights={"time": 1.0})

    assert solved(0.15) == {"a": "int8", "b": "int8", "c": "int8"}
    assert solved(0.05) == {"a": "int8", "b": "int16", "c": "int8"}
    assert solved(0.0) == {"a": "int8", "b": "int16", "c": "int8"}


def test_a_group_shares_its_label_and_nothing_else():
    """One layer wants int16 by little, the other int8 by much: both read 8 bits, with weights of their own."""
    losses = {
        "q": {"int4": 0.5, "int8": 0.4, "int16": 0.3},
        "k": {"int4": 0.1, "int8": 0.2, "int16": 0.9},
    }
    group = Group(("q", "k"), {"int4": 8, "int8": 8, "int16": 16})
    assert knapsack.choose(losses, {}, {}) == {"q": "int16", "k": "int4"}
    assert knapsack.choose(losses, {}, {}, groups=[group]) == {"q": "int8", "k": "int4"}


def test_budgets_that_are_met_exactly_are_met():
    losses, bits = _tables(np.random.default_rng(1), 30)
    least = sum(row["int4"] for row in bits.values())
    assert set(knapsack.choose(losses, {"bits": bits}, {"bits": least}).values()) == {"int4"}


def test_a_budget_out_of_reach_says_what_is_in_reach():
    losses, bits = _tables(np.random.default_rng(2), 5)
    least = sum(row["int4"] for row in bits.values())
    with pytest.raises(RecipeError, match=rf"bits <= {least - 1}; the smallest reachable is {least}: raise the budget"):
        knapsack.choose(losses, {"bits": bits}, {"bits": least - 1})


def test_the_smallest_reachable_counts_conversions():
    losses = {n: {"int8": 0.0, "int16": 0.0} for n in "ab"}
    time = {"a": {"int8": 1.0, "int16": 2.0}, "b": {"int8": 2.0, "int16": 1.0}}
    label = {"int8": 8, "int16": 16}
    edge = Conversion("a", "b", label, {(8, 16): {"time": 0.5}, (16, 8): {"time": 0.5}})
    with pytest.raises(RecipeError, match=r"the smallest reachable is 2\.5"):
        knapsack.choose(losses, {"time": time}, {"time": 2.4}, conversions=[edge])


def test_budgets_that_exclude_each_other_are_named():
    losses = {"a": {"int8": 0.0, "float": 0.0}}
    costs = {"bits": {"a": {"int8": 8.0, "float": 32.0}}, "time": {"a": {"int8": 3.0, "float": 1.0}}}
    with pytest.raises(RecipeError, match=r"with bits <= 8 the smallest reachable time is 3, and 2 is asked for"):
        knapsack.choose(losses, costs, {"bits": 8, "time": 2})


def test_problems_that_make_no_sense():
    losses = {"a": {"int8": 0.0}, "b": {"int4": 0.0}}
    with pytest.raises(RecipeError, match="what b as int4 costs of bits"):
        knapsack.choose(losses, {"bits": {"a": {"int8": 8}}}, {"bits": 8})
    with pytest.raises(RecipeError, match="the loss of a as int8 is nan"):
        knapsack.choose({"a": {"int8": math.nan}}, {}, {})
    with pytest.raises(RecipeError, match="speaks of c"):
        knapsack.choose(losses, {}, {}, groups=[Group(("a", "c"), {})])
    with pytest.raises(RecipeError, match=r"one type: a, b \(tied\)"):
        knapsack.choose(losses, {}, {}, groups=[Group(("a", "b"), {"int8": 8, "int4": 4}, "tied")])
