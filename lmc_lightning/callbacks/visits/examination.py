"""One measurement by a callback: its objectives, the glass box around it, and what it cost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lmc_lightning.callbacks.bridge.probe_set import ProbeSet, Split
from lmc_lightning.callbacks.visits.memory import Meter, retried_in_small_chunks
from lmc_lightning.callbacks.visits.progress import ProgressDisplay
from lmc_lightning.callbacks.visits.visit import Visit, probe_evidence
from lmc_lightning.core.glassbox import glass_box
from lmc_lightning.core.random_vectors import derive_seed
from lmc_lightning.landscape.curvature.stability import OptimizerState
from lmc_lightning.recording import Measurement
from lmc_lightning.types import LossFn

UNKNOWN_COST = {"num_matvecs": None, "num_gradients": None}
"""Of a measurement that does not say what it has spent."""


def examine(
    callback: Any,
    module: nn.Module,
    probes: Mapping[Split, ProbeSet],
    *,
    trainer: Any | None = None,
    loss_fn: LossFn | None = None,
    step: int = 0,
    epoch: int = 0,
    optimizers: Sequence[OptimizerState] = (),
    effort: float = 1.0,
) -> Measurement:
    """One measurement of a module on given probe sets, inside the glass box, with the evidence of data and cost.

    Args:
        callback: what measures, a ``MeasurementCallback``.
        module: whose state is measured.
        probes: the probe set of each split.
        trainer: of the run, as the step saw it.
        loss_fn: in place of the callback's own.
        step: optimizer steps taken.
        epoch: epochs completed.
        optimizers: as they were at this step.
        effort: share of the usual random probes.
    """

    def examined(**options: Any) -> Measurement:
        generator = torch.Generator().manual_seed(derive_seed(callback.seed, callback.kind))
        loss_on = partial(callback.objective, module, trainer=trainer, loss_fn=loss_fn)
        objectives = {split: loss_on(p.batches, **options) for split, p in probes.items()}
        visit = Visit(objectives, loss_on, step, epoch, generator, module, trainer, optimizers, effort, progress)
        measurement: Measurement = callback.measure(visit)
        shared = probe_evidence(probes["train"], visit.objective, step)
        return replace(measurement, evidence={**shared, **UNKNOWN_COST, **measurement.evidence})

    meter = Meter(_device_of(module), callback.clock)
    with glass_box(), meter, ProgressDisplay(type(callback).__name__, trainer, callback.clock) as progress:
        measurement = retried_in_small_chunks(examined, retry=trainer is None or trainer.world_size == 1)
    return replace(measurement, evidence={**measurement.evidence, **meter.evidence, "effort": effort})


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
