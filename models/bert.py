"""BERT (Devlin et al. 2018, arXiv:1810.04805) as a linen module, and sentence embeddings made with it.

Linen, as Hugging Face's own Flax BERT is: parameters are a plain nested dict, so that published weights fit in without
a module being filled with random ones first. Layer norms stand behind the residual sums; masked keys get the smallest
float added to their scores. Dropout, which only training uses, is left out. `qcompiler.models.huggingface` reads
published weights.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

#: Hugging Face's names of the activations that published models have.
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT; the defaults are those of BERT-base, uncased.

    Attributes:
      vocabulary: number of tokens.
      width: features of a token.
      depth: number of layers.
      heads: of the attention; must divide `width`.
      hidden: features between the two dense layers of a block.
      positions: longest sequence.
      types: kinds of segments.
      epsilon: of the layer norms.
      activation: a name in `ACTIVATIONS`.

    Raises:
      ValueError: `heads` does not divide `width`, or there is no such activation.
    """

    vocabulary: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    types: int = 2
    epsilon: float = 1e-12
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")


class BertEmbeddings(nn.Module):
    """Token, position and segment embeddings, summed and normalized: `int[n, s]` twice to `float[n, s, width]`."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, types: jax.Array) -> jax.Array:
        config = self.config
        init = nn.initializers.normal(0.02)
        embed = lambda count, name: nn.Embed(count, config.width, embedding_init=init, name=name)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x = embed(config.vocabulary, "word")(tokens)
        x = x + embed(config.positions, "position")(positions) + embed(config.types, "type")(types)
        return nn.LayerNorm(epsilon=config.epsilon, name="norm")(x)


class BertLayer(nn.Module):
    """Self-attention and two dense layers: `float[n, s, width]` and the scores' bias to the first's shape.

    The bias is `float[n, 1, 1, s]`, added to the scores of all heads and queries.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        config = self.config
        dense = lambda features, name: nn.Dense(features, kernel_init=nn.initializers.normal(0.02), name=name)
        norm = lambda name: nn.LayerNorm(epsilon=config.epsilon, name=name)
        heads = lambda y: y.reshape(*y.shape[:2], config.heads, config.width // config.heads)
        query, key, value = (heads(dense(config.width, name)(x)) for name in ("query", "key", "value"))
        weights = nn.attention.dot_product_attention_weights(query, key, bias=bias)
        attended = jnp.einsum("nhqk,nkhd->nqhd", weights, value).reshape(x.shape)
        x = norm("attention_norm")(x + dense(config.width, "attention_output")(attended))
        y = ACTIVATIONS[config.activation](dense(config.hidden, "hidden")(x))
        return norm("output_norm")(x + dense(config.width, "output")(y))


class Bert(nn.Module):
    """The encoder.

    Attributes:
      config: its sizes.

    `__call__(tokens, mask, types=None)` maps `int32[n, s]` tokens, `int32[n, s]` 1 for tokens and 0 for padding, and
    `int32[n, s]` segments (all 0 if left out) to features `float32[n, s, width]`.

    Raises:
      ValueError: on a call, for a sequence longer than `config.positions`.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array, types: jax.Array | None = None) -> jax.Array:
        if tokens.shape[1] > self.config.positions:
            raise ValueError(f"{tokens.shape[1]} tokens, but this BERT has {self.config.positions} positions")
        if types is None:
            types = jnp.zeros_like(tokens)
        x = BertEmbeddings(self.config, name="embeddings")(tokens, types)
        lowest = jnp.finfo(x.dtype).min
        bias = jnp.where(mask > 0, 0.0, lowest).astype(x.dtype)[:, None, None, :]
        for i in range(self.config.depth):
            x = BertLayer(self.config, name=f"layer_{i}")(x, bias)
        return x


class SentenceEncoder(nn.Module):
    """One vector of length 1 for a text, as sentence-transformers makes it: the mean of the features, over its length.

    Attributes:
      config: sizes of the BERT below.

    `__call__(tokens, mask)` maps `int32[n, s]` twice, see `Bert`, to `float32[n, width]`; the scalar product of two
    rows is the cosine similarity of their texts.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        x = Bert(self.config, name="bert")(tokens, mask)
        kept = mask.astype(x.dtype)[..., None]
        mean = jnp.sum(x * kept, axis=1) / jnp.maximum(jnp.sum(kept, axis=1), 1e-9)
        return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
