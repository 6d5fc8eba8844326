"""Every number that a callback logs has its place in the one layout of charts."""

import re
from typing import Any

import pytest

import lmc_lightning
from lmc_lightning.callbacks.visits.reporting import HasCharts, layout_of
from lmc_lightning.callbacks.visits.run_report import run_report
from lmc_lightning.landscape.paths.barrier import DEFINITIONS
from lmc_lightning.landscape.sharpness.family import MEASURES
from lmc_lightning.loggers import Band
from tests.callbacks.runs import Classifier, Rows, fit, loader
from tests.test_contract import CALLBACKS, make

pytestmark = pytest.mark.filterwarnings("ignore:.*did not converge:UserWarning", "ignore:Sharpness.*:UserWarning")

ALL_OF_IT: dict[str, dict[str, Any]] = {
    "HessianSpectrum": {"blocks": "module", "attribution": True},
    "Sharpness": {"measures": MEASURES, "direction": "update"},
    "LossSurface": {},
    "EdgeOfStability": {},
    "MinimaVolume": {"thresholds": [0.1, 0.5], "coordinates": "filter"},
    "LocalLearningCoefficient": {},
    "WeightTrajectory": {},
    "RepresentationSimilarity": {},
    "InterpolationBarrier": {"definitions": DEFINITIONS, "extras": ["distances", "soup", "layers"]},
    "ModeConnectivity": {"definitions": DEFINITIONS, "metrics": {"val_acc": "max"}},
    "CheckpointBranching": {"override": {"optimizer.lr": "*0.5"}, "children": 2},
}
"""Options under which a callback logs all that it can; of a new one there has to be a line here."""


def outside(callbacks: list[Any]) -> list[str]:
    """Keys that are logged and in no chart."""
    charts = [chart for charts in layout_of(callbacks).values() for chart in charts]
    tags = [tag for c in charts for tag in ([re.escape(c.key)] if isinstance(c, Band) else c.tags)]
    shown = {r.name for c in callbacks for r in getattr(c, "results", ()) if r.log != "none" and r.is_measured}
    shown |= {key for c in callbacks if not hasattr(c, "results") for key in getattr(c, "logged", ())}
    assert shown
    return sorted(key for key in shown if not any(re.fullmatch(tag, key) for tag in tags))


@pytest.mark.parametrize("cls", CALLBACKS, ids=lambda c: c.__name__)
def test_every_number_of_a_run_is_in_a_chart_and_in_the_report(cls: type[Any]) -> None:
    alone = {"InterpolationBarrier", "ModeConnectivity", "RepresentationSimilarity"}
    callback = make(cls, **ALL_OF_IT[cls.__name__] | ({"reference": "initial"} if cls.__name__ in alone else {}))
    assert isinstance(callback, HasCharts)
    branching = cls is lmc_lightning.CheckpointBranching
    fit(Classifier(), callback, val=loader(), max_epochs=1 + branching, logger=Rows())
    assert outside([callback]) == []
    if not branching:
        text = run_report([callback])
        assert "**Definitions**" in text
        assert "{lr_x0.5}" not in text
        assert all(f"`{r.name}`" in text for r in callback.results if r.log != "none")


@pytest.mark.parametrize("name", ["Sharpness", "MinimaVolume", "LocalLearningCoefficient"])
def test_every_number_of_a_named_instance_is_in_a_chart(name: str) -> None:
    callback = make(getattr(lmc_lightning, name), **ALL_OF_IT[name], name="b(1)")
    fit(Classifier(), callback, max_epochs=1)
    assert outside([callback]) == []


def test_every_number_of_a_family_is_in_a_chart() -> None:
    pairs = {"pairs": ["trunk", "siblings"], "reference": None, "every_n_epochs": 1}
    names = ("InterpolationBarrier", "ModeConnectivity", "RepresentationSimilarity")
    ours = [make(getattr(lmc_lightning, name), **{**pairs, **ALL_OF_IT[name]}) for name in names]
    branching = lmc_lightning.CheckpointBranching(epochs=[0, 1], children=2)
    fit(Classifier(), branching, *ours, val=loader(), logger=Rows())
    assert outside([branching, *ours]) == []
    means, layers = layout_of([ours[2]])["similarity"]
    assert len(means.tags) == 2 * 3  # type: ignore[union-attr]
    assert not any(re.fullmatch(layers.tags[0], key) for key, _ in ours[2].similarities)  # type: ignore[union-attr]


def test_charts_name_no_numbers_of_another_instance() -> None:
    ours = [make(lmc_lightning.Sharpness), make(lmc_lightning.Sharpness, name="b")]
    fit(Classifier(), *ours)
    titles = [chart.title for chart in layout_of(ours)["sharpness"]]
    assert len(set(titles)) == len(titles)
    for one, other in (ours, reversed(ours)):
        tags = [t for c in one.charts() for t in ([re.escape(c.key)] if isinstance(c, Band) else c.tags)]
        assert not [r.name for r in other.results if any(re.fullmatch(tag, r.name) for tag in tags)]
