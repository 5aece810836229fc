"""Codes of fewer than 8 bits, several to a byte.

    4 bits    byte i = code[i] | code[i + n/2] << 4
    2 bits    byte i = code[i] | code[i + n/4] << 2 | code[i + n/2] << 4 | code[i + 3n/4] << 6
    3 bits    the two low bits of all codes, packed as 2 bits, then the third bits, eight to a byte

An array is packed as the row of its n elements, so that its shape plays no part. What shares a byte comes from equal
parts of the row, not from neighbouring elements: unpacking is then one shift per part over a long run of bytes, where
interleaving would move every element by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

#: Codes of no more bits are packed. Those of 5 to 7 would save little, for the time that it takes to unpack them.
MOST_PACKED_BITS = 4


def is_packed(bits: int) -> bool:
    """Whether the program stores weights of so many bits packed; otherwise each has a byte."""
    return bits <= MOST_PACKED_BITS


def packed_size(size: int, bits: int) -> int:
    """Bytes of `size` packed codes: `size * bits / 8`, rounded up per plane."""
    return sum(-(-size * width // 8) for _, width in _planes(bits))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs signed codes.

    Args:
      codes: integers in [-2**(bits-1), 2**(bits-1)), any shape.
      bits: 1 to 7.

    Returns:
      uint8, [packed_size(codes.size, bits)].

    Raises:
      ValueError: a code does not fit.
    """
    row = np.asarray(codes).reshape(-1)
    half = 1 << (bits - 1)
    if row.size and not (-half <= row.min() and row.max() < half):
        raise ValueError(f"codes from {row.min()} to {row.max()} do not fit {bits} bits")
    unsigned, found = row.astype(np.int64) & ((1 << bits) - 1), []
    for start, width in _planes(bits):
        parts = 8 // width
        plane = np.zeros(parts * -(-row.size // parts), np.int64)
        plane[: row.size] = unsigned >> start & ((1 << width) - 1)
        shifts = width * np.arange(parts)[:, None]
        found.append((plane.reshape(parts, -1) << shifts).sum(axis=0))
    return np.concatenate(found).astype(np.uint8)


def unpack(packed: Any, bits: int, shape: tuple[int, ...]) -> Any:
    """The codes again: int8 of `shape`, by integer ops on a (traced) array of bytes.

    Args:
      packed: uint8, as of `pack`.
      bits: as packed.
      shape: of the codes.
    """
    size, start, found = math.prod(shape), 0, None
    for first, width in _planes(bits):
        parts = 8 // width
        length = -(-size // parts)
        plane = lax.slice(packed, (start,), (start + length,))
        start += length
        # The part's highest bit moves to where the byte has its sign, and back; only the highest plane has a sign.
        signed = first + width == bits
        shift, kind = (lax.shift_right_arithmetic, jnp.int8) if signed else (lax.shift_right_logical, jnp.uint8)
        parts_first = (parts, length)
        left = kind(8 - width) - kind(width) * lax.broadcasted_iota(kind, parts_first, 0)
        row = lax.broadcast_in_dim(lax.bitcast_convert_type(plane, kind), parts_first, (1,))
        row = shift(lax.shift_left(row, left), lax.full(parts_first, 8 - width, kind))
        row = lax.slice(lax.reshape(row, (parts * length,)), (0,), (size,))
        row = lax.bitcast_convert_type(row, jnp.int8)
        row = lax.shift_left(row, lax.full_like(row, first)) if first else row
        found = row if found is None else lax.bitwise_or(found, row)
    return lax.reshape(found, shape)


def _planes(bits: int) -> Iterator[tuple[int, int]]:
    """(lowest bit, width) of the parts of a code that divide a byte evenly: 4, 2 or 1 bits each, low ones first."""
    start = 0
    for width in (4, 2, 1):
        if bits & width:
            yield start, width
            start += width
