"""How two trained cells are compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.offline.landscape import connect, minima_volumes
from lmc_lightning.callbacks.offline.measure import interpolation_barriers, measure
from lmc_lightning.callbacks.offline.similarity import representation_similarity
from lmc_lightning.callbacks.offline.surface import loss_surface
from lmc_lightning.callbacks.representation_similarity import NUM_EXAMPLES
from lmc_lightning.experiments.plans.build import build
from lmc_lightning.experiments.plans.classes import resolve
from lmc_lightning.experiments.plans.study import Config
from lmc_lightning.landscape.alignment.matching import Method
from lmc_lightning.landscape.paths.barrier import DEFINITIONS, on_fewer_points
from lmc_lightning.landscape.paths.curves import CurveTraining
from lmc_lightning.landscape.paths.line import NUM_POINTS
from lmc_lightning.landscape.volume.result import VolumeMetric, VolumeSettings

VOLUME_NUMBERS = ("log_volume", "log_volume_bound", "log_mean_r_pow", "mean_log_r")
"""Of a volume, for each threshold."""


@dataclass(frozen=True)
class Trained:
    """A trained cell: its module with the last weights, and its data."""

    module: nn.Module
    datamodule: Any

    def batches(self, split: str, num_examples: int | None, seed: int = 0) -> Any:
        """Probe examples of a split, or the whole loader of data that do not give any.

        Raises:
            ValueError: no data for that split.
        """
        if hasattr(self.datamodule, "probe_batches"):
            return self.datamodule.probe_batches(split, num_examples, seed)
        loader = getattr(self.datamodule, f"{split}_dataloader", None)
        if loader is None:
            raise ValueError(f"The data of this study have no {split}_dataloader and no probe_batches.")
        self.datamodule.prepare_data()
        self.datamodule.setup("fit" if split != "test" else "test")
        return loader()


def trained(config: Config, folder: Path, weights: str) -> Trained:
    """The module of a configuration with the weights in a file of its folder."""
    objects = build(config, folder, resumable=False, enable_checkpointing=False, logger=False)
    objects.model.load_state_dict(torch.load(folder / weights, map_location="cpu", weights_only=True))
    return Trained(objects.model, objects.datamodule)


def measured(network: Trained, callbacks: Sequence[Config]) -> dict[str, float]:
    """What callbacks of this package, by class and arguments, give for a trained cell on its training data.

    Raises:
        ValueError: there is no such callback, or two log under one name.
    """
    found: dict[str, float] = {}
    for config in callbacks:
        kind = resolve(config["class_path"])
        if kind is None or not issubclass(kind, MeasurementCallback):
            raise ValueError(f"Networks are measured by callbacks of this package, not by {config['class_path']!r}.")
        callback = kind(**config.get("init_args", {}))
        numbers = measure(network.module, network.batches("train", callback.num_examples, callback.seed), [callback])
        if twice := found.keys() & numbers.keys():
            raise ValueError(f"Two of `measured` give {min(twice)!r}. Give one of them a name=.")
        found |= numbers
    return found


def barrier(
    first: Trained,
    second: Trained,
    *,
    splits: tuple[str, ...] = ("train", "test"),
    metrics: tuple[str, ...] = ("loss", "error"),
    num_examples: int | None = 2048,
    **options: Any,
) -> dict[str, float]:
    """Every convention of the barrier on the line between two cells, on the first one's data."""
    lines = interpolation_barriers(
        first.module,
        second.module,
        {split: first.batches(split, num_examples) for split in splits},
        train_dataloader=first.batches("train", num_examples),
        num_examples=num_examples,
        metrics=metrics,
        **options,
    )
    found: dict[str, float] = {}
    for split, metric in product(splits, metrics):
        key, line = f"barrier/{split}_{metric}", lines[split][metric]
        found |= {key if name == "barrier" else f"{key}/{name}": getattr(line, name) for name in DEFINITIONS}
        found[f"{key}_stderr"] = line.stderr_data["barrier"]
    return found


