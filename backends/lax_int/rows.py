"""What general arithmetic on rows becomes without a mantissa and an exponent per element.

    x * rsqrt(mean(x * x))      ->      int32 codes, and one soft float per row

Values that are linear in one array of integers stay so when they are multiplied by statistics of their rows; products
of two such arrays stay apart until they are summed; exponentials of what lies below the largest of its row are
fractions of int32. Each is made a `SoftFloat` where anything else is asked of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import bounds, rounding
from qcompiler.backends.lax_int.context import Context
from qcompiler.backends.lax_int.values import Int, Real, Term
from qcompiler.numerics import fixed_point, masks, soft_float, soft_functions
from qcompiler.numerics import int32 as i32
from qcompiler.numerics.soft_float import SoftFloat
from qcompiler.numerics.types import QuantType

#: Terms that have no common step meet in units of which the largest sum has so many bits.
COMMON_BITS = 29
#: A soft float is one per row, and not an element, where it is smaller by this factor at least.
MUCH_SMALLER = 4


@dataclasses.dataclass
class Peak(Int):
    """The largest integers of rows.

    Attributes:
      of: the traced integers of which they are the largest.
      among: how many there are in a row.
    """

    of: Any = None
    among: int = 0


@dataclasses.dataclass
class Below(Int):
    """Integers less the largest of their row, never positive; `among`: how many there are in a row."""

    among: int = 0


@dataclasses.dataclass
class Rowed:
    """int * scale * row + constant.

    Attributes:
      int: exact integers.
      scale: float64, known; a number or broadcastable to the value.
      row: much smaller than `int`, and broadcastable to it.
      constant: as `scale`.
    """

    int: Int
    scale: np.ndarray
    row: SoftFloat
    constant: np.ndarray = dataclasses.field(default_factory=lambda: np.float64(0))

    def scaled(self, factor: np.ndarray) -> Rowed:
        """The value times known numbers."""
        return Rowed(self.int, self.scale * factor, self.row, self.constant * factor)

    def shifted(self, offset: np.ndarray) -> Rowed:
        """The value plus known numbers."""
        return Rowed(self.int, self.scale, self.row, self.constant + offset)


def of_channels(row: SoftFloat, scale: np.ndarray) -> Rowed:
    """What there is one of per row, times what there is one of per channel."""
    one = Int(lax.full((1,) * len(row.shape), 1, np.int32), np.int64(1), np.int64(1))
    return Rowed(one, scale, row)


@dataclasses.dataclass
class Product:
    """a * b, two single terms, not multiplied yet."""

    a: Term
    b: Term


def compact(context: Context, real: Real) -> Real | None:
    """A linear value as one array of integers with one step, and a number; None if it has clamps or channels.

    Terms whose scales are multiples of the smallest, but for float32's rounding of 1/n, stay exact where int32 holds
    them. Else all are rescaled to a step of 2**-29 of the largest sum. The same value gives the same integers every
    time.
    """
    known = context.compacted.get(id(real))
    if known is not None:
        return known[1]
    if real.clamped or not is_uniform(real):
        return None
    terms, constant = rounding.merged(real.terms), float(real.constant)
    for k in range(len(terms)):
        terms, constant = _masks_brought_near(terms, k, constant)
    if len(terms) > 1 and any(_is_too_wide(t) for t in terms):
        return None
    same = len(terms) == 1 and terms[0] is real.terms[0] and len(real.terms) == 1
    found = real if same else Real([_one_term(terms)], np.float64(constant))
    # Kept with its key, so that no other value takes the same address.
    context.compacted[id(real)] = (real, found)
    context.compacted[id(found)] = (found, found)
    return found


def is_uniform(x: Real) -> bool:
    """Whether one scale per term and one constant hold for all elements, so that elements can be moved and added."""
    return bool(x.terms) and np.ndim(x.constant) == 0 and all(np.ndim(t.scale) == 0 for t in x.terms)


def _is_too_wide(term: Term) -> bool:
    """Whether the bounds of integers, which the model made itself, leave a smaller step no bits."""
    return int(np.max(term.int.magnitude)) > 1 << 27


def _masks_brought_near(terms: list[Term], k: int, constant: float) -> tuple[list[Term], float]:
    """Terms and constant, where one step of term k is more than all else can make up for: a mask.

    Whatever is not 0 of it, with the constant if that is so many steps, becomes one step that is enough to win.
    """
    mask, others = terms[k], [*terms[:k], *terms[k + 1 :]]
    if not others:
        return terms, constant
    offset = constant / float(mask.scale)
    folds = abs(offset - round(offset)) <= 1e-6 * max(1.0, abs(offset)) and abs(offset) < 2.0**30
    reach = sum(abs(float(t.scale)) * float(np.max(t.int.magnitude)) for t in others) + (0 if folds else abs(constant))
    if abs(float(mask.scale)) < 16 * reach + masks.BELOW or int(np.max(mask.int.magnitude)) >= 1 << 30:
        return terms, constant
    codes = i32.add(mask.int.x, round(offset)) if folds else mask.int.x
    near = Int(i32.clip(codes, -1, 1), np.int64(-1), np.int64(1))
    scale = np.copysign(4 * reach + masks.BELOW, mask.scale)
    return [*others, Term(near, scale)], 0.0 if folds else constant


def _one_term(terms: list[Term]) -> Term:
    if len(terms) == 1:
        return terms[0]
    step = min(abs(float(t.scale)) for t in terms)
    ratios = [float(t.scale) / step for t in terms]
    reach = sum(abs(r) * float(np.max(t.int.magnitude)) for r, t in zip(ratios, terms, strict=True))
    if all(abs(r - round(r)) <= 2.0**-22 * abs(r) for r in ratios) and reach < 2.0**30:
        whole = [round(r) for r in ratios]
        parts = [t.int.x if r == 1 else i32.mul(t.int.x, r) for r, t in zip(whole, terms, strict=True)]
        ends = [sorted((t.int.low * r, t.int.high * r), key=np.min) for r, t in zip(whole, terms, strict=True)]
        low, high = (functools.reduce(np.add, side) for side in zip(*ends, strict=True))
        return Term(Int(functools.reduce(i32.add, parts), *bounds.collapse(low, high)), np.float64(step))
    step *= reach / 2.0**COMMON_BITS
    parts = [_in_steps(t, step) for t in terms]
    most = np.int64(2**COMMON_BITS + len(terms))
    return Term(Int(functools.reduce(i32.add, parts), -most, most), np.float64(step))


def _in_steps(term: Term, step: float) -> Any:
    """A term in whole steps, to 2**-29 of the largest that it can be; saturates at 2**30.

    `fixed_point.rescale` promises no more than 2**27.
    """
    mantissa, exponent = math.frexp(float(term.scale) / step)
    lead = max(0, 31 - max(1, int(np.max(term.int.magnitude)).bit_length()))
    multiplier = min(round(abs(mantissa) * 2.0**31), 2**31 - 1) * (1 if mantissa > 0 else -1)
    high = i32.mulhi(i32.left(term.int.x, lead), multiplier)
    # high * 2**shift are steps.
    shift = exponent - lead + 1
    if shift <= 0:
        return i32.right_rounded(high, min(-shift, 31))
    most = (1 << max(30 - shift, 0)) - 1
    return i32.left(i32.clip(high, -most, most), min(shift, 30))


def is_much_smaller(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether an array of a shape is one per row of another, not one per element."""
    return math.prod(shape) * MUCH_SMALLER <= math.prod(other)


