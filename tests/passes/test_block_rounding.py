"""Blocks of layers rounded together: better than one after the other where errors can make up for each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax

import qcompiler as qc
from qcompiler.errors import CalibrationError, RecipeError
from qcompiler.numerics.types import QuantType
from qcompiler.passes import _blocks, round_weights

W3 = QuantType(3, symmetric=True, narrow_range=True)
LAYER = qc.AdaRound(iterations=300, batch=128)
BLOCK = qc.AdaRound(iterations=300, batch=128, unit="block")
X = (normal(256, 4, seed=3) @ normal(4, 16, seed=4)).astype(np.float32)
WEIGHTS = {name: normal(16, 16, seed=n, scale=0.25) for n, name in enumerate("sabcde")}


def _residual(p, x):
    """A stem, two residual blocks, and a head."""
    x = jax.nn.relu(x @ p["s"])
    x = jax.nn.relu(x + jax.nn.relu(x @ p["a"]) @ p["b"])
    x = jax.nn.relu(x + jax.nn.relu(x @ p["c"]) @ p["d"])
    return x @ p["e"]


def _programs(passes, fun, weights, x, recipe=None):
    found = passes(fun, weights, [x], recipe or qc.Recipe(weight=W3), until="insert_qdq")
    return found["assign_precision"], found["insert_qdq"]


def _layers(real, simulated, most=8):
    return [[e.params["id"] for e in block.layers] for block in _blocks.blocks_of(real, simulated, most)]


def _error(real, program, x):
    return float(np.sum(np.square(np.asarray(real.evaluate([x])[0]) - np.asarray(program.evaluate([x])[0]))))


def test_blocks_lie_between_single_live_values(passes):
    real, simulated = _programs(passes, _residual, WEIGHTS, X)
    name = "dot_general#{}".format
    assert _layers(real, simulated) == [[name(0)], [name(1), name(2)], [name(3), name(4)], [name(5)]]
    assert _layers(real, simulated, most=1) == [[name(n)] for n in range(6)]
    # What a cut block hands on: its own result, and the residual that it only reads is no result of it.
    cut = _blocks.blocks_of(real, simulated, 1)
    assert [len(b.results) for b in cut] == [1] * 6 and [len(b.reads) for b in cut] == [1, 1, 2, 1, 2, 1]


def test_a_block_computes_what_the_simulation_does(passes):
    """With nearest weights its results are those of the walk; sums in another order round float32 otherwise."""
    real, simulated = _programs(passes, _residual, WEIGHTS, X)
    run = round_weights.Run(simulated, [[X]])
    for block in _blocks.blocks_of(real, simulated, 8):
        run.up_to(block.eqns[0])
        branch = run.branch([*block.reads, *block.results])
        branch.through(block.eqns[-1])
        weights = [round_weights._weight(run, eqn).nearest for eqn in block.layers]
        known = [run.constants.value(v) for v in block.known]
        results = block(weights, known, [branch.values(v)[0] for v in block.reads])
        for result, var in zip(results, block.results, strict=True):
            np.testing.assert_allclose(result, branch.values(var)[0], rtol=1e-5, atol=1e-5)


def _summed(p, x):
    """A block whose second layer adds up many features of few inputs each, as projections behind depthwise convs do."""
    x = x @ p["s"]
    return x + jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]


def _summed_case():
    signs = np.where(normal(64, 4, seed=5) > 0, 1, -1).astype(np.float32)
    weights = {"s": np.eye(4, dtype=np.float32), "up": normal(4, 64, seed=6), "bias": normal(64, seed=7), "down": signs}
    return weights, normal(256, 4, seed=8)


def test_errors_of_features_that_are_summed_cancel(passes):
    """Layer by layer, each feature of 4 inputs is rounded for itself, and signs on their codes can hardly make up."""
    weights, x = _summed_case()
    real, simulated = _programs(passes, _summed, weights, x)
    nearest, layer, block = (
        _error(real, simulated, x),
        *(
            _error(real, round_weights.apply(simulated, round_weights.decide(real, simulated, [[x]], options)), x)
            for options in (LAYER, BLOCK)
        ),
    )
    assert layer < nearest and block < 0.5 * layer, (nearest, layer, block)


def test_never_worse_than_layer_by_layer_or_nearest(passes):
    real, simulated = _programs(passes, _residual, WEIGHTS, X[:128])
    decision = round_weights.decide(real, simulated, [[X[:128]], [X[128:]]], BLOCK)
    assert len(decision.codes) == 6 and not decision.left
    assert all(after <= before for before, after in decision.errors.values())
    # Layers of one block have its error.
    assert decision.errors["dot_general#1"] == decision.errors["dot_general#2"] != decision.errors["dot_general#3"]


def test_weights_on_their_codes_stay_there(passes):
    """A permutation of integers, scaled by powers of two: the block's error is zero, and nothing can be better."""
    order = np.eye(4, dtype=np.float32)[[2, 0, 3, 1]]
    weights = {"s": np.eye(4, dtype=np.float32), "up": 2 * order, "down": 4 * order, "bias": np.zeros(4, np.float32)}
    x = np.random.default_rng(0).integers(0, 256, (64, 4)).astype(np.float32)
    x[0] = 0
    x[1] = 255
    recipe = qc.Recipe(weight=QuantType(3, symmetric=True, narrow_range=True), activation_range="minmax")
    real, simulated = _programs(passes, _summed, weights, x, recipe)
    decision = round_weights.decide(real, simulated, [[x]], BLOCK)
    codes = {"dot_general#0": 3 * np.eye(4), "dot_general#1": 3 * order, "dot_general#2": 3 * order}
    for region, wanted in codes.items():
        np.testing.assert_array_equal(decision.codes[region], wanted)


