"""Sensitivity: losses of layers against the compiler's own simulation, what they predict, and the table."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qcompiler as qc
from qcompiler import sensitivity as analysis
from qcompiler.candidates import NAMED
from qcompiler.debug import progress
from qcompiler.debug.report import sqnr_db
from qcompiler.numerics.types import ACTIVATION, WEIGHT
from qcompiler.passes import _unroll

CONV = ("NHWC", "HWIO", "NHWC")
OUTPUT_METRICS = ("nsr", "mse", "kl_nats")


def _conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=CONV)


def _net(params, x):
    """Two convs, the second one around a shortcut, and a head that gives logits."""
    with jax.named_scope("stem"):
        x = jax.nn.relu(_conv(x, params["stem"]) + params["bias"])
    with jax.named_scope("block"):
        x = jax.nn.relu(x + _conv(x, params["block"]))
    with jax.named_scope("head"):
        return jnp.mean(x, axis=(1, 2)) @ params["head"]


def _params(seed=0):
    draw = np.random.default_rng(seed)
    normal = lambda *shape, by: (draw.normal(size=shape) / np.sqrt(by)).astype(np.float32)
    return {
        "stem": normal(3, 3, 3, 8, by=27),
        "bias": normal(8, by=10),
        "block": normal(3, 3, 8, 8, by=72),
        "head": normal(8, 5, by=1),
    }


def _images(count=16, seed=1):
    return np.random.default_rng(seed).normal(size=(count, 6, 6, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def calibrated():
    x = _images()
    return qc.trace(_net, x, params=_params()).calibrate([x])


@pytest.fixture(scope="module")
def measured(calibrated):
    return calibrated.sensitivity(candidates=("int4", "int8", "int16"), metric=OUTPUT_METRICS, mode="both")


STEM, BLOCK, HEAD = "stem/conv_general_dilated#0", "block/conv_general_dilated#0", "head/dot_general#0"


def _simulated_sqnr(calibrated, x, **changes):
    """SQNR in dB of the program with the compiler's own pairs, no activation widened."""
    recipe = qc.Recipe(activation_sqnr=None, pair_sqnr=None, **changes)
    simulated = calibrated.quantize(recipe).programs["insert_qdq"]
    return sqnr_db(calibrated.program(x), simulated(x))


def test_layers_are_the_regions_with_a_product(measured):
    rows = {row.layer: row for row in measured.rows}
    assert list(rows) == [STEM, BLOCK, HEAD]
    assert rows[STEM].macs == 16 * 36 * 27 * 8 and rows[STEM].weights == 27 * 8
    assert rows[HEAD].module_path == "head" and rows[HEAD].primitive == "dot_general"


@pytest.mark.parametrize("candidate", ["int4", "int8"])
@pytest.mark.parametrize("layer", [STEM, BLOCK, HEAD])
def test_a_layer_loses_what_quantizing_it_alone_by_rules_loses(calibrated, measured, layer, candidate):
    path = layer.partition("/")[0]
    rules = (NAMED[candidate].rule(path), qc.Rule(path="*", primitive="conv*", keep_float=True))
    rules += (qc.Rule(path="*", primitive="dot*", keep_float=True),)
    if path == "head":
        rules = rules[:2]
    simulated = _simulated_sqnr(calibrated, _images(), rules=rules)
    # The simulation also rounds biases to the accumulator's step and values between layers to 16 bits: less than a
    # twentieth of the layer's noise by amplitude, which is 0.4 dB where all of it has the same sign.
    assert -10 * np.log10(measured.table("nsr")[layer][candidate]) == pytest.approx(simulated, abs=0.2)


def test_all_layers_together_are_the_simulation_of_the_compiler(calibrated, measured):
    simulated = _simulated_sqnr(calibrated, _images())
    # Biases and values between layers, as above.
    assert -10 * np.log10(measured.measure("int8", "nsr")) == pytest.approx(simulated, abs=0.2)


def test_finer_candidates_lose_less_and_floats_nothing(calibrated, measured):
    for metric in OUTPUT_METRICS:
        rows = measured.table(metric).values()
        assert all(losses["int4"] > 10 * losses["int8"] for losses in rows)
        # They differ in activations alone, and weights make most of the noise.
        assert sum(losses["int8"] for losses in rows) > sum(losses["int16"] for losses in rows) > 0
    metrics = (*OUTPUT_METRICS, "fisher_mse", "hessian_mse")
    floats = calibrated.sensitivity(candidates=("float32",), metric=metrics, draws=1)
    assert all(set(row.one_quantized.values()) == {0.0} for row in floats.rows)
    assert floats.measure("float32", "nsr") == 0


