import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lmc_lightning.core.collective import Collective
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.random_vectors import derive_seed
from lmc_lightning.landscape.sharpness.ascent import (
    adaptive,
    adaptive_linf,
    gradient_norm_rms,
    keskar,
    m_sharpness,
    worst_case,
)
from lmc_lightning.landscape.sharpness.critical import critical_sharpness
from lmc_lightning.landscape.sharpness.family import MEASURES, SharpnessResult, SharpnessSettings, sharpness
from lmc_lightning.landscape.sharpness.flatness import average, average_adaptive, flatness_profile, random_max
from lmc_lightning.landscape.sharpness.measured import gradient_norm
from tests.landscape.surfaces import Counting, conv_net, linear
from tests.problems import ConvNet, cross_entropy, generator, images, split
from tests.scripts.processes import pair
from tests.scripts.sharpness import family, of_both

FEW: dict[str, Any] = {"num_samples": 2, "num_draws": 3, "radii": (0.05, 0.1)}


def measure(objective: Objective, measures: Any = MEASURES, seed: int = 0, **settings: Any) -> SharpnessResult:
    return sharpness(objective, objective.theta(), measures, SharpnessSettings(**{**FEW, **settings}), seed=seed)


def stream(name: str, seed: int = 0) -> torch.Generator:
    return generator(derive_seed(seed, "sharpness", name))


def test_the_members_are_those_measured_alone() -> None:
    objective = conv_net(chunk_size=16)
    theta = objective.theta()
    found = measure(objective, num_steps=2).measures
    rises, errors = flatness_profile(objective, theta, (0.05, 0.1), 2, generator=stream("sphere"))
    alone = {
        "worst_case": worst_case(objective, theta, 0.05, 2),
        "adaptive": adaptive(objective, theta, 0.5),
        "adaptive_linf": adaptive_linf(objective, theta, 0.005, 2),
        "m_sharpness": m_sharpness(objective, theta, 0.05, 2),
        "keskar": keskar(objective, theta, 1e-3),
        "random_max": random_max(objective, theta, 0.02, 3, generator=stream("random_max")),
        "average": average(objective, theta, 0.01, 2, stream("average")),
        "average_adaptive": average_adaptive(objective, theta, 0.01, 2, stream("average_adaptive")),
        "flatness_profile/r_1": rises[0],
        "flatness_profile/r_2": rises[1],
        "noise_robustness": errors[0],
        "critical_sharpness": critical_sharpness(objective, theta),
        "gradient_norm": gradient_norm(objective, theta),
        "gradient_norm_rms": gradient_norm_rms(objective, theta),
    }
    assert list(found) == list(alone)
    assert {n: (m.value, m.stderr, m.flags) for n, m in found.items()} == {
        n: (m.value, m.stderr, m.flags) for n, m in alone.items()
    }


@pytest.mark.parametrize("name", MEASURES)
def test_a_number_does_not_depend_on_what_else_is_measured_or_in_which_order(name: str) -> None:
    together = measure(conv_net(), tuple(reversed(MEASURES))).measures
    alone = measure(conv_net(), (name,)).measures
    assert {n: (together[n].value, together[n].stderr) for n in alone} == {
        n: (m.value, m.stderr) for n, m in alone.items()
    }


def test_seeds_change_the_random_measures_and_no_others() -> None:
    first, again, other = (measure(conv_net(), seed=s).measures for s in (0, 0, 1))
    assert {n: m.value for n, m in first.items()} == {n: m.value for n, m in again.items()}
    changed = {n for n in first if first[n].value != other[n].value}
    profile = {"flatness_profile/r_1", "flatness_profile/r_2", "noise_robustness"}
    assert changed - profile == {"random_max", "average", "average_adaptive"}
    assert changed & profile


@pytest.mark.parametrize("num_steps", [1, 3])
def test_one_gradient_is_shared_and_every_evaluation_is_counted(num_steps: int) -> None:
    objective = Counting(ConvNet(), [images()], cross_entropy)
    objective.baseline  # noqa: B018
    names = [n for n in MEASURES if n not in ("m_sharpness", "gradient_norm_rms")]
    for measures in (names, ["noise_robustness"], ["flatness_profile"], ["gradient_norm"]):
        objective.losses = objective.gradients = 0
        result = measure(objective, measures, num_steps=num_steps)
        assert (objective.gradients, objective.losses) == (result.num_gradients, result.num_losses)


def test_the_default_four_cost_one_gradient_and_nineteen_losses() -> None:
    objective = conv_net()
    result = sharpness(objective, objective.theta())
    assert list(result.measures) == ["worst_case", "adaptive", "average", "gradient_norm"]
    assert (result.num_gradients, result.num_losses) == (1, 19)


