"""Reference models in both Flax flavours, and the small tasks they are trained on.

Classes and functions whose name starts with `Linen`/`linen_` are `flax.linen`; the others are `flax.nnx`.
Training and data live in `qcompiler.models.training` and `qcompiler.models.digits`.
"""

from qcompiler.models.flavours import linen_variables
from qcompiler.models.mlp import MLP, LinenMLP
from qcompiler.models.resnet import (
    BasicBlock,
    BottleneckBlock,
    LinenBasicBlock,
    LinenBottleneckBlock,
    LinenResNet,
    ResNet,
    linen_resnet18,
    linen_resnet34,
    linen_resnet50,
    linen_resnet101,
    linen_resnet152,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from qcompiler.models.statistics import calibrate_batch_norm, smooth_images

__all__ = [
    "MLP",
    "BasicBlock",
    "BottleneckBlock",
    "LinenBasicBlock",
    "LinenBottleneckBlock",
    "LinenMLP",
    "LinenResNet",
    "ResNet",
    "calibrate_batch_norm",
    "linen_resnet18",
    "linen_resnet34",
    "linen_resnet50",
    "linen_resnet101",
    "linen_resnet152",
    "linen_variables",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "smooth_images",
]
