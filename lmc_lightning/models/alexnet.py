"""AlexNet."""

from collections import OrderedDict

from torch import nn

from lmc_lightning.models.layers import FeaturesThenClassifier


class AlexNet(FeaturesThenClassifier):
    """AlexNet for 224×224 images, ``(N, 3, 224, 224) -> (N, num_classes)``; 57,823,752 parameters with 200 classes.

    The one-column layout (arXiv 1404.5997) with 64, 192, 384, 256 and 256 channels, BatchNorm after the first two
    convolutions, and fully connected 9216–4096–4096–``num_classes`` with dropout before the first two.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, 64, 11, stride=4, padding=2),
                bn1=nn.BatchNorm2d(64),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(3, stride=2),
                conv2=nn.Conv2d(64, 192, 5, padding=2),
                bn2=nn.BatchNorm2d(192),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(3, stride=2),
                conv3=nn.Conv2d(192, 384, 3, padding=1),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(384, 256, 3, padding=1),
                relu4=nn.ReLU(),
                conv5=nn.Conv2d(256, 256, 3, padding=1),
                relu5=nn.ReLU(),
                pool5=nn.MaxPool2d(3, stride=2),
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict(
                dropout1=nn.Dropout(dropout),
                fc1=nn.Linear(256 * 6 * 6, 4096),
                relu1=nn.ReLU(),
                dropout2=nn.Dropout(dropout),
                fc2=nn.Linear(4096, 4096),
                relu2=nn.ReLU(),
                fc3=nn.Linear(4096, num_classes),
            )
        )
