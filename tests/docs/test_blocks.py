"""The Python code of all pages runs as it stands, in small: each page from top to bottom, as a reader would."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import yaml

from lmc_lightning.experiments.plans.study import Study
from lmc_lightning.experiments.work.tasks import tasks_of
from tests.docs.pages import ROOT, blocks, name_of, pages
from tests.docs.world import WORLDS, common, quick_trainer
from tests.experiments.test_phases import collected

PYTHON = [page for page in pages() if any(b.language == "python" for b in blocks(page))]


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it, not ours
    monkeypatch.setattr(pl, "Trainer", partial(quick_trainer, pl.Trainer))
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # of Lightning's seed_everything
        os.environ.pop(name, None)


def run(page: Path, names: dict[str, Any]) -> dict[str, Any]:
    """The names that there are after the last block."""
    for block in blocks(page):
        if block.language == "python":
            # Line numbers of a traceback are those of the page.
            code = compile("\n" * block.line + block.code, name_of(page), "exec")
            if not block.is_theirs:
                exec(code, names)
    return names


@pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning")  # Lightning's, of every resumed run
@pytest.mark.filterwarnings("ignore:More than half of the captured:UserWarning")  # of a handful of examples
@pytest.mark.parametrize("page", PYTHON, ids=name_of)
def test_the_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = name_of(page)
    if name == "docs/studies/README.md":
        monkeypatch.setattr("lmc_lightning.experiments.collect.collect", lambda folder: collected())
    names = run(page, WORLDS.get(name, dict)(common()))
    if name == "README.md":
        found = {r.name for c in names["trainer"].callbacks for r in getattr(c, "results", [])}
        assert {"hessian/lambda_max", "sharpness/worst_case", "barrier/train_loss/k1_005"} <= found
    if name == "docs/howto/own_callback.md":
        assert isinstance(names["agreement"].to_pandas(), pd.DataFrame)
        assert not names["agreement"].failures


@pytest.mark.parametrize(
    "page", [page for page in pages() if any(b.language == "yaml" for b in blocks(page))], ids=name_of
)
def test_studies_of_a_page_can_be_read(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            path = tmp_path / "study.yaml"
            path.write_text(block.code, encoding="utf-8")
            for variants in ([], *[[v] for v in yaml.safe_load(block.code).get("variants", {})]):
                assert tasks_of(Study.load(path, variants))


def test_notebooks_are_run_by_the_build() -> None:
    for page in pages():
        cells = [b for b in blocks(page) if b.language == "{code-cell}"]
        assert bool(cells) == page.read_text(encoding="utf-8").startswith("---\nfile_format: mystnb\n"), page


def test_no_block_escapes() -> None:
    """Every block is of a language that some test knows, or is text."""
    known = {"python", "yaml", "console", "bash", "text", ""}
    for page in pages():
        unknown = {b.language for b in blocks(page) if not b.language.startswith("{")} - known
        assert not unknown, f"{page}: {unknown}"
    assert ROOT / "README.md" in PYTHON
