"""One run, shown in several kinds of loggers at once, and what each has of it in the end."""

import io
import json
import math
import re
import sqlite3
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import pytorch_lightning
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from lmc_lightning import HessianSpectrum, Sharpness
from lmc_lightning.loggers import (
    Band,
    Chart,
    Embedding,
    Mesh,
    log_embedding,
    log_histogram,
    log_layout,
    log_mesh,
    log_picture,
    log_scalars,
    log_text,
    png,
    shows_pictures,
)
from lmc_lightning.loggers.tensorboard import symlog
from lmc_lightning.recording import Measurement, Quantity
from tests.callbacks.runs import Classifier, Rows, batches, fit

PICTURE = np.random.default_rng(0).integers(0, 2, (30, 40, 1), dtype=np.uint8).repeat(3, axis=2) * 255


def measuring(**options: Any) -> list[Any]:
    options = {"epochs": [0, 2], "probe_dataloader": batches(), "on_error": "raise", **options}
    return [HessianSpectrum(num_eigenvalues=1, num_probes=2, num_steps=4, **options), Sharpness(["average"], **options)]


# -- loggers of users --------------------------------------------------------------------------------------------------


class Own(Rows):
    """A logger of a kind that nobody has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []


@pytest.fixture
def registered() -> None:
    """Cases of a user; ``singledispatch`` has no way to take them back, so that they are of a class of this test."""
    functions = {
        log_histogram: lambda logger, key, values, step: logger.seen.append((key, values.shape)),
        log_picture: lambda logger, key, picture, step: logger.seen.append((key, picture.shape)),
        log_text: lambda logger, key, text, step: logger.seen.append((key, text)),
        log_layout: lambda logger, layout: logger.seen.append(("layout", layout)),
        log_scalars: lambda logger, scalars, step: logger.log_metrics({"count": len(scalars.values)}, step),
    }
    for function, case in functions.items():
        function.register(Own, case)


def test_a_logger_of_ones_own_gets_what_it_has_cases_for(registered: None) -> None:
    class Derived(Own):
        pass

    logger, plain = Derived(), Rows()
    assert shows_pictures(logger)
    assert not shows_pictures(plain)
    fit(Classifier(), *measuring(), logger=[logger, plain])
    keys = [key for key, _ in logger.seen]
    assert keys[0] == "layout"
    assert keys[-1] == "report/measured"
    assert keys.count("hessian/density") == keys.count("hessian/ritz_values") == 2
    assert dict(logger.seen)["hessian/density"] == (400, 600, 3)
    assert "count" in dict(logger.rows)[6]
    # Without a case: the numbers with their errors, and no ends of bands.
    logged = {key for keys in plain.by_step("sharpness").values() for key in keys}
    assert logged == {"sharpness/average", "sharpness/average_stderr"}


def test_a_logger_without_cases_takes_anything_in_silence() -> None:
    mesh = Mesh(np.zeros((3, 3)), np.array([[0, 1, 2]]), np.zeros((3, 3), dtype=np.uint8))
    logger = Rows()
    log_histogram(logger, "a", np.zeros(3), 0)
    log_picture(logger, "a", PICTURE, 0)
    log_mesh(logger, "a", mesh, 0)
    log_embedding(logger, "a", Embedding(np.zeros((2, 3)), ["step"], [[0], [1]]), 0)
    log_text(logger, "a", "text", 0)
    log_layout(logger, {"a": [Chart("t", ("a",))]})
    assert not logger.rows


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_a_band_is_two_standard_errors_over_probes_and_examples_together() -> None:
    quantities = (
        Quantity("a/both", 1.0, stderr=0.3, stderr_data=0.4),
        Quantity("a/none", 2.0),
        Quantity("a/other", 3.0, stderr=0.1),
        Quantity("a/hidden", 3.0, stderr=0.1, log="none"),
        Quantity("a/nan", math.nan, stderr=0.1),
    )
    scalars = Measurement(quantities).scalars({"a/both", "a/none", "a/hidden", "a/nan"})
    assert scalars.bands == {"a/both": (0.0, 2.0), "a/none": (2.0, 2.0)}
    assert scalars.values == {"a/both": 1.0, "a/none": 2.0, "a/other": 3.0}
    assert scalars.errors.keys() >= {"a/both_stderr", "a/both_stderr_data", "a/other_stderr"}
    assert "a/hidden_stderr" not in scalars.errors


def test_symlog_is_odd_linear_near_zero_and_logarithmic_beyond() -> None:
    x = np.array([-1000.0, -1.0, 0.0, 0.001, 1.0, 9.0, 99.0, 1000.0])
    y = symlog(x)
    np.testing.assert_allclose(y[[0, 1, 2]], [-math.log10(1001), -math.log10(2), 0])
    assert y[3] == pytest.approx(0.001 / math.log(10), rel=1e-3)
    np.testing.assert_allclose(y[4:], np.log10([2, 10, 100, 1001]))
    assert not symlog(np.zeros(3)).any()


# -- pictures ----------------------------------------------------------------------------------------------------------


RED = (214, 40, 40)


def test_few_colours_are_kept_exactly_in_a_palette_and_photographs_in_full() -> None:
    few, photograph = PICTURE, np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for picture, mode in ((few, "P"), (photograph, "RGB")):
        with Image.open(io.BytesIO(png(picture))) as image:
            assert image.mode == mode
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), picture)


def test_a_palette_keeps_neighbouring_areas_apart_and_a_small_mark_in_its_colour() -> None:
    areas = mpl.colormaps["viridis"](np.linspace(0, 1, 20), bytes=True)[:, :3]
    picture = np.repeat(np.repeat(areas[None], 200, axis=0), 15, axis=1)
    picture[100:104, 150:154] = RED
    shades = np.linspace(0, 1, 200)[:, None, None]
    picture[:, :20] = np.round(shades * picture[:, :20] + (1 - shades) * 255)  # mixed, as edges are, in many colours
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 256
    with Image.open(io.BytesIO(png(picture))) as image:
        found, mode = np.asarray(image.convert("RGB")).astype(int), image.mode
    assert mode == "P"
    assert np.abs(found[102, 152] - RED).max() <= 8
    assert len({tuple(found[0, 15 * i + 8]) for i in range(2, 20)}) == 18
    assert np.abs(found - picture).max() <= 64


# -- the documentation -------------------------------------------------------------------------------------------------


def test_the_documented_logger_and_callback_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    document = (Path(__file__).parents[1] / "docs" / "loggers.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL):
        exec(block, names)
    tensorboard = TensorBoardLogger(tmp_path, default_hp_metric=False)
    own = names["WeightNorm"](on_error="raise", probe_dataloader=batches())
    fit(Classifier(), own, measuring()[0], logger=[names["Journal"](), tensorboard])
    said = capsys.readouterr().out
    assert "hessian/density at step 6: 600 × 400 pixels" in said
    assert "| `norm/l2` |" in said
    tags = EventAccumulator(tensorboard.log_dir).Reload().Tags()["scalars"]
    assert {"norm/l2", "norm/l2/low", "norm/l2/high"} <= set(tags)


# -- Lightning's own ---------------------------------------------------------------------------------------------------


def check_tensorboard(folder: Path) -> None:
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert [e.step for e in events.Images("hessian/density")] == [0, 6]
    assert {"sharpness/average/low", "sharpness/average/high"} <= set(events.Tags()["scalars"])
    assert not [tag for tag in events.Tags()["scalars"] if "_stderr" in tag]
    assert set(events.Tags()["histograms"]) == {"hessian/ritz_values", "hessian/ritz_values_symlog"}


def check_folder(logger: Any) -> None:
    media = {p.name for p in (Path(logger.log_dir) / "media").iterdir()}
    of_visits = {f"hessian_{what}_00000{step}.{end}" for what, end in MEDIA for step in (0, 6)}
    assert media == of_visits | {"report_measured_000006.md"}
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert {"sharpness/average", "sharpness/average_stderr"} <= set(header.split(","))
    assert "/low" not in header


MEDIA = [("density", "png"), ("ritz_values", "npy")]


@pytest.mark.parametrize("root", ["lightning", "pytorch_lightning"])
def test_a_folder_of_csv_files_has_pictures_arrays_and_the_report(tmp_path: Path, root: str) -> None:
    csv = CSVLogger if root == "lightning" else pytorch_lightning.loggers.CSVLogger
    tensorboard = TensorBoardLogger if root == "lightning" else pytorch_lightning.loggers.TensorBoardLogger
    loggers = [tensorboard(tmp_path, name="tb", default_hp_metric=False), csv(tmp_path, name="csv")]
    fit(Classifier(), *measuring(), logger=loggers)
    check_tensorboard(Path(loggers[0].log_dir))
    check_folder(loggers[1])


def test_a_folder_in_which_the_callbacks_write_gets_nothing_twice(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(Classifier(), *measuring(), logger=logger)
    folder = Path(logger.log_dir)
    assert not (folder / "media").exists()
    assert (folder / "lmc" / "figures" / "hessian_density_000006.png").is_file()
    assert (folder / "lmc" / "arrays" / "hessian_ritz_values_000006.npz").is_file()
    assert (folder / "lmc" / "report.md").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb", "ignore::DeprecationWarning:mlflow")
def test_four_loggers_at_once_show_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    database, artifacts = tmp_path / "mlflow.db", tmp_path / "artifacts"
    loggers: list[Any] = [
        TensorBoardLogger(tmp_path, name="tb", default_hp_metric=False),
        CSVLogger(tmp_path, name="csv"),
        WandbLogger(project="test", save_dir=tmp_path, offline=True),
        MLFlowLogger("test", tracking_uri=f"sqlite:///{database}", artifact_location=artifacts.as_uri()),
    ]
    ours = measuring()
    fit(Classifier(), *ours, logger=loggers)
    mesh = Mesh(np.zeros((3, 3)), np.array([[0, 1, 2]]), np.zeros((3, 3), dtype=np.uint8))
    log_mesh(loggers[2], "landscape/mesh", mesh, 6)
    log_embedding(loggers[2], "trajectory", Embedding(np.zeros((2, 3)), ["step"], [[0], [1]]), 6)
    assert not [error for callback in ours for error in callback._recorder.errors]
    check_tensorboard(Path(loggers[0].log_dir))
    check_folder(loggers[1])
    logged = set(loggers[2].experiment.summary.keys())
    assert {"hessian/lambda_max", "hessian/density", "hessian/ritz_values", "report/measured"} <= logged
    assert {"landscape/mesh", "trajectory"} <= logged
    loggers[2].experiment.finish()
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select key, step, value from metrics").fetchall()
    values = {(r.name, r.step): r.value for r in ours[1].results}
    assert {(k, s): v for k, s, v in rows if k == "sharpness/average"} == pytest.approx(values)
    media = {p.name for p in artifacts.rglob("*") if p.is_file()}
    ends = {"npy": "json"}
    assert {f"hessian_{what}_000006.{ends.get(end, end)}" for what, end in MEDIA} <= media
    assert "report_measured_000006.md" in media
    (found,) = artifacts.rglob("hessian_ritz_values_000006.json")
    assert json.loads(found.read_text())["values"]


# -- charts ------------------------------------------------------------------------------------------------------------


def test_two_instances_share_a_heading_and_have_charts_of_their_own(registered: None) -> None:
    logger = Own()
    ours = [*measuring(epochs=[2]), Sharpness(["average"], name="(late)", epochs=[2])]
    fit(Classifier(), *ours, logger=logger)
    (layout,) = [what for key, what in logger.seen if key == "layout"][-1:]
    assert set(layout) == {"hessian", "sharpness"}
    bands = [chart for chart in layout["sharpness"] if isinstance(chart, Band)]
    assert [band.key for band in bands] == ["sharpness/average", "sharpness/average/(late)"]
    assert len({chart.title for chart in layout["sharpness"]}) == len(layout["sharpness"]) == 4


# -- hyper-parameters --------------------------------------------------------------------------------------------------


class Settings(Classifier):
    """A module that saves its hyper-parameters."""

    def __init__(self, lr: float = 0.2, network: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def sessions(folder: Path) -> list[tuple[str, Any]]:
    """Tag and content of what the hparams plugin is told, in the order in which it is written."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    values = [v for file in files for event in EventFileLoader(str(file)).Load() for v in event.summary.value]
    return [(v.tag, v.metadata.plugin_data.content) for v in values if v.metadata.plugin_data.plugin_name == "hparams"]


