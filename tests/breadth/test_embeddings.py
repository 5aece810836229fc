"""Rows of a table are gathered as int8 codes, each row with a scale of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qcompiler.backends.lax_int.lower import lower
from qcompiler.debug import fuzz

RNG = np.random.default_rng(0)
#: Rows of scales that differ a hundredfold: one scale for all would lose the small ones.
TABLE = (RNG.normal(size=(10, 8)) * np.geomspace(0.05, 5, 10)[:, None]).astype(np.float32)
INDEX = np.array([[0, 3, 9], [9, 1, 4]], np.int32)


def _rows(fun, index):
    """(integers as reals, float) of a function of a table and indices; the table is stored in int8.

    Calibrated on rows that exist.
    """
    stages = fuzz.compile_stages(fun, TABLE, [INDEX])
    assert not stages.folded.notes["islands"]
    tables = [w for w in stages.folded.weights.values() if w.shape == TABLE.shape]
    assert [w.dtype for w in tables] == [np.int8]
    got = np.asarray(lower(stages.folded)(index)[0])
    return got, np.asarray(fun(TABLE, jnp.asarray(index)))


def _near(got, exact):
    """Half a step of a row's 127, and one of the stored result's 32767 / 1.9."""
    step = np.max(np.abs(exact), axis=-1, keepdims=True) / 127
    assert np.all(np.abs(got - exact) <= 0.51 * step + 1.9 * np.max(np.abs(exact)) / 32767)


@pytest.mark.parametrize(
    "fun",
    [
        lambda table, i: jnp.asarray(table)[i],
        lambda table, i: jnp.take(jnp.asarray(table), i, axis=0),
        lambda table, i: jnp.take(jnp.asarray(table), i, axis=0, mode="clip"),
    ],
    ids="index take clip".split(),
)
def test_rows(fun):
    _near(*_rows(fun, INDEX))


def test_negative_indices_count_from_the_end():
    got, exact = _rows(lambda table, i: jnp.asarray(table)[i], INDEX - 10)
    np.testing.assert_array_equal(exact, TABLE[INDEX])
    _near(got, exact)


def test_what_is_out_of_bounds_is_zero():
    fun = lambda table, i: jnp.take(jnp.asarray(table), i, axis=0, mode="fill", fill_value=0.0)
    got, exact = _rows(fun, np.array([[2, 10, 9], [-11, 1, 99]], np.int32))
    assert np.all(got[0, 1] == 0) and np.all(got[1, [0, 2]] == 0)
    _near(got, exact)


def test_a_table_that_is_the_head_too():
    """Rows and output channels are the same axis of it: it is stored once."""

    def fun(table, i):
        return lax.dot_general(jax.nn.relu(table[i]), table, (((2,), (1,)), ((), ())))

    stages = fuzz.compile_stages(fun, TABLE, [INDEX])
    stored = [w for w in stages.folded.weights.values() if w.dtype == np.int8]
    assert len(stored) == 1 and stored[0].size == TABLE.size
