"""Records are kept whatever happens to loggers and disks, and say the same in memory, on disk and in every logger."""

import io
import json
import math
import stat
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers import TensorBoardLogger as RealTensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmc_lightning import HessianSpectrum, Record, Sharpness
from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.core.files import slug
from lmc_lightning.plotting.style import figure_of, new_axes
from lmc_lightning.recording import Measurement, Quantity, Recorder, plain
from lmc_lightning.tables import read_table
from tests.callbacks.runs import Classifier, Rows, TensorBoardLogger, batches, fit


def of(**values: float | None) -> Measurement:
    return Measurement(tuple(Quantity(f"test/{name}", value) for name, value in values.items()))


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    recorder = Recorder("test")
    recorder.directory = tmp_path / "lmc"
    return recorder


def lines(recorder: Recorder) -> list[dict[str, Any]]:
    assert recorder.path is not None
    return read_table(recorder.path)


# -- records -----------------------------------------------------------------------------------------------------------


def test_a_record_holds_value_errors_and_evidence() -> None:
    recorder = Recorder("test")
    quantity = Quantity("test/trace", 3.0, 0.1, 0.2, "loss", {"num_probes": 8}, "not_converged")
    recorder.add(Measurement((quantity,), evidence={"mode": "eval", "num_probes": 1}), step=6, epoch=2)
    evidence = {"mode": "eval", "num_probes": 8, "stderr_data": 0.2}
    assert recorder.records == [Record("test", 6, 2, "test/trace", 3.0, 0.1, "loss", evidence, "not_converged")]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_finite_is_undefined_and_is_not_logged(value: float | None) -> None:
    recorder, logger = Recorder("test"), Rows()
    quantity = Quantity("test/a", value, math.nan, math.nan)
    recorder.add(Measurement((quantity, Quantity("test/b", 1.0, math.inf))), step=0, epoch=0, loggers=[logger])
    assert [(r.value, r.stderr, r.status) for r in recorder.records] == [(None, None, "undefined"), (1.0, None, "ok")]
    assert recorder.records[0].evidence == {"stderr_data": None}
    assert logger.rows == [(0, {"test/b": 1.0})]


def test_measuring_a_step_again_replaces_its_numbers_and_only_these() -> None:
    recorder = Recorder("test")
    recorder.add(of(a=1.0, b=2.0), step=0, epoch=0)
    recorder.add(of(a=3.0), step=5, epoch=1)
    recorder.add(of(a=4.0), step=0, epoch=0)
    assert {(r.step, r.name): r.value for r in recorder.records} == {
        (0, "test/a"): 4.0,
        (0, "test/b"): 2.0,
        (5, "test/a"): 3.0,
    }
    assert len(recorder.records) == 3


def test_failures_of_one_step_are_kept_apart_by_name() -> None:
    recorder = Recorder("test")
    for name in ("test/one", "test/two"):
        recorder.add_failure(f"no {name}", step=3, epoch=1, name=name)
    recorder.add_failure("later", step=6, epoch=2)
    assert [(r.name, r.step, r.evidence["reason"], r.value, r.status) for r in recorder.failures] == [
        ("test/one", 3, "no test/one", None, "failed"),
        ("test/two", 3, "no test/two", None, "failed"),
        ("test", 6, "later", None, "failed"),
    ]
    recorder.add(of(a=1.0), step=3, epoch=1)
    recorder.drop_failures(3)
    assert [r.name for r in recorder.records] == ["test", "test/a"]
    recorder.drop_failures()
    assert [r.name for r in recorder.records] == ["test/a"]


