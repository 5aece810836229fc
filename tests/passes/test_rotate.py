"""Residual streams are rotated wherever nobody can see it, and nowhere else."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from norms import layer_norm, rms

import qcompiler as qc
from qcompiler.debug.report import sqnr_db
from qcompiler.errors import RecipeError
from qcompiler.ir.tracing import trace
from qcompiler.models import llama, vit
from qcompiler.numerics.hadamard import randomized
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.rotate import rotate
from qcompiler.passes.simplify import simplify

# Rotated weights are rounded to float32 once more, 2**-24 each: some 140 dB, of which cancellation eats a part.
LEAST_DB = 80.0
TOKENS, WIDTH, HIDDEN = 40, 24, 32
#: By what weights of one channel are larger.
FACTOR = 30.0
T = np.random.default_rng(1).integers(0, TOKENS, (16, 12)).astype(np.int32)


def _before(fun, weights, x=T):
    return fold_norms(simplify(trace(fun, weights, (jax.ShapeDtypeStruct(x.shape, x.dtype),))))


def _rotate(fun, weights, x=T):
    """The program before and after, and what is noted; the function is the same."""
    before = _before(fun, weights, x)
    after = rotate(before)
    assert sqnr_db(before.evaluate([x]), after.evaluate([x])) >= LEAST_DB
    return before, after, after.notes["rotated"]


def _left(fun, weights, x=T):
    """Why all streams are left as they are; the program is the same, then."""
    before, after, note = _rotate(fun, weights, x)
    assert before.weights.keys() == after.weights.keys()
    assert all(np.array_equal(w, after.weights[name]) for name, w in before.weights.items())
    assert len(before.eqns) == len(after.eqns)
    assert note and all("matrix" not in s and s["channels"] == WIDTH for s in note.values())
    return "; ".join(why for stream in note.values() for why in stream["left"])


def _random(model):
    """The graph and the state of a module, with noise on weights that start as ones and zeros."""
    model.eval()
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    leaves = [
        x + normal(*x.shape, seed=k, scale=0.2) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for k, x in enumerate(leaves)
    ]
    return graph, jax.tree.unflatten(tree, leaves)


# A decoder without attention


def _fast_layer_norm(x, gain, shift):
    """The variance as the difference of two means."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True) - jnp.square(mean)
    return (x - mean) * (jax.lax.rsqrt(variance + 1e-5) * gain) + shift


NORMS = {
    "rms": lambda x, p: rms(x, p["gain"]),
    "layer": lambda x, p: layer_norm(x, p["gain"], p["shift"]),
    "fast_layer": lambda x, p: _fast_layer_norm(x, p["gain"], p["shift"]),
}


def _weights(outliers=1.0):
    """Of two layers; what reads channel 3 of the stream has weights so many times larger."""
    scale = np.where(np.arange(WIDTH) == 3, outliers, 1.0).astype(np.float32)[:, None]
    scale = scale / np.sqrt(np.mean(np.square(scale)))
    vector = lambda seed, mean=0.0: normal(WIDTH, seed=seed, scale=0.3, shift=mean)
    layer = lambda k: {
        "norm": {"gain": vector(5 * k + 1, 1.0), "shift": vector(5 * k + 2)},
        "in": normal(WIDTH, HIDDEN, seed=5 * k + 3, scale=WIDTH**-0.5) * scale,
        "out": normal(HIDDEN, WIDTH, seed=5 * k + 4, scale=HIDDEN**-0.5),
        "bias": vector(5 * k + 5),
    }
    return {
        "table": normal(TOKENS, WIDTH, seed=20),
        "layers": [layer(0), layer(1)],
        "norm": {"gain": vector(21, 1.0), "shift": vector(22)},
        "head": normal(WIDTH, 10, seed=23, scale=WIDTH**-0.5) * scale,
    }


def _stream(p, t, norm):
    x = p["table"][t]
    for layer in p["layers"]:
        y = NORMS[norm](x, layer["norm"])
        x = x + jax.nn.relu(y @ layer["in"]) @ layer["out"] + layer["bias"]
    return x


def _decoder(norm):
    return lambda p, t: NORMS[norm](_stream(p, t, norm), p["norm"]) @ p["head"]


# Where it rotates


