"""Models that cannot be captured are refused by the documented error; it names layer and source line."""

import os
import warnings

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from bad_input import PARAMS, X, at, mlp, normal, quantize, refused
from flax import linen, nnx
from jax.extend.core import Primitive
from jax.interpreters import mlir

import qcompiler as qc


@pytest.fixture(scope="module")
def qmlp():
    return quantize()


def test_every_error_is_a_quantization_error():
    errors = [e for n, e in vars(qc).items() if n.endswith("Error")]
    assert len(errors) >= 9 and all(issubclass(e, qc.QuantizationError) for e in errors)


# Training mode


class Trained(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = self.norm(x)  # nnx norm
        x = self.drop(x)  # nnx dropout
        return self.head(x)


def test_nnx_batch_norm_in_training_mode():
    model = Trained(nnx.Rngs(0))
    model.drop.eval()
    with refused(qc.TraceError, "norm called at", at("nnx norm"), "BatchNorm", "model.eval()"):
        qc.quantize(model, [X])
    assert not isinstance(model.norm.mean[...], jax.core.Tracer), "the user's model was written to"
    model.eval()
    qc.quantize(model, [X], strict=True)


def test_nnx_dropout_in_training_mode():
    model = Trained(nnx.Rngs(0))
    model.norm.eval()
    with refused(qc.TraceError, "drop called at", at("nnx dropout"), "random numbers", "model.eval()"):
        qc.quantize(model, [X])


class LinenTrained(linen.Module):
    @linen.compact
    def __call__(self, x, train=False, deterministic=True):
        norm = linen.BatchNorm(use_running_average=not train, name="norm")
        x = norm(x)  # linen norm
        drop = linen.Dropout(0.5, deterministic=deterministic, name="drop")
        x = drop(x)  # linen dropout
        return linen.Dense(4)(x)


@pytest.fixture(scope="module")
def linen_variables():
    return LinenTrained().init(jax.random.key(0), X)


def test_linen_batch_norm_in_training_mode(linen_variables):
    with refused(qc.TraceError, at("linen norm"), "norm", "BatchNorm", "train=False"):
        qc.quantize(LinenTrained(), [X], variables=linen_variables, apply_kwargs={"train": True})


@pytest.mark.parametrize("rngs", [None, {"dropout": jax.random.key(0)}], ids=["none", "given"])
def test_linen_dropout_in_training_mode(linen_variables, rngs):
    options = {"deterministic": False} | ({"rngs": rngs} if rngs else {})
    with refused(qc.TraceError, at("linen dropout"), "drop", "random numbers", "deterministic=True"):
        qc.quantize(LinenTrained(), [X], variables=linen_variables, apply_kwargs=options)


def test_linen_without_all_its_variables(linen_variables):
    with refused(qc.TraceError, "batch_stats", "model.init", "params", at("linen norm")):
        qc.quantize(LinenTrained(), [X], variables={"params": linen_variables["params"]})
    with refused(qc.TraceError, "variables=", "model.init"):
        qc.quantize(LinenTrained(), [X])


def test_a_flag_as_an_input(linen_variables):
    with refused(qc.TraceError, "needs the value of an input", os.path.basename(__file__), "apply_kwargs"):
        qc.quantize(LinenTrained(), [{"x": X, "train": False}], variables=linen_variables)


# Side effects


def calls_back(params, x):
    y = mlp(params, x)
    return jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct(y.shape, y.dtype), y)  # pure


def calls_back_for_io(params, x):
    y = mlp(params, x)
    return jax.experimental.io_callback(lambda a: a, jax.ShapeDtypeStruct(y.shape, y.dtype), y)  # io


@pytest.mark.parametrize(("fun", "name"), [(calls_back, "pure"), (calls_back_for_io, "io")])
def test_callbacks(fun, name):
    with refused(qc.TraceError, f"{name}_callback at ", at(name), "move it outside"):
        quantize(fun)


def prints(params, x):
    y = mlp(params, x)
    jax.debug.print("y {}", y)  # print
    return y


