"""What every test of branching starts with."""

from pathlib import Path

import pytest

from tests.branching.runs import Fingerprint, Steps


@pytest.fixture(autouse=True)
def _anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Families are written below ``tmp_path``, and no other test's fingerprints are there."""
    monkeypatch.chdir(tmp_path)
    Steps.runs.clear()
    Fingerprint.runs.clear()
