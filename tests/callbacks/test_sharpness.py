"""Sharpness is logged under the documented keys at the scheduled steps, and is that of the closed forms."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_lightning import Sharpness, measure
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.sharpness.ascent import m_sharpness, worst_case
from lmc_lightning.landscape.sharpness.family import DEFAULT_MEASURES, MEASURES
from lmc_lightning.landscape.sharpness.flatness import RADII
from lmc_lightning.landscape.sharpness.logits import with_normalized_logits
from tests import oracles
from tests.callbacks.runs import Classifier, Rows, batches, cross_entropy, documented, fit, with_errors
from tests.problems import Vector, normal, with_spectrum

SIZES = {"rho": 0.3, "adaptive_rho": 0.2, "sigma": 0.05}
CHEAP: dict[str, Any] = {"num_samples": 2, "num_draws": 2, "m": 8, "on_error": "raise"}


def expanded(rows: dict[str, str]) -> dict[str, str]:
    """The rows with the radii of the profile written out."""
    names = {key: [key.replace("/r_k", f"/r_{i}") for i in range(1, len(RADII) + 1)] for key in rows}
    return {name: text for key, text in rows.items() for name in (names[key] if "/r_k" in key else [key])}


ROWS = expanded(documented(Sharpness))


def rows_of(measures: Any) -> dict[str, str]:
    return {key: text for key, text in ROWS.items() if key.split("/")[1] in measures}


@pytest.mark.parametrize(
    ("schedule", "steps"), [({}, [0, 3, 6]), ({"epochs": [0, 2]}, [0, 6]), ({"every_n_train_steps": 4}, [0, 4])]
)
def test_the_keys_of_the_four_are_logged_at_the_scheduled_steps_and_no_others(
    schedule: dict[str, Any], steps: list[int]
) -> None:
    logger = Rows()
    fit(Classifier(), Sharpness(num_samples=2, on_error="raise", **schedule), logger=logger)
    assert logger.by_step("sharpness") == {step: set(with_errors(rows_of(DEFAULT_MEASURES))) for step in steps}


def test_the_table_names_every_measure_and_every_one_is_logged_as_it_says() -> None:
    assert {key.split("/")[1] for key in ROWS} == set(MEASURES)
    logger = Rows()
    fit(Classifier(), Sharpness(MEASURES, epochs=[0], **CHEAP), logger=logger)
    assert logger.by_step("sharpness") == {0: set(with_errors(ROWS))}


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_asked_for_alone_is_logged_alone(name: str) -> None:
    found = measure(Classifier(), batches(), [Sharpness((name,), **CHEAP)])
    assert found.keys() == set(with_errors(rows_of([name])))


def test_visits_and_instances_share_their_random_numbers() -> None:
    """A run that learns nothing has the same sharpness at every visit, and with other measures beside it."""
    still = Classifier()
    still.configure_optimizers = lambda: torch.optim.SGD(still.parameters(), lr=0.0)  # type: ignore[method-assign]
    ours = [
        Sharpness(MEASURES, probe_dataloader=batches(), **CHEAP),
        Sharpness(("average",), probe_dataloader=batches(), name="alone", **CHEAP),
    ]
    fit(still, *ours)
    values: dict[str, set[float | None]] = {}
    for record in ours[0].results:
        values.setdefault(record.name, set()).add(record.value)
    assert len(values) == len(ROWS)
    assert all(len(found) == 1 for found in values.values())
    assert {r.value for r in ours[1].results} == values["sharpness/average"]


def of_vector(theta: torch.Tensor, loss: Any, measures: Any = DEFAULT_MEASURES, **arguments: Any) -> dict[str, float]:
    """Sharpness of ``loss(θ)`` on a batch that is not looked at."""
    ours = [Sharpness(measures, **arguments)]
    found = measure(Vector(theta), [torch.zeros(1)], ours, loss_fn=lambda m, batch: loss(m.theta))
    return {key.removeprefix("sharpness/"): value for key, value in found.items()}


def test_of_a_linear_loss_it_is_the_radius_times_the_norm_of_the_slope() -> None:
    theta, slope = normal(6, seed=1), normal(6, seed=2)
    found = of_vector(theta, lambda t: slope @ t, **SIZES)
    assert found["gradient_norm"] == pytest.approx(float(slope.norm()), rel=1e-12)
    assert found["worst_case"] == pytest.approx(0.3 * float(slope.norm()), rel=1e-12)
    assert found["adaptive"] == pytest.approx(0.2 * float((theta.abs() * slope).norm()), rel=1e-12)
    assert found["average"] == pytest.approx(0.0, abs=1e-15)
    assert found["average_stderr"] == pytest.approx(0.0, abs=1e-15)


def test_at_the_minimum_of_a_quadratic_it_is_that_of_the_largest_eigenvalue() -> None:
    hessian, theta = with_spectrum([4.0, 1.0, 0.5]), normal(3, seed=3)
    found = of_vector(theta, lambda t: 0.5 * (t - theta) @ hessian @ (t - theta), num_steps=60, **SIZES)
    assert found["worst_case"] == pytest.approx(0.3**2 * 4.0 / 2, rel=1e-6)
    assert found["gradient_norm"] == 0.0


def test_the_average_over_noise_is_half_its_variance_times_the_trace() -> None:
    hessian, theta = with_spectrum([4.0, 1.0, 0.5]), normal(3, seed=3)
    found = of_vector(theta, lambda t: 0.5 * (t - theta) @ hessian @ (t - theta), num_samples=64, sigma=0.05)
    variance = (0.05 * float(theta.norm())) ** 2 / 3
    assert found["average_stderr"] < 0.15 * found["average"]
    assert abs(found["average"] - variance * 5.5 / 2) < 3 * found["average_stderr"]


def test_critical_sharpness_of_a_quadratic_is_the_curvature_along_the_gradient() -> None:
    hessian, theta = with_spectrum([4.0, 1.0, 0.5]), normal(3, seed=3)
    gradient = hessian @ theta
    found = of_vector(theta, lambda t: 0.5 * t @ hessian @ t, ["critical_sharpness"])
    expected = float(gradient @ hessian @ gradient / (gradient @ gradient))
    assert found["critical_sharpness"] == pytest.approx(expected, rel=2e-3)


def test_along_the_update_it_is_that_of_the_step_from_where_it_was_taken() -> None:
    """Momentum makes the step another direction than the gradient; a tenth of η_c is known from the step itself."""
    kept: list[torch.Tensor] = []

    class Keeps(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            kept.append(oracles.flat_parameters(self))

    module = Keeps()
    common: dict[str, Any] = {"steps": [0, 4, 5], "probe_dataloader": batches(), "on_error": "raise"}
    callback = Sharpness(("critical_sharpness",), direction="update", **common)
    fit(module, callback)
    found = {r.step: r for r in callback.results}
    assert {r.name for r in callback.results} == {"sharpness/critical_sharpness/update"}
    assert (found[0].value, found[0].evidence["flags"]) == (None, ["no_update"])
    loss = oracles.mean_loss(module, batches(), cross_entropy, [8.0] * 3)
    for step in (4, 5):
        before, update = kept[step - 1], kept[step - 1] - kept[step]
        slope = float(oracles.gradient(loss, before) @ update)
        assert found[step].evidence["slope"] == pytest.approx(slope, rel=1e-3)
        value = found[step].value
        if slope <= 0:
            assert found[step].evidence["flags"] == ["undefined"]
            continue
        assert value is not None
        heights = [float(loss(before - 2 / value * f * update) - loss(before)) for f in (0.98, 1.02)]
        assert heights[0] < 0 < heights[1]
    assert any(found[step].value is not None for step in (4, 5))


def test_deferred_visits_know_the_steps_that_led_to_them() -> None:
    """The probe set is captured during the first epoch, after the visits at steps 1 and 2 were due."""
    callback = Sharpness(("critical_sharpness",), direction="update", steps=[1, 2], num_examples=24, on_error="raise")
    fit(Classifier(), callback)
    assert [r.step for r in callback.results] == [1, 2]
    assert not any("no_update" in r.evidence["flags"] for r in callback.results)


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


@pytest.mark.parametrize("m", [8, 5, 200])
def test_chunk_measures_are_over_chunks_of_m(m: int) -> None:
    callback = Sharpness(("m_sharpness", "gradient_norm_rms"), m=m, epochs=[0], probe_dataloader=batches())
    module = Classifier()
    expected = m_sharpness(*at_start(Objective(module, batches(), cross_entropy, chunk_size=m)), 0.05)
    fit(module, callback)
    found = {r.name: r for r in callback.results}["sharpness/m_sharpness"]
    assert found.value == pytest.approx(expected.value, rel=1e-6)
    assert (found.evidence["m"], found.evidence["num_samples"]) == (m, -(-24 // m))


def at_start(objective: Objective) -> tuple[Objective, torch.Tensor]:
    return objective, objective.theta()


def test_normalised_logits_have_keys_of_their_own() -> None:
    names = ("worst_case", "flatness_profile", "m_sharpness")
    module, logger = Classifier(), Rows()
    callback = Sharpness(names, logit_normalized=True, epochs=[0], probe_dataloader=batches(), **CHEAP)
    expected = worst_case(*at_start(Objective(module, batches(), with_normalized_logits(cross_entropy))), 0.05)
    fit(module, callback, logger=logger)
    assert {r.name.rpartition("/")[2] for r in callback.results} == {"logit_normalized"}
    found = {r.name: r for r in callback.results}["sharpness/worst_case/logit_normalized"]
    assert found.value == pytest.approx(expected.value, rel=1e-5)
    plain = set(with_errors(rows_of(names)))
    suffixed = {k.removesuffix("_stderr") + "/logit_normalized" + "_stderr" * k.endswith("_stderr") for k in plain}
    assert logger.by_step("sharpness") == {0: suffixed}


class Regressor(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).float())


def test_normalised_logits_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match=r"logit_normalized=True needs a loss that is one mean by .*cross_entropy"):
        measure(Regressor(), batches(), [Sharpness(logit_normalized=True)])


def test_a_regression_has_no_accuracy_to_lose() -> None:
    callback = Sharpness(("noise_robustness",), epochs=[0], probe_dataloader=batches(), **CHEAP)
    fit(Regressor(), callback)
    assert [(r.value, r.status, r.evidence["flags"]) for r in callback.results] == [(None, "undefined", ["no_error"])]


@pytest.mark.filterwarnings("ignore:sharpness. at step 0 did not converge. sharpness/critical_sharpness:UserWarning")
def test_a_censored_search_is_recorded_as_not_converged() -> None:
    callback = Sharpness(("critical_sharpness",), eta_max=1e-4, epochs=[0], probe_dataloader=batches())
    with pytest.warns(UserWarning, match=r"did not converge: sharpness/critical_sharpness\. Raise eta_max"):
        fit(Classifier(), callback)
    (found,) = callback.results
    assert (found.value, found.status, found.evidence["flags"]) == (2e4, "not_converged", ["censored"])


def trained(*ours: Sharpness) -> list[torch.Tensor]:
    torch.manual_seed(5)
    module = Classifier(batch_norm=True)
    fit(module, *ours)
    return [*module.state_dict().values(), torch.get_rng_state()]


def test_training_is_bit_identical_beside_the_whole_family() -> None:
    alone = trained()
    with_ours = trained(
        *(Sharpness(MEASURES, logit_normalized=on, name=str(on), epochs=[1], **CHEAP) for on in (False, True))
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, with_ours, strict=True))


def test_every_record_carries_its_evidence() -> None:
    callback = Sharpness(num_samples=2, epochs=[2], **SIZES)
    fit(Classifier(), callback)
    found = {r.name.removeprefix("sharpness/"): r for r in callback.results}
    assert [found[n].evidence["radius"] for n in ("worst_case", "adaptive", "average")] == [0.3, 0.2, 0.05]
    kinds = [found[n].evidence["radius_kind"] for n in ("worst_case", "adaptive", "average")]
    assert kinds == ["absolute", "weight", "relative"]
    assert [found[n].evidence["own_losses"] for n in DEFAULT_MEASURES] == [1, 1, 4, 0]
    assert {r.unit for name, r in found.items() if name != "gradient_norm"} == {"loss"}
    for record in callback.results:
        assert (record.step, record.epoch, record.status) == (6, 2, "ok")
        assert (record.evidence["num_gradients"], record.evidence["num_losses"]) == (1, 7)
        assert record.evidence["seconds"] > 0
        assert record.evidence["flags"] == []


class Diverges(Classifier):
    """Its weights are NaN from the first step on."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        nn.init.constant_(self.net[-1].weight, math.nan)


