"""What cannot be measured is refused before the first step, with the way out in the message."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lmc_lightning.core.files import slug
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


def check_common(on_error: object, mode: object, num_examples: int | None, max_overhead: float | None) -> None:
    """Refuse impossible values of the arguments that all measuring callbacks have.

    Raises:
        ValueError: naming the argument, what is possible and the value.
    """
    check_choice("on_error", on_error, ("record", "raise"))
    check_choice("mode", mode, ("eval", "train"))
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"Expected num_examples to be at least 1 or None (the whole split), got {num_examples}.")
    if max_overhead is not None and not max_overhead > 0:
        raise ValueError(f"Expected max_overhead to be a positive share or None (no limit), got {max_overhead}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: naming the argument, the choices and the value.
    """
    if value not in choices:
        raise ValueError(f"Expected {name} to be {' or '.join(map(repr, choices))}, got {value!r}.")


def check_listed(name: str, values: Sequence[str], choices: Sequence[str]) -> None:
    """Refuse a list in which something is none of the choices.

    Raises:
        ValueError: naming the argument, the choices and the values.
    """
    if isinstance(values, str) or not set(values) <= set(choices):
        raise ValueError(f"Expected {name} to list some of {', '.join(map(repr, choices))}, got {values!r}.")


def check_alike(module_a: nn.Module, module_b: nn.Module, parameters: Sequence[str] | None) -> None:
    """Refuse two modules that no line joins.

    Raises:
        ValueError: they differ in names or shapes of their parameters, or in frozen ones.
    """
    of_a, of_b = dict(module_a.named_parameters()), dict(module_b.named_parameters())
    shapes_a, shapes_b = ({name: list(p.shape) for name, p in of.items()} for of in (of_a, of_b))
    differing = sorted(n for n in of_a.keys() | of_b.keys() if shapes_a.get(n) != shapes_b.get(n))
    if differing:
        shapes = f"{shapes_a.get(differing[0])} and {shapes_b.get(differing[0])}"
        raise ValueError(
            f"module_a and module_b differ in {', '.join(map(repr, differing[:4]))} ({shapes}). "
            "Only networks of one architecture can be interpolated."
        )
    for name, parameter in of_a.items():
        if parameters is None and not parameter.requires_grad and not torch.equal(parameter, of_b[name].to(parameter)):
            raise ValueError(
                f"{name!r} is frozen and differs between module_a and module_b, so the line would not end at module_b. "
                "Call module_a.requires_grad_(), or name the parameters that shall move, parameters=[…]."
            )


def check_loss(module: nn.Module, loss_fn: LossFn | None) -> None:
    """Refuse a plain module whose loss nobody says.

    Raises:
        ValueError: it has no ``training_step`` and there is no ``loss_fn``.
    """
    if loss_fn is None and not hasattr(module, "training_step"):
        raise ValueError(
            f"{type(module).__name__} has no training_step, so its loss is unknown. "
            f"Pass loss_fn, e.g. loss_fn=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])."
        )
