"""Values of wide regions as what software floating point takes, and as what primitives on integers take."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from qcompiler.backends.lax_int import rounding, rows
from qcompiler.backends.lax_int.context import Context
from qcompiler.backends.lax_int.values import Int, Known, Real, traced
from qcompiler.errors import QuantizationError
from qcompiler.numerics import soft_float
from qcompiler.numerics.soft_float import SoftFloat


def integers(context: Context, value: Int | Known) -> Any:
    """Traced integers or truth values; known arrays become weights, of what they do not repeat."""
    if isinstance(value, Known) and value.traced is None and value.value.ndim:
        return jnp.broadcast_to(context.hold("integers", _unrepeated(value.value)), value.value.shape)
    return traced(value)


def _unrepeated(array: np.ndarray) -> np.ndarray:
    """An array with dimensions of size one where it repeats itself."""
    for axis, size in enumerate(array.shape):
        first = array.take([0], axis) if size > 1 else array
        array = first if np.array_equal(np.broadcast_to(first, array.shape), array, equal_nan=True) else array
    return array


def soft(context: Context, value: Any) -> SoftFloat:
    """A value in software floating point."""
    if isinstance(value, SoftFloat):
        return value
    if isinstance(value, rows.Rowed | rows.Product):
        return rows.soft(context, value)
    if isinstance(value, Known):
        return soft_float.constant(_unrepeated(np.asarray(value.value).astype(np.float64)), context.hold)
    if not isinstance(value, Real):
        raise QuantizationError(f"integers among reals in region {context.region}")
    numbers = lambda array: soft_float.constant(_unrepeated(np.asarray(array, np.float64)), context.hold)
    terms = [
        soft_float.from_int(t.int.x, t.scale)
        if np.ndim(t.scale) == 0
        else soft_float.mul(soft_float.from_int(t.int.x, np.float64(1)), numbers(t.scale))
        for t in rounding.merged(value.terms)
    ]
    if np.any(value.constant) or not terms:
        terms.append(numbers(value.constant))
    out = functools.reduce(soft_float.add, terms)
    out = out if value.low is None else soft_float.maximum(out, numbers(value.low))
    return out if value.high is None else soft_float.minimum(out, numbers(value.high))
