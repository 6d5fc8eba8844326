"""What a run says of itself while it trains: the loss of every step, and the metrics of every validation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmc_lightning.branching import internals
from lmc_lightning.core.files import write_atomic

TRAIN_LOSS = "train_loss"
_MAX_WAITING = 1000


class Curves:
    """The curves of one run, kept in a file of the family's folder to which every epoch is appended.

    A step's loss is that on its own batch (the mean over those that it accumulates), before the update. Losses stay
    on their device until the end of the epoch.

    Args:
        path: of the file; None: this process writes none.
        step: optimizer steps already taken; what the file has beyond them is dropped.
    """

    def __init__(self, path: Path | None, step: int = 0) -> None:
        self._path, self._step = path, step
        self._batches: list[Tensor] = []
        self._losses: list[tuple[int, Tensor]] = []
        self._metrics: list[tuple[str, int, Tensor]] = []
        if path is not None:
            kept = [(n, s, v) for n, curve in read_curves(path).items() for s, v in curve.items() if s <= step]
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(f"{_line(*row)}\n" for row in kept)
            write_atomic(path, lambda file: file.write(text.encode()))

    def see_batch(self, trainer: Any, outputs: Any) -> None:
        """Note the loss of a batch, in ``on_train_batch_end``."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._batches.append(loss.detach().reshape(()).clone())
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._batches:  # what Lightning accumulates is divided by the number of batches already
                automatic = trainer.lightning_module.automatic_optimization
                reduced = torch.sum if automatic else torch.mean
                self._losses.append((self._step, reduced(torch.stack(self._batches))))
            self._batches = []
            if len(self._losses) >= _MAX_WAITING:
                self.write()

    def see_validation(self, trainer: Any) -> None:
        """Note what the validation has logged, in ``on_validation_end``."""
        if not trainer.sanity_checking:
            found = internals.validation_metrics(trainer)
            self._metrics += [(name, trainer.global_step, value.detach().clone()) for name, value in found.items()]

    def write(self) -> None:
        """Append what was noted to the file."""
        losses = torch.stack([loss for _, loss in self._losses]).tolist() if self._losses else []
        rows = [(TRAIN_LOSS, step, loss) for (step, _), loss in zip(self._losses, losses, strict=True)]
        rows += [(n, step, float(v)) for n, step, v in self._metrics if n != TRAIN_LOSS and v.numel() == 1]
        self._losses, self._metrics = [], []
        if self._path is not None and rows:
            with open(self._path, "a") as file:
                file.writelines(f"{_line(*row)}\n" for row in rows)


def _line(name: str, step: int, value: float) -> str:
    return f"{step},{value!r},{name}"


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """Values by name and optimizer step; without what was being written when the process died."""
    curves: dict[str, dict[int, float]] = {}
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    for line in lines:
        step, value, name = line.split(",", 2)
        curves.setdefault(name, {})[int(step)] = float(value)
    return curves
