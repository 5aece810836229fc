"""A decoder as Llama has it (Touvron et al. 2023, arXiv:2302.13971), over bytes, as plain functions of parameters.

RMSNorm before attention and before the dense layers, rotary positions (Su et al. 2021, arXiv:2104.09864) with the
halves of a head as pairs, heads that share keys and values (Ainslie et al. 2023, arXiv:2305.13245), SwiGLU (Shazeer
2020, arXiv:2002.05202), no biases. Plain functions, because a decoder's cache goes in and comes out of every call:

    config = LlamaConfig()
    params = init(jax.random.key(0), config)
    logits = forward(config, params, tokens)
    logits, cache = step(config, params, prompt, empty_cache(config, n), jnp.int32(0))       # prefill
    logits, cache = step(config, params, one_token, cache, jnp.int32(prompt.shape[1]))       # decode
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qcompiler.models.bound import Bound

Layers = Literal["unrolled", "scan"]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a decoder.

    Attributes:
      vocabulary: number of tokens; 256 for bytes.
      width: features of a token.
      depth: number of layers.
      heads, kv_heads: heads of queries, and of keys and values; the second divides the first, that the width.
      hidden: features inside SwiGLU.
      context: longest sequence, length of the cache.
      base: of the wavelengths of the rotary positions.
      epsilon: of RMSNorm.
      tied: logits are products with the embedding, instead of with a matrix of their own.
      layers: "unrolled", a list of layers; or "scan", one `lax.scan` over weights stacked along a first axis.

    Raises:
      ValueError: sizes that do not divide, heads of odd size, or no such `layers`.
    """

    vocabulary: int = 256
    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 352
    context: int = 256
    base: float = 10_000.0
    epsilon: float = 1e-5
    tied: bool = True
    layers: Layers = "unrolled"

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads % self.kv_heads or self.head_size % 2:
            raise ValueError(
                f"width {self.width} must be an even multiple of heads {self.heads}, "
                f"and that a multiple of kv_heads {self.kv_heads}"
            )
        if self.layers not in get_args(Layers):
            raise ValueError(f"layers must be one of {', '.join(get_args(Layers))}, got {self.layers!r}")

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.width // self.heads


# Parameters


def init(key: jax.Array, config: LlamaConfig) -> Params:
    """Random parameters: `embedding`, `layers`, `norm` and, if not tied, `head`, in float32.

    `layers` is a list of dicts, or for "scan" one dict of arrays with a first axis of `depth`; the same key gives the
    same weights for both.
    """
    embedding_key, head_key, layers_key = jax.random.split(key, 3)
    layers = [_init_layer(k, config) for k in jax.random.split(layers_key, config.depth)]
    params: Params = {
        "embedding": 0.02 * jax.random.normal(embedding_key, (config.vocabulary, config.width)),
        "layers": layers if config.layers == "unrolled" else stack_layers(layers),
        "norm": jnp.ones(config.width),
    }
    if not config.tied:
        params["head"] = 0.02 * jax.random.normal(head_key, (config.width, config.vocabulary))
    return params


