"""Scale groups: elements of values that share one positive factor, as a disjoint-set forest over small integers.

    x[:, 0] is divided by s_7, x[:, 1] by s_8, and both are added to y        ->      y[:, 0] by s_7, y[:, 1] by s_8

A value's groups are an integer array that broadcasts against it: of size one where the factor does not change along a
dimension. Tying groups makes their factors one; pinning a group makes its factor 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np


class ScaleGroups:
    """A forest of groups; `pinned` ones have the factor 1 and a reason."""

    def __init__(self) -> None:
        self._parent = np.zeros(0, np.int64)
        self._reasons: dict[int, str] = {}

    def new(self, shape: Sequence[int]) -> np.ndarray:
        """A group of its own for every element of an array of this shape."""
        count = math.prod(shape)
        fresh = np.arange(len(self._parent), len(self._parent) + count)
        self._parent = np.concatenate([self._parent, fresh])
        return fresh.reshape(shape)

    def pinned(self, rank: int, reason: str) -> np.ndarray:
        """One pinned group for a value of this rank."""
        group = self.new((1,) * rank)
        self.pin(group, reason)
        return group

    def roots(self, groups: np.ndarray) -> np.ndarray:
        """What stands for each group among those it is tied to."""
        while True:
            above = self._parent[groups]
            if np.array_equal(above, groups):
                return groups
            # Halving the paths keeps them short.
            self._parent[groups] = self._parent[above]
            groups = above

    def tie(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Makes the factors of two arrays of groups one, element by element; they broadcast. Returns the groups."""
        first, second = np.broadcast_arrays(self.roots(first), self.roots(second))
        pairs = np.unique(np.stack([first.ravel(), second.ravel()]), axis=1).T
        for a, b in pairs[pairs[:, 0] != pairs[:, 1]].tolist():
            low, high = sorted((int(self.roots(np.int64(a))), int(self.roots(np.int64(b)))))
            if low == high:
                continue
            self._parent[high] = low
            reason = self._reasons.pop(high, None)
            if reason is not None:
                self._reasons.setdefault(low, reason)
        return compressed(self.roots(first))

    def tie_along(self, groups: np.ndarray, dims: Iterable[int]) -> np.ndarray:
        """Makes the factor the same along dimensions, which become of size one."""
        dims = [d for d in dims if groups.shape[d] > 1]
        if not dims:
            return groups
        first = groups[tuple(slice(0, 1) if d in dims else slice(None) for d in range(groups.ndim))]
        self.tie(groups, first)
        return self.roots(first)

    def pin(self, groups: np.ndarray, reason: str) -> None:
        """Makes the factors 1; the first reason is kept."""
        for root in np.unique(self.roots(groups)).tolist():
            self._reasons.setdefault(root, reason)

    def why_pinned(self, groups: np.ndarray) -> list[str]:
        """The reasons of those that are pinned, each once."""
        found = (self._reasons.get(root) for root in np.unique(self.roots(groups)).tolist())
        return list(dict.fromkeys(reason for reason in found if reason is not None))

    def is_pinned(self, groups: np.ndarray) -> np.ndarray:
        """Per element, whether its group is pinned."""
        return np.isin(self.roots(groups), np.fromiter(self._reasons, np.int64, len(self._reasons)))

    def __len__(self) -> int:
        return len(self._parent)


def compressed(groups: np.ndarray) -> np.ndarray:
    """The array with every dimension along which it repeats cut to size one."""
    for axis in range(groups.ndim if groups.size else 0):
        first = groups.take([0], axis=axis)
        if groups.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, groups.shape), groups):
            groups = first
    return groups


def reshaped(labels: np.ndarray, before: Sequence[int], after: Sequence[int]) -> np.ndarray:
    """The groups, or other labels, of a value of shape `before` once it has shape `after`.

    Dimensions are compared in the smallest runs that hold as many elements on either side; one in which labels do not
    vary stays of size one.
    """
    spread, shape = [1] * len(before), [1] * len(after)
    for merged, split in _segments(before, after):
        if any(labels.shape[d] > 1 for d in merged):
            for d in merged:
                spread[d] = before[d]
            for d in split:
                shape[d] = after[d]
    return np.broadcast_to(labels, spread).reshape(shape)


def _segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """The dimensions before and after a reshape in the smallest runs that hold the same elements."""
    ends = [{math.prod(shape[:k]): k for k in range(len(shape) + 1)} for shape in (before, after)]
    if 0 in before:
        return [(range(len(before)), range(len(after)))]
    cuts = [(ends[0][size], ends[1][size]) for size in sorted(set(ends[0]) & set(ends[1]))]
    return [
        (range(a, c), range(b, d)) for (a, b), (c, d) in itertools.pairwise([(0, 0), *cuts, (len(before), len(after))])
    ]
