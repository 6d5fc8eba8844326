"""Sharpness is logged under the documented keys at the scheduled steps, and is that of the closed forms."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from lmc_lightning import Sharpness, measure
from tests import oracles
from tests.callbacks.runs import Classifier, Rows, batches, cross_entropy, documented, fit, with_errors
from tests.problems import Vector, normal, with_spectrum

RADII = {"rho": 0.3, "adaptive_rho": 0.2, "sigma": 0.05}


@pytest.mark.parametrize(
    ("schedule", "steps"), [({}, [0, 3, 6]), ({"epochs": [0, 2]}, [0, 6]), ({"every_n_train_steps": 4}, [0, 4])]
)
def test_the_keys_of_the_table_are_logged_at_the_scheduled_steps_and_no_others(
    schedule: dict[str, Any], steps: list[int]
) -> None:
    logger = Rows()
    fit(Classifier(), Sharpness(num_samples=2, on_error="raise", **schedule), logger=logger)
    assert logger.by_step("sharpness") == {step: set(with_errors(documented(Sharpness))) for step in steps}


def of_vector(theta: torch.Tensor, loss: Any, **arguments: Any) -> dict[str, float]:
    """Sharpness of ``loss(θ)`` on a batch that is not looked at."""
    found = measure(Vector(theta), [torch.zeros(1)], [Sharpness(**arguments)], loss_fn=lambda m, batch: loss(m.theta))
    return {key.removeprefix("sharpness/"): value for key, value in found.items()}


def test_of_a_linear_loss_it_is_the_radius_times_the_norm_of_the_slope() -> None:
    theta, slope = normal(6, seed=1), normal(6, seed=2)
    found = of_vector(theta, lambda t: slope @ t, **RADII)
    assert found["gradient_norm"] == pytest.approx(float(slope.norm()), rel=1e-12)
    assert found["worst_case"] == pytest.approx(0.3 * float(slope.norm()), rel=1e-12)
    assert found["adaptive"] == pytest.approx(0.2 * float((theta.abs() * slope).norm()), rel=1e-12)
    assert found["average"] == pytest.approx(0.0, abs=1e-15)
    assert found["average_stderr"] == pytest.approx(0.0, abs=1e-15)


def test_at_the_minimum_of_a_quadratic_it_is_that_of_the_largest_eigenvalue() -> None:
    hessian, theta = with_spectrum([4.0, 1.0, 0.5]), normal(3, seed=3)
    found = of_vector(theta, lambda t: 0.5 * (t - theta) @ hessian @ (t - theta), num_steps=60, **RADII)
    assert found["worst_case"] == pytest.approx(0.3**2 * 4.0 / 2, rel=1e-6)
    assert found["gradient_norm"] == 0.0


def test_the_average_over_noise_is_half_its_variance_times_the_trace() -> None:
    hessian, theta = with_spectrum([4.0, 1.0, 0.5]), normal(3, seed=3)
    found = of_vector(theta, lambda t: 0.5 * (t - theta) @ hessian @ (t - theta), num_samples=64, sigma=0.05)
    variance = (0.05 * float(theta.norm())) ** 2 / 3
    assert found["average_stderr"] < 0.15 * found["average"]
    assert abs(found["average"] - variance * 5.5 / 2) < 3 * found["average_stderr"]


def test_the_numbers_of_a_run_are_those_of_its_weights() -> None:
    module = Classifier()
    callback = Sharpness(rho=0.3, num_samples=2, epochs=[2], probe_dataloader=batches())
    fit(module, callback)
    loss = oracles.mean_loss(module, batches(), cross_entropy, [8.0] * 3)
    theta = oracles.flat_parameters(module)
    gradient = oracles.gradient(loss, theta)
    found = {r.name.removeprefix("sharpness/"): r for r in callback.results}
    assert found["gradient_norm"].value == pytest.approx(float(gradient.norm()), rel=1e-5)
    rise = float(loss(theta + 0.3 * gradient / gradient.norm()) - loss(theta))
    assert found["worst_case"].value == pytest.approx(rise, rel=1e-4)
    scaled = theta.abs() * gradient
    rise = float(loss(theta + 0.5 * theta.abs() * scaled / scaled.norm()) - loss(theta))
    assert found["adaptive"].value == pytest.approx(rise, rel=1e-4)


def test_every_record_carries_its_evidence() -> None:
    callback = Sharpness(num_samples=2, epochs=[2], **RADII)
    fit(Classifier(), callback)
    found = {r.name.removeprefix("sharpness/"): r for r in callback.results}
    assert [found[n].evidence["radius"] for n in ("worst_case", "adaptive")] == [0.3, 0.2]
    assert {r.unit for name, r in found.items() if name != "gradient_norm"} == {"loss"}
    for record in callback.results:
        assert (record.step, record.epoch, record.status) == (6, 2, "ok")
        assert (record.evidence["num_gradients"], record.evidence["num_losses"]) == (1, 7)
        assert record.evidence["seconds"] > 0


class Diverges(Classifier):
    """Its weights are NaN from the first step on."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        nn.init.constant_(self.net[-1].weight, math.nan)


def test_numbers_of_a_network_of_nan_are_undefined_and_training_goes_on() -> None:
    callback, logger = Sharpness(num_samples=2, epochs=[1], probe_dataloader=batches()), Rows()
    trainer = fit(Diverges(), callback, logger=logger)
    assert trainer.global_step == 6
    assert len(callback.results) == 4
    assert {(r.step, r.value, r.stderr, r.status) for r in callback.results} == {(3, None, None, "undefined")}
    assert logger.by_step("sharpness") == {}
    assert not callback.failures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": 0.0}, r"Expected positive rho, adaptive_rho and sigma.*got 0.0, 0.5, 0.01, 1 and 8"),
        ({"adaptive_rho": -1.0}, r"Expected positive rho.*got 0.05, -1.0"),
        ({"sigma": 0.0}, r"Expected positive rho"),
        ({"num_steps": 0}, r"num_steps ≥ 1"),
        ({"num_samples": 1}, r"num_samples ≥ 2 \(for an error\)"),
        ({"every_n_epochs": 0}, r"Expected every_n_epochs to be an integer of at least 1, got 0"),
        ({"steps": []}, r"Expected steps to list integers of at least 0, got \[\]"),
    ],
)
def test_misuse_raises_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sharpness(**arguments)
