"""Transcendental functions in int32 against Python's, over their domains, at their ends and near their zeros."""

import math
from statistics import NormalDist

import jax
import numpy as np
import pytest
from soft import draw, dtypes, real, soft

from qcompiler.numerics import soft_float as sf
from qcompiler.numerics import soft_functions as fn
from qcompiler.numerics import soft_trigonometry as trig

INF = math.inf


def erf_inv(x: float) -> float:
    return math.copysign(NormalDist().inv_cdf((1 - abs(x)) / 2), x) / math.sqrt(2)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


#: name -> function, reference, exponents of the arguments, domain, bits of the relative error. Where a value is rounded
#: to 30 bits before it is exponentiated, an argument of 2**5 costs 5 of them.
FUNCTIONS = {
    "exp": (fn.exp, math.exp, (-40, 6), "real", 22),
    "exp2": (fn.exp2, lambda x: 2.0**x, (-40, 6), "real", 22),
    "expm1": (fn.expm1, math.expm1, (-200, 5), "real", 24.5),
    "log": (fn.log, math.log, (-250, 250), "positive", 25.5),
    "log2": (fn.log2, math.log2, (-250, 250), "positive", 25.5),
    "log1p": (fn.log1p, math.log1p, (-200, 200), "positive", 25.5),
    "log1p_below": (fn.log1p, math.log1p, (-200, 0), "negative", 25.5),
    "logistic": (fn.logistic, logistic, (-40, 5), "real", 24.5),
    "tanh": (fn.tanh, math.tanh, (-200, 8), "real", 25.5),
    "sinh": (fn.sinh, math.sinh, (-200, 5), "real", 24.5),
    "cosh": (fn.cosh, math.cosh, (-40, 5), "real", 24.5),
    "asinh": (fn.asinh, math.asinh, (-200, 200), "real", 25.5),
    "acosh": (fn.acosh, math.acosh, (0, 200), "positive", 25.5),
    "atanh": (fn.atanh, math.atanh, (-200, 0), "real", 25.5),
    "cbrt": (fn.cbrt, math.cbrt, (-250, 250), "real", 24.5),
    "erf": (fn.erf, math.erf, (-200, 4), "real", 25),
    "erfc": (fn.erfc, math.erfc, (-40, 3), "real", 20),
    "erf_inv": (fn.erf_inv, erf_inv, (-12, 0), "real", 22),
    "sin_small": (trig.sin, math.sin, (-200, 0), "real", 26),
    "tan_small": (trig.tan, math.tan, (-200, 0), "real", 25.5),
    "atan": (trig.atan, math.atan, (-200, 200), "real", 26),
    "asin": (trig.asin, math.asin, (-200, 0), "real", 25.5),
    "acos": (trig.acos, math.acos, (-40, 0), "real", 25.5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_relative_error(name):
    fun, reference, exponents, domain, bits = FUNCTIONS[name]
    rng = np.random.default_rng(0)
    low, high = exponents
    # Over all exponents, and more densely over those that decide.
    for spread in (exponents, (max(low, -3), min(high, 3))):
        x = draw(rng, *spread)
        x = {"real": x, "positive": sf.abs_(x), "negative": sf.neg(sf.abs_(x))}[domain]
        want = np.array([reference(v) for v in real(x)])
        assert np.max(np.abs(real(jax.jit(fun)(x)) - want) / np.abs(want), where=want != 0, initial=0) <= 2.0**-bits


def near(point: float) -> np.ndarray:
    """Numbers of 30 bits ever nearer to a point, on both sides of it."""
    steps = np.exp2(-np.arange(1, 29.0))
    return real(soft(np.concatenate([point + steps, point - steps])))


@pytest.mark.parametrize(
    "fun, reference, bits",
    [(fn.log, math.log, 25.5), (fn.log2, math.log2, 25.5), (fn.acosh, math.acosh, 25), (fn.erf_inv, erf_inv, 22)],
)
def test_near_one(fun, reference, bits):
    x = near(1.0)
    x = x[x > 1] if fun is fn.acosh else x[x < 1] if fun is fn.erf_inv else x
    want = np.array([reference(v) for v in x])
    assert np.max(np.abs(real(jax.jit(fun)(soft(x))) / want - 1)) <= 2.0**-bits


@pytest.mark.parametrize("fun, reference", [(trig.sin, np.sin), (trig.cos, np.cos)])
def test_circles(fun, reference):
    rng = np.random.default_rng(1)
    multiples = np.arange(-4000, 4000) * (np.pi / 8)
    for x in (draw(rng, -30, 3), draw(rng, 3, 29), soft(multiples)):
        # 2**-26 of the circle's radius, wherever on it.
        assert np.max(np.abs(real(jax.jit(fun)(x)) - reference(real(x)))) <= 2.0**-26


def test_angles_of_points():
    rng = np.random.default_rng(2)
    y, x = draw(rng, -100, 100), draw(rng, -100, 100)
    want = np.arctan2(real(y), real(x))
    assert np.max(np.abs(real(jax.jit(trig.atan2)(y, x)) / want - 1)) <= 2.0**-26
    ends = [(0, 1), (0, -1), (1, 0), (-1, 0), (0, 0), (1, INF), (-INF, 1), (1, -INF), (1, 1), (-1, -1)]
    y, x = np.array(ends, np.float64).T
    # Zero has no sign, and what is half a turn rounds to it.
    np.testing.assert_allclose(real(trig.atan2(soft(y), soft(x))), np.arctan2(y, x), rtol=2.0**-26)


ENDS = [
    (fn.exp, [0, INF, -INF, 1e6, -1e6, 1e30, -1e30], [1, INF, 0, INF, 0, INF, 0]),
    (fn.exp2, [0, 1, -1, 10, -20, 131000], [1, 2, 0.5, 1024, 2.0**-20, INF]),
    (fn.expm1, [0, INF, -INF], [0, INF, -1]),
    (fn.log, [0, 1, INF, -1, -INF], [-INF, 0, INF, 0, 0]),
    (fn.log2, [0, 1, 8, 0.25, INF, -1], [-INF, 0, 3, -2, INF, 0]),
    (fn.log1p, [0, -1, INF, -2], [0, -INF, INF, 0]),
    (fn.logistic, [0, INF, -INF], [0.5, 1, 0]),
    (fn.tanh, [0, INF, -INF, 1e9, -1e9], [0, 1, -1, 1, -1]),
    (fn.sinh, [0, INF, -INF], [0, INF, -INF]),
    (fn.cosh, [0, INF, -INF], [1, INF, INF]),
    (fn.asinh, [0, INF, -INF], [0, INF, -INF]),
    (fn.acosh, [1, INF, 0.5, -3], [0, INF, 0, 0]),
    (fn.atanh, [0, 1, -1, 2, -INF], [0, INF, -INF, 0, 0]),
    (fn.cbrt, [0, INF, -INF], [0, INF, -INF]),
    (fn.erf, [0, INF, -INF], [0, 1, -1]),
    (fn.erfc, [0, INF, -INF, 1e5], [1, 0, 2, 0]),
    (fn.erf_inv, [0, 1, -1, 2, -3], [0, INF, -INF, 0, 0]),
    (trig.sin, [0, INF, 2.0**40], [0, 0, 0]),
    (trig.cos, [0, INF, 2.0**40], [1, 1, 1]),
    (trig.tan, [0, INF], [0, 0]),
    (trig.atan, [0, INF, -INF], [0, math.pi / 2, -math.pi / 2]),
    (trig.asin, [0, 1, -1, 2, -2], [0, math.pi / 2, -math.pi / 2, math.pi / 2, -math.pi / 2]),
    (trig.acos, [1, -1, 2, -2], [0, math.pi, 0, math.pi]),
]


@pytest.mark.parametrize("fun, x, want", ENDS, ids=[fun.__name__ for fun, *_ in ENDS])
def test_ends(fun, x, want):
    # The tolerance is for pi, and for polynomials at their ends; zeros and infinities are met exactly.
    np.testing.assert_allclose(real(jax.jit(fun)(soft(x))), want, rtol=2.0**-26, atol=0)


def test_powers():
    rng = np.random.default_rng(3)
    x, y = sf.abs_(draw(rng, -8, 8)), draw(rng, -3, 3)
    want = real(x) ** real(y)
    size = 1 + np.abs(real(y) * np.log2(real(x)))
    assert np.max(np.abs(real(jax.jit(fn.pow)(x, y)) / want - 1) / size) <= 2.0**-26
    table = [(0, 0, 1), (0, 2, 0), (0, -1, INF), (2, 10, 1024), (-2, 3, -8), (-2, 2, 4), (-2, -1, -0.5), (-2, 0.5, 0)]
    table += [(INF, 1, INF), (INF, 0, 1), (INF, -1, 0), (1, INF, 1), (2, -INF, 0), (0.5, INF, 0), (4, 0.5, 2)]
    x, y, want = np.array(table, np.float64).T
    np.testing.assert_allclose(real(jax.jit(fn.pow)(soft(x), soft(y))), want, rtol=2.0**-26)
    x = draw(rng, -8, 8)
    for n in (-7, -1, 0, 1, 2, 3, 10):
        np.testing.assert_allclose(real(fn.integer_pow(x, n)), real(x) ** n, rtol=10 * 2.0**-28)


def test_logaddexp():
    rng = np.random.default_rng(4)
    a, b = draw(rng, -3, 6), draw(rng, -3, 6)
    want = np.logaddexp(real(a), real(b))
    # The larger operand and the logarithm may cancel.
    size = np.maximum(np.abs(real(a)), np.abs(real(b))) + 1
    assert np.max(np.abs(real(jax.jit(fn.logaddexp)(a, b)) - want) / size) <= 2.0**-26
    ends = fn.logaddexp(soft([INF, -INF, 0, -INF]), soft([1, -INF, -INF, 3.0]))
    np.testing.assert_array_equal(real(ends), [INF, -INF, 0, 3])


def test_exponential_of_fractions_stays_normalized():
    """The polynomial of 2**f meets neither end of the mantissas' range: 0 and the largest fraction below 1."""
    x = np.array([0, 1 - 2.0**-30, 2.0**-30, -(2.0**-30), -(2.0**-40), 5 - 2.0**-27])
    np.testing.assert_allclose(real(fn.exp2(soft(x))), 2.0**x, rtol=2.0**-27)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_integers_only_and_the_same_bits(name):
    fun, _, exponents, _, _ = FUNCTIONS[name]
    x = sf.abs_(draw(np.random.default_rng(5), *exponents, (8, 3)))
    assert dtypes(fun, x) <= {"int32", "bool"}
    # Eagerly as a batch, compiled row by row.
    row = jax.jit(fun)
    rows = [real(row(x.map(lambda v, k=k: v[k : k + 1]))) for k in range(8)]
    np.testing.assert_array_equal(np.concatenate(rows), real(fun(x)))
