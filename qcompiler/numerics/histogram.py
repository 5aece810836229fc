"""Streaming histograms of tensors, from which the estimators in `ranges` take quantization ranges.

The bins lie on an absolute grid: bin `k` is `[k * 2**e, (k + 1) * 2**e)`, so zero is always an edge, and `e` is the
smallest exponent at which the grid from zero to the extremes needs at most `num_bins` bins. When the range grows, `e`
grows, and bin `k` goes to bin `k >> 1` once per doubling. Dividing by a power of two is exact, so no value ever lands
in another bin than it would have in one pass over all data: the histogram depends on the values alone, neither on
their order nor on how they were cut into batches, bit for bit. (torch's HistogramObserver re-bins through bin
midpoints instead, torchao/quantization/pt2e/observer.py, and depends on both.)
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

DEFAULT_BINS = 2048

# No scale below 2**-120 is ever handed out (`ranges.MIN_SCALE`), so finer bins would tell nothing.
_MIN_EXPONENT = -126
# Elements binned at a time: the float64 temporaries then stay in the second-level cache.
_CHUNK = 1 << 15
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, eq=False)
class RangeStats:
    """What calibration knows about the values of one tensor.

    Attributes:
      min: smallest value, exact; inf if nothing was seen.
      max: largest value, exact; -inf if nothing was seen.
      count: number of values.
      zeros: how many of them are exactly zero (of either sign).
      num_bins: upper limit to the number of bins.
      exponent: the bin width is `2**exponent`, in the unit of the tensor.
      first_bin: grid index of the first bin; never positive, and zero always lies in one of the bins.
      counts: int64 `[n]`, `n <= num_bins`, values per bin; read-only.
      batch_ranges: float64 `[batches, 2]`, min and max of each batch in the order seen; read-only.
    """

    min: float
    max: float
    count: int
    zeros: int
    num_bins: int
    exponent: int
    first_bin: int
    counts: npt.NDArray[np.int64]
    batch_ranges: npt.NDArray[np.float64]

    def __post_init__(self):
        self.counts.setflags(write=False)
        self.batch_ranges.setflags(write=False)

    def __eq__(self, other):
        if not isinstance(other, RangeStats):
            return NotImplemented
        mine, theirs = self.to_arrays(), other.to_arrays()
        return all(np.array_equal(mine[name], theirs[name]) for name in mine)

    @classmethod
    def empty(cls, num_bins: int = DEFAULT_BINS) -> "RangeStats":
        """The statistics of no values at all.

        Raises:
          ValueError: `num_bins` is less than 2 (one bin cannot hold both signs).
        """
        if num_bins < 2:
            raise ValueError(f"a histogram needs at least 2 bins, not {num_bins}")
        none = np.zeros(0, np.int64)
        return cls(math.inf, -math.inf, 0, 0, num_bins, _MIN_EXPONENT, 0, none, np.zeros((0, 2)))

    @classmethod
    def of(cls, array: npt.ArrayLike, num_bins: int = DEFAULT_BINS) -> "RangeStats":
        """The statistics of one batch.

        Args:
          array: real values of any shape and dtype (bfloat16 and integers included); may be of size zero.
          num_bins: upper limit to the number of bins.

        Raises:
          ValueError: a value is NaN, infinite, or beyond float32 (in which scales live).
          TypeError: complex values.
        """
        result = cls.empty(num_bins)
        array = np.asarray(array)
        if np.iscomplexobj(array):
            raise TypeError("ranges of complex values are not defined")
        if array.size == 0:
            return result
        if array.dtype not in (np.float32, np.float64):
            # float32 holds every narrower float, and NumPy is fast with it; integers need float64.
            array = array.astype(np.float64 if array.dtype.kind in "iub" else np.float32)
        values = array.ravel(order="K")
        low, high = float(values.min()), float(values.max())  # both are NaN if any value is
        if not (low >= -_FLOAT32_MAX and high <= _FLOAT32_MAX):
            raise ValueError(f"values must be finite in float32, but range over [{low}, {high}]")
        exponent, first, bins = _grid(low, high, num_bins)
        counts = np.zeros(bins, np.int64)
        zeros = 0
        # float64, because float32 would lose the sign of tiny values when it scales them down.
        per_width = np.float64(math.ldexp(1.0, -exponent))
        for start in range(0, values.size, _CHUNK):
            chunk = values[start : start + _CHUNK]
            index = np.multiply(chunk, per_width, dtype=np.float64)
            np.floor(index, out=index)
            index -= first
            counts += np.bincount(index.astype(np.intp), minlength=bins)
            zeros += int(np.count_nonzero(chunk == 0))
        batch = np.array([[low, high]])
        return cls(low, high, values.size, zeros, num_bins, exponent, first, counts, batch)

    @property
    def width(self) -> float:
        """The width of a bin, a power of two, in the unit of the tensor."""
        return math.ldexp(1.0, self.exponent)

    @property
    def edges(self) -> np.ndarray:
        """float64 `[n + 1]`, the edges of the bins; exact."""
        return np.arange(self.first_bin, self.first_bin + self.counts.size + 1) * self.width

    def merge(self, other: "RangeStats") -> "RangeStats":
        """The statistics of both sets of values; exact, and apart from the order of `batch_ranges` commutative.

        Raises:
          ValueError: the two have different `num_bins`.
        """
        if self.num_bins != other.num_bins:
            raise ValueError(f"cannot merge histograms of {self.num_bins} and {other.num_bins} bins")
        if not other.count:
            return self
        if not self.count:
            return other
        low, high = min(self.min, other.min), max(self.max, other.max)
        exponent, first, bins = _grid(low, high, self.num_bins)
        counts = np.zeros(bins, np.int64)
        for part in (self, other):
            index = np.arange(part.first_bin, part.first_bin + part.counts.size)
            # Shifting an int64 by more than 63 is undefined; no index is longer than 62 bits.
            np.add.at(counts, (index >> min(exponent - part.exponent, 62)) - first, part.counts)
        batches = np.concatenate([self.batch_ranges, other.batch_ranges])
        count, zeros = self.count + other.count, self.zeros + other.zeros
        return RangeStats(low, high, count, zeros, self.num_bins, exponent, first, counts, batches)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All fields as NumPy arrays, by name, as `np.savez` takes them."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "RangeStats":
        """The inverse of `to_arrays`; exact.

        Raises:
          KeyError: a field is missing.
        """
        fields: dict[str, Any] = {field.name: np.array(arrays[field.name]) for field in dataclasses.fields(cls)}
        return cls(**{name: array if array.ndim else array.item() for name, array in fields.items()})


class Histogram:
    """A histogram of one tensor over any number of batches.

    Args:
      num_bins: upper limit to the number of bins; about the half to all of them are in use. They divide the range
        from zero to the extremes evenly, so values closer to zero than 1/`num_bins` of the largest share a bin.

    Raises:
      ValueError: `num_bins` is less than 2.
    """

    def __init__(self, num_bins: int = DEFAULT_BINS):
        self._stats = RangeStats.empty(num_bins)

    @property
    def stats(self) -> RangeStats:
        """The statistics of all batches so far; later updates do not change it."""
        return self._stats

    def update(self, array: npt.ArrayLike) -> None:
        """Adds one batch; arguments and errors as `RangeStats.of`. A failed update leaves the histogram as it was."""
        self._stats = self._stats.merge(RangeStats.of(array, self._stats.num_bins))


def _grid(low: float, high: float, num_bins: int) -> tuple[int, int, int]:
    """The smallest bin exponent for a range, with the index of the first bin and the number of bins."""
    low, high = min(low, 0.0), max(high, 0.0)
    exponent = _MIN_EXPONENT
    if low != high:
        # At this start the bins are certainly too many; at most four steps follow.
        exponent = max(exponent, math.frexp(high - low)[1] - num_bins.bit_length() - 2)
    while True:
        per_width = math.ldexp(1.0, -exponent)
        first, last = math.floor(low * per_width), math.floor(high * per_width)
        if last - first < num_bins:
            return exponent, first, last - first + 1
        exponent += 1
