"""Observers stand on what will be stored, see it as it is, and name what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from islands import solved

from qcompiler import ops
from qcompiler.errors import CalibrationError
from qcompiler.passes import observe as observers

WEIGHTS = {"w": normal(8, 8), "v": normal(8, 8, seed=1), "b": normal(8, seed=2)}
X = normal(16, 8, seed=3)


def _marks(program):
    return [e.params["id"] for e in program.eqns if e.primitive is ops.observe_p]


def _fun(p, x):
    y = jax.nn.relu(x @ p["w"] + p["b"])
    z = solved(y.T.reshape(8, 4, 4))
    return jnp.tanh(y @ p["v"]), z * 2.0


def test_what_is_stored_is_marked(passes):
    found = passes(_fun, WEIGHTS, [X], until="observe")
    marks = _marks(found["observe"])
    # The transposed view has its operand's range; what only the island reads is its own business.
    assert sorted(marks) == ["dot_general#0", "dot_general#1", "input:arg0", "mul#0", "tanh#0", "triangular_solve#0"]
    for a, b in zip(found["partition"].evaluate([X]), found["observe"].evaluate([X]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_an_input_that_only_an_island_reads_is_not_marked(passes):
    program = passes(lambda p, x: solved(x) @ p["w"], WEIGHTS, [X], until="partition")["partition"]
    assert "input:arg0" not in _marks(observers.observe(program))


def test_removing_the_marks_gives_the_program_back(passes):
    found = passes(_fun, WEIGHTS, [X], until="observe")
    bare = observers.without_observers(found["observe"])
    assert bare.text().partition("\n")[2] == found["partition"].text().partition("\n")[2]
    assert bare.stats == found["observe"].stats and list(bare.ids.values()) == list(found["partition"].ids.values())


def test_statistics_are_those_of_the_values(passes):
    batches = [normal(16, 8, seed=s) * np.float32(s + 1) for s in range(3)]
    program = passes(_fun, WEIGHTS, batches, until="observe")["observe"]
    assert set(program.stats) == set(_marks(program))
    x = np.concatenate(batches)
    y = np.maximum(x @ WEIGHTS["w"] + WEIGHTS["b"], 0)
    for key, expected in (("input:arg0", x), ("dot_general#0", y), ("dot_general#1", y @ WEIGHTS["v"])):
        stats = program.stats[key]
        assert stats.count == expected.size
        # Compiled products may sum in another order.
        np.testing.assert_allclose((stats.min, stats.max), (expected.min(), expected.max()), rtol=1e-5, atol=1e-6)


def test_the_reader_keeps_program_order(passes):
    program = passes(_fun, WEIGHTS, [X], until="observe")["observe"]
    read = observers.reader(program)([X])
    assert list(read) == _marks(program) != sorted(read)
    np.testing.assert_array_equal(read["input:arg0"], X)


@pytest.mark.parametrize(("value", "bad"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_the_first_value_that_is_not_finite_is_named(passes, value, bad):
    def fun(p, x):
        with jax.named_scope("zeta"):
            y = jnp.where(x > 100.0, np.float32(value), x)
        with jax.named_scope("alpha"):
            return y @ p["v"]

    program = passes(fun, WEIGHTS, [X], until="observe")["observe"]
    spoiled = X.copy()
    spoiled[3, 0] = 1000.0
    message = rf"calibration batch 1 gives {bad} in zeta/select_n#0 \(.*test_observe\.py:\d+.*\): remove such samples"
    with pytest.raises(CalibrationError, match=message):
        observers.collect(program, [[X], [spoiled]])


def test_ids_of_tables_and_islands_of_one_primitive_are_apart(passes):
    """silu ends in a mul, and the gate is a mul: each has a range of its own."""
    fun = lambda p, x: (100.0 * jax.nn.silu(x @ p["w"]) + 0.5 * (x @ p["v"]), jax.nn.silu(x) * (x @ p["w"]) @ p["v"])
    program = passes(fun, WEIGHTS, [X], until="observe")["observe"]
    marks = _marks(program)
    assert len(set(marks)) == len(marks) and set(program.stats) == set(marks)