def test_a_single_run_has_its_hyper_parameters_beside_its_main_numbers(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    fit(Settings(network={"width": 3, "act": None}), *measuring(), logger=logger)
    (experiment, start, end) = sessions(Path(logger.log_dir))
    assert [tag for tag, _ in (experiment, start, end)] == [
        EXPERIMENT_TAG,
        SESSION_START_INFO_TAG,
        SESSION_END_INFO_TAG,
    ]
    known = parse_session_start_info_plugin_data(start[1]).hparams
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in known.items()}
    assert values == {"lr": 0.2, "network/width": 3, "network/act": "None"}
    shown = [info.name.tag for info in parse_experiment_plugin_data(experiment[1]).metric_infos]
    assert shown == ["train_loss", "hessian/lambda_max", "hessian/trace", "hessian/stability"]
    events = EventAccumulator(logger.log_dir).Reload()
    assert set(shown) <= set(events.Tags()["scalars"])
    assert "hp_metric" not in events.Tags()["scalars"]


def test_hyper_parameters_that_lightning_has_written_are_not_written_again(tmp_path: Path) -> None:
    for name, module in (("saved", Settings()), ("none", Classifier())):
        logger = TensorBoardLogger(tmp_path, name=name)
        fit(module, measuring()[1], logger=logger)
        found = [tag for tag, _ in sessions(Path(logger.log_dir))]
        assert found == ([EXPERIMENT_TAG, SESSION_START_INFO_TAG, SESSION_END_INFO_TAG] if name == "saved" else [])


def test_a_run_in_the_folder_of_another_replaces_its_hyper_parameters(tmp_path: Path) -> None:
    for lr in (0.1, 0.3):
        logger = TensorBoardLogger(tmp_path, version=0, default_hp_metric=False)
        fit(Settings(lr), measuring()[1], logger=logger)
    (_, start, _) = sessions(Path(logger.log_dir))
    assert parse_session_start_info_plugin_data(start[1]).hparams["lr"].number_value == 0.3
