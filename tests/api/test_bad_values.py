"""Numbers that cannot be quantized are refused by name; numbers that are merely odd come out right."""

import bad_input
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from bad_input import PARAMS, X, at, mlp, normal, quantize, refused, with_value
from flax import linen, nnx

import qcompiler as qc
from qcompiler.debug.report import sqnr_db


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
    return jax.lax.igamma(zero, jnp.flip(zero))


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


# Channels and tensors without a range

# Gaussian data in 8 bits keeps about 40 dB through two layers; a channel or a scale that is wrong costs far more.
LEAST_DB = 33.0


def quantized_well(model, batches, least=LEAST_DB, **options):
    """The quantized model, all integers, which agrees with float on the last batch."""
    qmodel = qc.quantize(model, batches, strict=True, **options)
    x = batches[-1]
    assert sqnr_db([qmodel.float(x)], [qmodel(x)]) >= least
    return qmodel


def changed(name, index, value):
    array = PARAMS[name].copy()
    array[index] = value
    return {**PARAMS, name: array}


@pytest.mark.parametrize(
    "params",
    [
        changed("w", (slice(None), 3), 0.0),
        changed("w", (slice(None), 3), 0.7),
        changed("w", 3, 0.0),
        changed("w", (slice(None), 3), 1e-30),
        changed("w", (slice(None), 3), 1e-40),
        changed("w", (...,), 0.0),
        changed("v", (slice(None), slice(1, None)), 0.0),
        {**changed("w", (slice(None), 3), 0.0), "b": np.full(16, -5.0, np.float32)},
    ],
    ids=["dead_out", "constant_out", "dead_in", "tiny_out", "denormal_out", "all_dead", "one_left", "dead_bias"],
)
def test_weight_channels_without_a_range(params):
    x = X if np.any(params["b"] > 0) else 4 * X
    quantized_well(mlp, [x], params=params)


def test_weights_that_are_all_zero():
    params = {**PARAMS, "w": 0 * PARAMS["w"], "b": 0 * PARAMS["b"]}
    np.testing.assert_array_equal(quantize(params=params, strict=True)(X), np.zeros((5, 4), np.float32))


def test_constant_inputs_and_input_channels():
    channel = X.copy()
    channel[:, 2] = 7.0
    for x in (np.full_like(X, 3.0), np.full_like(X, -1e6), channel):
        quantized_well(mlp, [x], params=PARAMS)


