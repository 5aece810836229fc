"""Range estimators: from the statistics of a tensor to the range `(low, high)` that its integers shall span.

    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    low, high = MSE().estimate(histogram.stats, qmin=-128, qmax=127, symmetric=False)

What every estimator promises, for any statistics with at least one value:

- `low <= 0 <= high` and `low < high`; a symmetric range is `(-a, a)`.
- The scale, `high / qmax` if symmetric and `(high - low) / (qmax - qmin)` if not, lies in `[MIN_SCALE, MAX_SCALE]`,
  where it and its reciprocal are normal float32 numbers. A range that is too narrow or too wide is scaled to fit.
- A tensor of nothing but zeros gets `(0, 1)`, symmetric `(-1, 1)`. Any range represents it exactly; this one keeps the
  product with a weight's scale large enough for an int32 bias.
- A tensor of one value `c` gets the range from zero to `c`, symmetric `(-|c|, |c|)`.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from .histogram import DEFAULT_BINS, Histogram, RangeStats

__all__ = [
    "DEFAULT_BINS",
    "MAX_SCALE",
    "MIN_SCALE",
    "MSE",
    "Entropy",
    "Estimator",
    "Histogram",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "RangeStats",
    "by_name",
    "expected_sqnr_db",
]

MIN_SCALE = 2.0**-120
MAX_SCALE = 2.0**126


@dataclasses.dataclass(frozen=True)
class Estimator(abc.ABC):
    """The common part of all estimators. A subclass gives `name` and `_ends`."""

    name: ClassVar[str]

    def estimate(self, stats: RangeStats, qmin: int, qmax: int, symmetric: bool) -> tuple[float, float]:
        """Chooses the range for integers from `qmin` to `qmax`.

        Args:
          stats: statistics of the tensor.
          qmin: smallest integer.
          qmax: largest integer.
          symmetric: whether the zero point is 0; then the scale is taken to be `high / qmax`.

        Returns:
          `(low, high)`, in the unit of the tensor, as the module's docstring promises.

        Raises:
          ValueError: no values were observed, or the integers do not fit: `qmin >= qmax`, or symmetric and not
            `qmin < 0 < qmax`.
        """
        if qmin >= qmax or (symmetric and not qmin < 0 < qmax):
            raise ValueError(f"no {'symmetric' if symmetric else 'affine'} range of integers from {qmin} to {qmax}")
        if not stats.count:
            raise ValueError("no values were observed, so there is no range to estimate")
        # A bin says of a single value only that it is in there; min and max say which.
        constant = stats.min == stats.max
        low, high = (stats.min, stats.max) if constant else self._ends(stats, qmin, qmax, symmetric)
        return _finish(low, high, qmin, qmax, symmetric)

    @abc.abstractmethod
    def _ends(self, stats: RangeStats, qmin: int, qmax: int, symmetric: bool) -> tuple[float, float]:
        """The range before zero is included, symmetry is enforced and the scale is limited."""


@dataclasses.dataclass(frozen=True)
class MinMax(Estimator):
    """All that was seen: `(margin * min, margin * max)` (Jacob et al. 2018, arXiv:1712.05877, section 3).

    Attributes:
      margin: factor on both ends, positive; above 1 it leaves room for what calibration did not see.

    Raises:
      ValueError: `margin` is not positive and finite.
    """

    name: ClassVar[str] = "minmax"
    margin: float = 1.0

    def __post_init__(self):
        if not 0 < self.margin < math.inf:
            raise ValueError(f"margin must be positive and finite, not {self.margin}")

    def _ends(self, stats, qmin, qmax, symmetric):
        return self.margin * stats.min, self.margin * stats.max


@dataclasses.dataclass(frozen=True)
class MovingAverage(Estimator):
    """Exponential average of the batches' extremes: `m <- decay * m + (1 - decay) * x`, from the first batch on.

    The only estimator for which the order and size of batches matter. Jacob et al. 2018, arXiv:1712.05877, section
    3.1; the default decay is I-BERT's (arXiv:2101.01321); torch has 0.99.

    Attributes:
      decay: weight of the past, at least 0 and below 1. Calibration over fewer than `1 / (1 - decay)` batches rests
        mostly on the first.

    Raises:
      ValueError: `decay` is out of its range.
    """

    name: ClassVar[str] = "moving_average"
    decay: float = 0.95

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, not {self.decay}")

    def _ends(self, stats, qmin, qmax, symmetric):
        mean = stats.batch_ranges[0]
        for batch in stats.batch_ranges[1:]:
            mean = self.decay * mean + (1 - self.decay) * batch
        return float(mean[0]), float(mean[1])


@dataclasses.dataclass(frozen=True)
class Percentile(Estimator):
    """Cuts off the tails: `100 - percentile` percent of the values lie below the range and as many above.

    A symmetric range holds `percentile` percent of the magnitudes (pytorch-quantization, calib/histogram.py); an
    affine one goes by both tails (FQ-ViT, arXiv:2111.13824, models/ptq/observer/percentile.py). Values that are exactly
    zero are left out: any range holds them, and a tensor that is nearly all zero would otherwise lose all the rest.

    Attributes:
      percentile: above 50, at most 100, in percent; 100 is min and max.

    Raises:
      ValueError: `percentile` is out of its range.
    """

    name: ClassVar[str] = "percentile"
    percentile: float = 99.99

    def __post_init__(self):
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, not {self.percentile}")

    def _ends(self, stats, qmin, qmax, symmetric):
        edges, counts = _nonzero_bins(stats, fold=symmetric)
        high = _quantile(edges, counts, self.percentile / 100)
        low = -_quantile(-edges[::-1], counts[::-1], self.percentile / 100)
        return (-high, high) if symmetric else (low, high)


@dataclasses.dataclass(frozen=True)
class MSE(Estimator):
    """Minimizes the expected squared error of quantization, rounding and clipping together.

    Nagel et al. 2021, arXiv:2106.08295, equation (6) of section 3.1. Values are taken to lie evenly within their bin,
    and the error is integrated over it exactly, so bins may be wider than quantization steps; exact zeros count as free
    of error. An affine range is searched over both ends, on the grid that the rounded zero point leaves.

    Attributes:
      candidates: at least 2, points tried per end in the first round, from 1/256 of the extreme to the extreme in
        equal ratios; two rounds between the neighbours of the best follow.

    Raises:
      ValueError: fewer than 2 candidates.
    """

    name: ClassVar[str] = "mse"
    candidates: int = 24

    def __post_init__(self):
        if self.candidates < 2:
            raise ValueError(f"at least 2 candidates are needed, not {self.candidates}")

    def _ends(self, stats, qmin, qmax, symmetric):
        edges, density = _density(stats)

        def error(range_):
            return _squared_error(edges, density, range_, qmin, qmax, symmetric)

        low, high = min(stats.min, 0.0), max(stats.max, 0.0)
        ratios = np.geomspace(1 / 256, 1, self.candidates)
        if symmetric:
            amplitudes = ratios * max(-low, high)
            for _ in range(3):
                best = min(((-a, a) for a in amplitudes), key=error)
                amplitudes = _between_neighbours(amplitudes, best[1])
            return best
        lows, highs = ratios[::-1] * low if low else np.zeros(1), ratios * high if high else np.zeros(1)
        for _ in range(3):
            best = min(itertools.product(lows, highs), key=error)
            lows, highs = _between_neighbours(lows, best[0]), _between_neighbours(highs, best[1])
        return best


@dataclasses.dataclass(frozen=True)
class Entropy(Estimator):
    """Minimizes the Kullback-Leibler divergence of the clipped and quantized distribution (TensorRT's calibrator).

    Migacz, "8-bit inference with TensorRT", GTC 2017; pytorch-quantization, calib/histogram.py,
    `_compute_amax_entropy`. The window of bins shrinks from the whole histogram until it has one bin per integer, a
    256th of the histogram at a time, from the side that loses less mass (AIMET) and never past zero. For each window,
    P is its counts, with what lies outside added to its end bins; Q is the counts without that, summed over as many
    groups of bins as there are integers and spread evenly over each group's non-empty bins. Both get 1e-4 in their
    empty bins, taken from the others (MXNet). The widest of equally good windows wins. Symmetric ranges work on
    magnitudes, with `qmax + 1` integers.

    Of the spike at zero (`bins[0] = bins[1]` in TensorRT), exact zeros are left out, which also serves one-sided data
    such as after ReLU; what remains in the bins beside zero is cut to that of their outer neighbours.

    Meant for 8 bits. Once integers outnumber bins, nothing but clipping is left to compare: the range is min and max.
    """

    name: ClassVar[str] = "entropy"

    def _ends(self, stats, qmin, qmax, symmetric):
        edges, counts = _nonzero_bins(stats, fold=symmetric)
        zero = 0 if symmetric else -stats.first_bin
        for spike, neighbour in ((zero, zero + 1), (zero - 1, zero - 2)):
            if 0 <= neighbour < counts.size and counts[neighbour]:
                counts[spike] = min(counts[spike], counts[neighbour])
        levels = (qmax if symmetric else qmax - qmin) + 1
        windows = list(_shrinking_windows(counts, zero, levels))
        start, stop = min(windows, key=lambda window: _divergence(counts, window, levels))
        return (-edges[stop], edges[stop]) if symmetric else (edges[start], edges[stop])


_ESTIMATORS = {estimator.name: estimator for estimator in (MinMax, MovingAverage, Percentile, MSE, Entropy)}


def by_name(name: str, **options) -> Estimator:
    """The estimator of that name, with its attributes as options: `by_name("percentile", percentile=99.9)`.

    Raises:
      ValueError: there is no estimator of that name, or an option has a value that it cannot have.
      TypeError: the estimator has no such option.
    """
    if name not in _ESTIMATORS:
        raise ValueError(f"unknown range estimator {name!r}; known are {', '.join(map(repr, _ESTIMATORS))}")
    return _ESTIMATORS[name](**options)


def expected_sqnr_db(stats: RangeStats, range_: tuple[float, float], qmin: int, qmax: int, symmetric: bool) -> float:
    """Signal to quantization noise of a tensor in integers of a range, in dB, values lying evenly within their bins.

    Args:
      stats: statistics of the tensor.
      range_: `(low, high)`, of an estimator.
      qmin, qmax: the integers.
      symmetric: whether the zero point is 0.

    Returns:
      Infinity for a tensor of one value, or of none.
    """
    if not stats.count or stats.min == stats.max:
        return math.inf
    edges, density = _density(stats)
    signal = float(np.dot(density, np.diff(edges**3))) / 3
    return 10 * math.log10(signal / _squared_error(edges, density, range_, qmin, qmax, symmetric))


def _finish(low: float, high: float, qmin: int, qmax: int, symmetric: bool) -> tuple[float, float]:
    """Includes zero, makes the range symmetric if asked, and limits the scale."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if low == high:
        high = 1.0
    if symmetric:
        high = max(-low, high)
        low = -high
    span, steps = (high, qmax) if symmetric else (high - low, qmax - qmin)
    if MIN_SCALE <= span / steps <= MAX_SCALE:
        return low, high
    target = steps * (MIN_SCALE if span / steps < MIN_SCALE else MAX_SCALE)
    return low / span * target, high / span * target


def _nonzero_bins(stats: RangeStats, fold: bool) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts (copies) without exact zeros, the outer edges moved to min and max; `fold` is of magnitudes."""
    edges, counts = stats.edges, stats.counts.copy()
    zero = -stats.first_bin
    counts[zero] -= stats.zeros
    low, high = min(stats.min, 0.0), max(stats.max, 0.0)
    if fold:
        negative, positive = counts[:zero][::-1], counts[zero:]
        counts = np.zeros(max(negative.size, positive.size), np.int64)
        counts[: negative.size] += negative
        counts[: positive.size] += positive
        edges = stats.width * np.arange(counts.size + 1)
        low, high = 0.0, max(-low, high)
    edges[0] = max(edges[0], low)
    edges[-1] = min(edges[-1], high)
    return edges, counts


def _density(stats: RangeStats) -> tuple[np.ndarray, np.ndarray]:
    """Edges, and values per unit of the tensor between them, without exact zeros."""
    edges, counts = _nonzero_bins(stats, fold=False)
    # The extreme bins may be cut down to nothing; a density needs some width.
    edges[0] = min(edges[0], edges[1] - 1e-3 * stats.width)
    edges[-1] = max(edges[-1], edges[-2] + 1e-3 * stats.width)
    return edges, counts / np.diff(edges)


def _quantile(edges: np.ndarray, counts: np.ndarray, fraction: float) -> float:
    """The point below which that fraction of the counts lies, values lying evenly within their bin."""
    total = np.cumsum(counts)
    target = fraction * total[-1]
    i = int(np.searchsorted(total, target))  # the first bin at whose end the target is reached, hence not empty
    inside = 1 - (total[i] - target) / counts[i]
    return float(edges[i] + inside * (edges[i + 1] - edges[i]))


def _squared_error(edges, density, range_, qmin, qmax, symmetric) -> float:
    """The integral of `density * (x - Q(x))**2`, with Q the quantizer of the range.

    In units of the scale, with `k` the integer (less zero point) that `u` goes to, `k / 12 + (u - k)**3 / 3` has the
    derivative `(u - k)**2` and is continuous where `k` changes, also where it stops changing because of clipping.
    """
    low, high = range_
    if symmetric:
        scale, zero_point = high / qmax, 0
    else:
        scale = (high - low) / (qmax - qmin)
        zero_point = np.rint(qmin - low / scale)
    u = edges / scale
    k = np.minimum(np.maximum(np.rint(u), qmin - zero_point), qmax - zero_point)
    u -= k
    return float(np.dot(density, np.diff(k / 12 + u * u * u / 3))) * scale**3


def _between_neighbours(points: np.ndarray, best: float) -> np.ndarray:
    """Nine points between the neighbours of the best one, itself among them; `points` ascend."""
    i = int(np.searchsorted(points, best))
    before, after = points[max(i - 1, 0)], points[min(i + 1, points.size - 1)]
    return np.unique(np.concatenate([np.linspace(before, best, 5), np.linspace(best, after, 5)]))


def _shrinking_windows(counts: np.ndarray, zero: int, levels: int) -> Iterator[tuple[int, int]]:
    """Yields `(start, stop)` of windows of bins, from the widest; `zero` is the bin that begins at zero."""
    start, stop = 0, counts.size
    step = math.ceil(counts.size / 256)
    total = np.concatenate([[0], np.cumsum(counts)])
    yield start, stop
    while stop - start - step >= levels:
        # Mass first; of equal masses, the side that reaches further from zero gives way.
        sides = []
        if start + step <= zero:
            sides.append((total[start + step] - total[start], start - zero, start + step, stop))
        if stop - step > zero:
            sides.append((total[stop] - total[stop - step], zero - stop, start, stop - step))
        if not sides:
            return
        _, _, start, stop = min(sides)
        yield start, stop


def _divergence(counts: np.ndarray, bounds: tuple[int, int], levels: int) -> float:
    """KL(P || Q) of one window, in nats; infinite if it holds no values."""
    start, stop = bounds
    window = counts[start:stop].astype(np.float64)
    if not window.any():
        return math.inf
    group = np.arange(window.size) * levels // window.size
    filled = window > 0
    members = np.bincount(group, weights=filled, minlength=levels)
    q = np.where(filled, (np.bincount(group, weights=window, minlength=levels) / np.maximum(members, 1))[group], 0.0)
    p = window
    p[0] += counts[:start].sum()
    p[-1] += counts[stop:].sum()
    p, q = _smooth(p), _smooth(q)
    return float(np.dot(p, np.log(p / q)) / p.sum() + math.log(q.sum() / p.sum()))


def _smooth(counts: np.ndarray) -> np.ndarray:
    """Counts without empty bins, of the same sum."""
    empty = counts == 0
    taken = 1e-4 * np.count_nonzero(empty) / np.count_nonzero(~empty)
    return np.where(empty, 1e-4, counts - taken)
