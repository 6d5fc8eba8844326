"""A run read back through TensorBoard's own server has every point that was measured, and the pictures."""

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lmc_lightning import CheckpointBranching, HessianSpectrum, InterpolationBarrier, Record, Sharpness
from tests.callbacks.runs import Classifier, batches, fit

BANDS = ("hessian/lambda_max", "hessian/trace", "sharpness/average")
"""What is shown with its error."""

PATIENCE = 60.0
"""For the server to start, and to have read everything [s]."""

LOCAL = build_opener(ProxyHandler({}))


@dataclass
class Server:
    """TensorBoard, as `tensorboard --logdir` starts it."""

    address: str

    def get(self, route: str, **parameters: Any) -> Any:
        with LOCAL.open(f"{self.address}data/{route}?{urlencode(parameters)}", timeout=PATIENCE) as answer:
            return json.load(answer)

    def scalars(self, tag: str, run: str = ".") -> list[tuple[int, float]]:
        """Step and value of each point, in the order in which they are drawn."""
        points = self.get("plugin/scalars/scalars", tag=tag, run=run)
        return [(step, value) for _, step, value in points]

    def tags(self, plugin: str, run: str = ".") -> set[str]:
        return set(self.get(f"plugin/{plugin}/tags").get(run, {}))


@dataclass
class Measured:
    """A run of three epochs and what its callbacks have recorded."""

    log_dir: Path
    callbacks: list[Any]

    @property
    def records(self) -> list[Record]:
        return [r for c in self.callbacks for r in getattr(c, "results", [])]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    logger = TensorBoardLogger(tmp_path_factory.mktemp("logs"), name="run", default_hp_metric=False)
    # The probe set is complete after an epoch only, so that the first visits are deferred.
    callbacks = [
        HessianSpectrum(num_eigenvalues=2, num_probes=2, num_steps=4, on_error="raise"),
        Sharpness(num_samples=2, every_n_train_steps=2, probe_dataloader=batches(), on_error="raise"),
        CheckpointBranching(epochs=(0, 1)),
        InterpolationBarrier(num_points=3, epochs=[2, 3], on_error="raise"),
    ]
    fit(Classifier(), *callbacks, max_epochs=3, logger=logger)
    return Measured(Path(logger.log_dir), callbacks)


@pytest.fixture(scope="module")
def server(measured: Measured) -> Iterator[Server]:
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(measured.log_dir)]
    log = measured.log_dir / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", "0"], stdout=output, stderr=output)
    try:
        yield _when_ready(process, log, sorted({r.name for r in measured.records})[0])
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)


