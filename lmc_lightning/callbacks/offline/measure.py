"""The same numbers without a trainer: from a module or a checkpoint, and for a pair of modules."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.bridge.guards import check_alike, check_choice, check_loss
from lmc_lightning.callbacks.bridge.objectives import in_samples, objective_of
from lmc_lightning.callbacks.bridge.probe_set import ProbeSet, Split, between
from lmc_lightning.callbacks.bridge.probes import draw, read, to_device
from lmc_lightning.callbacks.bridge.step import StepBatch
from lmc_lightning.callbacks.pairs.reference import tensors_of
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.alignment.aligned import Alignment
from lmc_lightning.landscape.alignment.matching import METHODS, Method
from lmc_lightning.landscape.paths.barrier import Barrier, NumPoints, barriers_on, line_profiles
from lmc_lightning.landscape.paths.line import NUM_POINTS, BatchStats, endpoint_of
from lmc_lightning.landscape.paths.states import StateEvaluator
from lmc_lightning.types import BatchWeight, LossFn


def measure(
    module: nn.Module,
    dataloader: Iterable[Any],
    callbacks: Sequence[MeasurementCallback],
    *,
    loss_fn: LossFn | None = None,
    checkpoint: str | Path | None = None,
) -> dict[str, float]:
    """What the callbacks would record for ``module`` as it is: the same keys, and on the same batches the same bits.

    Later visits of a run start from what the earlier ones found, and then agree to their tolerances. Only
    ``hessian/stability`` needs a run, for its optimizer. The module is not changed: buffers, modes and every
    random stream are as before.

    Args:
        module: a LightningModule, or any ``nn.Module`` together with ``loss_fn``.
        dataloader: where the probe set is read from, as many examples as each callback asks for.
        callbacks: e.g. ``[HessianSpectrum(), Sharpness()]``.
        loss_fn: ``(module, batch) -> scalar mean loss`` in place of the module's own ``training_step``.
        checkpoint: a file of weights to measure in place of the module's own.

    Raises:
        ValueError: a plain module without ``loss_fn``, a checkpoint of another architecture, a callback that compares
            two states, or two that log under one name.
    """
    _check_single(callbacks)
    for callback in callbacks:
        check_loss(module, loss_fn or callback.loss_fn)
    if checkpoint is not None:
        module = with_checkpoint(module, checkpoint)
    found: dict[str, float] = {}
    for callback, batches in zip(callbacks, _drawn(dataloader, callbacks), strict=True):
        probes: dict[Split, ProbeSet] = {
            "train": ProbeSet("train", "probe_dataloader", tuple(to_device(batches, module)))
        }
        values = callback.examine(module, probes, loss_fn=loss_fn).values()
        twice = sorted(found.keys() & values.keys())
        if twice:
            raise ValueError(f"Two callbacks give {twice[-1]!r}. Give one of them a name=.")
        found |= values
    return found


def _drawn(dataloader: Iterable[Any], callbacks: Sequence[MeasurementCallback]) -> Iterator[list[StepBatch]]:
    """The probe batches of each callback; an iterator that can be read once only is read once for all of one seed."""
    longest: dict[int, list[StepBatch]] = {}
    for callback in callbacks:
        if callback.seed not in longest:
            sizes = [c.num_examples for c in callbacks if c.seed == callback.seed]
            most = None if None in sizes else max(n for n in sizes if n is not None)
            longest[callback.seed] = draw(dataloader, most, callback.seed)
        yield list(between(longest[callback.seed], 0, callback.num_examples))


def interpolation_barrier(
    module_a: nn.Module,
    module_b: nn.Module,
    dataloader: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    train_dataloader: Iterable[Any] | None = None,
    num_points: NumPoints = NUM_POINTS,
    num_examples: int | None = 2048,
    batch_stats: BatchStats | None = None,
    parameters: list[str] | None = None,
    batch_weight: BatchWeight | None = None,
    metric: str = "loss",
    align: Method | None = None,
    seed: int = 0,
) -> Barrier:
    """The barrier on the straight line from ``module_a`` (t = 0) to ``module_b`` (t = 1).

    Args:
        module_a: a LightningModule, or any ``nn.Module`` together with ``loss_fn``.
        module_b: a module of the same architecture.
        dataloader: the examples that the metric is measured on.
        loss_fn: ``(module, batch) -> scalar mean loss`` in place of the module's own ``training_step``.
        train_dataloader: training examples, from which BatchNorm statistics are recomputed on the path; by default
            ``dataloader``.
        num_points: equally spaced points, both ends included, or ``"adaptive"``.
        num_examples: of each loader; ``None`` for all.
        batch_stats: ``"recompute"`` (default with BatchNorm), ``"interpolate"`` or ``"endpoint"``.
        parameters: name patterns of the parameters that move; the others stay at ``module_a``'s.
        batch_weight: ``batch -> float``, how much a batch counts; its number of examples by default.
        metric: ``"loss"`` or ``"error"``.
        align: ``"weights"`` or ``"activations"`` (of ``train_dataloader``): the line ends at ``module_b`` with its
            channels permuted to match those of ``module_a``, which is the same function; :func:`align` tells how.
        seed: of the loaders' private random stream.

    Raises:
        ValueError: the modules differ in names or shapes of their parameters or in frozen ones, or a plain module comes
            without ``loss_fn``.
    """
    found = interpolation_barriers(
        module_a,
        module_b,
        {"": dataloader},
        loss_fn=loss_fn,
        train_dataloader=train_dataloader,
        num_points=num_points,
        num_examples=num_examples,
        batch_stats=batch_stats,
        parameters=parameters,
        batch_weight=batch_weight,
        metrics=[metric],
        align=align,
        seed=seed,
    )
    return found[""][metric]


def interpolation_barriers(
    module_a: nn.Module,
    module_b: nn.Module,
    dataloaders: Mapping[str, Iterable[Any]],
    *,
    loss_fn: LossFn | None = None,
    train_dataloader: Iterable[Any] | None = None,
    num_points: NumPoints = NUM_POINTS,
    num_examples: int | None = 2048,
    batch_stats: BatchStats | None = None,
    parameters: list[str] | None = None,
    batch_weight: BatchWeight | None = None,
    metrics: Sequence[str] | None = None,
    align: Method | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Barrier]]:
    """Barriers by split and metric: :func:`interpolation_barrier` with one matching and one path for all.

    ``dataloaders`` are by split, of which the first stands in for ``train_dataloader``; ``metrics`` are all that are
    known by default. Everything else is as there.
    """
    check_loss(module_a, loss_fn)
    check_alike(module_a, module_b, parameters)
    common: dict[str, Any] = {"loss_fn": loss_fn, "parameters": parameters, "batch_weight": batch_weight, "seed": seed}
    drawn = {split: read(loader, module_a, num_examples, seed) for split, loader in dataloaders.items()}
    loss_on: Callable[..., Objective] = partial(objective_of, module_a, **common)
    objectives = {split: in_samples(loss_on(batches), loss_on, batches) for split, batches in drawn.items()}
    batches = next(iter(drawn.values()))
    if train_dataloader is not None:
        batches = read(train_dataloader, module_a, num_examples, seed)
    stats_objective = loss_on(batches, mode="train", keep_batches=True)
    first = next(iter(objectives.values()))
    end_a, end_b = endpoint_of(first), endpoint_of(first, tensors_of(module_b))
    if align is not None:
        check_choice("align", align, METHODS)
        end_b, _ = Alignment(align, loss_on(batches), seed=seed).aligned(end_a, end_b)
    states = StateEvaluator(objectives, batch_stats=batch_stats, stats_objective=stats_objective)
    return barriers_on(line_profiles(states, end_a, end_b, num_points=num_points), metrics)


def with_checkpoint(module: nn.Module, path: str | Path) -> nn.Module:
    """A copy of ``module`` with the weights of a checkpoint, a Lightning one or a plain state dict.

    Raises:
        ValueError: names or shapes do not fit the module.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    refusal = f"{path} does not hold the weights of {type(module).__name__}"
    if not isinstance(content, Mapping):
        raise ValueError(f"{refusal}: it is a {type(content).__name__}, neither a checkpoint nor a state dict.")
    copied = copy.deepcopy(module)
    try:
        copied.load_state_dict(content.get("state_dict", content))
    except RuntimeError as error:
        raise ValueError(f"{refusal}: {error}") from error
    return copied


def _check_single(callbacks: Sequence[MeasurementCallback]) -> None:
    if not isinstance(callbacks, Iterable):
        raise ValueError(f"Expected a list of callbacks, got {type(callbacks).__name__}. Pass [callback].")
    for callback in callbacks:
        name, twin = type(callback).__name__, getattr(callback, "offline", None)
        if not isinstance(callback, MeasurementCallback):
            raise ValueError(f"Expected measuring callbacks, got {name}. Give it to the Trainer of a run.")
        if twin is not None:
            raise ValueError(
                f"{name} compares two states and cannot measure a single module. "
                f"Call {twin}(module_a, module_b, dataloader)."
            )
