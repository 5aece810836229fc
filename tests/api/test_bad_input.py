"""What cannot be quantized is refused by the documented error; it names layer and source line and says what to do."""

import inspect
import os
import warnings

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.extend.core import Primitive
from jax.interpreters import mlir

import qcompiler as qc
from qcompiler.pipeline import PASSES, PassManager


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(5, 8, seed=1)
PARAMS = {"w": normal(8, 16, seed=2), "b": normal(16, seed=3), "v": normal(16, 4, seed=4)}


def mlp(params, x):
    with jax.named_scope("first"):
        h = jax.nn.relu(x @ params["w"] + params["b"])  # first layer
    with jax.named_scope("second"):
        return h @ params["v"]  # second layer


def at(mark):
    """`test_bad_input.py:LINE `, of the line that ends with the mark."""
    lines = inspect.getsource(inspect.getmodule(mlp)).splitlines()
    (number,) = [k for k, text in enumerate(lines, 1) if text.endswith(f"  # {mark}")]
    return f"{os.path.basename(__file__)}:{number} "


def quantize(fun=mlp, batches=None, **options):
    return qc.quantize(fun, [X] if batches is None else batches, **{"params": PARAMS, **options})


def refused(error, *parts):
    """Expects exactly this documented error, with all parts in its message."""

    class Expectation:
        def __enter__(self):
            self.inner = pytest.raises(qc.QuantizationError)
            self.caught = self.inner.__enter__()
            return self.caught

        def __exit__(self, *details):
            handled = self.inner.__exit__(*details)
            assert type(self.caught.value) is error, f"{type(self.caught.value).__name__}: {self.caught.value}"
            for part in parts:
                assert part in str(self.caught.value), f"{part!r} is not in: {self.caught.value}"
            return handled

    return Expectation()


def with_value(array, value):
    changed = np.array(array)
    changed.flat[3] = value
    return changed


@pytest.fixture(scope="module")
def qmlp():
    return quantize()


def test_every_error_is_a_quantization_error():
    errors = [e for n, e in vars(qc).items() if n.endswith("Error")]
    assert len(errors) >= 9 and all(issubclass(e, qc.QuantizationError) for e in errors)


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


# Options


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"recipe": "sweet"}, ("unknown recipe 'sweet'", "default, litert, per_tensor")),
        ({"recipe": ["sweet"]}, ("unknown recipe",)),
        ({"target": "abacus"}, ("unknown target 'abacus'", "xla")),
        ({"target": 3}, ("unknown target 3",)),
        ({"target": qc.Target("abacus", backend="beads")}, ("abacus", "unknown backend 'beads'")),
        ({"backend": "beads"}, ("unknown backend 'beads'", "lax_int")),
        ({"io": "complex"}, ("unknown io='complex'", "'float', 'int'")),
        ({"verify": "hard"}, ("unknown verify='hard'", "probe, types, off")),
        ({"weights": "heavy"}, ("unknown weights='heavy'", "'constant', 'argument'")),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_unknown_options(options, parts):
    with refused(qc.RecipeError, *parts):
        quantize(**options)


def test_unknown_options_of_stages():
    with refused(qc.RecipeError, "unknown recipe"):
        qc.trace(mlp, X, params=PARAMS, recipe="sweet")
    calibrated = qc.trace(mlp, X, params=PARAMS).calibrate([X])
    with refused(qc.RecipeError, "unknown recipe"):
        calibrated.quantize("sweet")
    for options in ({"io": "complex"}, {"weights": "heavy"}):
        with refused(qc.RecipeError, "unknown"):
            calibrated.quantize().compile(**options)


def test_unknown_passes():
    with refused(qc.RecipeError, "unknown pass 'polish'", *PASSES):
        PassManager().run("polish", qc.trace(mlp, X, params=PARAMS).program)


def test_impossible_recipes():
    with refused(qc.RecipeError, "unknown range estimator 'guess'", "'mse'"):
        qc.Recipe(activation_range="guess")
    with refused(qc.RecipeError, "weight type has 16 bits", "at most 8"):
        qc.Recipe(weight=qc.QuantType(16, symmetric=True))
    with refused(qc.RecipeError, "affine weights"):
        qc.Recipe(weight=qc.QuantType(8))
    with refused(qc.QuantizationError, "2 to 16 bits", "got 1"):
        qc.QuantType(1)


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        (qc.Rule(path="third*", keep_float=True), ("third*", "matches no layer", "first/dot_general#0")),
        (qc.Rule(primitive="conv*"), ("conv*", "matches no layer", "second/dot_general#0")),
        (qc.Rule(path="first", weight=qc.QuantType(16, symmetric=True)), ("first/dot_general#0", "weight", "int16s")),
        (qc.Rule(path="first", weight=qc.QuantType(8)), ("first/dot_general#0", "weight type int8")),
        (qc.Rule(path="first", activation=qc.QuantType(16)), ("first/dot_general#0", "activation", "int16")),
    ],
    ids=["path", "primitive", "wide_weight", "affine_weight", "wide_activation"],
)
def test_rules_that_cannot_be_followed(rule, parts):
    with refused(qc.RecipeError, *parts):
        quantize(recipe=qc.Recipe(rules=(rule,)))


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