class NnxNormed(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(self.norm(self.conv(x)))


class LinenNormed(linen.Module):
    @linen.compact
    def __call__(self, x):
        return jax.nn.relu(
            linen.BatchNorm(use_running_average=True, name="norm")(linen.Conv(8, (3, 3), name="conv")(x))
        )


IMAGES = normal(2, 6, 6, 3, seed=5)


def dead_norm():
    """A norm with a channel whose kernel is zero, one whose gamma is, and one that never varied in training."""
    kernel, gamma, variance = normal(3, 3, 3, 8, seed=6), np.ones(8, np.float32), np.ones(8, np.float32)
    kernel[..., 0] = 0.0
    gamma[1] = 0.0
    kernel[..., 2], variance[2] = 0.0, 0.0
    return kernel, gamma, variance, normal(8, seed=7)


def only_bias_left(qmodel, beta):
    """The three dead channels give their bias, to half a step of the output (which is symmetric, int16)."""
    dead = np.asarray(qmodel(IMAGES))[..., :3]
    step = float(qmodel.output_encodings[0].scale)
    np.testing.assert_allclose(dead, np.broadcast_to(np.maximum(beta[:3], 0), dead.shape), rtol=0, atol=0.51 * step)


def test_dead_channels_behind_a_norm_nnx():
    model = NnxNormed(nnx.Rngs(0))
    values = dead_norm()
    pairs = zip((model.conv.kernel, model.norm.scale, model.norm.var, model.norm.bias), values, strict=True)
    for variable, value in pairs:
        variable[...] = jnp.asarray(value)
    only_bias_left(quantized_well(model, [IMAGES]), values[-1])


def test_dead_channels_behind_a_norm_linen():
    kernel, gamma, variance, beta = dead_norm()
    variables = {
        "params": {"conv": {"kernel": kernel, "bias": 0 * beta}, "norm": {"scale": gamma, "bias": beta}},
        "batch_stats": {"norm": {"mean": 0 * beta, "var": variance}},
    }
    only_bias_left(quantized_well(LinenNormed(), [IMAGES], variables=variables), beta)


def test_an_input_of_nothing_but_zeros_is_told():
    with pytest.warns(UserWarning, match="nothing but zeros in input x, so its range is unknown") as caught:
        qmodel = quantize(batches=[0 * X, 0 * X])
    assert len(caught) == 1 and caught[0].filename == bad_input.__file__, "the caller's line"
    assert sqnr_db([qmodel.float(0 * X)], [qmodel(0 * X)]) >= LEAST_DB


# Ranges at the ends of float32


def product(params, x):
    with jax.named_scope("layer"):
        return x @ params["w"]  # product


def weight_times(factor):
    return {"w": PARAMS["w"] * np.float32(factor)}


@pytest.mark.parametrize("exponent", [-84, -61, -30, 30, 57])
@pytest.mark.parametrize("what", ["input", "weight"])
def test_powers_of_two_change_no_code(what, exponent):
    factor = np.float32(2.0**exponent)
    plain = quantize(product)(X)
    if what == "input":
        scaled = quantize(product, [X * factor])(X * factor)
    else:
        scaled = quantize(product, params=weight_times(factor))(X)
    np.testing.assert_array_equal(scaled, plain * factor)
    assert np.any(scaled)


def test_tiny_values_that_grow_again():
    tiny = np.float32(2.0**-80)
    fun = lambda params, x: jnp.sin((x * tiny) @ params["w"]) @ (params["v"] * np.float32(2.0**55))
    quantized_well(fun, [X], params=PARAMS)


def tiny_table(params, x):
    return jnp.tanh(x) * np.float32(2.0**-100)  # table


def tiny_square(params, x):
    h = (x @ params["w"]) * np.float32(2.0**-70)
    with jax.named_scope("layer"):
        return h @ h.T  # square


@pytest.mark.parametrize(
    ("fun", "batch", "params", "error", "parts"),
    [
        (product, X * np.float32(2.0**-110), PARAMS, qc.CalibrationError, ("input:x", "too narrow", "rescale")),
        (product, X * np.float32(2.0**70), PARAMS, qc.CalibrationError, ("input:x", "too wide", "rescale")),
        (
            product,
            X,
            {"w": PARAMS["w"] * np.float32(2.0**-110)},
            qc.QuantizationError,
            ("layer", "too narrow", "qc.Rule"),
        ),
        (product, X, {"w": PARAMS["w"] * np.float32(2.0**70)}, qc.QuantizationError, ("layer", "too wide", "qc.Rule")),
        (
            product,
            X * np.float32(2.0**-80),
            weight_times(2.0**-60),
            qc.QuantizationError,
            ("layer/dot_general#0", "scales of its operands", "qc.Rule"),
        ),
        (tiny_square, X, PARAMS, qc.QuantizationError, ("layer/dot_general#0", "scales of its operands", "qc.Rule")),
        (tiny_table, X, PARAMS, qc.CalibrationError, ("mul#0", "too narrow", "rescale")),
    ],
    ids=[
        "narrow_input",
        "wide_input",
        "narrow_weight",
        "wide_weight",
        "narrow_product",
        "narrow_square",
        "narrow_table",
    ],
)
def test_ranges_without_a_float32_scale(fun, batch, params, error, parts):
    with refused(error, *parts):
        quantize(fun, [batch], params=params)


def test_denormal_numbers_are_the_zeros_that_float_makes_of_them():
    x = X * np.float32(2.0**-140)
    qmodel = quantize(product, [x])
    np.testing.assert_array_equal(qmodel(x), np.zeros((5, 16), np.float32))
    assert np.abs(qmodel.float(x)).max() < 2.0**-126


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
