"""The networks that are measured, briefly trained, and the images that they are measured on."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.nets import VisionTransformer, smooth
from lmc_lightning.core.objective import Objective
from lmc_lightning.data.datamodule import VisionDataModule
from lmc_lightning.data.vision import CIFAR10DataModule, FashionMNISTDataModule
from lmc_lightning.models.convnet import ConvNet
from lmc_lightning.models.lenet import LeNet5
from lmc_lightning.models.mlp import MLP
from lmc_lightning.models.resnet import ResNet18

Batch = tuple[Tensor, Tensor]

FOLDERS = {"data": Path("data"), "cache": Path("data/benchmarks")}
"""Where images are read from and where trained weights and references are kept; both git-ignored."""


def mean_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch."""
    return F.cross_entropy(module(batch[0]), batch[1])


@dataclass(frozen=True)
class Recipe:
    """A network, its images, and how it is trained before it is measured."""

    build: Callable[[], nn.Module]
    images: type[VisionDataModule]
    num_examples: int
    steps: int
    lr: float
    chunk_size: int = 128
    piecewise_linear: bool = True
    products: int = 3
    """Hessian products, or gradients, that are timed together."""


RECIPES: Mapping[str, Recipe] = {
    "convnet": Recipe(lambda: ConvNet((4, 4), fc=(8,)), FashionMNISTDataModule, 512, 200, 0.02),
    "tanhnet": Recipe(
        lambda: smooth(ConvNet((4, 4), fc=(8,))), FashionMNISTDataModule, 512, 200, 0.02, piecewise_linear=False
    ),
    "lenet5": Recipe(LeNet5, FashionMNISTDataModule, 2048, 300, 0.02, products=2),
    "resnet18": Recipe(lambda: ResNet18(width=16), CIFAR10DataModule, 256, 150, 0.05, products=1),
    "mlp4096": Recipe(lambda: MLP((4096,)), FashionMNISTDataModule, 512, 100, 0.02),
    "vit": Recipe(VisionTransformer, CIFAR10DataModule, 256, 300, 0.05, piecewise_linear=False, products=2),
}


class Work:
    """One of the ``RECIPES`` made ready: a trained network, and training and validation images."""

    def __init__(self, name: str) -> None:
        self.name, self.recipe = name, RECIPES[name]

    def module(self) -> nn.Module:
        """A fresh copy of the trained network in eval mode, which peers may alter as they please."""
        return copy.deepcopy(self.trained[0])

    def second_module(self) -> nn.Module:
        """The network trained from another initialisation: the other end of a path."""
        return copy.deepcopy(self._trained(seed=1))

    @cached_property
    def trained(self) -> tuple[nn.Module, int]:
        """The trained network and its number of parameters."""
        module = self._trained(seed=0)
        return module, sum(p.numel() for p in module.parameters())

    @cached_property
    def probe(self) -> Batch:
        """The images and labels that everything is measured on, as one batch."""
        images, labels = _images(self.recipe.images)["train"]
        return images[: self.recipe.num_examples], labels[: self.recipe.num_examples]

    @cached_property
    def validation(self) -> Batch:
        """As many held-out images."""
        images, labels = _images(self.recipe.images)["test"]
        return images[: self.recipe.num_examples], labels[: self.recipe.num_examples]

    @property
    def chunks(self) -> list[Batch]:
        """The probe set in the chunks that this package cuts it into on a CPU, for peers that take batches."""
        return in_chunks(self.probe, self.recipe.chunk_size)

    def objective(self, module: nn.Module | None = None) -> Objective:
        """The mean loss over the probe set, made from scratch as a user would."""
        return Objective(module or self.module(), [self.probe], mean_loss)

    def _trained(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        module = self.recipe.build()
        path = FOLDERS["cache"] / f"{self.name}_{seed}.pt"
        if path.is_file():
            module.load_state_dict(torch.load(path, weights_only=True))
        else:
            _train(module, *_images(self.recipe.images)["train"], self.recipe)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(module.state_dict(), path)
        return module.eval()


def in_chunks(batch: Batch, size: int) -> list[Batch]:
    """A batch cut into smaller ones."""
    return list(zip(batch[0].split(size), batch[1].split(size), strict=True))


def _train(module: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
    """A few steps of SGD with momentum, so that the spectrum is that of a network that has begun to learn."""
    optimizer = torch.optim.SGD(module.parameters(), lr=recipe.lr, momentum=0.9)
    for _ in range(recipe.steps):
        chosen = torch.randint(len(labels), (64,))
        optimizer.zero_grad()
        mean_loss(module, (images[chosen], labels[chosen])).backward()
        optimizer.step()


@cache
def _images(kind: type[VisionDataModule]) -> dict[str, Batch]:
    """Normalised images in a random but fixed order (some layouts on disk are sorted by class)."""
    datamodule = kind(FOLDERS["data"])
    mean, std = (torch.tensor(values)[:, None, None] for values in (kind.default_mean, kind.default_std))
    shuffled = {}
    for split, (images, labels) in (
        (name, (part.images, part.labels)) for name, part in datamodule.read(datamodule.locate()).items()
    ):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:20_000]
        shuffled[split] = ((images[order].float() / 255 - mean) / std, labels[order])
    return shuffled
