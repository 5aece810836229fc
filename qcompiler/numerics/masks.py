"""Masks: numbers so large that they stand for infinity, and how near they may be brought."""

from __future__ import annotations

import numpy as np

#: A number so large stands for infinity.
MASK = 1e8
#: A constant from which on a sum or selection is taken to mask scores, some of which are masked with -1e4.
MASKS_SCORES = 9e3
#: How far a mask must be below scores, beyond their own size, for its exponential to vanish beside theirs.
BELOW = 256.0
#: What a mask becomes that no other numbers are beside.
_ALONE = 1e4
#: Numbers between this and a mask say that all of them are numbers.
_GAP = MASK / 100


def is_mask(value: np.ndarray | None, least: float = MASK) -> bool:
    """Whether known numbers hold one of magnitude `least` or more; None holds none."""
    return value is not None and value.size > 0 and bool(np.max(np.abs(value.astype(np.float64))) >= least)


def brought_near(array: np.ndarray, above: bool = True) -> np.ndarray:
    """An array whose masks are only as large as they must be, for the range that it is stored in.

    Beside other numbers a mask must still make the exponential of a score vanish, so it is brought to `BELOW` beyond
    four times the largest of them; alone, to `_ALONE`. Where others are beyond `_GAP`, there are no masks.

    Args:
      array: real, NaN allowed.
      above: whether large positive numbers are masks, too.
    """
    below, over = array <= -MASK, (array >= MASK) & above
    rest = np.abs(array[~(below | over)])
    largest = np.max(rest, initial=0, where=np.isfinite(rest))
    if largest > _GAP:
        return array
    near = array.dtype.type(BELOW + 4 * largest if largest else _ALONE)
    return np.where(below, -near, np.where(over, near, array))
