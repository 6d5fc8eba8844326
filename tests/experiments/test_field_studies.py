"""The studies of the field: each file gives the cells, children and pairs that it says, of classes that exist."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch import Callback

from lmc_lightning.experiments.plans.build import build
from lmc_lightning.experiments.plans.study import Cell, Study
from lmc_lightning.experiments.work.tasks import tasks_of
from tests.experiments.studies import PLAN

STUDIES = Path(__file__).parents[2] / "examples" / "studies"

TASKS = {
    ("wide_networks",): {"cell": 25 * 5, "pair": 25 * 10 + 6 * 10},
    ("wide_networks", "small"): {"cell": 14 * 3, "pair": 14 * 3 + 2 * 3},
    ("wide_networks", "ends"): {"cell": 2 * 2, "pair": 2 + 2},
    ("branching_lenet5_mnist",): {"cell": 2, "child": 2 * 5, "family": 2},
    ("branching_lenet5_mnist", "small"): {"cell": 2, "child": 2 * 3, "family": 2},
    ("branching_reduced_vgg_cifar10",): {"cell": 2, "child": 2 * 7, "family": 2},
    ("branching_reduced_vgg_cifar10", "small"): {"cell": 2, "child": 2 * 4, "family": 2},
    ("branching_alexnet_tiny_imagenet",): {"cell": 2, "child": 2 * 4, "family": 2},
    ("branching_alexnet_tiny_imagenet", "small"): {"cell": 2, "child": 2 * 2, "family": 2},
    ("branching_resnet20_cifar10",): {"cell": 3, "child": 3 * 8 * 2, "family": 3},
    ("branching_resnet20_cifar10", "vgg16"): {"cell": 3, "child": 3 * 8 * 2, "family": 3},
    ("branching_resnet20_cifar10", "small"): {"cell": 1, "child": 3 * 2, "family": 1},
    ("taxonomy",): {"cell": 14 * 13 * 5, "pair": 14 * 13 * 10},
    ("taxonomy", "axes"): {"cell": 14 * 14 * 5, "pair": 14 * 14 * 10},
    ("taxonomy", "small"): {"cell": 6 * 4 * 2, "pair": 6 * 4},
    ("many_initialisations",): {"cell": 10, "pair": 45},
    ("many_initialisations", "wide"): {"cell": 50, "pair": 49},
    ("many_initialisations", "digits"): {"cell": 10, "pair": 45},
    ("many_initialisations", "small"): {"cell": 3, "pair": 3},
    ("minimum_volume",): {"cell": 6 * 10, "pair": 6 * 10},
    ("minimum_volume", "small"): {"cell": 4 * 3, "pair": 4 * 3},
    ("minimum_volume", "medium"): {"cell": 4 * 2, "pair": 4 * 2},
    ("minimum_volume", "cifar10"): {"cell": 6 * 10, "pair": 6 * 10},
    ("minimum_volume", "svhn"): {"cell": 6 * 10, "pair": 6 * 10},
    ("minimum_volume", "modular_addition"): {"cell": 5 * 10, "pair": 5 * 10},
    ("minimum_volume", "swiss_roll"): {"cell": 5 * 10, "pair": 5 * 10},
    ("minimum_volume", "poisoned"): {"cell": 6 * 10, "pair": 6 * 10},
    ("minimum_volume", "noise"): {"cell": 6 * 10, "pair": 6 * 10},
    ("minimum_volume", "imbalanced"): {"cell": 6 * 10, "pair": 6 * 10},
    ("minimum_volume", "batch"): {"cell": 5 * 10, "pair": 5 * 10},
    ("minimum_volume", "sam"): {"cell": 6 * 10, "pair": 6 * 10},
}


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it, not ours
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # of Lightning's seed_everything
        os.environ.pop(name, None)


def load(given: tuple[str, ...]) -> Study:
    return Study.load(STUDIES / f"{given[0]}.yaml", given[1:])


def test_every_study_and_variant_is_listed_here():
    found = set()
    for path in STUDIES.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        assert content["name"] == path.stem
        found |= {(path.stem,), *((path.stem, variant) for variant in content["variants"])}
    assert found == set(TASKS)


@pytest.mark.parametrize("given", TASKS, ids="-".join)
def test_a_study_has_the_tasks_that_it_says(given):
    assert Counter(task.kind for task in tasks_of(load(given))) == TASKS[given]


def structures(study: Study) -> Iterator[Cell]:
    """A cell for each set of overrides, at its smallest seed."""
    first = min(study.seeds)
    yield from (cell for cell in study.cells if cell.seed == first)


@pytest.mark.parametrize("given", [g for g in TASKS if g[0] != "taxonomy" or g[1:] == ("small",)], ids="-".join)
def test_the_configurations_of_a_study_are_built(given, tmp_path):
    *_, cell = structures(load(given))
    objects = build(cell.config, tmp_path, logger=False, enable_checkpointing=False, accelerator="cpu")
    assert isinstance(objects.model, pl.LightningModule)
    assert isinstance(objects.datamodule, pl.LightningDataModule)
    named = [str(c["class_path"]).rpartition(".")[2] for c in cell.config["trainer"].get("callbacks", ())]
    named = [name for name in named if name != "ModelCheckpoint"]
    made = [type(c).__name__ for c in objects.trainer.callbacks if isinstance(c, Callback)]
    assert [name for name in made if name in named] == named


def test_the_largest_map_of_the_taxonomy_is_of_distinct_networks_and_shared_data():
    cells = load(("taxonomy",)).cells
    widths = {cell.hyperparameters["width"] for cell in cells}
    sizes = {cell.hyperparameters["batch_size"] for cell in cells}
    assert (min(widths), max(widths), len(widths)) == (1, 128, 14)
    assert (min(sizes), max(sizes), len(sizes)) == (16, 1024, 13)
    assert {cell.config["data"]["init_args"].get("split_seed") for cell in cells} == {None}


def test_ten_initialisations_see_the_same_batches():
    cells = load(("many_initialisations",)).cells
    assert {cell.config["model"]["init_args"]["init_seed"] for cell in cells} == set(range(10))
    assert len({str(cell.config["data"]) for cell in cells}) == 1


def test_all_volumes_are_in_the_landscape_of_the_smallest_set():
    pairs = load(("minimum_volume",)).paired()
    assert {a.hyperparameters["max_train_examples"] for a, _, _ in pairs} == {60}
    assert all(a.seed == b.seed for a, b, _ in pairs)
    for first, second, _ in pairs:
        seeds = {cell.config["data"]["init_args"]["subset_seed"] for cell in (first, second)}
        assert len(seeds) == 1  # so that subsets are nested


@pytest.mark.parametrize("name", ["142222773814", "12e3", "3c28be49aafa"])
def test_a_run_logs_in_its_own_folder_even_where_its_name_is_a_number(name: str, tmp_path: Path) -> None:
    (cell, *_) = Study.of(PLAN).cells
    objects = build(cell.config, tmp_path / name)
    assert Path(objects.trainer.log_dir) == tmp_path / name
