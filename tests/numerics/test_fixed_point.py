"""The one definition of rounding, against Python's big integers and the formulas as they are written."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis.extra import numpy as hnp

from qcompiler.backends.lax_int import bounds
from qcompiler.numerics import fixed_point
from qcompiler.numerics.fixed_point import Multiplier, guard_bits, multiplier_for, rescale
from qcompiler.numerics.types import ACTIVATION, INDEX, STREAM, WEIGHT, QuantType

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
EDGES = sorted(
    {s * (2**k + d) for k in range(31) for d in (-1, 0, 1) for s in (-1, 1)} | {INT32_MIN, INT32_MAX, -INT32_MAX}
)
EDGES = np.array([x for x in EDGES if INT32_MIN <= x <= INT32_MAX], np.int64)
MANTISSAS = (0.5, np.nextafter(0.5, 1), 0.7071, 0.75, 1 - 2.0**-31, 1 - 2.0**-32, 1 - 2.0**-33, np.nextafter(1, 0))


def exact(x: int, ratio: float, largest: float | None = None) -> int:
    """floor(x * r + 1/2) in big integers for r rounded to 31 bits; x saturates where the contract says so."""
    mantissa, exponent = math.frexp(abs(ratio))
    rounded = Fraction(round(Fraction(mantissa) * 2**31)) * Fraction(2) ** (exponent - 31)
    if rounded < Fraction(1, 2**33):
        return 0
    if rounded >= Fraction(1, 4):
        e = math.frexp(float(rounded))[1]
        left = min(e + 2, 30)
        limit = 2 ** (30 - left)
        rounded *= Fraction(2) ** (left - e - 2)
    else:
        limit = INT32_MAX
    if largest is not None and ratio:
        limit = min(limit, math.floor(largest / abs(ratio)))
    x = min(max(x, -limit), limit)
    return math.floor(x * rounded * (1 if ratio >= 0 else -1) + Fraction(1, 2))


def run(x, m: Multiplier) -> np.ndarray:
    return np.asarray(rescale(jnp.asarray(x, jnp.int32), m))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", range(-36, 36))
def test_rescale_is_exact(exponent, sign):
    """Every exponent, mantissas that round up to the next, the edges of int32, ties; scalar and per channel alike."""
    ratios = sign * np.ldexp(MANTISSAS, exponent)
    expected = np.array([[exact(int(x), float(r)) for r in ratios] for x in EDGES])
    everywhere = np.broadcast_to(EDGES[:, None], expected.shape)
    per_channel = run(everywhere, multiplier_for(ratios[None], 2.0**31))
    np.testing.assert_array_equal(per_channel, expected)
    for k, ratio in enumerate(ratios[:3]):
        np.testing.assert_array_equal(run(EDGES, multiplier_for(ratio, 2.0**31)), expected[:, k])


def test_rescale_of_mixed_channels():
    """Channels that shift left, channels that do not, and those that vanish, in one multiplier."""
    ratios = np.array([1e9, 3.0, 1.0, 0.3, 0.1, 1e-5, 2.0**-33, 2.0**-34, 1e-30, 0.0, -1.0, -1e-9])
    expected = np.array([[exact(int(x), float(r)) for r in ratios] for x in EDGES])
    everywhere = np.broadcast_to(EDGES[:, None], expected.shape)
    np.testing.assert_array_equal(run(everywhere, multiplier_for(ratios[None], 2.0**31)), expected)


def test_ties_go_up():
    m = multiplier_for(0.5, 100)
    np.testing.assert_array_equal(run([-3, -2, -1, 0, 1, 2, 3], m), [-1, -1, 0, 0, 1, 1, 2])
    m = multiplier_for(-0.5, 100)
    np.testing.assert_array_equal(run([-3, -1, 1, 3], m), [2, 1, 0, -1])


@settings(max_examples=300)
@example(76, 0.02, False, 1.5)
@given(
    st.integers(INT32_MIN, INT32_MAX),
    st.floats(2.0**-40, 2.0**40),
    st.booleans(),
    st.none() | st.floats(1, 2.0**27),
)
def test_rescale_of_anything(x, ratio, negative, largest):
    ratio = -ratio if negative else ratio
    m = multiplier_for(ratio, abs(x), largest)
    got = int(run(x, m))
    # Without need for a clamp there is none; with `largest` it is only promised where the bound asks for it.
    assert got == exact(x, ratio, largest if m.limit is not None else None)
    real = Fraction(x) * Fraction(ratio)
    if abs(real) < min(2**27, largest or 2**27) - 1:
        assert abs(got - real) <= Fraction(1, 2) + abs(real) / 2**31
    elif largest is None:
        assert abs(got) >= 2**27 - 1 and (got > 0) == (real > 0)


@settings(max_examples=300)
@given(st.floats(2.0**-32, 2.0**27))
def test_multiplier_is_accurate(ratio):
    for sign in (1, -1):
        m = multiplier_for(sign * ratio, 1)
        assert abs(float(m.ratio) - sign * ratio) <= ratio * 2.0**-31
        assert 2**30 <= abs(int(m.multiplier)) < 2**31
        assert int(m.left) >= 0 and int(m.right) >= 1


def test_no_needless_clamp():
    assert multiplier_for(1.0, 2**27 + 1).limit is not None
    assert multiplier_for(1.0, 2**27).limit is None
    assert multiplier_for(2.0**-8, 2**31 - 1).limit is None


def test_rescale_compiles_to_the_same():
    ratios = np.array([[0.37, 2.0**-9 * 1.1, 12.3]])
    m = multiplier_for(ratios, 2.0**31)
    x = jnp.asarray(np.random.default_rng(0).integers(INT32_MIN, INT32_MAX, (50, 3)), jnp.int32)
    compiled = jax.jit(lambda x: rescale(x, m)).lower(x).compile()
    np.testing.assert_array_equal(compiled(x), rescale(x, m))
    assert not any(f"{t}[" in compiled.as_text() for t in ("f32", "f64", "f16", "bf16", "s64"))


# Entry and exit


def formula(x, scale, zero, qtype) -> np.ndarray:
    """clamp(rint(x * float32(1/s)) + z); NaN is the zero point."""
    out = []
    inverse = np.float32(1) / np.float32(scale)
    for value in np.asarray(x, np.float32).ravel():
        with np.errstate(over="ignore", under="ignore"):
            steps = float(np.float32(value) * inverse)
        if math.isnan(steps):
            code = zero
        elif math.isinf(steps):
            code = qtype.qmin if steps < 0 else qtype.qmax
        else:
            code = round(steps) + zero
        out.append(min(max(code, qtype.qmin), qtype.qmax))
    return np.array(out, qtype.dtype).reshape(np.shape(x))


SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e30, 1e-45, -1e-38, 2.0**31, -(2.0**31), 2.0**24, 1e9]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("qtype", [ACTIVATION, WEIGHT, STREAM, INDEX, QuantType(4)], ids=lambda t: t.name)
@pytest.mark.parametrize("scale", [1.0, 0.1, 3e-5, 2.0**-60, 2.0**60, 1 / 3])
def test_entry_is_the_formula(scale, qtype, jit):
    rng = np.random.default_rng(0)
    steps = np.concatenate(
        [np.arange(-300, 300) / 2, rng.normal(size=500) * 2 ** (qtype.bits - 1), [40000.5, -40000.5]]
    )
    x = np.concatenate([np.array(SPECIAL, np.float32), (steps * scale).astype(np.float32)])
    scale = np.float32(scale)
    for zero in {0} if qtype.symmetric else {0, 5, qtype.qmin, qtype.qmax}:
        entry = lambda x, s, z: fixed_point.quantize(x, s, z, qtype)
        got = (jax.jit(entry) if jit else entry)(x, jnp.asarray(scale), jnp.asarray(zero, jnp.int32))
        assert got.dtype == qtype.dtype
        np.testing.assert_array_equal(got, formula(x, scale, zero, qtype))
        np.testing.assert_array_equal(fixed_point.quantize_number(x, scale, zero, qtype), got)


def test_entry_rounds_ties_to_even_and_nan_to_zero():
    x = jnp.asarray([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, jnp.nan, jnp.inf, -jnp.inf])
    got = fixed_point.quantize(x, np.float32(1), np.int32(3), ACTIVATION)
    np.testing.assert_array_equal(got, [1, 1, 3, 3, 5, 5, 3, 127, -128])


def test_entry_takes_other_floats():
    for dtype in (jnp.bfloat16, jnp.float16):
        x = jnp.asarray([0.5, -3.25, 100.0], dtype)
        np.testing.assert_array_equal(fixed_point.quantize(x, np.float32(0.5), np.int32(0), STREAM), [1, -6, 200])


def test_exit_is_the_formula():
    q = np.arange(-(2**15), 2**15).astype(np.int16)
    got = fixed_point.dequantize(q, np.float32(0.1), np.int32(-7))
    np.testing.assert_array_equal(got, (q.astype(np.float32) + np.float32(7)) * np.float32(0.1))


@settings(max_examples=100)
@given(st.floats(2.0**-60, 2.0**60, width=32), st.integers(-128, 127), st.integers(-128, 127))
def test_entry_inverts_exit(scale, zero, code):
    real = fixed_point.dequantize(np.int8(code), np.float32(scale), np.int32(zero))
    assert int(fixed_point.quantize(real, np.float32(scale), np.int32(zero), ACTIVATION)) == code


# No overflow


@settings(max_examples=500)
@given(
    st.lists(st.tuples(st.integers(1, INT32_MAX), st.floats(2.0**-40, 2.0**20), st.booleans()), min_size=1, max_size=8),
    st.floats(-(2.0**30), 2.0**30),
)
def test_guarded_sums_fit_int32(terms, constant):
    """The worst inputs of every term together, and the half that rounds: as `quantize_real` sums them."""
    reach = sum(bound * ratio for bound, ratio, _ in terms) + abs(constant)
    guard = guard_bits(reach)
    assert 0 <= guard <= fixed_point.MAX_GUARD_BITS
    offset = round(constant * 2.0**guard)
    if abs(offset) > 2**30:
        return  # refused
    limit = 2.0**fixed_point.TERM_BITS
    largest = limit / len(terms) if reach > limit else None
    for direction in (1, -1):
        total = max(direction * offset, 0)
        for bound, ratio, negative in terms:
            signed = -ratio if negative else ratio
            m = multiplier_for(signed * 2.0**guard, bound, largest)
            x = direction * (-bound if negative else bound)
            total += direction * int(run(x, m))
        assert total + (1 << guard) // 2 <= INT32_MAX


@settings(max_examples=300)
@given(st.floats(0, 2.0**60))
def test_guard_bits_are_the_most_that_fit(total):
    g = guard_bits(total)
    assert g == 0 or total * 2.0**g <= 2.0**27
    assert g == fixed_point.MAX_GUARD_BITS or total * 2.0 ** (g + 1) > 2.0**27


def test_guard_bits_at_powers_of_two():
    assert [guard_bits(2.0**k) for k in (0, 13, 14, 26, 27, 28)] == [14, 14, 13, 1, 0, 0]
    assert guard_bits(np.nextafter(2.0**26, 2.0**27)) == 0
    assert guard_bits(0.0) == 14


def test_round_guard_rounds_half_up():
    x = jnp.asarray([-3, -2, -1, 0, 1, 2, 3], jnp.int32)
    np.testing.assert_array_equal(fixed_point.round_guard(x, 1), [-1, -1, 0, 0, 1, 1, 2])
    np.testing.assert_array_equal(fixed_point.round_guard(x, 0), x)


@settings(max_examples=200)
@given(
    hnp.arrays(np.int8, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=st.integers(-128, 127)),
    st.integers(-255, 0),
    st.integers(0, 255),
    st.data(),
)
def test_contraction_bounds_hold_and_are_reached(weight, low, high, data):
    least, most = bounds.of_contraction((np.int64(low), np.int64(high)), weight, (0,))
    x = data.draw(hnp.arrays(np.int64, weight.shape[0], elements=st.integers(low, high)))
    wide = weight.astype(np.int64)
    assert ((least[0] <= x @ wide) & (x @ wide <= most[0])).all()
    for channel, w in enumerate(wide.T):
        assert np.where(w > 0, high, low) @ w == most[0, channel]
        assert np.where(w > 0, low, high) @ w == least[0, channel]
