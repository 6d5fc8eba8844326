"""The whole family of sharpness measures at one point, from one shared gradient."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

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
from lmc_lightning.landscape.sharpness.flatness import RADII, average, average_adaptive, flatness_profile, random_max
from lmc_lightning.landscape.sharpness.measured import Centre, Measured, centre_at, gradient_norm
from lmc_lightning.landscape.sharpness.perturbations import Radius
from lmc_lightning.types import Progress

DEFAULT_MEASURES = ("worst_case", "adaptive", "average", "gradient_norm")
CHUNK_MEASURES = ("m_sharpness", "gradient_norm_rms")
"""Means over chunks: their objective is to be cut into chunks of m examples."""
MEASURES = (
    "worst_case",
    "adaptive",
    "adaptive_linf",
    "m_sharpness",
    "keskar",
    "random_max",
    "average",
    "average_adaptive",
    "flatness_profile",
    "noise_robustness",
    "critical_sharpness",
    "gradient_norm",
    "gradient_norm_rms",
)
Direction: TypeAlias = Literal["gradient", "update"]
"""Along what ``critical_sharpness`` looks: the gradient at θ, or the optimizer's step that led to θ, from its start."""

NO_ERROR = "no_error"
"""Flag: the step is no classifier's, so that there is no accuracy to lose."""
NO_UPDATE = "no_update"
"""Flag: no optimizer step is known that led to θ."""


@dataclass(frozen=True)
class SharpnessSettings:
    """Radii and numbers of samples of all measures: the arguments of :class:`lmc_lightning.Sharpness`."""

    radius: Radius | None = None
    rho: float = 0.05
    adaptive_rho: float = 0.5
    num_steps: int = 1
    sigma: float = 0.01
    num_samples: int = 8
    linf_rho: float = 0.005
    box: float = 1e-3
    max_radius: float = 0.02
    num_draws: int = 20
    radii: Sequence[float] = RADII
    direction: Direction = "gradient"
    eta_max: float | None = None

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise ValueError(f"Expected direction to be 'gradient' or 'update', got {self.direction!r}.")
        if self.radius not in (None, *get_args(Radius)):
            raise ValueError(f"Expected radius to be 'absolute', 'relative', 'filter' or None, got {self.radius!r}.")
        names = ("rho", "adaptive_rho", "sigma", "linf_rho", "box", "max_radius", "eta_max")
        sizes = {name: getattr(self, name) for name in names} | {f"radii[{i}]": r for i, r in enumerate(self.radii)}
        wrong = {name: size for name, size in sizes.items() if size is not None and not size > 0}
        if wrong or not self.radii:
            raise ValueError(f"Expected positive radii, got {wrong or 'none'}.")
        if self.num_steps < 1 or self.num_samples < 2 or self.num_draws < 1:
            raise ValueError(
                f"Expected num_steps ≥ 1, num_samples ≥ 2 (for an error) and num_draws ≥ 1, got {self.num_steps}, "
                f"{self.num_samples} and {self.num_draws}."
            )


@dataclass(frozen=True)
class SharpnessResult:
    """Measures of sharpness at one θ, on the same probe set and from one shared gradient.

    Attributes:
        measures: By name, in the order that was asked for; the flatness profile as ``"flatness_profile/r_1"`` and on.
        num_gradients: Gradients of the whole probe set, all of them.
        num_losses: Losses of the whole probe set, all of them.
    """

    measures: Mapping[str, Measured]
    num_gradients: int
    num_losses: int

    def __getitem__(self, name: str) -> Measured:
        return self.measures[name]


def sharpness(
    objective: Objective,
    theta: Tensor,
    measures: Sequence[str] = DEFAULT_MEASURES,
    settings: SharpnessSettings | None = None,
    *,
    seed: int = 0,
    chunked: Objective | None = None,
    before: Tensor | None = None,
    progress: Progress | None = None,
) -> SharpnessResult:
    """Several measures of sharpness at θ.

    Random directions follow from ``seed`` and the measure's name alone: equal seeds compare points under common random
    numbers, and a measure's number does not depend on which others are taken with it. ``flatness_profile`` and
    ``noise_robustness`` share their directions, and so their losses.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        measures: Names out of :data:`MEASURES`.
        settings: Radii and numbers of samples.
        seed: Of all random directions.
        chunked: The same loss cut into the chunks that :data:`CHUNK_MEASURES` are means over; by default ``objective``.
        before: θ ``(P,)`` before the optimizer's last step, for ``direction="update"``.
        progress: Told after each measure.

    Raises:
        ValueError: An unknown measure, or a radius or number that is not positive.
    """
    require_known(measures)
    centre = centre_at(objective, theta)
    family = _Family(
        objective, theta, measures, settings or SharpnessSettings(), seed, chunked or objective, before, centre
    )
    found: dict[str, Measured] = {}
    for done, name in enumerate(measures, start=1):
        value: Measured | dict[str, Measured] = getattr(family, name)()
        found |= {name: value} if isinstance(value, Measured) else value
        if progress is not None:
            progress(done, len(measures), name)
    return SharpnessResult(
        found,
        num_gradients=1 + sum(m.num_gradients for m in found.values()),
        num_losses=1 + sum(m.num_losses for m in found.values()),
    )