@pytest.mark.parametrize("radius", ["absolute", "relative", "filter"])
def test_a_unit_of_radii_holds_for_all_measures_that_have_a_choice(radius: Any) -> None:
    objective = conv_net()
    theta = objective.theta()
    found = measure(objective, radius=radius).measures
    alone = {
        "worst_case": worst_case(objective, theta, 0.05, radius=radius),
        "m_sharpness": m_sharpness(objective, theta, 0.05, radius=radius),
        "random_max": random_max(objective, theta, 0.02, 3, generator=stream("random_max"), radius=radius),
        "average": average(objective, theta, 0.01, 2, stream("average"), radius=radius),
        "flatness_profile/r_1": flatness_profile(
            objective, theta, (0.05,), 2, generator=stream("sphere"), radius=radius
        )[0][0],
    }
    assert {n: found[n].value for n in alone} == {n: m.value for n, m in alone.items()}
    assert {found[n].details["radius_kind"] for n in alone} == {radius}


@pytest.mark.parametrize("sizes", [[64, 6], [35, 35], [70]])
def test_numbers_do_not_depend_on_the_loaders_batch_size(sizes: list[int]) -> None:
    reference = measure(conv_net(chunk_size=32)).measures
    found = measure(Objective(ConvNet(), split(images(), sizes), cross_entropy, chunk_size=32)).measures
    for name, known in reference.items():
        assert found[name].value == pytest.approx(known.value, rel=1e-6), name


def test_two_processes_measure_as_one_does_on_the_union(tmp_path: Path) -> None:
    both = pair(of_both, folder=tmp_path)
    assert both[0] == both[1]
    for name, known in family((0, 1), Collective()).items():
        numbers, expected = ([math.nan if v is None else v for v in row[:2]] for row in (both[0][name], known))
        assert numbers == pytest.approx(expected, rel=1e-7, abs=1e-14, nan_ok=True), name
        assert both[0][name][2:] == known[2:], name
    assert both[0]["m_sharpness"][2] == 5


def test_without_a_classifier_there_is_no_accuracy_to_lose() -> None:
    theta = torch.ones(4, dtype=torch.float64)
    found = measure(linear(theta, theta), ("noise_robustness",))
    assert math.isnan(found["noise_robustness"].value)
    assert found["noise_robustness"].flags == ("no_error",)


def test_along_the_update_the_critical_step_is_sought_from_its_start() -> None:
    objective = Counting(ConvNet(), [images()], cross_entropy)
    theta = objective.theta()
    before = theta + 0.3 * objective.grad(theta)
    objective.losses = objective.gradients = 0
    found = sharpness(objective, theta, ("critical_sharpness",), SharpnessSettings(direction="update"), before=before)
    assert (objective.gradients, objective.losses) == (found.num_gradients, found.num_losses)
    expected = critical_sharpness(objective, before, before - theta)
    assert found["critical_sharpness/update"].value == expected.value
    unknown = sharpness(objective, theta, ("critical_sharpness",), SharpnessSettings(direction="update"))
    assert unknown["critical_sharpness/update"].flags == ("no_update",)


def test_a_flat_loss_is_not_sharp() -> None:
    objective = linear(torch.zeros(4).double(), torch.ones(4).double())
    result = measure(objective)
    undefined = {"critical_sharpness", "noise_robustness"}
    assert {n: m.value for n, m in result.measures.items() if n not in undefined} == dict.fromkeys(
        set(result.measures) - undefined, 0
    )
    assert result["worst_case"].flags == ("stationary",)


def test_theta_and_the_global_generator_are_left_alone() -> None:
    objective = conv_net()
    theta = objective.theta()
    kept, state = theta.clone(), torch.get_rng_state()
    sharpness(objective, theta, MEASURES, SharpnessSettings(**FEW))
    assert torch.equal(theta, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_is_told_after_every_measure() -> None:
    told: list[tuple[int, int, str]] = []
    objective = conv_net()
    names = ("gradient_norm", "adaptive")
    sharpness(objective, objective.theta(), names, progress=lambda *news: told.append(news))
    assert told == [(1, 2, "gradient_norm"), (2, 2, "adaptive")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 0.0}, r"Expected positive radii, got {'rho': 0.0}"),
        ({"adaptive_rho": -1.0}, r"'adaptive_rho': -1.0"),
        ({"eta_max": 0.0}, r"'eta_max': 0.0"),
        ({"radii": (0.1, 0.0)}, r"'radii\[1\]': 0.0"),
        ({"radii": ()}, r"Expected positive radii, got none"),
        ({"num_steps": 0}, r"num_steps ≥ 1, num_samples ≥ 2 \(for an error\) and num_draws ≥ 1, got 0, 2 and 3"),
        ({"num_samples": 1}, r"got 1, 1 and 3"),
        ({"radius": "cubic"}, r"Expected radius to be 'absolute', 'relative', 'filter' or None, got 'cubic'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharpnessSettings(**{**FEW, **settings})


@pytest.mark.parametrize("measures", [("worst",), (), "average"])
def test_names_that_are_no_measures_are_refused(measures: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected measures to list some of worst_case, adaptive.*, got"):
        measure(conv_net(), measures)
