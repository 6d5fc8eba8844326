"""Curves, volumes and learning coefficients of modules without a trainer."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lmc_lightning.callbacks.bridge.guards import check_alike, check_loss
from lmc_lightning.callbacks.bridge.objectives import in_samples, objective_of
from lmc_lightning.callbacks.bridge.probe_set import between
from lmc_lightning.callbacks.bridge.probes import draw, read, to_device
from lmc_lightning.callbacks.pairs.reference import tensors_of
from lmc_lightning.core.chunks import equal_batches
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.random_vectors import derive_seed
from lmc_lightning.landscape.paths.barrier import NumPoints
from lmc_lightning.landscape.paths.connections import Connection, connection
from lmc_lightning.landscape.paths.curves import CurveTraining
from lmc_lightning.landscape.paths.line import NUM_POINTS, BatchStats, endpoint_of
from lmc_lightning.landscape.paths.states import StateEvaluator
from lmc_lightning.landscape.volume.estimate import minimum_volumes
from lmc_lightning.landscape.volume.llc import Langevin, LearningCoefficient
from lmc_lightning.landscape.volume.llc import local_learning_coefficient as sampled_coefficient
from lmc_lightning.landscape.volume.result import Volume, VolumeSettings
from lmc_lightning.types import LossFn, Progress


def connect(
    module_a: nn.Module,
    module_b: nn.Module,
    train_dataloader: Iterable[Any],
    training: CurveTraining | None = None,
    *,
    loss_fn: LossFn | None = None,
    dataloaders: Mapping[str, Iterable[Any]] | None = None,
    batch_size: int = 128,
    num_points: NumPoints = NUM_POINTS,
    num_examples: int | None = 2048,
    curve_examples: int | None = None,
    batch_stats: BatchStats | None = None,
    parameters: list[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Connection:
    """A trained curve from ``module_a`` (t = 0) to ``module_b`` (t = 1), with loss and error along it and the line.

    ``found.on_curve["train"]["loss"].barrier`` is how high the loss rises on the curve, ``found.curve(t)`` is a point
    of it.

    Args:
        module_a: a LightningModule, or any ``nn.Module`` together with ``loss_fn``.
        module_b: a module of the same architecture.
        train_dataloader: examples that the curve is trained on and that BatchNorm's statistics are recomputed from.
        training: kind of curve and how it is trained.
        loss_fn: ``(module, batch) -> scalar mean loss`` in place of the module's own ``training_step``.
        dataloaders: what the curve is measured on, by split; by default ``train_dataloader`` as ``"train"``.
        batch_size: of the training of the curve; examples left over are not used.
        num_points: equally spaced points, both ends included, or ``"adaptive"``.
        num_examples: of each of ``dataloaders``; ``None`` for all.
        curve_examples: of ``train_dataloader``; all by default, held in memory.
        batch_stats: ``"recompute"`` (default with BatchNorm), ``"interpolate"`` or ``"endpoint"``.
        parameters: name patterns of the parameters that move; the others stay at ``module_a``'s.
        seed: of the loaders' private random stream and of the training.
        progress: told after each epoch.

    Raises:
        ValueError: the modules differ in names or shapes of their parameters or in frozen ones, or a plain module comes
            without ``loss_fn``.
    """
    check_loss(module_a, loss_fn)
    check_alike(module_a, module_b, parameters)
    common: dict[str, Any] = {"loss_fn": loss_fn, "parameters": parameters, "seed": seed}
    drawn = read(train_dataloader, module_a, curve_examples, seed)
    cut = {"mode": "train", "keep_batches": True, **common}
    objective = objective_of(module_a, equal_batches(drawn, batch_size), **cut)
    if dataloaders is None:
        measured = {"train": list(between(drawn, 0, num_examples))}
    else:
        measured = {s: read(loader, module_a, num_examples, seed) for s, loader in dataloaders.items()}
    loss_on: Callable[..., Objective] = partial(objective_of, module_a, **common)
    states = StateEvaluator(
        {split: in_samples(loss_on(batches), loss_on, batches) for split, batches in measured.items()},
        batch_stats=batch_stats,
        stats_objective=objective,
    )
    ends = endpoint_of(states.objective), endpoint_of(states.objective, tensors_of(module_b))
    generator = torch.Generator().manual_seed(derive_seed(seed, "curve"))
    return connection(states, objective, *ends, training, generator=generator, num_points=num_points, progress=progress)


def minima_volumes(
    modules: Mapping[str, nn.Module],
    dataloaders: Mapping[str, Iterable[Any]],
    settings: VolumeSettings | None = None,
    *,
    loss_fn: LossFn | None = None,
    num_examples: int | None = None,
    parameters: list[str] | None = None,
    seed: int = 0,
) -> dict[tuple[str, str], dict[float, Volume]]:
    """The volume of low loss around each network in the landscape of each data set, along the same directions.

    Tables: :func:`~lmc_lightning.landscape.volume.tables.volume_table`, ``rank_table``, ``order_violations`` and
    ``ranking_stability``.

    Args:
        modules: by name; LightningModules, or any ``nn.Module`` together with ``loss_fn``, of equal numbers of
            parameters.
        dataloaders: by name of the landscape.
        settings: which sets, and along which directions.
        loss_fn: ``(module, batch) -> scalar mean loss`` in place of a module's own ``training_step``.
        num_examples: of each loader; all by default.
        parameters: name patterns of the parameters that are looked at.
        seed: of the loaders' private random stream; that of the directions is in ``settings``.

    Returns:
        Volumes by (network, landscape) and threshold.

    Raises:
        ValueError: networks of different numbers of parameters, or a plain module without ``loss_fn``.
    """
    common: dict[str, Any] = {"loss_fn": loss_fn, "parameters": parameters, "seed": seed}
    found: dict[tuple[str, str], dict[float, Volume]] = {}
    sizes: dict[str, int] = {}
    for landscape, loader in dataloaders.items():
        drawn = draw(loader, num_examples, seed)
        for name, module in modules.items():
            check_loss(module, loss_fn)
            objective = objective_of(module, to_device(drawn, module), **common)
            sizes[name] = objective.num_params
            if len(set(sizes.values())) > 1:
                raise ValueError(f"Volumes compare between networks of equal numbers of parameters, got {sizes}.")
            found[name, landscape] = minimum_volumes(objective, objective.theta(), settings)
    return found


def local_learning_coefficient(
    module: nn.Module,
    dataloader: Iterable[Any],
    settings: Langevin | None = None,
    *,
    loss_fn: LossFn | None = None,
    num_examples: int | None = None,
    batch_size: int | None = None,
    parameters: list[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LearningCoefficient:
    """The local learning coefficient λ̂ of a trained module.

    See :func:`lmc_lightning.landscape.volume.llc.local_learning_coefficient`.

    Args:
        module: a LightningModule, or any ``nn.Module`` together with ``loss_fn``.
        dataloader: the training examples; nβ is n/ln n of as many as are read.
        settings: how the chains are run.
        loss_fn: ``(module, batch) -> scalar mean loss`` in place of the module's own ``training_step``.
        num_examples: n; all by default.
        batch_size: examples a step; by default from the device.
        parameters: name patterns of the parameters that are sampled.
        seed: of the loader's private random stream; that of the chains is in ``settings``.
        progress: told every hundred steps.

    Raises:
        ValueError: a plain module comes without ``loss_fn``.
    """
    check_loss(module, loss_fn)
    batches = read(dataloader, module, num_examples, seed)
    options: dict[str, Any] = {"loss_fn": loss_fn, "parameters": parameters, "seed": seed, "chunk_size": batch_size}
    objective = objective_of(module, batches, **options)
    return sampled_coefficient(objective, objective.theta(), settings, progress=progress)