def require_known(measures: Sequence[str]) -> None:
    """Refuse names that are no measures, and none at all.

    Raises:
        ValueError: there is one, or no name.
    """
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures or isinstance(measures, str):
        raise ValueError(f"Expected measures to list some of {', '.join(MEASURES)}, got {measures!r}.")


@dataclass(frozen=True)
class _Family:
    """One method for each name in :data:`MEASURES`."""

    objective: Objective
    theta: Tensor
    measures: Sequence[str]
    settings: SharpnessSettings
    seed: int
    chunked: Objective
    before: Tensor | None
    centre: Centre

    @property
    def ball(self) -> Radius:
        return self.settings.radius or "absolute"

    @property
    def noise(self) -> Radius:
        return self.settings.radius or "relative"

    def stream(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, "sharpness", name))

    def worst_case(self) -> Measured:
        s = self.settings
        return worst_case(self.objective, self.theta, s.rho, s.num_steps, radius=self.ball, centre=self.centre)

    def adaptive(self) -> Measured:
        return adaptive(self.objective, self.theta, self.settings.adaptive_rho, centre=self.centre)

    def adaptive_linf(self) -> Measured:
        s = self.settings
        return adaptive_linf(self.objective, self.theta, s.linf_rho, s.num_steps, centre=self.centre)

    def m_sharpness(self) -> Measured:
        return m_sharpness(self.chunked, self.theta, self.settings.rho, self.settings.num_steps, radius=self.ball)

    def keskar(self) -> Measured:
        return keskar(self.objective, self.theta, self.settings.box, centre=self.centre)

    def random_max(self) -> Measured:
        s, generator = self.settings, self.stream("random_max")
        common: dict[str, Any] = {"generator": generator, "radius": self.noise, "centre": self.centre}
        return random_max(self.objective, self.theta, s.max_radius, s.num_draws, **common)

    def average(self) -> Measured:
        s, generator = self.settings, self.stream("average")
        common: dict[str, Any] = {"radius": self.noise, "centre": self.centre}
        return average(self.objective, self.theta, s.sigma, s.num_samples, generator, **common)

    def average_adaptive(self) -> Measured:
        s, generator = self.settings, self.stream("average_adaptive")
        return average_adaptive(self.objective, self.theta, s.sigma, s.num_samples, generator, centre=self.centre)

    def flatness_profile(self) -> dict[str, Measured]:
        return {f"flatness_profile/r_{i}": found for i, found in enumerate(self.profile[0], start=1)}

    def noise_robustness(self) -> Measured:
        losses, errors = self.profile
        if not errors:
            return Measured(math.nan, flags=(NO_ERROR,), unit="")
        return replace(errors[0], num_losses=0 if "flatness_profile" in self.measures else losses[0].num_losses)

    @cached_property
    def profile(self) -> tuple[list[Measured], list[Measured]]:
        s = self.settings
        radii = s.radii if "flatness_profile" in self.measures else s.radii[:1]
        common: dict[str, Any] = {"generator": self.stream("sphere"), "radius": self.noise, "centre": self.centre}
        return flatness_profile(self.objective, self.theta, radii, s.num_samples, **common)

    def critical_sharpness(self) -> dict[str, Measured]:
        eta_max = self.settings.eta_max
        if self.settings.direction == "gradient":
            found = critical_sharpness(self.objective, self.theta, eta_max=eta_max, centre=self.centre)
            return {"critical_sharpness": found}
        if self.before is None:
            return {"critical_sharpness/update": Measured(math.nan, flags=(NO_UPDATE,), unit="1/step")}
        found = critical_sharpness(self.objective, self.before, self.before - self.theta, eta_max=eta_max)
        # It looks from another point, whose loss and gradient nothing else shares.
        spent = replace(found, num_gradients=found.num_gradients + 1, num_losses=found.num_losses + 1)
        return {"critical_sharpness/update": spent}

    def gradient_norm(self) -> Measured:
        return gradient_norm(self.objective, self.theta, centre=self.centre)

    def gradient_norm_rms(self) -> Measured:
        return gradient_norm_rms(self.chunked, self.theta)
