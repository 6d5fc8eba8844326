"""Residual networks for 32×32 images."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm and a shortcut, ``(N, C, H, W) -> (N, width, H / stride, W / stride)``.

    The shortcut is the identity where the shape stays, else a 1×1 convolution with BatchNorm (arXiv 1512.03385).
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_width != width:
            self.shortcut = nn.Sequential(
                OrderedDict(conv=nn.Conv2d(in_width, width, 1, stride=stride, bias=False), bn=nn.BatchNorm2d(width))
            )
        self.relu2 = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        """Residual branch plus shortcut, after the ReLU."""
        hidden = self.relu1(self.bn1(self.conv1(inputs)))
        out: Tensor = self.relu2(self.bn2(self.conv2(hidden)) + self.shortcut(inputs))
        return out


class CifarResNet(nn.Module):
    """A 3×3 stem without pooling, one stage of ``num_blocks`` basic blocks per width, global average, linear layer.

    ``(N, 3, H, W) -> (N, num_classes)``; every stage ``layer{i}`` but the first halves the image.
    """

    def __init__(self, widths: Sequence[int], num_blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        in_width = widths[0]
        for i, width in enumerate(widths, start=1):
            strides = [1 if i == 1 else 2] + [1] * (num_blocks - 1)
            in_widths = [in_width] + [width] * (num_blocks - 1)
            blocks = [BasicBlock(fan_in, width, stride) for fan_in, stride in zip(in_widths, strides, strict=True)]
            stages[f"layer{i}"] = nn.Sequential(*blocks)
            in_width = width
        self.stages = nn.Sequential(stages)
        self.fc = nn.Linear(in_width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        features: Tensor = self.stages(self.relu(self.bn1(self.conv1(images))))
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits


class ResNet18(CifarResNet):
    """ResNet-18 for CIFAR: four stages of two blocks with ``width`` × (1, 2, 4, 8) channels.

    Parameters with 10 classes: 11,173,962 (width 64), 701,466 (width 16), 2,991 (width 1).
    """

    def __init__(self, width: int = 64, num_classes: int = 10) -> None:
        super().__init__([width, 2 * width, 4 * width, 8 * width], num_blocks=2, num_classes=num_classes)


class ResNet20(CifarResNet):
    """ResNet-20 for CIFAR: three stages of three blocks with ``width`` × (1, 2, 4) channels (arXiv 1512.03385, §4.2).

    Parameters with 10 classes: 272,474 (width 16). Differs from the source in its two shape-changing shortcuts, which
    are projections (zero-padded identities there, 269,722 parameters): channels can then be permuted freely.
    """

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__([width, 2 * width, 4 * width], num_blocks=3, num_classes=num_classes)
