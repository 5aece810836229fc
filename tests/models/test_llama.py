"""The decoder: one step or many, layers as a list or stacked, heads shared or not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qcompiler.models import cache as files
from qcompiler.models import llama
from qcompiler.models.llama import Llama, LlamaConfig, empty_cache, forward, init, stack_layers, step

TINY = LlamaConfig(width=32, depth=3, heads=4, kv_heads=2, hidden=48, context=16)
# Sums of a few dozen products in float32, in another order; logits are about 0.1.
TOLERANCE = 2e-6


def tokens_of(n=2, length=12):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (n, length)), jnp.int32)


@pytest.mark.parametrize("layers", ["unrolled", "scan"])
@pytest.mark.parametrize("tied", [True, False])
def test_decoding_gives_the_logits_of_the_whole(layers, tied):
    config = dataclasses.replace(TINY, layers=layers, tied=tied)
    params, tokens = init(jax.random.key(0), config), tokens_of()
    whole = jax.jit(forward, static_argnums=0)(config, params, tokens)
    assert whole.shape == (2, 12, 256) and whole.dtype == jnp.float32
    one = jax.jit(step, static_argnums=0)
    logits, cache = one(config, params, tokens[:, :5], empty_cache(config, 2), jnp.int32(0))
    np.testing.assert_allclose(logits, whole[:, :5], atol=TOLERANCE)
    for i in range(5, 12):
        logits, cache = one(config, params, tokens[:, i : i + 1], cache, jnp.int32(i))
        np.testing.assert_allclose(logits[:, 0], whole[:, i], atol=TOLERANCE)


def test_scanned_layers_are_the_same_layers():
    scanned = dataclasses.replace(TINY, layers="scan")
    params, tokens = init(jax.random.key(0), TINY), tokens_of()
    stacked = {**params, "layers": stack_layers(params["layers"])}
    jax.tree.map(np.testing.assert_array_equal, stacked, init(jax.random.key(0), scanned))
    np.testing.assert_allclose(forward(scanned, stacked, tokens), forward(TINY, params, tokens), atol=TOLERANCE)


def test_a_token_sees_only_what_is_before_it():
    params, tokens = init(jax.random.key(0), TINY), tokens_of()
    changed = forward(TINY, params, tokens.at[:, 7].add(1))
    differs = np.abs(changed - forward(TINY, params, tokens)).max(axis=(0, 2))
    assert np.all(differs[:7] == 0) and np.all(differs[7:] > 1e-4)


def test_rotary_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
    tables = llama._rotations(LlamaConfig(width=32, heads=4, context=16))
    at = lambda x, p: llama._rotate(x, tuple(jnp.asarray(t[p : p + 1]) for t in tables))
    scores = [float(jnp.sum(at(query, p + 3) * at(key, p))) for p in range(12)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)
    assert abs(float(jnp.sum(at(query, 4) * at(key, 0))) - scores[0]) > 1e-2


def test_shared_heads_are_repeated_heads():
    """Two query heads on one head of keys and values: the same as that head twice."""
    params, tokens = init(jax.random.key(0), TINY), tokens_of()
    full = dataclasses.replace(TINY, kv_heads=4)

    def repeated(kernel):
        return jnp.repeat(kernel.reshape(32, 2, 8), 2, axis=1).reshape(32, 32)

    layers = [{**p, "key": repeated(p["key"]), "value": repeated(p["value"])} for p in params["layers"]]
    expected = forward(full, {**params, "layers": layers}, tokens)
    np.testing.assert_allclose(forward(TINY, params, tokens), expected, atol=TOLERANCE)


@pytest.mark.parametrize("layers", ["unrolled", "scan"])
def test_as_a_module(layers, tmp_path):
    config = dataclasses.replace(TINY, layers=layers)
    model, other, tokens = (Llama(config, rngs=nnx.Rngs(0)), Llama(config, rngs=nnx.Rngs(1)), tokens_of())
    np.testing.assert_array_equal(model(tokens), forward(config, model.params, tokens))
    assert not np.array_equal(other(tokens), model(tokens))
    files.save(tmp_path / "w.npz", files.arrays_of(model), {})
    files.restore(other, files.load(tmp_path / "w.npz")[0], tmp_path / "w.npz")
    np.testing.assert_array_equal(other(tokens), model(tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "must be an even multiple"),
        ({"kv_heads": 3}, "multiple of kv_heads 3"),
        ({"width": 36, "heads": 4}, "even"),
        ({"layers": "loop"}, "unrolled, scan"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **options)


def test_longer_than_the_context_is_refused():
    params, tokens = init(jax.random.key(0), TINY), tokens_of(1, 17)
    with pytest.raises(ValueError, match="17 tokens, but the context is 16"):
        forward(TINY, params, tokens)
    with pytest.raises(ValueError, match="17 tokens, but the context is 16"):
        step(TINY, params, tokens, empty_cache(TINY, 1), jnp.int32(0))
