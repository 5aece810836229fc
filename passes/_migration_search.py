"""Chooses the factors of a place: the exponent at which its products, quantized, are closest to what they are in float.

    s_j = max|X_j| ** a / max|W_j| ** (1 - a)          X is divided by s, W multiplied

as Xiao et al. 2022 ("SmoothQuant", arXiv:2211.10438, eq. 4) have it, with `a` searched for each place, by its error on
other samples than the factors come from. W may be keys; at a = 1/2 both operands get ranges alike. Both operands are
quantized with the types and range estimators of the recipe, 16 bits included where it would spend those, so that a
change wins only over what would have been done without it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler.numerics import ranges, types
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.types import QuantType
from qcompiler.passes._migration_samples import Seen

#: Exponents are so many-ths, 0 to 1: at first each `_COARSE`-th, then those beside the best.
_STEPS, _COARSE = 20, 4
#: A change must lower the error of the products by so much: less is chance, or is not worth a further product.
LEAST_GAIN_DB, LEAST_GAIN_FOR_COST_DB = 0.2, 1.0
#: Of the largest channel: one below it is next to zero, and has no range to speak of.
_NEXT_TO_ZERO = 2.0**-16
#: Parts of the samples that factors and ranges are taken from, and those that the error is measured on: maxima of few
#: samples fit these too well, as all channels then reach the end of the range at once.
FITTED, JUDGED = slice(0, None, 2), slice(1, None, 2)
#: Of histograms, of which there is one per exponent.
_BINS = 512


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """The factors of a place.

    Attributes:
      factors: float64[channels], s.
      exponent: a.
      gain_db: by how much the error of the place's products falls.
    """

    factors: np.ndarray
    exponent: float
    gain_db: float


@dataclasses.dataclass(eq=False)
class Operand:
    """An operand of a product, and how the recipe quantizes it.

    Attributes:
      seen: its values; a weight is one part.
      labels: int (batch, 1, contracted), its channels; None where no factor is on it.
      power: of the factor, 1 or -1.
      qtype: its type.
      per_channel: of a weight, whether each of its rows has a scale of its own; None for an activation.
      wide: the type of an activation that `qtype` holds with less than `least_db`; None: it never is.
    """

    seen: Seen
    labels: np.ndarray | None
    power: int
    qtype: QuantType
    per_channel: bool | None = None
    wide: QuantType | None = None
    least_db: float = 0.0

    def peaks(self, which: slice) -> np.ndarray:
        """Largest magnitude over rows of some parts, as the labels lie."""
        assert self.labels is not None
        alike = tuple(d for d, n in enumerate(self.labels.shape) if n == 1)
        peaks = self.seen.peaks if self.per_channel is not None else self.seen.peaks[which]
        return np.max(peaks, axis=0).max(axis=alike, keepdims=True)

    def exact(self) -> list[np.ndarray]:
        """The parts that it is judged on."""
        return self.seen.parts if self.per_channel is not None else self.seen.parts[JUDGED]

    def rounded(self, factors: np.ndarray, estimator_for: Any) -> tuple[list[np.ndarray], bool]:
        """Those parts as they are stored when multiplied by factors, and whether in the wide type; float32."""
        parts = self.seen.parts
        if self.labels is not None:
            by = (factors[self.labels] ** self.power).astype(np.float32)
            parts = [part * by for part in parts]
        if self.per_channel is not None:
            axes = 2 if self.per_channel else None
            low, high = parts[0].min(axis=axes, keepdims=True), parts[0].max(axis=axes, keepdims=True)
            encoding = Encoding(self.qtype, *types.scale_and_zero_point(low, high, self.qtype))
            return [encoding.dequantize(encoding.quantize(parts[0]))], False
        stats = ranges.RangeStats.of(np.concatenate([p.ravel() for p in parts[FITTED]]), _BINS)
        qtype, limits = self.qtype, (self.qtype.qmin, self.qtype.qmax, self.qtype.symmetric)
        found = estimator_for(qtype).estimate(stats, *limits)
        short = self.wide is not None and qtype.bits <= 8
        if short and ranges.expected_sqnr_db(stats, found, *limits) < self.least_db:
            encoding = Encoding.of_stats(stats, self.wide, estimator_for(self.wide))
        else:
            encoding = Encoding(qtype, *types.scale_and_zero_point(*found, qtype))
        return [encoding.dequantize(encoding.quantize(part)) for part in parts[JUDGED]], encoding.type is not qtype


def factors_at(exponent: float, divided: np.ndarray, multiplied: np.ndarray) -> np.ndarray:
    """s for the largest magnitudes per channel, scaled to a geometric mean of 1; 1 for channels without a range.

    Args:
      exponent: a.
      divided: float64[channels], of what is divided by s.
      multiplied: float64[channels], of what is multiplied.
    """
    dead = np.logical_or(*(x <= _NEXT_TO_ZERO * x.max(initial=0.0) for x in (divided, multiplied)))
    if dead.all():
        return np.ones(len(dead))
    log = exponent * np.log(np.where(dead, 1.0, divided)) - (1 - exponent) * np.log(np.where(dead, 1.0, multiplied))
    return np.where(dead, 1.0, np.exp(log - log[~dead].mean()))


def choose(
    products: Sequence[tuple[Operand, Operand]], channels: int, estimator_for: Any, least_gain_db: float = LEAST_GAIN_DB
) -> Chosen | None:
    """The best factors for the products of a place, or None where no change is as good as any.

    Factors with which more operands would be stored in the wide type are no choice: that costs time, and accuracy
    bought by it is not theirs.

    Args:
      products: operands (batch, row, contracted) whose contraction is the product; shared by several if they are one.
      channels: how many factors there are.
      estimator_for: type -> range estimator (`numerics.ranges`).
      least_gain_db: by which the products' error must fall.
    """
    operands = list({id(o): o for pair in products for o in pair}.values())
    exact = [_results(left.exact(), right.exact()) for left, right in products]
    energy = [sum(map(_energy, results)) for results in exact]

    def factors(exponent: float, which: slice) -> np.ndarray:
        peaks = {1: np.zeros(channels), -1: np.zeros(channels)}
        for operand in operands:
            if operand.labels is not None:
                np.maximum.at(peaks[operand.power], operand.labels, operand.peaks(which))
        return factors_at(exponent, peaks[-1], peaks[1])

    def error(by: np.ndarray) -> tuple[float, int]:
        """Noise over signal, summed over products; and how many operands are wide."""
        stored = {id(o): o.rounded(by, estimator_for) for o in operands}
        noise = 0.0
        for (left, right), results, signal in zip(products, exact, energy, strict=True):
            rounded = _results(stored[id(left)][0], stored[id(right)][0])
            if signal:
                noise += sum(_energy(a - b) for a, b in zip(rounded, results, strict=True)) / signal
        return noise, sum(wide for _, wide in stored.values())

    before, wide = error(np.ones(channels))

    def tried(exponent: float) -> Chosen | None:
        after, wider = error(factors(exponent, FITTED))
        if wider > wide or not after < before:
            return None
        gain = float(10 * np.log10(before / after)) if after else math.inf
        return Chosen(factors(exponent, slice(None)), exponent, gain)

    found = {k: tried(k / _STEPS) for k in range(0, _STEPS + 1, _COARSE)}
    gain = lambda k: -math.inf if found[k] is None else found[k].gain_db
    for step in (_COARSE // 2, _COARSE // 4 or 1):
        best = max(found, key=gain)
        found |= {k: tried(k / _STEPS) for k in (best - step, best + step) if 0 <= k <= _STEPS and k not in found}
    chosen = found[max(found, key=gain)]
    return chosen if chosen is not None and chosen.gain_db >= least_gain_db else None


def _results(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The product on each sample; a weight is the same for all."""
    count = max(len(left), len(right))
    return [left[min(k, len(left) - 1)] @ right[min(k, len(right) - 1)].swapaxes(1, 2) for k in range(count)]


def _energy(array: np.ndarray) -> float:
    return float(np.vdot(array, array))
