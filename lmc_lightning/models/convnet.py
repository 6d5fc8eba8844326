"""Small convolutional networks without normalisation."""

from collections.abc import Sequence

from lmc_lightning.models.layers import FeaturesThenClassifier, conv_stages, dense_layers, pooled_size


class ConvNet(FeaturesThenClassifier):
    """Plain CNN: same-size convolution, ReLU, 2×2 max pooling per entry of ``channels``, then the layers of ``fc``.

    ``(N, in_channels, image_size, image_size) -> (N, num_classes)``, no BatchNorm, no dropout. Calls that build
    the usual small networks:

    ====================================================================================  ==========
    call                                                                                  parameters
    ====================================================================================  ==========
    ``ConvNet()``, that is ``channels=(32, 64), kernel_size=3, fc=(128,)`` on 1×28×28     421,642
    ``ConvNet((16, 32), kernel_size=5, fc=(128,))`` on 1×28×28                            215,370
    ``ConvNet((32, 64, 128), fc=(512, 256), in_channels=3, image_size=32)``               1,276,234
    ====================================================================================  ==========

    Raises:
        ValueError: for an even ``kernel_size``, or if pooling leaves nothing of the image.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64),
        kernel_size: int = 3,
        fc: Sequence[int] = (128,),
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        side = pooled_size(image_size, len(channels))
        self.features = conv_stages(in_channels, channels, kernel_size)
        self.classifier = dense_layers([channels[-1] * side**2, *fc, num_classes])
