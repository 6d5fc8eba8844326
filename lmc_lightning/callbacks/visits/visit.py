"""What a visit is: one state of a run, the data it is measured on, and the evidence that goes with its numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmc_lightning.callbacks.bridge.probe_set import ProbeSet, Split
from lmc_lightning.core.collective import joint_digest
from lmc_lightning.core.memory import FREE_MEMORY_SHARE, free_bytes
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature.stability import OptimizerState
from lmc_lightning.landscape.paths.batchnorm import has_batch_norm
from lmc_lightning.types import Progress

NO_DERIVATIVES = {"num_matvecs": 0, "num_gradients": 0}
"""Evidence of what takes forward passes only."""

MAX_PENDING = 4
"""Visits that may wait for the probe set to be complete."""


def silent(done: int, total: int, text: str) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Visit:
    """The state after ``step`` optimizer steps, as a function of θ, with all that a measurement may use."""

    objectives: Mapping[Split, Objective]
    """The same module on each split's probe set."""
    loss_on: Callable[..., Objective]
    """``(batches, **options) -> Objective``: its loss on other batches, or under other options of ``objective_of``."""
    step: int
    epoch: int
    generator: torch.Generator
    """Random numbers of this callback, the same at every visit."""
    module: nn.Module
    """Whose state it is: to be read, never run."""
    trainer: Any | None = None
    optimizers: Sequence[OptimizerState] = ()
    """Of each optimizer, as they were at this step."""
    effort: float = 1.0
    """Share of the usual random probes that the visit may spend."""
    progress: Progress = silent
    """To be told how far the measurement is, at every product, sample or point."""

    def scaled(self, number: int, at_least: int = 2) -> int:
        """How many of the usual ``number`` random probes this visit may spend."""
        return min(number, max(at_least, round(number * self.effort)))

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
    optimizers: list[OptimizerState]
    trainer: Any
    """As the step saw it then."""


def optimizer_states(trainer: Any, pl_module: nn.Module) -> list[OptimizerState]:
    """Of each optimizer of the run, as it is now; tensors are the optimizers' own."""
    return [OptimizerState.of(optimizer, pl_module) for optimizer in trainer.optimizers]


def fits_in_memory(module: nn.Module, optimizers: Sequence[OptimizerState], copies: int) -> bool:
    """Whether so many copies of the module and of its optimizers' second moments take a quarter of the free memory."""
    tensors = [*module.parameters(), *module.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors) + sum(o.num_bytes for o in optimizers)
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