def test_what_lies_beyond_a_step_can_be_forgotten() -> None:
    recorder = Recorder("test")
    for step in (0, 3, 6):
        recorder.add(of(a=step), step=step, epoch=step // 3)
    recorder.drop_after(3)
    assert [r.step for r in recorder.records] == [0, 3]


def test_the_latest_value_of_each_key_survives_a_failed_visit() -> None:
    recorder = Recorder("test")
    recorder.add(of(a=1.0, b=2.0), step=3, epoch=1)
    recorder.add(of(a=5.0, b=None), step=6, epoch=2)
    recorder.add(of(b=0.0), step=0, epoch=0)
    recorder.add_failure("no luck", step=9, epoch=3)
    assert recorder.latest() == {"test/a": 5.0, "test/b": 2.0}


# -- tables ------------------------------------------------------------------------------------------------------------


def test_a_table_has_a_row_for_each_number_or_for_each_step() -> None:
    recorder = Recorder("test")
    recorder.add(of(b=1.0, a=None), step=0, epoch=0)
    recorder.add(of(b=2.0, a=3.0), step=4, epoch=1)
    recorder.add_failure("no luck", step=8, epoch=2)
    table = recorder.to_pandas()
    assert list(table.columns) == list(Record.__dataclass_fields__)
    assert table[["step", "name", "status"]].to_numpy().tolist() == [
        [0, "test/b", "ok"],
        [0, "test/a", "undefined"],
        [4, "test/b", "ok"],
        [4, "test/a", "ok"],
        [8, "test", "failed"],
    ]
    wide = recorder.to_pandas(wide=True)
    assert list(wide.columns) == ["step", "epoch", "test/a", "test/b"]
    assert wide[["step", "epoch", "test/b"]].to_numpy().tolist() == [[0, 0, 1.0], [4, 1, 2.0]]
    assert wide["test/a"].isna().tolist() == [True, False]


def test_tables_of_nothing_and_of_nothing_but_undefined_numbers() -> None:
    recorder = Recorder("test")
    assert (len(recorder.to_pandas()), len(recorder.to_pandas(wide=True))) == (0, 0)
    recorder.add(of(a=None), step=0, epoch=0)
    assert recorder.to_pandas(wide=True)["test/a"].isna().tolist() == [True]


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_holds_a_line_for_each_record(recorder: Recorder) -> None:
    recorder.add(of(a=1.0), step=0, epoch=0)
    recorder.add_failure("θ is\u2028not there", step=3, epoch=1)
    assert lines(recorder) == [asdict(r) for r in recorder.records]
    recorder.add(of(a=2.0), step=0, epoch=0)
    assert [(entry["step"], entry["value"]) for entry in lines(recorder)] == [(3, None), (0, 2.0)]
    assert [p.name for p in recorder.path.parent.iterdir()] == ["test.jsonl"]
    assert stat.S_IMODE(recorder.path.stat().st_mode) & stat.S_IRUSR


SHARED = {"mode": "eval", "probe": {"digest": "abc", "size": 8}, "flag": True}


def test_what_a_visit_shares_is_in_the_file_once_and_every_record_is_read_with_all_of_it(recorder: Recorder) -> None:
    own: list[dict[str, Any]] = [{"residual": 0.1}, {"mode": "train", "flag": 1}, {"residual": None}]
    quantities = tuple(Quantity(f"test/{i}", None if i == 2 else 1.0, evidence=own[i]) for i in range(3))
    for step in (0, 3):
        recorder.add(Measurement(quantities, {**SHARED, "seconds": float(step)}), step=step, epoch=step)
    recorder.add_failure("no luck", step=3, epoch=3)
    recorder.add(Measurement((Quantity("test/0", 1.0),), {"mode": "eval"}), step=6, epoch=6)
    text = recorder.path.read_text()
    assert (text.count("abc"), text.count("seconds")) == (2, 2)
    assert len(text.splitlines()) == len(recorder.records) == 8
    assert lines(recorder) == [asdict(r) for r in recorder.records]
    assert recorder.records[1].evidence == {**SHARED, "seconds": 0.0, **own[1]}
    assert recorder.read(9) == [r for r in recorder.records if r.status != "failed"]
    table = pd.read_json(recorder.path, lines=True)
    assert table["name"].tolist() == [r.name for r in recorder.records]
    assert [shared["seconds"] for shared in table["visit"].dropna() if shared] == [0.0, 3.0]


def test_files_that_repeat_the_evidence_on_every_line_are_read(recorder: Recorder) -> None:
    recorder.add(Measurement(of(a=1.0, b=2.0).quantities, SHARED), step=0, epoch=0)
    recorder.path.write_text("".join(json.dumps(asdict(r)) + "\n" for r in recorder.records))
    assert recorder.read(0) == recorder.records


def test_records_of_the_file_are_read_back_up_to_a_step(recorder: Recorder) -> None:
    recorder.add(of(a=1.0), step=0, epoch=0)
    recorder.add(of(a=2.0), step=6, epoch=2)
    recorder.add_failure("strange\u2028\x85reason", step=3, epoch=1)
    fresh = Recorder("test")
    fresh.earlier_file = str(recorder.path)
    assert fresh.read(3) == [recorder.records[0]]
    fresh.add(of(a=5.0), step=0, epoch=0)
    fresh.add_missing(fresh.read(6))
    assert [(r.step, r.value) for r in fresh.records] == [(0, 5.0), (6, 2.0)]


@pytest.mark.parametrize("content", ["not json\n", '{"kind": "test"}\n', '{"kind": "te'])
def test_a_file_that_cannot_be_read_is_noted_and_never_raised(recorder: Recorder, content: str) -> None:
    recorder.directory.mkdir()
    recorder.path.write_text(content)
    assert recorder.read(9) == []
    assert len(recorder.errors) == 1
    assert recorder.errors[0].startswith(f"Cannot read {recorder.path}")


def test_a_file_that_cannot_be_written_is_noted_and_the_records_are_kept(tmp_path: Path) -> None:
    recorder = Recorder("test")
    (tmp_path / "lmc").write_text("a file where a folder should be")
    recorder.directory = tmp_path / "lmc"
    for step in (0, 3):
        recorder.add(of(a=1.0), step=step, epoch=0)
    assert len(recorder.records) == 2
    assert len(recorder.errors) == 1
    assert recorder.errors[0].startswith("Cannot write test.jsonl: ")


# -- loggers and figures -----------------------------------------------------------------------------------------------


class Broken(Rows):
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise ConnectionError("no network")


def draw() -> Figure:
    axes = new_axes((1, 1))
    axes.plot([0, 1])
    return figure_of(axes)


def cannot_draw() -> Figure:
    raise ValueError("no such colour")


def test_a_broken_logger_and_a_broken_figure_cost_nothing_else(recorder: Recorder) -> None:
    loggers = [Broken(), TensorBoardLogger(), Rows()]
    figures = {"test/bad": cannot_draw, "test/good": draw}
    recorder.add(Measurement(of(a=1.0).quantities, figures=figures), step=3, epoch=1, loggers=loggers)
    assert [logger.rows for logger in loggers[1:]] == [[(3, {"test/a": 1.0})]] * 2
    assert loggers[1].figures == [(3, "test/good")]
    assert [p.name for p in (recorder.directory / "figures").iterdir()] == ["test_good_000003.png"]
    assert recorder.errors == [
        "Cannot show test: ValueError: no such colour",
        "Cannot show test: ConnectionError: no network",
    ]
    assert recorder.records[0].status == "ok"


def test_figures_are_drawn_only_where_they_are_shown_or_kept() -> None:
    recorder = Recorder("test")
    drawn: list[int] = []
    figures = {"test/figure": lambda: drawn.append(1) or draw()}
    measurement = Measurement((), figures=figures, histograms={"test/values": np.arange(3.0)})
    recorder.add(measurement, step=0, epoch=0, loggers=[Rows()])
    assert not drawn
    pictures = TensorBoardLogger()
    recorder.add(measurement, step=0, epoch=0, loggers=[pictures, Rows()])
    assert drawn == [1]
    assert (pictures.histograms, pictures.figures) == ([(0, "test/values")], [(0, "test/figure")])
    assert not recorder.records


def test_reasons_are_warned_of_once() -> None:
    recorder = Recorder("test")
    with pytest.warns(UserWarning, match="^test: at step 3 it failed$"):
        recorder.warn_once("why", "at step 3 it failed")
    recorder.warn_once("why", "at step 6 it failed")  # a second warning would be an error


# -- plain values ------------------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = 1


def test_plain_values_are_of_pythons_own_types() -> None:
    value = {
        1: np.float32(0.5),
        "array": np.arange(3),
        "tensor": torch.ones(2),
        "flag": np.bool_(True),
        "nan": math.nan,
        "nested": {"inf": torch.tensor(math.inf), "tuple": (1, None, "text", Path("a"))},
        "dtype": torch.float32,
        "colour": Colour.RED,
    }
    expected = {
        "1": 0.5,
        "array": [0, 1, 2],
        "tensor": [1.0, 1.0],
        "flag": True,
        "nan": None,
        "nested": {"inf": None, "tuple": [1, None, "text", "a"]},
        "dtype": "torch.float32",
        "colour": "Colour.RED",
    }
    found = plain(value)
    assert found == expected
    assert type(found["flag"]) is bool
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert plain(found) == found


def test_the_state_survives_a_checkpoint_of_weights_only() -> None:
    recorder = Recorder("test")
    evidence = {"shape": torch.Size([2, 3]), "seconds": np.float64(0.1)}
    recorder.add(Measurement(of(a=1.0, b=None).quantities, evidence), step=np.int64(3), epoch=1)
    recorder.add_failure("no luck", step=6, epoch=2)
    buffer = io.BytesIO()
    torch.save([dict(entry, step=int(entry["step"])) for entry in recorder.state()], buffer)
    buffer.seek(0)
    fresh = Recorder("test")
    fresh.load_state({**entry, "of_another_version": 1} for entry in torch.load(buffer, weights_only=True))
    assert fresh.records == recorder.records


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hessian/lambda_max", "hessian_lambda_max"),
        ("epoch=1-step=10.ckpt", "epoch_1-step_10.ckpt"),
        ("/a  b/", "a_b"),
    ],
)
def test_a_slug_is_a_file_name(text: str, name: str) -> None:
    assert slug(text) == name


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_every_logger_has_the_values_of_the_records_at_their_steps(tmp_path: Path) -> None:
    loggers = [RealTensorBoardLogger(tmp_path, name="tb", default_hp_metric=False), CSVLogger(tmp_path, name="csv")]
    ours = Sharpness(num_samples=2, probe_dataloader=batches())
    fit(Classifier(), ours, logger=loggers)
    records = {(r.name, r.step): r.value for r in ours.results}
    assert {step for _, step in records} == {0, 3, 6}
    events = EventAccumulator(loggers[0].log_dir).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("sharpness/")]
    in_tensorboard = {(tag, e.step): e.value for tag in tags for e in events.Scalars(tag)}
    header, *rows = (Path(loggers[1].log_dir) / "metrics.csv").read_text().splitlines()
    table = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    in_csv = {(k, int(row["step"])): float(v) for row in table for k, v in row.items() if "sharpness/" in k and v}
    errors = {(f"{r.name}_stderr", r.step): r.stderr for r in ours.results if r.stderr is not None}
    assert in_csv == records | errors
    bands = {
        (f"sharpness/average/{end}", step): records["sharpness/average", step] + sign * error
        for (_, step), error in errors.items()
        for end, sign in (("low", -2), ("high", 2))
    }
    assert in_tensorboard == {key: pytest.approx(value, rel=1e-5) for key, value in (records | bands).items()}
    in_file = read_table(Path(loggers[0].log_dir) / "lmc" / "sharpness.jsonl")
    assert in_file == [asdict(r) for r in ours.results]
    assert ours.to_pandas(wide=True)["sharpness/worst_case"].tolist() == [
        records["sharpness/worst_case", step] for step in (0, 3, 6)
    ]


