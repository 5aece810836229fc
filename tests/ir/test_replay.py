"""Replay changes nothing by itself; simplify changes how, not what, bit for bit when run op by op."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax

from qcompiler.ir import _compat, identity, replay
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import build, rewrite
from qcompiler.ir.tracing import trace
from qcompiler.passes._unroll import unroll
from qcompiler.passes.simplify import simplify

X = jax.ShapeDtypeStruct((2, 4), np.float32)


def _names(program):
    return [e.primitive.name for e in program.eqns]


def _bits(arrays):
    return [(np.asarray(a).dtype, np.asarray(a).shape, np.asarray(a).tobytes()) for a in arrays]


def norm(w, x):
    with jax.named_scope("norm"):
        mean = jnp.mean(x, axis=-1, keepdims=True)
        y = (x - mean) * lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + 1e-5)
        return y * w["scale"] + w["shift"]


def loop(w, x):
    with jax.named_scope("loop"):
        y, ys = lax.scan(lambda c, v: (jax.nn.silu(c @ v), c), x, w["stack"])
        return lax.cond(y[0, 0] > 0, lambda v: jnp.sin(v), lambda v: v * w["scale"], y), ys


def half(w, x):
    y = x.astype(jnp.bfloat16) * jnp.bfloat16(0.1)
    return jax.nn.softmax(y).astype(jnp.float32) * w["scale"]


FUNCTIONS = [norm, loop, half]
WEIGHTS = {"scale": normal(4), "shift": normal(4, seed=1), "stack": normal(3, 4, 4)}


def _again(program, stage="trace"):
    return rewrite(program, lambda builder, eqn, values: None, stage=stage)


@pytest.mark.parametrize("fun", FUNCTIONS)
def test_replaying_three_times_changes_nothing(fun):
    program = trace(fun, WEIGHTS, (X,))
    once = _again(program)
    thrice = _again(_again(once))
    assert program.text() == once.text() == thrice.text()
    assert str(program.jaxpr) == str(thrice.jaxpr)
    assert list(program.weights) == list(thrice.weights)
    x = [normal(2, 4)]
    assert _bits(program.evaluate(x)) == _bits(thrice.evaluate(x))
    assert _bits(program(*x)) == _bits(thrice(*x))
    for e, f in zip(program.eqns, thrice.eqns, strict=True):
        assert identity.source_of(e) == identity.source_of(f) and "test_replay.py" in identity.source_of(f)
        assert identity.module_path(e) == identity.module_path(f)
        assert identity.call_tags(e) == identity.call_tags(f)
    _compat.check_types(thrice.jaxpr)


def test_bodies_keep_their_source_lines():
    def bodies(program):
        eqns = [e for outer in program.eqns for sub in _compat.sub_jaxprs(outer) for e in _compat.open_jaxpr(sub).eqns]
        return [(e.primitive.name, identity.source_of(e)) for e in eqns]

    program = trace(loop, WEIGHTS, (X,))
    assert bodies(program) == bodies(_again(_again(program)))
    assert all("test_replay.py" in source for _, source in bodies(program))


def test_a_rule_replaces_an_equation_under_its_own_source_and_path():
    def rule(builder, eqn, values):
        if eqn.primitive.name != "sin":
            return None
        return [lax.mul(lax.cos(values[0]), builder.weight("gain", np.ones((2, 4), np.float32)))]

    def fun(w, x):
        with jax.named_scope("here"):
            return jnp.sin(x) + 1.0

    program = trace(fun, {}, (X,))
    changed = rewrite(program, rule, stage="changed")
    assert _names(changed) == ["cos", "mul", "add"] and changed.stage == "changed"
    assert list(changed.weights) == ["gain"]
    assert {identity.source_of(e) for e in changed.eqns} == {identity.source_of(e) for e in program.eqns}
    assert {identity.module_path(e) for e in changed.eqns} == {"here"}


def test_a_rewrite_drops_what_nothing_reads_any_more():
    program = trace(lambda w, x: x * w["gain"], {"gain": normal(2, 4)}, (X,))
    assert list(program.weights) == ["gain"]
    changed = rewrite(program, lambda b, e, v: [v[0]] if e.primitive.name == "mul" else None, stage="s")
    assert not changed.weights and not changed.eqns


def test_a_new_weight_is_a_jax_value_in_every_trace():
    seen = []

    def make(builder, x):
        value = builder.weight("w", np.ones(4, np.float32))
        seen.append(isinstance(value, jax.Array))
        assert builder.weight("w") is value
        return [lax.add(x, value)]

    program = trace(lambda w, x: x, {}, (jax.ShapeDtypeStruct((4,), np.float32),))
    built = build(make, {}, program.input_avals, program.signature)
    assert seen == [True, True] and type(built.weights["w"]) is np.ndarray


def test_closing_over_an_array_is_an_error_of_the_pass():
    program = trace(lambda w, x: jnp.sin(x), {}, (X,))
    held = jnp.ones((2, 4))
    with pytest.raises(AssertionError, match="closed over an array"):
        rewrite(program, lambda b, e, v: [lax.add(v[0], held)], stage="s")


def test_live_equations_leave_out_what_nothing_reads():
    jaxpr = jax.make_jaxpr(lambda x: (jnp.exp(x), jnp.sin(x))[1])(normal(4))
    assert [e.primitive.name for e in replay.live_equations(jaxpr)] == ["sin"]


# Simplify


@pytest.mark.parametrize("fun", FUNCTIONS)
def test_simplify_keeps_outputs_op_by_op(fun):
    program = trace(fun, WEIGHTS, (X,))
    simple = simplify(program)
    for seed in range(3):
        x = [normal(2, 4, seed=seed)]
        assert _bits(simple.evaluate(x)) == _bits(program.evaluate(x))
    assert simplify(simple).text() == simple.text()
    assert len(simple.eqns) <= len(unroll(program).eqns)
    _compat.check_types(simple.jaxpr)


def test_simplify_folds_what_depends_on_weights_alone():
    def fun(w, x):
        return x * (w["scale"] * lax.rsqrt(jnp.abs(w["shift"]) + 1e-5))

    simple = simplify(trace(fun, WEIGHTS, (X,)))
    assert _names(simple) == ["mul"]
    (weight,) = simple.weights.values()
    assert weight.shape == (1, 4)
    x = normal(2, 4)
    assert _bits(simple.evaluate([x])) == _bits(trace(fun, WEIGHTS, (X,)).evaluate([x]))


def test_simplify_folds_control_flow_on_weights():
    def fun(w, x):
        return x + lax.scan(lambda c, v: (c @ v, None), w["scale"], w["stack"])[0]

    program = trace(fun, WEIGHTS, (X,))
    simple = simplify(program)
    assert _names(simple) == ["add"]
    assert _bits(simple.evaluate([normal(2, 4)])) == _bits(program.evaluate([normal(2, 4)]))


def test_simplify_merges_equal_equations():
    def fun(w, x):
        first = jnp.sin(x) * 2.0
        second = jnp.sin(x) * 2.0
        return first + second, jnp.sin(x) * 3.0

    assert _names(simplify(trace(fun, {}, (X,)))) == ["sin", "mul", "add", "mul"]


def test_simplify_keeps_equations_with_other_parameters_or_types():
    def fun(w, x):
        return x.astype(jnp.bfloat16), x.astype(jnp.float16), jnp.sum(x, axis=0), jnp.sum(x, axis=1)

    assert len(simplify(trace(fun, {}, (X,))).eqns) == 4


def _standard(w, x):
    return x + jax.random.normal(jax.random.PRNGKey(0), x.shape)


def _typed(w, x):
    return x + jax.random.uniform(jax.random.key(0), x.shape)


def _from_weight(w, x):
    return x + jax.random.uniform(w["key"], x.shape) + jax.random.uniform(w["key"], x.shape)


def _in_a_body(w, x):
    def step(key, _):
        key, sub = jax.random.split(key)
        return key, jax.random.uniform(sub, x.shape)

    return x + lax.scan(step, w["raw"], None, length=2)[1][0]


@pytest.mark.parametrize("fun", [_standard, _typed, _from_weight, _in_a_body])
def test_simplify_never_folds_or_merges_random_primitives(fun):
    def draws(eqns):
        here = sum(e.primitive.name in ("random_bits", "threefry2x32") for e in eqns)
        bodies = ((e.params.get("length", 1), _compat.open_jaxpr(sub)) for e in eqns for sub in _compat.sub_jaxprs(e))
        return here + sum(steps * draws(body.eqns) for steps, body in bodies)

    weights = {"key": jax.random.key(1), "raw": jax.random.PRNGKey(2)}
    program = trace(fun, weights, (X,))
    simple = simplify(program)
    assert draws(simple.eqns) == draws(program.eqns) > 0
    assert _bits(simple.evaluate([normal(2, 4)])) == _bits(program.evaluate([normal(2, 4)]))


def test_constants_are_computed_when_asked_for():
    program = trace(lambda w, x: x * jnp.exp(w["scale"]) + 2.0, WEIGHTS, (X,))
    constants = Constants(program)
    exp = next(e for e in program.eqns if e.primitive.name == "exp")
    assert exp.outvars[0] in constants and program.input_vars[0] not in constants
    value = constants.value(exp.outvars[0])
    assert type(value) is np.ndarray
    np.testing.assert_array_equal(value, np.asarray(jnp.exp(WEIGHTS["scale"])))
    assert constants.uniform(exp.outvars[0]) is None
    literal = next(v for e in program.eqns for v in e.invars if isinstance(v, _compat.Literal))
    assert constants.uniform(literal) == 2.0
