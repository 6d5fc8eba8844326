"""How a study's file becomes cells and pairs, and what identifies a cell."""

import pytest

from lmc_lightning.experiments.plans.study import Study, with_overrides
from lmc_lightning.experiments.work.tasks import tasks_of
from tests.experiments.studies import BASE, BRANCHED, PLAN, write_plan


def settings(**content) -> list[dict]:
    return [cell.hyperparameters for cell in Study.of({"base": BASE, **content}).cells]


def test_a_grid_is_every_combination_with_every_seed():
    cells = settings(grid={"model.init_args.lr": [0.1, 0.2], "data.init_args.batch_size": [8, 16]}, seeds=[3, 4])
    assert len(cells) == 8
    assert {(c["lr"], c["batch_size"], c["seed"]) for c in cells} == {
        (lr, size, seed) for lr in (0.1, 0.2) for size in (8, 16) for seed in (3, 4)
    }


def test_values_of_zip_go_together_and_lists_are_cells():
    keys = {"model.init_args.lr": [0.1, 0.2], "trainer.max_epochs": [1, 2]}
    assert settings(zip=keys) == [{"lr": 0.1, "max_epochs": 1}, {"lr": 0.2, "max_epochs": 2}]
    assert settings(list=[{"model.init_args.lr": 0.5}, {"trainer.max_epochs": 9}]) == [
        {"lr": 0.5, "max_epochs": 2},  # what a cell does not override is that of the base
        {"lr": 0.1, "max_epochs": 9},
    ]


def test_what_no_one_says_is_the_default_of_the_class():
    cells = settings(list=[{"model.init_args.sam_rho": 0.05}, {"model.init_args.network_kwargs.init": "xavier"}])
    assert cells == [{"sam_rho": 0.05, "init": None}, {"sam_rho": 0.0, "init": "xavier"}]


def test_seeds_reach_every_key_that_is_named():
    cell = Study.of(PLAN).cells[1]
    assert cell.config["seed_everything"] == cell.seed == 1
    assert cell.config["model"]["init_args"]["init_seed"] == 1
    assert cell.config["data"]["init_args"]["noise_seed"] == 1


def test_names_are_as_short_as_they_are_clear():
    keys = {"model.init_args.lr": [0.1], "other.lr": [0.2], "data.init_args.batch_size": [4]}
    assert list(settings(grid=keys)[0]) == ["init_args.lr", "other.lr", "batch_size"]


def test_an_id_is_a_hash_of_what_differs_from_defaults():
    def identity(overrides) -> str:
        return Study.of({"base": with_overrides(BASE, overrides)}).cells[0].id

    plain = identity({})
    assert identity({"model.init_args.scheduler": "none"}) == plain
    assert identity({"data.init_args.val_fraction": 0.2}) == plain  # an inherited argument with a default of its own
    assert identity({"model.class_path": "lmc_lightning.models.ImageClassifier"}) == plain
    assert identity({"trainer.enable_progress_bar": True}) == plain
    assert identity({"trainer.max_epochs": 3}) != plain
    assert identity({"model.init_args.lr": 0.2}) != plain


def test_equal_cells_are_one():
    assert len(settings(grid={"model.init_args.scheduler": ["none"]}, list=[{}, {"model.init_args.lr": 0.1}])) == 1


def test_overrides_leave_the_original_and_lead_into_lists():
    changed = with_overrides(BASE, {"trainer.callbacks.0.init_args.num_samples": 9, "trainer.new.key": 1})
    assert changed["trainer"]["callbacks"][0]["init_args"]["num_samples"] == 9
    assert changed["trainer"]["new"] == {"key": 1}
    assert BASE["trainer"]["callbacks"][0]["init_args"]["num_samples"] == 2


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trainer.callbacks.7.init_args.rho", "a place from 0 to 0 of a list, got '7'"),
        ("trainer.max_epochs.more", "'max_epochs', which is 2 and has no keys"),
    ],
)
def test_impossible_overrides_are_named(key, message):
    with pytest.raises(ValueError, match=message):
        with_overrides(BASE, {key: 1})


def test_pairs_differ_in_one_thing_only():
    study = Study.of({**PLAN, "pairs": [{"measures": {"barrier": None}}]})
    assert [(a.overrides == b.overrides, a.seed, b.seed) for a, b, _ in study.paired()] == [(True, 0, 1)] * 2
    across = {"measures": {"barrier": None}, "across": "model.init_args.lr", "where": {"model.init_args.lr": 0.1}}
    assert Study.of({**PLAN, "pairs": [across]}).paired() == []
    across.pop("where")
    assert [a.seed == b.seed for a, b, _ in Study.of({**PLAN, "pairs": [across]}).paired()] == [True, True]


def test_all_can_be_compared_with_one():
    pairing = {"measures": {"barrier": None}, "across": "model.init_args.lr", "against": 0.3}
    study = Study.of({**PLAN, "grid": {"model.init_args.lr": [0.1, 0.3, 0.5]}, "seeds": [0], "pairs": [pairing]})
    compared = [[cell.hyperparameters["lr"] for cell in pair[:2]] for pair in study.paired()]
    assert compared == [[0.3, 0.1], [0.3, 0.5]]
    study = Study.of({**PLAN, "seeds": [0], "pairs": [{**pairing, "itself": True}]})
    compared = [[cell.hyperparameters["lr"] for cell in pair[:2]] for pair in study.paired()]
    assert compared == [[0.3, 0.1], [0.3, 0.3]]


def test_variants_of_a_file_change_it_by_dotted_keys(tmp_path):
    variants = {"small": {"base.trainer.max_epochs": 1, "grid": {}}, "few": {"seeds": [7]}}
    path = write_plan(tmp_path, {**PLAN, "variants": variants})
    assert len(Study.load(path).cells) == 4
    study = Study.load(path, ["small", "few"])
    (cell,) = study.cells
    assert (study.name, cell.config["trainer"]["max_epochs"], cell.seed) == ("tiny_small_few", 1, 7)
    with pytest.raises(ValueError, match=r"has no variant 'large'. It has few, small\."):
        Study.load(path, ["large"])


def test_tasks_come_after_those_that_they_need():
    tasks = tasks_of(Study.of(BRANCHED))
    places = {task.id: place for place, task in enumerate(tasks)}
    assert [task.kind for task in tasks] == ["cell", "cell", "child", "family", "child", "family", "pair"]
    assert all(places[needed] < places[task.id] for task in tasks for needed in task.after)
    assert len(places) == len(tasks)


def test_a_study_is_read_from_its_file_with_its_base_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {class_path: ImageClassifier}")
    study = Study.load(write_plan(tmp_path, {"base": "base.yaml", "seeds": [1]}))
    assert study.name == "plan"
    assert study.cells[0].config == {"model": {"class_path": "ImageClassifier"}, "seed_everything": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"base": {}, "gird": {}}, "has no 'gird'. It has base, branches, grid, list"),
        ({"base": {}, "zip": {"a": [1], "b": [1, 2]}}, "need one length"),
        ({"base": {}, "pairs": [{"across": "seed"}]}, "has measures, across, where, against, itself, got"),
    ],
)
def test_what_is_no_study_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        Study.of(content)


def test_a_file_that_is_no_study_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"plan\.yaml is no study: expected a mapping with `base`"):
        Study.load(write_plan(tmp_path, {"grid": {}}))