def test_debug_prints_are_dropped_with_one_warning(qmlp, capfd):
    with pytest.warns(UserWarning) as caught:
        qmodel = quantize(prints, [X, X[:2]])
        np.testing.assert_array_equal(qmodel(X[:3]), quantize(batches=[X, X[:2]])(X[:3]))
    (warning,) = caught
    assert "dropped a debug print" in str(warning.message) and at("print") in str(warning.message)
    assert "y [[" not in capfd.readouterr().out


# Primitives without a rule

mystery_p = Primitive("mystery")
mystery_p.def_impl(lambda x: x)
mystery_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(mystery_p, lambda context, x: [x])


def uses_mystery(params, x):
    with jax.named_scope("odd"):
        h = mystery_p.bind(mlp(params, x))  # mystery
    return h @ params["last"]


def test_an_unknown_primitive_is_an_island():
    params = {**PARAMS, "last": normal(4, 4)}
    with pytest.warns(UserWarning, match=r"leaves 1 operations in float \(mystery"):
        qmodel = quantize(uses_mystery, params=params)
    (island,) = qmodel.report.islands
    assert (island.primitive, island.module_path) == ("mystery", "odd") and at("mystery") in island.source
    assert "no integer rule" in island.reason
    known = quantize(lambda p, x: mlp(p, x) @ p["last"], params=params)
    error = np.abs(qmodel(X) - known(X)).max() / np.abs(known(X)).max()
    assert error < 0.05
    with refused(qc.IslandError, "strict", "1 operations", "mystery in odd at", at("mystery"), "no integer rule"):
        quantize(uses_mystery, params=params, strict=True)


# Derivatives


@pytest.mark.parametrize("transform", ["grad", "jvp", "jacobian", "jit_grad", "value_and_grad"])
def test_derivatives_of_the_integers(qmlp, transform):
    loss = lambda x: jnp.sum(qmlp(x))
    calls = {
        "grad": lambda: jax.grad(loss)(X),
        "jvp": lambda: jax.jvp(qmlp, (X,), (X,)),
        "jacobian": lambda: jax.jacrev(qmlp)(X),
        "jit_grad": lambda: jax.jit(jax.grad(loss))(X),
        "value_and_grad": lambda: jax.value_and_grad(loss)(X),
    }
    with refused(qc.QuantizationError, "no derivative", "qmodel.simulate", "qmodel.float"):
        calls[transform]()


# Arguments that do not fit


def test_tracers():
    with refused(qc.TraceError, "weight b is a tracer", "outside of jit"):
        jax.jit(lambda params: quantize(params=params)(X))(PARAMS)
    with refused(qc.TraceError, "closes over", "tracer", "outside of jit"):
        jax.jit(lambda w: quantize(lambda x: x @ w, params=None)(X))(PARAMS["w"])
    with refused(qc.CalibrationError, "input x", "Tracer", "outside of jit"):
        jax.jit(lambda x: quantize(batches=[x])(x))(X)
    with refused(qc.TraceError, "weight bias is a tracer"):
        nnx.jit(lambda model: qc.quantize(model, [X])(X))(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))


def test_arguments_of_another_kind_of_model(linen_variables):
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    with refused(qc.TraceError, "params= cannot be given", "nnx.Module holds its own weights"):
        qc.quantize(model, [X], params=PARAMS)
    with refused(qc.TraceError, "variables= cannot be given"):
        qc.quantize(model, [X], variables=linen_variables)
    with refused(qc.TraceError, "variables=, method= cannot be given", "a function takes params="):
        quantize(variables=linen_variables, method="f")
    with refused(qc.TraceError, "cannot quantize a int", "nnx.Module"):
        qc.quantize(3, [X])
    for wrong in (model, LinenTrained()):
        with refused(qc.TraceError, "no method 'think'"):
            qc.quantize(wrong, [X], method="think", variables=None if wrong is model else linen_variables)


@pytest.mark.parametrize("weight", ["text", object(), [None, b"bytes"]], ids=["text", "object", "bytes"])
def test_weights_that_are_no_arrays(weight):
    with refused(qc.TraceError, "weight extra", "not an array"):
        quantize(params={**PARAMS, "extra": weight})


def test_inputs_that_are_no_arrays(qmlp):
    with pytest.raises(qc.QuantizationError, match="not an array"):
        qmlp("text")


def test_good_input_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(batches=[X, X[:2]])(X[:1])
