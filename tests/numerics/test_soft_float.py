"""Floating point in int32 against float64 and exact fractions: arithmetic, order, rounding, sums and scans."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax
from soft import draw, dtypes, real, soft

from qcompiler.numerics import int32
from qcompiler.numerics import soft_float as sf
from qcompiler.numerics import soft_reductions as red
from qcompiler.numerics import soft_rounding as rnd
from qcompiler.numerics.soft_float import EXPONENT_LIMIT, INT32_MAX, INT32_MIN, SoftFloat

INF = math.inf
EDGES = np.array([0, 1, -1, 0.5, 1.5, -2.5, 2**29 - 1, -(2**30) + 1, 2.0**-40, 3e38, -1e-38, INF, -INF])
EVEN, AWAY = lax.RoundingMethod.TO_NEAREST_EVEN, lax.RoundingMethod.AWAY_FROM_ZERO

UNARY = {
    "neg": (sf.neg, np.negative, 0),
    "abs": (sf.abs_, np.abs, 0),
    "sign": (sf.sign, np.sign, 0),
    "square": (sf.square, np.square, 2.0**-28),
    "reciprocal": (sf.reciprocal, lambda x: 1 / x, 2.0**-29),
    "floor": (rnd.floor, np.floor, 0),
    "ceil": (rnd.ceil, np.ceil, 0),
    "trunc": (rnd.trunc, np.trunc, 0),
    "round_even": (lambda x: rnd.round(x, EVEN), np.rint, 0),
    "round_away": (lambda x: rnd.round(x, AWAY), lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x), 0),
}
BINARY = {
    "mul": (sf.mul, np.multiply, 2.0**-28),
    "div": (sf.div, np.divide, 2.0**-29),
    "maximum": (sf.maximum, np.maximum, 0),
    "minimum": (sf.minimum, np.minimum, 0),
}


@np.errstate(all="ignore")
def assert_close(got: SoftFloat, expected, tolerance, size=None) -> None:
    """Within `tolerance` of `size`, or of what is expected; infinities are equal and NaN is 0."""
    expected = np.asarray(expected, np.float64)
    expected = np.where(np.isnan(expected), 0, expected)
    got, finite = real(got), np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    size = np.broadcast_to(np.abs(expected) if size is None else size, expected.shape)
    assert np.all(np.abs(got - expected)[finite] <= tolerance * size[finite])


@pytest.mark.parametrize("name", UNARY)
@np.errstate(all="ignore")
def test_unary(name):
    fun, expected, tolerance = UNARY[name]
    rng = np.random.default_rng(0)
    for x in (draw(rng, -250, 250), draw(rng, -4, 33), soft(np.arange(-40, 41) / 4), soft(EDGES)):
        want = expected(real(x))
        # A quantity without the sign of zero: 1 / -0 is infinite of either sign, here it is positive.
        assert_close(jax.jit(fun)(x), want, tolerance)


@pytest.mark.parametrize("name", BINARY)
@np.errstate(all="ignore")
def test_binary(name):
    fun, expected, tolerance = BINARY[name]
    rng = np.random.default_rng(1)
    edges = soft(np.repeat(EDGES, len(EDGES))), soft(np.tile(EDGES, len(EDGES)))
    for a, b in ((draw(rng, -250, 250), draw(rng, -250, 250)), (draw(rng, -2, 2), draw(rng, -2, 2)), edges):
        assert_close(jax.jit(fun)(a, b), expected(real(a), real(b)), tolerance)


@np.errstate(all="ignore")
def test_sums_err_by_a_part_of_the_larger_operand():
    rng = np.random.default_rng(2)
    edges = soft(np.repeat(EDGES, len(EDGES))), soft(np.tile(EDGES, len(EDGES)))
    for spread in (1, 35, 200):
        a, b = draw(rng, -spread, spread), draw(rng, -spread, spread)
        assert_close(jax.jit(sf.add)(a, b), real(a) + real(b), 2.0**-29, np.maximum(abs(real(a)), abs(real(b))))
    for fun, expected in ((sf.add, np.add), (sf.sub, np.subtract)):
        a, b = real(edges[0]), real(edges[1])
        assert_close(jax.jit(fun)(*edges), expected(a, b), 2.0**-29, np.maximum(abs(a), abs(b)))


def test_a_difference_of_near_numbers_is_exact():
    """Sterbenz: the numbers next to a power of two on either side, and random ones within a factor of two."""
    rng = np.random.default_rng(3)
    a = draw(rng, 0, 1)
    b = soft(real(a) * rng.uniform(0.5, 2, real(a).shape))
    assert_close(jax.jit(sf.sub)(a, b), real(a) - real(b), 0)
    assert_close(sf.sub(soft([1.0]), soft([1 - 2.0**-30])), [2.0**-30], 0)


NUMBERS = st.tuples(st.integers(1 << 29, (1 << 30) - 1), st.sampled_from([-1, 1]), st.integers(-2000, 2000))


def fraction(mantissa: int, exponent: int) -> Fraction:
    return Fraction(mantissa) * Fraction(2) ** exponent


@pytest.mark.parametrize("name", ["add", "mul", "div"])
def test_against_fractions(name):
    """Exponents far outside of float64's."""
    fun = jax.jit({"add": sf.add, "mul": sf.mul, "div": sf.div}[name])

    @settings(max_examples=100)
    @given(NUMBERS, NUMBERS, st.booleans())
    def check(left, right, near):
        a, b = ((m * s, e) for m, s, e in (left, right))
        b = (b[0], a[1] + b[1] % 32) if near else b
        operands = [SoftFloat(np.int32([m]), np.int32([e])) for m, e in (a, b)]
        got = fun(*operands)
        x, y = fraction(*a), fraction(*b)
        exact = {"add": lambda: x + y, "mul": lambda: x * y, "div": lambda: x / y}[name]()
        size = max(abs(x), abs(y)) if name == "add" else abs(exact)
        error = abs(fraction(int(got.mantissa[0]), int(got.exponent[0])) - exact) if got.mantissa[0] else abs(exact)
        assert error <= size / (1 << (28 if name == "mul" else 29))
        if name != "div":
            swapped = fun(*operands[::-1])
            assert int(swapped.mantissa[0]) == int(got.mantissa[0])

    check()


