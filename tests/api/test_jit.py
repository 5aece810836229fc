"""`qc.jit`: float under `jax.jit` until calibrated, integers after, for the calibrated weights only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qcompiler as qc
from qcompiler.debug.report import sqnr_db


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(6, 8, seed=1)
PARAMS = {"w": jnp.asarray(normal(8, 16, seed=2)), "v": jnp.asarray(normal(16, 4, seed=3))}


def predict(params, x):
    """Predicts."""
    return jax.nn.relu(x @ params["w"]) @ params["v"]


@pytest.fixture(scope="module")
def calibrated():
    return qc.jit(predict, weight_argnums=0).calibrate([X], params=PARAMS)


@pytest.fixture(scope="module")
def wanted():
    return qc.quantize(predict, [X], params=PARAMS)(X)


def test_float_before_and_integers_after():
    fun = qc.jit(weight_argnums=0)(predict)
    np.testing.assert_array_equal(fun(PARAMS, X), jax.jit(predict)(PARAMS, X))
    assert fun.model is None
    with pytest.raises(qc.CalibrationError, match="calibrate"):
        _ = fun.report
    assert fun.calibrate([X], params=PARAMS) is fun
    out = fun(PARAMS, X)
    np.testing.assert_array_equal(out, qc.quantize(predict, [X], params=PARAMS)(X))
    # 8-bit operands of two products: see FEW_LAYERS_DB in test_quantize.py.
    assert 30 < sqnr_db([jax.jit(predict)(PARAMS, X)], [out]) < 60
    assert fun.report.integer_only and isinstance(fun.model, qc.QuantizedModel)


def test_bare_and_with_options():
    @qc.jit
    def bare(x):
        return x @ PARAMS["w"]

    @qc.jit(recipe="litert", dump=None)
    def optioned(x):
        return x @ PARAMS["w"]

    for fun, stored in ((bare, jnp.int16), (optioned, jnp.int8)):
        np.testing.assert_array_equal(fun(X), jax.jit(lambda x: x @ PARAMS["w"])(X))
        fun.calibrate([X])
        assert fun.report.integer_mac_share == 1.0
        codes = [e.outvars[0].aval.dtype for e in fun.model.program.eqns if e.outvars[0].aval.shape == (6, 16)]
        assert (jnp.int16 in codes) == (stored == jnp.int16)


def test_it_looks_like_the_function(calibrated):
    assert calibrated.__name__ == "predict" and calibrated.__doc__ == "Predicts."
    assert calibrated.__wrapped__ is predict and calibrated.__module__ == predict.__module__


def test_equal_weights_are_accepted(calibrated, wanted):
    copies = jax.tree.map(lambda w: jnp.array(w, copy=True), PARAMS)
    np.testing.assert_array_equal(calibrated(copies, X), wanted)
    np.testing.assert_array_equal(calibrated(jax.tree.map(np.asarray, PARAMS), X), wanted)


def test_other_weights_are_refused(calibrated):
    with pytest.raises(qc.SignatureError, match=r"weight w .*calibrate again"):
        calibrated({**PARAMS, "w": PARAMS["w"] + 1}, X)
    with pytest.raises(qc.SignatureError, match="weight v "):
        calibrated({**PARAMS, "v": PARAMS["v"][:, :2]}, X)
    with pytest.raises(qc.SignatureError, match="weight v "):
        calibrated({**PARAMS, "v": PARAMS["v"].astype(jnp.bfloat16)}, X)
    with pytest.raises(qc.SignatureError, match="structure"):
        calibrated({**PARAMS, "more": X}, X)


def test_under_transformations(calibrated, wanted):
    np.testing.assert_array_equal(jax.jit(lambda x: calibrated(PARAMS, x))(X), wanted)
    np.testing.assert_array_equal(jax.vmap(lambda x: calibrated(PARAMS, x))(X[:, None])[:, 0], wanted)
    np.testing.assert_array_equal(calibrated(PARAMS, X[:1]), wanted[:1])
    with pytest.raises(qc.SignatureError, match=r"weight v is a tracer.*close over"):
        jax.jit(calibrated)(PARAMS, X)
    with pytest.raises(qc.QuantizationError, match="simulate"):
        jax.grad(lambda x: jnp.sum(calibrated(PARAMS, x)))(X)


def test_float_under_transformations():
    fun = qc.jit(predict, weight_argnums=0)
    gradient = jax.grad(lambda p: jnp.sum(fun(p, X)))(PARAMS)
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(gradient))


def test_keywords():
    shifted = qc.jit(lambda params, x, *, y: predict(params, x) + y, weight_argnums=0)
    y = normal(6, 4, seed=5)
    np.testing.assert_array_equal(shifted(PARAMS, X, y=y), jax.jit(predict)(PARAMS, X) + y)
    shifted.calibrate([{"x": X, "y": y}], params=PARAMS)
    assert sqnr_db([predict(PARAMS, X) + y], [shifted(PARAMS, x=X, y=y)]) > 30
    with pytest.raises(qc.SignatureError, match="structure"):
        shifted(PARAMS, X, y=y)
    with pytest.raises(qc.SignatureError, match="first argument"):
        shifted(params=PARAMS, x=X, y=y)


def test_calibrating_again_takes_the_new_weights(wanted):
    fun = qc.jit(predict, weight_argnums=0).calibrate([X], params=PARAMS)
    other = jax.tree.map(lambda w: -w, PARAMS)
    fun.calibrate([X], params=other)
    assert not np.array_equal(fun(other, X), wanted)
    with pytest.raises(qc.SignatureError):
        fun(PARAMS, X)


def test_bad_arguments():
    with pytest.raises(qc.RecipeError, match=r"unknown options flavour, params; known: .*recipe.*verify"):
        qc.jit(predict, flavour="sweet", params=PARAMS)
    with pytest.raises(qc.RecipeError, match="weight_argnums must be 0"):
        qc.jit(predict, weight_argnums=1)
    with pytest.raises(qc.CalibrationError, match="params="):
        qc.jit(predict, weight_argnums=0).calibrate([X])
    with pytest.raises(qc.RecipeError, match="unknown recipe"):
        qc.jit(predict, weight_argnums=0, recipe="sweet").calibrate([X], params=PARAMS)


def test_a_failed_calibration_leaves_the_float_function():
    fun = qc.jit(predict, weight_argnums=0)
    with pytest.raises(qc.CalibrationError):
        fun.calibrate([X * np.nan], params=PARAMS)
    np.testing.assert_array_equal(fun(PARAMS, X), jax.jit(predict)(PARAMS, X))
