"""Callbacks as they are commonly written. Each of them changes the training, which the fingerprint must show."""

import copy
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader


class IteratesTheTrainersLoader(Callback):
    """Evaluates on the trainer's own loader at the end of each epoch."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            for batch in trainer.train_dataloader:
                pl_module(batch[0])


class PeeksIntoTheLoader(Callback):
    """Takes one batch from the trainer's loader, and does nothing with it."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            next(iter(trainer.train_dataloader))


class EvaluatesOnALoaderOfItsOwn(Callback):
    """Eval mode, no gradients, a loader of its own without shuffling: looks harmless."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.eval()
        with torch.no_grad():
            for batch in DataLoader(trainer.train_dataloader.dataset, batch_size=8):
                pl_module(batch[0])
        pl_module.train()


class CopiesAndForksTheGenerator(Callback):
    """A deep copy, a loader of its own, and torch's generator forked: numpy's and the data set's go on."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.random.fork_rng(), torch.no_grad():
            module = copy.deepcopy(pl_module)
            for batch in DataLoader(trainer.train_dataloader.dataset, batch_size=8):
                module(batch[0])


class StepsOnTheLiveModule(Callback):
    """Calls the module's own step on the batch at hand."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.autograd.grad(pl_module.training_step(batch, batch_idx), list(pl_module.parameters()))


class PerturbsInPlace(Callback):
    """Adds a direction to the weights, evaluates, and subtracts it again."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for sign in (1, -1):
                for index, parameter in enumerate(pl_module.parameters()):
                    parameter.add_(sign * (index + 1) / 3)


NAIVE = [
    IteratesTheTrainersLoader,
    PeeksIntoTheLoader,
    EvaluatesOnALoaderOfItsOwn,
    CopiesAndForksTheGenerator,
    StepsOnTheLiveModule,
    PerturbsInPlace,
]
