"""However a run ends while it measures: no earlier result is lost, no file is half written, a resumed run goes on."""

import errno
import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lmc_lightning import HessianSpectrum, Sharpness
from lmc_lightning.core import files
from tests.scripts import deaths
from tests.scripts.deaths import Slow, fit
from tests.scripts.processes import start
from tests.zoo.fingerprint import global_random_state, sha256

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:More than half of the captured train probe examples:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
]


def table(root: Path) -> list[dict[str, Any]]:
    """The records on disk, without what depends on the machine."""
    (path,) = root.rglob("slow.jsonl")
    assert not list(path.parent.glob(".*")), "a temporary file was left"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {**row, "evidence": {k: v for k, v in row["evidence"].items() if k not in ("seconds", "peak_bytes")}}
        for row in rows
    ]


def steps(rows: list[dict[str, Any]], status: str = "ok") -> list[int]:
    return [row["step"] for row in rows if row["status"] == status]


DEATHS = [
    (signal.SIGTERM, 0, False),  # Lightning ends a terminated run with SystemExit
    (signal.SIGINT, 1, False),
    (signal.SIGKILL, -signal.SIGKILL, False),
    (signal.SIGKILL, -signal.SIGKILL, True),
]


@pytest.mark.parametrize(("signum", "exit_code", "validates"), DEATHS)
def test_a_killed_run_keeps_its_results_and_a_resumed_one_makes_the_visit_again(
    signum: signal.Signals, exit_code: int, validates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"validates": validates, "checkpoints": {}}
    child = start(deaths.lingering, "run", 8, {}, options, folder=tmp_path)
    child.wait_for(tmp_path / deaths.SIGN)
    signalled = child.send(signum)
    assert child.exit_code() == exit_code
    assert time.monotonic() - signalled < 20  # and not the minutes that the visit would have taken
    assert steps(table(tmp_path / "run")) == [0, 4]
    interrupted = [8] if signum == signal.SIGTERM else []
    assert steps(table(tmp_path / "run"), "failed") == interrupted

    fit("run", [Slow()], resumes=True, **options)
    fit("whole", [Slow()], **options)
    assert table(Path("run")) == table(Path("whole"))
    assert steps(table(Path("run"))) == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_the_last_visit_of_a_run_that_was_killed_in_it_is_made_when_the_run_resumes_at_its_end(
    signum: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"checkpoints": {}}
    child = start(deaths.lingering, "run", 16, {}, options, folder=tmp_path)
    child.wait_for(tmp_path / deaths.SIGN)
    child.send(signum)
    child.exit_code()
    assert steps(table(tmp_path / "run")) == [0, 4, 8, 12]

    fit("run", [Slow()], resumes=True, **options)
    fit("whole", [Slow()], **options)
    assert table(Path("run")) == table(Path("whole"))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_visit_that_the_checkpoint_of_its_own_step_left_open_is_made_when_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGTERM the visit is abandoned, and Lightning saves a checkpoint of the very step."""
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"checkpoints": {"every_n_train_steps": 1}}
    child = start(deaths.lingering, "run", 6, {"every_n_train_steps": 3}, options, folder=tmp_path)
    child.wait_for(tmp_path / deaths.SIGN)
    child.send(signal.SIGTERM)
    assert child.exit_code() == 0
    (saved,) = (s for key, s in torch.load("run/checkpoints/last.ckpt")["callbacks"].items() if key.startswith("Slow"))
    assert (saved["step"], saved["open"]) == (6, [[6, 1]])
    fit("run", [Slow(every_n_train_steps=3)], resumes=True, **options)
    fit("whole", [Slow(every_n_train_steps=3)], **options)
    assert table(Path("run"))[:3] == table(Path("whole"))[:3]
    assert steps(table(Path("run"))) == [0, 3, 6, 9, 12, 15]


@contextmanager
def alarms(handler: Any, seconds: float) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class AtVisit(pl.Callback):
    """Raises alarms while an epoch's visit is made, in whose handler the state of the run is looked at and saved."""

    def __init__(self) -> None:
        self.true, self.seen = "", []  # type: ignore[var-annotated]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.true = sha256([pl_module.state_dict(), trainer.optimizers[0].state_dict()])
            self.context = alarms(lambda *_: self.look(trainer), 0.02)
            self.context.__enter__()

    def look(self, trainer: Any) -> None:
        if deaths.SIGN.exists():
            state = trainer.strategy.lightning_module_state_dict()
            self.seen.append(sha256([state, trainer.optimizers[0].state_dict()]))
            if len(self.seen) == 5:
                trainer.save_checkpoint("run/checkpoints/last.ckpt")

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            self.context.__exit__(None, None, None)


