"""Loops over time, loops until a condition, and branches on data compile to integers inside, and count as such."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from islands import solved
from jax import lax

import qcompiler as qc
from qcompiler.debug import census
from qcompiler.debug.report import sqnr_db
from qcompiler.errors import CalibrationError, IslandError, RecipeError
from qcompiler.ir import loops
from qcompiler.models import llama
from qcompiler.passes._unroll import MOST_EQUATIONS

STEPS = MOST_EQUATIONS
PARAMS = {
    "w": normal(8, 8, scale=0.4),
    "u": normal(8, 8, seed=1, scale=0.4),
    "b": normal(8, seed=2),
}
X = normal(4, 8, seed=3)
XS = normal(STEPS, 4, 8, seed=4)


def _recurrent(p, xs, reverse=False):
    def step(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, 2 * h

    h, ys = lax.scan(step, jnp.zeros(xs.shape[1:]), xs, reverse=reverse)
    return ys, h


def _counted(p, x):
    body = lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"]) + s[1])
    return lax.while_loop(lambda s: s[0] < 5, body, (0, x))[1]


def _until(p, x):
    """Stops when what it computes is small."""
    body = lambda s: (s[0] + 1, 0.7 * s[1] + 0.1 * jnp.tanh(s[1] @ p["w"]))
    return lax.while_loop(lambda s: (jnp.max(jnp.abs(s[1])) > 0.8) & (s[0] < 10), body, (0, x))[1]


def _branch(p, x, n):
    return lax.cond(n > 2, lambda a: jax.nn.relu(a @ p["w"]), lambda a: a * 3.0, x) @ p["u"]


def _switch(p, x, n):
    return lax.switch(n, [jnp.zeros_like, jnp.exp, lambda a: a @ p["w"]], x)


def _nested(p, xs):
    """A branch and a loop in a loop."""

    def step(h, x):
        h = lax.cond(jnp.sum(x) > 0, lambda h: jnp.tanh(h @ p["u"]), lambda h: h, h)
        h = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] + x)), (0, h))[1]
        return h, None

    return lax.scan(step, jnp.zeros(xs.shape[1:]), xs)[0]


def _half(p, xs):
    """In bfloat16; what the loop gives is read by a conversion."""
    half = lambda x: x.astype(jnp.bfloat16)

    def step(h, x):
        h = jnp.tanh(x + h @ half(p["w"]))
        return h, h

    return lax.scan(step, half(jnp.zeros(xs.shape[1:])), half(xs))[1].astype(jnp.float32)


def _chained(p, x):
    """A loop reads what a loop gives."""
    y = lax.fori_loop(0, STEPS + 1, lambda _, h: jnp.tanh(h @ p["w"]) + x, x)
    return lax.while_loop(lambda s: s[0] < 4, lambda s: (s[0] + 1, s[1] * 0.9), (0, y))[1]


def _handed_on(p, xs):
    """Part of what it carries never changes."""
    step = lambda s, x: ((s[0], jnp.tanh(s[1] + x)), s[0] * 2)
    return lax.scan(step, (xs[1], xs[0]), xs)


N = np.int32
CASES = {
    "scan": (_recurrent, [(XS,)]),
    "reverse": (lambda p, xs: _recurrent(p, xs, reverse=True), [(XS,)]),
    "counted": (_counted, [(X,)]),
    "until": (_until, [(X,)]),
    "branch": (_branch, [(X, N(1)), (X, N(4))]),
    "switch": (_switch, [(X, N(k)) for k in range(3)]),
    "nested": (_nested, [(XS,)]),
    "half": (_half, [(XS,)]),
    "chained": (_chained, [(X,)]),
    "handed_on": (_handed_on, [(XS,)]),
}


@pytest.mark.parametrize("name", CASES)
def test_bodies_are_integers(name):
    fun, batches = CASES[name]
    qmodel = qc.quantize(fun, batches, params=PARAMS, strict=True)
    for batch in batches:
        expected, got = jax.tree.leaves(fun(PARAMS, *batch)), jax.tree.leaves(qmodel(*batch))
        simulated = jax.tree.leaves(qmodel.simulate(*batch))
        for e, g, s in zip(expected, got, simulated, strict=True):
            # int8 operands of products leave 38 dB or more of one; hundreds of steps and a condition share them.
            assert np.array_equal(e, g) or sqnr_db([e], [g]) > 30
            assert np.array_equal(s, g) or sqnr_db([s], [g]) > 45
    assert qmodel.report.integer_mac_share == 1
    control = {e.primitive.name for e in qmodel.program.eqns} & {"scan", "while", "cond"}
    assert control, "the loop has not been dissolved"


@pytest.mark.parametrize("name", CASES)
def test_the_whole_program_is_integers(name):
    fun, batches = CASES[name]
    qmodel = qc.quantize(fun, batches, params=PARAMS, io="int", verify="types")
    assert not census.float_avals(qmodel.program)
    if name == "nested":
        qmodel.check_integer_only()


def test_a_decoder_that_generates_in_a_loop():
    """The prompt at once, then token by token until there are enough; the cache is carried in codes."""
    config, more = llama.LlamaConfig(width=32, depth=1, heads=4, kv_heads=2, hidden=64, context=16), 8
    params = llama.init(jax.random.key(0), config)

    def generate(p, prompt):
        best = lambda logits: jnp.argmax(logits[:, -1:], -1).astype(jnp.int32)
        logits, cache = llama.step(config, p, prompt, llama.empty_cache(config, len(prompt)), jnp.int32(0))
        made = lax.dynamic_update_slice_in_dim(jnp.zeros((len(prompt), more), jnp.int32), best(logits), 0, 1)

        def body(state):
            n, made, cache = state
            token = lax.dynamic_slice_in_dim(made, n, 1, 1)
            logits, cache = llama.step(config, p, token, cache, prompt.shape[1] + n)
            return n + 1, lax.dynamic_update_slice_in_dim(made, best(logits), n + 1, 1), cache

        return lax.while_loop(lambda state: state[0] < more - 1, body, (0, made, cache))[1]

    prompt = np.random.default_rng(0).integers(0, 256, (3, 6)).astype(np.int32)
    qmodel = qc.quantize(generate, [prompt], params=params, strict=True, verify="types")
    # Random weights tell the best token from the next by little; once one differs, all behind it may.
    assert np.mean(qmodel(prompt) == generate(params, prompt)) > 0.5
    (loop,) = [e for e in qmodel.program.eqns if e.primitive.name == "while" and len(e.outvars) == 4]
    assert {v.aval.dtype.kind for v in loop.outvars} == {"i"}


def test_other_batch_sizes_give_the_same_rows():
    qmodel = qc.quantize(_recurrent, [(XS,)], params=PARAMS, verify="types")
    (ys, h), (first, one) = qmodel(XS), jax.jit(qmodel)(XS[:, :1])
    np.testing.assert_array_equal(ys[:, :1], first)
    np.testing.assert_array_equal(h[:1], one)


def test_other_lengths_use_the_same_codes():
    qmodel = qc.quantize(_recurrent, [(XS,)], params=PARAMS, verify="types")
    np.testing.assert_array_equal(qmodel(XS[:-1])[0], qmodel(XS)[0][:-1])


def test_rules_reach_into_bodies():
    def quantized(path):
        recipe = qc.Recipe(rules=(qc.Rule(path, "dot_general", keep_float=True),))
        return qc.trace(_recurrent, XS, params=PARAMS, recipe=recipe).calibrate([(XS,)]).quantize()

    islands = quantized("scan_0").report.islands
    assert {i.primitive for i in islands} == {"dot_general"}
    assert sum(i.mac_share for i in islands) == pytest.approx(1)
    with pytest.raises(RecipeError, match="matches no layer"):
        quantized("scan_1")


def test_what_stays_float_in_a_body_is_listed():
    def fun(p, x):
        body = lambda s: (s[0] + 1, jnp.tanh(solved(s[1]) @ p["w"]))
        return lax.while_loop(lambda s: s[0] < 4, body, (0, x))[1]

    with pytest.warns(UserWarning, match="triangular_solve"):
        qmodel = qc.quantize(fun, [(X,)], params=PARAMS)
    (island,) = qmodel.report.islands
    assert island.primitive == "triangular_solve" and island.source.startswith("tests")
    assert sqnr_db([fun(PARAMS, X)], [qmodel(X)]) > 27
    with pytest.raises(IslandError, match="triangular_solve"):
        qc.quantize(fun, [(X,)], params=PARAMS, strict=True)


def test_a_branch_that_calibration_never_runs_is_refused():
    with pytest.raises(CalibrationError, match="no batch runs that branch"):
        qc.quantize(_branch, [(X, N(1))], params=PARAMS)


def test_what_is_carried_keeps_one_encoding():
    """The range of what is carried covers what is read and what is made, so nothing is converted on the way."""
    calibrated = qc.trace(_counted, X, params=PARAMS).calibrate([(X,)])
    fused = calibrated.quantize().programs["fuse"]
    (loop,) = loops.loops_of(fused)
    (_, body) = loops.bodies(fused, loop)
    assert [str(a.dtype) for a in body.program.input_avals] == ["int32", "int16"]
    requantized = [e.params["type"].bits for e in body.program.eqns if e.primitive.name == "qc_requantize"]
    assert requantized == [8]


def test_dumps_show_the_bodies():
    program = qc.trace(_counted, X, params=PARAMS).calibrate([(X,)]).quantize().programs["insert_qdq"]
    assert "qc_fake_quantize" in program.text().partition("while[")[2].partition("yield")[2]
