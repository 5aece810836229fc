"""Arithmetic of int32 arrays as programs of integers need it: no other dtype appears but bool.

Operands are int32 arrays or Python integers. Arrays have equal rank and broadcast where a dimension is 1; rank 0
broadcasts against anything. Results wrap on overflow, as XLA's do.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax


def held(x: Any) -> Any:
    """A Python integer as the int32 it stands for; anything else as it is."""
    return np.int32(x) if isinstance(x, int) else x


def add(a: Any, b: Any) -> jax.Array:
    return lax.add_p.bind(held(a), held(b))


def sub(a: Any, b: Any) -> jax.Array:
    return lax.sub_p.bind(held(a), held(b))


def mul(a: Any, b: Any) -> jax.Array:
    """The low 32 bits of the product."""
    return lax.mul(held(a), held(b))


def mulhi(a: Any, b: Any) -> jax.Array:
    """floor(a * b / 2**32)."""
    a, b = held(a), held(b)
    # XLA:CPU of jax 0.10.2 does not compile `mulhi` of a single element ("Unsupported elementwise operation").
    if np.size(a) == np.size(b) == 1:
        return _mulhi_of_halves(a, b)
    return lax.mulhi_p.bind(a, b)


def _mulhi_of_halves(a: Any, b: Any) -> jax.Array:
    """`mulhi` by four products of 16 bits each (Warren, Hacker's Delight, 2nd edition, 8-2)."""
    a_high, a_low, b_high, b_low = right(a, 16), bit_and(a, 0xFFFF), right(b, 16), bit_and(b, 0xFFFF)
    upper = add(mul(a_high, b_low), right_logical(mul(a_low, b_low), 16))
    lower = add(bit_and(upper, 0xFFFF), mul(a_low, b_high))
    return add(add(mul(a_high, b_high), right(upper, 16)), right(lower, 16))


def minimum(a: Any, b: Any) -> jax.Array:
    return lax.min_p.bind(held(a), held(b))


def maximum(a: Any, b: Any) -> jax.Array:
    return lax.max_p.bind(held(a), held(b))


def clip(x: Any, low: Any, high: Any) -> jax.Array:
    return minimum(maximum(x, low), high)


def left(x: Any, bits: Any) -> jax.Array:
    """x * 2**bits; 0 where bits >= 32."""
    return lax.shift_left_p.bind(held(x), held(bits))


def right(x: Any, bits: Any) -> jax.Array:
    """floor(x / 2**bits), bits >= 0."""
    return lax.shift_right_arithmetic_p.bind(held(x), held(bits))


def right_logical(x: Any, bits: Any) -> jax.Array:
    """`x` read as an unsigned number, shifted right; 0 where bits >= 32."""
    return lax.shift_right_logical_p.bind(held(x), held(bits))


def right_rounded(x: Any, bits: Any) -> jax.Array:
    """floor(x / 2**bits + 1/2) for |x| < 2**30 and 0 <= bits <= 31."""
    return right(add(right(left(x, 1), bits), 1), 1)


def bit_and(a: Any, b: Any) -> jax.Array:
    return lax.and_p.bind(held(a), held(b))


def bit_or(a: Any, b: Any) -> jax.Array:
    return lax.or_p.bind(held(a), held(b))


def bit_xor(a: Any, b: Any) -> jax.Array:
    return lax.xor_p.bind(held(a), held(b))


def bit_not(x: Any) -> jax.Array:
    return lax.not_p.bind(x)


def magnitude(x: Any) -> jax.Array:
    """|x|; -2**31 stays what it is."""
    return lax.abs_p.bind(held(x))


def with_sign(x: Any, signs: Any) -> jax.Array:
    """`x`, negated where `signs` is -1; `signs` is 0 or -1 everywhere: `right(y, 31)` is the sign of y so."""
    return sub(bit_xor(x, signs), signs)


def leading_zeros(x: Any) -> jax.Array:
    return lax.clz_p.bind(x)


def lt(a: Any, b: Any) -> jax.Array:
    return lax.lt_p.bind(held(a), held(b))


def gt(a: Any, b: Any) -> jax.Array:
    return lax.gt_p.bind(held(a), held(b))


def ge(a: Any, b: Any) -> jax.Array:
    return lax.ge_p.bind(held(a), held(b))


def eq(a: Any, b: Any) -> jax.Array:
    return lax.eq_p.bind(held(a), held(b))


def as_integer(pred: Any) -> jax.Array:
    """1 where true, 0 elsewhere."""
    return lax.convert_element_type(pred, np.int32)


def broadcast_to(x: Any, shape: tuple[int, ...]) -> Any:
    """`x` of equal rank, or of rank 0, in the shape `shape`."""
    x = held(x)
    if np.shape(x) == tuple(shape):
        return x
    dims = tuple(range(len(shape))) if np.ndim(x) else ()
    return lax.broadcast_in_dim(x, shape, dims)


def select(pred: Any, on_true: Any, on_false: Any) -> jax.Array:
    """`on_true` where `pred`, else `on_false`; all three broadcast."""
    shape = np.broadcast_shapes(*(np.shape(x) for x in (pred, on_true, on_false)))
    return lax.select_n(*(broadcast_to(x, shape) for x in (pred, on_false, on_true)))
