"""A multilayer perceptron with ReLU between its layers, as nnx and as linen module."""

from collections.abc import Sequence
from itertools import pairwise

import jax
from flax import linen as nn
from flax import nnx


class MLP(nnx.Module):
    """Dense layers with ReLU between them.

    Args:
      features: layer sizes from input to output, at least two, such as `(64, 128, 10)`.
      rngs: where the weights' randomness comes from.

    Calling it maps `float[..., features[0]]` to `float[..., features[-1]]`.
    """

    def __init__(self, features: Sequence[int], *, rngs: nnx.Rngs):
        if len(features) < 2:
            raise ValueError(f"an MLP needs an input and an output size, got features={tuple(features)}")
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairwise(features)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class LinenMLP(nn.Module):
    """The linen twin of `MLP`; `features` are the layers' output sizes, the input size comes from the input.

    `__call__` maps `float[..., n]` to `float[..., features[-1]]`; `train` changes nothing here.
    """

    features: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i, size in enumerate(self.features):
            x = nn.Dense(size, name=f"layers_{i}")(x)
            if i < len(self.features) - 1:
                x = jax.nn.relu(x)
        return x