def _init_layer(key: jax.Array, config: LlamaConfig) -> Params:
    shared = config.kv_heads * config.head_size
    shapes = {
        "query": (config.width, config.width),
        "key": (config.width, shared),
        "value": (config.width, shared),
        "attention_output": (config.width, config.width),
        "gate": (config.width, config.hidden),
        "up": (config.width, config.hidden),
        "down": (config.hidden, config.width),
    }
    keys = jax.random.split(key, len(shapes))
    weights = {
        name: jax.random.normal(k, shape) * float(np.sqrt(1 / shape[0]))
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    # What enters the residual stream starts smaller the more layers add to it (GPT-2).
    for name in ("attention_output", "down"):
        weights[name] = weights[name] * float(np.sqrt(1 / (2 * config.depth)))
    return {"attention_norm": jnp.ones(config.width), "dense_norm": jnp.ones(config.width), **weights}


def stack_layers(layers: list[Params]) -> Params:
    """The `layers` of the unrolled form as those of the scanned one."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


# The decoder


def forward(config: LlamaConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Logits of every next token.

    Args:
      config: the sizes.
      params: of `init`.
      tokens: `int32[n, s]`, with `s` at most `config.context`.

    Returns:
      `float32[n, s, vocabulary]`; those at t are for token t + 1, and depend on the tokens up to t.

    Raises:
      ValueError: the sequence is longer than the context.
    """
    _check_length(config, tokens)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    mask = positions[None, :] <= positions[:, None]
    rotation = tuple(jnp.asarray(table[: tokens.shape[1]]) for table in _rotations(config))

    def layer(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        query, key, value = _query_key_value(config, p, x, rotation)
        return _rest(config, p, x, _attend(query, key, value, mask)), None

    x, _ = _over_layers(config, layer, params["embedding"][tokens], params["layers"])
    return _logits(config, params, x)


def empty_cache(config: LlamaConfig, n: int) -> Any:
    """A cache for `step`: `key` and `value`, `float32[n, context, kv_heads, head_size]`, zeros.

    As `params["layers"]`, a list of dicts, or for "scan" one dict of arrays with a first axis of `depth`.
    """
    zeros = jnp.zeros((n, config.context, config.kv_heads, config.head_size), jnp.float32)
    layers = [{"key": zeros, "value": zeros} for _ in range(config.depth)]
    return layers if config.layers == "unrolled" else stack_layers(layers)


def step(
    config: LlamaConfig, params: Params, tokens: jax.Array, cache: Any, position: jax.Array
) -> tuple[jax.Array, Any]:
    """Reads on behind what the cache holds: a whole prompt, or one token.

    Args:
      config: the sizes.
      params: of `init`.
      tokens: `int32[n, s]`.
      cache: of `empty_cache` or of an earlier step, which read `position` tokens.
      position: `int32[]`, place of the first token; `position + s` must be at most `config.context`, which a traced
        value cannot be checked for: beyond it the cache's last places are overwritten.

    Returns:
      Logits `float32[n, s, vocabulary]` as `forward` has them, and the cache with the new tokens.

    Raises:
      ValueError: more tokens than the context is long.
    """
    _check_length(config, tokens)
    length = tokens.shape[1]
    at = position + jnp.arange(length, dtype=jnp.int32)
    mask = jnp.arange(config.context, dtype=jnp.int32)[None, :] <= at[:, None]
    rotation = tuple(jax.lax.dynamic_slice_in_dim(jnp.asarray(table), position, length) for table in _rotations(config))

    def layer(x: jax.Array, inputs: tuple[Params, Params]) -> tuple[jax.Array, Params]:
        p, kept = inputs
        query, key, value = _query_key_value(config, p, x, rotation)
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1)
        kept = {"key": write(kept["key"], key), "value": write(kept["value"], value)}
        return _rest(config, p, x, _attend(query, kept["key"], kept["value"], mask)), kept

    x, cache = _over_layers(config, layer, params["embedding"][tokens], (params["layers"], cache))
    return _logits(config, params, x), cache


def _check_length(config: LlamaConfig, tokens: jax.Array) -> None:
    if tokens.shape[1] > config.context:
        raise ValueError(f"{tokens.shape[1]} tokens, but the context is {config.context}")


def _over_layers(config: LlamaConfig, layer: Any, x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
    """`lax.scan` over stacked layers, or the same loop over lists of them; a tuple of lists is walked in step."""
    if config.layers == "scan":
        return jax.lax.scan(layer, x, inputs)
    outputs = []
    for one in zip(*inputs, strict=True) if isinstance(inputs, tuple) else inputs:
        x, output = layer(x, one)
        outputs.append(output)
    return x, outputs


def _rms_norm(x: jax.Array, gain: jax.Array, epsilon: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon) * gain


def _rotations(config: LlamaConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the angles of all positions, `float32[context, head_size]`, both halves alike."""
    exponents = np.arange(0, config.head_size, 2) / config.head_size
    angles = np.arange(config.context)[:, None] * config.base**-exponents
    angles = np.concatenate([angles, angles], axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotate(x: jax.Array, rotation: tuple[jax.Array, ...]) -> jax.Array:
    """Rotary positions: turns features i and i + head_size/2 of `float[n, s, heads, head_size]` by their angle."""
    cosines, sines = (table[:, None, :] for table in rotation)
    low, high = jnp.split(x, 2, axis=-1)
    return x * cosines + jnp.concatenate([-high, low], axis=-1) * sines


def _query_key_value(
    config: LlamaConfig, p: Params, x: jax.Array, rotation: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`float[n, s, heads, head_size]`, and two of `float[n, s, kv_heads, head_size]`."""
    y = _rms_norm(x, p["attention_norm"], config.epsilon)
    split = lambda z, heads: z.reshape(*z.shape[:2], heads, config.head_size)
    query = split(y @ p["query"], config.heads)
    key, value = split(y @ p["key"], config.kv_heads), split(y @ p["value"], config.kv_heads)
    return _rotate(query, rotation), _rotate(key, rotation), value


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """`[n, s, heads, d]`, two `[n, t, kv_heads, d]` and `bool[s, t]` to `[n, s, heads * d]`."""
    n, s, heads, d = query.shape
    shared = key.shape[2]
    query = query.reshape(n, s, shared, heads // shared, d)
    scores = jnp.einsum("nskgd,ntkd->nkgst", query, key) * float(d**-0.5)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("nkgst,ntkd->nskgd", weights, value).reshape(n, s, heads * d)


def _rest(config: LlamaConfig, p: Params, x: jax.Array, attended: jax.Array) -> jax.Array:
    """What a layer does behind its attention."""
    x = x + attended @ p["attention_output"]
    y = _rms_norm(x, p["dense_norm"], config.epsilon)
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


def _logits(config: LlamaConfig, params: Params, x: jax.Array) -> jax.Array:
    x = _rms_norm(x, params["norm"], config.epsilon)
    return x @ (params["embedding"].T if config.tied else params["head"])


class Llama(Bound):
    """`forward` of random parameters as an nnx module, which can be trained and cached.

    Args:
      config: the sizes.
      rngs: where the weights' randomness comes from.

    Calling it maps tokens `int32[n, s]` to logits `float32[n, s, vocabulary]`; `params` is for the plain functions.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        super().__init__(init(rngs.params(), config))
        self.config = config

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return forward(self.config, self.params, tokens)