def test_a_checkpoint_that_a_signal_handler_saves_during_a_visit_has_the_true_weights() -> None:
    at_visit = AtVisit()
    fit("run", [at_visit, Slow(8, times=400)], max_epochs=3)
    assert len(at_visit.seen) > 10
    assert set(at_visit.seen) == {at_visit.true}
    fit("whole", [Slow()])
    fit("run", [Slow()], resumes=True)
    assert table(Path("run")) == table(Path("whole"))


def fingerprint(trainer: pl.Trainer) -> str:
    module = trainer.lightning_module
    return sha256([module.state_dict(), trainer.optimizers[0].state_dict(), global_random_state()])


@pytest.mark.filterwarnings("ignore:hessian:UserWarning")
def test_a_visit_at_nan_is_undefined_and_training_goes_on() -> None:
    """With a learning rate at which the weights overflow after some steps."""
    ours = [Sharpness(num_samples=2, num_examples=20), HessianSpectrum(num_probes=0, num_examples=20)]
    runs = [fit("run", callbacks, make_module=lambda: deaths.Net(1e38, 0.2)) for callbacks in ([], ours)]
    assert runs[0].lightning_module.net[0].weight.isnan().any()
    assert fingerprint(runs[0]) == fingerprint(runs[1])
    late = [r for callback in ours for r in callback.results if r.step > 0]
    assert {r.step for r in late} == {4, 8, 12, 16}
    assert {r.value for r in late} == {None}
    assert {r.status for r in late if r.kind == "sharpness"} == {"undefined"}
    assert all("finite" in r.evidence["reason"] for r in late if r.status == "failed")
    for path in Path("run").rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_on_a_full_disk_the_earlier_table_stays_and_all_is_kept_in_memory(tmp_path: Path) -> None:
    found = start(deaths.full_disk, "run", 2, folder=tmp_path).result()
    assert steps([json.loads(line) for line in found["kept"].splitlines()]) == [0, 4, 8]
    assert steps(table(tmp_path / "run")) == [0, 4, 8]
    assert (tmp_path / "run" / "lmc" / "slow.jsonl").read_bytes() == found["kept"]
    assert found["steps"] == found["state"] == [0, 4, 8, 12, 16]
    assert found["warnings"] == ["slow: Cannot write slow.jsonl: [Errno 27] File too large"]


def test_a_disk_without_any_room_stops_no_run(tmp_path: Path) -> None:
    """Not even where the captured probe set is to be written, which happens inside the user's step."""
    found = start(deaths.full_disk, "run", 0, folder=tmp_path).result()
    assert found["steps"] == found["state"] == [0, 4, 8, 12, 16]
    assert [w.split(": ")[1] for w in found["warnings"]] == [
        "Cannot write slow.jsonl",
        "The probe set cannot be kept for a resumed run",
    ]
    # The report comes when the run is over, and with it the limit.
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["report.md"]


def test_figures_need_no_room_on_the_disk_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    ours = HessianSpectrum(num_examples=20, num_probes=2, num_steps=2)
    with pytest.warns(UserWarning, match="hessian: ") as caught:
        fit("run", [ours], max_epochs=2)
    errors = sorted({str(w.message) for w in caught if "No space left" in str(w.message)})
    assert [e.split(": [")[0] for e in errors] == [
        "hessian: Cannot write hessian.jsonl",
        "hessian: Cannot write hessian_density",
        "hessian: Cannot write hessian_ritz_values",
        "hessian: The probe set cannot be kept for a resumed run: OSError",
    ]
    assert {r.step for r in ours.results} == {0, 4, 8}
    assert not ours.failures
    assert not [path for path in Path("run").rglob("*") if path.is_file() and "lmc" in path.parts]


