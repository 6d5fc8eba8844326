"""Sharpness under random perturbations: how far the loss rises on average, and at most, around θ."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lmc_lightning.core.objective import Objective
from lmc_lightning.core.random_vectors import gaussian
from lmc_lightning.landscape.sharpness.measured import Centre, Measured, mean_of, nonfinite, require_positive
from lmc_lightning.landscape.sharpness.perturbations import Radius, deviations, norm, on_sphere

RADII = (0.01, 0.02, 0.03, 0.04, 0.05)


def average(
    objective: Objective,
    theta: Tensor,
    sigma: float,
    num_samples: int,
    generator: torch.Generator,
    *,
    radius: Radius = "relative",
    centre: Centre | None = None,
) -> Measured:
    """E L(θ + ε) − L(θ) over Gaussian ε of independent entries.

    ``radius="absolute"``: of standard deviation σ. ``"relative"``: σ‖θ‖/√P, an expected norm of σ‖θ‖. ``"filter"``:
    an expected norm of σ‖w_f‖ in each filter. Every direction is taken both ways, which cancels the slope; the standard
    error is over the pairs. ½ s² tr H where L is quadratic and the entries have the standard deviation s.

    Invariant to rotations of θ in expectation. To rescaling around a ReLU only with ``radius="filter"``.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        sigma: Size of the noise.
        num_samples: Independent directions, two losses each.
        generator: Source of the directions; equal seeds give common random numbers.
        radius: Unit of ``sigma``.
        centre: Loss at θ, where known.

    Raises:
        ValueError: ``sigma`` or ``num_samples`` is not positive.
    """
    scale = deviations(theta, radius, objective.layout)
    return _under_noise(objective, theta, sigma, scale, num_samples, generator, centre, kind=radius)


def average_adaptive(
    objective: Objective,
    theta: Tensor,
    sigma: float,
    num_samples: int,
    generator: torch.Generator,
    *,
    centre: Centre | None = None,
) -> Measured:
    """E L(θ + ε) − L(θ) over ε ~ N(0, σ² diag θ²), an expected norm of σ‖θ‖ (arXiv 2302.07011).

    ½ σ² Σ H_ii θ_i² where L is quadratic. Zeros of θ stay. Invariant to rescalings of θ that leave the network's
    function as it is, such as w₁ → cw₁, w₂ → w₂/c with c > 0 around a ReLU, for every single draw.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        sigma: Standard deviation of the relative changes.
        num_samples: Independent directions, two losses each.
        generator: Source of the directions; equal seeds give common random numbers.
        centre: Loss at θ, where known.

    Raises:
        ValueError: ``sigma`` or ``num_samples`` is not positive.
    """
    return _under_noise(objective, theta, sigma, theta.abs(), num_samples, generator, centre, kind="weight")


def random_max(
    objective: Objective,
    theta: Tensor,
    r: float = 0.02,
    num_draws: int = 20,
    *,
    generator: torch.Generator,
    radius: Radius = "relative",
    centre: Centre | None = None,
) -> Measured:
    """max(0, max_s L(θ + δ_s) − L(θ)) over draws δ_s uniform on the sphere ‖δ‖ = r‖θ‖.

    From below, and the more so the fewer draws: a random direction meets little of the largest curvature. Relative
    radii make it invariant to θ → cθ where the network is; rescaling around a ReLU moves it unless
    ``radius="filter"``.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        r: Radius of the sphere.
        num_draws: Independent draws, a loss each.
        generator: Source of the draws.
        radius: Unit of ``r``; with ``"filter"`` each filter's part has the norm r‖w_f‖.
        centre: Loss at θ, where known.

    Raises:
        ValueError: ``r`` or ``num_draws`` is not positive.
    """
    require_positive(r=r, num_draws=num_draws)
    loss = (centre or objective.evaluate(theta)).loss
    draws = (theta + r * d for d in _directions(objective, theta, radius, num_draws, generator))
    rises = [evaluation.loss - loss for evaluation in objective.evaluate_many(draws)]
    largest = math.nan if any(map(math.isnan, rises)) else max(0.0, *rises)
    flags = nonfinite(all(map(math.isfinite, rises)))
    details = {"radius_kind": radius}
    return Measured(largest, r, num_losses=num_draws, num_samples=num_draws, flags=flags, details=details)


def flatness_profile(
    objective: Objective,
    theta: Tensor,
    radii: Sequence[float] = RADII,
    num_samples: int = 8,
    *,
    generator: torch.Generator,
    radius: Radius = "relative",
    centre: Centre | None = None,
) -> tuple[list[Measured], list[Measured]]:
    """The mean rise of loss and error over directions uniform on spheres around θ, one of each per radius.

    The first list is the flatness profile, larger is sharper: r²‖θ‖² tr H/(2P) where L is quadratic. The second is the
    loss of accuracy (``noise_robustness`` at the first radius), empty where the step is no classifier's. Directions are
    shared by all radii and taken both ways; standard errors are over the pairs. Invariant as :func:`random_max` is.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        radii: Radii of the spheres.
        num_samples: Independent directions, two losses each at each radius.
        generator: Source of the directions; equal seeds give common random numbers.
        radius: Unit of ``radii``; with ``"filter"`` each filter's part has the norm r‖w_f‖.
        centre: Loss at θ, where known.

    Raises:
        ValueError: a radius or ``num_samples`` is not positive.
    """
    require_positive(num_samples=num_samples, **{f"radii[{i}]": r for i, r in enumerate(radii)})
    known = centre or objective.evaluate(theta)
    directions = _directions(objective, theta, radius, num_samples, generator)
    steps = (r * direction for direction in directions for r in radii)
    losses, errors = _both_ways(objective, theta, steps).reshape(2, num_samples, len(radii)).mT
    common = {"num_losses": 2 * num_samples, "details": {"radius_kind": radius}}
    rises = [mean_of(row - known.loss, radius=r, **common) for r, row in zip(radii, losses, strict=True)]
    if known.error is None:
        return rises, []
    lost = [mean_of(row - known.error, radius=r, unit="", **common) for r, row in zip(radii, errors, strict=True)]
    return rises, lost


def _under_noise(
    objective: Objective,
    theta: Tensor,
    sigma: float,
    scale: Tensor,
    num_samples: int,
    generator: torch.Generator,
    centre: Centre | None,
    kind: str,
) -> Measured:
    require_positive(sigma=sigma, num_samples=num_samples)
    loss = (centre or objective.evaluate(theta)).loss
    draws = (gaussian(theta.numel(), generator).to(theta) for _ in range(num_samples))
    rises = _both_ways(objective, theta, (draw.mul_(sigma * scale) for draw in draws))[0] - loss
    expected = sigma * norm(scale.expand_as(theta))
    details = {"radius_kind": kind, "expected_norm": expected}
    return mean_of(rises, radius=sigma, num_losses=2 * num_samples, details=details)


def _both_ways(objective: Objective, theta: Tensor, steps: Iterable[Tensor]) -> Tensor:
    """The means of loss and of error ``(2, n)`` at θ + step and θ − step; an error that is unknown is NaN."""
    passes = objective.evaluate_many(point for step in steps for point in (theta + step, theta - step))
    values = [(p.loss, math.nan if p.error is None else p.error) for p in passes]
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 2, 2).mean(1).T


def _directions(
    objective: Objective, theta: Tensor, radius: Radius, number: int, generator: torch.Generator
) -> Iterator[Tensor]:
    for _ in range(number):
        yield on_sphere(gaussian(theta.numel(), generator).to(theta), theta, radius, objective.layout)