def test_an_interrupted_run_goes_on_and_ends_with_the_same(passes, tmp_path, monkeypatch):
    real, simulated = _programs(passes, _residual, WEIGHTS, X)
    kept = qc.AdaRound(**{**BLOCK.__dict__, "checkpoint": tmp_path})
    whole = round_weights.decide(real, simulated, [[X]], BLOCK)
    true, calls = round_weights._block_adaround.joint_codes, []

    def interrupts(block, *args):
        calls.append([e.params["id"] for e in block.layers])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return true(block, *args)

    monkeypatch.setattr(round_weights._block_adaround, "joint_codes", interrupts)
    with pytest.raises(KeyboardInterrupt):
        round_weights.decide(real, simulated, [[X]], kept)
    resumed = round_weights.decide(real, simulated, [[X]], kept)
    # The second block once more, and not the first.
    assert calls == [["dot_general#1", "dot_general#2"], *[["dot_general#3", "dot_general#4"]] * 2]
    assert whole.errors == resumed.errors
    for region, codes in whole.codes.items():
        np.testing.assert_array_equal(codes, resumed.codes[region])


def test_a_transformer_block_and_a_loop_between_at_other_batch_sizes():
    def fun(p, x):
        h = x @ p["s"]
        scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", h @ p["a"], h @ p["b"]))
        h = h + jnp.einsum("bts,bsd->btd", scores, h @ p["c"]) @ p["d"]
        h = lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["loop"])), (0, h))[1]
        return h @ p["e"]

    weights = {**WEIGHTS, "loop": normal(16, 16, seed=9, scale=0.2)}
    batches = [X[:64].reshape(8, 8, 16), X[64:128].reshape(8, 8, 16)]
    model = qc.quantize(fun, batches, params=weights, recipe=qc.Recipe(weight=W3, rounding=BLOCK))
    notes = model._quantized.programs["round_weights"].notes
    assert len(notes["rounded"]) == 6
    (looped,) = notes["left_nearest"].items()
    assert looped[0].endswith("dot_general#0") and "loop" in looped[1]
    (changed,) = [r.changed for r in model.report.passes if r.name == "round_weights"]
    assert changed.endswith(", 1 left nearest")
    parts = [model(batches[0][k : k + 2]) for k in range(0, 8, 2)]
    np.testing.assert_array_equal(np.concatenate(parts), model(batches[0]))


def test_bad_options_and_no_samples_are_refused(passes):
    with pytest.raises(RecipeError, match="unit of AdaRound is 'layer' or 'block', got 'net'"):
        qc.AdaRound(unit="net")
    with pytest.raises(RecipeError, match="block_layers of AdaRound is at least 1, got 0"):
        qc.AdaRound(block_layers=0)
    real, simulated = _programs(passes, _residual, WEIGHTS, X)
    with pytest.raises(CalibrationError, match="round weights: no calibration samples of these shapes were kept"):
        round_weights.decide(real, simulated, [], BLOCK)
