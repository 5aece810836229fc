"""Calibration batches and calls that are no data, or other data than was traced, and arrays of odd sizes."""

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from bad_input import PARAMS, X, at, mlp, quantize, refused

import qcompiler as qc


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
