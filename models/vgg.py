"""VGG (Simonyan and Zisserman 2014, arXiv:1409.1556), with or without BatchNorm, as a linen module."""

from collections.abc import Sequence

import jax
from flax import linen as nn

_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Stages of 3x3 convolutions with ReLU, each followed by a 2x2 maximum; then dense layers on the flattened map.

    Attributes:
      stage_sizes: convolutions in each stage; the number of stages is free too, the map halves with each.
      width: channels of the first stage; they double up to eight times as many.
      hidden: sizes of the dense layers before the last.
      classes: number of outputs.
      norm: put BatchNorm behind every convolution, which the paper does not have.

    `__call__(x, train=False)` maps images `float32[n, height, width, channels]`, always of the size that the weights
    were made with, to logits `float32[n, classes]`; with `norm` and `train=True` make `batch_stats` mutable. Dropout,
    which only training uses, is left out.
    """

    stage_sizes: Sequence[int] = _STAGES[16]
    width: int = 64
    hidden: Sequence[int] = (4096, 4096)
    classes: int = 1000
    norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        init = nn.initializers.he_normal()
        for stage, convs in enumerate(self.stage_sizes):
            channels = self.width * min(2**stage, 8)
            for i in range(convs):
                conv = nn.Conv(channels, (3, 3), use_bias=not self.norm, kernel_init=init, name=f"conv_{stage}_{i}")
                x = conv(x)
                if self.norm:
                    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm_{stage}_{i}")(x)
                x = nn.relu(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, size in enumerate(self.hidden):
            x = nn.relu(nn.Dense(size, kernel_init=init, name=f"dense_{i}")(x))
        return nn.Dense(self.classes, name="head")(x)


def vgg(layers: int, **options) -> VGG:
    """VGG of 11, 13, 16 or 19 layers; `options` are the other fields of `VGG`.

    Raises:
      ValueError: if there is no VGG of so many layers.
    """
    if layers not in _STAGES:
        raise ValueError(f"layers must be one of {', '.join(map(str, _STAGES))}, got {layers}")
    return VGG(_STAGES[layers], **options)
