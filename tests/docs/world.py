"""What the pages talk about: small modules, loaders, folders and files under the names that they use."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import lmc_lightning
from lmc_lightning.experiments.cli import main
from lmc_lightning.experiments.plans.study import with_overrides
from lmc_lightning.landscape.alignment.matching import METHODS
from lmc_lightning.models import ImageClassifier
from lmc_lightning.plotting import barriers, llc, similarity, surfaces, trajectory, volume
from tests.docs.pages import ROOT, blocks

QUIET = {
    **dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False),
    "max_epochs": 2,
    "log_every_n_steps": 1,
}
HERE = {"accelerator": "cpu", "devices": 1, "strategy": "auto"}


def quick_trainer(trainer: Any, **given: Any) -> Any:
    """The Trainer that a page asks for, on this machine, without bars and files that nobody reads."""
    wanted = {**QUIET, **given}
    if any(isinstance(callback, ModelCheckpoint) for callback in given.get("callbacks", ())):
        wanted |= {"enable_checkpointing": True, "logger": True}  # whose versions have folders of their own
    return trainer(**{**wanted, **HERE})


def classifier(seed: int = 0) -> ImageClassifier:
    """16 inputs, 3 classes."""
    return ImageClassifier(
        network="mlp",
        network_kwargs={"hidden_sizes": [4], "in_features": 16},
        optimizer="sgd",
        lr=0.1,
        num_classes=3,
        init_seed=seed,
    )


def loader(num_examples: int = 24) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Batches of 8 small images."""
    images = torch.randn(num_examples, 1, 4, 4, generator=torch.Generator().manual_seed(num_examples))
    return DataLoader(TensorDataset(images, torch.arange(num_examples) % 3), batch_size=8, shuffle=True)


def of_the_readme() -> dict[str, Any]:
    """What its readers have; all else they import."""
    names = {"my_module": classifier(), "my_data": loader(), "module": classifier(), "loader": loader()}
    return {**names, "module_a": classifier(), "module_b": classifier(1)}


def common() -> dict[str, Any]:
    """What all other pages take as imported, and as there."""
    libraries = {"pl": pl, "torch": torch, "np": np, "pd": pd, "F": F, "ModelCheckpoint": ModelCheckpoint}
    ours = {name: getattr(lmc_lightning, name) for name in lmc_lightning.__all__}
    data = {name: loader() for name in ("train_loader", "val_loader", "test_loader")}
    return {**libraries, **ours, **of_the_readme(), **data}


def of_coming_from(names: dict[str, Any]) -> dict[str, Any]:
    """Plain networks."""
    return {**names, "network": classifier().network, "other": classifier(1).network, "vector": torch.randn(83)}


def of_checkpoints(names: dict[str, Any]) -> dict[str, Any]:
    """Files of a run that is over."""
    folder = Path("checkpoints")
    folder.mkdir()
    for name in ("last.ckpt", folder / "epoch=0.ckpt", folder / "epoch=1.ckpt"):
        torch.save({"state_dict": names["my_module"].state_dict()}, name)
    return {**names, "checkpoint_folder": folder}


def of_sweeps(names: dict[str, Any]) -> dict[str, Any]:
    """The study of the page, with two small cells, done."""
    (plan,) = [b.code for b in blocks(ROOT / "docs" / "howto" / "sweeps.md") if b.language == "yaml"]
    small = {
        "base.model.init_args.network_kwargs.in_features": 64,
        "base.data.init_args": {"batch_size": 32, "max_train_examples": 64, "image_size": 8},
        "base.trainer.max_epochs": 1,
        "base.trainer.accelerator": "cpu",
        "base.trainer.log_every_n_steps": 1,
        "base.trainer.callbacks": [
            {"class_path": "Sharpness", "init_args": {"num_examples": 32}},
            {"class_path": "HessianSpectrum", "init_args": {"num_examples": 32, "num_probes": 0}},
        ],
        "seeds": [0],
        "pairs": [],
    }
    content = with_overrides(yaml.safe_load(plan), small)
    content["grid"] = {**content["grid"], "model.init_args.network_kwargs.hidden_sizes": [[4], [8]]}
    content["grid"]["data.init_args.batch_size"] = [16]
    Path("width.yaml").write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "Trainer", pl.Trainer.args[0])  # the class, whose signature configurations are checked by
        assert main(["sweep", "width.yaml"]) == 0
    return names


def capped(function: Callable[..., Any], **largest: int) -> Callable[..., Any]:
    """The same with fewer points, where a page has many."""

    def small(*args: Any, **options: Any) -> Any:
        for name, most in largest.items():
            options[name] = min(options.get(name, most), most)
        return function(*args, **options)

    return small


def of_the_gallery(names: dict[str, Any]) -> dict[str, Any]:
    """Networks, runs and files of each kind, and plots; grids and films of a few points."""
    for file in ("b.ckpt", "c.ckpt"):
        torch.save(classifier(ord(file[0])).state_dict(), file)
    folders = {name: Path(name) for name in ("seed 0", "seed 1")}
    for seed, folder in enumerate([Path("run"), *folders.values()]):
        way = lmc_lightning.WeightTrajectory(record_every_n_train_steps=1)
        trainer = pl.Trainer(default_root_dir=folder, callbacks=[way, lmc_lightning.CheckpointBranching(epochs=[0])])
        trainer.fit(classifier(seed), loader())
    families = {"family": lmc_lightning.Family.load(Path("run") / "lmc" / "family"), "log_dir": Path("run")}
    few = {
        "loss_surface": capped(lmc_lightning.loss_surface, num_points=5),
        "LossSurface": partial(lmc_lightning.LossSurface, num_points=5),
        "WeightTrajectory": capped(lmc_lightning.WeightTrajectory, loss_points=3),
        "CurveTraining": capped(lmc_lightning.CurveTraining, num_epochs=1),
        "animate": capped(lmc_lightning.animate, turning_frames=2),
        "VolumeSettings": lambda thresholds, num_directions: lmc_lightning.VolumeSettings(
            thresholds=tuple(100 * threshold for threshold in thresholds),  # of a network that is not trained
            num_directions=min(8, num_directions),
        ),
    }
    plots = {
        name: plot
        for module in (barriers, llc, similarity, surfaces, trajectory, volume)
        for name, plot in vars(module).items()
        if name.startswith("plot_")
    }
    modules = [classifier(seed) for seed in range(3)]
    return {
        **names,
        **few,
        **plots,
        **families,
        "Trainer": pl.Trainer,
        "METHODS": METHODS,
        "folders": {name: folder / "lmc" / "trajectory" for name, folder in folders.items()},
        "data": loader(),
        "dataloader": loader(),
        "loaders": {"train": loader(), "val": loader(16)},
        "trunk": classifier(),
        "child": classifier(1),
        "modules": modules,
        "starts": [classifier(10 + seed).state_dict() for seed in range(3)],
    }


WORLDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "README.md": lambda names: of_the_readme(),
    "docs/coming_from.md": of_coming_from,
    "docs/gallery.md": of_the_gallery,
    "docs/howto/checkpoints.md": of_checkpoints,
    "docs/howto/sweeps.md": of_sweeps,
}
