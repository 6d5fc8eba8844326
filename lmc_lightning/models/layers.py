"""What the networks without residuals share: stacks with readable layer names, and how they are joined."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn


class FeaturesThenClassifier(nn.Module):
    """``features``, flattened, then ``classifier``."""

    features: nn.Module
    classifier: nn.Module

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        features: Tensor = self.features(images)
        logits: Tensor = self.classifier(features.flatten(1))
        return logits


def conv_stages(in_channels: int, channels: Sequence[int], kernel_size: int) -> nn.Sequential:
    """Stages ``conv{i}``, ``relu{i}``, ``pool{i}``: same-size convolution, ReLU, 2×2 max pooling.

    ``(N, in_channels, H, W)`` becomes ``(N, channels[-1], H // 2**s, W // 2**s)`` after ``s = len(channels)`` stages.

    Raises:
        ValueError: for an even kernel, which has no padding that keeps the size.
    """
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd so that padding keeps the image size, got {kernel_size}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (fan_in, fan_out) in enumerate(zip([in_channels, *channels], channels, strict=False), start=1):
        layers[f"conv{i}"] = nn.Conv2d(fan_in, fan_out, kernel_size, padding=kernel_size // 2)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"pool{i}"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)


def dense_layers(sizes: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Layers ``fc{i}`` from ``sizes[0]`` to ``sizes[-1]`` features, ``relu{i}`` and ``dropout{i}`` between them."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    last = len(sizes) - 1
    for i in range(1, len(sizes)):
        layers[f"fc{i}"] = nn.Linear(sizes[i - 1], sizes[i])
        if i < last:
            layers[f"relu{i}"] = nn.ReLU()
            if dropout:
                layers[f"dropout{i}"] = nn.Dropout(dropout)
    return nn.Sequential(layers)


def pooled_size(image_size: int, num_stages: int) -> int:
    """Side [pixels] of the feature map after ``num_stages`` halvings.

    Raises:
        ValueError: if nothing is left of the image.
    """
    size = image_size >> num_stages
    if size < 1:
        raise ValueError(
            f"{num_stages} poolings leave nothing of a {image_size}×{image_size} image: use fewer channels "
            f"entries or images of at least {2**num_stages} pixels"
        )
    return size
