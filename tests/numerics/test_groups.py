"""Weights in groups: both levels of scales, against formulas and against trying everything."""

import itertools

import jax
import numpy as np
import pytest

from qcompiler.errors import QuantizationError
from qcompiler.numerics import groups
from qcompiler.numerics.types import QuantType

SIZE = 8


def grouped(bits, symmetric=True, narrow=False, size=SIZE, axis=(0, 1), contracted=(0,)):
    sizes = tuple(size if a == contracted[-1] else 1 for a in axis)
    return QuantType(bits, symmetric, axis, narrow, sizes, contracted)


def weight(kind="normal", shape=(32, 6)):
    rng = np.random.default_rng(3)
    draws = {
        "normal": rng.normal(size=shape),
        "heavy": rng.standard_t(3, size=shape),
        "uniform": rng.uniform(-1, 1, size=shape),
        "positive": rng.uniform(0, 1, size=shape),
    }
    return draws[kind].astype(np.float32)


def codes_of(w, found):
    scale, zero = found.scale(w.shape).astype(np.float64), found.zero_point(w.shape)
    return np.clip(np.rint(w / scale) + zero, found.type.qmin, found.type.qmax).astype(np.int64)


def dequantized(w, found):
    return (codes_of(w, found) - found.zero_point(w.shape)) * found.scale(w.shape).astype(np.float64)


TYPES = [
    *(grouped(bits, narrow=narrow) for bits in range(2, 7) for narrow in (False, True)),
    *(grouped(bits, symmetric=False) for bits in range(2, 7)),
]
named = pytest.mark.parametrize("qtype", TYPES, ids=lambda t: t.name)


def test_four_affine_bits_have_the_protective_range_of_the_paper():
    assert groups.reach(grouped(4, symmetric=False)) == 119
    assert groups.reach(grouped(4, narrow=True)) == 7 * 18


@named
def test_every_code_of_every_group_fits_int8(qtype):
    for kind in ("normal", "heavy", "positive"):
        found = groups.choose(weight(kind), qtype)
        for code in (qtype.qmin, qtype.qmax):
            wide = found.steps.astype(np.int64) * (code - found.zero_points.astype(np.int64))
            assert wide.min() >= -128 and wide.max() <= 127


@named
def test_scales_are_integer_multiples_exactly(qtype):
    found = groups.choose(weight(), qtype)
    assert found.channel.shape == (1, 6) and found.steps.shape == (4, 6) and found.steps.min() >= 1
    scale = found.scale((32, 6))
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale, found.channel.astype(np.float64) * np.repeat(found.steps, SIZE, axis=0))
    # And so is every weight: what the simulation multiplies is what the integers stand for.
    q8 = np.arange(-128, 128)[:, None]
    exact = found.channel.astype(np.float64) * q8
    np.testing.assert_array_equal((found.channel * q8.astype(np.float32)).astype(np.float64), exact)


@named
def test_int8_weight_stands_for_the_same_numbers(qtype):
    w = weight()
    found = groups.choose(w, qtype)
    q8 = groups.int8_weight(codes_of(w, found), found.steps, found.zero_points, qtype)
    assert q8.dtype == np.int8
    np.testing.assert_array_equal(q8 * found.channel.astype(np.float64), dequantized(w, found))


def by_trying_all(w, qtype, channel):
    """Least squared error per group over every step and zero point with which all codes fit int8, plainly."""
    levels = (w.astype(np.float64) / channel).reshape(-1, SIZE, w.shape[1])
    best = np.full((len(levels), w.shape[1]), np.inf)
    for step, zero in itertools.product(range(1, 128), [0] if qtype.symmetric else range(qtype.qmin, qtype.qmax + 1)):
        low, high = step * (qtype.qmin - zero), step * (qtype.qmax - zero)
        if low >= -128 and high <= 127:
            off = step * np.clip(np.rint(levels / step), qtype.qmin - zero, qtype.qmax - zero) - levels
            best = np.minimum(best, (off**2).sum(axis=1))
    return best * channel**2


@named
@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "positive"])
def test_error_is_that_of_trying_everything(qtype, kind):
    w = weight(kind, (64, 12))
    found = groups.choose(w, qtype)
    error = ((dequantized(w, found) - w) ** 2).reshape(-1, SIZE, w.shape[1]).sum(axis=1)
    least = by_trying_all(w, qtype, found.channel.astype(np.float64))
    # Not all pairs of step and zero point are tried, but fifteen steps with five zero points each. Measured: 6 %.
    assert least.sum() * (1 - 1e-6) <= error.sum() <= 1.1 * least.sum()


