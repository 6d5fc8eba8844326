"""Modules brought close to a reference by permutations of their channels, without changing what they compute."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lmc_lightning.callbacks.bridge.guards import check_alike, check_choice
from lmc_lightning.callbacks.bridge.objectives import objective_of
from lmc_lightning.callbacks.bridge.probes import read
from lmc_lightning.callbacks.bridge.step import StepBatch
from lmc_lightning.callbacks.pairs.reference import tensors_of
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.alignment.aligned import Alignment
from lmc_lightning.landscape.alignment.matching import METHODS, Matching, Method
from lmc_lightning.landscape.paths.line import endpoint_of
from lmc_lightning.types import LossFn


@dataclass(frozen=True)
class Aligned:
    """A module whose channels are in another order, and the matching that gave it.

    Attributes:
        module: A copy of the given module, buffers permuted too; it computes the same function.
        matching: The permutations, what they were found by, and how sure they are; ``matching.apply`` and
            ``matching.apply_to_optimizer`` permute further tensors in the same way.
    """

    module: nn.Module = field(repr=False)
    matching: Matching

    def __repr__(self) -> str:
        return f"Aligned({type(self.module).__name__}: {self.matching})"


def align(
    module_a: nn.Module,
    module_b: nn.Module,
    dataloader: Iterable[Any],
    *,
    method: Method = "weights",
    loss_fn: LossFn | None = None,
    num_examples: int | None = 2048,
    parameters: list[str] | None = None,
    restarts: int = 2,
    seed: int = 0,
) -> Aligned:
    """``module_b`` with its channels in the order that brings it closest to ``module_a``; neither is changed.

    Which channels can be permuted together is found by watching a forward pass, for any architecture, and tested on the
    function: see :func:`~lmc_lightning.landscape.alignment.groups.groups_of`.

    Args:
        module_a: a LightningModule, or any ``nn.Module``, with ``loss_fn`` or one that takes the first part of a batch.
        module_b: a module of the same architecture.
        dataloader: training examples: a few to find the groups, and those on which activations are compared.
        method: ``"weights"`` (arXiv 2209.04836, §3.2) or ``"activations"`` (§3.1).
        loss_fn: ``(module, batch) -> scalar mean loss`` in place of the module's own ``training_step``.
        num_examples: of the loader; ``None`` for all.
        parameters: name patterns of the parameters that may move.
        restarts: further starts of the search, whose agreement is reported.
        seed: of the restarts, and of the loader's private random stream.

    Raises:
        ValueError: the modules differ in names or shapes of their parameters or in frozen ones.
    """
    options: dict[str, Any] = {"method": method, "loss_fn": loss_fn, "num_examples": num_examples}
    options |= {"parameters": parameters, "restarts": restarts, "seed": seed}
    return align_all(module_a, [module_b], dataloader, **options)[0]


def align_all(
    reference: nn.Module,
    modules: Sequence[nn.Module],
    dataloader: Iterable[Any],
    *,
    method: Method = "weights",
    loss_fn: LossFn | None = None,
    num_examples: int | None = 2048,
    parameters: list[str] | None = None,
    restarts: int = 2,
    seed: int = 0,
) -> list[Aligned]:
    """Each of some modules aligned to one reference, whose groups of channels are found once; see :func:`align`."""
    check_choice("method", method, METHODS)
    for module in modules:
        check_alike(reference, module, parameters)
    batches = read(dataloader, reference, num_examples, seed)
    objective = _objective(reference, batches, loss_fn, parameters=parameters, seed=seed)
    alignment = Alignment(method, objective, restarts, seed)
    end_a = endpoint_of(objective)
    matchings = [alignment.match(end_a, endpoint_of(objective, tensors_of(module))) for module in modules]
    return [Aligned(_permuted(module, m), m) for module, m in zip(modules, matchings, strict=True)]


def _objective(module: nn.Module, batches: Sequence[StepBatch], loss_fn: LossFn | None, **options: Any) -> Objective:
    if loss_fn is None and not hasattr(module, "training_step"):
        return objective_of(module, batches, loss_fn=_outputs, wrap=lambda _: _outputs, keep_batches=True, **options)
    return objective_of(module, batches, loss_fn=loss_fn, **options)


def _outputs(module: nn.Module, step_batch: StepBatch) -> Tensor:
    """All outputs in place of a loss, which matching does not need."""
    batch = step_batch.batch
    outputs: Tensor = module(batch[0] if isinstance(batch, list | tuple) else batch)
    return outputs


@torch.no_grad()
def _permuted(module: nn.Module, matching: Matching) -> nn.Module:
    copied = copy.deepcopy(module)
    own = tensors_of(copied)
    for name, tensor in matching.apply(own).items():
        own[name].copy_(tensor)
    return copied