@pytest.mark.parametrize("norm", NORMS)
def test_a_stream_is_rotated(norm):
    before, after, note = _rotate(_decoder(norm), _weights())
    ((_, stream),) = note.items()
    assert stream["matrix"] == "hadamard" and stream["channels"] == WIDTH
    assert stream["centred"] == (norm != "rms")
    names = {name.partition(":")[0] for name in stream["constants"]}
    assert {"table", "layers/0/in", "layers/0/out", "layers/1/in", "layers/1/out", "head"} <= names
    # Gains and shifts are in the weights now, and nothing is added but what shifts make of those.
    assert len(after.eqns) <= len(before.eqns)


def test_weights_are_multiplied_by_the_matrix():
    weights = _weights()
    _, after, _ = _rotate(_decoder("rms"), weights)
    q, _ = randomized(WIDTH)
    # Rounded to float32 at the end.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    close(after.weights["table"], weights["table"] @ q)
    close(after.weights["layers/0/out"], weights["layers"][0]["out"] @ q)
    gain = weights["layers"][0]["norm"]["gain"].astype(np.float64)
    (read,) = (w for name, w in after.weights.items() if name.startswith("layers/0/in"))
    close(read, q.T @ (gain[:, None] * weights["layers"][0]["in"]))


def test_layer_norms_lose_their_means():
    _, after, _ = _rotate(_decoder("layer"), _weights())
    names = [e.primitive.name for e in after.eqns]
    # A sum of squares for each of the three norms, and none for means.
    assert names.count("reduce_sum") == 3 and "sub" not in names


@pytest.mark.parametrize("tied", (True, False))
def test_a_llama_is_rotated(tied):
    config = llama.LlamaConfig(TOKENS, 24, 2, 2, 1, 40, 16, tied=tied)
    params = llama.init(jax.random.key(0), config)
    params = jax.tree.map(lambda w: w + normal(*w.shape, seed=w.size, scale=0.1), params)
    _, after, note = _rotate(lambda p, t: llama.forward(config, p, t), params)
    ((_, stream),) = note.items()
    # The embedding and the logits' matrix, and seven products a layer.
    assert stream["matrix"] == "hadamard" and len(stream["constants"]) == 16
    assert "mul" in [e.primitive.name for e in after.eqns]