def test_half_precision_rounds_what_is_stored():
    draw = np.random.default_rng(2)
    x, w = (draw.normal(size=shape).astype(np.float32) for shape in ((32, 24), (24, 8)))
    calibrated = qc.trace(lambda w, x: x @ w, x, params=w).calibrate([x])
    (found,) = calibrated.sensitivity(candidates=("bfloat16", "float16"), metric="mse").table().values()
    for name in ("bfloat16", "float16"):
        halves = [np.asarray(jnp.asarray(a).astype(name), np.float64) for a in (x, w)]
        error = halves[0] @ halves[1] - x.astype(np.float64) @ w
        # Sums in float32 are off by some 2**-24 of them, beside an error of some 2**-12.
        assert found[name] == pytest.approx(np.mean(error**2), rel=1e-2)


def test_weights_or_activations_alone(calibrated):
    both = qc.Candidate(WEIGHT, ACTIVATION)
    found = calibrated.sensitivity(
        candidates={
            "both": both,
            "weights": dataclasses.replace(both, activation=None),
            "activations": dataclasses.replace(both, weight=None),
        },
        metric="mse",
    ).table()
    for losses in found.values():
        # Roundings of the two are independent; 16 images leave a third of scatter.
        assert losses["both"] == pytest.approx(losses["weights"] + losses["activations"], rel=0.35)


@pytest.mark.parametrize("metric", ["nsr", "kl_nats"])
def test_predicted_losses_are_near_the_measured_ones(measured, metric):
    mixed = {STEM: "int8", BLOCK: "int4", HEAD: "int8"}
    for config in ("int8", "int4", mixed, {BLOCK: "int4", HEAD: "int4"}):
        predicted, real = measured.predict(config, metric), measured.measure(config, metric)
        # Three layers, whose errors are correlated a little: within 1.5 dB.
        assert 10 * abs(np.log10(predicted / real)) < 1.5


def test_one_layer_measures_what_its_row_says(measured):
    for row in measured.rows:
        for metric, loss in row.one_quantized.items():
            assert measured.measure({row.layer: row.candidate}, metric) == loss


def test_the_other_order_says_what_a_float_layer_recovers(measured):
    for layer in measured.layers:
        rest = {other: "int4" for other in measured.layers if other != layer}
        recovered = measured.measure("int4", "mse") - measured.measure(rest, "mse")
        assert measured.table("mse", "one_float")[layer]["int4"] == recovered


def _user_metric(outputs_float, outputs_quantized, batch):
    assert batch.args[0].shape == (16, 6, 6, 3)
    return jnp.max(jnp.abs(outputs_float - outputs_quantized))


def test_a_metric_of_ones_own(calibrated):
    found = calibrated.sensitivity(candidates=("int8",), metric=(_user_metric, "mse"))
    assert found.metrics == ("_user_metric", "mse")
    for row in found.rows:
        assert row.one_quantized["_user_metric"] ** 2 > row.one_quantized["mse"] > 0


def _planted(params, x):
    for name in ("a", "b", "c", "d"):
        with jax.named_scope(name):
            x = jnp.tanh(x @ params[name])
    with jax.named_scope("head"):
        return x @ params["head"]


@pytest.mark.parametrize("bad", ["b", "d"])
def test_a_planted_bad_layer_ranks_first_under_every_metric(bad):
    """One weight a hundred times as large as the others takes their bits, where a scale is shared by the tensor."""
    draw = np.random.default_rng(3)
    params = {name: (draw.normal(size=(16, 16)) / 4).astype(np.float32) for name in ("a", "b", "c", "d")}
    params["head"] = (draw.normal(size=(16, 6)) / 2).astype(np.float32)
    x = draw.normal(size=(32, 16)).astype(np.float32)
    x[:, 0] *= 1e-3
    # Tanh is next to zero where the large weight acts on a small value alone.
    params[bad] = params[bad].copy()
    params[bad][0, 0] = 25.0
    coarse = qc.Candidate(dataclasses.replace(WEIGHT, bits=6), ACTIVATION, "tensor")
    metrics = (*OUTPUT_METRICS, "fisher_kl_nats", "fisher_mse", "hessian_kl_nats", "hessian_mse")
    found = (
        qc.trace(_planted, x, params=params)
        .calibrate([x])
        .sensitivity(candidates={"coarse": coarse}, metric=metrics, mode="both", draws=64)
    )
    for metric in metrics:
        losses = {layer: row["coarse"] for layer, row in found.table(metric).items()}
        assert max(losses, key=losses.get).startswith(f"{bad}/"), metric
    for metric in OUTPUT_METRICS:
        losses = {layer: row["coarse"] for layer, row in found.table(metric, "one_float").items()}
        assert max(losses, key=losses.get).startswith(f"{bad}/"), metric