def test_roots():
    rng = np.random.default_rng(4)
    for x in (sf.abs_(draw(rng, -250, 250)), sf.abs_(draw(rng, -2, 2))):
        assert_close(jax.jit(sf.sqrt)(x), np.sqrt(real(x)), 2.0**-29)
        assert_close(jax.jit(sf.rsqrt)(x), 1 / np.sqrt(real(x)), 2.0**-28)
    assert_close(sf.sqrt(soft([0.0, INF, -1.0, -INF])), [0, INF, 0, 0], 0)
    assert_close(sf.rsqrt(soft([0.0, INF, -1.0, -INF])), [INF, 0, 0, 0], 0)


def test_what_can_be_exact_is():
    whole = np.arange(1, 20000)
    x = sf.from_int(jnp.asarray(whole, jnp.int32))
    assert_close(sf.sqrt(sf.mul(x, x)), whole, 0)
    for factor in (3.0, 7.0, 12345.0):
        assert_close(sf.div(sf.mul(x, soft([factor])), x), np.full(whole.shape, factor), 0)


def test_saturation():
    """Chains that leave the exponents' range end at 0 and infinity and stay there."""
    for start, end in ((2.0, INF), (-3.0, INF), (0.5, 0.0), (-0.3, 0.0)):
        x = soft([start])
        for _ in range(40):
            x = sf.square(x)
        assert real(x)[0] == end
    large, small = (SoftFloat(np.int32([1 << 29]), np.int32([e])) for e in (EXPONENT_LIMIT, -EXPONENT_LIMIT))
    assert real(sf.div(large, small))[0] == INF and real(sf.div(small, large))[0] == 0
    assert real(sf.mul(soft([INF]), small))[0] == INF and real(sf.add(soft([-INF]), large))[0] == -INF
    assert real(sf.scale_by_power_of_two(soft([INF]), -(1 << 18)))[0] == INF
    np.testing.assert_array_equal(real(sf.scale_by_power_of_two(soft([1.5, 0.0]), 5)), [48, 0])