@pytest.mark.parametrize("norm", (nnx.RMSNorm, nnx.LayerNorm))
def test_norms_of_flax(norm):
    class Decoder(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
            self.norm, self.last = norm(WIDTH, rngs=rngs), norm(WIDTH, rngs=rngs)
            self.dense, self.back = nnx.Linear(WIDTH, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
            self.head = nnx.Linear(WIDTH, 5, rngs=rngs)

        def __call__(self, t):
            x = self.table(t)
            return self.head(self.last(x + self.back(jax.nn.relu(self.dense(self.norm(x))))))

    graph, state = _random(Decoder(nnx.Rngs(0)))
    _, _, note = _rotate(lambda s, t: nnx.merge(graph, s)(t), state)
    ((_, stream),) = note.items()
    assert stream["centred"] == (norm is nnx.LayerNorm) and stream["matrix"] == "hadamard"


@pytest.mark.parametrize("options", [{"pooling": "token"}, pytest.param({"stem": (8,)}, marks=pytest.mark.slow)])
def test_a_vision_transformer_is_rotated(options):
    graph, state = _random(vit.ViT(16, 4, 16, 1, 2, 32, classes=5, **options, rngs=nnx.Rngs(0)))
    _, _, note = _rotate(lambda s, x: nnx.merge(graph, s)(x), state, normal(2, 16, 16, 3))
    ((_, stream),) = note.items()
    assert stream["centred"] and stream["matrix"] == "hadamard"


def test_orders_without_a_hadamard_matrix():
    weights = {"table": normal(9, 7), "gain": normal(7, seed=1), "head": normal(7, 3, seed=2)}
    _, _, note = _rotate(lambda p, t: rms(p["table"][t], p["gain"]) @ p["head"], weights, T % 9)
    assert [stream["matrix"] for stream in note.values()] == ["random 7"]


# Where it gains, and where it does nothing


def _sqnr(fun, weights, x, **recipe):
    """In dB, of the program with quantize/dequantize pairs at W4A8, which the integers agree with to one step."""
    recipe = qc.Recipe(weight=qc.QuantType(4, symmetric=True), activation_sqnr=None, pair_sqnr=None, **recipe)
    quantized = qc.trace(fun, x, params=weights, recipe=recipe, verify="types").calibrate([x]).quantize()
    return sqnr_db([fun(weights, x)], quantized.programs["insert_qdq"].evaluate([x]))


@pytest.mark.parametrize(("norm", "gain"), [("rms", 4.0), ("layer", 4.0)])
def test_outlier_channels_cost_less(norm, gain):
    weights = _weights(FACTOR)
    plain, rotated = (_sqnr(_decoder(norm), weights, T, rotate=on) for on in (False, True))
    assert rotated >= plain + gain


def test_a_net_without_norms_is_left_alone():
    weights = _weights()
    fun = lambda p, t: jax.nn.relu(p["table"][t] @ p["layers"][0]["in"]) @ p["layers"][0]["out"]
    before, after, note = _rotate(fun, weights)
    assert not note and all(np.array_equal(w, after.weights[name]) for name, w in before.weights.items())


def test_a_recipe_without_it_rotates_nothing():
    traced = qc.trace(_decoder("rms"), T, params=_weights())
    assert "rotated" not in traced.program.notes


# What is refused


REFUSED = {
    "result": (lambda p, t: _stream(p, t, "rms"), "is a result"),
    "rectified": (lambda p, t: jax.nn.relu(_stream(p, t, "rms")) @ p["head"], "read by max"),
    "single channels": (lambda p, t: _stream(p, t, "rms")[..., :4] @ p["head"][:4], "takes its channels apart"),
    "heads": (lambda p, t: _stream(p, t, "rms").reshape(*t.shape, 2, -1) @ p["head"][:12], "takes its channels apart"),
    "gain beside the norm": (
        lambda p, t: (_stream(p, t, "rms") + rms(_stream(p, t, "rms"), p["norm"]["gain"])) @ p["head"],
        "scales each of its channels by a factor of its own|with and without its norm's gain",
    ),
    "mean": (lambda p, t: jnp.mean(_stream(p, t, "rms"), -1), "with its mean"),
    "mean read beside": (lambda p, t: _stream(p, t, "layer") @ p["head"], "with its mean"),
    "mixed norms": (lambda p, t: rms(_stream(p, t, "layer"), p["norm"]["gain"]) @ p["head"], "neither|mean"),
    "table beside a norm": (
        lambda p, t: (
            (NORMS["layer"](_stream(p, t, "layer"), {"gain": 1.0, "shift": 0.0}) + p["table"][TOKENS - 1 - t])
            @ p["head"]
        ),
        "joined to a norm's result",
    ),
    "table beside a gain": (
        lambda p, t: (rms(_stream(p, t, "rms"), p["norm"]["gain"]) + p["table"][TOKENS - 1 - t]) @ p["head"],
        "joined to a norm's result",
    ),
    "half the mean": (
        lambda p, t: (lambda x: rms(x - jnp.mean(x, -1, keepdims=True) / 2, p["norm"]["gain"]) @ p["head"])(
            _stream(p, t, "layer")
        ),
        "subtracts another number than the mean",
    ),
    "mean as a feature": (
        lambda p, t: _decoder("layer")(p, t) + jnp.mean(_stream(p, t, "layer"), -1, keepdims=True),
        "neither mean nor variance",
    ),
    "half precision": (
        lambda p, t: _decoder("rms")(jax.tree.map(lambda w: w.astype(jnp.bfloat16), p), t).astype(jnp.float32),
        "is bfloat16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_see_it_is_refused(name):
    fun, reason = REFUSED[name]
    assert re.search(reason, _left(fun, _weights()))


def test_a_stream_from_an_input_is_left():
    fun = lambda p, x: rms(x + jax.nn.relu(rms(x, p["gain"]) @ p["in"]) @ p["out"], p["gain"]) @ p["in"]
    weights = {"gain": normal(WIDTH, shift=1.0), "in": normal(WIDTH, HIDDEN), "out": normal(HIDDEN, WIDTH)}
    assert "made of input" in _left(fun, weights, normal(4, WIDTH))


# Batches and stages


def test_the_same_at_another_batch_size():
    weights = _weights()
    many, few = (_rotate(_decoder("layer"), weights, x)[1] for x in (T, T[:3]))
    assert many.notes["rotated"] == few.notes["rotated"] and many.weights.keys() == few.weights.keys()
    assert all(np.array_equal(w, few.weights[name]) for name, w in many.weights.items())
    model = qc.quantize(_decoder("layer"), [T], params=weights, recipe=qc.Recipe(rotate=True))
    np.testing.assert_array_equal(np.asarray(model(T))[:3], np.asarray(model(T[:3])))


def test_comes_before_calibration():
    calibrated = qc.trace(_decoder("rms"), T, params=_weights()).calibrate([T])
    with pytest.raises(RecipeError, match=r"differs in rotate .*before calibration"):
        calibrated.quantize(qc.Recipe(rotate=True))
