"""LeNet-5."""

from collections import OrderedDict

from torch import nn

from lmc_lightning.models.layers import FeaturesThenClassifier, dense_layers


class LeNet5(FeaturesThenClassifier):
    """LeNet-5 with average pooling and ReLU, ``(N, in_channels, 28, 28) -> (N, num_classes)``; 61,706 parameters.

    Two 5×5 convolutions (6 and 16 channels), each with 2×2 average pooling, then 400–120–84–``num_classes``. Images of
    28 pixels are padded to the 32 that the network was drawn for; those of 32 are taken as they are (62,006 parameters
    with three channels).

    Raises:
        ValueError: for an ``image_size`` other than 28 and 32 [pixels].
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        if image_size not in (28, 32):
            raise ValueError(f"LeNet5 takes images of 28 or 32 pixels, got image_size={image_size}: resize them")
        self.features = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, 6, 5, padding=(32 - image_size) // 2),
                relu1=nn.ReLU(),
                pool1=nn.AvgPool2d(2),
                conv2=nn.Conv2d(6, 16, 5),
                relu2=nn.ReLU(),
                pool2=nn.AvgPool2d(2),
            )
        )
        self.classifier = dense_layers([16 * 5 * 5, 120, 84, num_classes])
