"""Reference models in both Flax flavours, and the small tasks they are trained on.

Where a model comes in both flavours, `Linen`/`linen_` marks that of `flax.linen`. EfficientNet and ConvNeXt are
`flax.nnx`; DenseNet, VGG and U-Net are `flax.linen`.
Training and data live in `qcompiler.models.training` and `qcompiler.models.digits`.
"""

from qcompiler.models.convnext import ConvNeXt
from qcompiler.models.densenet import DenseNet
from qcompiler.models.efficientnet import EfficientNet
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
from qcompiler.models.statistics import calibrate_batch_norm, calibrate_linen_batch_norm, smooth_images
from qcompiler.models.unet import UNet
from qcompiler.models.vgg import VGG, vgg

__all__ = [
    "MLP",
    "VGG",
    "BasicBlock",
    "BottleneckBlock",
    "ConvNeXt",
    "DenseNet",
    "EfficientNet",
    "LinenBasicBlock",
    "LinenBottleneckBlock",
    "LinenMLP",
    "LinenResNet",
    "ResNet",
    "UNet",
    "calibrate_batch_norm",
    "calibrate_linen_batch_norm",
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
    "vgg",
]
