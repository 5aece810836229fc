"""The models that can be measured, by name. A new one is one line in `MODELS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from qcompiler.models import mobilenet, resnet, statistics


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of images.

    Attributes:
      make: its constructor, called with `rngs`.
      size: height and width of its images, unless the command says otherwise.
      shifted: arguments of the constructor that compute its depthwise convolutions as shifted multiply-adds, with the
        same parameters; empty where there is no such variant.
    """

    make: Callable[..., nnx.Module]
    size: int = 224
    shifted: Mapping[str, Any] = dataclasses.field(default_factory=dict)


MODELS: dict[str, Model] = {
    "resnet18": Model(resnet.resnet18),
    "resnet34": Model(resnet.resnet34),
    "resnet50": Model(resnet.resnet50),
    "resnet101": Model(resnet.resnet101),
    "resnet152": Model(resnet.resnet152),
    "mobilenet_v2": Model(mobilenet.mobilenet_v2, shifted={"depthwise": "shifted"}),
}


def build(name: str, size: int) -> tuple[nnx.Module, nnx.Module | None]:
    """A model with random weights and realistic BatchNorm statistics, and its shifted variant of the same weights.

    Args:
      name: a key of `MODELS`.
      size: height and width of the images its statistics are measured on.
    """
    entry = MODELS[name]
    model = statistics.calibrate_batch_norm(entry.make(rngs=nnx.Rngs(0)), jax.random.key(0), size)
    if not entry.shifted:
        return model, None
    shifted = entry.make(rngs=nnx.Rngs(0), **entry.shifted)
    nnx.update(shifted, nnx.state(model))
    shifted.eval()
    return model, shifted
