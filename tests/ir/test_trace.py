"""Capturing: calls dissolve into scopes, arrays become named weights, effects are refused at the user's line."""

import functools
import inspect
import warnings

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qcompiler.errors import TraceError
from qcompiler.ir import _compat, identity
from qcompiler.ir.tracing import trace

X = jax.ShapeDtypeStruct((2, 4), np.float32)


def _x(seed=0):
    return np.random.default_rng(seed).normal(size=X.shape).astype(np.float32)


def _names(program):
    return [e.primitive.name for e in program.eqns]


def _tags(program):
    return [identity.call_tags(e) for e in program.eqns]


def _line(offset=0):
    return f"test_trace.py:{inspect.currentframe().f_back.f_lineno + offset} "


@jax.jit
def _inner(x):
    return jnp.sin(x)


@jax.jit
def _outer(x):
    return _inner(x) + 1.0


@jax.custom_jvp
def _with_jvp(x):
    return jnp.cos(x)


@_with_jvp.defjvp
def _jvp(primals, tangents):
    return _with_jvp(*primals), tangents[0]


@jax.custom_vjp
def _with_vjp(x):
    return jnp.tanh(x)


_with_vjp.defvjp(lambda x: (_with_vjp(x), None), lambda _, g: (g,))


@pytest.mark.parametrize(
    ("fun", "primitives", "tags"),
    [
        (_inner, ["sin"], [("_inner",)]),
        (_outer, ["sin", "add"], [("_outer", "_inner"), ("_outer",)]),
        (_with_jvp, ["cos"], [("custom_jvp_call",)]),
        (_with_vjp, ["tanh"], [("custom_vjp_call",)]),
        (jax.checkpoint(lambda x: x * x), ["mul"], None),
        (lambda x: jax.nn.silu(x), ["logistic", "mul"], [("silu",), ("silu",)]),
    ],
    ids=["jit", "nested_jit", "custom_jvp", "custom_vjp", "remat", "library"],
)
def test_calls_are_inlined_with_their_names_as_tags(fun, primitives, tags):
    program = trace(lambda w, x: fun(x), {}, (X,))
    assert _names(program) == primitives
    if tags is None:
        assert all(len(t) == 1 for t in _tags(program))
    else:
        # A call is tagged at least by its own name; JAX may add a call of the same name inside it.
        assert [tuple(dict.fromkeys(t)) for t in _tags(program)] == tags
    np.testing.assert_array_equal(program(_x())[0], jax.jit(fun)(_x()))
    assert all(identity.module_path(e) == "" for e in program.eqns)


def test_relu_keeps_its_tag_below_the_module_path():
    def fun(w, x):
        with jax.named_scope("block/0"):
            return jax.nn.relu(x)

    program = trace(fun, {}, (X,))
    assert [identity.module_path(e) for e in program.eqns] == ["block/0"]
    assert "relu" in _tags(program)[0]
    assert [program.ids[v] for e in program.eqns for v in e.outvars] == ["block/0/max#0"]


def test_weights_are_named_by_their_path():
    weights = {"b": [np.ones(4, np.float32), {"c": np.float32(2)}], "a": 3.0}
    program = trace(lambda w, x: x * w["b"][0] * w["b"][1]["c"] + w["a"], weights, (X,))
    assert list(program.weights) == ["a", "b/0", "b/1/c"]
    assert [program.weight_of[v] for v in program.invars[:3]] == ["a", "b/0", "b/1/c"]
    assert all(w.dtype == np.float32 for w in program.weights.values())
    np.testing.assert_array_equal(program(_x())[0], _x() * np.float32(2) + np.float32(3))


def test_unread_weights_are_dropped():
    program = trace(lambda w, x: x + w["used"], {"used": np.float32(1), "unused": np.ones(1000)}, (X,))
    assert list(program.weights) == ["used"]


def test_weights_have_the_dtype_that_jax_gives_them():
    program = trace(lambda w, x: x * w["w"], {"w": np.ones(4)}, (X,))
    assert program.weights["w"].dtype == program.invars[0].aval.dtype == np.float32


def test_a_tied_weight_is_one_argument():
    table = np.eye(4, dtype=np.float32)
    program = trace(lambda w, x: (x @ w["t"]) @ w["t"].T, {"t": table}, (X,))
    assert list(program.weights) == ["t"]
    assert len(program.users[program.invars[0]]) == 2


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_closed_over_arrays_become_weights(make):
    held = make(np.arange(4, dtype=np.float32))
    program = trace(lambda w, x: jax.jit(lambda v: v * held)(x), {}, (X,))
    assert not _compat.consts_of(program.jaxpr)
    (weight,) = program.weights.values()
    np.testing.assert_array_equal(weight, held)
    np.testing.assert_array_equal(program(_x())[0], _x() * np.arange(4, dtype=np.float32))


def test_array_literals_become_weights():
    values = np.array([1, 2, 3, 4], np.float32)
    program = trace(lambda w, x: lax.mul(x, lax.broadcast(values, (2,))), {}, (X,))
    literals = [v for e in program.eqns for v in e.invars if isinstance(v, _compat.Literal)]
    assert all(not v.aval.shape for v in literals)
    assert [w.tolist() for w in program.weights.values()] == [[1, 2, 3, 4]]


