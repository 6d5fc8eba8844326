"""What will and will not work with a module and its data, found out by trying on a few examples."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from lmc_lightning.callbacks.bridge.guards import check_module
from lmc_lightning.callbacks.bridge.objectives import objective_of
from lmc_lightning.callbacks.bridge.probes import draw
from lmc_lightning.callbacks.bridge.step import StepBatch
from lmc_lightning.callbacks.pairs.reference import tensors_of
from lmc_lightning.core.chunks import ADDITIVITY_TOLERANCE, first_examples
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.selfcheck import NUM_EXAMPLES, self_check
from lmc_lightning.core.shadow import Mode
from lmc_lightning.core.structure import digest
from lmc_lightning.landscape.paths.batchnorm import has_batch_norm
from lmc_lightning.types import LossFn

Verdict: TypeAlias = Literal["ok", "note", "problem"]
Told: TypeAlias = tuple[Verdict, str]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return f"{_SIGNS[self.verdict]} {self.name}: {self.text}"


_SIGNS: dict[Verdict, str] = {"ok": "✓", "note": "·", "problem": "✗"}


@dataclass(frozen=True)
class Diagnosis:
    """All that was looked at, in order."""

    findings: tuple[Finding, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether everything can be measured."""
        return not any(f.verdict == "problem" for f in self.findings)

    def __getitem__(self, name: str) -> Finding:
        return next(f for f in self.findings if f.name == name)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


def doctor(
    module: nn.Module,
    dataloader: Iterable[Any],
    *,
    datamodule: Any = None,
    loss_fn: LossFn | None = None,
    num_examples: int = 64,
) -> Diagnosis:
    """Try a module's own step on a few examples: is its loss one function of θ, and which derivatives can be had?

    The module and every random stream stay as they are, which is looked at too. Takes a few seconds on small networks:
    some 30 gradients of 16 examples in float64, and as many losses.

    Args:
        module: a LightningModule, or any module with ``loss_fn``.
        dataloader: of training batches.
        datamodule: where the data come from, if from one.
        loss_fn: ``(module, batch) -> scalar mean loss`` in place of the module's ``training_step``.
        num_examples: to try on.
    """
    findings: list[Finding] = []
    for name, look in _LOOKS.items():
        mode: Mode = "train" if findings and findings[0].verdict == "note" else "eval"
        subject = _Subject(module, dataloader, datamodule, loss_fn, num_examples, mode)
        try:
            if (told := look(subject)) is not None:
                findings.append(Finding(name, *told))
        except Exception as error:
            findings.append(Finding(name, "problem", f"{type(error).__name__}: {error}"))
            if look is _step:
                break  # nothing else can be tried
    return Diagnosis(tuple(findings))


@dataclass
class _Subject:
    module: nn.Module
    dataloader: Iterable[Any]
    datamodule: Any
    loss_fn: LossFn | None
    num_examples: int
    mode: Mode

    def batches(self) -> list[StepBatch]:
        return draw(self.dataloader, self.num_examples, 0)

    def objective(self, batches: list[StepBatch] | None = None, **options: Any) -> Objective:
        options = {"mode": self.mode, **options}
        return objective_of(self.module, batches or self.batches(), loss_fn=self.loss_fn, **options)


def _step(subject: _Subject) -> Told:
    if subject.loss_fn is None:
        if not hasattr(subject.module, "training_step"):
            raise TypeError("it has no training_step. Pass loss_fn=(module, batch) -> scalar mean loss.")
        check_module(subject.module, loss_fn=None, captures=True)
    try:
        loss = subject.objective().baseline.loss
        return "ok", f"its own training step gives a loss of {loss:.4g} in eval mode"
    except Exception as error:
        loss = subject.objective(mode="train").baseline.loss
        return "note", f"gives a loss ({loss:.4g}) in train mode only ({error}): pass mode='train' to callbacks"


def _data(subject: _Subject) -> Told:
    if hasattr(subject.datamodule, "probe_batches"):
        return "ok", "the datamodule gives the probe set: no loader is touched"
    return "note", (
        "the probe set will be cloned from the first training batches, augmentation included; a datamodule with "
        "probe_batches(split, num_examples, seed), or probe_dataloader=, gives a fixed one"
    )


def _determinism(subject: _Subject) -> Told:
    objective = subject.objective()
    theta = objective.theta()
    losses = {float(objective.loss(theta)) for _ in range(3)}
    gradients = {digest(objective.grad(theta)) for _ in range(2)}
    if len(losses) == len(gradients) == 1:
        return "ok", "loss and gradient are the same, bit for bit, at every evaluation"
    return (
        "problem",
        f"evaluations at one θ differ (losses {sorted(losses)}): the step draws from what cannot be seeded",
    )


def _batching(subject: _Subject) -> Told:
    batches = subject.batches()
    whole, small = (subject.objective(batches, chunk_size=size) for size in (subject.num_examples, 7))
    if small.num_examples is None:
        return "note", "examples cannot be counted: means are over batches, which stay whole"
    a, b = whole.baseline.loss, small.baseline.loss
    if small.additive and abs(a - b) <= ADDITIVITY_TOLERANCE * abs(a):
        return "ok", "the loss is a mean over examples: numbers do not depend on the batch size"
    return "note", (
        "the loss of a batch is no mean over its examples (contrastive, batch statistics): batches stay whole, and "
        "numbers depend on their size"
    )


def _batch_norm(subject: _Subject) -> Told | None:
    if not has_batch_norm(subject.module):
        return None
    return "note", "on running statistics; on paths between networks they are recomputed"


def _loss(subject: _Subject) -> Told:
    if subject.objective().baseline.example_losses is not None:
        return "ok", "seen inside the step: errors over examples, Gauss–Newton matrix, exact trace, attribution"
    return "note", (
        "is not one call of cross_entropy, nll_loss, mse_loss or binary_cross_entropy: errors are over chunks, and "
        "operator='ggn', exact traces and attribution are refused"
    )


def _hessian(subject: _Subject) -> Told:
    few = [first_examples(subject.batches()[0], NUM_EXAMPLES)]
    check = self_check(subject.objective(few, dtype=torch.float64))
    where = f" Look at {check.suspect}." if check.suspect else ""
    told: dict[str, Told] = {
        "exact": ("ok", f"equals finite differences to {check.relative_error:.1e} in float64 and is symmetric"),
        "finite_differences": ("note", f"{check.reason}; finite differences in float64 take its place.{where}"),
        "no_hessian": ("problem", f"there is none: {check.reason}.{where}"),
        "unchecked": ("problem", f"could not be checked: {check.reason}"),
    }
    return told[check.verdict]


def _state(subject: _Subject) -> Told:
    state = tensors_of(subject.module)
    before, random = digest(state), torch.get_rng_state()
    subject.objective().grad(subject.objective().theta())
    if digest(state) == before and torch.equal(random, torch.get_rng_state()):
        return "ok", "parameters, buffers and random streams are as before after measuring"
    return "problem", "parameters, buffers and random streams have changed after measuring: please report this module"


_LOOKS: dict[str, Callable[[_Subject], Told | None]] = {
    "step": _step,
    "data": _data,
    "determinism": _determinism,
    "batching": _batching,
    "BatchNorm": _batch_norm,
    "loss": _loss,
    "Hessian": _hessian,
    "state": _state,
}
