"""Runs that average their weights by one of Lightning's callbacks: the average, and the weights themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_SWA = "StochasticWeightAveraging"


@dataclass(frozen=True)
class Average:
    """A running average of weights, on the CPU.

    Args:
        state: parameters and buffers by name; ``StochasticWeightAveraging`` leaves buffers as they were at the start.
        count: how many states it averages.
    """

    state: dict[str, Tensor]
    count: int


def averaging(callbacks: Sequence[Any]) -> list[Any]:
    """Those callbacks that average weights: ``WeightAveraging`` and what derives from it, and SWA's."""
    return [c for c in callbacks if {kind.__name__ for kind in type(c).__mro__} & {"WeightAveraging", _SWA}]


def average_of(trainer: Any, pl_module: nn.Module) -> Average | None:
    """The average that a run has at this moment, by what its callback writes into checkpoints; None: none yet."""
    for callback in averaging(trainer.callbacks):
        if any(kind.__name__ == _SWA for kind in type(callback).__mro__):
            saved = callback.state_dict()
            state, count = saved["average_model_state"], saved["n_averaged"]
        else:
            checkpoint: dict[str, Any] = {"state_dict": {}}
            callback.on_save_checkpoint(trainer, pl_module, checkpoint)
            state, count = checkpoint["state_dict"], int(checkpoint["averaging_state"]["n_averaged"])
        if count:
            return Average(_copied(state), count)
    return None


class LiveWeights:
    """The weights as they are trained, where an average takes their place before they can be kept.

    That is so at the end of a run, and at the start of the epoch in which SWA recomputes the statistics of BatchNorm.

    Args:
        callbacks: of the run.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._averaged = bool(averaging(callbacks))
        self._state: dict[str, Tensor] | None = None

    def end_epoch(self, pl_module: nn.Module) -> None:
        """Copy them, in ``on_train_epoch_end``."""
        if self._averaged:
            self._state = _copied(pl_module.state_dict())

    def between_epochs(self, pl_module: nn.Module) -> nn.Module | dict[str, Tensor]:
        """What to keep in ``on_train_epoch_start`` and ``on_train_end``."""
        return self._state or pl_module


def _copied(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True) for name, t in state.items() if isinstance(t, Tensor)}