def peak(term: Term, out: Any, axes: Sequence[int]) -> Real:
    """The largest of rows of a term, `out` being that of its integers."""
    among = math.prod(term.int.x.shape[a] for a in axes)
    return Real([Term(Peak(out, term.int.low, term.int.high, of=term.int.x, among=among), term.scale)])


def below_peak(a: Term, b: Term) -> Term | None:
    """a - b, where b is the largest of the rows of a; None where it is not."""
    if not isinstance(b.int, Peak) or b.int.of is not a.int.x or a.scale != b.scale:
        return None
    low = np.min(a.int.low) - np.max(b.int.high)
    return Term(Below(i32.sub(a.int.x, b.int.x), np.int64(low), np.int64(0), among=b.int.among), a.scale)


def exp(real: Real, base: float) -> Real | SoftFloat | None:
    """base**x of a compact value; None where its bounds are too wide."""
    if _is_too_wide(real.terms[0]):
        return None
    term, factor = real.terms[0], math.log2(base) * 2.0**soft_functions.FIXED_BITS
    steps = _in_steps(term, 1 / factor)
    offset = float(np.clip(np.rint(real.constant * factor), -(2.0**30), 2.0**30))
    steps = i32.add(steps, int(offset)) if offset else steps
    if not isinstance(term.int, Below) or offset:
        return soft_functions.exp2_of_fixed(steps)
    # As many bits as the sum of a row leaves free.
    bits = 30 - max(1, (term.int.among - 1).bit_length())
    out = soft_functions.exp2_to_fixed(steps, bits)
    return Real([Term(Int(out, np.int64(0), np.int64(1) << bits), np.float64(2.0**-bits))])


