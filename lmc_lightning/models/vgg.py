"""VGG networks for 32×32 images."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from lmc_lightning.models.layers import FeaturesThenClassifier, conv_stages, dense_layers, pooled_size


class ReducedVGG(FeaturesThenClassifier):
    """Two-stage VGG with dropout, ``(N, in_channels, 32, 32) -> (N, num_classes)``; 1,102,410 parameters.

    3×3 convolutions with 32 and 64 channels, each followed by ReLU and 2×2 max pooling, then fully connected
    4096–256–128–``num_classes`` with dropout after each hidden layer. ``hidden`` gives smaller (or no) hidden layers,
    ``in_channels`` and ``image_size`` other images.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (256, 128),
        dropout: float = 0.5,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        channels = (32, 64)
        side = pooled_size(image_size, len(channels))
        self.features = conv_stages(in_channels, channels, kernel_size=3)
        self.classifier = dense_layers([channels[-1] * side**2, *hidden, num_classes], dropout)


_VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(FeaturesThenClassifier):
    """VGG-16 with BatchNorm for CIFAR, ``(N, 3, 32, 32) -> (N, num_classes)``; 14,728,266 parameters.

    The thirteen convolutions of arXiv 1409.1556 (``conv{stage}_{i}``), each followed by BatchNorm and ReLU, max pooling
    after each stage, and one linear layer on the remaining 512 features instead of the three of the original. The
    convolutions keep their biases, as is usual; BatchNorm makes them directions of zero curvature.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        width = 3
        for stage, channels in enumerate(_VGG16_STAGES, start=1):
            for i, channel in enumerate(channels, start=1):
                layers[f"conv{stage}_{i}"] = nn.Conv2d(width, channel, 3, padding=1)
                layers[f"bn{stage}_{i}"] = nn.BatchNorm2d(channel)
                layers[f"relu{stage}_{i}"] = nn.ReLU()
                width = channel
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        self.features = nn.Sequential(layers)
        self.classifier = nn.Linear(width, num_classes)
