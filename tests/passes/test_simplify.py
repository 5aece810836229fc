"""Corners of simplify; what it does in general is in tests/ir/test_replay.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qcompiler.ir import _compat
from qcompiler.ir.tracing import trace
from qcompiler.passes.simplify import simplify

X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
WEIGHTS = {"s": np.abs(X[0]) + np.float32(0.5), "m": X[1] > 0}


def _simplify(fun, *inputs, exact=True):
    before = trace(fun, WEIGHTS, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs))
    after = simplify(before)
    _compat.check_types(after.jaxpr)
    for a, b in zip(before.evaluate(inputs), after.evaluate(inputs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and (a.tobytes() == b.tobytes() or not exact)
        # XLA divides by a repeated constant through its reciprocal: one more rounding, 2**-24.
        np.testing.assert_allclose(a, b, rtol=2.5e-7)
    batched = jax.vmap(lambda *xs: after(*xs))(*(np.stack([x, x]) for x in inputs))
    for a, b in zip(before.evaluate(inputs), batched, strict=True):
        np.testing.assert_allclose(np.asarray(b)[1], np.asarray(a), rtol=1e-6)
    return after


def _spread(w):
    return jnp.broadcast_to(w, X.shape)


@pytest.mark.parametrize("operand", [lambda p: jnp.full(X.shape, 1.5, jnp.float32), lambda p: _spread(p["s"])])
@pytest.mark.parametrize("name", "add sub mul div max min pow atan2 rem nextafter eq ne lt le gt ge".split())
def test_constant_operands_on_either_side(name, operand):
    fun = getattr(lax, name)
    _simplify(
        lambda p, x: (fun(jnp.abs(x) + 0.1, operand(p)), fun(operand(p), jnp.abs(x) + 0.1)), X, exact=name != "div"
    )


def test_clamps_of_a_constant_by_values():
    def fun(p, x):
        number, row = jnp.full(X.shape, 0.5, jnp.float32), _spread(p["s"])
        return (
            lax.clamp(x, number, x + 1.0),
            lax.clamp(x, row, x + 1.0),
            lax.clamp(number, x, row),
            lax.clamp(0.0, x, 1.0),
        )

    _simplify(fun, X)


def test_selects_by_and_of_constants():
    def fun(p, x):
        mask = _spread(p["m"])
        return jnp.where(mask, x, 0.0), jnp.where(x > 0, _spread(p["s"]), 1.0), jnp.where(mask, 1.0, x)

    _simplify(fun, X)


@pytest.mark.parametrize(
    ("fun", "left"),
    [
        (lambda p, x: x * 1.0, []),
        (lambda p, x: 1.0 * x / 1.0, []),
        (lambda p, x: jnp.maximum(x, -jnp.inf), []),
        (lambda p, x: jnp.minimum(x, jnp.inf), []),
        (lambda p, x: x.reshape(4, 8).astype(jnp.float32).transpose(0, 1), []),
        (lambda p, x: 1.0 / x, ["div"]),
        (lambda p, x: x + 0.0, ["add"]),
        (lambda p, x: x - 0.0, ["sub"]),
        (lambda p, x: x * 0.0, ["mul"]),
    ],
)
def test_what_does_nothing_goes_and_nothing_else(fun, left):
    """-0.0 + 0.0 is 0.0, and NaN * 0.0 is NaN: those stay."""
    x = X.copy()
    x[0, :4] = [-0.0, np.nan, np.inf, -np.inf]
    before = trace(fun, {}, (jax.ShapeDtypeStruct(x.shape, x.dtype),))
    after = simplify(before)
    assert [e.primitive.name for e in after.eqns] == left
    np.testing.assert_array_equal(np.asarray(before.evaluate([x])[0]), np.asarray(after.evaluate([x])[0]))


def test_integers_have_no_neutral_float():
    i = np.arange(6, dtype=np.int32)
    after = _simplify(lambda p, i: (i * 1, jnp.maximum(i, np.iinfo(np.int32).min)), i)
    assert [e.primitive.name for e in after.eqns] in ([], ["max"])


def test_constants_that_spread_out_the_other_operand_keep_their_shape():
    """`mul f32[4,1,8] f32[1,2,1]`: neither the number nor the repeats go, for the result has their size."""
    ones = np.ones((1, 2, 1), np.float32)
    after = _simplify(lambda p, x: (lax.mul(x[:, None], ones), lax.add(x[:, None], ones * np.float32(3))), X)
    assert [v.aval.shape for v in after.outvars] == [(4, 2, 8)] * 2
