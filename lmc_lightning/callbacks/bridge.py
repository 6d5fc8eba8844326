"""Any LightningModule and its batches as an Objective: its own step, on a shadow, out of reach of the trainer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lmc_lightning.core.collective import Collective, ProcessGroup
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.shadow import Mode
from lmc_lightning.core.structure import leading_size
from lmc_lightning.types import Batch, BatchWeight, LossFn


class StepBatch(NamedTuple):
    """A batch as the steps of a LightningModule take it."""

    batch: Batch
    batch_idx: int = 0


_FORBIDDEN = frozenset(
    {"fit", "validate", "test", "predict", "save_checkpoint", "step", "zero_grad", "load_state_dict", "clip_gradients"}
)


class ReadOnly:
    """Reads through to an object; starts nothing and keeps what is set on it to itself.

    Args:
        target: the trainer, optimizer or scheduler to be read.
        overrides: attributes that are to read otherwise.
    """

    def __init__(self, target: object, **overrides: object) -> None:
        self.__dict__.update(overrides, _target=target)

    def __getattr__(self, name: str) -> Any:
        if name in _FORBIDDEN:
            raise RuntimeError(
                f"A step called {name}() while it was being measured; pass loss_fn=(module, batch) -> loss."
            )
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_target"], name)

    def __deepcopy__(self, memo: object) -> "ReadOnly":
        """One that starts from the same attributes, so that each evaluation finds what the first one found."""
        target = self.__dict__["_target"]
        return ReadOnly(target, **{name: value for name, value in self.__dict__.items() if name != "_target"})


def optimizer_view(optimizer: Any) -> ReadOnly:
    """An optimizer as a step on a shadow sees it: what is set in its groups is lost."""
    return ReadOnly(optimizer, param_groups=[dict(group) for group in optimizer.param_groups])


def scheduler_view(scheduler: Any) -> ReadOnly:
    """A scheduler as a step on a shadow sees it: at the position it has now."""
    rates = getattr(scheduler, "_last_lr", None)
    known: dict[str, Any] = {} if rates is None else {"get_last_lr": partial(list, rates)}
    return ReadOnly(scheduler, last_epoch=getattr(scheduler, "last_epoch", None), **known)


def trainer_view(trainer: Any) -> ReadOnly:
    """The trainer as a step on a shadow sees it: readable, with silent loggers, and at the position it has now."""
    silent = [DummyLogger() for _ in trainer.loggers]
    return ReadOnly(
        trainer,
        logger=silent[0] if silent else None,
        loggers=silent,
        optimizers=[optimizer_view(o) for o in trainer.optimizers],
        lr_scheduler_configs=[ReadOnly(c, scheduler=scheduler_view(c.scheduler)) for c in trainer.lr_scheduler_configs],
        global_step=trainer.global_step,
        current_epoch=trainer.current_epoch,
    )


@dataclass
class LogRecorder:
    """Stands in for ``self.log``: keeps what a pass logs, and reduces it as Lightning would."""

    values: dict[str, list[tuple[Any, float, Any]]] = field(default_factory=dict)
    batch_size: float = 1.0

    def __deepcopy__(self, memo: object) -> "LogRecorder":
        return self

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Keep one logged value; a metric object is read when the pass is over."""
        size = kwargs.get("batch_size") or self.batch_size
        kept = value.detach().clone() if isinstance(value, Tensor) else value
        self.values.setdefault(name, []).append((kept, float(size), kwargs.get("reduce_fx", "mean")))

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Keep several values."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def reduced(self, collective: Collective | None = None) -> dict[str, float]:
        """One number for each name, over all processes."""
        return {name: _reduce(entries, collective or Collective()) for name, entries in self.values.items()}


def _reduce(entries: list[tuple[Any, float, Any]], collective: Collective) -> float:
    last, _, reduce_fx = entries[-1]
    if isinstance(last, Metric):
        return float(last.compute())  # over all processes, by itself
    rows = collective.gather(lambda: torch.tensor([[float(v), w] for v, w, _ in entries], dtype=torch.float64))
    values, weights = rows.T
    if reduce_fx == "mean" or reduce_fx is torch.mean:
        return float(values @ weights / weights.sum())
    reduce = {"sum": torch.sum, "min": torch.min, "max": torch.max}.get(reduce_fx, reduce_fx)
    return float(reduce(values))


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
        silent["optimizers"] = _Views(lambda: [optimizer_view(o) for o in trainer.optimizers])
        silent["lr_schedulers"] = _Views(lambda: [c.scheduler for c in trainer.lr_scheduler_configs])
    return silent


def _ignore(*args: object, **kwargs: object) -> None:
    return None


@dataclass
class _Views:
    """``self.optimizers()`` and ``self.lr_schedulers()`` of a shadow: one view, or a list of them."""

    make: Callable[[], list[ReadOnly]]

    def __call__(self, use_pl_optimizer: bool = True) -> ReadOnly | list[ReadOnly] | None:
        views = self.make()
        return views[0] if len(views) == 1 else (views or None)


def step_function(pl_module: Any, loss_fn: LossFn | None) -> LossFn:
    """``(module, StepBatch) -> loss``: the user's ``loss_fn``, or the module's own ``training_step``."""
    if loss_fn is not None:
        return lambda module, step_batch: loss_of(loss_fn(module, step_batch.batch), "loss_fn")  # type: ignore[return-value]
    takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)

    def training_loss(module: nn.Module, step_batch: StepBatch) -> Tensor:
        arguments = tuple(step_batch) if takes_index else (step_batch.batch,)
        return loss_of(module.training_step(*arguments))  # type: ignore[return-value, operator]

    return training_loss


def loss_of(output: Any, step: str = "training_step") -> Tensor | None:
    """The loss in what a step returned: a tensor, a mapping with ``"loss"``, an object with ``.loss``.

    Raises:
        TypeError: there is no loss in it, or it is no single number.
    """
    if output is None:
        return None
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif not isinstance(output, Tensor):
        loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise TypeError(
            f"Expected {step} to return a scalar loss, a dict with 'loss' or an object with .loss, "
            f"got {type(output).__name__}{shape}. Pass loss_fn=(module, batch) -> scalar mean loss."
        )
    return loss


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


def logged_metrics(
    objective: Objective,
    theta: Tensor,
    batches: Sequence[StepBatch],
    recorder: LogRecorder,
    buffers: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """What the module's own validation logs over ``batches`` at θ, with every metric reset before the pass.

    Args:
        objective: made with :func:`replacements` that hold ``recorder``.
        theta: parameters ``(P,)``.
        batches: the validation split.
        recorder: the stand-in for ``self.log``.
        buffers: statistics to use in place of the module's own.
    """
    with objective.box(), torch.no_grad():
        module: Any = objective.module_at(theta, buffers=buffers, mode="eval")
        for submodule in module.modules():
            if isinstance(submodule, Metric):
                submodule.reset()
        takes_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
        recorder.values.clear()

        def validate() -> None:
            module.on_validation_epoch_start()
            for step_batch in batches:
                recorder.batch_size = float(leading_size(step_batch.batch) or 1)
                placed = objective.placed(step_batch)
                module.validation_step(*(placed if takes_index else placed[:1]))
            module.on_validation_epoch_end()

        objective.collective.agree(validate)
        return recorder.reduced(objective.collective)