def _looped(params, x):
    def step(h, x):
        with jax.named_scope("cell"):
            h = jnp.tanh(x @ params["in"] + h @ params["rec"])
        return h, h

    h, _ = lax.scan(step, jnp.zeros((x.shape[0], 8), x.dtype), jnp.swapaxes(x, 0, 1))
    with jax.named_scope("head"):
        return h @ params["out"]


def _looped_params():
    draw = np.random.default_rng(5)
    shapes = {"in": (4, 8), "rec": (8, 8), "out": (8, 3)}
    return {k: (draw.normal(size=s) / np.sqrt(s[0])).astype(np.float32) for k, s in shapes.items()}


def test_layers_in_loops(monkeypatch):
    monkeypatch.setattr(_unroll, "MOST_EQUATIONS", 0)
    params, x = _looped_params(), np.random.default_rng(6).normal(size=(8, 5, 4)).astype(np.float32)
    calibrated = qc.trace(_looped, x, params=params).calibrate([x])
    found = calibrated.sensitivity(candidates=("int4", "int8"), metric=("nsr", "fisher_mse", "hessian_mse"))
    rows = {row.layer: row for row in found.rows if row.candidate == "int4"}
    assert len(rows) == 3 and sum(layer.startswith("head/") for layer in rows) == 1
    inside = [row for layer, row in rows.items() if "scan" in layer]
    assert sorted(row.macs for row in inside) == [5 * 8 * 4 * 8, 5 * 8 * 8 * 8]
    simulated = _simulated_sqnr(calibrated, x)
    # A loop's carry is stored in 16 bits between steps, and a product of a few activations has no finer noise.
    assert -10 * np.log10(found.measure("int8", "nsr")) == pytest.approx(simulated, abs=0.5)
    for row in inside:
        # Of weights that every step reads the errors are the same in each, of which Fisher sums the gradients.
        measured = found.measure({row.layer: "int4"}, "fisher_mse")
        assert measured / 3 < row.one_quantized["fisher_mse"] < 3 * measured


def _branched(params, x, flip):
    with jax.named_scope("choice"):
        x = lax.cond(flip, lambda x: x @ params["in"], lambda x: x @ params["out"], x)
    return x


def test_layers_in_branches():
    draw = np.random.default_rng(0)
    params = {k: draw.normal(size=(6, 6)).astype(np.float32) for k in ("in", "out")}
    batches = [(draw.normal(size=(4, 6)).astype(np.float32), np.bool_(flip)) for flip in (True, False)]
    calibrated = qc.trace(_branched, *batches[0], params=params).calibrate(batches)
    found = calibrated.sensitivity(candidates=("int4", "int8"), metric="mse", samples=batches)
    assert len(found.layers) == 2 and found.samples == 2
    for losses in found.table().values():
        assert losses["int4"] > 10 * losses["int8"] > 0


def test_products_of_activations_know_no_weight_type():
    def attention(x):
        with jax.named_scope("scores"):
            return jnp.einsum("bqd,bkd->bqk", x, x * 0.5)

    x = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
    network = analysis.Switchable(qc.trace(attention, x).calibrate([x]).program, qc.Recipe(), dict(NAMED))
    (layer,) = network.layers
    assert layer.weights == 0
    names = ["float32", *NAMED]
    same = {names[row]: names[network.same_as(layer.id, row)] for row in range(1, len(names))}
    assert same == {
        "int4": "int4", "int4_group32": "int4", "int8": "int4", "int16": "int16",
        "float16": "float16", "bfloat16": "bfloat16", "float32": "float32",
    }  # fmt: skip


