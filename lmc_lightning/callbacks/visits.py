"""What a visit is: one state of a run, the data it is measured on, and the evidence that goes with its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lmc_lightning.callbacks.probe_store import ProbeSet, Split
from lmc_lightning.core.collective import joint_digest
from lmc_lightning.core.hvp import FREE_MEMORY_SHARE, free_bytes
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.batchnorm import has_batch_norm
from lmc_lightning.types import LossFn

OptimizerGroups: TypeAlias = tuple[type[Optimizer], list[dict[str, Any]]]
"""Class of an optimizer and its parameter groups without their tensors."""

MAX_PENDING = 4
"""Visits that may wait for the probe set to be complete."""


@dataclass(frozen=True)
class Visit:
    """The state after ``step`` optimizer steps, as a function of θ, with all that a measurement may use."""

    objectives: Mapping[Split, Objective]
    """The same module on each split's probe set."""
    step: int
    epoch: int
    generator: torch.Generator
    """Random numbers of this callback, the same at every visit."""
    module: nn.Module
    """Whose state it is: to be read, never run."""
    trainer: Any | None = None
    optimizers: Sequence[OptimizerGroups] = ()
    """Of each optimizer, as they were at this step."""
    loss_fn: LossFn | None = None
    """What was asked for in place of the callback's own."""

    @property
    def objective(self) -> Objective:
        """The loss on the training examples."""
        return self.objectives["train"]

    @property
    def theta(self) -> Tensor:
        """The parameters ``(P,)``."""
        return self.objective.theta()


@dataclass
class Pending:
    """A due visit that waits until its probe set is complete."""

    step: int
    epoch: int
    module: nn.Module
    optimizers: list[OptimizerGroups]
    trainer: Any
    """As the step saw it then."""


def optimizer_groups(trainer: Any) -> list[OptimizerGroups]:
    """Class and a copy of the hyper-parameters of each optimizer, group by group."""
    return [
        (type(o), [{k: v for k, v in group.items() if k != "params"} for group in o.param_groups])
        for o in trainer.optimizers
    ]


def fits_in_memory(module: nn.Module, copies: int) -> bool:
    """Whether so many copies of the module take at most a quarter of the free memory."""
    tensors = [*module.parameters(), *module.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    return not tensors or copies * size <= FREE_MEMORY_SHARE * free_bytes(tensors[0].device)


def too_many_pending(num_examples: int | None) -> str:
    """Why a visit failed that could not wait, and what to do."""
    return (
        f"Too many visits came before the probe set of {num_examples} examples was complete: at most {MAX_PENDING} "
        f"wait, and only as memory allows. Pass a smaller num_examples, or probe_dataloader=."
    )


def probe_evidence(probes: ProbeSet, objective: Objective, step: int | None = None) -> dict[str, Any]:
    """The state and the data that numbers were taken on."""
    untrained = step == 0 and objective.mode == "eval" and has_batch_norm(objective.module_at(objective.theta()))
    return {
        "batch_stats": "initial" if untrained else None,
        "fit_split": "train",
        "eval_split": probes.split,
        "probe_source": probes.source,
        "probe_digest": probes.part_of or joint_digest(probes.digest, objective.collective),
        "num_examples": objective.num_examples,
        "weighting": objective.weighting,
        "additive": objective.additive,
        "mode": objective.mode,
        "probe_loss": objective.baseline.loss,
        "probe_error": objective.baseline.error,
        "mean_max_probability": objective.baseline.confidence,
    }