def test_integers_of_every_size():
    edges = sorted({s * (2**k + d) for k in range(31) for d in (-1, 0, 1) for s in (-1, 1)} | {INT32_MIN, INT32_MAX})
    x = np.array([v for v in edges if INT32_MIN <= v <= INT32_MAX], np.int64)
    codes = jnp.asarray(x, jnp.int32)
    for scale, tolerance in ((1.0, 2.0**-29), (2.0**-9, 2.0**-29), (0.3, 2.0**-27), (-1e-5, 2.0**-27), (0.0, 0)):
        assert_close(jax.jit(lambda q, s=scale: sf.from_int(q, s))(codes), x * scale, tolerance)
    scales = np.array([[1.0, 0.1, 3e-9, 2.0**20]])
    assert_close(sf.from_int(codes[:, None], scales), x[:, None] * scales, 2.0**-27)
    small = jnp.arange(-128, 128, dtype=jnp.int8)
    assert_close(sf.from_int(small, 0.25), np.arange(-128, 128) / 4, 0)
    assert real(sf.from_int(jnp.asarray([INT32_MIN], jnp.int32)))[0] == INT32_MIN
    # Truncation saturates.
    back = rnd.to_int(sf.from_int(codes))
    fits = np.abs(x) < 2**30
    np.testing.assert_array_equal(np.asarray(back)[fits], x[fits])
    values = [0.99, -1.99, 1e30, -INF, INF, 2.0**31, -(2.0**31), 0]
    np.testing.assert_array_equal(
        rnd.to_int(soft(values)), [0, -1, INT32_MAX, -INT32_MAX, INT32_MAX, INT32_MAX, -INT32_MAX, 0]
    )


def test_constants():
    held = {}

    def hold(name, value):
        held[name] = value
        return value

    assert_close(sf.constant(EDGES, hold, "edges"), EDGES, 2.0**-30)
    assert {n: v.dtype for n, v in held.items()} == {"edges_mantissa": np.int32, "edges_exponent": np.int32}
    assert isinstance(sf.constant(0.1).mantissa, np.int32)
    # Rounds up to the next power of two.
    assert_close(sf.constant(np.array([1 - 2.0**-40])), [1], 0)
    with pytest.raises(ValueError, match="NaN"):
        sf.constant(np.array([0, math.nan]))


@pytest.mark.parametrize("name", ["lt", "le", "gt", "ge", "eq", "ne"])
def test_compare(name):
    values = np.concatenate([EDGES, -EDGES, np.ldexp(1.0, np.arange(-200, 200, 40)), [1 + 2.0**-29, -1 - 2.0**-29]])
    a, b = soft(values[:, None]), soft(values[None])
    numpy = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    expected = {**numpy, "eq": np.equal, "ne": np.not_equal}[name](real(a), real(b))
    np.testing.assert_array_equal(jax.jit(lambda a, b: sf.compare(name, a, b))(a, b), expected)


def test_unknown_comparison():
    with pytest.raises(ValueError, match="unknown comparison 'less'"):
        sf.compare("less", soft([1.0]), soft([1.0]))


@np.errstate(all="ignore")
def test_remainder_is_exact():
    rng = np.random.default_rng(5)
    for low, high in ((-2, 2), (-2, 26), (-30, 5)):
        a, b = draw(rng, low, high), draw(rng, -2, 2)
        assert_close(jax.jit(rnd.rem)(a, b), np.fmod(real(a), real(b)), 0)
    whole, divisor = np.meshgrid(np.arange(-60, 61.0), [-7, -3, -1, 1, 2, 10])
    assert_close(rnd.rem(soft(whole * 0.5), soft(divisor * 0.5)), np.fmod(whole, divisor) * 0.5, 0)
    specials = np.array([0, 1.5, -1.5, INF, -INF])
    a, b = soft(np.repeat(specials, 5)), soft(np.tile(specials, 5))
    assert_close(rnd.rem(a, b), np.fmod(real(a), real(b)), 0)


