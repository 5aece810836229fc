"""Trying configurations near the predicted optimum, since measured losses do not quite add up.

Two layers that lose little each may lose much together (or cancel). So the solver's configuration is run, then those
that differ from it in one layer, then in two, best predicted first, wherever the budgets allow; the first that measures
better becomes the one to beat, and the search goes on around it until nothing near is better or the measurements are
spent. What measured best is the result, so it is never worse than where the search began.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

from qcompiler.debug.progress import ProgressBar
from qcompiler.precision.knapsack import Config, Problem

#: Neighbours that change two layers are made of this many of the best predicted changes of one.
_PAIRED = 64


@dataclasses.dataclass(frozen=True)
class Repaired:
    """What the search came to.

    Attributes:
      config: the best measured.
      loss: its measured loss.
      first: the measured loss of where the search began.
      measurements: how many configurations were run.
    """

    config: Config
    loss: float
    first: float
    measurements: int


def repair(
    problem: Problem, start: Config, measure: Callable[[Mapping[str, str]], float], measurements: int = 32
) -> Repaired:
    """Greedy local search with a bounded number of measurements.

    Where resources have weights in the objective, the sum of the measured loss and those is compared.

    Args:
      problem: budgets, groups and predicted losses.
      start: a configuration that the problem allows.
      measure: configuration -> its real loss; the same for the same configuration.
      measurements: of configurations, the first one counted; at least 1.
    """
    known: dict[tuple[str, ...], float] = {}
    bar = ProgressBar("repair", measurements)

    def score(config: Config) -> tuple[float, float]:
        """What is compared, and the measured loss."""
        key = tuple(config[layer] for layer in problem.losses)
        if key not in known:
            known[key] = float(measure(config))
            bar.update(len(known))
        return known[key] + problem.objective(config) - problem.loss(config), known[key]

    try:
        best, (least, loss) = start, score(start)
        first, improved = loss, True
        while improved and len(known) < measurements:
            improved = False
            for config in neighbours(problem, best):
                if len(known) >= measurements:
                    break
                found, of_config = score(config)
                if found < least:
                    best, least, loss, improved = config, found, of_config, True
                    break
    finally:
        bar.close()
    return Repaired(best, loss, first, len(known))


def neighbours(problem: Problem, config: Config) -> Iterator[Config]:
    """Allowed configurations that differ in one layer, then in two, each from the best predicted on.

    Of layers in a group, those that must follow a change follow it.
    """
    single = sorted(_changes(problem, config), key=problem.objective)
    seen = {tuple(config.values())}

    def fresh(found: Config) -> bool:
        new = tuple(found.values()) not in seen and problem.allows(found)
        seen.add(tuple(found.values()))
        return new

    yield from filter(fresh, single)
    # One change for the better and one that pays for it: both ends of the order.
    ends = single if len(single) <= 2 * _PAIRED else [*single[:_PAIRED], *single[-_PAIRED:]]
    pairs = (_merged(config, a, b) for a, b in itertools.combinations(ends, 2))
    yield from sorted(filter(fresh, (p for p in pairs if p is not None)), key=problem.objective)


def _changes(problem: Problem, config: Config) -> Iterator[Config]:
    """Every change of one layer, with what its groups require."""
    for layer, row in problem.losses.items():
        for candidate in row:
            if candidate != config[layer]:
                changed = settled(problem, {**config, layer: candidate}, layer)
                if changed is not None:
                    yield changed


def settled(problem: Problem, config: Config, changed: str) -> Config | None:
    """The configuration in which all groups agree with a changed layer; None if one cannot.

    A layer that must follow gets, of the candidates that agree, the one it loses least with.
    """
    config, fixed, todo = dict(config), {changed}, [changed]
    while todo:
        layer = todo.pop()
        for group in (g for g in problem.groups if layer in g.layers):
            label = group.label[config[layer]]
            for other in (n for n in group.layers if group.label[config[n]] != label):
                row = problem.losses[other]
                alike = [c for c in row if group.label[c] == label]
                if other in fixed or not alike:
                    return None
                config[other] = min(alike, key=row.__getitem__)
                fixed.add(other)
                todo.append(other)
    return config


def _merged(config: Config, a: Config, b: Config) -> Config | None:
    """Both changes at once; None if they speak of the same layer."""
    merged = {}
    for layer, now in config.items():
        if a[layer] != now and b[layer] != now:
            return None
        merged[layer] = a[layer] if a[layer] != now else b[layer]
    return merged
