"""The strategy guide: what is measured of a program, which rows apply, and that nothing of the advice is lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_input import refused
from draws import normal

import qcompiler as qc
from qcompiler import cli, strategy
from qcompiler.ir import serialize
from qcompiler.numerics.types import STREAM


def conv(x, w, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


def separable(p, x):
    x = jax.nn.relu6(conv(x, p["stem"]))
    x = jax.nn.relu6(conv(x, p["depthwise"], groups=8))
    return jnp.mean(conv(x, p["pointwise"]), (1, 2)) @ p["head"]


SEPARABLE = {
    "stem": normal(3, 3, 3, 8),
    "depthwise": normal(3, 3, 1, 8, seed=1),
    "pointwise": normal(1, 1, 8, 512, seed=2),
    "head": normal(512, 4, seed=3),
}
IMAGES = normal(2, 6, 6, 3)


def attention(p, tokens):
    x = p["table"][tokens]
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + np.float32(1e-6))
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    x = x + jax.nn.softmax(q @ k.T) @ v
    return jax.nn.silu(x @ p["up"]) @ p["down"]


ATTENTION = {
    **{n: normal(16, 16, seed=k) for k, n in enumerate("qkv")},
    "table": normal(64, 16, seed=4),
    "up": normal(16, 48, seed=5),
    "down": normal(48, 16, seed=6),
}
TOKENS = np.arange(6, dtype=np.int32)


def plain(p, x):
    return jax.nn.relu(x @ p["w"]) @ p["v"]


PLAIN = {"w": normal(8, 16), "v": normal(16, 8, seed=1)}


def advised(fun, params, x, **constraints):
    """Field -> value that is advised; and the recommendation."""
    found = qc.recommend(fun, x, params=params, **constraints)
    return {name: value for r in found.reasons for name, value in r.settings.items()}, found


def test_what_is_measured():
    c = qc.recommend(separable, IMAGES, params=SEPARABLE).characteristics
    assert c.elements == sum(w.size for w in SEPARABLE.values()) and c.float_bytes == 4 * c.elements
    assert [w.depthwise for w in c.weights] == [False, True, False, False]
    assert c.depthwise_share == 72 / c.elements and not c.embedding_share
    assert c.conv_share > 0.9 and c.conv_share + c.dot_share == pytest.approx(1.0)
    c = qc.recommend(attention, TOKENS, params=ATTENTION).characteristics
    assert c.embedding_share == ATTENTION["table"].size / c.elements
    assert (c.attention, c.norms) == (2, 1) and c.curved >= 1 and c.conv_share == 0
    spread = {"w": PLAIN["w"] * np.float32([100] + [1] * 15), "v": PLAIN["v"]}
    assert qc.recommend(plain, normal(2, 8), params=spread).characteristics.spread > 50


def test_a_plain_model_gets_the_default_recipe():
    settings, found = advised(plain, PLAIN, normal(2, 8))
    assert settings.keys() == {"weight", "granularity"} and found.recipe == qc.Recipe()
    assert [r.when for r in found.reasons] == ["always"]


@pytest.mark.parametrize(
    ("model", "constraints", "expected"),
    [
        ((separable, SEPARABLE, IMAGES), {}, {"bias_correction": "empirical"}),
        ((separable, SEPARABLE, IMAGES), {"size": True}, {"granularity": "group32", "rounding": "adaround"}),
        ((attention, ATTENTION, TOKENS), {}, {"pair_sqnr": 35.0, "migrate": True, "activation_range": "mse"}),
        ((attention, ATTENTION, TOKENS), {"size": True}, {"granularity": "group32", "rounding": "gptq"}),
        ((plain, PLAIN, normal(2, 8)), {"accuracy": True}, {"activation": STREAM}),
        ((plain, PLAIN, normal(2, 8)), {"accuracy": 0.05}, {"activation": STREAM}),
        ((plain, PLAIN, normal(2, 8)), {"accuracy": 1.0}, {"weight": qc.Recipe().weight}),
        ((plain, PLAIN, normal(2, 8)), {"latency": True}, {"activation_sqnr": None}),
    ],
    # Names, so that every process of the tests collects the same.
    ids=lambda x: x[0].__name__ if isinstance(x, tuple) else str(x),
)
def test_what_is_advised(model, constraints, expected):
    settings, _ = advised(*model, **constraints)
    assert {name: settings.get(name, "nothing") for name in expected} == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 9])
def test_a_size_is_met_with_the_most_bits_that_fit(bits):
    elements = sum(w.size for w in PLAIN.values())
    settings, found = advised(plain, PLAIN, normal(2, 8), size=elements * bits // 8)
    assert found.recipe.weight.bits == settings["weight"].bits == min(8, bits)
    assert found.weight_bytes == elements * min(8, bits) // 8
    assert "precision" not in settings and found.recipe.granularity == qc.Granularity()
    between, found = advised(plain, PLAIN, normal(2, 8), size=elements * bits // 8 + elements // 16)
    assert found.weight_bytes <= elements * bits // 8 + elements // 16
    if bits < 8:
        steps = 0.25 if bits <= 4 else 0.0
        assert between["precision"].weight_bits == bits + 0.5 - steps
    assert (between["granularity"] == "group32") == (bits <= 4)


def test_few_weights_keep_8_bits_where_there_is_room():
    elements = sum(w.size for w in SEPARABLE.values())
    _, tight = advised(separable, SEPARABLE, IMAGES, size=elements // 2)
    assert not tight.recipe.encodings
    _, found = advised(separable, SEPARABLE, IMAGES, size=True)
    kept = {name.rpartition("@")[2] for name in found.recipe.encodings}
    # The head is a third of the weights, so not it, but the depthwise kernel.
    assert kept == {"conv_general_dilated#1"}
    assert elements / 2 < found.weight_bytes <= elements * 0.55
    # What is left of a size that is given goes where it is measured to help.
    _, found = advised(separable, SEPARABLE, IMAGES, size=int(elements * 0.55))
    assert not found.recipe.encodings and found.recipe.precision.weight_bits == pytest.approx(4.4 - 0.25, abs=2e-3)
    assert elements / 2 < found.weight_bytes <= elements * 0.55


@pytest.mark.parametrize(
    "constraints", [{"size": True}, {"size": 4000}, {"accuracy": True}, {"latency": True}], ids=str
)
@pytest.mark.parametrize("model", [(separable, SEPARABLE, IMAGES), (attention, ATTENTION, TOKENS)], ids=["conv", "dot"])
def test_nothing_of_the_advice_is_lost(model, constraints):
    settings, found = advised(*model, **constraints)
    made = dataclasses.replace(qc.Recipe(), **settings)
    assert found.recipe == made
    assert all(f"{name}={strategy._short(value)}" in str(found) for name, value in settings.items())


def test_later_rows_stand_and_others_are_not_named():
    _, found = advised(plain, PLAIN, normal(2, 8), size=True)
    given = [name for r in found.reasons for name in r.settings]
    assert len(given) == len(set(given))


def test_the_table_prints():
    text = str(qc.recommend(separable, IMAGES, params=SEPARABLE, size=True))
    assert "depthwise            1.1% of the elements" in text
    assert "weight=int4sn" in text and "the size allows less than 8 bits per weight: the most bits" in text
    assert all(row.when and row.why for row in strategy.TABLE)


@pytest.mark.parametrize(
    ("model", "constraints"),
    [
        pytest.param((separable, SEPARABLE, IMAGES), {"size": 4000}, marks=pytest.mark.slow),
        ((separable, SEPARABLE, IMAGES), {"size": True}),
        ((attention, ATTENTION, TOKENS), {"latency": True}),
    ],
    ids=["separable", "separable_small", "attention_fast"],
)
def test_the_recipe_quantizes_the_model(model, constraints):
    fun, params, x = model
    recipe = qc.recommend(fun, x, params=params, **constraints).recipe
    qmodel = qc.quantize(fun, [x], params=params, recipe=recipe, strict=True, verify="types")
    if recipe.precision is not None:
        assert qmodel.precision.totals["weight_bits"] <= recipe.precision.weight_bits < 8
        return
    bits = [t.bits for types in qmodel._quantized.program.notes["types"].values() for t in types if t and t.axis]
    assert recipe.weight.bits in bits and (8 in bits) == bool(recipe.encodings or recipe.weight.bits == 8)


def test_shapes_alone_are_enough():
    x = jax.ShapeDtypeStruct((2, 8), np.float32)
    assert qc.recommend(plain, x, params=PLAIN).recipe == qc.Recipe()


def test_constraints_that_cannot_be():
    ask = lambda **constraints: qc.recommend(plain, normal(2, 8), params=PLAIN, **constraints)
    with refused(qc.RecipeError, "size=10 cannot be reached", "2 bits per weight are 64 bytes"):
        ask(size=10)
    with refused(qc.RecipeError, "latency and accuracy cannot both go first"):
        ask(latency=True, accuracy=True)
    with refused(qc.RecipeError, "unknown target 'abacus'"):
        ask(target="abacus")
    for wrong in ({"latency": 3}, {"accuracy": "high"}, {"accuracy": -1.0}, {"size": float("nan")}):
        with refused(qc.RecipeError, next(iter(wrong)), repr(next(iter(wrong.values())))):
            ask(**wrong)


def test_on_the_command_line(tmp_path, capsys):
    traced = qc.trace(separable, IMAGES, params=SEPARABLE)
    serialize.save(traced.program, tmp_path / "model.qcprogram")
    arguments = [
        "recommend",
        str(tmp_path / "model.qcprogram"),
        "--size",
        "4000",
        "--save",
        str(tmp_path / "recipe.json"),
    ]
    assert cli.main(arguments) == 0
    expected = qc.recommend(separable, IMAGES, params=SEPARABLE, size=4000)
    assert capsys.readouterr().out == f"{expected}\n"
    assert qc.Recipe.load(tmp_path / "recipe.json") == expected.recipe
    serialize.save(traced.calibrate([IMAGES]).program, tmp_path / "calibrated.qcprogram")
    assert cli.main(["recommend", str(tmp_path / "calibrated.qcprogram")]) == 1
    assert "a traced one is needed" in capsys.readouterr().err
    assert cli.main(["recommend", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
