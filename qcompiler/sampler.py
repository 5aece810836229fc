"""Picks the calibration samples that stand best for a larger pool, by what the model makes of them.

    chosen = qc.trace(model, pool[0]).representative(pool, 50)
    print(chosen)
    qmodel = qc.quantize(model, chosen.batches)

A sample is described by what it gives in every value that calibration would observe: smallest, largest, mean and root
mean square. A share of the picks extends the ranges that are covered as fast as can be, since what calibration has not
seen saturates; the others stand for the bulk: they maximize the sum over the pool of the nearness to the nearest pick
(facility location; a greedy choice reaches 1 - 1/e of the best, Nemhauser et al. 1978).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler.calls import call
from qcompiler.debug.progress import ProgressBar
from qcompiler.errors import CalibrationError

#: Numbers that describe a sample in one value: extremes first.
_NUMBERS = 4
#: Draws of as many samples at random, which a choice is compared with.
_DRAWS = 16
#: Largest pool: every sample is compared with every other.
LARGEST_POOL = 8192


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """The chosen samples and what they cover.

    Attributes:
      indices: int64[count], of the samples in the pool, counted through its batches, in ascending order.
      batches: one calibration batch that holds them.
      pool: number of samples there were.
      range_coverage: value id -> share of the range seen in the pool that the chosen samples span, 0 to 1.
      distance: mean distance from a sample of the pool to the nearest chosen one, in standard deviations per number.
      random_range_coverage, random_distance: the means of both over random choices of as many.
    """

    indices: np.ndarray
    batches: tuple[call, ...]
    pool: int
    range_coverage: Mapping[str, float]
    distance: float
    random_range_coverage: float
    random_distance: float

    def __str__(self) -> str:
        covered = float(np.mean([*self.range_coverage.values()]))
        worst = sorted(self.range_coverage.items(), key=lambda item: item[1])[:5]
        lines = [
            f"{len(self.indices)} of {self.pool} samples",
            f"ranges covered    {covered:6.1%}   at random {self.random_range_coverage:6.1%}",
            f"mean distance     {self.distance:6.3f}   at random {self.random_distance:6.3f}",
            "least covered",
            *(f"  {share:6.1%}  {name}" for name, share in worst),
        ]
        return "\n".join(lines)


def select(
    pool: Iterable[tuple[int, call, list[Any]]],
    read: Callable[[list[Any]], Mapping[str, Any]],
    count: int,
    edges: float,
) -> Selection:
    """The `count` samples of a pool that represent it; see the module's docstring.

    Args:
      pool: (number of the batch, batch, its flat inputs); each input's leading dimension counts samples.
      read: flat inputs -> value id -> array, the values that are observed.
      count: how many to choose, at least 1.
      edges: share of them that is chosen to cover ranges, 0 to 1.

    Raises:
      CalibrationError: `count` or `edges` is out of range, inputs without a common leading dimension, no samples, or
        more than `LARGEST_POOL`.
    """
    if count < 1 or not 0 <= edges <= 1:
        raise CalibrationError(f"need a count of at least 1 and edges between 0 and 1, got {count} and {edges}")
    items: list[call] = []
    sizes: list[int] = []
    described: list[dict[str, np.ndarray]] = []
    with contextlib.closing(ProgressBar("sampling")) as bar:
        for number, item, flat in pool:
            sizes.append(_samples_in(flat, number))
            items.append(item)
            values = read(flat)
            described.append({key: _describe(np.asarray(x), sizes[-1]) for key, x in values.items()})
            bar.update(sum(sizes))
    total = sum(sizes)
    if not total:
        raise CalibrationError("the pool holds no samples")
    if total > LARGEST_POOL:
        raise CalibrationError(f"the pool holds {total} samples, at most {LARGEST_POOL} can be compared: thin it out")
    keys = [key for key in described[0] if all(key in d and d[key].size for d in described)]
    numbers = np.stack([np.concatenate([d[key] for d in described]) for key in keys], axis=1)
    features = _standardized(numbers.reshape(total, -1))
    picks = _greedy(numbers, features, min(count, total), edges)
    chosen = np.sort(picks)
    rng = np.random.default_rng(0)
    draws = [rng.choice(total, len(chosen), replace=False) for _ in range(_DRAWS)]
    return Selection(
        chosen,
        (_taken(items, sizes, chosen),),
        total,
        dict(zip(keys, _covered(numbers, chosen).tolist(), strict=True)),
        _distance(features, chosen),
        float(np.mean([_covered(numbers, draw).mean() for draw in draws])),
        float(np.mean([_distance(features, draw) for draw in draws])),
    )


def _samples_in(flat: Sequence[Any], number: int) -> int:
    lengths = {np.shape(x)[0] for x in flat if np.ndim(x)}
    if len(lengths) != 1 or not all(np.ndim(x) for x in flat):
        raise CalibrationError(
            f"pool batch {number}: inputs have the shapes {[np.shape(x) for x in flat]}; samples are told apart by a "
            "leading dimension that all inputs have in common"
        )
    return lengths.pop()


def _describe(value: np.ndarray, samples: int) -> np.ndarray:
    """`float64[samples, 4]` of a value that has the samples in front, or a multiple of them; empty for others."""
    if not samples or not value.size or value.shape[:1] == () or value.shape[0] % samples:
        return np.empty((0, _NUMBERS))
    rows = value.reshape(samples, -1).astype(np.float64)
    return np.stack([rows.min(1), rows.max(1), rows.mean(1), np.sqrt(np.square(rows).mean(1))], axis=1)


def _standardized(features: np.ndarray) -> np.ndarray:
    """Zero mean and unit deviation per number; over the root of their count, so that distances are per number."""
    spread = features.std(0)
    centred = (features - features.mean(0)) / np.where(spread > 0, spread, 1.0)
    return centred / np.sqrt(features.shape[1])


def _greedy(numbers: np.ndarray, features: np.ndarray, count: int, edges: float) -> np.ndarray:
    """Indices: those that extend ranges most, then those that are nearest to what is farthest from all."""
    low, high = numbers[:, :, 0], numbers[:, :, 1]
    span = np.maximum(high.max(0) - low.min(0), np.finfo(np.float64).tiny)
    picks: list[int] = []
    lowest, highest = np.full(low.shape[1], np.inf), np.full(low.shape[1], -np.inf)
    for _ in range(round(edges * count)):
        reach = np.maximum(high, highest) - np.minimum(low, lowest)
        gain = (reach / span).mean(1)
        gain[picks] = -np.inf
        picks.append(int(np.argmax(gain)))
        lowest, highest = np.minimum(lowest, low[picks[-1]]), np.maximum(highest, high[picks[-1]])
    apart = _distances(features)
    nearest = np.full(len(features), apart.max() + 1.0)
    for k in picks:
        nearest = np.minimum(nearest, apart[k])
    while len(picks) < count:
        gain = np.maximum(nearest[None] - apart, 0).sum(1)
        gain[picks] = -np.inf
        picks.append(int(np.argmax(gain)))
        nearest = np.minimum(nearest, apart[picks[-1]])
    return np.asarray(picks, np.int64)


def _distances(features: np.ndarray) -> np.ndarray:
    """`float32[n, n]`, between every two samples."""
    squares = np.square(features).sum(1)
    return np.sqrt(np.maximum(squares[:, None] + squares - 2 * features @ features.T, 0)).astype(np.float32)


def _distance(features: np.ndarray, chosen: np.ndarray) -> float:
    """Mean distance from a sample to the nearest chosen one."""
    near = np.full(len(features), np.inf)
    for k in chosen:
        near = np.minimum(near, np.square(features - features[k]).sum(1))
    return float(np.sqrt(near).mean())


def _covered(numbers: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Per value, the share of the pool's range that the chosen samples span."""
    low, high = numbers[:, :, 0], numbers[:, :, 1]
    span = high.max(0) - low.min(0)
    held = high[chosen].max(0) - low[chosen].min(0)
    return np.where(span > 0, held / np.where(span > 0, span, 1.0), 1.0)


def _taken(items: Sequence[call], sizes: Sequence[int], chosen: np.ndarray) -> call:
    """One call with the chosen rows of all batches."""
    starts = np.cumsum([0, *sizes])
    parts: list[tuple[Any, ...]] = []
    for item, start, size in zip(items, starts, sizes, strict=False):
        rows = chosen[(chosen >= start) & (chosen < start + size)] - start
        if rows.size:
            parts.append(jax.tree_util.tree_map(lambda x, rows=rows: np.asarray(x)[rows], (item.args, item.kwargs)))
    args, kwargs = jax.tree_util.tree_map(lambda *xs: np.concatenate(xs), *parts)
    return call(*args, **kwargs)
