"""Weights in groups along what a product sums over, with the two levels of scales of QServe.

    w  ≈  scale[channel] * steps[group, channel] * (q4 - zero[group, channel])

A sum in integers has one scale, so the groups of a channel cannot have a float scale each. They have integer steps of
the channel's: q8 = (q4 - zero) * steps is an int8 weight with a scale per channel, whose products add up in int32 as
ever, while only q4, the steps and the zero points are stored (Lin et al. 2024, arXiv:2405.04532, section 4.1).

That every q8 fits int8, whatever codes a rounding chooses, is arranged for: a group takes no step and zero point with
which one of its codes would not (`fits`), and the channel's scale leaves the room that this takes (`reach`), in 4 bits
the protective range [-119, 119] of the paper.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.numerics import types
from qcompiler.numerics.types import QuantType

INT8 = np.iinfo(np.int8)

#: Steps that are tried for a group, as shares of the one that covers its range: a finer one clips the extremes and
#: rounds the rest better. Below 0.4 of the range that never pays at 2 bits and more.
_SHARES = np.linspace(1.0, 0.4, 13)

#: Bits of a channel's scale: with 7 of a step and of a code, a weight is a float32 number exactly.
_SCALE_BITS = 17


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """Both levels of the scales of one weight, full rank, size one where a dimension has no part in them.

    Attributes:
      type: of the codes; `contracted` says which dimensions are summed over.
      channel: float32, scale per channel; 0-d if all share one.
      steps: int8 from 1 up, one per group, not repeated over it.
      zero_points: int8, likewise, in the type's own codes; zeros if it is symmetric.
    """

    type: QuantType
    channel: np.ndarray
    steps: np.ndarray
    zero_points: np.ndarray

    def scale(self, shape: tuple[int, ...]) -> np.ndarray:
        """Scale of every element, as `fake_quantize` takes it: float32, broadcastable to the weight of this shape."""
        return self.channel * _repeated(self.steps, shape, self.type).astype(np.float32)

    def zero_point(self, shape: tuple[int, ...]) -> np.ndarray:
        """Zero point of every element, int32, likewise."""
        return _repeated(self.zero_points, shape, self.type).astype(np.int32)


def most_step(qtype: QuantType) -> int:
    """The largest step that a group may have: with a larger one, its extreme codes are further apart than in int8."""
    if qtype.symmetric:
        return INT8.max // qtype.qmax if qtype.narrow_range else -INT8.min // -qtype.qmin
    return (INT8.max - INT8.min) // (qtype.qmax - qtype.qmin)


def reach(qtype: QuantType) -> int:
    """The int8 number at which the largest weight of a channel lies.

    Affine: rounding moves either end of a group by up to half a step, and n + n / levels <= 127 leaves room for it: 119
    in 4 bits. Symmetric: the largest code times the largest step, 126 in 4 bits of narrow range.
    """
    if qtype.symmetric:
        return most_step(qtype) * qtype.qmax
    levels = qtype.qmax - qtype.qmin
    return INT8.max * levels // (levels + 1)


def fits(steps: np.ndarray, zero_points: np.ndarray, qtype: QuantType) -> np.ndarray:
    """Whether every code of a type becomes an int8 number, per group."""
    low, high = (steps.astype(np.int64) * (code - zero_points.astype(np.int64)) for code in (qtype.qmin, qtype.qmax))
    return (low >= INT8.min) & (high <= INT8.max)


def channel_scale(array: np.ndarray, qtype: QuantType) -> np.ndarray:
    """Scale per channel: its largest magnitude lies at `reach`. float32, of the layout of `Groups.channel`.

    Raises:
      QuantizationError: the weights are not finite, or too large or too small for float32 scales.
    """
    whole = dataclasses.replace(qtype.per_channel, bits=8, symmetric=True, narrow_range=True)
    scale, _ = types.scale_and_zero_point(*types.extremes(array, whole), whole)
    return round_up(np.minimum(scale * np.float32(whole.qmax / reach(qtype)), types.LARGEST_SCALE).astype(np.float32))


def round_up(scale: np.ndarray) -> np.ndarray:
    """The next scale of so few bits that products with steps and codes are float32 numbers exactly."""
    mantissa, exponent = np.frexp(np.asarray(scale, np.float64))
    return np.ldexp(np.ceil(mantissa * 2.0**_SCALE_BITS), exponent - _SCALE_BITS).astype(np.float32)


def choose(array: np.ndarray, qtype: QuantType, channel: np.ndarray | None = None) -> Groups:
    """The scales of a weight: per group the step and zero point of least squared error among those that fit.

    Args:
      array: real weight, any shape.
      qtype: with `contracted` dimensions.
      channel: scale per channel, of `round_up`'s bits; None: that of `channel_scale`. Magnitudes beyond `reach` of it
        are clipped.

    Raises:
      QuantizationError: see `channel_scale`.
    """
    channel = channel_scale(array, qtype) if channel is None else channel
    shape = array.shape
    levels = np.asarray(array, np.float32) / channel
    low, high = (_over_groups(reduce, levels, qtype).astype(np.float64) for reduce in (np.minimum, np.maximum))
    low, high = np.maximum(low, -reach(qtype)), np.minimum(high, reach(qtype))
    span = np.maximum(-low, high) / qtype.qmax if qtype.symmetric else (high - low) / (qtype.qmax - qtype.qmin)
    best: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    for share in _SHARES:
        steps = np.clip(np.ceil(span * share), 1, most_step(qtype)).astype(np.int64)
        for zero in _zero_points(low, high, steps, qtype):
            wide, ends = (_repeated(x.astype(np.float32), shape, qtype) for x in (steps, zero))
            off = np.clip(np.rint(levels / wide), qtype.qmin - ends, qtype.qmax - ends) * wide - levels
            error = np.where(fits(steps, zero, qtype), _over_groups(np.add, np.square(off), qtype), np.inf)
            if best is None:
                best = error, steps, zero
            else:
                better = error < best[0]
                best = tuple(np.where(better, new, old) for new, old in zip((error, steps, zero), best, strict=True))
    error, steps, zero = best
    if not np.isfinite(error).all():
        raise AssertionError(f"no step of {qtype.name} fits int8")
    return Groups(qtype, channel, steps.astype(np.int8), zero.astype(np.int8))


def _zero_points(low: np.ndarray, high: np.ndarray, steps: np.ndarray, qtype: QuantType) -> list[np.ndarray]:
    """Zero points to try: with the low end of a range at the smallest code, the high one at the largest, and between.

    The range is [low, high] in steps of the channel's scale; what a step is too fine for is clipped at one end or both.
    """
    if qtype.symmetric:
        return [np.zeros(steps.shape, np.int64)]
    first, last = np.rint(qtype.qmin - low / steps), np.rint(qtype.qmax - high / steps)
    found = []
    for zero in (first, last, np.rint((first + last) / 2)):
        # Moved to where every code fits int8, as far as the codes reach.
        least = np.ceil(qtype.qmax - INT8.max / steps)
        most = np.floor(qtype.qmin - INT8.min / steps)
        zero = np.clip(np.maximum(np.minimum(zero, most), least), qtype.qmin, qtype.qmax)
        found.append(zero.astype(np.int64))
    return found


def int8_weight(codes: np.ndarray, steps: np.ndarray, zero_points: np.ndarray, qtype: QuantType) -> np.ndarray:
    """q8 = (codes - zero_point) * step, int8: the weight at the scale of its channel.

    Args:
      codes: of `qtype`, of the shape of the weight.
      steps, zero_points: as of `Groups`; zero points of a symmetric type are not read.
      qtype: with `contracted` dimensions.
    """
    shifted = codes.astype(np.int32)
    if not qtype.symmetric:
        shifted = shifted - _repeated(zero_points, codes.shape, qtype)
    return (shifted * _repeated(steps, codes.shape, qtype)).astype(np.int8)


def expand(x: Any, shape: tuple[int, ...], qtype: QuantType) -> Any:
    """A (traced) number per group, repeated over the groups of a weight of this shape; broadcastable to it."""
    for axis, size in qtype.blocks.items():
        if size > 1 and x.shape[axis] < shape[axis]:
            x = lax.expand_dims(x, (axis + 1,))
            x = jnp.broadcast_to(x, (*x.shape[: axis + 1], size, *x.shape[axis + 2 :]))
            x = lax.slice_in_dim(lax.collapse(x, axis, axis + 2), 0, shape[axis], axis=axis)
    return x


def _repeated(x: np.ndarray, shape: tuple[int, ...], qtype: QuantType) -> np.ndarray:
    """`expand` on the host."""
    for axis, size in qtype.blocks.items():
        if size > 1 and x.shape[axis] < shape[axis]:
            x = np.repeat(x, size, axis=axis).take(range(shape[axis]), axis=axis)
    return x


def _over_groups(reduce: np.ufunc, array: np.ndarray, qtype: QuantType) -> np.ndarray:
    """One number per group, zero among what is reduced; full rank, size one outside of `axis`."""
    rest = tuple(d for d in range(array.ndim) if d not in qtype.axis)
    array = reduce.reduce(array, axis=rest, keepdims=True, initial=0.0)
    for axis, size in qtype.blocks.items():
        if size > 1 and array.shape[axis] > 0:
            array = reduce.reduceat(array, np.arange(0, array.shape[axis], size), axis=axis)
    return array
