"""Reading numbers of a file with the tensor's name in every complaint."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.errors import RecipeError
from qcompiler.numerics.types import LARGEST_SCALE, SMALLEST_SCALE


def integer(value: Any, what: str, low: int, high: int) -> int:
    """A whole number within bounds.

    Raises:
      RecipeError: it is none.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or value != int(value):
        raise RecipeError(f"{what} is a whole number from {low} to {high}, got {value!r}")
    return int(value)


def real(value: Any, what: str) -> float:
    """A number.

    Raises:
      RecipeError: it is none, NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise RecipeError(f"{what} is a number, got {value!r}")
    return float(value)


def flag(value: Any, what: str) -> bool:
    """A truth value, which some files spell as text.

    Raises:
      RecipeError: it is none.
    """
    known = {True: True, False: False, "True": True, "true": True, "False": False, "false": False}
    if not isinstance(value, bool | str) or value not in known:
        raise RecipeError(f"{what} is true or false, got {value!r}")
    return known[value]


def array(value: Any, what: str) -> np.ndarray:
    """An array of numbers, float64.

    Raises:
      RecipeError: other things than numbers, or lists of different lengths.
    """
    try:
        found = np.asarray(value)
    except ValueError:
        found = np.asarray("")
    if found.dtype.kind not in "iuf" or not found.size or not np.isfinite(found).all():
        raise RecipeError(f"{what} is a number, or numbers in lists of equal lengths, got {str(value)[:60]}")
    return found.astype(np.float64)


def scales(value: Any, what: str) -> np.ndarray:
    """Scales, float64.

    Raises:
      RecipeError: no numbers, or none that float32 arithmetic could multiply and divide by.
    """
    found = array(value, what)
    if not ((found >= SMALLEST_SCALE) & (found <= LARGEST_SCALE)).all():
        wrong = found[~((found >= SMALLEST_SCALE) & (found <= LARGEST_SCALE))].ravel()[0]
        raise RecipeError(f"{what} is from {SMALLEST_SCALE:.3g} to {LARGEST_SCALE:.3g}, got {wrong!r}")
    return found


def whole(value: Any, what: str, low: int, high: int) -> np.ndarray:
    """Whole numbers within bounds, int64.

    Raises:
      RecipeError: others.
    """
    found = array(value, what)
    bad = (found != np.rint(found)) | (found < low) | (found > high)
    if bad.any():
        raise RecipeError(f"{what} is a whole number from {low} to {high}, got {found[bad].ravel()[0]:g}")
    return found.astype(np.int64)
