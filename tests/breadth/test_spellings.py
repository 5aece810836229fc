"""What other people's models are made of, in their words: experts, biases of attention, pytrees with a call."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

import qcompiler as qc
from qcompiler.debug.report import sqnr_db

TOKENS, WIDTH, HEADS, EXPERTS = 6, 16, 4, 4
SHAPE = (TOKENS, WIDTH)
SIZE = WIDTH // HEADS
W = {
    "router": normal(WIDTH, EXPERTS, seed=1, scale=0.5),
    "up": normal(EXPERTS, WIDTH, 24, seed=2, scale=0.25),
    "down": normal(EXPERTS, 24, WIDTH, seed=3, scale=0.25),
    "query": normal(WIDTH, HEADS, SIZE, seed=4, scale=0.25),
    "key": normal(WIDTH, HEADS, SIZE, seed=5, scale=0.25),
    "value": normal(WIDTH, HEADS, SIZE, seed=6, scale=0.25),
    "out": normal(HEADS, SIZE, WIDTH, seed=7, scale=0.25),
    "relative": normal(2 * TOKENS - 1, HEADS, seed=8, scale=0.5),
    "gate": normal(WIDTH, 32, seed=9, scale=0.25),
    "in": normal(WIDTH, 32, seed=10, scale=0.25),
    "back": normal(32, WIDTH, seed=11, scale=0.25),
    "gamma": 1 + normal(WIDTH, seed=12, scale=0.1),
}


def _experts_by_one_hot(p, x):
    """The two best experts of each token, their outputs weighted; every expert computes every token."""
    probabilities = jax.nn.softmax(x @ p["router"], -1)
    best, which = jax.lax.top_k(probabilities, 2)
    chosen = jax.nn.one_hot(which, EXPERTS, dtype=x.dtype)
    weights = jnp.einsum("btk,btke->bte", best / best.sum(-1, keepdims=True), chosen)
    hidden = jax.nn.gelu(jnp.einsum("btd,edh->bteh", x, p["up"]))
    return jnp.einsum("bteh,ehd,bte->btd", hidden, p["down"], weights)


def _experts_by_gather(p, x):
    """The best expert of each token: its weights are gathered."""
    logits = x @ p["router"]
    which = jnp.argmax(logits, -1)
    gate = jnp.max(jax.nn.softmax(logits, -1), -1, keepdims=True)
    every = jnp.einsum("btd,edh->bteh", x, p["up"])
    hidden = jax.nn.relu(jnp.take_along_axis(every, which[..., None, None], axis=2)[:, :, 0])
    back = jnp.einsum("bth,ehd->bted", hidden, p["down"])
    return gate * jnp.take_along_axis(back, which[..., None, None], axis=2)[:, :, 0]


def _attention(p, x, bias=None, rotate=lambda h: h):
    split = lambda name: jnp.einsum("btd,dhk->bthk", x, p[name])
    q, k, v = rotate(split("query")), rotate(split("key")), split("value")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / SIZE**0.5
    weights = jax.nn.softmax(scores if bias is None else scores + bias, -1)
    return jnp.einsum("bhqk,bkhd,hdo->bqo", weights, v, p["out"])


def _alibi(p, x):
    """Press et al. 2022, arXiv:2108.12409."""
    slopes = 2.0 ** (-8 * np.arange(1, HEADS + 1) / HEADS)
    distance = np.arange(TOKENS)[None] - np.arange(TOKENS)[:, None]
    causal = np.where(distance > 0, -np.inf, 0.0)
    return _attention(p, x, (slopes[:, None, None] * distance + causal).astype(np.float32))


def _relative(p, x):
    """A learned bias by distance, as T5 has it."""
    places = np.arange(TOKENS)[None] - np.arange(TOKENS)[:, None] + TOKENS - 1
    return _attention(p, x, jnp.moveaxis(p["relative"][places], -1, 0))


def _rotary_pairs(p, x):
    """Rotary positions with neighbours as pairs, as GPT-J has them."""
    angles = np.arange(TOKENS)[:, None] * 100.0 ** (-np.arange(SIZE // 2) / (SIZE // 2))
    cos, sin = (f(angles).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))

    def rotate(h):
        even, odd = h[..., ::2], h[..., 1::2]
        return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(h.shape)

    return _attention(p, x, rotate=rotate)


def _cosine(p, x):
    """Queries and keys of length one, as Swin V2 has them."""
    unit = lambda h: h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-6) * 10**0.5
    return _attention(p, x, rotate=unit)


def _geglu(p, x):
    return (jax.nn.gelu(x @ p["gate"], approximate=False) * (x @ p["in"])) @ p["back"]


def _swiglu(p, x):
    y = x * p["gamma"] / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    return x + (jax.nn.swish(y @ p["gate"]) * (y @ p["in"])) @ p["back"]


def _heads_by_vmap(p, x):
    def head(query, key, value):
        scores = (x @ query) @ (x @ key).swapaxes(1, 2) / SIZE**0.5
        return jax.nn.softmax(scores) @ (x @ value)

    each = jax.vmap(head, in_axes=1, out_axes=-2)(p["query"], p["key"], p["value"])
    return jnp.einsum("bthd,hdo->bto", each, p["out"])


def _remat(p, x):
    block = jax.checkpoint(lambda x: x + jax.nn.silu(x @ p["gate"]) @ p["back"])
    return block(block(x))


SPELLINGS = [
    _experts_by_one_hot, _experts_by_gather, _alibi, _relative, _rotary_pairs, _cosine, _geglu, _swiglu,
    _heads_by_vmap, _remat,
]  # fmt: skip


@pytest.mark.parametrize("fun", SPELLINGS, ids=lambda fun: fun.__name__.strip("_"))
def test_spelling(compiled, fun):
    # Ranges are those of 96 tokens: what others have beyond them is clipped, in a gated product twice. Where an expert
    # is chosen, a rounding decides it for a few tokens of hundreds.
    compiled(fun, SHAPE, params=W, sqnr=15 if "experts" in fun.__name__ else 20)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["activation"])
@dataclasses.dataclass(frozen=True)
class Linear:
    """A layer as equinox has them: a pytree that can be called."""

    weight: jax.Array
    bias: jax.Array
    activation: object = None

    def __call__(self, x):
        y = jax.vmap(lambda row: self.weight @ row + self.bias)(x)
        return y if self.activation is None else self.activation(y)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Sequential:
    layers: tuple

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


MODEL = Sequential((Linear(W["gate"].T, normal(32, seed=20), jax.nn.relu), Linear(W["back"].T, normal(WIDTH, seed=21))))
X = normal(64, WIDTH, seed=22)


def test_a_pytree_with_a_call():
    """Called as it is, its weights are constants; handed over as parameters, they are named after their fields."""
    expected = MODEL(X)
    as_it_is = qc.quantize(MODEL, [X], strict=True)
    as_parameters = qc.quantize(lambda model, x: model(x), [X], params=MODEL, strict=True)
    for qmodel in (as_it_is, as_parameters):
        assert sqnr_db([expected], [qmodel(X)]) > 35
    assert {name.partition(":")[0] for name in as_parameters.params if name.startswith("layers")} >= {
        "layers/0/weight", "layers/1/weight"
    }  # fmt: skip


def test_partial_and_bound_methods():
    class Model:
        def __init__(self):
            self.w = W["gate"]

        def predict(self, x, scale):
            return jnp.tanh(x @ self.w) * scale

    expected = Model().predict(X, 2.0)
    for fun in (functools.partial(Model().predict, scale=2.0), lambda x: Model().predict(x, 2.0)):
        assert sqnr_db([expected], [qc.quantize(fun, [X], strict=True)(X)]) > 35
