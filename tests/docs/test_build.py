"""The documentation builds without a warning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


def build(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", *options, str(ROOT / "docs"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)


def test_all_pages_are_understood_and_all_references_lead_somewhere(tmp_path: Path) -> None:
    done = build(tmp_path / "html", "-b", "dummy", "-D", "nb_execution_mode=off")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_site_is_built_and_its_notebooks_run(tmp_path: Path) -> None:
    done = build(tmp_path / "html", "-b", "html")
    assert done.returncode == 0, done.stderr
    assert "lambda_max" in (tmp_path / "html" / "tutorial.html").read_text()
