"""What is isolated is compiled by itself: once, however many read it, and with the same integers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qcompiler.backends.lax_int import isolation

X = np.random.default_rng(0).integers(-1000, 1000, (8, 16)).astype(np.int32)


def _norm(values):
    """As a norm does: a statistic of rows meets its row, twice."""
    (x,) = values
    most = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    for k in range(1, 9):
        x = lax.bitwise_xor(x * np.int32(k), lax.shift_right_arithmetic(x + most, np.int32(k)))
    return [lax.rem(x, np.int32(1000)) - lax.shift_right_arithmetic(most, np.int32(1))]


def _chain(x, isolate=True):
    """Six of them, each with a residual."""
    for _ in range(6):
        result = jax.ShapeDtypeStruct(x.shape, x.dtype)
        (y,) = isolation.isolated(_norm, [x], [0], [result]) if isolate else _norm([x])
        x = x + y
    return x


def test_every_loop_stays_and_the_program_stays_small():
    text = jax.jit(_chain).lower(X).compile().as_text()
    assert len(re.findall(r"= \(.*\) while\(", text)) == 6
    one = jax.jit(lambda x: isolation.isolated(_norm, [x], [0], [jax.ShapeDtypeStruct(x.shape, x.dtype)])[0])
    count = lambda text: len(re.findall(r"^\s+(ROOT )?%?[\w.-]+ = ", text, re.MULTILINE))
    # Six times one, and the residuals: nothing is computed again by what reads it.
    assert count(text) <= 8 * count(one.lower(X).compile().as_text())


def test_the_same_integers():
    expected = np.asarray(_chain(X, isolate=False))
    np.testing.assert_array_equal(_chain(X), expected)
    np.testing.assert_array_equal(jax.jit(_chain)(X), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(_chain))(X[:, None])[:, 0], expected)
    np.testing.assert_array_equal(
        jax.vmap(_chain, in_axes=1)(X[None]), np.stack([_chain(X[None, k]) for k in range(8)])
    )


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_narrow_integers_at_their_ends(dtype):
    info = np.iinfo(dtype)
    x = np.array([info.min, -1, 0, info.max], dtype)
    run = lambda values: [lax.rev(values[0], (0,))]
    (got,) = jax.jit(lambda x: isolation.isolated(run, [x], [0], [jax.ShapeDtypeStruct(x.shape, x.dtype)]))(x)
    np.testing.assert_array_equal(got, x[::-1])


def test_what_has_no_integers_that_vary_is_run_as_it_is():
    empty = np.zeros((0, 3), np.int32)
    run = lambda values: [values[0] + values[0]]
    result = [jax.ShapeDtypeStruct(empty.shape, empty.dtype)]
    assert isolation.isolated(run, [jnp.asarray(empty)], [0], result)[0].shape == (0, 3)
    assert "while" not in str(jax.make_jaxpr(lambda x: isolation.isolated(run, [x], [], result))(X))
