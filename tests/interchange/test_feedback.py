"""Encodings that are exported and fed back give the same integers, whatever the second calibration sees."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

import qcompiler as qc


def conv(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def residual(p, x):
    y = jax.nn.relu(conv(x, p["k"]) + p["b"])
    return jnp.mean(y + jax.nn.silu(conv(y, p["l"])), (1, 2)) @ p["w"]


def attention(p, x):
    q, k, v = (jnp.einsum("td,dhf->htf", x, p[n]) for n in "qkv")
    scores = jax.nn.softmax(jnp.einsum("htf,hsf->hts", q, k), axis=-1)
    return jnp.einsum("hts,hsf,hfd->td", scores, v, p["o"])


def looped(p, x):
    def step(h, row):
        h = jnp.tanh(h @ p["w"] + row @ p["u"] + p["b"])
        return h, h * 2.0

    return jax.lax.scan(step, jnp.zeros((8,), jnp.float32), x)[1]


def tied(p, x):
    """The first use has a bias, which makes room in a channel next to zero; so the two have other scales."""
    return jnp.sin(x @ p["w"] + p["b"]), (10.0 * x[::-1] + 1.0) @ p["w"]


def embedded(p, x):
    rows = p["table"][jnp.argmax(x, axis=-1)]
    return jnp.concatenate([rows, rows * jax.nn.sigmoid(x)], axis=-1) @ p["w"]


def small_channel():
    w = normal(8, 8)
    w[:, 3] *= np.float32(1e-12)
    return w


CASES = {
    "residual": (
        residual,
        {"k": normal(3, 3, 3, 8), "b": normal(8, seed=1), "l": normal(3, 3, 8, 8, seed=2), "w": normal(8, 4, seed=3)},
        normal(2, 6, 6, 3, seed=4),
    ),
    "attention": (
        attention,
        {n: normal(16, 2, 8, seed=k) for k, n in enumerate("qkv")} | {"o": normal(2, 8, 16, seed=5)},
        normal(6, 16, seed=6),
    ),
    "looped": (
        looped,
        {"w": normal(8, 8), "u": normal(4, 8, seed=1), "b": normal(8, seed=2)},
        normal(5, 4, seed=3),
    ),
    "tied": (tied, {"w": small_channel(), "b": normal(8, seed=2)}, normal(16, 8, seed=3)),
    "embedded": (embedded, {"table": normal(8, 8), "w": normal(16, 4, seed=1)}, normal(6, 8, seed=2)),
}


def same(a, b):
    assert a.params.keys() == b.params.keys()
    for name in a.params:
        np.testing.assert_array_equal(a.params[name], b.params[name], err_msg=name)


@pytest.mark.parametrize("format", ["aimet2", "qnn"])
@pytest.mark.parametrize("case", CASES)
def test_exported_encodings_give_the_same_integers(case, format, tmp_path):
    fun, params, x = CASES[case]
    first = qc.quantize(fun, [x], params=params, io="int", verify="types")
    first.export_encodings(tmp_path / "encodings.json", format)
    recipe = qc.interchange.load(tmp_path / "encodings.json")
    # Other data: every range would be another one.
    second = qc.quantize(fun, [np.float32(0.3) * x], params=params, recipe=recipe, io="int", verify="types")
    same(first, second)
    assert not second.report.unfollowed


def test_without_the_encodings_other_data_give_other_integers():
    fun, params, x = CASES["residual"]
    first, second = (qc.quantize(fun, [f * x], params=params, verify="types") for f in np.float32([1.0, 0.3]))
    assert any(not np.array_equal(first.params[n], w) for n, w in second.params.items())


@pytest.mark.parametrize(
    ("recipe", "format"),
    [
        (qc.Recipe(weight=qc.QuantType(4), granularity=qc.Granularity(channel_group=4)), "qnn"),
        (qc.Recipe(granularity="tensor", equalize=False), "aimet2"),
        (qc.Recipe(activation=qc.QuantType(16, symmetric=True)), "qnn"),
        (qc.Recipe(weight=qc.QuantType(3, symmetric=True, narrow_range=True), stream=qc.QuantType(10)), "aimet2"),
    ],
    ids=["w4_affine_groups", "tensor", "a16", "odd_bits"],
)
def test_other_types_come_back_from_a_default_recipe(recipe, format, tmp_path):
    fun, params, x = CASES["residual"]
    first = qc.quantize(fun, [x], params=params, recipe=recipe, verify="types")
    first.export_encodings(tmp_path / "encodings.json", format)
    again = qc.interchange.load(tmp_path / "encodings.json")
    second = qc.quantize(fun, [np.float32(0.3) * x], params=params, recipe=again, verify="types")
    np.testing.assert_array_equal(first(x), second(x))


def test_a_recipe_file_holds_encodings_exactly(tmp_path):
    fun, params, x = CASES["attention"]
    first = qc.quantize(fun, [x], params=params, io="int", verify="types")
    first.export_encodings(tmp_path / "encodings.json")
    qc.interchange.load(tmp_path / "encodings.json").save(tmp_path / "recipe.json")
    recipe = qc.Recipe.load(tmp_path / "recipe.json")
    same(first, qc.quantize(fun, [np.float32(0.3) * x], params=params, recipe=recipe, io="int", verify="types"))


def test_given_encodings_hold_at_every_batch_size(tmp_path):
    fun, params, x = CASES["residual"]
    first = qc.quantize(fun, [x], params=params, verify="types")
    first.export_encodings(tmp_path / "encodings.json")
    recipe = qc.interchange.load(tmp_path / "encodings.json")
    second = qc.quantize(fun, [np.float32(0.3) * x], params=params, recipe=recipe, verify="types")
    np.testing.assert_array_equal(second(x[:1]), first(x)[:1])


def test_names_of_another_program(tmp_path):
    fun, params, x = CASES["residual"]
    first = qc.quantize(fun, [x], params=params, verify="types")
    names = {"input:x": "image", "k": "stem.weight", "conv_general_dilated#0": "/stem/Relu_output_0"}
    first.export_encodings(tmp_path / "encodings.json", names=names)
    written = {e["name"] for e in json.loads((tmp_path / "encodings.json").read_text())["encodings"]}
    assert {"image", "stem.weight", "/stem/Relu_output_0", "/stem/Relu_output_0@int8"} <= written
    assert not {"input:x", "k", "conv_general_dilated#0"} & written
    recipe = qc.interchange.load(tmp_path / "encodings.json", names=names)
    second = qc.quantize(fun, [np.float32(0.3) * x], params=params, recipe=recipe, verify="types")
    np.testing.assert_array_equal(first(x), second(x))
    with pytest.raises(qc.RecipeError, match="would both be called 'w'"):
        first.export_encodings(tmp_path / "twice.json", names={"k": "w", "l": "w"})
    assert not (tmp_path / "twice.json").exists()
    # Without the names, the error says which are near.
    with pytest.raises(qc.RecipeError, match=r"encodings are of nothing that is stored.*\n.*\bimage"):
        qc.quantize(fun, [x], params=params, recipe=qc.interchange.load(tmp_path / "encodings.json"), verify="types")


def test_an_onnx_reader_computes_the_same_codes(tmp_path):
    """QuantizeLinear by its own formula, in NumPy, on what the file says: the codes are ours, shifted if unsigned."""
    fun, params, x = CASES["residual"]
    first = qc.quantize(fun, [x], params=params, io="int", verify="types")
    first.export_encodings(tmp_path / "encodings.json")
    entries = {e["name"]: e for e in json.loads((tmp_path / "encodings.json").read_text())["encodings"]}
    entry = entries["input:x"]
    codes = np.clip(np.rint(x / np.float32(entry["y_scale"])) + entry["y_zero_point"], 0, 255)
    ours = first.input_encodings["x"].quantize(x)
    # A division and a product with the reciprocal round differently: at most one code, and hardly ever.
    assert np.max(np.abs(codes - 128 - ours)) <= 1 and np.mean(codes - 128 != ours) < 0.01
    scale = np.asarray(entries["k"]["y_scale"], np.float32).reshape(
        [-1 if d == entries["k"]["axis"] else 1 for d in range(4)]
    )
    assert np.max(np.abs(params["k"] / scale)) <= 127.0 + 1e-4
