"""What steps take and return: signatures, dicts, output objects, nothing, losses of other shapes and types."""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanSquaredError

from tests.zoo.module import NUM_CLASSES, NUM_FEATURES, Expected, ZooModule, mlp


class Plain(ZooModule):
    """Nothing is peculiar."""


class ReturnsDict(ZooModule):
    """The step returns a dict that holds more than the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        logits = self(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits.detach()}


class ModelOutput(OrderedDict[str, Tensor]):
    """A mapping whose entries are attributes too, as language-model libraries return it."""

    @property
    def loss(self) -> Tensor:
        return self["loss"]


class ReturnsModelOutput(ZooModule):
    """The network computes its own loss and returns it inside an output object."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> ModelOutput:
        logits = self.net(x)
        output = ModelOutput(logits=logits)
        if labels is not None:
            output["loss"] = F.cross_entropy(logits, labels)
        return output

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self(x, labels=y).loss

    def training_step(self, batch: Any, batch_idx: int) -> ModelOutput:
        return self(batch[0], labels=batch[1])


class TakesNoIndex(ZooModule):
    """The step takes the batch only."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return self.loss(*batch)


class NamesItsArgumentsOtherwise(ZooModule):
    """The step's arguments have names of their own."""

    def training_step(self, train_batch: Any, batch_nb: int) -> Tensor:  # type: ignore[override]
        return self.loss(*train_batch) * (1 + batch_nb)


class FetchesItsBatches(ZooModule):
    """The step takes the iterator and fetches batches itself."""

    expected = Expected(
        refusal="fetches its batches from dataloader_iter",
        options={"loss_fn": lambda module, batch: module.loss(*batch), "probe_dataloader": "own"},
        ignore=("ignore:Found `dataloader_iter` argument:UserWarning",),
    )

    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return self.loss(*batch)


class SkipsBatches(ZooModule):
    """The step returns nothing for some batches."""

    expected = Expected(ignore=("ignore:`training_step` returned `None`",))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 1 else self.loss(*batch)


class NeverReturnsALoss(ZooModule):
    """The step returns nothing at all, as of a network that is only evaluated."""

    expected = Expected(
        failure="returned no loss for any of 2 batches", ignore=("ignore:`training_step` returned `None`",)
    )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.log("train_loss", self.loss(*batch))


class ReturnsOneElement(ZooModule):
    """The loss has shape (1,)."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(*batch).reshape(1)


class LossInFloat64(ZooModule):
    """The loss is accumulated in double precision over a float32 network."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x).double(), y)


class LossIsAMetric(ZooModule):
    """The loss is the value of a metric object, which is logged as such."""

    expected = Expected(inexact=True)

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(outputs=1)
        self.criterion = MeanSquaredError()
        self.val_criterion = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.criterion(self(batch[0]).squeeze(1), batch[1].to(batch[0].dtype))
        self.log("train_mse", self.criterion)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_criterion(self(batch[0]).squeeze(1), batch[1].float())
        self.log("val_mse", self.val_criterion)


class SumsSeveralLosses(ZooModule):
    """Cross-entropy, a reconstruction error and a penalty on the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(outputs=NUM_CLASSES + NUM_FEATURES)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits, reconstruction = self(x).split([NUM_CLASSES, NUM_FEATURES], dim=1)
        penalty = sum(p.square().sum() for p in self.parameters())
        return F.cross_entropy(logits, y) + 0.1 * F.mse_loss(reconstruction, x) + 1e-3 * penalty


class SumsOverExamples(ZooModule):
    """The loss is a sum, so that it is additive over batches but no mean."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x), y, reduction="sum")


class IgnoresTargets(ZooModule):
    """Some targets carry the ignored index, in one batch all of them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        x, y = batch
        y = y.where(x[:, 0] > 0, torch.full_like(y, -100))
        return F.cross_entropy(self(x), y)


class Contrastive(ZooModule):
    """Every example's loss depends on all others of its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = F.normalize(self(batch[0]), dim=1)
        views = F.normalize(self(0.9 * batch[0] + 0.1), dim=1)
        return F.cross_entropy(z @ views.T / 0.5, torch.arange(len(z)))


class DiffersInEval(ZooModule):
    """The forward returns probabilities in eval and logits in training; outside training there is no loss."""

    expected = Expected(failure="returned no loss for any of 2 batches in mode='eval'", options={"mode": "train"})

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return logits if self.training else logits.softmax(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.loss(*batch) if self.training else None
