"""Inputs and weights of other dtypes than float32, and weights that share memory: right, or refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_input import PARAMS, X, mlp, normal, quantize, refused
from flax import linen, nnx

import qcompiler as qc
from qcompiler.debug.report import sqnr_db

# int8 operands leave about 40 dB of what two layers make of Gaussian data.
LEAST_DB = 33.0
INDICES = np.random.default_rng(0).integers(0, 8, (5, 3))
HALVES = [jnp.bfloat16, jnp.float16]


def agreement(qmodel, *inputs):
    leaves = [jax.tree_util.tree_leaves(f(*inputs)) for f in (qmodel.float, qmodel)]
    for reference, value in zip(*leaves, strict=True):
        assert reference.dtype == value.dtype and reference.shape == value.shape
    return sqnr_db(*leaves)


# Integers and booleans


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_integer_inputs_as_indices(dtype):
    fun = lambda params, i: jnp.sum(params["w"][i.astype(np.int32)], axis=1) @ params["v"]
    qmodel = quantize(fun, [INDICES.astype(dtype)], strict=True)
    assert agreement(qmodel, INDICES.astype(dtype)) >= LEAST_DB


def test_programs_of_integers_alone_stay_exact():
    fun = lambda weights, i, flag: (i @ weights + 1, jnp.where(flag, i, -i), jnp.logical_not(flag))
    weights, inputs = INDICES.T.astype(np.int32), (INDICES.astype(np.int32), INDICES > 3)
    qmodel = quantize(fun, [inputs], params=weights, strict=True)
    for result, expected in zip(qmodel(*inputs), fun(weights, *inputs), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_float64_inputs_are_taken_as_jax_takes_them():
    qmodel = quantize(batches=[X.astype(np.float64)], strict=True)
    np.testing.assert_array_equal(qmodel(X.astype(np.float64)), quantize()(X))


@pytest.mark.parametrize("dtype", [np.int8, np.bool_, jnp.int4, jnp.float8_e4m3fn], ids=lambda d: np.dtype(d).name)
def test_weights_of_narrow_dtypes_that_the_model_widens(dtype):
    weight = jnp.asarray(np.clip(4 * PARAMS["w"], -7, 7), dtype)
    qmodel = quantize(lambda w, x: x @ w.astype(np.float32), params=weight, strict=True)
    assert agreement(qmodel, X) >= LEAST_DB


def test_complex_inputs_are_an_island_and_exact():
    z = (X + 1j * X[::-1]).astype(np.complex64)
    with pytest.warns(UserWarning, match=r"leaves 1 operations in float \(abs"):
        qmodel = quantize(lambda z: jnp.abs(z), [z], params=None)
    # As exact as a float32 absolute value.
    assert agreement(qmodel, z) >= 120
    with refused(qc.IslandError, "abs"):
        quantize(lambda z: jnp.abs(z), [z], params=None, strict=True)


# Half precision


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("what", ["both", "inputs", "weights"])
def test_half_precision(dtype, what):
    params = PARAMS if what == "inputs" else jax.tree.map(lambda w: jnp.asarray(w, dtype), PARAMS)
    x = X if what == "weights" else np.asarray(X, dtype)
    if what == "both":
        fun = mlp
    else:
        fun = lambda p, x: mlp(p, x.astype(np.float32 if what == "inputs" else dtype))
    qmodel = quantize(fun, [x], params=params, strict=True)
    assert agreement(qmodel, x) >= LEAST_DB
    assert qmodel(x).dtype == (np.float32 if what == "inputs" else dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_modules(dtype):
    x = np.asarray(X, dtype)
    model = nnx.Linear(8, 16, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    assert agreement(qc.quantize(model, [x], strict=True), x) >= LEAST_DB
    module = linen.Dense(16, dtype=dtype, param_dtype=dtype)
    variables = module.init(jax.random.key(0), x)
    assert agreement(qc.quantize(module, [x], variables=variables, strict=True), x) >= LEAST_DB


def test_half_precision_that_overflows_names_the_layer():
    params = jax.tree.map(lambda w: jnp.asarray(10 * w, jnp.float16), PARAMS)
    with refused(qc.CalibrationError, "batch 0", "infinity", "second/dot_general#0", "mend the layer"):
        quantize(batches=[np.asarray(100 * X, np.float16)], params=params)


# Weights that share memory

W = normal(8, 8, seed=6)


@pytest.mark.parametrize("recipe", ["default", "per_tensor"])
@pytest.mark.parametrize(
    "params",
    [{"a": W, "b": W}, {"a": W, "b": W.T}, {"a": W, "b": W[::-1]}, {"a": W[:, ::-1], "b": W}],
    ids=["same", "transposed", "reversed", "strided"],
)
def test_views_of_one_array(params, recipe):
    """Equalization rescales weights: those of one must not move the other."""
    apart = {name: w.copy() for name, w in params.items()}
    fun = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    qmodel = quantize(fun, params=params, recipe=recipe, strict=True)
    assert agreement(qmodel, X) >= LEAST_DB
    np.testing.assert_array_equal(qmodel(X), quantize(fun, params=apart, recipe=recipe)(X))
    for name, w in apart.items():
        np.testing.assert_array_equal(params[name], w)


@pytest.mark.parametrize("recipe", ["default", "per_tensor"])
def test_one_weight_in_several_places(recipe):
    fun = lambda p, x: jax.nn.relu(x @ p["a"] + p["b"]) @ p["a"].T * p["b"] + p["b"]
    assert agreement(quantize(fun, params={"a": W, "b": W[0]}, recipe=recipe, strict=True), X) >= LEAST_DB


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.second = nnx.Linear(8, 8, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))


class LinenTied(linen.Module):
    @linen.compact
    def __call__(self, x):
        layer = linen.Dense(8)
        return layer(jax.nn.relu(layer(x)))


def test_modules_that_share_a_weight():
    assert agreement(qc.quantize(Tied(nnx.Rngs(0)), [X], strict=True), X) >= LEAST_DB
    variables = LinenTied().init(jax.random.key(0), X)
    assert agreement(qc.quantize(LinenTied(), [X], variables=variables, strict=True), X) >= LEAST_DB


def test_writing_to_the_weights_afterwards_changes_nothing():
    params = {name: w.copy() for name, w in PARAMS.items()}
    qmodel, expected = quantize(params=params), quantize()
    for w in params.values():
        w[...] = 0.0
    for x in (X, X[:2]):
        np.testing.assert_array_equal(qmodel(x), expected(x))
        np.testing.assert_array_equal(qmodel.float(x), expected.float(x))


def test_jit_sees_that_its_weights_were_written_to():
    params = {name: w.copy() for name, w in PARAMS.items()}
    fun = qc.jit(mlp, weight_argnums=0).calibrate([X], params=params)
    fun(params, X)
    params["w"][0, 0] += 1.0
    with refused(qc.SignatureError, "weight w", "not the one that was calibrated"):
        fun(params, X)
