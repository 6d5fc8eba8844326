"""The arguments that all measuring callbacks share, as editors and type checkers see them behind ``**common``."""

from collections.abc import Iterable
from typing import Any, TypedDict

from typing_extensions import Unpack

from lmc_lightning.callbacks.visits.tolerance import OnError
from lmc_lightning.core.shadow import Mode
from lmc_lightning.types import BatchWeight, LossFn

__all__ = ["Common", "CommonButExamples", "Unpack"]


class CommonButExamples(TypedDict, total=False):
    """Those of :class:`MeasurementCallback` but ``num_examples``, for callbacks with a default of their own."""

    every_n_epochs: int | None
    epochs: list[int] | None
    every_n_train_steps: int | None
    steps: list[int] | None
    probe_dataloader: Iterable[Any] | None
    parameters: list[str] | None
    batch_weight: BatchWeight | None
    expose: bool
    on_error: OnError
    loss_fn: LossFn | None
    mode: Mode
    match_precision: bool
    seed: int
    max_overhead: float | None
    name: str | None


class Common(CommonButExamples, total=False):
    """Those of :class:`MeasurementCallback`."""

    num_examples: int | None
