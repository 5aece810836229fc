"""Reference models in both Flax flavours, and the small tasks they are trained on.

Where a model comes in both flavours, `Linen`/`linen_` marks that of `flax.linen`. EfficientNet, ConvNeXt, ViT, the
detector and the recurrent language models are `flax.nnx`; DenseNet, VGG, U-Net and BERT are `flax.linen`; the decoder
in the style of Llama is plain functions. `qcompiler.models.huggingface` reads published weights of BERT.
Data lives in `qcompiler.models.procedural`, `scenes`, `text` and `digits`, training in `qcompiler.models.training`;
`qcompiler.models.tasks` says what is learned, `qcompiler.models.trained` keeps trained networks in a cache.
"""

from qcompiler.models.bert import Bert, BertConfig, SentenceEncoder
from qcompiler.models.convnext import ConvNeXt
from qcompiler.models.densenet import DenseNet
from qcompiler.models.detector import Detector
from qcompiler.models.efficientnet import EfficientNet
from qcompiler.models.flavours import linen_variables
from qcompiler.models.llama import Llama, LlamaConfig
from qcompiler.models.lstm import RecurrentLM
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
from qcompiler.models.vit import ViT

__all__ = [
    "MLP",
    "VGG",
    "BasicBlock",
    "Bert",
    "BertConfig",
    "BottleneckBlock",
    "ConvNeXt",
    "DenseNet",
    "Detector",
    "EfficientNet",
    "InvertedResidual",
    "LinenBasicBlock",
    "LinenBottleneckBlock",
    "LinenInvertedResidual",
    "LinenMLP",
    "LinenMobileNetV2",
    "LinenResNet",
    "Llama",
    "LlamaConfig",
    "MobileNetV2",
    "RecurrentLM",
    "ResNet",
    "SentenceEncoder",
    "UNet",
    "ViT",
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