def test_results_that_are_inputs_weights_or_numbers():
    program = trace(lambda w, x: (x, w, np.float32(1), x), np.arange(3, dtype=np.float32), (X,))
    x, w, one, again = program(_x())
    np.testing.assert_array_equal(x, _x())
    np.testing.assert_array_equal(again, _x())
    assert w.tolist() == [0, 1, 2] and one == 1


def test_debug_prints_are_dropped_with_a_warning():
    def fun(w, x):
        jax.debug.print("x {}", x)
        return x + 1.0

    with pytest.warns(UserWarning, match=r"dropped a debug print at .*test_trace.py:\d+"):
        program = trace(fun, {}, (X,))
    assert _names(program) == ["add"]


def _pure(x):
    return jax.pure_callback(np.sin, X, x)  # the line of `pure`


def _io(x):
    return jax.experimental.io_callback(np.sin, X, x)  # the line of `io`


def _nested(x):
    return lax.scan(lambda c, _: (_pure(c), None), x, None, length=2)[0]


@pytest.mark.parametrize(("fun", "name"), [(_pure, "pure"), (_io, "io"), (_nested, "pure"), (jax.jit(_pure), "pure")])
def test_callbacks_are_refused_at_the_users_line(fun, name):
    lines = inspect.getsource(inspect.getmodule(_pure)).splitlines()
    line = next(k for k, text in enumerate(lines, 1) if text.endswith(f"# the line of `{name}`"))
    with pytest.raises(TraceError, match=rf"{name}_callback at .*test_trace.py:{line} "):
        trace(lambda w, x: fun(x), {}, (X,))


def test_inputs_may_be_shapes_arrays_or_numbers():
    def fun(w, x, y):
        return x * y

    wanted = trace(fun, {}, (X, 2.0)).text()
    for x in (_x(), jnp.asarray(_x()), _x().astype(np.float64)):
        assert trace(fun, {}, (x, np.float32(2))).text() == wanted
    program = trace(fun, {}, (X,), {"y": 2.0}, parameter_names=("x",))
    assert program.signature.input_names == ("x", "y")


def test_inputs_are_named_by_parameter_and_path():
    inputs = ({"image": X, "more": [X, None, X]},)
    program = trace(lambda w, b, *, z, a: [b, z, a], {}, inputs, {"z": X, "a": X}, parameter_names=("batch",))
    assert program.signature.input_names == ("batch['image']", "batch['more'][0]", "batch['more'][2]", "a", "z")


@pytest.mark.parametrize(("weights", "args"), [({"w": "text"}, (X,)), ({}, ("text",)), ({}, (object(),))])
def test_what_is_no_array_is_refused(weights, args):
    with pytest.raises(TraceError, match="not an array"):
        trace(lambda w, x: x, weights, args)


def test_two_weights_of_one_name_are_refused():
    with pytest.raises(TraceError, match="same path"):
        trace(lambda w, x: x, {"a/b": np.ones(1), "a": {"b": np.ones(1)}}, (X,))


def test_traced_weights_are_refused():
    with pytest.raises(TraceError, match="weight w is a tracer"):
        jax.jit(lambda w: trace(lambda w, x: x * w["w"], {"w": w}, (X,))(_x()))(np.float32(1))


def test_bodies_of_control_flow_stay_whole():
    def fun(w, x):
        y = lax.scan(lambda c, v: (jax.nn.relu(c @ v), None), x, w)[0]
        y = lax.cond(y[0, 0] > 0, jnp.sin, jnp.cos, y)
        return lax.while_loop(lambda c: jnp.sum(c) > 1, lambda c: c * 0.5, y)

    weights = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)
    program = trace(fun, weights, (X,))
    assert {"scan", "cond", "while"} <= set(_names(program))
    np.testing.assert_array_equal(program(_x())[0], jax.jit(functools.partial(fun, weights))(_x()))


def test_dead_equations_are_left_out():
    def fun(w, x):
        jnp.exp(x)
        return jnp.sin(x)

    assert _names(trace(fun, {}, (X,))) == ["sin"]


def test_the_scope_of_the_outermost_module_is_dropped():
    def fun(w, x):
        with jax.named_scope("Model"), jax.named_scope("Model"), jax.named_scope("layer.decode"):
            return jnp.einsum("ij,jk->ik", x, w)

    program = trace(fun, np.eye(4, dtype=np.float32), (X,), root_scope="Model")
    assert {identity.module_path(e) for e in program.eqns} == {"Model/layer"}


def test_no_warnings_of_our_own():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(lambda w, x: jax.nn.softmax(x @ w), np.eye(4), (X,))


def test_outputs_are_those_of_the_function_op_by_op():
    def fun(w, x):
        return jax.nn.gelu(jax.nn.softmax(x @ w) - jnp.mean(x, axis=-1, keepdims=True))

    weights = np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32)
    program = trace(fun, weights, (X,))
    with jax.disable_jit():
        wanted = fun(jnp.asarray(weights), jnp.asarray(_x()))
    np.testing.assert_array_equal(program.evaluate([_x()])[0], wanted)
