"""Factors of scale groups that make the channel ranges of weights alike.

    ranges r1 / s where a channel is written, r2 * s where it is read        ->      s = sqrt(r1 / r2): both sqrt(r1 r2)

A weight that is quantized with one scale loses a channel whose range is far below the largest, and all that matters is
how a range compares with the others of its weight. So ranges count relative to their weight's median one, and several
weights that write a channel, or read it, count as one, by the largest. Of two weights that share their channels both
become sqrt(r1 r2) (Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", eq. 9
to 11), of a depthwise one between two others all three (r1 r2 r3)^(1/3), and a residual stream is solved jointly.
Weights have two dimensions of channels, so it is repeated until nothing moves. A rescaling of the channels beforehand
changes nothing in the outcome.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

_SWEEPS = 50
#: Half a percent of a range is about half a step of int8.
_SETTLED = 5e-3
#: A channel computes little but its bias, if its weights are smaller beside it than usual, by this factor.
_BIAS_ALONE = 16.0


@dataclasses.dataclass
class WeightGroups:
    """A weight as far as its ranges go, and the groups that its channels are in.

    Attributes:
      log_magnitude: float64, the logarithms of the weight's magnitudes; the largest along dimensions without groups.
      outside: int, groups that it is divided by; broadcasts against `log_magnitude`.
      inside: int, groups that it is multiplied by.
    """

    log_magnitude: np.ndarray
    outside: np.ndarray
    inside: np.ndarray


def balance(weights: Sequence[WeightGroups], free: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The factor of each group.

    A channel with next to no weights computes its bias, which then stands for its range: else the bias would grow with
    the weights until it is the whole range of the activation. A channel that nothing reads is never made larger.

    Args:
      weights: whose ranges are to be alike.
      free: bool[groups], which factors may be other than 1.
      bias: float64[groups], the largest magnitude of what is added to a group's elements.

    Returns:
      float64[groups], positive; 1 where not free. What writes a group is divided by it, what reads it is multiplied.
    """
    factors = _Factors(weights, free, bias)
    factors.settle()
    factors.find_biases()
    factors.settle()
    return np.exp(factors.logs)


class _Side:
    """The ranges of a weight along its output channels (it is divided) or its input channels (it is multiplied)."""

    def __init__(self, weight: WeightGroups, writes: bool) -> None:
        self.weight, self.writes = weight, writes
        groups = weight.outside if writes else weight.inside
        self.groups, inverse = np.unique(groups, return_inverse=True)
        self._inverse = inverse.ravel()
        self._alone = tuple(d for d, n in enumerate(groups.shape) if n == 1)

    def ranges(self, logs: np.ndarray) -> np.ndarray:
        """Per group of `groups`, the logarithm of its range over the weight's median one; -inf for one of zeros."""
        scaled = self.weight.log_magnitude + logs[self.weight.inside] - logs[self.weight.outside]
        found = np.full(len(self.groups), -np.inf)
        np.maximum.at(found, self._inverse, scaled.max(axis=self._alone, initial=-np.inf).ravel())
        return found - _usual(found)


class _Block:
    """Groups that the same weights write, and those weights' sides that touch them.

    Attributes:
      damping: half the way makes two ranges equal. Of a weight that reads the channels that it writes, rows and columns
        move against each other, which takes half of that again.
    """

    def __init__(self, groups: np.ndarray, sides: Sequence[_Side]) -> None:
        self.groups = groups
        self._sides = [(s, *np.intersect1d(groups, s.groups, return_indices=True)[1:]) for s in sides]
        readers = {id(s.weight) for s in sides if not s.writes}
        self.damping = 0.25 if any(s.writes and id(s.weight) in readers for s in sides) else 0.5

    def ranges(self, logs: np.ndarray, *, writes: bool) -> np.ndarray:
        """Per group the largest relative range among the weights that write it, or that read it."""
        found, levels = np.full(len(self.groups), -np.inf), []
        for side, at, own in self._sides:
            if side.writes == writes:
                ranges = side.ranges(logs)[own]
                levels.append(_usual(ranges))
                found[at] = np.maximum(found[at], ranges)
        # The largest of several are above the usual one, all alike.
        return found - _usual(found) + float(np.mean(levels or 0.0))


class _Factors:
    """The logarithms of all factors, on their way to where nothing moves."""

    def __init__(self, weights: Sequence[WeightGroups], free: np.ndarray, bias: np.ndarray) -> None:
        self.logs = np.zeros(len(free))
        with np.errstate(divide="ignore"):
            self.bias = np.log(bias)
        self.bias_alone = np.zeros(len(free), bool)
        sides = [_Side(w, writes) for writes in (True, False) for w in weights]
        written = (side.groups[free[side.groups]] for side in sides if side.writes)
        blocks = {block.tobytes(): block for block in written if block.size}
        self.blocks = [_Block(b, [s for s in sides if np.isin(s.groups, b).any()]) for b in blocks.values()]

    def settle(self) -> None:
        """Moves the factors of a weight's output channels together, weight by weight, until none moves."""
        for _ in range(_SWEEPS):
            steps = [self.step(block) for block in self.blocks]
            if max(steps, default=0.0) < _SETTLED:
                break

    def step(self, block: _Block) -> float:
        """Balances what writes the groups of a block with what reads them; returns the largest change."""
        groups = block.groups
        written, read = block.ranges(self.logs, writes=True), block.ranges(self.logs, writes=False)
        own = self.bias_alone[groups]
        if own.any():
            biases = self.bias[groups] - self.logs[groups]
            written[own] = (biases + _usual(_beside(written[~own], biases[~own])))[own]
        known = np.isfinite(written), np.isfinite(read)
        change = np.where(known[0], written, 0.0) - np.where(known[1], read, 0.0)
        change *= np.where(known[0] & known[1], block.damping, 1.0)
        change = np.where(known[1], change, np.maximum(change, 0.0))
        self.logs[groups] += change
        return float(np.max(np.abs(change)))

    def find_biases(self) -> None:
        """Finds the channels that compute little but their bias, once ranges are alike."""
        for block in self.blocks:
            groups = block.groups
            beside = _beside(block.ranges(self.logs, writes=True), self.bias[groups] - self.logs[groups])
            self.bias_alone[groups] = beside < _usual(beside) - np.log(_BIAS_ALONE)


def _beside(ranges: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Logarithms of ranges over those of biases; NaN where both are zero, a channel that computes nothing."""
    with np.errstate(invalid="ignore"):
        return ranges - biases


def _usual(logs: np.ndarray) -> float:
    logs = logs[np.isfinite(logs)]
    return float(np.median(logs)) if logs.size else 0.0
