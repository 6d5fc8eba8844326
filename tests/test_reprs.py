"""What a callback or a result says of itself in a notebook: one line with what matters."""

import inspect
from typing import Any, get_args, get_type_hints

import pytest
import torch

import lmc_lightning as lmc
from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.minima_volume import VolumeSettings
from lmc_lightning.callbacks.mode_connectivity import CurveTraining
from lmc_lightning.callbacks.visits.common import Common, CommonButExamples
from lmc_lightning.landscape.volume.llc import Langevin
from tests.callbacks.runs import Classifier, batches, cross_entropy, fit
from tests.test_contract import CALLBACKS, MEASURING


def two() -> tuple[Classifier, Classifier]:
    first, second = Classifier(), Classifier()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.1)
    return first, second


def results() -> dict[str, Any]:
    """One of each kind of result."""
    ends, data = two(), batches()
    ways = [lmc.Trajectory(torch.eye(3), [0, 2, 4], "trunk"), lmc.Trajectory(-torch.eye(3), [0, 2, 4])]
    volume = VolumeSettings((3.0,), num_directions=4, rtol=0.1)
    options = {"loss_fn": cross_entropy}
    return {
        "Barrier": lmc.interpolation_barrier(*ends, data, num_points=3, **options),
        "Surface": lmc.loss_surface(ends[0], data, num_points=3, **options),
        "Trajectory": ways[0],
        "Components": lmc.pca_plane(ways),
        "Volume": lmc.minima_volumes({"a": ends[0]}, {"a": data}, volume, **options)["a", "a"][3.0],
        "LearningCoefficient": lmc.local_learning_coefficient(ends[0], data, Langevin(2, 1, 4), **options),
        "Similarity": lmc.representation_similarity(*ends, data, **options),
        "Connection": lmc.connect(*ends, data, training=CurveTraining(num_epochs=1), num_points=3, **options),
        "Record": lmc.Record("test", 3, 1, "test/value", 0.5, evidence={"long": list(range(99))}),
        "CurveTraining": CurveTraining(),
        "Langevin": Langevin(),
        "VolumeSettings": volume,
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return results()


@pytest.mark.parametrize("kind", ["Barrier", "Surface", "Trajectory", "Components", "Volume", "LearningCoefficient"])
def test_a_number_or_a_size_is_in_the_line(found: dict[str, Any], kind: str) -> None:
    expected = {
        "Barrier": f"Barrier(loss: {found['Barrier'].barrier:.4g}",
        "Surface": "Surface(3 × 3 points, ",
        "Trajectory": "Trajectory('trunk', 3 states of 3 numbers, steps 0 to 4)",
        "Components": "Components(2 of 6 states of 2 runs, ",
        "Volume": f"Volume(τ = 3: log volume {found['Volume'].log_volume:.5g}, 4 rays, ",
        "LearningCoefficient": f"LearningCoefficient({found['LearningCoefficient'].value:.4g} ± ",
    }
    assert repr(found[kind]).startswith(expected[kind])


def test_results_say_it_in_one_line(found: dict[str, Any]) -> None:
    for kind, result in found.items():
        text = repr(result)
        assert text.startswith(f"{kind}(")
        assert len(text.splitlines()) == 1
        assert len(text) <= 220, text
        assert "tensor(" not in text


@pytest.mark.parametrize("cls", CALLBACKS, ids=lambda c: c.__name__)
def test_callbacks_say_when_and_on_what(cls: type[Any]) -> None:
    text = repr(cls())
    assert text.startswith(f"{cls.__name__}(")
    assert len(text.splitlines()) == 1
    assert len(text) <= 160


def test_a_callback_tells_what_it_was_asked_and_what_it_did() -> None:
    callback = lmc.Sharpness(["gradient_norm"], epochs=[0, 2], name="b", probe_dataloader=batches())
    assert repr(callback) == "Sharpness(epochs=[0, 2], num_examples=2048, name='b'): 0 visits"
    fit(Classifier(), callback)
    assert repr(callback) == "Sharpness(epochs=[0, 2], num_examples=2048, name='b'): 2 visits"
    with pytest.warns(UserWarning, match="training goes on"):
        fit(Classifier(), lost := lmc.Sharpness(parameters=["no"], every_n_train_steps=6, num_examples=8))
    assert repr(lost) == "Sharpness(every_n_train_steps=6, num_examples=8): 0 visits, 2 failed"


def test_editors_see_the_arguments_that_callbacks_share() -> None:
    hints = get_type_hints(MeasurementCallback.__init__)
    assert {name: hint for name, hint in hints.items() if name != "return"} == get_type_hints(Common)
    for cls in MEASURING:
        own = inspect.signature(cls).parameters
        assert not {"args", "kwargs"} & own.keys()
        (options,) = get_args(get_type_hints(cls.__init__)["common"])
        assert get_type_hints(CommonButExamples).items() <= get_type_hints(options).items()
