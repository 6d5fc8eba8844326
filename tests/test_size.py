"""What a run with all callbacks takes on disk: pictures and records of a visit, whatever the size of the network."""

from collections import Counter
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from tests.callbacks.runs import Classifier, fit, loader
from tests.test_contract import MEASURING, make

pytestmark = pytest.mark.filterwarnings("ignore:.*did not converge:UserWarning")

AS_DRAWN = {
    "HessianSpectrum": {"density": True, "blocks": "module", "num_steps": 8},
    "LossSurface": {"num_points": 25},
}
"""Options under which the pictures are as large as by default."""

VISITS, LIMIT = 51, 14e6
"""Of 50 epochs, and what they may take [bytes]: benchmarks/log_size.py has a larger network and longer chains."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folder of a run of one and of a run of two epochs."""
    found = {}
    for epochs in (1, 2):
        logger = TensorBoardLogger(tmp_path_factory.mktemp("run"), name=f"{epochs}", default_hp_metric=False)
        ours = [make(cls, **AS_DRAWN.get(cls.__name__, {})) for cls in MEASURING]
        fit(Classifier(), *ours, val=loader(), max_epochs=epochs, logger=logger)
        found[epochs] = Path(logger.log_dir)
    return found


def sizes(folder: Path) -> dict[str, int]:
    """Bytes by kind of file, without weights."""
    found: Counter[str] = Counter()
    for path in (p for p in folder.rglob("*") if p.is_file()):
        if path.name.startswith("events."):
            found["events"] += path.stat().st_size
        elif "lmc" in path.parts and path.suffix != ".pt":
            found[path.suffix] += path.stat().st_size
    return found


def test_fifty_epochs_of_all_callbacks_take_few_megabytes(runs: dict[int, Path]) -> None:
    short, long = sizes(runs[1]), sizes(runs[2])
    per_visit = {name: long[name] - short[name] for name in long}
    expected = {name: short[name] + (VISITS - 2) * per_visit[name] for name in long}
    assert per_visit[".jsonl"] < 45e3, per_visit
    assert expected["events"] < LIMIT / 2, expected
    assert sum(expected.values()) < LIMIT, expected


def test_nothing_is_logged_twice(runs: dict[int, Path]) -> None:
    kinds = tuple(cls.kind for cls in MEASURING)
    events = [e for path in runs[2].glob("events.*") for e in EventFileLoader(str(path)).Load()]
    logged = Counter((value.tag, e.step) for e in events for value in e.summary.value if value.tag.startswith(kinds))
    assert len(logged) > 200
    assert [entry for entry, count in logged.items() if count > 1] == []


@pytest.mark.parametrize("kind", ["hessian", "landscape", "sharpness", "volume", "llc", "trajectory"])
def test_the_evidence_of_a_visit_is_stored_once(runs: dict[int, Path], kind: str) -> None:
    text = (runs[2] / "lmc" / f"{kind}.jsonl").read_text()
    assert len(text.splitlines()) >= 6
    assert (text.count('"seconds"'), text.count('"probe_digest"')) == (3, 3)
