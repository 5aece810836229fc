"""The mean error of products goes into biases."""

import jax
import numpy as np
import pytest
from draws import normal
from jax import lax

import qcompiler as qc
from qcompiler.errors import CalibrationError, RecipeError
from qcompiler.ir.tracing import trace
from qcompiler.numerics.types import QuantType
from qcompiler.passes import _norm_means, correct_bias, observe
from qcompiler.passes.add_biases import add_biases
from qcompiler.passes.assign_precision import assign_precision
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.partition import partition
from qcompiler.passes.simplify import simplify

W3 = QuantType(3, symmetric=True, narrow_range=True)
METHODS = ("empirical", "analytic")


def _conv(x, w, groups=1):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


#: name -> (function, weights, samples): inputs of mean 1, so that errors of weights shift what comes out.
LAYERS = {
    "dot": (lambda p, x: x @ p["w"] + p["b"], {"w": normal(16, 6), "b": normal(6, seed=1)}, (256, 16)),
    "no_bias": (lambda p, x: x @ p["w"], {"w": normal(16, 6)}, (256, 16)),
    "weight_left": (lambda p, x: p["w"] @ x, {"w": normal(6, 16)}, (16, 256)),
    "conv": (lambda p, x: _conv(x, p["w"]) + p["b"], {"w": normal(3, 3, 4, 6), "b": normal(6, seed=1)}, (16, 6, 6, 4)),
    "depthwise": (lambda p, x: _conv(x, p["w"], 4), {"w": normal(3, 3, 1, 4)}, (16, 6, 6, 4)),
}


