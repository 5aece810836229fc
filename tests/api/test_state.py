"""State, such as a decoder's cache, stays in codes from call to call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

import qcompiler as qc
from qcompiler.debug.report import sqnr_db
from qcompiler.errors import RecipeError, SignatureError
from qcompiler.ir import serialize
from qcompiler.models import llama

CONFIG = llama.LlamaConfig(width=32, depth=1, heads=4, kv_heads=2, hidden=64, context=16)
PARAMS = llama.init(jax.random.key(0), CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 256, (3, 12)).astype(np.int32)
STEP = functools.partial(llama.step, CONFIG)


def _batches():
    """A prompt, and tokens behind it one by one, each with the cache that float left."""
    cache, found = llama.empty_cache(CONFIG, 3), []
    for part, at in ((TOKENS[:, :8], 0), *((TOKENS[:, k : k + 1], k) for k in range(8, 12))):
        found.append((part, cache, np.int32(at)))
        cache = STEP(PARAMS, *found[-1])[1]
    return found


@pytest.fixture(scope="module")
def batches():
    return _batches()


@pytest.fixture(scope="module")
def decoder(batches):
    """One token at a time."""
    return qc.quantize(STEP, batches[1:], params=PARAMS, state={"cache": 1}, verify="types")


def test_the_cache_is_int8(decoder, batches):
    cache = decoder.init_state(cache=batches[1][1])["cache"]
    assert {x.dtype for x in jax.tree.leaves(cache)} == {np.dtype(np.int8)}
    _, after = decoder(batches[1][0], cache, batches[1][2])
    assert {x.dtype for x in jax.tree.leaves(after)} == {np.dtype(np.int8)}
    # One token of one layer's keys is another, all else the same codes: nothing is rounded again.
    changed = [
        np.flatnonzero(np.any(a != b, axis=(0, 2, 3)))
        for a, b in zip(*map(jax.tree.leaves, (cache, after)), strict=True)
    ]
    assert all(list(c) == [8] for c in changed)


def test_decoding_goes_on_from_codes(decoder, batches):
    cache = decoder.init_state(cache=batches[1][1])["cache"]
    for tokens, float_cache, position in batches[1:]:
        expected, _ = STEP(PARAMS, tokens, float_cache, position)
        logits, cache = decoder(tokens, cache, position)
        # int8 keys, values and weights of random layers.
        assert sqnr_db([expected], [logits]) > 20


def test_a_prompt_and_tokens_behind_it(batches):
    """One model, calibrated on both, reads the prompt into an empty cache and goes on from there."""
    qmodel = qc.quantize(STEP, batches, params=PARAMS, state={"cache": 1}, verify="types")
    cache = qmodel.init_state()["cache"]
    for tokens, float_cache, position in batches:
        expected, _ = STEP(PARAMS, tokens, float_cache, position)
        logits, cache = qmodel(tokens, cache, position)
        assert logits.shape == expected.shape and sqnr_db([expected], [logits]) > 20


def test_verification_and_simulation_take_float_state(batches):
    qmodel = qc.quantize(STEP, batches[1:2], params=PARAMS, state={"cache": 1})
    assert qmodel.report.sqnr_db > 20 and qmodel.report.integer_only
    logits, cache = qmodel.simulate(*batches[1])
    assert jax.tree.leaves(cache)[0].dtype == np.float32
    assert sqnr_db([STEP(PARAMS, *batches[1])[0]], [logits]) > 20


def test_other_batch_sizes(decoder, batches):
    tokens, cache, position = batches[1]
    cache = decoder.init_state(cache=cache)["cache"]
    whole, _ = decoder(tokens, cache, position)
    one, _ = decoder(tokens[:1], jax.tree.map(lambda x: x[:1], cache), position)
    np.testing.assert_array_equal(whole[:1], one)


def test_it_starts_with_zeros(decoder):
    cache = decoder.init_state()["cache"]
    encodings = list(decoder.state_encodings.values())
    for leaf, encoding in zip(jax.tree.leaves(cache), encodings, strict=True):
        assert leaf.shape == (3, 16, 2, 8) and np.all(leaf == encoding.zero_point)


def _accumulate(p, x, total):
    total = 0.9 * total + x @ p["w"]
    return jnp.tanh(total), {"total": total}


W = {"w": normal(8, 8, scale=0.4)}
X, TOTAL = normal(4, 8, seed=1), normal(4, 8, seed=2)


def test_places_by_key():
    fun = lambda p, x, total: _accumulate(p, x, total)[1]
    qmodel = qc.quantize(fun, [(X, TOTAL)], params=W, state={"total": "total"})
    (total,) = qmodel(X, qmodel.init_state(total=TOTAL)["total"]).values()
    (encoding,) = qmodel.state_encodings.values()
    assert sqnr_db([fun(W, X, TOTAL)["total"]], [encoding.dequantize(total)]) > 30


def test_its_encodings_are_kept_in_files(tmp_path):
    quantized = qc.trace(_accumulate, X, TOTAL, params=W, state={"total": 0}).calibrate([(X, TOTAL)]).quantize()
    serialize.save(quantized.program, tmp_path / "model.qcprogram")
    (saved,), (known,) = (
        p.notes["state_codes"] for p in (serialize.load(tmp_path / "model.qcprogram"), quantized.program)
    )
    assert saved.type == known.type and saved.scale == known.scale and saved.zero_point == known.zero_point


def test_what_state_cannot_be():
    run = lambda state: qc.quantize(_accumulate, [(X, TOTAL)], params=W, state=state)
    with pytest.raises(RecipeError, match="state names the parameter 'cache'; the call has x, total"):
        run({"cache": 1})
    with pytest.raises(RecipeError, match="the result has no part 5"):
        run({"total": 5})
    with pytest.raises(RecipeError, match="differ in structure"):
        run({"total": 1})
    with pytest.raises(RecipeError, match=r"is float32\[2,8\], its next value float32\[4,8\]"):
        qc.quantize(lambda p, x, total: (x @ p["w"], total), [(X[:2], X)], params=W, state={"x": 1})


def test_calls_take_codes(decoder, batches):
    with pytest.raises(SignatureError, match="has dtype float32, int8 was traced"):
        decoder(*batches[1])
    with pytest.raises(SignatureError, match="there is no state kv; state is cache"):
        decoder.init_state(kv=batches[1][1])


def _mixing(params, h, x):
    h = jnp.tanh(0.5 * h @ params["w"] + x)
    return h @ params["v"], h


_CODE = qc.Encoding(qc.QuantType(8), np.float32(2 / 255), np.int32(0))


@pytest.mark.parametrize("ends", [("input:h",), ("tanh#0",), ("input:h", "tanh#0")], ids=" ".join)
def test_an_encoding_given_to_either_end_of_state_is_that_of_both(ends):
    params = {"w": normal(8, 8), "v": normal(8, 4, seed=1)}
    h, x = np.tanh(normal(3, 8, seed=2)), normal(3, 8, seed=3)
    recipe = qc.Recipe(encodings=dict.fromkeys(ends, _CODE))
    qmodel = qc.quantize(_mixing, [(h, x)], params=params, state={"h": 1}, recipe=recipe, verify="types")
    assert qmodel.state_encodings["h"].scale == np.float32(2 / 255)
    codes, float_h = qmodel.init_state(h=h)["h"], h
    for _ in range(3):
        _, float_h = _mixing(params, float_h, x)
        _, codes = qmodel(codes, x)
        # Codes of 1/127: what three rounds of them lose.
        assert np.max(np.abs(qmodel.state_encodings["h"].dequantize(codes) - float_h)) < 0.1


def test_two_encodings_for_the_ends_of_state():
    params = {"w": normal(8, 8), "v": normal(8, 4, seed=1)}
    other = qc.Encoding(qc.QuantType(8), np.float32(1 / 255), np.int32(0))
    recipe = qc.Recipe(encodings={"input:h": _CODE, "tanh#0": other})
    with pytest.raises(RecipeError, match="input:h and tanh#0 are one state"):
        qc.quantize(_mixing, [(normal(3, 8), normal(3, 8))], params=params, state={"h": 1}, recipe=recipe)
