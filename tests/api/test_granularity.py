"""Weights in groups and in few bits, from a recipe to the running integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qcompiler as qc
from qcompiler.debug import census, reference

W4 = qc.QuantType(4, symmetric=True, narrow_range=True)
W4A8 = qc.Recipe(weight=W4, granularity="group32")


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def spread(*shape):
    """Weights whose range differs 16-fold and more from one stretch of 32 inputs to the next."""
    *_, inputs, _ = shape
    ranges = np.exp2(-2.0 * (np.arange(inputs) // 32 % 4))[:, None]
    return (normal(*shape) * ranges / np.sqrt(inputs)).astype(np.float32)


def mlp(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b"]) @ p["w2"]


def convnet(p, x):
    conv = lambda x, w, groups=1: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )
    x = jax.nn.relu(conv(x, p["stem"]))
    x = jax.nn.relu(conv(x, p["depthwise"], 64))
    return jax.nn.relu(conv(x, p["conv"])).mean((1, 2)) @ p["head"]


MODELS = {
    "mlp": (mlp, {"w1": spread(128, 64), "b": normal(64), "w2": spread(64, 10)}, (128,)),
    "convnet": (
        convnet,
        {"stem": normal(3, 3, 3, 64) / 5, "depthwise": normal(3, 3, 1, 64) / 3} |
        {"conv": spread(3, 3, 64, 32), "head": spread(32, 10)},
        (5, 5, 3),
    ),
}  # fmt: skip


def quantized(model, recipe, **options):
    fun, params, shape = MODELS[model]
    return qc.quantize(fun, [normal(8, *shape, seed=s) for s in (1, 2)], params=params, recipe=recipe, **options)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_w4a8_in_groups_is_integers_whole(model, symmetric):
    recipe = qc.Recipe(weight=qc.QuantType(4, symmetric=symmetric), granularity="group32")
    qmodel, whole = quantized(model, recipe, io="int"), quantized(model, qc.Recipe(), io="int")
    assert qmodel.report.islands == () and qmodel.report.qdq_pairs_after == 0
    assert qmodel.report.qdq_pairs_before == whole.report.qdq_pairs_before
    assert census.float_avals(qmodel.program) == []
    qmodel.check_integer_only()


@pytest.mark.parametrize(
    ("model", "weight"),
    [
        ("mlp", W4),
        ("mlp", qc.QuantType(3)),
        ("mlp", qc.QuantType(2, symmetric=True)),
        ("convnet", qc.QuantType(4)),
    ],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
def test_integers_are_those_of_the_reference(model, weight):
    qmodel = quantized(model, qc.Recipe(weight=weight, granularity="group32"), io="int")
    program = qmodel._quantized.program
    codes = reference.input_codes(program, [normal(8, *MODELS[model][2], seed=1)])
    (expected,) = reference.evaluate(program, codes, io="int")
    np.testing.assert_array_equal(qmodel(*codes), expected)


def error_db(qmodel, model):
    fun, params, shape = MODELS[model]
    x = normal(64, *shape, seed=5)
    expected = np.asarray(fun(params, x), np.float64)
    return 10 * np.log10(np.mean(expected**2) / np.mean((np.asarray(qmodel(x), np.float64) - expected) ** 2))


def test_groups_help_where_ranges_differ_along_the_input():
    """Steps of their own for ranges of 1, 1/4, 1/16, 1/64: each group's noise shrinks with its range.

    With one step per channel every group has the noise of the widest; the mean of the four squares is a third of that,
    4.8 dB less.
    """
    channel = quantized("mlp", qc.Recipe(weight=W4, granularity="channel"))
    assert error_db(quantized("mlp", W4A8), "mlp") > error_db(channel, "mlp") + 4


def test_groups_do_nothing_for_eight_bits():
    channel, group = quantized("mlp", qc.Recipe()), quantized("mlp", qc.Recipe(granularity="group32"))
    x = normal(8, 128, seed=1)
    np.testing.assert_array_equal(channel(x), group(x))
    assert channel.params.keys() == group.params.keys()


def test_weights_take_half_a_byte():
    four, eight = quantized("mlp", qc.Recipe(weight=W4)), quantized("mlp", qc.Recipe())
    weights = 128 * 64 + 64 * 10
    assert sum(a.nbytes for a in four.params.values() if a.dtype == np.uint8) == weights // 2
    assert eight.report.weight_bytes - four.report.weight_bytes == weights // 2
    # A byte of step per 32 weights besides.
    assert quantized("mlp", W4A8).report.weight_bytes - four.report.weight_bytes <= weights // 32


def test_no_int8_weight_is_held():
    """The compiled program has the packed bytes as a constant, not what is made of them."""
    qmodel = quantized("mlp", W4A8, weights="constant")
    text = jax.jit(qmodel).lower(normal(8, 128, seed=1)).compile().as_text()
    constants = [line.partition(" constant(")[0] for line in text.splitlines() if " constant(" in line]
    assert any(f"u8[{128 * 64 // 2}]" in line for line in constants)
    assert not any("s8[128,64]" in line or f"s8[{128 * 64}]" in line for line in constants)


def test_a_row_has_one_result_at_every_batch_size():
    qmodel = quantized("mlp", W4A8)
    x = normal(8, 128, seed=7)
    np.testing.assert_array_equal(qmodel(x[:3]), np.asarray(qmodel(x))[:3])
    np.testing.assert_array_equal(jax.vmap(qmodel)(x[:, None])[:, 0], qmodel(x))


def test_the_simulation_of_groups_is_differentiable():
    qmodel = quantized("mlp", W4A8)
    x = jnp.asarray(normal(8, 128, seed=1))
    grad = jax.grad(lambda x: jnp.sum(qmodel.simulate(x) ** 2))(x)
    fun, params, _ = MODELS["mlp"]
    expected = jax.grad(lambda x: jnp.sum(fun(params, x) ** 2))(x)
    # The gradient of a program of 4-bit weights: the direction is kept, not each number.
    cosine = jnp.sum(grad * expected) / jnp.linalg.norm(grad) / jnp.linalg.norm(expected)
    assert cosine > 0.95


def test_weights_in_loops_are_packed():
    def run(p, x):
        step = lambda h, row: (jax.nn.relu(row @ p["in"] + h @ p["own"]),) * 2
        return lax.scan(step, jnp.zeros((x.shape[1], 64)), x)[1]

    params = {"in": spread(64, 64), "own": spread(64, 64)}
    x = normal(2, 2, 64)
    qmodel = qc.quantize(run, [x], params=params, recipe=W4A8, io="int")
    program = qmodel._quantized.program
    codes = reference.input_codes(program, [x])
    np.testing.assert_array_equal(qmodel(*codes), reference.evaluate(program, codes, io="int")[0])
    assert sum(a.nbytes for a in qmodel.params.values() if a.dtype == np.uint8) == 64 * 64


def test_embedding_tables_are_packed():
    def embed(p, ids):
        return p["table"][ids] @ p["w"]

    params = {"table": normal(50, 32), "w": spread(32, 8)}
    ids = np.arange(50).reshape(5, 10)
    qmodel = qc.quantize(embed, [ids], params=params, recipe=qc.Recipe(weight=W4), io="int")
    assert sum(a.nbytes for a in qmodel.params.values() if a.dtype == np.uint8) == (50 * 32 + 32 * 8) // 2
    program = qmodel._quantized.program
    expected = reference.evaluate(program, reference.input_codes(program, [ids]), io="int")[0]
    # A wide region is within one step of float64; that step is multiplied by weights, and rounded, behind it.
    off = np.abs(np.asarray(qmodel(ids), np.int64) - expected)
    assert off.max() <= 0.01 * np.abs(expected).max()


def test_programs_of_groups_are_saved_and_loaded(tmp_path):
    from qcompiler.ir import serialize

    program = quantized("mlp", W4A8)._quantized.program
    serialize.save(program, tmp_path / "packed.qcprogram")
    loaded = serialize.load(tmp_path / "packed.qcprogram")
    assert loaded.text() == program.text()
    x = normal(8, 128, seed=1)
    np.testing.assert_array_equal(reference.evaluate(loaded, [x])[0], reference.evaluate(program, [x])[0])


@pytest.mark.parametrize("wrong", [0, -32, 2.5])
def test_groups_of_no_number_of_weights_are_refused(wrong):
    with pytest.raises(qc.RecipeError, match="input_group is a number of weights of at least 1"):
        qc.Granularity(input_group=wrong)
