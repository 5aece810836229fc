"""ConvNeXt (Liu et al. 2022, arXiv:2201.03545) without its layer norms, as an nnx module.

A depthwise 7x7 convolution, then an inverted bottleneck of two dense layers over channels with GELU between them,
scaled per channel and added to the block's input. Without norms the scale also keeps the residual stream from growing,
as in SkipInit (De and Smith 2020, arXiv:2002.10444).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class ConvNeXtBlock(nnx.Module):
    """Maps `float[n, h, w, channels]` to the same shape.

    Args:
      channels: of input and output; the bottleneck has four times as many.
      layer_scale: initial value of the branch's factors, one per channel.
      rngs: where the weights' randomness comes from.
    """

    def __init__(self, channels: int, layer_scale: float, *, rngs: nnx.Rngs):
        self.depthwise = nnx.Conv(channels, channels, (7, 7), feature_group_count=channels, rngs=rngs)
        self.expand = nnx.Linear(channels, 4 * channels, rngs=rngs)
        self.project = nnx.Linear(4 * channels, channels, rngs=rngs)
        self.scale = nnx.Param(jnp.full((channels,), layer_scale, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.expand(self.depthwise(x))
        y = self.project(jax.nn.gelu(y, approximate=False))
        return x + self.scale[...] * y


class ConvNeXt(nnx.Module):
    """A ConvNeXt of any width and depth; the paper's Tiny is `(3, 3, 9, 3)` and 96.

    Args:
      stage_sizes: blocks in each stage; the number of stages is free too.
      width: channels of the first stage; every further stage doubles them.
      classes: number of outputs.
      channels: channels of the input images.
      patch: size and stride of the first convolution; 4 in the paper, 1 or 2 for small images.
      layer_scale: see `ConvNeXtBlock`; the paper starts from 1e-6, with which an untrained block does nothing.
      rngs: where the weights' randomness comes from.

    Calling it maps images `float32[n, height, width, channels]` to logits `float32[n, classes]`.
    """

    def __init__(
        self,
        stage_sizes: Sequence[int] = (3, 3, 9, 3),
        width: int = 96,
        *,
        classes: int = 1000,
        channels: int = 3,
        patch: int = 4,
        layer_scale: float = 0.3,
        rngs: nnx.Rngs,
    ):
        steps: list[nnx.Module] = []
        size = channels
        for stage, blocks in enumerate(stage_sizes):
            out, kernel = width * 2**stage, patch if stage == 0 else 2
            steps.append(nnx.Conv(size, out, (kernel, kernel), strides=(kernel, kernel), padding="VALID", rngs=rngs))
            steps += [ConvNeXtBlock(out, layer_scale, rngs=rngs) for _ in range(blocks)]
            size = out
        self.steps = nnx.List(steps)
        self.head = nnx.Linear(size, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for step in self.steps:
            x = step(x)
        return self.head(jnp.mean(x, axis=(1, 2)))
