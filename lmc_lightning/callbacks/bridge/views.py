"""Trainer, optimizers and schedulers as a step that is measured sees them: to be read only."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger

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
class Views:
    """``self.optimizers()`` and ``self.lr_schedulers()`` of a shadow: one view, or a list of them."""

    make: Callable[[], list[ReadOnly]]

    def __call__(self, use_pl_optimizer: bool = True) -> ReadOnly | list[ReadOnly] | None:
        """What Lightning would return."""
        views = self.make()
        return views[0] if len(views) == 1 else (views or None)
