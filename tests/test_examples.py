"""Every example runs as it stands, in its small setting; the demo says what it found, or why it could not."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest

import lmc_lightning

EXAMPLES = Path(__file__).parents[1] / "examples"
ADVICE = "python -m lmc_lightning.data download"


def load(name: str) -> ModuleType:
    """An example as a module of this process."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def seeded() -> Iterator[None]:
    """What Lightning's ``seed_everything`` leaves in the environment is gone afterwards."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


def run(name: str, *arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """An example in a process and a folder of its own."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "NO_COLOR": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_every_example_is_tested() -> None:
    scripts = [path for path in EXAMPLES.glob("*.py") if path.stem != "tour"]  # a notebook, see test_tour.py
    assert {path.stem for path in scripts} == {"quickstart", "attach", "two_networks"}
    assert all(len(path.read_text().splitlines()) < 120 for path in scripts)


def test_the_demo_shows_its_tables_and_where_to_look(tmp_path: Path) -> None:
    done = run("quickstart", "--small", "--log-dir", "my logs", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    visits, barriers, closing = done.stdout.strip().rsplit("\n\n", 2)
    header, *rows = visits[visits.index("Visits") :].splitlines()[1:]
    assert {"hessian/lambda_max", "hessian/trace", "sharpness/worst_case"} <= set(header.split())
    assert [row.split()[0] for row in rows] == ["0", "2"]
    title, header, *rows = barriers.splitlines()
    assert title == "Barriers"
    assert {"train_loss", "train_error", "val_loss", "val_error"} <= set(header.split())
    assert [tuple(map(int, row.split()[:3])) for row in rows] == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 1), (1, 0, 2)]
    cost, _, command, link = closing.splitlines()
    assert re.fullmatch(r"Total \d+ s, of which measuring \d+ s\.", cost)
    program, option, log_dir, *_ = shlex.split(command)
    assert Path(program).name == "tensorboard"
    assert option == "--logdir"
    assert list((tmp_path / log_dir).glob("events.out.tfevents.*"))
    assert list((tmp_path / log_dir / "lmc").glob("*.jsonl"))
    assert link.strip().startswith("http://localhost:6006/?smoothing=0&pinnedCards=")


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize(("name", "words"), [("attach", "Visits"), ("two_networks", "loss barrier on validation data")])
def test_the_other_examples_run(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--small"])
    load(name).main()
    shown = capsys.readouterr().out
    assert words in shown
    assert "failed" not in shown


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_a_missing_data_set_is_an_error_that_says_where_it_was_looked_for_and_how_to_fetch_it(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "no data"
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--dataset", dataset, "--data-dir", str(folder)])
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder))) as caught:
        load("quickstart").main()
    assert f"{ADVICE} {dataset} --data-dir {shlex.quote(str(folder))}" in str(caught.value)


def test_without_its_data_the_demo_ends_with_an_error_code(tmp_path: Path) -> None:
    done = run("quickstart", "--dataset", "mnist", "--data-dir", "empty", folder=tmp_path)
    assert done.returncode != 0
    last_words = done.stderr[done.stderr.rindex("FileNotFoundError") :]
    assert str(tmp_path / "empty") in last_words
    assert f"{ADVICE} mnist --data-dir empty" in last_words


@pytest.mark.usefixtures("seeded")
@pytest.mark.filterwarnings("ignore:.*failed.*no luck:UserWarning")
def test_failed_visits_are_told_and_make_the_demo_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise ValueError("no luck")

    demo = load("quickstart")
    few = {"limit_train_batches": 2, "limit_val_batches": 1, "enable_progress_bar": False, "accelerator": "cpu"}
    monkeypatch.setattr(pl, "Trainer", partial(pl.Trainer, **few))
    monkeypatch.setattr(lmc_lightning.HessianSpectrum, "measure", fail)
    monkeypatch.setattr(lmc_lightning.InterpolationBarrier, "_result", fail)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--small"])
    assert demo.main() == 1
    shown = capsys.readouterr().out
    assert "7 failed\n  5 × barrier: ValueError: no luck\n  2 × hessian: ValueError: no luck\n" in shown
