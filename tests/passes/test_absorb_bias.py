"""What a channel never falls below moves into the next bias, where that changes nothing, and nowhere else."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax

import qcompiler as qc
from qcompiler.debug.report import sqnr_db
from qcompiler.ir.tracing import trace
from qcompiler.passes.absorb_bias import absorb_bias, decide
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.simplify import simplify
from qcompiler.samples import Samples

# Biases are rounded to float32 once more, and what was subtracted cancels: some 120 dB.
LEAST_DB = 100.0
# Far above what these weights make of inputs in N(0, 1): these channels are never near 0.
HIGH = np.array([40.0, 0.0, 30.0, -2.0, 0.5, 50.0, 0.0, 1.0], np.float32)
RELU = lambda p, x: jax.nn.relu(x @ p["first"] + p["b"]) @ p["second"]


def _weights(b=HIGH):
    return {
        "first": normal(6, 8),
        "b": b,
        "second": normal(8, 4, seed=1),
        "c": normal(4, seed=2),
        "k": normal(1, 1, 8, 3),
    }


def _program(fun, weights, x):
    return fold_norms(simplify(trace(fun, weights, (jax.ShapeDtypeStruct(x.shape, x.dtype),))))


def _absorb(fun, weights, x):
    before = _program(fun, weights, x)
    decision = decide(before, Samples(([x],)))
    after = absorb_bias(before, decision)
    assert sqnr_db(before.evaluate([x]), after.evaluate([x])) >= LEAST_DB
    return before, after, decision


@pytest.mark.parametrize(
    "fun",
    [
        RELU,
        lambda p, x: RELU(p, x) + p["c"],
        lambda p, x: jnp.minimum(jax.nn.relu(x @ p["first"] + p["b"]), 45.0) @ p["second"],
        lambda p, x: (2.5 * jax.nn.relu(x @ p["first"] + p["b"])) @ p["second"] + p["c"],
        lambda p, x: jax.nn.relu(x @ p["first"] + p["b"]).mean(axis=0, keepdims=True) @ p["second"],
        lambda p, x: (y := jax.nn.relu(x @ p["first"] + p["b"])) @ p["second"] + jnp.tanh(y @ p["second"][::-1]),
        lambda p, x: lax.conv_general_dilated(
            jax.nn.relu(x @ p["first"] + p["b"])[:, None, None], p["k"], (1, 1), "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ),
    ],
    ids=["relu", "bias_behind", "bound", "scaled", "mean", "two_readers", "reshaped"],
)  # fmt: skip
def test_high_biases_are_absorbed_without_a_change(fun):
    weights, x = _weights(), normal(64, 6)
    before, after, decision = _absorb(fun, weights, x)
    ((key, shift),) = decision.items()
    value = x @ weights["first"] + HIGH
    expected = np.minimum(np.maximum(value.mean(axis=0) - 3 * value.std(axis=0), 0), np.maximum(value.min(axis=0), 0))
    # Means and deviations are computed in float32.
    np.testing.assert_allclose(np.ravel(shift), np.where(expected > 1, expected, 0), rtol=1e-4)
    assert after.notes["absorbed"][key] == {"channels": 3, "largest_shift": pytest.approx(np.max(shift))}
    name = next(n for n in before.weights if np.array_equal(np.ravel(before.weights[n]), HIGH))
    np.testing.assert_allclose(np.ravel(after.weights[name]), HIGH - np.ravel(shift), rtol=1e-6)


def _padded(p, x):
    y = jax.nn.relu(x @ p["first"] + p["b"]).reshape(1, 8, 8, 8)
    return lax.conv_general_dilated(y, normal(3, 3, 8, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    "fun",
    [
        _padded,
        lambda p, x: (y := jax.nn.relu(x @ p["first"] + p["b"])) @ p["second"] + y.sum(),
        lambda p, x: (jax.nn.relu(x @ p["first"] + p["b"]), RELU(p, x)),
        lambda p, x: jnp.tanh(x @ p["first"] + p["b"]) @ p["second"],
        lambda p, x: jnp.maximum(x @ p["first"] + p["b"], 1.0) @ p["second"],
        lambda p, x: jax.nn.relu(-(x @ p["first"] + p["b"])) @ p["second"],
        lambda p, x: jax.nn.relu(-2.0 * (x @ p["first"] + p["b"])) @ p["second"],
        lambda p, x: jax.nn.relu(jnp.minimum(x @ p["first"] + p["b"], 0.25)) @ p["second"],
    ],
    ids=["padded", "read_elsewhere", "result", "tanh", "max_one", "negated", "turned", "below_its_bound"],
)
def test_nothing_is_absorbed_where_the_shift_would_show(fun):
    before, after, decision = _absorb(fun, _weights(), normal(64, 6))
    assert decision == {} and after.weights.keys() == before.weights.keys()
    assert all(np.array_equal(w, after.weights[name]) for name, w in before.weights.items())


def test_biases_that_are_not_high_stay():
    _, _, decision = _absorb(RELU, _weights(normal(8)), normal(64, 6))
    assert decision == {}


def test_the_norm_says_how_far_a_channel_reaches():
    """Few samples underestimate it: beta - 3 gamma is less than what they show, and goes into the note."""
    gamma, beta = np.full(8, 2.0, np.float32), HIGH
    weights = {**_weights(), "mean": normal(8), "var": normal(8) ** 2 + 1, "gamma": gamma, "beta": beta}

    def fun(p, x):
        y = (x @ p["first"] - p["mean"]) * lax.rsqrt(p["var"]) * p["gamma"] + p["beta"]
        return jax.nn.relu(y) @ p["second"]

    before, after, decision = _absorb(fun, weights, 0.1 * normal(4, 6))
    ((key, shift),) = decision.items()
    np.testing.assert_allclose(np.ravel(shift)[[0, 2, 5]], (beta - 3 * gamma)[[0, 2, 5]], rtol=1e-5)
    mean = np.ravel(before.notes["norms"][key]["mean"]) - np.ravel(shift)
    np.testing.assert_allclose(np.ravel(after.notes["norms"][key]["mean"]), mean, rtol=1e-6)


def test_a_decision_holds_at_another_batch_size():
    weights, x = _weights(), normal(64, 6)
    _, _, decision = _absorb(RELU, weights, x)
    other = _program(RELU, weights, x[:5])
    after = absorb_bias(other, decision)
    assert sqnr_db(other.evaluate([x[:5]]), after.evaluate([x[:5]])) >= LEAST_DB and after.notes["absorbed"]


def test_without_samples_nothing_is_decided():
    assert decide(_program(RELU, _weights(), normal(64, 6)), Samples()) == {}


def _integer_sqnr(weights, equalize):
    x = normal(256, 6, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = qc.quantize(RELU, [x], params=weights, recipe=qc.Recipe(granularity="tensor", equalize=equalize))
    assert model.report.islands == () and model.report.qdq_pairs_after == 0
    # A row alone: the passes run again at its size.
    np.testing.assert_array_equal(np.asarray(model(x[:1])), np.asarray(model(x))[:1])
    exact = RELU(weights, x)
    return sqnr_db([exact - exact.mean(axis=0)], [model(x) - exact.mean(axis=0)])


def test_absorbing_helps_the_channels_beside_a_high_one():
    """One channel around 400 and the others around 0 share a scale; the noise counts against what varies."""
    weights = _weights(np.array([400, 0, 0, 0, 0, 0, 0, 0], np.float32))
    # Equalization alone changes little here; see the ranges of normal draws in test_equalize.
    without, with_ = (_integer_sqnr(weights, e) for e in (False, True))
    assert with_ >= without + 15, (without, with_)
