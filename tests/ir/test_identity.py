"""Ids, module paths and source lines: the same from run to run, from batch size to batch size, and the user's own."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qcompiler.ir import _compat, identity
from qcompiler.ir.tracing import trace
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.partition import partition
from qcompiler.passes.simplify import simplify

X = jax.ShapeDtypeStruct((2, 4), np.float32)


def _sources(program):
    return [identity.source_of(e) for e in program.eqns]


def _ids(program):
    return [program.ids[v] for e in program.eqns for v in e.outvars]


def _lines(program):
    return [identity.user_frame(e.source_info.traceback)[1] for e in program.eqns]


def two_relus(w, x):
    x = jax.nn.relu(x)
    x = jnp.sin(x)
    return jax.nn.relu(x)


def test_each_call_of_a_cached_library_function_has_its_own_line():
    first = inspect.getsourcelines(two_relus)[1] + 1
    for _ in range(2):  # the second time, jax has all jaxprs in its caches
        program = trace(two_relus, {}, (X,))
        assert _lines(program) == [first, first + 1, first + 2]
        assert all(s.endswith("(two_relus)") and "test_identity.py" in s for s in _sources(program))


def other_caller(w, x):
    return jax.nn.relu(x) + jax.nn.silu(x)


def test_a_cached_function_does_not_keep_the_line_of_another_caller():
    trace(two_relus, {}, (X,))
    program = trace(other_caller, {}, (X,))
    assert all("other_caller" in s for s in _sources(program))


@jax.jit
def users_layer(x):
    y = jnp.sin(x)
    return y * 2.0


def test_inside_the_users_own_jitted_function_the_line_is_there():
    start = inspect.getsourcelines(users_layer.__wrapped__)[1]
    program = trace(lambda w, x: users_layer(users_layer(x)), {}, (X,))
    assert _lines(program) == [start + 2, start + 3] * 2
    assert _ids(program) == ["sin#0", "mul#0", "sin#1", "mul#1"]


def test_paths_come_from_scopes():
    def fun(w, x):
        with jax.named_scope("encoder"):
            with jax.named_scope("layer_0"):
                x = jnp.sin(x)
            x = jnp.sin(jnp.sin(x))
        return jnp.sin(x)

    program = trace(fun, {}, (X,))
    assert _ids(program) == ["encoder/layer_0/sin#0", "encoder/sin#0", "encoder/sin#1", "sin#0"]
    assert [identity.module_path(e) for e in program.eqns] == ["encoder/layer_0", "encoder", "encoder", ""]


def test_tags_are_no_part_of_paths_or_ids():
    program = trace(lambda w, x: jax.nn.relu(x) + jax.jit(lambda v: jnp.maximum(v, 0.0))(x), {}, (X,))
    assert _ids(program) == ["max#0", "max#1", "add#0"]


def test_transformations_and_einsum_specifications_are_no_path():
    def fun(w, x):
        with jax.named_scope("attention"):
            y = jnp.einsum("bd,de->be", x, w)
            return jax.grad(lambda v: jnp.sum(jax.vmap(jnp.sin)(v)))(y)

    program = trace(fun, np.eye(4, dtype=np.float32), (X,))
    assert {identity.module_path(e) for e in program.eqns} <= {"attention"}


def test_ids_of_further_results_have_a_number():
    program = trace(lambda w, x: lax.sort((x, -x), num_keys=1), {}, (X,))
    (_, (first, second)) = (e.outvars for e in program.eqns)
    assert (program.ids[first], program.ids[second]) == ("sort#0", "sort#0.1")


def test_ids_of_weights_and_inputs():
    program = trace(lambda w, x: x + w["a"]["b"], {"a": {"b": np.float32(1)}}, (X,), parameter_names=("x",))
    assert [program.ids[v] for v in program.invars] == ["weight:a/b", "input:x"]


def model(w, x):
    with jax.named_scope("conv"):
        y = lax.conv_general_dilated(x, w["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    with jax.named_scope("bn"):
        y = (y - w["mean"]) * lax.rsqrt(w["var"] + np.float32(1e-5))
    y = jnp.mean(jax.nn.relu(y), axis=(1, 2))
    with jax.named_scope("head"):
        y = y @ w["head"] + w["bias"]
        y = (y - jnp.mean(y, axis=-1, keepdims=True)) / (jnp.std(y, axis=-1, keepdims=True) + 1e-3)
        return jax.nn.softmax(jax.nn.gelu(y))


def _model(batch):
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 4), "mean": (4,), "var": (4,), "head": (4, 3), "bias": (3,)}
    weights = {n: np.abs(rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}
    return trace(model, weights, (jax.ShapeDtypeStruct((batch, 6, 6, 2), np.float32),))


def test_batch_sizes_give_the_same_ids():
    one, eight = _model(1), _model(8)
    assert _ids(one) == _ids(eight)
    for run in (simplify, fold_norms, partition):
        one, eight = run(one), run(eight)
        assert _ids(one) == _ids(eight)
        assert list(one.weights) == list(eight.weights)
        assert _sources(one) == _sources(eight)


def test_tracing_twice_gives_the_same_text():
    assert _model(2).text() == _model(2).text()


def test_equations_without_a_user_have_an_unknown_source():
    jaxpr = trace(lambda w, x: x + 1.0, {}, (X,)).jaxpr
    (eqn,) = _compat.open_jaxpr(jaxpr).eqns
    assert identity.source_of(eqn) != "unknown source"
    assert identity.user_frame(None) is None


def test_describe_names_primitive_path_and_line():
    def fun(w, x):
        with jax.named_scope("here"):
            return jnp.sin(x)

    (eqn,) = trace(fun, {}, (X,)).eqns
    assert identity.describe(eqn).startswith("sin in here at ")
    (eqn,) = trace(lambda w, x: jnp.sin(x), {}, (X,)).eqns
    assert identity.describe(eqn).startswith("sin in <top level> at ")


@pytest.mark.parametrize(
    ("path", "internal"),
    [
        (inspect.getfile(jax), True),
        (inspect.getfile(identity), True),
        (inspect.getfile(simplify), True),
        (inspect.getfile(trace), True),
        ("<string>", True),
        (__file__, False),
        ("/home/someone/jax/model.py", False),
    ],
)
def test_which_files_are_the_users(path, internal):
    assert identity.is_internal_file(path) is internal


def test_models_are_user_code():
    from qcompiler.models import mlp

    assert not identity.is_internal_file(inspect.getfile(mlp))