@np.errstate(all="ignore")
def test_to_codes():
    rng = np.random.default_rng(6)
    x = soft(np.concatenate([real(draw(rng, -30, 12)), [0, INF, -INF, 1e30, -1e30, 2.0**40]]))
    for scale in (np.float32(0.05), np.float32(2.0**-4), np.float32(1e-3)):
        for zero_point, qmin, qmax, dtype in ((3, -128, 127, np.int8), (0, -32768, 32767, np.int16)):
            got = jax.jit(lambda x, a=(scale, zero_point, qmin, qmax, dtype): rnd.to_codes(x, *a))(x)
            assert got.dtype == dtype
            got = np.asarray(got, np.float64)
            steps = real(x) / np.float64(scale)
            expected = np.clip(np.floor(steps + 0.5) + zero_point, qmin, qmax)
            # Where the product with the reciprocal, of 28 bits, cannot decide, either side is right.
            tie = np.abs(steps - np.floor(steps) - 0.5) < np.abs(steps) * 2.0**-27
            assert np.all((got == expected) | (tie & (np.abs(got - expected) == 1)))
    scales = np.array([[0.5, 0.25, 1.0]], np.float32)
    ties = soft(np.array([[0.25, 0.125, 0.5], [-0.25, -0.125, -0.5]]))
    np.testing.assert_array_equal(rnd.to_codes(ties, scales, 0, -128, 127, np.int8), [[1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize("shape, axes", [((7, 300), (1,)), ((7, 300), (0, 1)), ((3, 5, 4), (0, 2)), ((2, 40000), (1,))])
def test_sums(shape, axes):
    rng = np.random.default_rng(7)
    for spread in (1, 12, 60):
        x = draw(rng, -spread, spread, shape)
        count = math.prod(shape[a] for a in axes)
        # Alignment rounds each term to 2**-30 of the largest, or to what lets so many fit.
        exact = np.sum(real(x), axes)
        largest = np.max(np.abs(real(x)), axes)
        tolerance = count * 2.0 ** (-30 + max(0, math.ceil(math.log2(count)) - 15))
        got = jax.jit(lambda x: red.reduce_sum(x, axes))(x)
        assert_close(got, exact, 1, tolerance * largest + 2.0**-29 * np.abs(exact))


def test_sums_lose_nothing():
    """Terms of one exponent: the sum of 2**15 mantissas is exact but for its own rounding, cancellation included."""
    rng = np.random.default_rng(8)
    x = draw(rng, -1, 0, (3, 1 << 15))
    assert_close(red.reduce_sum(x, (1,)), real(x).sum(1), 2.0**-29)
    largest = soft(np.full((1, 1 << 15), 1 - 2.0**-30))
    assert_close(red.reduce_sum(largest, (1,)), real(largest).sum(1), 2.0**-29)
    pairs = soft(np.array([[1.0, -1.0, 2.0**-20, 1e30, -1e30], [0, 0, 0, 0, 0], [INF, 1, -5, 1e9, 0]]))
    assert_close(red.reduce_sum(pairs, (1,)), [0, 0, INF], 0)
    assert_close(red.reduce_sum(pairs.map(lambda v: v[:, :0]), (1,)), [0, 0, 0], 0)


@pytest.mark.parametrize("reverse", [False, True])
def test_scans(reverse):
    rng = np.random.default_rng(9)
    x = draw(rng, -2, 2, (5, 37))
    order = slice(None, None, -1) if reverse else slice(None)

    def expected(fun):
        return fun(real(x)[:, order], axis=1)[:, order]

    sizes = 37 * 2.0**-29 * np.max(np.abs(real(x)), 1, keepdims=True) + 2.0**-29 * np.abs(expected(np.cumsum))
    assert_close(red.cumsum(x, 1, reverse), expected(np.cumsum), 1, sizes)
    assert_close(red.cumprod(x, 1, reverse), expected(np.cumprod), 37 * 2.0**-28)
    assert_close(red.cummax(x, 1, reverse), expected(np.maximum.accumulate), 0)
    assert_close(red.cummin(x, 1, reverse), expected(np.minimum.accumulate), 0)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_extremes_and_products(axes):
    rng = np.random.default_rng(10)
    for values in (real(draw(rng, -9, 9, (4, 5, 6))), rng.choice(EDGES[:9], (4, 5, 6)), -np.ones((4, 5, 6))):
        x = soft(values)
        assert_close(red.reduce_max(x, axes), np.max(real(x), axes), 0)
        assert_close(red.reduce_min(x, axes), np.min(real(x), axes), 0)
        assert_close(red.reduce_prod(x, axes), np.prod(real(x), axes), 120 * 2.0**-28)
        np.testing.assert_array_equal(red.argmax(x, axes[0]), np.argmax(real(x), axes[0]))
        np.testing.assert_array_equal(red.argmin(x, axes[0]), np.argmin(real(x), axes[0]))
    empty = x.map(lambda v: v[:0])
    assert_close(red.reduce_prod(empty, (0,)), np.ones((5, 6)), 0)


def test_exponents_broadcast():
    """An exponent for each row serves as one for each element."""
    rng = np.random.default_rng(11)
    mantissa = jnp.asarray(rng.integers(1 << 29, 1 << 30, (4, 6)), jnp.int32)
    rows = SoftFloat(mantissa, jnp.asarray([[-29], [0], [-60], [7]], jnp.int32))
    full = rows.broadcast_to((4, 6))
    assert full.exponent.shape == (4, 6)
    for fun in (
        lambda x: sf.mul(x, x),
        lambda x: sf.add(x, soft([[0.5]])),
        lambda x: sf.div(soft([[1.0]]), x),
        lambda x: red.reduce_sum(x, (1,)),
        lambda x: red.reduce_max(x, (0,)),
        lambda x: red.cumsum(x, 1),
        lambda x: x.map(lambda v: v.T),
    ):
        np.testing.assert_array_equal(real(fun(rows)), real(fun(full)))


def test_products_of_single_elements():
    """XLA takes another way there; INT32_MIN times itself included."""
    rng = np.random.default_rng(13)
    edges = [0, 1, -1, 0xFFFF, 0x10000, -0x10000, INT32_MAX, INT32_MIN, *rng.integers(INT32_MIN, INT32_MAX, 8)]
    fun = jax.jit(lambda a, b: int32.mulhi(int32.add(a, 0), b))
    for a in edges:
        for b in edges:
            assert int(fun(np.int32([a]), np.int32(b))[0]) == int(a) * int(b) >> 32


def layer_norm(x: SoftFloat) -> SoftFloat:
    def mean(v):
        total = red.reduce_sum(v, (1,)).map(lambda w: lax.expand_dims(w, (1,)))
        return sf.mul(total, sf.constant(1 / v.shape[1]))

    centred = sf.sub(x, mean(x))
    return sf.mul(centred, sf.rsqrt(sf.add(mean(sf.square(centred)), sf.constant(1e-6))))


def test_layer_norm_in_integers_only():
    """A whole computation: accuracy, dtypes, the same bits under jit and in batches of another size."""
    rng = np.random.default_rng(12)
    codes = jnp.asarray(rng.integers(-32768, 32768, (8, 96)), jnp.int16)

    def run(q):
        return rnd.to_codes(layer_norm(sf.from_int(q, 1e-3)), np.float32(1e-4), 0, -32768, 32767, np.int16)

    got = run(codes)
    np.testing.assert_array_equal(jax.jit(run)(codes), got)
    np.testing.assert_array_equal(jnp.concatenate([run(codes[k : k + 1]) for k in range(8)]), got)
    x = np.asarray(codes, np.float64) * 1e-3
    x = x - x.mean(1, keepdims=True)
    x /= np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
    assert np.max(np.abs(np.asarray(got, np.float64) - x / 1e-4)) <= 0.502
    assert dtypes(run, codes) <= {"int32", "int16", "bool"}


def test_every_operation_is_of_integers():
    x = soft(np.ones((3, 4)))
    unary = [fun for fun, *_ in UNARY.values()] + [sf.sqrt, sf.rsqrt, rnd.to_int]
    binary = [fun for fun, *_ in BINARY.values()] + [sf.add, sf.sub, rnd.rem]
    along = [red.cumsum, red.cumprod, red.cummax, red.cummin, red.argmax, red.argmin]
    reduced = [red.reduce_sum, red.reduce_prod, red.reduce_max, red.reduce_min]
    programs = [
        *(lambda fun=fun: fun(x) for fun in unary),
        *(lambda fun=fun: fun(x, x) for fun in binary),
        *(lambda fun=fun: fun(x, 1) for fun in along),
        *(lambda fun=fun: fun(x, (1,)) for fun in reduced),
    ]
    for program in programs:
        assert dtypes(program) <= {"int32", "bool"}
