"""Learned and compensated rounding: better than nearest where that loses, the same where it does not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax

import qcompiler as qc
from qcompiler import recipe_files
from qcompiler.errors import CalibrationError, RecipeError, SerializationError
from qcompiler.ir import loops
from qcompiler.numerics.types import QuantType
from qcompiler.passes import _gptq, _layerwise, round_weights
from qcompiler.passes._layerwise import Weight

W4 = QuantType(4, symmetric=True, narrow_range=True)
QUICK = qc.AdaRound(iterations=300, batch=128)
METHODS = {"adaround": QUICK, "gptq": qc.GPTQ()}


def _correlated(rows, width, seed=0):
    """Samples whose inputs move together, so that errors of weights can cancel each other."""
    return (normal(rows, width // 4, seed=seed) @ normal(width // 4, width, seed=seed + 1)).astype(np.float32)


WEIGHTS = {"w": normal(16, 12), "b": normal(12, seed=1), "v": normal(12, 8, seed=2)}
X = _correlated(256, 16, seed=3)


def _mlp(p, x):
    return jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"]


def _decide(passes, fun, weights, x, options, weight=W4):
    found = passes(fun, weights, [x], qc.Recipe(weight=weight), until="insert_qdq")
    real, simulated = found["assign_precision"], found["insert_qdq"]
    decision = round_weights.decide(real, simulated, [[x]], options)
    return real, simulated, decision, round_weights.apply(simulated, decision)


def _error(real, program, x):
    return float(np.sum(np.square(np.asarray(real.evaluate([x])[0]) - np.asarray(program.evaluate([x])[0]))))


@pytest.mark.parametrize(
    "qtype",
    [W4, QuantType(2, symmetric=True), QuantType(3), QuantType(8), QuantType(8, symmetric=True, narrow_range=True)],
    ids=lambda t: t.name,
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_weight_on_its_codes_stays_there(qtype, dtype):
    """What makes rounded weights weights like any others: quantizing codes * scale gives the codes back."""
    rng = np.random.default_rng(0)
    scale = (10.0 ** rng.uniform(-8, 4, (1, 500))).astype(np.float32)
    codes = np.repeat(np.arange(qtype.qmin, qtype.qmax + 1)[:, None], 500, axis=1)
    zero = rng.integers(-3, 1, (1, 500)) if not qtype.symmetric else np.zeros((1, 500))
    weight = Weight(np.zeros(codes.shape, dtype), scale, zero.astype(np.int32), qtype)
    on_codes = Weight(weight.at(codes), scale, weight.zero_point, qtype)
    np.testing.assert_array_equal(on_codes.codes, codes)
    np.testing.assert_array_equal(on_codes.nearest, on_codes.array)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_loses_less_than_with_nearest(passes, method, bits):
    weight = QuantType(bits, symmetric=True, narrow_range=True)
    real, nearest, decision, rounded = _decide(passes, _mlp, WEIGHTS, X, METHODS[method], weight)
    assert list(decision.errors) == ["dot_general#0", "dot_general#1"] and not decision.left
    # Of 16 inputs that lie in 4 dimensions, most of the error of each can be made up for by others.
    first, second = (after / before for before, after in decision.errors.values())
    assert first < 0.4 and second < 0.8, decision.errors
    assert _error(real, rounded, X) < 0.6 * _error(real, nearest, X)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_on_its_codes_is_left_alone(passes, method):
    codes = np.random.default_rng(0).integers(-7, 8, (16, 12))
    codes[0] = 7
    weights = {"w": (codes * np.float32(0.125)).astype(np.float32), "b": WEIGHTS["b"]}
    fun = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"])
    # Inputs on their codes too, so that nothing is left to make up for.
    x = np.random.default_rng(1).integers(-128, 128, (64, 16)).astype(np.float32)
    x[0, :2] = -128, 127
    recipe = qc.Recipe(weight=W4, activation_range="minmax")
    found = passes(fun, weights, [x], recipe, until="insert_qdq")
    decision = round_weights.decide(found["assign_precision"], found["insert_qdq"], [[x]], METHODS[method])
    np.testing.assert_array_equal(decision.codes["dot_general#0"], codes)


def _conv(x, w, groups=1):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_and_depthwise_ones(passes, method):
    weights = {"c": normal(3, 3, 3, 8, seed=1), "d": normal(3, 3, 1, 8, seed=2), "e": normal(1, 1, 8, 4, seed=3)}

    def fun(p, x):
        y = jax.nn.relu6(_conv(x, p["c"]))
        return _conv(jax.nn.relu(_conv(y, p["d"], 8)), p["e"])

    # Neighbours in a picture are alike.
    x = np.cumsum(normal(8, 8, 8, 3), axis=1).astype(np.float32)
    real, nearest, decision, rounded = _decide(passes, fun, weights, x, METHODS[method])
    assert len(decision.codes) == 3
    assert all(after <= before for before, after in decision.errors.values())
    assert _error(real, rounded, x) < 0.7 * _error(real, nearest, x)


def test_a_weight_that_others_read_is_rounded_in_a_copy(passes):
    weights = {"w": normal(16, 16)}
    fun = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"].T
    _, nearest, decision, rounded = _decide(passes, fun, weights, X, QUICK)
    assert len(decision.codes) == 2
    names = [n for n in rounded.weights if ":rounded@" in n]
    assert len(names) == 2 and rounded.stage == "round_weights"
    # Each region has the codes that were decided for it.
    for eqn in _layerwise.layers_of(rounded):
        _, weight = _layerwise.weight_behind(rounded, _layerwise.Constants(rounded), eqn)
        np.testing.assert_array_equal(weight.codes, decision.codes[eqn.params["id"]])
    assert "w" in nearest.weights


def test_layers_around_a_loop_are_rounded_and_those_in_it_are_not():
    def fun(p, x):
        h = jax.nn.relu(x @ p["w"])
        count = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["loop"]))
        h = lax.while_loop(lambda c: c[0] < 3, count, (0, h))[1]
        return h @ p["v"]

    weights = {"w": normal(16, 12), "loop": normal(12, 12, scale=0.3), "v": normal(12, 8, seed=2)}
    recipe = qc.Recipe(weight=W4, rounding=QUICK)
    model = qc.quantize(fun, [X[:64], X[64:128]], params=weights, recipe=recipe)
    program = model._quantized.programs["round_weights"]
    assert len(loops.loops_of(program)) == 1
    assert sorted(program.notes["rounded"]) == ["dot_general#0", "dot_general#1"]


@pytest.mark.parametrize("rounding", [QUICK, qc.GPTQ(), qc.SequentialMSE()], ids=lambda r: type(r).__name__)
def test_other_batch_sizes_give_the_same(rounding):
    batches = [X[:64], X[64:128]]
    model = qc.quantize(_mlp, batches, params=WEIGHTS, recipe=qc.Recipe(weight=W4, rounding=rounding))
    whole = np.asarray(model(X[:64]))
    np.testing.assert_array_equal(np.concatenate([model(X[k : k + 16]) for k in range(0, 64, 16)]), whole)
    simulated = np.concatenate([model.simulate(X[k : k + 16]) for k in range(0, 64, 16)])
    # Sums in another order round the last float32 bits otherwise, which may move a value to the next int16 code.
    np.testing.assert_allclose(simulated, np.asarray(model.simulate(X[:64])), atol=2e-3)
    (changed,) = [r.changed for r in model.report.passes if "squared error times" in r.changed]
    assert "2 layers" in changed


def _best(x, w, scale, qtype):
    """The least squared error of any codes, by trying all of them."""
    everything = np.array(list(itertools.product(range(qtype.qmin, qtype.qmax + 1), repeat=len(w)))) * scale
    return np.min(np.sum(np.square((everything - w) @ x.T), axis=1))


def test_gptq_comes_near_to_exhaustive_rounding():
    qtype = QuantType(3, symmetric=True)
    costs = []
    for seed in range(40):
        x, w = _correlated(32, 4, seed) + normal(32, 4, seed=seed + 7, scale=0.3), normal(4, seed=seed)
        scale = np.full((1, 4, 1), np.abs(w).max() / 3, np.float32)
        zero = np.zeros((1, 4, 1), np.int32)
        codes = _gptq.compensated_codes(x[None], w[None, :, None], scale, zero, qtype, qc.GPTQ())
        nearest = np.clip(np.rint(w / scale[0, :, 0]), qtype.qmin, qtype.qmax)
        cost = lambda c, x=x, w=w, scale=scale: float(np.sum(np.square((c * scale[0, 0, 0] - w) @ x.T)))
        costs.append((cost(nearest), cost(codes[0, :, 0]), _best(x, w, scale[0, 0, 0], qtype)))
    nearest, gptq, best = np.exp(np.mean(np.log(costs), axis=0))
    assert all(b <= g * (1 + 1e-6) for _, g, b in costs)
    # Greedy, so not always the best; nearest loses more than twice as much.
    assert gptq < 1.2 * best and nearest > 2 * best, (nearest, gptq, best)


@pytest.mark.parametrize(
    "options", [qc.GPTQ(), qc.GPTQ(act_order=False), qc.GPTQ(block=3)], ids=["order", "none", "block"]
)
def test_gptq_of_independent_inputs_is_nearest(options):
    x = np.eye(8, dtype=np.float32)[None] * np.arange(1, 9, dtype=np.float32)
    w, scale = normal(1, 8, 5), np.full((1, 8, 5), 0.3, np.float32)
    codes = _gptq.compensated_codes(x, w, scale, np.zeros((1, 8, 5), np.int32), QuantType(4), options)
    np.testing.assert_array_equal(codes, np.clip(np.rint(w / np.float32(0.3)), -8, 7))


def test_gptq_is_judged_by_the_rounding_that_it_makes_up_for(passes):
    weights = {"w": normal(16, 32), "v": normal(32, 8, seed=2)}

    def behind_a_crude_layer(p, x):
        with jax.named_scope("crude"):
            h = x @ p["w"]
        return h @ p["v"]

    crude = qc.Rule(path="crude", weight=QuantType(2, symmetric=True))
    found = passes(behind_a_crude_layer, weights, [X], qc.Recipe(weight=W4, rules=(crude,)), until="insert_qdq")
    real, simulated = found["assign_precision"], found["insert_qdq"]
    decision = round_weights.decide(real, simulated, [[X]], qc.GPTQ())
    nearest, rounded = decision.errors["dot_general#0"]
    # What the crude layer lost is far more than what rounding the next one adds, and GPTQ takes most of that away.
    assert 5 * nearest < _error(real, simulated, X) and rounded < 0.5 * nearest


def test_gptq_does_not_depend_on_the_size_of_blocks():
    x, w, scale = _correlated(64, 16)[None], normal(1, 16, 5), np.abs(normal(1, 16, 5, seed=4)) * 0.1 + np.float32(0.1)
    x = x + normal(1, 64, 16, seed=9, scale=0.5)
    run = lambda block: _gptq.compensated_codes(
        x, w, scale, np.zeros((1, 16, 5), np.int32), QuantType(4), qc.GPTQ(block=block)
    )
    np.testing.assert_array_equal(run(5), run(128))


@pytest.mark.parametrize("method", ["adaround", "gptq", "seq_mse"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same(tmp_path, monkeypatch, method):
    deep = {k: normal(16, 16, seed=n) for n, k in enumerate("abcd")}

    def fun(p, x):
        for name in "abcd":
            x = jax.nn.relu(x @ p[name])
        return x

    def run(folder):
        options = {"adaround": QUICK, "gptq": qc.GPTQ(), "seq_mse": qc.SequentialMSE()}[method]
        options = type(options)(**{**options.__dict__, "checkpoint": folder})
        recipe = qc.Recipe(weight=W4, rounding=options)
        return qc.quantize(fun, [X[:64], X[64:]], params=deep, recipe=recipe, verify="types")

    whole = run(None)
    true, calls = _layerwise.Layer.values, []

    def interrupts(self, wanted, batch, *, simulated):
        calls.append(self.id)
        if self.id == "dot_general#2":
            raise KeyboardInterrupt
        return true(self, wanted, batch, simulated=simulated)

    monkeypatch.setattr(_layerwise.Layer, "values", interrupts)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 2
    calls.clear()
    monkeypatch.setattr(_layerwise.Layer, "values", lambda *a, **k: calls.append(a[0].id) or true(*a, **k))
    resumed = run(tmp_path)
    assert set(calls) == {"dot_general#2", "dot_general#3"}
    assert whole.params.keys() == resumed.params.keys()
    for name, array in whole.params.items():
        np.testing.assert_array_equal(array, resumed.params[name])
    # Other options are another run.
    calls.clear()
    next(tmp_path.glob("*.npz")).write_bytes(b"PK damaged")
    with pytest.raises(SerializationError, match=r"is damaged .*; delete it, and dot_general#\d is rounded again"):
        run(tmp_path)


def test_rounding_without_samples_is_refused(passes):
    found = passes(_mlp, WEIGHTS, [X], qc.Recipe(weight=W4), until="insert_qdq")
    with pytest.raises(CalibrationError, match="round weights: no calibration samples of these shapes were kept"):
        round_weights.decide(found["assign_precision"], found["insert_qdq"], [], QUICK)


def test_methods_survive_recipe_files(tmp_path):
    recipe = qc.Recipe(rounding=qc.AdaRound(iterations=7, scales=qc.SequentialMSE(candidates=5), unit="block"))
    recipe_files.save(recipe, tmp_path / "recipe.json")
    assert recipe_files.load(tmp_path / "recipe.json") == recipe


def test_bad_options_are_refused():
    with pytest.raises(RecipeError, match="unknown rounding 'down'; known: 'adaround', 'gptq', 'nearest', 'seq_mse'"):
        qc.Recipe(rounding="down")
    with pytest.raises(RecipeError, match="iterations of AdaRound is at least 1, got 0"):
        qc.AdaRound(iterations=0)
    with pytest.raises(RecipeError, match="damping of GPTQ is positive, got 0"):
        qc.GPTQ(damping=0)
    with pytest.raises(RecipeError, match=r"scales is a qc\.SequentialMSE or None, got 'mse'"):
        qc.GPTQ(scales="mse")
    with pytest.raises(RecipeError, match="candidates of SequentialMSE is at least 2, got 1"):
        qc.SequentialMSE(candidates=1)
