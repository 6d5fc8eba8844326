"""The benchmarks run and judge by the truth; their times are nobody's business here. No peer is needed."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import works
from benchmarks.correctness import Case, answer, cases
from benchmarks.harness import Contender, compare, kept, summarise
from benchmarks.references import Reference, gauss_newton_trace
from benchmarks.report import table, tables
from benchmarks.works import Recipe, Work
from lmc_lightning.data.vision import DigitsDataModule
from lmc_lightning.models.mlp import MLP

TINY = Recipe(lambda: MLP((4,), in_features=64), DigitsDataModule, 48, 5, 0.1, chunk_size=32)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setitem(works.RECIPES, "tiny", TINY)  # type: ignore[arg-type]
    monkeypatch.setitem(works.FOLDERS, "cache", tmp_path)
    monkeypatch.setattr("benchmarks.tasks.radii.NUM_DIRECTIONS", 4)
    return Work("tiny")


def test_every_task_finds_the_truth(tiny: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["hvp", "lambda_max", "top5", "trace", "together", "barrier", "surface", "radii"]
    tasks += ["matching", "matching_planted"]
    common = ["--only", "lmc_lightning", "--cache", str(tmp_path), "--no-warm-up", "--pairs", "1"]
    threads = torch.get_num_threads()
    try:
        command.main(["--work", "tiny", "--task", *tasks, *common])
    finally:
        torch.set_num_threads(threads)
    trials = [t for t in kept(tmp_path / "trials.jsonl") if t.ours]
    assert [t.task for t in trials] == tasks
    assert not [t.failure for t in trials if t.failure]
    limits = {
        "product": 1e-5,
        "eigenvalues": 1e-4,
        "trace": 1e-5,
        "loss": 1e-5,
        "error": 1e-6,
        "missing_points": 0,
        "radius": 1e-3,
        "distance": 1,
        "function": 1e-6,
    }
    for trial in trials:
        assert trial.errors
        assert all(error <= limits[name] for name, error in trial.errors.items()), trial
    assert trials[-1].errors["distance"] == 0
    assert "### barrier, tiny" in capsys.readouterr().out


def test_references_agree_with_each_other(tiny: Work) -> None:
    reference = Reference(tiny)
    vector = torch.randn(reference.num_params, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reference.dense @ vector, reference.product(vector))
    assert reference.trace == pytest.approx(gauss_newton_trace(reference.module, reference.chunks), rel=1e-10)
    assert reference.top[0] == pytest.approx(float(torch.linalg.eigvalsh(reference.dense)[-1]), rel=1e-10)
    assert json.loads((works.FOLDERS["cache"] / "tiny_reference.json").read_text())["trace"][1] == 0


def test_contenders_take_turns_and_one_that_fails_is_left_out() -> None:
    order: list[str] = []

    def contender(name: str, *, fails: bool = False) -> Contender:
        def run() -> dict[str, float]:
            order.append(name)
            if fails:
                raise ValueError("no")
            return {"answer": 1.0, "products": 3}

        return Contender(name, lambda seed: run, ours=name == "a")

    found = [contender("a"), contender("b"), contender("c", fails=True)]
    trials = list(compare("w", "t", found, lambda v: {"answer": abs(v["answer"] - 1)}, rounds=2, warm_up=False))
    assert order == ["a", "b", "c", "b", "a"]
    rows = {row.contender: row for row in summarise(trials)}
    assert rows["a"].ratio == 1
    assert rows["b"].errors == {"answer": 0}
    assert (rows["c"].rounds, rows["c"].failure) == (0, "ValueError: no")
    assert math.isnan(rows["c"].ratio)
    assert "| c | fails: ValueError: no |" in table(summarise(trials))
    assert "### t, w (2 rounds)" in tables(trials)


def test_an_answer_is_right_within_its_tolerance_and_an_exception_is_named() -> None:
    case = Case("PyHessian", "?", 2.0, lambda: 2.0, lambda: 2.0, tolerance=0.1)
    assert case.is_right(2.19)
    assert not case.is_right(2.21)
    assert not case.is_right("two")
    assert answer(lambda: 1 / 0) == "raises ZeroDivisionError"


def test_our_answers_are_right() -> None:
    asked = list(cases())
    assert len({case.peer for case in asked}) == 6
    assert [case.question for case in asked if not case.is_right(answer(case.ours))] == []
