"""What cannot be measured is refused before the first step, with the way out in the message."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lmc_lightning.recording import slug
from lmc_lightning.types import LossFn

_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def check_trainer(trainer: Any) -> None:
    """Refuse strategies under which no process holds the whole model.

    Raises:
        RuntimeError: parameters are sharded over processes.
    """
    strategy = trainer.strategy
    name = next((c.__name__ for c in type(strategy).__mro__ if c.__name__ in _SHARDED), None)
    if name is not None:
        raise RuntimeError(
            f"{name} shards the parameters, so no process can differentiate the loss twice. Save a consolidated "
            f"checkpoint and measure it afterwards: lmc_lightning.measure(module, dataloader, [callback])."
        )


def check_names(callbacks: Sequence[Any], own: Any) -> None:
    """Refuse a second callback that would log under the keys of ``own`` and write its file.

    Raises:
        ValueError: naming the argument that tells them apart.
    """
    for other in callbacks:
        if other is not own and getattr(other, "kind", None) == own.kind and _file(other) == _file(own):
            raise ValueError(
                f"Two callbacks log under {own.key('…')!r}: {type(own).__name__} and {type(other).__name__}. "
                f"Give one of them another name=, which its keys and its file will carry."
            )


def _file(callback: Any) -> str:
    return slug(callback.name or "")


def check_module(pl_module: Any, *, loss_fn: LossFn | None, captures: bool) -> None:
    """Refuse modules whose step gives no loss to differentiate.

    Raises:
        RuntimeError: manual optimization, or a step that fetches its own batches, without the argument that helps.
    """
    if loss_fn is None and not pl_module.automatic_optimization:
        raise RuntimeError(
            f"{type(pl_module).__name__} optimizes manually: its training_step steps the optimizers and returns no "
            f"loss. Pass the loss to measure, e.g. loss_fn=lambda module, batch: module.g_loss(batch), and with "
            f"several networks the parameters of one, e.g. parameters=['generator.*']."
        )
    if captures and is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise RuntimeError(
            f"{type(pl_module).__name__}.training_step fetches its batches from dataloader_iter, so none can be "
            f"captured. Pass probe_dataloader= and loss_fn=(module, batch) -> scalar mean loss."
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: naming the argument, the choices and the value.
    """
    if value not in choices:
        raise ValueError(f"Expected {name} to be {' or '.join(map(repr, choices))}, got {value!r}.")
