"""The pages of TensorBoard on the demo, as somebody sees them: ``make browser-test``.

Screenshots of each tab go to ``$SCREENSHOTS``, by default ``screenshots/``.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

pytest.importorskip("selenium")

from lmc_lightning.experiments.quickstart import main
from lmc_lightning.loggers import Mesh, log_mesh
from tests.browser.pages import Browser, browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:selenium"),
    pytest.mark.filterwarnings("ignore:.*did not converge:UserWarning"),
]

SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", "screenshots")).resolve()


def bowl() -> Mesh:
    """A paraboloid, in the viewer's units."""
    axis = np.linspace(-1, 1, 25)
    x, z = (a.ravel() for a in np.meshgrid(axis, axis))
    y = x**2 + z**2 - 1
    corner = np.arange(24 * 25).reshape(24, 25)[:, :-1].ravel()
    faces = np.vstack(
        [np.stack([corner, corner + 1, corner + 25], 1), np.stack([corner + 1, corner + 26, corner + 25], 1)]
    )
    shade = ((y + 1) * 120).astype(np.uint8)
    config = {
        "camera": {"cls": "PerspectiveCamera", "fov": 45, "position": [2.0, 2.2, 2.0], "lookAt": [0, -0.1, 0]},
        "material": {"cls": "MeshBasicMaterial", "side": 2, "color": "#ffffff"},
    }
    return Mesh(np.stack([x, y, z], 1), faces, np.stack([shade, 90 + shade // 2, 250 - shade], 1), config)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("logs")
    assert main(["--small", "--log-dir", str(folder)]) == 0
    run = folder / "digits" / "version_0"
    surface = TensorBoardLogger(folder / "digits" / "version_0", name="surface", version="last")
    log_mesh(surface, "landscape/mesh", bowl(), 36)
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
    assert {"time series", "scalars", "custom scalars", "images", "histograms", "text", "mesh"} <= names


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
