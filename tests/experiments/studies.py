"""A study that takes seconds: MLPs on a few digits."""

from pathlib import Path
from typing import Any

import yaml

from lmc_lightning.experiments.plans.study import Study, with_overrides
from lmc_lightning.experiments.work.tasks import Outcome, run_task, tasks_of

BASE: dict[str, Any] = {
    "model": {
        "class_path": "ImageClassifier",
        "init_args": {
            "network": "mlp",
            "network_kwargs": {"hidden_sizes": [4], "in_features": 64},
            "optimizer": "sgd",
            "lr": 0.1,
        },
    },
    "data": {
        "class_path": "DigitsDataModule",
        "init_args": {"batch_size": 32, "max_train_examples": 96, "image_size": 8},
    },
    "trainer": {
        "max_epochs": 2,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "callbacks": [
            {"class_path": "Sharpness", "init_args": {"num_examples": 32, "num_samples": 2, "epochs": [0, 2]}},
        ],
    },
}
PLAN: dict[str, Any] = {
    "name": "tiny",
    "base": BASE,
    "grid": {"model.init_args.lr": [0.1, 0.3]},
    "seeds": [0, 1],
    "seed_keys": ["seed_everything", "model.init_args.init_seed", "data.init_args.noise_seed"],
}
BARRIER = {"class_path": "InterpolationBarrier", "init_args": {"num_examples": 32, "num_points": 3, "epochs": [2]}}
BRANCHED: dict[str, Any] = {
    **PLAN,
    "base": with_overrides(BASE, {"trainer.callbacks": [*BASE["trainer"]["callbacks"], BARRIER]}),
    "grid": {},
    "branches": {"epochs": [1]},
    "pairs": [{"measures": {"barrier": {"num_points": 3, "num_examples": 32, "splits": ["test"]}}}],
}


def write_plan(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run_all(content: dict[str, Any], folder: Path) -> dict[str, Outcome]:
    study = Study.of(content)
    return {task.id: run_task(study, task, folder) for task in tasks_of(study)}
