"""The pages of TensorBoard on the demo, as somebody sees them: ``make browser-test``.

Screenshots of each tab go to ``$SCREENSHOTS``, by default ``screenshots/``.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

pytest.importorskip("selenium")

from lmc_lightning.callbacks.surface.figures import surface_mesh
from lmc_lightning.experiments.quickstart import main
from lmc_lightning.landscape.surface.slices import Mark, Surface
from lmc_lightning.loggers import Embedding, Mesh, log_embedding, log_mesh
from tests.browser.pages import Browser, browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:selenium"),
    pytest.mark.filterwarnings("ignore:.*did not converge:UserWarning"),
]

SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", "screenshots")).resolve()


def bowl() -> Mesh:
    """A paraboloid, as the callback shows its surfaces."""
    axis = torch.linspace(-1, 1, 25, dtype=torch.float64)
    losses = 1 + axis[:, None] ** 2 + axis**2
    return surface_mesh(
        Surface(axis, axis, {"loss": losses}, (Mark("θ", (0.0, 0.0), 0.0, {"loss": 1.0}),), ("x", "y"), "a bowl")
    )


def way() -> Embedding:
    """A circle of points, each joined to the next one."""
    angles = np.linspace(0, 3, 30)
    points = np.stack([np.cos(angles), np.sin(angles), angles], 1)
    return Embedding(points, ["step", "__next__"], [[i, i + 1 if i < 29 else ""] for i in range(30)])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("logs")
    assert main(["--small", "--log-dir", str(folder)]) == 0
    run = folder / "digits" / "version_0"
    surface = TensorBoardLogger(folder / "digits" / "version_0", name="surface", version="last")
    log_mesh(surface, "landscape/mesh", bowl(), 36)
    log_embedding(surface, "trajectory", way(), 36)
    surface.finalize("success")
    with browser(run, folder / "server.log") as opened:
        yield opened


@pytest.fixture(autouse=True)
def without_complaints(page: Browser) -> Iterator[None]:
    page.severe()
    yield
    assert page.severe() == []


def test_the_tabs_are_those_of_what_was_measured(page: Browser) -> None:
    page.open("timeseries")
    tabs = page.wait(lambda: page.texts("[data-plugin-id], .mat-mdc-tab, .mat-tab-label"), "tab")
    names = {name.strip().lower() for name in tabs}
    assert {"time series", "scalars", "custom scalars", "images", "histograms", "text", "hparams", "mesh"} <= names


@pytest.mark.parametrize("dark", ["false", "true"])
def test_the_time_series_show_the_numbers_and_the_pictures(page: Browser, dark: str) -> None:
    page.open("timeseries", tagFilter="hessian/(lambda_max|trace|density|ritz_values.*)$", darkMode=dark)
    page.wait(lambda: page.count("scalar-card line-chart") == 2, "chart")
    page.click('button[aria-label="Close side pane"]')  # unless it is still closed
    page.wait(lambda: page.count("image-card img") == 1, "picture of the density")
    page.wait(lambda: page.count("histogram-card tb-histogram") == 2, "histogram of Ritz values")
    for tag in ("hessian/lambda_max", "hessian/density", "hessian/ritz_values"):
        assert any(tag in text for text in page.texts("card-view"))
    page.save(SCREENSHOTS / f"time_series_{'dark' if dark == 'true' else 'light'}.png")


def test_the_barriers_have_one_card_each_and_no_card_of_errors(page: Browser) -> None:
    page.open("timeseries", tagFilter="barrier/")
    page.wait(lambda: page.count("card-view scalar-card line-chart") >= 4, "barrier")
    assert not [text for text in page.texts("card-view") if "stderr" in text]
    page.save(SCREENSHOTS / "barriers.png")


def test_the_figures_are_drawn(page: Browser) -> None:
    page.open("timeseries", tagFilter="barrier_(curves|map)/val")
    page.wait(lambda: page.count("card-view image-card img") >= 4, "figure of barriers")
    page.save(SCREENSHOTS / "figures.png")


def test_the_charts_have_their_bands(page: Browser) -> None:
    page.open("custom_scalars")
    page.wait(lambda: page.count("tf-custom-scalar-margin-chart-card") >= 2, "chart with a band")
    page.wait(lambda: page.count("tf-custom-scalar-multi-line-chart-card") >= 4, "chart of several lines")
    page.click("paper-checkbox[checked]")
    assert "trace ± 2 standard errors" in " ".join(page.texts("figcaption"))
    page.save(SCREENSHOTS / "custom_scalars.png")


def test_the_histograms_are_drawn(page: Browser) -> None:
    page.open("histograms")
    page.wait(lambda: page.count("vz-histogram-timeseries") == 2, "histogram")
    page.save(SCREENSHOTS / "histograms.png")


def test_the_report_is_a_table(page: Browser) -> None:
    page.open("text")
    page.wait(lambda: page.count("table td") > 20, "table")
    text = " ".join(page.texts("td"))
    assert "hessian/lambda_max" in text
    assert "largest eigenvalue" in text
    page.save(SCREENSHOTS / "text.png")


def test_the_mesh_is_drawn_by_webgl(page: Browser) -> None:
    page.open("mesh")
    page.wait(lambda: page.count("canvas") >= 1, "canvas")
    page.wait(lambda: page.colors("canvas") > 100, "surface on the canvas")
    page.save(SCREENSHOTS / "mesh.png")


def test_the_run_has_its_hyper_parameters_beside_its_main_numbers(page: Browser) -> None:
    page.open("hparams")
    page.wait(lambda: "lenet5" in " ".join(page.texts("vaadin-grid-cell-content, td")), "row of the run")
    shown = " ".join(page.texts("vaadin-grid-cell-content, th, td"))
    assert {"lr", "network", "train_loss"} <= set(shown.split())
    page.save(SCREENSHOTS / "hparams.png")


def test_the_way_of_the_weights_is_in_the_projector(page: Browser) -> None:
    for _ in range(3):  # the server finds it out while the page is open for the first time
        page.open("projector")
        time.sleep(5)
    page.wait(lambda: page.count("iframe") == 1, "projector")
    page.wait(lambda: page.colors("iframe") > 50, "point in it")
    page.save(SCREENSHOTS / "projector.png")
