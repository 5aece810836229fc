"""Numbers that cannot be quantized are refused by name; numbers that are merely odd come out right."""

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from bad_input import PARAMS, X, at, mlp, normal, quantize, refused, with_value
from flax import linen, nnx

import qcompiler as qc


@pytest.fixture(scope="module")
def qmlp():
    return quantize()


# NaN and infinity


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
@pytest.mark.parametrize("number", [0, 1])
def test_bad_values_in_calibration_data(value, name, number):
    batches = [X] * number + [with_value(X, value)]
    with refused(qc.CalibrationError, f"calibration batch {number}", "input x", name, "remove such samples"):
        quantize(batches=batches)


def test_bad_values_in_one_leaf_of_a_batch():
    batch = {"image": X, "mask": with_value(X, np.nan)}
    with refused(qc.CalibrationError, "input batch['mask'] holds NaN"):
        quantize(lambda params, batch: mlp(params, batch["image"] * batch["mask"]), [qc.call(batch)])


def log_inside(params, x):
    with jax.named_scope("z_logs"):
        h = jnp.log(x @ params["w"])  # the logarithm
    with jax.named_scope("after"):
        return h @ params["v"]  # after it


def test_nan_made_inside_names_the_layer_that_makes_it():
    with refused(qc.CalibrationError, "batch 0", "NaN", "z_logs/log#0", at("the logarithm"), "mend the layer"):
        quantize(log_inside)


def test_infinity_made_inside_by_a_later_batch():
    params = {"w": np.abs(PARAMS["w"]), "v": PARAMS["v"]}
    batches = [np.abs(X), np.abs(X), np.zeros_like(X)]
    with refused(qc.CalibrationError, "batch 2", "infinity", "z_logs/log#0", at("the logarithm")):
        quantize(log_inside, batches, params=params)


def nan_in_island(params, x):
    zero = mlp(params, x) * 0.0
    return zero / jnp.sort(zero)


@pytest.mark.parametrize("verify", ["probe", "types", "off"])
def test_nan_that_only_islands_see(verify):
    with refused(qc.CalibrationError, "batch 0", "NaN", "result"):
        quantize(nan_in_island, verify=verify)


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_bad_weights_of_a_function(value, name):
    with refused(qc.TraceError, "weight enc/0/w", name):
        params = {"enc": [{"w": with_value(PARAMS["w"], value)}]}
        quantize(lambda params, x: x @ params["enc"][0]["w"], params=params)


def test_bad_weights_of_modules():
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    model.layers[0].bias[...] = model.layers[0].bias.at[1].set(jnp.nan)
    with refused(qc.TraceError, "weight layers/0/bias", "NaN"):
        qc.quantize(model, [X])
    variables = linen.Dense(4).init(jax.random.key(0), X)
    variables["params"]["kernel"] *= jnp.inf
    with refused(qc.TraceError, "weight params/kernel"):
        qc.quantize(linen.Dense(4), [X], variables=variables)


BAD_WEIGHT = jnp.asarray(with_value(PARAMS["w"], np.nan))


def closes_over_nan(x):
    with jax.named_scope("layer"):
        return x @ BAD_WEIGHT  # reads NaN


def test_bad_weights_closed_over():
    with refused(qc.TraceError, "NaN", "layer", at("reads NaN")):
        quantize(closes_over_nan, params=None)


def computes_nan(params, x):
    return x @ jnp.log(params["w"] - 100)  # log of weights


def test_nan_computed_from_weights():
    with refused(qc.CalibrationError, "NaN", at("log of weights")):
        quantize(computes_nan)


def test_nan_at_run_time_is_the_number_zero(qmlp):
    # Documented in `numerics.fixed_point.quantize`: an input that is NaN is taken as 0.
    np.testing.assert_array_equal(qmlp(with_value(X, np.nan)), qmlp(with_value(X, 0)))


# Overflow


def tiny_product(params, x):
    with jax.named_scope("layer"):
        return x @ (params["w"] * 1e-9) + params["b"]  # tiny


def huge_bias(params, x):
    with jax.named_scope("layer"):
        return x @ params["w"] + params["b"] * 1e9  # huge


@pytest.mark.parametrize(("fun", "mark"), [(tiny_product, "tiny"), (huge_bias, "huge")])
def test_a_bias_that_does_not_fit_int32(fun, mark):
    with refused(qc.OverflowProofError, "bias", "layer/dot_general#0", at(mark), "int32", "rescale", "qc.Rule"):
        quantize(fun)


def huge_weight(params, x):
    with jax.named_scope("layer"):
        return x @ (params["w"] * 1e30)  # wide


def test_weights_beyond_float32_scales():
    with refused(qc.QuantizationError, "layer", at("wide"), "float32"):
        quantize(huge_weight)


DEEP = 2**17 + 8


def deep_dot(a, b):
    with jax.named_scope("layer"):
        return a @ b  # deep dot


def deep_sum(a):
    with jax.named_scope("layer"):
        return jnp.sum(a, axis=-1)  # deep sum


@pytest.mark.parametrize(
    ("fun", "shapes", "name"),
    [(deep_dot, [(1, DEEP), (DEEP, 1)], "dot_general"), (deep_sum, [(1, DEEP)], "reduce_sum")],
)
def test_an_accumulator_that_could_overflow(fun, shapes, name):
    batch = qc.call(*(normal(*shape) for shape in shapes))
    parts = (name, f"layer/{name}#0", at(fun.__name__.replace("_", " ")), "int32 accumulator", "fewer", "qc.Rule")
    with refused(qc.OverflowProofError, *parts):
        qc.quantize(fun, [batch])