def _mean_error(model, fun, weights, x, axes):
    off = np.asarray(model(x), np.float64) - np.asarray(fun(weights, x), np.float64)
    return float(np.abs(off.mean(axis=axes)).max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_shift_of_the_mean_is_removed(layer, method):
    fun, weights, shape = LAYERS[layer]
    x = normal(*shape, seed=3, shift=1.0)
    axes = (1,) if layer == "weight_left" else tuple(range(len(shape) - 1))
    options = {"weight": W3, "activation_range": "minmax"}
    without, with_ = (
        _mean_error(
            qc.quantize(fun, [x], params=weights, recipe=qc.Recipe(**options, bias_correction=m)), fun, weights, x, axes
        )
        for m in (None, method)
    )
    # What is left is the rounding of the bias and of the int16 result, and with `analytic` the mean error of inputs.
    assert without > 0.05 and with_ < 0.05 * without, (without, with_)


def test_layers_that_clip_are_corrected_before_the_clip():
    weights = {"w": normal(16, 12), "b": normal(12, seed=1), "v": normal(12, 4, seed=2)}
    fun = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"]
    x = normal(256, 16, seed=3, shift=1.0)
    errors = [
        _mean_error(
            qc.quantize(fun, [x], params=weights, recipe=qc.Recipe(weight=W3, bias_correction=m)), fun, weights, x, (0,)
        )
        for m in (None, "empirical")
    ]
    # The last product corrects what is left of the first layer's error too.
    assert errors[1] < 0.05 * errors[0], errors


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_shifted_where_the_mean_is_right(passes, method):
    # Inputs come with both signs, so that the mean of every product is that of its bias, whatever the weights.
    half = normal(128, 16, seed=3)
    x = np.concatenate([half, -half])
    recipe = qc.Recipe(weight=W3, activation=QuantType(8, symmetric=True))
    found = passes(LAYERS["dot"][0], LAYERS["dot"][1], [x], recipe, until="insert_qdq")
    decision = correct_bias.decide(found["assign_precision"], found["insert_qdq"], [[x]], method)
    # Float32 sums of 256 rows of numbers of about 4; the bias itself is rounded to steps of less than 1e-2.
    assert np.abs(decision.shifts["dot_general#0"]).max() < (1e-2 if method == "empirical" else 1e-5)


def test_zeros_are_added_where_there_is_no_bias_and_nothing_changes():
    fun = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"] + p["b"]
    weights, x = {"w": normal(4, 4), "v": normal(4, 4, seed=1), "b": normal(4, seed=2)}, normal(8, 4)
    before = partition(simplify(trace(fun, weights, (jax.ShapeDtypeStruct(x.shape, x.dtype),))))
    after = add_biases(before)
    assert [e.params["roles"].count("bias") for e in before.eqns] == [0, 1]
    assert [e.params["roles"].count("bias") for e in after.eqns] == [1, 1]
    assert [e.params["id"] for e in before.eqns] == [e.params["id"] for e in after.eqns]
    np.testing.assert_array_equal(before.evaluate([x])[0], after.evaluate([x])[0])
    assert add_biases(after).text() == after.text().replace("after partition", "after add_biases")


def test_with_rounding_at_other_batch_sizes():
    weights = {"w": normal(16, 12), "v": normal(12, 4, seed=2)}
    fun = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
    x = normal(128, 16, seed=3, shift=1.0)
    recipe = qc.Recipe(weight=W3, rounding="gptq", bias_correction="empirical")
    model = qc.quantize(fun, [x[:64], x[64:]], params=weights, recipe=recipe)
    names = [r.name for r in model.report.passes]
    assert names.index("insert_qdq") < names.index("round_weights") < names.index("correct_bias") < names.index("fuse")
    np.testing.assert_array_equal(np.concatenate([model(x[k : k + 16]) for k in range(0, 64, 16)]), model(x[:64]))


def test_unknown_methods_are_refused():
    with pytest.raises(RecipeError, match="unknown bias_correction 'both'; known: 'analytic', 'empirical', or None"):
        qc.Recipe(bias_correction="both")


@pytest.mark.parametrize(
    "bounds", [(), (0.0,), (0.0, 6.0), (-1.0, 1.0), (-np.inf, 0.5)], ids=["none", "relu", "relu6", "hardtanh", "above"]
)
def test_the_mean_of_clipped_normals_is_that_of_many_draws(bounds):
    mean, deviation = normal(50, seed=1, scale=3.0), np.abs(normal(50, seed=2))
    drawn = np.random.default_rng(0).normal(mean, deviation, (200_000, 50))
    low, high = (*bounds, *(-np.inf, np.inf)[len(bounds) :])
    clipped = np.clip(drawn, low, high)
    # Five deviations of the mean of as many draws.
    atol = 5 * deviation.max() / np.sqrt(len(drawn))
    np.testing.assert_allclose(_norm_means.clipped_mean(mean, deviation, *bounds), clipped.mean(axis=0), atol=atol)


def test_the_mean_of_a_clipped_number_is_that_number_clipped():
    np.testing.assert_array_equal(_norm_means.clipped_mean([-1.0, 3.0, 9.0], np.zeros(3), 0.0, 6.0), [0.0, 3.0, 6.0])


def _inner(x, w):
    """A conv without padding, whose results have the same distribution everywhere."""
    return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _normed(p, x):
    """Two convs with inference norms and rectifiers, and a third."""
    norm = lambda y, n: (y - n["mean"]) * lax.rsqrt(n["var"] + 1e-5) * n["gamma"] + n["beta"]
    x = jax.nn.relu(norm(_inner(x, p["a"]), p["n"]))
    x = jax.nn.relu6(norm(_inner(x, p["b"]), p["m"]))
    return _inner(x, p["c"])


def _normed_weights(x):
    """Weights, with norms whose statistics are those of the samples."""
    p = {k: normal(3, 3, n, 8, seed=s, scale=0.3) for s, (k, n) in enumerate({"a": 4, "b": 8, "c": 8}.items())}
    statistics = lambda y: {"mean": np.asarray(y.mean((0, 1, 2))), "var": np.asarray(y.var((0, 1, 2)))}
    affine = lambda s: {"gamma": normal(8, seed=s, shift=2.0, scale=0.3), "beta": normal(8, seed=s + 1)}
    p["n"] = {**statistics(_inner(x, p["a"])), **affine(20)}
    first = lambda q: (_inner(x, q["a"]) - q["n"]["mean"]) * lax.rsqrt(q["n"]["var"] + 1e-5) * q["n"]["gamma"]
    p["m"] = {**statistics(_inner(jax.nn.relu(first(p) + p["n"]["beta"]), p["b"])), **affine(30)}
    return p


def test_norms_say_the_means_that_samples_have(passes):
    """Layers behind a norm are corrected without any sample, as they are by samples; the first one is left."""
    x = normal(64, 8, 8, 4, seed=3)
    weights = _normed_weights(x)
    found = passes(_normed, weights, [x], qc.Recipe(weight=W3), until="partition")
    found["partition"] = add_biases(found["partition"])
    program = observe.collect(observe.observe(found["partition"]), [(x,)])
    real = assign_precision(observe.without_observers(program), qc.Recipe(weight=W3))
    simulated = insert_qdq(real, qc.Recipe().estimator_for)
    first, *rest = (f"conv_general_dilated#{n}" for n in range(3))
    without = correct_bias.decide(real, simulated, [], "analytic")
    sampled = correct_bias.decide(real.note("norms", {}), simulated, [[x]], "analytic")
    assert list(without.shifts) == rest and list(without.left) == [first]
    for region in rest:
        size = np.abs(sampled.shifts[region]).max()
        # Sums of some 9 x 4 or 9 x 8 inputs are nearly normal, not quite.
        np.testing.assert_allclose(without.shifts[region], sampled.shifts[region], atol=0.1 * size)
        assert size > 0.05
    # With samples, the first layer has its shift too, from them.
    both = correct_bias.decide(real, simulated, [[x]], "analytic")
    np.testing.assert_array_equal(both.shifts[first], sampled.shifts[first])
    np.testing.assert_array_equal(both.shifts[rest[0]], without.shifts[rest[0]])
    with pytest.raises(CalibrationError, match="correct biases: no calibration samples"):
        correct_bias.decide(real.note("norms", {}), simulated, [], "analytic")
