"""Types by recipe and by rule, as a user asks for them: what is stored, what goes in and out, and what it gains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qcompiler as qc
from qcompiler.debug.report import sqnr_db


def _normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


PARAMS = {"w": _normal(8, 12) * np.geomspace(0.01, 1, 12, dtype=np.float32), "b": _normal(12), "v": _normal(12, 4)}
X = _normal(32, 8, seed=1)


def _mlp(params, x):
    with jax.named_scope("enc"):
        y = jax.nn.relu(x @ params["w"] + params["b"])
    with jax.named_scope("out"):
        return y @ params["v"]


def _quantized(recipe):
    return qc.trace(_mlp, X, params=PARAMS, recipe=recipe).calibrate([X]).quantize(strict=True)


def _scales(quantized, name):
    """Distinct scales of a weight."""
    held = quantized.programs["fuse"].weights.items()
    (scale,) = (w for n, w in held if n.startswith(f"{name}:") and n.endswith("/scale"))
    return len(np.unique(scale))


@pytest.mark.parametrize("weight", [qc.QuantType(8), qc.QuantType(8, symmetric=True, narrow_range=True)], ids=str)
@pytest.mark.parametrize("activation", [qc.QuantType(8), qc.QuantType(16), qc.QuantType(16, symmetric=True)], ids=str)
def test_integers_in_and_out(weight, activation):
    """Verified on the probe, strict, in the types asked for, and without a float in the program."""
    recipe = qc.Recipe(weight=weight, activation=activation, output=activation, granularity=qc.Granularity(5))
    quantized = _quantized(recipe)
    codes, real = quantized.compile(io="int"), quantized.compile()
    entry, (exit,) = codes.input_encodings["x"], codes.output_encodings
    assert entry.type == exit.type == activation
    codes.check_integer_only()
    out = codes(entry.quantize(X))
    assert out.dtype == activation.dtype
    np.testing.assert_array_equal(exit.dequantize(out), real(X))


@pytest.mark.parametrize(
    ("granularity", "scales"), [("tensor", 1), ("channel", 12), (qc.Granularity(4), 3), (qc.Granularity(5), 3)]
)
def test_granularity(granularity, scales):
    assert _scales(_quantized(qc.Recipe(granularity=granularity, equalize=False)), "w") == scales


def test_a_rule_has_its_own_granularity_and_activations():
    rule = qc.Rule(path="enc", granularity="tensor", activation=qc.QuantType(16), weight=qc.QuantType(6))
    quantized = _quantized(qc.Recipe(rules=(rule,)))
    assert (_scales(quantized, "w"), _scales(quantized, "v")) == (1, 4)
    assert quantized.compile().input_encodings["x"].type == qc.QuantType(16)


def test_a_rule_on_the_granularity_of_layers_without_weights():
    rule = qc.Rule(path="act", granularity="tensor")

    def fun(params, x):
        with jax.named_scope("act"):
            x = jnp.tanh(x)
        return x @ params["w"]

    with pytest.raises(qc.RecipeError, match="granularity to the weight of layers that have none: act"):
        qc.quantize(fun, [X], params=PARAMS, recipe=qc.Recipe(rules=(rule,)))


def test_the_16x8_recipe_leaves_the_error_of_the_weights():
    """Weights that are codes have none: what is left is that of 16 bits. Ordinary ones hold it near that of 8."""
    level = {}
    for name in ("default", "int16x8"):
        exact = {"w": np.round(np.clip(_normal(8, 12), -2, 2) * 63).astype(np.float32)}
        exact["w"][0] = 127
        qmodel = qc.quantize(lambda p, x: x @ p["w"], [X], params=exact, recipe=name, strict=True)
        level[name] = sqnr_db([np.asarray(qmodel.float(X))], [np.asarray(qmodel(X))])
    assert level["default"] < 55 and level["int16x8"] > 75