def test_a_file_is_never_seen_half_written(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 2_000_000
    child = start(deaths.rewriting, path, size, folder=tmp_path)
    child.wait_for(tmp_path / deaths.SIGN)
    for _ in range(20):
        assert path.read_bytes() in (b"a" * size, b"b" * size)
    child.send(signal.SIGKILL)
    assert child.exit_code() == -signal.SIGKILL
    assert path.read_bytes() in (b"a" * size, b"b" * size)


@dataclass
class Trigger:
    """How many evaluations there are before an error; kept where no measurement puts it back."""

    countdown: int = 0
    error: type[BaseException] = ValueError


TRIGGER = Trigger()


class Failing(deaths.Net):
    """Raises when it is run by a measurement, at the evaluation that the trigger says."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if TRIGGER.countdown and not isinstance(self.trainer, pl.Trainer):
            TRIGGER.countdown -= 1
            if not TRIGGER.countdown:
                raise TRIGGER.error("shot")
        return loss


class Loads(pl.Callback):
    """Says at which evaluation of each visit there is to be an error, and looks at the run before it."""

    def __init__(self, countdowns: dict[int, int], error: type[BaseException]) -> None:
        self.countdowns, self.before = countdowns, ""
        TRIGGER.error = error

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        TRIGGER.countdown = self.countdowns.get(trainer.current_epoch + 1, 0)
        self.before = fingerprint(trainer)


COUNTDOWNS = {1: 1, 2: 5, 3: 9}
"""Among the batches that are looked at first, in the baseline pass and the gradient, among the losses nearby."""


@pytest.mark.filterwarnings("ignore:sharpness.* failed and training goes on:UserWarning")
def test_an_exception_at_any_depth_is_recorded_and_training_is_the_same() -> None:
    ours = Sharpness(num_examples=20, every_n_epochs=1)
    make_module = lambda: Failing(dropout=0.2)  # noqa: E731
    runs = [fit("run", c, make_module=make_module) for c in ([], [Loads(COUNTDOWNS, ValueError), ours])]
    assert fingerprint(runs[0]) == fingerprint(runs[1])
    assert [(r.step, r.evidence["reason"]) for r in ours.failures] == [(s, "ValueError: shot") for s in (4, 8, 12)]
    assert {r.step for r in ours.results if r.status == "ok"} >= {0, 16}


class Shot(BaseException):
    """What is no ``Exception``, like ``SystemExit``."""


@pytest.mark.parametrize("countdown", COUNTDOWNS.values())
def test_what_is_no_exception_ends_the_run_as_it_was(countdown: int) -> None:
    loads = Loads({2: countdown}, Shot)
    ours = Sharpness(num_examples=20)
    seen: list[str] = []

    class Last(pl.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            seen.append(fingerprint(trainer))

    with pytest.raises(Shot, match="shot"):
        fit("run", [loads, ours, Last()], make_module=lambda: Failing(dropout=0.2))
    assert seen == [loads.before]


@pytest.mark.parametrize("table_is_there", [True, False])
def test_a_visit_that_died_waiting_is_said_to_be_lost(table_is_there: bool) -> None:
    """The start waits for 30 examples; a checkpoint after 20 knows nothing of what came of it."""
    options: dict[str, Any] = {"checkpoints": {"every_n_train_steps": 2, "save_top_k": -1}}
    fit("run", [Slow(num_examples=30)], max_epochs=1, **options)
    next(Path("run/checkpoints").glob("*step=2*")).replace("run/checkpoints/last.ckpt")
    if not table_is_there:
        shutil.rmtree("run/version_0")
    lost = "at step 0 failed and training goes on: The run was interrupted before this visit"
    with nullcontext() if table_is_there else pytest.warns(UserWarning, match=lost):
        fit("run", [Slow(num_examples=30)], max_epochs=2, resumes=True, **options)
    assert steps(table(Path("run"))) == ([0, 4, 8] if table_is_there else [4, 8])
    assert steps(table(Path("run")), "failed") == ([] if table_is_there else [0])


def test_results_on_disk_outlive_a_checkpoint_without_them() -> None:
    """The run is resumed with another schedule, so that Lightning finds no state for the callback."""
    fit("run", [Slow(every_n_epochs=1)], max_epochs=2, checkpoints={})
    with pytest.warns(
        UserWarning, match="callbacks used to create the checkpoint|Be aware that when using `ckpt_path`"
    ):
        fit("run", [Slow(epochs=[3, 4])], resumes=True, checkpoints={})
    assert steps(table(Path("run"))) == [0, 4, 8, 12, 16]


def test_records_follow_a_resumed_run_into_its_new_folder() -> None:
    """Each version of a logger has a table of its own, and the last one is complete."""
    for resumes in (False, True):
        logger = CSVLogger("run", name="", version=int(resumes))
        fit("run", [Slow()], max_epochs=4 if resumes else 2, resumes=resumes, checkpoints={}, logger=logger)
    assert steps(table(Path("run/version_0"))) == [0, 4, 8]
    assert steps(table(Path("run/version_1"))) == [0, 4, 8, 12, 16]
    digests = {row["evidence"]["probe_digest"] for row in table(Path("run/version_1"))}
    assert len(digests) == 1
    assert Path("run/version_0/lmc/probes.pt").read_bytes() == Path("run/version_1/lmc/probes.pt").read_bytes()