def _when_ready(process: subprocess.Popen[bytes], log: Path, tag: str) -> Server:
    """The server, once it has read all of the run: its last word is the report."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        address = re.search(r"http://\S+?/(?=\s)", log.read_text())
        if address is not None:
            found = Server(address[0])
            try:
                if "report/measured/text_summary" in found.tags("text") and tag in found.tags("scalars"):
                    return found
            except URLError:
                pass
        time.sleep(0.1)
    raise AssertionError(f"TensorBoard does not show the run: {log.read_text()}")


def test_every_number_is_there_at_its_step_and_no_point_is_dropped(server: Server, measured: Measured) -> None:
    expected: dict[str, dict[int, float]] = {}
    for r in (r for r in measured.records if r.log != "none"):
        half = 2 * math.hypot(r.stderr or 0, r.evidence.get("stderr_data") or 0)
        ends = {f"{r.name}/low": r.value - half, f"{r.name}/high": r.value + half} if r.name in BANDS else {}
        for key, value in ({r.name: r.value} | ends).items():
            expected.setdefault(key, {})[r.step] = value
    families = ("hessian/", "sharpness/", "barrier/")
    assert {tag for tag in server.tags("scalars") if tag.startswith(families)} == expected.keys()
    for key, values in expected.items():
        points = server.scalars(key)
        steps = [step for step, _ in points]
        assert steps == sorted(values), key
        assert dict(points) == {step: pytest.approx(value, rel=1e-5) for step, value in values.items()}
    assert sorted(expected["hessian/lambda_max"]) == [0, 3, 6, 9]
    assert sorted(expected["sharpness/worst_case"]) == [0, 2, 4, 6, 8]
    assert sorted(expected["barrier/train_loss/k1_001"]) == [3, 6, 9]


def test_pictures_are_there(server: Server) -> None:
    metrics = ["train_loss", "train_error"]
    curves = {f"barrier_curves/{metric}/k1_00{k1}" for metric in metrics for k1 in (0, 1)}
    assert server.tags("images") == {"hessian/density"} | curves | {f"barrier_map/{metric}" for metric in metrics}
    assert server.tags("histograms") == {"hessian/ritz_values", "hessian/ritz_values_symlog"}
    shown = server.get("plugin/images/images", tag="hessian/density", run=".", sample=0)
    assert [image["step"] for image in shown] == [0, 3, 6, 9]
    drawn = [step for _, step, _ in server.get("plugin/histograms/histograms", tag="hessian/ritz_values", run=".")]
    assert drawn == [0, 3, 6, 9]


def test_the_charts_of_all_callbacks_are_in_one_layout_and_have_their_numbers(server: Server) -> None:
    layout = server.get("plugin/custom_scalars/layout")["category"]
    charts = {c["title"]: {chart["title"]: chart for chart in c["chart"]} for c in layout}
    assert list(charts) == ["hessian, with errors", "hessian", "sharpness, with errors", "sharpness", "barrier"]
    bands = [s for of_kind in charts.values() for c in of_kind.values() for s in c.get("margin", {}).get("series", ())]
    assert {s["value"] for s in bands} == set(BANDS)
    assert {tag for s in bands for tag in s.values()} <= server.tags("scalars")
    barriers = [chart for title, chart in charts["barrier"].items() if title == "barrier of train_loss"]
    (pattern,) = barriers[0]["multiline"]["tag"]
    found = server.get("plugin/custom_scalars/scalars", run=".", tag=pattern)
    assert found["regex_valid"]
    assert found["tag_to_events"].keys() == {f"barrier/train_loss/k1_00{k1}" for k1 in (0, 1)}
    # What there is no number for has no chart: there is no validation here.
    assert not [title for title in charts["barrier"] if "val" in title]


def test_one_text_tells_what_was_measured_what_it_means_and_what_it_cost(server: Server, measured: Measured) -> None:
    (text,) = server.get("plugin/text/text", tag="report/measured/text_summary", run=".")
    assert text["step"] == 9
    for callback in measured.callbacks:
        for name in {r.name for r in getattr(callback, "results", []) if r.log != "none"}:
            assert f"<code>{name}</code>" in text["text"]
    for words in ("largest eigenvalue", "Hessian products", "over Gaussian ε", "<table>"):
        assert words in text["text"]
    assert "hessian/density" in text["text"]
    assert "attribution" not in text["text"]  # was not asked for
    assert (measured.log_dir / "lmc" / "report.md").is_file()


def test_every_picture_is_a_file_with_its_numbers(measured: Measured) -> None:
    pictures = {p.stem for p in (measured.log_dir / "lmc" / "figures").glob("*.png")}
    numbers = {p.stem: p for p in (measured.log_dir / "lmc" / "arrays").glob("*.npz")}
    assert len(pictures) == 10
    assert pictures < numbers.keys()
    with np.load(numbers["hessian_ritz_values_000009"]) as found:
        assert found["values"].ndim == 1


def test_children_are_runs_of_their_own_without_our_keys(server: Server) -> None:
    runs = set(server.get("runs"))
    children = {f"branches/k1_00{k1}_child_0" for k1 in (0, 1)}
    assert runs == {".", *children}
    for child in children:
        tags = server.tags("scalars", child)
        assert "train_loss" in tags
        assert not {tag for tag in tags if tag.startswith(("hessian/", "sharpness/", "barrier/"))}
