"""What a run with all callbacks takes on disk: pictures and records of a visit, whatever the size of the network."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from tests.callbacks.runs import Classifier, fit, loader
from tests.test_contract import MEASURING, make

pytestmark = pytest.mark.filterwarnings("ignore:.*did not converge:UserWarning")

AS_DRAWN = {
    "HessianSpectrum": {"density": True, "blocks": "module", "num_steps": 8},
    "LossSurface": {"num_points": 25},
}
"""Options under which the pictures are as large as by default."""

VISITS, LIMIT = 51, 20e6
"""Of 50 epochs, and what they may take [bytes]."""


def sizes(folder: Path, epochs: int) -> dict[str, int]:
    """Bytes of the event files, and of the callbacks' folder without weights."""
    logger = TensorBoardLogger(folder, name=f"{epochs}", default_hp_metric=False)
    ours = [make(cls, **AS_DRAWN.get(cls.__name__, {})) for cls in MEASURING]
    fit(Classifier(), *ours, val=loader(), max_epochs=epochs, logger=logger)
    found = {p: p.stat().st_size for p in Path(logger.log_dir).rglob("*") if p.is_file()}
    events = sum(size for p, size in found.items() if p.name.startswith("events."))
    files = sum(size for p, size in found.items() if "lmc" in p.parts and p.suffix != ".pt")
    return {"events": events, "files": files}


def test_fifty_epochs_of_all_callbacks_take_less_than_20_megabytes(tmp_path: Path) -> None:
    short, long = sizes(tmp_path, 1), sizes(tmp_path, 2)
    per_visit = {name: long[name] - short[name] for name in long}
    once = {name: short[name] - 2 * per_visit[name] for name in short}
    expected = {name: once[name] + VISITS * per_visit[name] for name in short}
    assert expected["events"] < LIMIT / 2
    assert sum(expected.values()) < LIMIT, expected
