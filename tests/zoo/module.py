"""What every module of the zoo shares: a small smooth classifier with its own data, and what measuring it comes to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lmc_lightning.core.selfcheck import Verdict

NUM_FEATURES, NUM_CLASSES, BATCH_SIZE = 6, 3, 8
RANDOM = "random numbers of the step"


@dataclass(frozen=True)
class Expected:
    """What a measuring callback makes of a module: it works, unless a refusal or a failure is named."""

    refusal: str = ""
    """Pattern of the error that ``setup`` raises unless the callback is given ``options``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of a measuring callback with which it works."""
    failure: str = ""
    """Pattern of the reason with which visits are recorded as failed, without ``options``, training going on."""
    failures: int = 7
    """How many of the visits after 0 to 6 steps fail."""
    verdict: Verdict = "exact"
    """What the self-check finds: whether double backward is right, finite differences are, or there is no Hessian."""
    inexact: bool = False
    """The step computes its loss in lower precision than a visit, or than float64 when that is asked for."""
    unlike_run: str = ""
    """Why the loss of a visit is another number than the run's own step returned."""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the Trainer that the peculiarity needs."""
    others: Callable[[], list[Callback]] = list
    """Other callbacks in the run."""
    ignore: tuple[str, ...] = ()
    """Warnings of Lightning and torch about the module itself, as filters."""
    compiled: bool = False
    """The Trainer is given what ``torch.compile`` makes of the module."""
    slow: bool = False


class ZooModule(LightningModule):
    """A classifier of vectors with one hidden layer, trained by momentum; subclasses are the peculiar ones."""

    expected: ClassVar[Expected] = Expected()

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(*batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(*batch), batch_size=BATCH_SIZE)

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trainable, lr=0.1, momentum=0.9)

    def train_dataloader(self) -> Any:
        return DataLoader(self.dataset(), batch_size=BATCH_SIZE, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*examples(BATCH_SIZE)), batch_size=BATCH_SIZE)

    def dataset(self) -> Dataset[Any]:
        return TensorDataset(*examples())


def mlp(inputs: int = NUM_FEATURES, hidden: int = 5, outputs: int = NUM_CLASSES) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def examples(num_examples: int = 3 * BATCH_SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(num_examples, NUM_FEATURES, generator=generator)
    return x, (x[:, :NUM_CLASSES] + 0.5 * torch.randn(num_examples, NUM_CLASSES, generator=generator)).argmax(1)