@named
def test_what_is_not_clipped_is_off_by_half_a_step_at_most(qtype):
    w = weight("heavy")
    found = groups.choose(w, qtype)
    q, scale = codes_of(w, found), found.scale(w.shape)
    inside = (q > qtype.qmin) & (q < qtype.qmax)
    assert inside.sum() > w.size / (8 if qtype.bits == 2 else 2)
    assert (np.abs(dequantized(w, found) - w)[inside] <= scale[inside] / 2 * (1 + 1e-5)).all()


def test_noise_of_uniform_weights_is_a_twelfth_of_a_step_squared():
    # Groups of 512 of one range: every step covers it, so that nothing is clipped but by rounding of the step.
    w = weight("uniform", (2048, 8))
    found = groups.choose(w, grouped(4, symmetric=False, size=512))
    measured = np.mean((dequantized(w, found) - w) ** 2)
    expected = np.mean(found.scale(w.shape).astype(np.float64) ** 2) / 12
    # 16,384 draws: the mean of squares is known to 1 %; half a code at either end may be missing, 3 % of the range.
    assert measured == pytest.approx(expected, rel=0.05)


def test_groups_help_where_ranges_differ_along_the_input():
    ranges = np.where(np.arange(32) < SIZE, 1.0, 1 / 16)[:, None]
    w = (weight("uniform") * ranges).astype(np.float32)
    whole = grouped(4, narrow=True, size=32)
    errors = [np.mean((dequantized(w, groups.choose(w, t)) - w)[SIZE:] ** 2) for t in (whole, grouped(4, narrow=True))]
    # One step for all rounds the finer rows to zero: 1/3 of their range squared. With steps of their own: 1/7**2/12.
    assert errors[1] < errors[0] / 50


def test_groups_do_nothing_where_one_group_is_all():
    w = weight("uniform")
    assert (groups.choose(w, grouped(4, narrow=True, size=32)).steps >= 16).all()
    # A first level for one group is an ordinary scale, but for the bits of its mantissa and the choice to clip.
    unclipped = groups.channel_scale(w, grouped(4, narrow=True)) * groups.most_step(grouped(4, narrow=True))
    np.testing.assert_allclose(unclipped, np.abs(w).max(axis=0, keepdims=True) / 7, rtol=2.0**-15)


def test_zeros_and_dead_groups():
    w = weight()
    w[:, 2], w[:SIZE, 4] = 0, 0
    found = groups.choose(w, grouped(4, symmetric=False))
    assert np.all(dequantized(w, found)[w == 0] == 0)
    assert groups.choose(np.zeros((0, 3), np.float32), grouped(4)).steps.shape == (0, 3)


def test_a_coarser_scale_of_the_channel_can_be_given():
    w, qtype = weight(), grouped(4, symmetric=False)
    coarse = groups.round_up(4 * groups.channel_scale(w, qtype))
    found = groups.choose(w, qtype, coarse)
    np.testing.assert_array_equal(found.channel, coarse)
    # Steps are a quarter as fine, so at least one in eight of the smallest (16 / 4, rounded).
    assert np.mean((dequantized(w, found) - w) ** 2) < 2 * np.mean((dequantized(w, groups.choose(w, qtype)) - w) ** 2)


@pytest.mark.parametrize("length", [SIZE, SIZE + 3, 2 * SIZE - 1, 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_numbers_of_groups_are_repeated_over_them(length, axis):
    """By `expand` under jit, and by its twin on the host; the last group may be shorter."""
    shape = (length, 5) if axis == 0 else (5, length)
    qtype = grouped(4, contracted=(axis,))
    count = -(-length // SIZE)
    steps = np.arange(1, 1 + 5 * count).astype(np.int8).reshape((count, 5) if axis == 0 else (5, count))
    expected = np.repeat(steps, SIZE, axis=axis).take(range(length), axis=axis)
    np.testing.assert_array_equal(jax.jit(lambda x: groups.expand(x, shape, qtype))(steps), expected)
    ones = groups.Groups(qtype, np.ones((1, 5), np.float32), steps, steps)
    np.testing.assert_array_equal(ones.zero_point(shape), expected)


def test_infinite_weights_are_refused():
    with pytest.raises(QuantizationError, match="finite"):
        groups.choose(np.array([[1.0], [np.inf]], np.float32), grouped(4))


def test_type_names_its_groups():
    qtype = grouped(4, size=32)
    assert qtype.name == "int4s[~0/32,1]"
    assert qtype.per_channel == QuantType(4, symmetric=True, axis=(1,))
    assert qtype.batched().name == "int4s[~1/32,2]"
    with pytest.raises(QuantizationError, match="contracted names dimensions of axis"):
        QuantType(4, axis=(1,), contracted=(0,))
