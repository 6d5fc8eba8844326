"""Image classification as a LightningModule of plain hyper-parameters."""

import math
from collections.abc import Callable, Collection
from functools import partial
from inspect import signature
from typing import Any, Literal, TypeAlias, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau
from torchmetrics.classification import MulticlassAccuracy

from lmc_lightning.models import build_network, seeded_init
from lmc_lightning.optim import SAM

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
"""The optimizers by the names that configurations use."""

Schedule: TypeAlias = Literal["none", "cosine", "step", "one_cycle", "plateau"]
Loss: TypeAlias = Literal["cross_entropy", "squared_error"]


class ImageClassifier(pl.LightningModule):
    """Training of a network on batches ``(images, targets)``: classes, or real numbers under squared error.

    Logs ``train_loss`` per step, its mean over the steps of an epoch as ``train_loss_epoch``, and ``val_loss``,
    ``val_acc``, ``test_loss``, ``test_acc`` per epoch [nats; fraction correct]. Every argument is a plain value kept in
    ``hparams``, so checkpoints load under PyTorch's weights-only rule and
    ``ImageClassifier.load_from_checkpoint(path)`` needs nothing else.

    Any other module is a subclass, whose ``network_kwargs`` (or further arguments of its own) are in ``self.hparams``
    when `build_network` runs:

        >>> class Linear(ImageClassifier):
        ...     def build_network(self):
        ...         return nn.Sequential(nn.Flatten(), nn.Linear(**self.hparams["network_kwargs"]))
        >>> Linear(network_kwargs={"in_features": 784, "out_features": 10})(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])

    Args:
        network: Name in `lmc_lightning.models.NETWORKS`.
        network_kwargs: Further arguments of the network.
        num_classes: Number of outputs of the network.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: Learning rate; the peak of ``"one_cycle"``.
        optimizer_kwargs: Further arguments of the optimizer, such as ``{"momentum": 0.9, "weight_decay": 5e-4}``.
        scheduler: ``"none"``; ``"cosine"`` falls to ``eta_min`` (0) over ``T_max`` [epochs]; ``"step"`` multiplies by
            ``gamma`` (0.1) at ``milestones`` [epochs]; ``"one_cycle"`` rises and falls per step over the whole
            training; ``"plateau"`` multiplies by ``factor`` (0.1) when ``monitor`` (``"val_loss"``) has not fallen for
            ``patience`` (10) epochs. By default ``T_max`` is the trainer's last epoch and the milestones are 1/2 and
            3/4 of it; under a trainer that only has ``max_steps`` these defaults count steps.
        init_seed: Seed of the initial weights; the global generators are not touched.
        scheduler_kwargs: Further arguments of ``CosineAnnealingLR``, ``MultiStepLR``, ``OneCycleLR``, which keeps the
            optimizer's momentum unless ``cycle_momentum`` is set, or ``ReduceLROnPlateau``, and its ``monitor``.
        loss: ``"cross_entropy"``, or ``"squared_error"``: the mean over all outputs of the squared distance to one-hot
            classes, or to targets that are real numbers; the latter log no accuracy.
        sam_rho: Radius of sharpness-aware minimisation around the optimizer, e.g. 0.05; 0: none.
        sam_adaptive: ASAM, with a radius of e.g. 0.5.

    Raises:
        ValueError: for an unknown network, optimizer, scheduler or loss.
        TypeError: for a hyper-parameter that a weights-only checkpoint cannot hold.
    """

    def __init__(
        self,
        network: str = "lenet5",
        network_kwargs: dict[str, Any] | None = None,
        num_classes: int = 10,
        optimizer: Literal["sgd", "adam", "adamw"] = "adam",
        lr: float = 1e-3,
        optimizer_kwargs: dict[str, Any] | None = None,
        scheduler: Schedule = "none",
        init_seed: int = 0,
        scheduler_kwargs: dict[str, Any] | None = None,
        loss: Loss = "cross_entropy",
        sam_rho: float = 0.0,
        sam_adaptive: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name in signature(ImageClassifier).parameters:
            _require_plain(name, self.hparams[name])
        _require_choice("optimizer", optimizer, OPTIMIZERS)
        _require_choice("scheduler", scheduler, get_args(Schedule))
        _require_choice("loss", loss, get_args(Loss))
        with seeded_init(init_seed):
            built = self.build_network()
        self.network = built.to(torch.get_default_device())
        # Targets are checked by the loss; the metric's own check would wait for the device at every batch.
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def build_network(self) -> nn.Module:
        """The module that maps images to logits; override it to train another one."""
        kwargs = self.hparams["network_kwargs"] or {}
        return build_network(self.hparams["network"], num_classes=self.hparams["num_classes"], **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)``."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of the batch, logged as ``train_loss``."""
        images, targets = batch
        loss = self.loss(self(images), targets)
        self.log("train_loss", loss)
        self.log("train_loss_epoch", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of outputs ``(N, num_classes)`` for classes ``(N,)`` or real targets ``(N, num_classes)``."""
        if self.hparams["loss"] == "cross_entropy":
            return F.cross_entropy(outputs, targets)
        wanted = targets if targets.is_floating_point() else F.one_hot(targets, outputs.shape[1])
        return F.mse_loss(outputs, wanted.to(outputs.dtype))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``val_loss`` and ``val_acc``."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``test_loss`` and ``test_acc``."""
        self._evaluate(batch, "test", self.test_accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and its schedule unless that is ``"none"``."""
        kwargs = self.hparams["optimizer_kwargs"] or {}
        make, kwargs = OPTIMIZERS[self.hparams["optimizer"]], {"lr": self.hparams["lr"], **kwargs}
        if self.hparams["sam_rho"]:
            sam = {"rho": self.hparams["sam_rho"], "adaptive": self.hparams["sam_adaptive"], "module": self}
            make = partial(SAM, base=make, **sam)
        optimizer = make(self.parameters(), **kwargs)
        if self.hparams["scheduler"] == "none":
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._schedule(optimizer)}

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        images, targets = batch
        logits = self(images)
        self.log(f"{stage}_loss", self.loss(logits, targets), prog_bar=True, sync_dist=True)
        if not targets.is_floating_point():
            accuracy.update(logits, targets)
            self.log(f"{stage}_acc", accuracy, prog_bar=True)

    def _schedule(self, optimizer: Optimizer) -> LRSchedulerConfigType:
        name, kwargs = self.hparams["scheduler"], self.hparams["scheduler_kwargs"] or {}
        if name == "one_cycle":
            return {"scheduler": self._one_cycle(optimizer, kwargs), "interval": "step"}
        if name == "plateau":
            own = {key: value for key, value in kwargs.items() if key != "monitor"}
            return {"scheduler": ReduceLROnPlateau(optimizer, **own), "monitor": kwargs.get("monitor", "val_loss")}
        scheduler = CosineAnnealingLR if name == "cosine" else MultiStepLR
        if kwargs.keys() & {"T_max", "milestones"}:
            return {"scheduler": scheduler(optimizer, **kwargs), "interval": "epoch"}
        length, interval = self._training_length()
        milestones = [math.ceil(length / 2), math.ceil(3 * length / 4)]
        default = {"T_max": length} if name == "cosine" else {"milestones": milestones}
        return {"scheduler": scheduler(optimizer, **default, **kwargs), "interval": interval}

    def _one_cycle(self, optimizer: Optimizer, kwargs: dict[str, Any]) -> OneCycleLR:
        total_steps = kwargs.get("total_steps") or self._total_steps()
        # PyTorch's default cycles the momentum, which would give plain SGD one.
        defaults = {"max_lr": self.hparams["lr"], "cycle_momentum": False}
        return OneCycleLR(optimizer, **{**defaults, **kwargs, "total_steps": total_steps})

    def _training_length(self) -> tuple[int, str]:
        """Epochs of the training, or its steps where the trainer only limits those."""
        epochs = self.trainer.max_epochs
        return (epochs, "epoch") if epochs is not None and epochs > 0 else (self._total_steps(), "step")

    def _total_steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps) or steps < 1:
            raise ValueError(
                f"scheduler={self.hparams['scheduler']!r} needs the length of the training, got a trainer without an "
                "end: set Trainer(max_steps=...) or max_epochs"
            )
        return int(steps)


def _require_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _require_plain(name: str, value: object) -> None:
    # Exact types: a numpy scalar is a float to isinstance and makes the checkpoint unreadable.
    if type(value) is dict:
        for key, item in value.items():
            _require_plain(f"{name}[{key!r}]", item)
    elif type(value) is list or type(value) is tuple:
        for i, item in enumerate(value):
            _require_plain(f"{name}[{i}]", item)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(
            f"{name} must be a plain number, string, list or dict so that checkpoints load, got "
            f"{type(value).__name__}: convert it, for instance with float(...) or .tolist()"
        )