def test_without_a_logger_the_records_and_their_file_remain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = Sharpness(num_samples=2, epochs=[1])
    with caplog.at_level("INFO"):
        fit(Classifier(), ours, default_root_dir=tmp_path)
    written = (tmp_path / "lmc" / "sharpness.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in written] == [r.name for r in ours.results]
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("No logger")]
    assert said == [f"No logger: Sharpness writes to {tmp_path / 'lmc'} only."]


class Fails(MeasurementCallback):
    """Its second visit fails."""

    kind = "fails"

    def measure(self, visit: Visit) -> Measurement:
        if visit.epoch == 2:
            raise ValueError("no luck")
        return Measurement((Quantity(self.key("loss"), visit.objective.baseline.loss),))


@pytest.mark.filterwarnings("ignore:fails. at step 6 failed")
def test_exposed_values_can_be_monitored_also_after_a_visit_that_failed(tmp_path: Path) -> None:
    ours = [Sharpness(num_samples=2, expose=True, every_n_epochs=2), Fails(expose=True)]
    others = [
        ModelCheckpoint(tmp_path, filename="{fails/loss:.12f}", monitor="fails/loss", save_top_k=-1),
        EarlyStopping("sharpness/worst_case", mode="min", patience=0, min_delta=100.0, strict=True),
    ]
    trainer = fit(Classifier(), *ours, *others, max_epochs=9, enable_checkpointing=True)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # Lightning holds metrics in float32.
    exposed = {r.name: pytest.approx(r.value, rel=1e-6) for r in ours[0].results if r.step == ours[0].results[-1].step}
    assert {name: value for name, value in metrics.items() if name.startswith("sharpness/")} == exposed
    assert len(ours[1].failures) == 1
    assert trainer.current_epoch == 2  # stopped: the second epoch brought no improvement
    assert len(list(tmp_path.rglob("*.ckpt"))) == 2


