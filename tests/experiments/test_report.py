"""The page of a run and of a study: well-formed, whole, and safe with whatever text it shows."""

import gzip
import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from lmc_lightning.experiments.cli import main
from lmc_lightning.experiments.collect import collect, runs
from lmc_lightning.experiments.plans.study import Study
from lmc_lightning.experiments.results import report as reports
from lmc_lightning.experiments.results.definitions import definitions
from lmc_lightning.experiments.results.report import report
from lmc_lightning.experiments.work.tasks import cell_folder, run_task, tasks_of
from lmc_lightning.landscape.surface.slices import Mark, Surface
from lmc_lightning.media import save_arrays
from lmc_lightning.plotting.interactive import plotly_program
from tests.experiments.studies import BRANCHED, run_all

VOID = {"meta", "img", "link", "br", "hr", "!doctype"}
NASTY = "<script>alert('x')</script> & \"co\""


class Page(HTMLParser):
    """The text of a page, its pictures, and a proof that its elements are nested."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.texts, self.sources, self.reliefs, self.tags = [], [], [], [], set()
        self.feed(path.read_text("utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if tag == "img" and name == "src"]
        self.reliefs += [json.loads(value) for name, value in attrs if name == "data-figure"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def cells(self) -> set[str]:
        return {text.strip() for text in self.texts}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    run_all({**BRANCHED, "seeds": [0, 1]}, folder)
    broken = Study.of({**BRANCHED, "grid": {"model.init_args.network": [NASTY]}, "seeds": [7], "branches": None})
    run_task(broken, tasks_of(broken)[0], folder)
    return folder


def test_a_study_has_its_numbers_tables_and_definitions(study, tmp_path):
    page = Page(report(study, tmp_path / "report.html"))
    wide = runs(collect(study))
    for name in ("val_acc", "sharpness/worst_case"):
        values = wide[name].dropna()
        assert len(values) == 2
        assert {format(value, ".4g") for value in values} <= page.cells
    assert {
        "Tasks",
        "Runs",
        "Pairs of runs",
        "Figures",
        "Failed tasks",
        "Costs of measuring",
        "Definitions",
    } <= page.cells
    assert {"Environment", "barrier/test_loss", "torch"} <= page.cells
    assert "largest eigenvalue" not in page.cells  # of what this study measures only
    assert any("ascent (one step is SAM's)" in text for text in page.cells)


def test_texts_are_escaped(study, tmp_path):
    path = report(study, tmp_path / "report.html")
    assert any(NASTY in text for text in Page(path).texts)
    assert "<script" not in path.read_text("utf-8")


def test_a_run_shows_its_visits_figures_and_failures(study, tmp_path):
    (cell, *_) = (o for o in collect(study)["cell"].unique() if (cell_folder(study, o) / "weights.pt").is_file())
    home = cell_folder(study, cell)
    lost = {"kind": "hessian", "step": 6, "epoch": 2, "name": "hessian", "value": None, "status": "failed"}
    extra = home / "lmc" / "hessian.jsonl"
    extra.write_text(json.dumps({**lost, "evidence": {"reason": f"ValueError: {NASTY}"}}) + "\n")
    page = Page(report(home, tmp_path / "run.html"))
    extra.unlink()
    assert {"Visits", "Figures", "Failed and skipped visits", "Configuration", "Environment"} <= page.cells
    assert f"ValueError: {NASTY}" in page.cells
    assert page.sources
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)


def test_pictures_beyond_the_limit_stay_where_they_are(study, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "EMBEDDED_BYTES", 0)
    output = tmp_path / "below" / "report.html"
    output.parent.mkdir()
    page = Page(report(study, output))
    assert page.sources
    assert all((output.parent / source).resolve().is_file() for source in page.sources)


@pytest.fixture
def run_with_surfaces(tmp_path: Path) -> Path:
    """Two visits to a plane, and one to a line."""
    directory = tmp_path / "run" / "lmc"
    directory.mkdir(parents=True)
    (directory / "landscape.jsonl").write_text("")
    marks = (Mark("θ", (0.0, 0.0), 0.0, {"loss": 1.0}),)
    grid, about = torch.tensor([-1.0, 0, 1]).double(), {"labels": ("a", NASTY), "description": NASTY}
    for step in (0, 140):
        plane = Surface(grid, grid, {"loss": 1 + step + torch.outer(grid, grid)}, marks, **about)
        save_arrays(directory, plane.to_arrays(), "landscape/surface", step)
    line = Surface(grid, None, {"loss": grid.square()}, marks, **about)
    save_arrays(directory, line.to_arrays(), "landscape/surface/line", 140)
    return directory.parent


def test_the_last_surface_of_a_run_can_be_turned_without_a_server(run_with_surfaces, tmp_path):
    path = report(run_with_surfaces, tmp_path / "page.html")
    (figure,) = Page(path).reliefs
    heights = np.frombuffer(b64decode(figure["data"][0]["z"]["bdata"]), np.float32)
    np.testing.assert_array_equal(heights, [142, 141, 140, 141, 141, 141, 140, 141, 142])
    assert "step 140" in figure["layout"]["title"]["text"]
    (packed,) = re.findall(r'atob\("(.*?)"\)', path.read_text("utf-8"))
    assert gzip.decompress(b64decode(packed)).decode() == plotly_program()
    assert path.stat().st_size < 3e6


def test_without_plotly_the_page_says_how_its_surfaces_can_be_turned(run_with_surfaces, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "find_spec", lambda name: None)
    page = Page(report(run_with_surfaces, tmp_path / "page.html"))
    assert not page.reliefs
    assert "script" not in page.tags
    assert any("pip install 'lmc-lightning[html]'" in text for text in page.texts)


def test_light_and_dark_are_the_readers_choice(study, tmp_path):
    text = report(study, tmp_path / "report.html").read_text("utf-8")
    assert "color-scheme: light dark" in text
    assert "http" not in text.partition("<body>")[0]  # nothing is fetched


def test_definitions_are_those_of_the_docstrings():
    found = dict(definitions({"hessian", "barrier"}))
    assert found["hessian/trace"].startswith("tr H, with _stderr over probes")
    assert found["barrier/…/instability"].startswith("max_t L(θ(t)) − ½(L_A+L_B)")
    assert not any(key.startswith("sharpness") for key in found)


def test_the_command_tells_where_the_page_is_and_refuses_other_folders(study, tmp_path, capsys):
    output = tmp_path / "page.html"
    assert main(["report", str(study), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--output", str(output)]) == 2
    assert "the folder of a run" in capsys.readouterr().err
