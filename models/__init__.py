"""Reference models in both Flax flavours, and the small tasks they are trained on.

Where a model comes in both flavours, `Linen`/`linen_` marks that of `flax.linen`. EfficientNet and ConvNeXt are
`flax.nnx`; DenseNet, VGG and U-Net are `flax.linen`.
Data lives in `qcompiler.models.procedural` and `qcompiler.models.digits`, training in `qcompiler.models.training`, and
`qcompiler.models.trained` keeps networks trained on the procedural pictures in a cache.
"""

from qcompiler.models.convnext import ConvNeXt
from qcompiler.models.densenet import DenseNet
from qcompiler.models.efficientnet import EfficientNet
from qcompiler.models.flavours import linen_variables
from qcompiler.models.mlp import MLP, LinenMLP
from qcompiler.models.mobilenet import (
    InvertedResidual,
    LinenInvertedResidual,
    LinenMobileNetV2,
    MobileNetV2,
    linen_mobilenet_v2,
    mobilenet_v2,
    use_depthwise,
)
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
    "InvertedResidual",
    "LinenBasicBlock",
    "LinenBottleneckBlock",
    "LinenInvertedResidual",
    "LinenMLP",
    "LinenMobileNetV2",
    "LinenResNet",
    "MobileNetV2",
    "ResNet",
    "UNet",
    "calibrate_batch_norm",
    "calibrate_linen_batch_norm",
    "linen_mobilenet_v2",
    "linen_resnet18",
    "linen_resnet34",
    "linen_resnet50",
    "linen_resnet101",
    "linen_resnet152",
    "linen_variables",
    "mobilenet_v2",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "smooth_images",
    "use_depthwise",
    "vgg",
]
