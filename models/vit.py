"""Vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929) as an nnx module.

An image is cut into patches, each a token; blocks normalize before they attend and before their two dense layers. The
logits come from an added class token, as in the paper, or from the mean of all tokens (Zhai et al. 2021,
arXiv:2106.04560), which is as good and simpler. A stem of convolutions before the patches (Xiao et al. 2021, "Early
convolutions help transformers see better", arXiv:2106.14881) learns from far fewer images.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

Pooling = Literal["mean", "token"]


class ViTBlock(nnx.Module):
    """Self-attention, then two dense layers with GELU between them: `float[n, s, width]` to the same shape.

    Args:
      width: features of a token.
      heads: of the attention; must divide `width`.
      hidden: features between the dense layers.
      rngs: where the weights' randomness comes from.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.dense_norm = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, hidden, rngs=rngs)
        self.project = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.project(jax.nn.gelu(self.expand(self.dense_norm(x)), approximate=False))


class ConvStem(nnx.Module):
    """Stages of two 3x3 convolutions, the first of stride 2, each with BatchNorm and ReLU, as Xiao et al. build it.

    Args:
      channels: of the input images.
      features: of each stage; k of them make the map 2**k times smaller.
      rngs: where the weights' randomness comes from.

    Calling it maps `float32[n, h, w, channels]` to `float32[n, h / 2**k, w / 2**k, features[-1]]`.
    """

    def __init__(self, channels: int, features: Sequence[int], *, rngs: nnx.Rngs):
        self.convs, self.norms = nnx.List([]), nnx.List([])
        for width in features:
            for stride in (2, 1):
                conv = nnx.Conv(channels, width, (3, 3), (stride, stride), padding=1, use_bias=False, rngs=rngs)
                self.convs.append(conv)
                self.norms.append(nnx.BatchNorm(width, rngs=rngs))
                channels = width

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        return x


class ViT(nnx.Module):
    """A vision transformer of any width and depth; ViT-B/16 is 768, 12, 12 and 3072 with a patch of 16.

    Args:
      size: height and width of the images, a multiple of `patch`.
      patch: height and width of a patch.
      width: features of a token.
      depth: number of blocks.
      heads: of the attention; must divide `width`.
      hidden: features between the two dense layers of a block.
      classes: number of outputs.
      channels: channels of the input images.
      pooling: "mean" or "token", what the logits are made from.
      stem: features of the stages of convolutions before the patches; each halves the map, which is then cut into
        patches of `patch / 2**len(stem)`. A token stands for `patch` pixels either way.
      rngs: where the weights' randomness comes from.

    Calling it maps images `float32[n, size, size, channels]` to logits `float32[n, classes]`.

    Raises:
      ValueError: `size` is no multiple of `patch`, or `patch` of `2**len(stem)`; no such pooling; or, on a call, images
        of another size.
    """

    def __init__(
        self,
        size: int = 32,
        patch: int = 4,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
        hidden: int = 384,
        *,
        classes: int = 1000,
        channels: int = 3,
        pooling: Pooling = "mean",
        stem: Sequence[int] = (),
        rngs: nnx.Rngs,
    ):
        if patch % 2 ** len(stem):
            raise ValueError(f"a stem of {len(stem)} stages of stride 2 leaves no whole patch of {patch} pixels")
        if size % patch:
            raise ValueError(f"images of {size} pixels cannot be cut into patches of {patch}")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
        self.size = size
        tokens = (size // patch) ** 2 + (pooling == "token")
        init = nnx.initializers.normal(0.02)
        self.stem = nnx.data(ConvStem(channels, stem, rngs=rngs) if stem else None)
        channels, patch = (stem[-1], patch // 2 ** len(stem)) if stem else (channels, patch)
        self.patches = nnx.Conv(channels, width, (patch, patch), strides=(patch, patch), padding="VALID", rngs=rngs)
        self.token = nnx.data(nnx.Param(jnp.zeros((1, 1, width))) if pooling == "token" else None)
        self.positions = nnx.Param(init(rngs.params(), (1, tokens, width)))
        self.blocks = nnx.List([ViTBlock(width, heads, hidden, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[1:3] != (self.size, self.size):
            raise ValueError(f"images must be {self.size}x{self.size}, got {x.shape[1]}x{x.shape[2]}")
        if self.stem is not None:
            x = self.stem(x)
        x = self.patches(x)
        n, height, width, features = x.shape
        x = x.reshape(n, height * width, features)
        if self.token is not None:
            x = jnp.concatenate([jnp.broadcast_to(self.token[...], (n, 1, features)), x], axis=1)
        x = x + self.positions[...]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.token is not None else jnp.mean(x, axis=1))
