"""Any LightningModule and its batches as an Objective: its own step, on a shadow, out of reach of the trainer."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from lmc_lightning.callbacks.bridge.logged import LogRecorder
from lmc_lightning.callbacks.bridge.step import StepBatch, step_function
from lmc_lightning.callbacks.bridge.views import Views, optimizer_view, trainer_view
from lmc_lightning.core.collective import Collective, ProcessGroup
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.shadow import Mode
from lmc_lightning.types import BatchWeight, LossFn

SAMPLE_SIZE = 32
"""Most examples of a chunk that stands for one sample of the data."""


def _refuse_gather(*args: object, **kwargs: object) -> None:
    raise RuntimeError(
        "The step gathers from other processes, which are not in step with this one while it is measured. "
        "Pass loss_fn=(module, batch) -> scalar mean loss."
    )


def _refuse(*args: object, **kwargs: object) -> None:
    raise RuntimeError("The step steps its optimizers itself. Pass loss_fn=(module, batch) -> scalar mean loss.")


def replacements(pl_module: nn.Module, trainer: Any | None, recorder: LogRecorder | None = None) -> dict[str, object]:
    """What a shadow of a LightningModule gets instead of its ties to the run; nothing for a plain module."""
    if not hasattr(pl_module, "training_step"):
        return {}
    silent: dict[str, object] = {
        "log": recorder.log if recorder else _ignore,
        "log_dict": recorder.log_dict if recorder else _ignore,
        "print": _ignore,
        "manual_backward": _refuse,
        "_trainer": None if trainer is None else trainer_view(trainer),
    }
    if trainer is not None and trainer.world_size > 1:
        silent["all_gather"] = _refuse_gather
    if trainer is not None:
        silent["optimizers"] = Views(lambda: [optimizer_view(o) for o in trainer.optimizers])
        silent["lr_schedulers"] = Views(lambda: [c.scheduler for c in trainer.lr_scheduler_configs])
    return silent


def _ignore(*args: object, **kwargs: object) -> None:
    return None


def collective_of(trainer: Any | None, *, interruptible: bool = True) -> Collective:
    """The processes that measure together; a measurement ends on all of them when one is asked to end."""
    if trainer is None:
        return Collective()

    def interrupted() -> bool:
        return interruptible and bool(trainer.received_sigterm)

    return (
        ProcessGroup(trainer.strategy.root_device, interrupted) if trainer.world_size > 1 else Collective(interrupted)
    )


def _precision_of(trainer: Any | None) -> Callable[[], AbstractContextManager[Any]]:
    return nullcontext if trainer is None else trainer.precision_plugin.forward_context


def objective_of(
    pl_module: nn.Module,
    batches: Sequence[StepBatch],
    *,
    trainer: Any | None = None,
    loss_fn: LossFn | None = None,
    parameters: Sequence[str] | None = None,
    batch_weight: BatchWeight | None = None,
    mode: Mode = "eval",
    match_precision: bool = False,
    seed: int = 0,
    recorder: LogRecorder | None = None,
    wrap: Callable[[LossFn], LossFn] | None = None,
    **options: Any,
) -> Objective:
    """θ ↦ mean of the module's own training loss over ``batches``, or of what ``wrap`` makes of it."""
    step = step_function(pl_module, loss_fn)
    weight = None if batch_weight is None else lambda step_batch: batch_weight(step_batch.batch)
    return Objective(
        pl_module,
        batches,
        step if wrap is None else wrap(step),
        parameters=parameters,
        batch_weight=weight,
        mode=mode,
        seed=seed,
        **options,
        replacements=replacements(pl_module, trainer, recorder),
        precision=_precision_of(trainer) if match_precision else None,
        collective=collective_of(trainer),
    )


def in_samples(objective: Objective, loss_on: Callable[..., Objective], batches: Sequence[StepBatch]) -> Objective:
    """The same loss in chunks of few examples, the samples behind errors over data, where it tells no examples apart.

    Args:
        objective: of the batches.
        loss_on: ``(batches, **options) -> Objective``, which made it.
        batches: the probe set.
    """
    if objective.baseline.example_losses is not None or not objective.additive:
        return objective
    return loss_on(batches, chunk_size=SAMPLE_SIZE)
