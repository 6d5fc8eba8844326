"""The step of a LightningModule, or a user's own loss, as a function of a module and a batch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lmc_lightning.types import Batch, LossFn


class StepBatch(NamedTuple):
    """A batch as the steps of a LightningModule take it."""

    batch: Batch
    batch_idx: int = 0


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
