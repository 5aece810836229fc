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
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.numerics import types
from qcompiler.numerics.types import QuantType

INT8 = np.iinfo(np.int8)

#: Steps that are tried for a group, as shares of the one that covers its range: a finer one clips the extremes and
#: rounds the rest better, which below 0.4 never pays; one slightly coarser may happen to lie better.
_SHARES = np.linspace(1.1, 0.4, 15)

#: Weights that are looked at together: as many as stay in a core's cache.
_AT_ONCE = 1 << 16

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
    """Whether every code of a type becomes an int8 number, per group; steps and zero points in a wider dtype."""
    low, high = (steps * (code - zero_points) for code in (qtype.qmin, qtype.qmax))
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
    rows, compact = _as_rows(np.asarray(array, np.float32) / channel, qtype)
    parts = [_best(part, qtype) for part in np.array_split(rows, max(1, rows.size // _AT_ONCE))]
    steps, zeros = (np.concatenate(found).astype(np.int8).reshape(compact) for found in zip(*parts, strict=True))
    return Groups(qtype, channel, steps, zeros)


def _as_rows(levels: np.ndarray, qtype: QuantType) -> tuple[np.ndarray, tuple[int, ...]]:
    """The members of each group, [groups, members], and the shape in which the groups lie.

    Shorter groups are filled up with zeros, which no step moves.
    """
    blocks = [qtype.blocks.get(d, max(n, 1)) for d, n in enumerate(levels.shape)]
    counts = [-(-n // size) for n, size in zip(levels.shape, blocks, strict=True)]
    counts = [n if d in qtype.axis else 1 for d, n in enumerate(counts)]
    whole = [count * size for count, size in zip(counts, blocks, strict=True)]
    levels = np.pad(levels, [(0, n - old) for n, old in zip(whole, levels.shape, strict=True)])
    split = levels.reshape([n for pair in zip(counts, blocks, strict=True) for n in pair])
    split = split.transpose(*range(0, split.ndim, 2), *range(1, split.ndim, 2))
    return split.reshape(math.prod(counts), math.prod(blocks)), tuple(counts)


def _best(rows: np.ndarray, qtype: QuantType) -> tuple[np.ndarray, np.ndarray]:
    """Step and zero point of each group, [groups]; `rows` are its members in steps of the channel's scale."""
    low = np.clip(rows.min(axis=1, initial=0.0).astype(np.float64), -reach(qtype), 0)
    high = np.clip(rows.max(axis=1, initial=0.0).astype(np.float64), 0, reach(qtype))
    span = np.maximum(-low, high) / qtype.qmax if qtype.symmetric else (high - low) / (qtype.qmax - qtype.qmin)
    error, best = np.full(len(rows), np.inf), (np.ones(len(rows)), np.zeros(len(rows)))
    for share in _SHARES:
        step = np.clip(np.ceil(span * share), 1, most_step(qtype))
        in_steps = rows / step[:, None].astype(np.float32)
        for zero in _zero_points(low, high, step, qtype):
            ends = (np.float32(code) - zero[:, None].astype(np.float32) for code in (qtype.qmin, qtype.qmax))
            off = np.clip(np.rint(in_steps), *ends) - in_steps
            squares = np.einsum("gm,gm->g", off, off) * step**2
            better = fits(step, zero, qtype) & (squares < error)
            error = np.where(better, squares, error)
            best = tuple(np.where(better, new, old) for new, old in zip((step, zero), best, strict=True))
    return best


def _zero_points(low: np.ndarray, high: np.ndarray, step: np.ndarray, qtype: QuantType) -> list[np.ndarray]:
    """Zero points to try: with the low end of a range at the smallest code, the high one at the largest, and about the
    middle between.

    The range is [low, high] in steps of the channel's scale; what a step is too fine for is clipped at one end or both.
    """
    if qtype.symmetric:
        return [np.zeros(step.shape)]
    first, last = qtype.qmin - low / step, qtype.qmax - high / step
    middle = (first + last) / 2
    # Moved to where every code fits int8, as far as the codes reach.
    least, most = np.ceil(qtype.qmax - INT8.max / step), np.floor(qtype.qmin - INT8.min / step)
    tried = map(np.rint, (first, last, middle - 1, middle, middle + 1))
    return [np.clip(np.maximum(np.minimum(zero, most), least), qtype.qmin, qtype.qmax) for zero in tried]


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
