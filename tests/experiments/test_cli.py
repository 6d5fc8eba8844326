"""The command line on real runs: what a newcomer types."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml

from lmc_lightning.experiments import commands
from lmc_lightning.experiments.cli import main
from tests.experiments.studies import BASE, BRANCHED, PLAN, write_plan

OUTSIDE = '''
"""A LightningModule that knows nothing of this package."""
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    def __init__(self, width: int = 3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x.sum(1) > x.sum(1).median()).long()), batch_size=10)
'''


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it, not ours
    monkeypatch.setattr(sys, "argv", ["lmc-lightning"])
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # of Lightning's seed_everything
        os.environ.pop(name, None)


@pytest.fixture
def fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of a foreign module, trained by ``fit`` with one of our callbacks."""
    (tmp_path / "outside_project.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = "--model outside_project.Net --model.width 5 --data outside_project.Data --trainer.max_epochs 1"
    more = (
        "--trainer.callbacks+=HessianSpectrum --trainer.callbacks.num_eigenvalues=1 --trainer.callbacks.density=false"
    )
    quiet = "--trainer.enable_progress_bar=false --trainer.enable_model_summary=false --trainer.log_every_n_steps=1"
    assert main(["fit", *options.split(), *more.split(), *quiet.split()]) == 0
    return tmp_path / "lightning_logs" / "version_0"


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_a_foreign_module_is_fitted_and_its_checkpoints_measured(fitted, capsys, tmp_path):
    assert (fitted / "lmc" / "hessian.jsonl").is_file()
    config = yaml.safe_load((fitted / "config.yaml").read_text())
    assert config["model"]["init_args"]["width"] == 5
    assert config["trainer"]["callbacks"][0]["class_path"] == "lmc_lightning.HessianSpectrum"
    table, run = tmp_path / "t.csv", ["-c", str(fitted / "config.yaml"), "--num-examples", "32"]
    spectrum = "HessianSpectrum(num_eigenvalues=1, density=False)"
    assert main(["measure", *run, str(fitted), "--callback", spectrum, "--output", str(table)]) == 0
    found = pd.read_csv(table)
    assert len(found) == 1
    assert found["hessian/lambda_max"][0] > 0
    (checkpoint,) = fitted.rglob("*.ckpt")
    capsys.readouterr()
    figure = tmp_path / "line.png"
    split = ["--split", "train", "--num-points", "3", "--figure", str(figure)]
    assert main(["barrier", *run, str(checkpoint), str(checkpoint), *split]) == 0
    assert capsys.readouterr().out.split()[3:6] == ["barrier", "0.0", "0.0"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert main(["doctor", *run]) == 0
    assert "✓ Hessian" in capsys.readouterr().out


def test_a_sweep_is_planned_run_collected_and_emitted(tmp_path, capsys):
    plan, folder = str(write_plan(tmp_path, {**BRANCHED, "base": BASE, "branches": None})), str(tmp_path / "out")
    assert main(["sweep", plan, "--folder", folder, "--dry-run"]) == 0
    assert "2 cells (0 done), 1 pairs (0 done); time unknown" in capsys.readouterr().out
    assert main(["sweep", plan, "--folder", folder, "--list"]) == 0
    ids = capsys.readouterr().out.split()
    assert main(["sweep", plan, "--folder", folder, "--cell", ids[0]]) == 0
    assert "2 cells (1 done)" in capsys.readouterr().out
    assert main(["sweep", plan, "--folder", folder]) == 0
    assert "2 cells (2 done), 1 pairs (1 done); about 0 s are left" in capsys.readouterr().out
    assert main(["collect", folder, "--runs", "--output", str(tmp_path / "runs.csv")]) == 0
    assert len(pd.read_csv(tmp_path / "runs.csv")) == 2
    assert list((tmp_path / "out").glob("events.out.tfevents.*.hparams"))
    assert main(["sweep", plan, "--emit", "slurm"]) == 0
    assert "#!/bin/bash" in capsys.readouterr().out


def test_a_variant_is_swept_into_a_folder_of_its_own(tmp_path, capsys):
    plan = str(write_plan(tmp_path, {**PLAN, "variants": {"one": {"seeds": [5], "grid": {}}}}))
    assert main(["sweep", plan, "--variant", "one", "--list"]) == 0
    assert len(capsys.readouterr().out.split()) == 1
    assert main(["sweep", plan, "--variant", "one", "--emit", "slurm"]) == 0
    assert f"sweep {plan} --folder studies/tiny_one --variant one --task" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "plan.yaml", "--task", "nope"], "has no task 'nope'"),
        (["sweep", "missing.yaml"], "missing.yaml"),
        (["collect", "nowhere", "--output", "t.csv"], "folder of a study"),
        (["measure", "-c", "config.yaml", "none.ckpt"], "neither a file nor a folder"),
        (["measure", "-c", "config.yaml", "config.yaml", "--callback", "Nope"], "This package has no 'Nope'"),
        (["measure", "-c", "config.yaml", "config.yaml", "--callback", "2 +"], "Expected a callback like"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_plan(tmp_path, {"base": BASE})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(BASE))
    assert main(arguments) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("lmc-lightning: ")
    assert message in told


def test_without_its_extra_the_command_line_says_how_to_get_it(monkeypatch, capsys):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'jsonargparse'", name="jsonargparse")

    monkeypatch.setattr(commands, "fit", missing)
    assert main(["fit"]) == 2
    assert "pip install 'lmc-lightning[cli]'" in capsys.readouterr().err


def test_view_starts_tensorboard_with_enough_samples(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(commands.os, "execv", lambda program, command: called.extend(command))
    main(["view", "my logs", "--port", "7001"])
    assert called[1:5] == ["--logdir", "my logs", "--samples_per_plugin", "images=200,text=200,mesh=20"]
    assert "http://localhost:7001/?smoothing=0" in capsys.readouterr().out
