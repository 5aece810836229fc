"""`passes._unroll`: what loops and branches that are known beforehand become."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qcompiler.ir import tracing
from qcompiler.passes._unroll import MOST_EQUATIONS, MOST_LAYERS, unroll
from qcompiler.passes.simplify import simplify

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)).astype(np.float32)


def _traced(fun, weights, *inputs):
    return tracing.trace(fun, weights, inputs, parameter_names=tuple(f"x{k}" for k in range(len(inputs))))


def _names(program):
    return [e.primitive.name for e in program.eqns]


def _same(program, *inputs):
    """The program unrolled, which gives what it gave; rounding may differ where XLA fuses otherwise."""
    out = unroll(program)
    for a, b in zip(program(*inputs), out(*inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    return out


def _stack(p, x):
    return lax.scan(lambda h, w: (jax.nn.relu(h @ w), jnp.sum(h)), x, p["w"])


def test_layers_have_weights_of_their_own():
    program = _traced(_stack, {"w": RNG.normal(size=(9, 4, 4)).astype(np.float32)}, X)
    out = simplify(_same(program, X))
    assert _names(out).count("dot_general") == 9 and "scan" not in _names(out)
    assert sorted(w.shape for w in out.weights.values()) == [(4, 4)] * 9
    dots = [out.ids[e.outvars[0]] for e in out.eqns if e.primitive.name == "dot_general"]
    assert [name.split("/")[0] for name in dots] == [str(k) for k in range(9)]


@pytest.mark.parametrize("reverse", [False, True])
def test_short_loops_over_inputs(reverse):
    fun = lambda p, x: lax.scan(lambda h, t: (jnp.tanh(h + t), h * t), x[0], x, reverse=reverse)
    assert "scan" not in _names(_same(_traced(fun, {}, X), X))


def test_loops_in_loops():
    def fun(p, x):
        inner = lambda h, w: (lax.fori_loop(0, 2, lambda _, y: jnp.tanh(y @ w), h), None)
        return lax.scan(inner, x, p["w"])[0]

    program = _traced(fun, {"w": RNG.normal(size=(3, 4, 4)).astype(np.float32)}, X)
    assert _names(_same(program, X)).count("dot_general") == 6


def test_what_carries_nothing_is_one_body_for_all_steps():
    rows = RNG.normal(size=(MOST_LAYERS + 1, 4)).astype(np.float32)
    program = _traced(lambda p, x: lax.map(lambda row: jnp.tanh(p["w"] @ row), x), {"w": X}, rows)
    assert _names(_same(program, rows)).count("dot_general") == 1


@pytest.mark.parametrize("index", [-1, 0, 1, 5])
def test_a_known_branch_is_taken(index):
    branches = [jnp.tanh, jnp.exp, jnp.sin]
    program = _traced(lambda p, x: lax.switch(jnp.array(index), branches, x), {}, X)
    assert {"tanh", "exp", "sin"} & set(_names(_same(program, X))) == {["tanh", "exp", "sin"][min(max(index, 0), 2)]}


@pytest.mark.parametrize(
    "fun",
    [
        lambda p, x: lax.fori_loop(0, MOST_EQUATIONS + 1, lambda _, y: jnp.tanh(y), x),
        lambda p, x: lax.cond(x[0, 0] > 0, jnp.tanh, jnp.exp, x),
        lambda p, x: lax.while_loop(lambda y: jnp.sum(y) > 1, jnp.tanh, x),
    ],
    ids=["long", "branch", "while"],
)
def test_others_stay_as_they_are(fun):
    program = _traced(fun, {}, X)
    assert unroll(program) is program
