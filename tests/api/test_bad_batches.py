"""Calibration batches and calls that are no data, or other data than was traced, and arrays of odd sizes."""

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from bad_input import PARAMS, X, at, mlp, normal, quantize, refused, with_value

import qcompiler as qc
from qcompiler.debug.report import sqnr_db


@pytest.fixture(scope="module")
def qmlp():
    return quantize()


# Batches


def exhausted():
    iterator = iter([X])
    next(iterator)
    return iterator


@pytest.mark.parametrize("batches", [[], (), exhausted(), iter(())], ids=["list", "tuple", "exhausted", "iter"])
def test_no_batches(batches):
    with refused(qc.CalibrationError, "no calibration batches", "empty"):
        quantize(batches=batches)
    with refused(qc.CalibrationError, "no calibration batches"):
        qc.trace(mlp, X, params=PARAMS).calibrate(batches)


@pytest.mark.parametrize("batches", [3, None, {"x": X}, "batch", qc.call(X)])
def test_what_is_no_iterable_of_batches(batches):
    with refused(qc.CalibrationError, "iterable of batches", type(batches).__name__):
        qc.quantize(mlp, batches, params=PARAMS)


@pytest.mark.parametrize("batch", ["text", object(), qc.call(x="text")])
def test_batches_that_are_no_arrays(batch):
    with refused(qc.TraceError, "not an array"):
        quantize(batches=[batch])


def test_batches_without_values():
    with refused(qc.CalibrationError, "input x is a ShapeDtypeStruct without values"):
        quantize(batches=[jax.ShapeDtypeStruct((2, 8), jnp.float32)])


OTHER_INPUTS = {
    "dtype": ((X.astype(np.int32),), {}, ("input x", "int32", "float32 was traced", "convert")),
    "half": ((jnp.asarray(X, jnp.bfloat16),), {}, ("input x", "bfloat16", "float32 was traced")),
    "rank": ((X[0],), {}, ("input x", "(8,)", "rank 2")),
    "higher_rank": ((X[None],), {}, ("input x", "(1, 5, 8)", "rank 2")),
    "more": ((X, X), {}, ("structure", "(*, *) against (*)")),
    "fewer": ((), {}, ("structure", "() against (*)")),
    "keyword": ((), {"x": X}, ("structure", "(x=*) against (*)")),
    "list": (([X],), {}, ("structure",)),
    "width": ((X[:, :4],), {}, ("(5, 4)", at("first layer"))),
}


@pytest.mark.parametrize(("args", "kwargs", "parts"), OTHER_INPUTS.values(), ids=OTHER_INPUTS)
def test_another_signature_than_traced(qmlp, args, kwargs, parts):
    with refused(qc.CalibrationError, "calibration batch 1", *parts):
        quantize(batches=[X, qc.call(*args, **kwargs)])
    for call in (qmlp, qmlp.simulate, jax.jit(qmlp)):
        with refused(qc.SignatureError, "this call", *parts):
            call(*args, **kwargs)


def test_another_signature_than_the_stages_were_traced_with():
    traced = qc.trace(mlp, X, params=PARAMS)
    with refused(qc.CalibrationError, "calibration batch 0", "rank 2"):
        traced.calibrate([X[0]])
    with refused(qc.CalibrationError, "calibration batch 0", "(5, 4)", at("first layer")):
        traced.calibrate([X[:, :4]])


def branches_on_batch(params, x):
    return mlp(params, x) if x.shape[0] > 2 else jnp.tanh(mlp(params, jnp.tanh(x)))


def test_a_model_that_does_other_things_at_other_shapes():
    with refused(qc.CalibrationError, "calibration batch 1", "other operations"):
        quantize(branches_on_batch, [X, X[:1]])
    with refused(qc.SignatureError, "other operations", "(1, 8)"):
        quantize(branches_on_batch)(X[:1])


# Arrays without elements, and without dimensions


@pytest.mark.parametrize("batches", [[X[:0], X], [X, X[:0]], [X[:0], X, X[:0], X]], ids=["first", "last", "between"])
def test_empty_batches_say_nothing(batches):
    qmodel = quantize(batches=batches)
    np.testing.assert_array_equal(qmodel(X), quantize()(X))
    assert np.isfinite(qmodel.report.sqnr_db), "verified on a batch that has elements"
    assert qmodel(X[:0]).shape == (0, 4)


def test_a_mean_over_the_batch_is_not_taken_of_nothing():
    fun = lambda params, x: jnp.mean(x, axis=0) @ params["w"]
    qmodel = quantize(fun, [X, X[:0]])
    # int8 operands leave about 40 dB of a product.
    assert sqnr_db([qmodel.float(X)], [qmodel(X)]) >= 33


@pytest.mark.parametrize("batches", [[X[:0]], [X[:0], X[:0]]], ids=["one", "two"])
def test_batches_that_are_all_empty(batches):
    with refused(qc.CalibrationError, f"all {len(batches)} calibration batches are empty", "no elements"):
        quantize(batches=batches)
    with refused(qc.CalibrationError, f"all {len(batches)} calibration batches are empty"):
        qc.trace(mlp, X, params=PARAMS).calibrate(batches)


def test_a_bad_batch_keeps_its_number_behind_empty_ones():
    with refused(qc.CalibrationError, "calibration batch 2", "NaN"):
        quantize(batches=[X[:0], X, with_value(X, np.nan)])


def two_inputs(params, x, y):
    return x @ params["w"], y * 2.0


def test_a_second_input_without_elements():
    qmodel = quantize(two_inputs, [(X, normal(5, 0))])
    first, second = qmodel(X, normal(5, 0))
    assert second.shape == (5, 0) and sqnr_db([qmodel.float(X, normal(5, 0))[0]], [first]) >= 33
    with refused(qc.CalibrationError, "input:y", "without elements", "add a batch"):
        qmodel(X, normal(5, 3))


def test_weights_without_elements():
    qmodel = quantize(lambda params, x: (x @ params["w"][:, :0], x @ params["w"]))
    assert qmodel(X)[0].shape == (5, 0) and sqnr_db([qmodel.float(X)[1]], [qmodel(X)[1]]) >= 33


@pytest.mark.parametrize("number", [2.0, np.float32(2.0)], ids=["python", "numpy"])
def test_scalar_inputs_and_results(number):
    qmodel = quantize(lambda w, t: jnp.tanh(t * w) + 1.0, [number, 0.3, -0.7], params=np.float32(3.0), strict=True)
    assert qmodel(number).shape == ()
    for t in (0.1, -0.4, 1.5):
        # A table of 4,096 entries over [-0.7, 2] steps by 0.0007, three times that behind the slope.
        assert abs(float(qmodel(np.float32(t))) - (np.tanh(3 * t) + 1)) < 2e-3


def test_scalar_results_of_products_and_sums():
    qmodel = quantize(lambda params, x: (x @ params["b"][:8], jnp.sum(x * x)), [X[0]])
    product, square = qmodel(X[0])
    expected = qmodel.float(X[0])
    assert product.shape == square.shape == ()
    assert abs(float(product - expected[0])) < 0.05 and abs(float(square - expected[1])) < 0.05