def curve(
    first: Trained,
    second: Trained,
    *,
    splits: tuple[str, ...] = ("train", "test"),
    num_examples: int | None = 2048,
    curve_examples: int | None = None,
    batch_size: int = 128,
    num_points: int = NUM_POINTS,
    paper_points: int | None = None,
    **training: Any,
) -> dict[str, float]:
    """Barriers, maxima and means along a curve trained between two cells, on the first one's data.

    With ``paper_points`` the barriers on so many of the points too, ending in ``/paper``.
    """
    found = connect(
        first.module,
        second.module,
        first.batches("train", curve_examples),
        CurveTraining(**training),
        dataloaders={split: first.batches(split, num_examples) for split in splits},
        batch_size=batch_size,
        num_points=num_points,
        num_examples=num_examples,
    )
    numbers = {"curve/length": found.curve.length, "curve/line_length": found.line_length}
    for split, metrics in found.on_curve.items():
        for metric, along in metrics.items():
            levels = found.levels[split][metric]
            numbers |= {f"curve/{split}_{metric}/{name}": getattr(along, name) for name in DEFINITIONS}
            if paper_points is not None:
                few = on_fewer_points(along, paper_points)
                numbers |= {f"curve/{split}_{metric}/{name}/paper": value for name, value in few.items()}
            numbers |= {f"curve/{split}_{metric}/{name}": getattr(levels, name) for name in ("max", "mean", "arc_mean")}
    return numbers


def similarity(first: Trained, second: Trained, *, split: str = "test", **options: Any) -> dict[str, float]:
    """Debiased linear CKA of each layer of two cells with that of the same name, and its mean over layers."""
    batches = first.batches(split, options.get("num_examples", NUM_EXAMPLES))
    by_layer = representation_similarity(first.module, second.module, batches, **options).same_layers()
    numbers = {f"similarity/{layer}": value.debiased for layer, value in by_layer.items()}
    return numbers | {"similarity/mean": fmean(numbers.values())}


def distance(first: Trained, second: Trained) -> dict[str, float]:
    """‖θ_A − θ_B‖₂ of two cells, and its ratio to the mean of their norms."""
    a, b = (torch.cat([p.detach().double().flatten() for p in t.module.parameters()]) for t in (first, second))
    l2 = float((a - b).norm())
    return {"distance/l2": l2, "distance/over_norm": l2 / (0.5 * float(a.norm() + b.norm()))}


def aligned_barrier(first: Trained, second: Trained, *, align: Method = "weights", **options: Any) -> dict[str, float]:
    """:func:`barrier` to the second cell with its channels permuted to match the first one's."""
    found = barrier(first, second, align=align, **options)
    return {f"aligned_{name}": value for name, value in found.items()}


def volume(
    first: Trained,
    second: Trained,
    *,
    thresholds: tuple[float, ...] = (0.1,),
    accuracies: tuple[float, ...] = (),
    **settings: Any,
) -> dict[str, float]:
    """Volume of low loss, and of high accuracy, around the second cell in the landscape of the first one's data."""
    data, numbers = {"first": first.batches("train", None)}, dict[str, float]()
    levels_of: dict[VolumeMetric, tuple[float, ...]] = {"loss": thresholds, "accuracy": accuracies}
    for metric, levels in levels_of.items():
        if not levels:
            continue
        asked = VolumeSettings(thresholds=tuple(levels), metric=metric, **settings)
        found = minima_volumes({"second": second.module}, data, asked)["second", "first"]
        for tau, around in found.items():
            ending = f"{'tau' if metric == 'loss' else metric}_{tau:g}"
            numbers[f"volume/cutoff/{ending}"] = float(around.cutoff)
            if not around.cutoff:
                numbers |= {f"volume/{name}/{ending}": getattr(around, name) for name in VOLUME_NUMBERS}
    return numbers


def plane(
    first: Trained, second: Trained, *, path: Path, split: str = "test", num_examples: int | None = 1024, **options: Any
) -> dict[str, float]:
    """The loss on the plane through two cells and a random direction: its range; the surface itself is in a file."""
    statistics = first.batches("train", num_examples)
    options = {"train_dataloader": statistics, "num_examples": num_examples, "split": split, **options}
    found = loss_surface(
        first.module, first.batches(split, num_examples), through=[second.module], path=path, **options
    )
    losses = found.losses[found.losses.isfinite()]
    return {"plane/loss_min": float(losses.min()), "plane/loss_max": float(losses.max())}


IN_FILES = ("plane",)
"""Measures that write a file too, and take its ``path``."""

MEASURES: Mapping[str, Callable[..., dict[str, float]]] = {
    "aligned_barrier": aligned_barrier,
    "barrier": barrier,
    "curve": curve,
    "distance": distance,
    "plane": plane,
    "similarity": similarity,
    "volume": volume,
}
"""By the names that studies use."""