def sum_of_products(product: Product, shape: Sequence[int], axes: Sequence[int]) -> SoftFloat | None:
    """The sum of a * b along axes of a shape, to 2**-28 of the product of their largest elements in a row.

    Of each row, x = high * 2**shift + rest with 15 bits of high: the sum of high * high is exact, in two accumulators;
    that of high * rest is rounded to 30 bits; rest * rest is less than what is asked. None where int32 could overflow.
    """
    axes, count = tuple(axes), math.prod(shape[a] for a in axes)
    largest = max(int(np.max(t.int.magnitude)) for t in (product.a, product.b))
    if count > 1 << 15 or largest >= 1 << 30:
        return None
    first = _split(product.a.int, shape, axes)
    second = first if product.b is product.a else _split(product.b.int, shape, axes)
    squares = i32.mul(first.high, second.high)
    high, low = lax.reduce_sum(i32.right(squares, 15), axes), lax.reduce_sum(i32.bit_and(squares, 0x7FFF), axes)
    shifts = [lax.squeeze(part.shift, axes) for part in (first, second)]
    exponent = i32.add(*shifts)
    sums = [
        soft_float.normalize(i32.add(high, i32.right(low, 15)), i32.add(exponent, 15)),
        soft_float.normalize(i32.bit_and(low, 0x7FFF), exponent),
    ]
    spare = count.bit_length()
    crossed = [(first.high, second.rest, shifts[0]), (second.high, first.rest, shifts[1])]
    # Of a square both are the same.
    same = first is second
    for factor, rest, shift in crossed[: 1 if same else 2]:
        if rest is not None:
            total = lax.reduce_sum(i32.right_rounded(i32.mul(factor, rest), spare), axes)
            sums.append(soft_float.normalize(total, i32.add(shift, spare + same)))
    scale = soft_float.constant(np.float64(product.a.scale * product.b.scale))
    return soft_float.mul(functools.reduce(soft_float.add, sums), scale)


def full_size(x: Any, shape: Sequence[int]) -> Any:
    """Integers as large as the value that they are part of; what is only repeated is kept in size one."""
    return x if x.shape == tuple(shape) else jnp.broadcast_to(x, shape)


class _Split(NamedTuple):
    """high * 2**shift + rest; |high| <= 2**15, |rest| <= 2**14, None for 0; shift has size one along what is summed."""

    high: Any
    rest: Any
    shift: Any