def test_the_same_numbers_every_time_and_after_an_interruption(calibrated, monkeypatch):
    analyze = lambda: calibrated.sensitivity(candidates=("int4",), metric=("mse", "fisher_kl_nats"), draws=2)
    first = analyze()
    with monkeypatch.context() as patch:
        patch.setattr(progress.ProgressBar, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            analyze()
    assert analyze() == first


def test_several_batches_are_averaged(calibrated):
    x = _images(48, seed=9)
    parts = [x[:16], x[16:32], x[32:]]
    together = calibrated.sensitivity(samples=parts, candidates=("int8",), metric=("mse", "kl_nats"))
    alone = [calibrated.sensitivity(samples=[p], candidates=("int8",), metric=("mse", "kl_nats")) for p in parts]
    assert together.samples == 48 and alone[0].samples == 16
    for metric in ("mse", "kl_nats"):
        for layer in together.layers:
            mean = np.mean([s.table(metric)[layer]["int8"] for s in alone])
            assert together.table(metric)[layer]["int8"] == pytest.approx(mean, rel=1e-6)


def test_json_keeps_everything_but_the_program(measured):
    again = qc.Sensitivity.from_json(measured.to_json())
    assert again == measured and again.predict("int4") == measured.predict("int4")
    assert str(again) == str(measured)
    with pytest.raises(qc.RecipeError, match="no program to measure"):
        again.measure("int4")
    infinite = dataclasses.replace(measured.rows[0], one_quantized={"nsr": float("inf")})
    lost = dataclasses.replace(measured, rows=(infinite,), metrics=("nsr",))
    assert qc.Sensitivity.from_json(lost.to_json()) == lost
    with pytest.raises(qc.RecipeError, match="no sensitivity"):
        qc.Sensitivity.from_json(json.dumps({"rows": []}))


def test_the_table_is_sorted_by_loss(measured):
    head, *lines = str(measured).splitlines()
    assert head.split()[:4] == ["layer", "multiply-adds", "weights", "candidate"] and len(lines) == 9
    column = head.split().index("nsr")
    # "SQNR dB" is one column in two words.
    losses = [float(line.split()[column - 1]) for line in lines]
    assert losses == sorted(losses, reverse=True)


def test_tiers_weigh_losses_by_criticality(measured):
    losses = {layer: row["int4"] for layer, row in measured.table("nsr").items()}
    order = sorted(losses, key=losses.get, reverse=True)
    assert measured.tiers((1 / 3, 1 / 3)) == dict(zip(("high", "medium", "low"), ((x,) for x in order), strict=True))
    last = order[-1].partition("/")[0]
    # The first glob that matches decides.
    tiers = measured.tiers((1 / 3, 1 / 3), criticality={last: 1e6, "*": 1.0})
    assert tiers == {"high": (order[2],), "medium": (order[0],), "low": (order[1],)}
    assert measured.tiers((1 / 3, 1 / 3), criticality={"*": 1.0, last: 1e6})["high"] == (order[0],)
    assert measured.tiers((0, 0))["low"] == tuple(order)


def test_plots(measured, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    measured.plot(tmp_path / "losses.svg", "mse")
    assert "int16" in (tmp_path / "losses.svg").read_text()


def test_plots_without_matplotlib(measured, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(qc.QuantizationError, match="matplotlib"):
        measured.plot(tmp_path / "losses.svg")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"metric": "sqnr"}, "unknown metric 'sqnr'; known: nsr, mse"),
        ({"metric": ()}, "no metric"),
        ({"metric": "fisher_loss"}, "loss="),
        ({"candidates": ("int3",)}, "unknown candidate 'int3'"),
        ({"candidates": {"mine": 8}}, "'mine' is a qc.Candidate"),
        ({"candidates": ()}, "no candidates"),
        ({"mode": "all"}, "unknown mode"),
        ({"draws": 0}, "at least 1"),
        ({"metric": lambda a, b, batch: a - b}, "not a number"),
    ],
)
def test_bad_options(calibrated, options, message):
    with pytest.raises(qc.RecipeError, match=message):
        calibrated.sensitivity(**options)


def test_bad_questions(measured):
    with pytest.raises(qc.RecipeError, match="no layer is called 'stern'"):
        measured.predict({"stern": "int4"})
    with pytest.raises(qc.RecipeError, match="no candidate is called 'int5'"):
        measured.measure("int5")
    with pytest.raises(qc.RecipeError, match="'fisher_mse' was not measured"):
        measured.table("fisher_mse")
    with pytest.raises(qc.RecipeError, match="criticality of 'stern\\*' is of no layer"):
        measured.tiers(criticality={"stern*": 2.0})
    with pytest.raises(qc.RecipeError, match="share"):
        measured.tiers((0.8, 0.4))


def test_samples_of_other_shapes(calibrated):
    with pytest.raises(qc.CalibrationError, match="shapes"):
        calibrated.sensitivity(samples=[_images(4)], metric="mse")
    with pytest.raises(qc.CalibrationError, match="NaN"):
        calibrated.sensitivity(samples=[np.full((16, 6, 6, 3), np.nan, np.float32)], metric="mse")


def test_a_model_without_products():
    x = np.ones((2, 3), np.float32)
    with pytest.raises(qc.QuantizationError, match="no layer with a product"):
        qc.trace(lambda x: x + 1.0, x).calibrate([x]).sensitivity()


def test_kl_needs_logits():
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    fn = lambda params, x: jnp.squeeze(x @ params, -1)
    calibrated = qc.trace(fn, x, params=np.ones((3, 1), np.float32)).calibrate([x])
    for metric in ("kl_nats", "fisher_kl_nats"):
        with pytest.raises(qc.RecipeError, match="logits"):
            calibrated.sensitivity(metric=metric)