def test_two_instances_write_two_files_and_are_told_apart_in_checkpoints(tmp_path: Path) -> None:
    ours = [Sharpness(num_samples=2, epochs=[1], name=n) for n in (None, "wide/radius")]
    fit(Classifier(), *ours, default_root_dir=tmp_path)
    files = {p.name for p in (tmp_path / "lmc").glob("*.jsonl")}
    assert files == {"sharpness.jsonl", "sharpness_wide_radius.jsonl"}
    assert {r.name for r in ours[1].results} == {f"{r.name}/wide/radius" for r in ours[0].results}
    assert len({c.state_key for c in ours}) == 2


@pytest.mark.parametrize("names", [(None, None), ("a", "a"), ("a b", "a/b")])
def test_two_instances_that_would_write_one_file_are_refused(names: tuple[str | None, str | None]) -> None:
    ours = [Sharpness(num_samples=2, epochs=[epoch], name=name) for epoch, name in enumerate(names)]
    with pytest.raises(
        ValueError, match=r"Two callbacks log under 'sharpness/….*Sharpness and Sharpness.*another name="
    ):
        fit(Classifier(), *ours)


def test_spectra_are_kept_as_figures_beside_the_records(tmp_path: Path) -> None:
    ours = HessianSpectrum(num_eigenvalues=1, num_probes=2, num_steps=4, epochs=[1])
    fit(Classifier(), ours, default_root_dir=tmp_path)
    (figure,) = (tmp_path / "lmc" / "figures").iterdir()
    assert figure.name == "hessian_density_000003.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
