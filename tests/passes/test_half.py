"""A layer that a rule keeps in another float: an island with casts, its weights stored so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

import qcompiler as qc
from qcompiler.debug.report import sqnr_db
from qcompiler.errors import RecipeError

WEIGHTS = {"w": normal(8, 8), "b": normal(8, seed=1), "v": normal(8, 4, seed=2)}
BATCHES = [normal(16, 8, seed=3)]


def _model(p, x):
    with jax.named_scope("mlp"):
        y = jax.nn.relu(x @ p["w"] + p["b"])
    with jax.named_scope("head"):
        return y @ p["v"]


def _quantized(keep, weights=WEIGHTS, batches=BATCHES, path="mlp"):
    recipe = qc.Recipe(rules=(qc.Rule(path=path, keep_float=keep),))
    with pytest.warns(UserWarning, match="in float"):
        return qc.quantize(_model, batches, params=weights, recipe=recipe)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_island_computes_in_its_dtype(dtype):
    """Bit for bit what a function written in that dtype gives, from what the island reads."""
    qmodel = _quantized(dtype, path="*")
    cast = lambda a: jnp.asarray(a).astype(dtype)

    @jax.jit
    def by_hand(x):
        y = jax.nn.relu(cast(x) @ cast(WEIGHTS["w"]) + cast(WEIGHTS["b"])).astype(jnp.float32)
        return (cast(y) @ cast(WEIGHTS["v"])).astype(jnp.float32)

    np.testing.assert_array_equal(qmodel(BATCHES[0]), by_hand(BATCHES[0]))
    np.testing.assert_array_equal(qmodel.simulate(BATCHES[0]), by_hand(BATCHES[0]))


def test_the_dtype_is_listed_and_its_weights_are_half_as_large():
    half, whole = _quantized("bfloat16"), _quantized(True)
    (island,) = half.report.islands
    assert island.reason == "the recipe keeps it in bfloat16" and "in float" in whole.report.islands[0].reason
    assert whole.report.weight_bytes - half.report.weight_bytes == 2 * (64 + 8)
    (y,) = [w for n, w in half.params.items() if w.shape == (8, 8)]
    assert y.dtype == jnp.bfloat16


def test_float32_changes_nothing():
    np.testing.assert_array_equal(_quantized("float32")(BATCHES[0]), _quantized(True)(BATCHES[0]))


def test_a_bfloat16_island_has_eight_bits_of_precision():
    """And no more: against float its noise is some 2**-9 of the signal, far above that of an island in float32."""
    reference = _model(WEIGHTS, BATCHES[0])

    def sqnr(keep):
        return sqnr_db([reference], [_quantized(keep, path="*")(BATCHES[0])])

    assert 40 < sqnr("bfloat16") < 60 < sqnr("float16") < 80 < sqnr("float32")


def test_other_batch_sizes_have_the_same_island():
    qmodel = _quantized("bfloat16")
    np.testing.assert_array_equal(qmodel(BATCHES[0][:3]), qmodel(BATCHES[0])[:3])


@pytest.mark.parametrize(
    ("weights", "batches", "what"),
    [
        ({**WEIGHTS, "w": 1e5 * WEIGHTS["w"]}, BATCHES, "weight:w reaches"),
        (WEIGHTS, [1e5 * BATCHES[0]], "input:x reaches"),
    ],
)
def test_numbers_beyond_float16_are_refused(weights, batches, what):
    recipe = qc.Recipe(rules=(qc.Rule(path="mlp", keep_float="float16"),))
    with pytest.raises(RecipeError, match=f"mlp/dot_general#0: {what} .* and the largest float16 is 6.55e\\+04; keep"):
        qc.quantize(_model, batches, params=weights, recipe=recipe)


def test_unknown_dtypes_are_refused():
    with pytest.raises(RecipeError, match="keep_float is True, False, 'float32', 'bfloat16', 'float16', got 'fp8'"):
        qc.Rule(keep_float="fp8")