def _split(x: Int, shape: Sequence[int], axes: tuple[int, ...]) -> _Split:
    whole = full_size(x.x, shape)
    if int(np.max(x.magnitude)) <= 1 << 15:
        return _Split(whole, None, lax.full([1 if d in axes else n for d, n in enumerate(shape)], 0, np.int32))
    largest = lax.expand_dims(lax.reduce_max(lax.abs(whole), axes), axes)
    shift = i32.maximum(i32.sub(17, lax.clz(largest)), 0)
    high = i32.right_rounded(whole, shift)
    return _Split(high, i32.sub(whole, i32.left(high, shift)), shift)


def codes(context: Context, value: Rowed, scale: np.ndarray, zero: np.ndarray, qtype: QuantType) -> Any:
    """floor(value / scale + 1/2) + zero point, saturated: two products per element at most.

    The integers, with as many bits as their bounds leave free, times the mantissa of their row; times the known factor
    of their channel if there are several; shifted as the exponent of their row says.
    """
    largest = int(np.max(value.int.magnitude))
    lead = max(0, 31 - max(1, largest.bit_length()))
    factor = np.asarray(value.scale / scale.astype(np.float64))
    most = float(np.max(np.abs(factor)))
    if not most:
        return np.broadcast_to(zero.astype(qtype.dtype), value.int.x.shape)
    row = soft_float.mul(value.row, soft_float.constant(np.float64(most) if factor.ndim else factor))
    steps = i32.mulhi(i32.left(value.int.x, lead), i32.left(row.mantissa, 1))
    # steps * 2**exponent are steps of the result.
    exponent = i32.add(row.exponent, 31 - lead)
    if factor.ndim and np.any(factor != most):
        channels = np.rint(factor / most * 2.0**30).astype(np.int32)
        channels = channels.reshape((1,) * (value.int.x.ndim - channels.ndim) + channels.shape)
        steps = i32.mulhi(i32.left(steps, 1), context.hold("channels", channels))
        exponent = i32.add(exponent, 1)
    offset = np.asarray(value.constant / scale.astype(np.float64) + zero)
    guard = _GUARD_BITS if np.any(offset != np.rint(offset)) else 0
    exponent = i32.add(exponent, guard)
    up = i32.clip(exponent, 0, 30)
    limit = i32.sub(i32.left(1, i32.sub(30, up)), 1)
    steps = i32.left(i32.clip(steps, lax.neg(limit), limit), up)
    down = i32.clip(lax.neg(exponent), 0, 31)
    if not guard:
        total = _plus(context, i32.right_rounded(steps, down), offset)
    else:
        total = _plus(context, i32.right(steps, down), np.rint((offset + 0.5) * 2.0**guard))
        total = i32.right(total, guard)
    return fixed_point.clamp_to(total, qtype)


#: Fractional bits in which a constant is added.
_GUARD_BITS = 10


def _plus(context: Context, x: Any, offset: np.ndarray) -> Any:
    """int32 of magnitude 2**30 at most, plus known whole numbers, which saturate there too."""
    whole = np.clip(offset, -(2.0**30), 2.0**30 - 1).astype(np.int32)
    if not np.any(whole):
        return x
    if whole.ndim:
        whole = whole.reshape((1,) * (x.ndim - whole.ndim) + whole.shape)
    return i32.add(x, whole[()] if whole.ndim == 0 else context.hold("constant", whole))


def soft(context: Context, value: Rowed | Product) -> SoftFloat:
    """In software floating point, element by element."""
    if isinstance(value, Product):
        a, b = (soft_float.from_int(t.int.x, t.scale) for t in (value.a, value.b))
        return soft_float.mul(a, b)
    out = soft_float.mul(soft_float.from_int(value.int.x), value.row)
    if np.any(value.scale != 1):
        out = soft_float.mul(out, soft_float.constant(np.asarray(value.scale), context.hold))
    if np.any(value.constant):
        out = soft_float.add(out, soft_float.constant(np.asarray(value.constant), context.hold))
    return out