def test_numbers_of_a_network_of_nan_are_undefined_and_training_goes_on() -> None:
    callback, logger = Sharpness(MEASURES, epochs=[1], probe_dataloader=batches(), **CHEAP), Rows()
    trainer = fit(Diverges(), callback, logger=logger)
    assert trainer.global_step == 6
    assert {r.name for r in callback.results} == set(ROWS)
    errors = {r.name for r in callback.results if r.value is not None}
    assert errors == {"sharpness/noise_robustness"}  # the predictions of a network of NaN are wrong or not, as ever
    others = [r for r in callback.results if r.name not in errors]
    assert {(r.step, r.value, r.stderr, r.status) for r in others} == {(3, None, None, "undefined")}
    assert all(set(r.evidence["flags"]) & {"nonfinite", "undefined"} for r in others)
    assert not callback.failures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": 0.0}, r"Expected positive radii, got {'rho': 0.0}"),
        ({"adaptive_rho": -1.0}, r"'adaptive_rho': -1.0"),
        ({"sigma": 0.0}, r"'sigma': 0.0"),
        ({"num_steps": 0}, r"num_steps ≥ 1"),
        ({"num_samples": 1}, r"num_samples ≥ 2 \(for an error\)"),
        ({"direction": "up"}, r"Expected direction to be 'gradient' or 'update', got 'up'"),
        ({"m": 0}, r"Expected m ≥ 1 examples a chunk, got 0"),
        ({"radius": "box"}, r"Expected radius to be 'absolute', 'relative', 'filter' or None, got 'box'"),
        ({"measures": ["sharp"]}, r"Expected measures to list some of worst_case, .*, got \['sharp'\]"),
        ({"every_n_epochs": 0}, r"Expected every_n_epochs to be an integer of at least 1, got 0"),
        ({"steps": []}, r"Expected steps to list integers of at least 0, got \[\]"),
    ],
)
def test_misuse_raises_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sharpness(**arguments)
