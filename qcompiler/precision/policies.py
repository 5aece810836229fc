"""Rules that need no solver: one type for all, the seeds' "most sensitive 20 % in int16", and baselines to beat.

Each gives a configuration of a `Problem`. Baselines (`at_random`, `by_magnitude`) raise layers one by one from the
cheapest configuration, in an order that knows nothing of losses, for as long as the budgets allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qcompiler.errors import RecipeError
from qcompiler.precision import knapsack
from qcompiler.precision.knapsack import Config, Problem
from qcompiler.precision.repair import settled

#: Share of layers that `top_sensitive` raises.
TOP = 0.2


def uniform(problem: Problem) -> Config:
    """The candidate that all layers get alike, of those within the budgets the one of least loss.

    Raises:
      RecipeError: no candidate keeps to the budgets.
    """
    rows = list(problem.losses.values())
    shared = [c for c in rows[0] if all(c in row for row in rows)]
    configs = [dict.fromkeys(problem.losses, c) for c in shared]
    allowed = [c for c in configs if problem.allows(c)]
    if not allowed:
        budgets = ", ".join(f"{r} <= {most:g}" for r, most in problem.budget.items())
        raise RecipeError(f"none of {', '.join(shared) or 'no shared candidates'} for all layers keeps to {budgets}")
    return min(allowed, key=problem.objective)


def top_sensitive(problem: Problem, base: str = "int8", raised: str = "int16", share: float = TOP) -> Config:
    """The layers that lose most in `base` get `raised`: a share of all, rounded up; the rest stay.

    Layers of a group with a raised one are raised with it.

    Raises:
      RecipeError: a layer has no such candidates, or the budgets do not allow it.
    """
    for layer, row in problem.losses.items():
        if lacking := [c for c in (base, raised) if c not in row]:
            raise RecipeError(
                f"the policy raises layers from {base} to {raised}, and {layer} has no {lacking[0]} among its "
                f"candidates {', '.join(row)}"
            )
    order = sorted(problem.losses, key=lambda layer: problem.losses[layer][base], reverse=True)
    config = dict.fromkeys(problem.losses, base)
    for layer in order[: int(np.ceil(share * len(order)))]:
        if config[layer] == base:
            config = settled(problem, {**config, layer: raised}, layer) or config
    for resource, most in problem.budget.items():
        if (cost := problem.cost(config, resource)) > most:
            raise RecipeError(f"the most sensitive {share:.0%} in {raised} take {cost:g} of {resource}, not {most:g}")
    return config


def at_random(problem: Problem, seed: int) -> Config:
    """Layers raised in random order, each to a random candidate that the budgets allow."""
    random = np.random.default_rng(seed)
    order = [list(problem.losses)[k] for k in random.permutation(len(problem.losses))]
    ranks = {layer: [list(row)[k] for k in random.permutation(len(row))] for layer, row in problem.losses.items()}
    return _raised(problem, order, ranks)


def by_magnitude(problem: Problem, magnitude: Mapping[str, float]) -> Config:
    """Layers raised in the order of their mean weight magnitude, each to the best candidate that the budgets allow.

    Args:
      problem: with a budget.
      magnitude: layer -> mean |w|.
    """
    order = sorted(problem.losses, key=magnitude.__getitem__, reverse=True)
    ranks = {layer: sorted(row, key=row.__getitem__) for layer, row in problem.losses.items()}
    return _raised(problem, order, ranks)


def _raised(problem: Problem, order: Sequence[str], ranks: Mapping[str, Sequence[str]]) -> Config:
    """From the cheapest configuration on, each layer in its turn gets the first of its ranks that is allowed."""
    if not problem.budget:
        raise RecipeError("baselines spend a budget: give one")
    resource = next(iter(problem.budget))
    config = knapsack.cheapest(problem, resource)
    for layer in order:
        for candidate in ranks[layer]:
            tried = settled(problem, {**config, layer: candidate}, layer)
            if tried is not None and problem.allows(tried):
                config = tried
                break
    return config
