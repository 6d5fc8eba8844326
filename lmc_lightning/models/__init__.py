"""Networks of the loss-landscape literature as plain modules, and the LightningModule that trains them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from lmc_lightning.models.alexnet import AlexNet
from lmc_lightning.models.convnet import ConvNet
from lmc_lightning.models.initialization import seeded_init
from lmc_lightning.models.lenet import LeNet5
from lmc_lightning.models.mlp import MLP
from lmc_lightning.models.resnet import ResNet18, ResNet20
from lmc_lightning.models.vgg import VGG16, ReducedVGG

if TYPE_CHECKING:
    from lmc_lightning.models.classifier import ImageClassifier

__all__ = [
    "MLP",
    "NETWORKS",
    "VGG16",
    "AlexNet",
    "ConvNet",
    "ImageClassifier",
    "LeNet5",
    "ReducedVGG",
    "ResNet18",
    "ResNet20",
    "build_network",
    "seeded_init",
]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "lenet5": LeNet5,
    "reduced_vgg": ReducedVGG,
    "vgg16": VGG16,
    "resnet18": ResNet18,
    "resnet20": ResNet20,
    "alexnet": AlexNet,
    "convnet": ConvNet,
}
"""The networks by the names that configurations use."""


def build_network(name: str, num_classes: int = 10, **kwargs: Any) -> nn.Module:
    """The network called ``name`` in `NETWORKS` with ``num_classes`` outputs; ``kwargs`` go to its class.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")
    outputs = {"out_features" if name == "mlp" else "num_classes": num_classes}
    return NETWORKS[name](**outputs, **kwargs)


def __getattr__(name: str) -> Any:
    # Loaded on first use: the networks alone need no Lightning.
    if name == "ImageClassifier":
        from lmc_lightning.models.classifier import ImageClassifier

        return ImageClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
