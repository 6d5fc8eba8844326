"""Volumes of low loss around a network, from radii in random directions."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from lmc_lightning.core.objective import Objective
from lmc_lightning.core.params import ParameterLayout
from lmc_lightning.core.random_vectors import derive_seed, sphere
from lmc_lightning.landscape.sharpness.perturbations import filter_norms, norm
from lmc_lightning.landscape.volume.radii import Exit, RadiusSearch, drive
from lmc_lightning.landscape.volume.result import Volume, VolumeSettings
from lmc_lightning.types import Progress

BLOCK = 8
"""Directions that are searched side by side."""

_COUNTING = 1e-9  # a share of examples is a sum of rounded weights
_START = 1e-3  # of the largest radius that is looked at


def direction(seed: int, index: int, num_params: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The direction of this number, uniform on the unit sphere ``(P,)``: a function of its arguments alone."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "direction", index))
    return sphere(num_params, generator, dtype=dtype)


def filter_scales(theta: Tensor, layout: ParameterLayout) -> Tensor:
    """s ``(P,)``: the norm of the filter that a weight belongs to, 1 for tensors of one axis and filters of norm 0."""
    norms = filter_norms(theta, layout)
    is_vector = [torch.full((size,), len(s) < 2) for s, size in zip(layout.shapes, layout.sizes, strict=True)]
    return torch.where(torch.cat(is_vector).to(norms.device) | (norms == 0), torch.ones_like(norms), norms)


def minimum_volumes(
    objective: Objective,
    theta: Tensor,
    settings: VolumeSettings | None = None,
    *,
    directions: Callable[[int], Tensor] | None = None,
    progress: Progress | None = None,
) -> dict[float, Volume]:
    """The volume of the points around θ at or below each threshold, by threshold.

    r(u) is the exit of the ray from θ in direction u, and log V = log V_ball(P) + log E r^P. Costs about 3 forward
    passes a direction for one threshold and 2 for each further one, and no memory for directions. BatchNorm's
    statistics stay as they are. Source: the minima volume of Fan et al., whose figures show log E r^P.

    Args:
        objective: the landscape.
        theta: the point ``(P,)``.
        settings: which set, and how the rays are searched.
        directions: unit vectors ``(P,)`` by number in place of :func:`direction`.
        progress: told after each direction.

    Raises:
        ValueError: an accuracy is asked for and the loss tap sees no classification.
    """
    settings = settings or VolumeSettings()
    landscape = _Landscape(objective, theta, settings)
    inside = sorted({tau for tau in settings.thresholds if landscape.limit(tau) > 0}, key=landscape.limit)
    volumes: dict[float, Volume] = {}
    if inside:
        volumes = _inside(landscape, inside, directions, progress)
    for tau in settings.thresholds:
        if tau not in volumes:
            zeros = torch.zeros(settings.num_directions, dtype=torch.float64)
            volumes[tau] = Volume(tau, settings, landscape.level, zeros, zeros > 0, len(theta), cutoff=True)
    return {tau: volumes[tau] for tau in settings.thresholds}


class _Landscape:
    """Rises of loss or error above their level at θ, along rays."""

    def __init__(self, objective: Objective, theta: Tensor, settings: VolumeSettings) -> None:
        self.objective, self.theta, self.settings = objective, theta, settings
        self.scales = filter_scales(theta, objective.layout) if settings.coordinates == "filter" else None
        self.num_losses = 0
        self._base = self.values([theta])[0]
        self.level = self._base if settings.metric == "loss" else 1 - self._base

    def limit(self, tau: float) -> float:
        """How far loss or error may rise; not positive where θ itself is outside."""
        if self.settings.metric == "loss":
            return tau - self._base if self.settings.threshold == "absolute" else tau
        allowed = 1 - tau if self.settings.threshold == "absolute" else self._base + tau
        return allowed - self._base + _COUNTING

    def values(self, thetas: list[Tensor]) -> list[float]:
        """Loss or error of several points: the one place where they are evaluated."""
        self.num_losses += len(thetas)
        found = self.objective.evaluate_many(thetas)
        if self.settings.metric == "loss":
            return [evaluation.loss for evaluation in found]
        errors = [evaluation.error for evaluation in found if evaluation.error is not None]
        if len(errors) < len(found):
            raise ValueError(
                "An accuracy is known when the step calls one of torch's classification losses, once, on all examples "
                "of the batch. Use metric='loss'."
            )
        return errors

    def rises(self, steps: Sequence[Tensor], radii: Sequence[float]) -> list[float]:
        """At θ + r · step, for each pair."""
        moved = [self.theta + radius * step for step, radius in zip(steps, radii, strict=True)]
        return [value - self._base for value in self.values(moved)]

    def step(self, unit: Tensor) -> Tensor:
        """A unit vector in the coordinates of θ."""
        unit = unit.to(self.theta)
        return unit if self.scales is None else unit * self.scales

    @property
    def unit_radius(self) -> float:
        """What ``r_max`` counts in."""
        return norm(self.theta) or 1.0 if self.scales is None else sqrt(len(self.theta))

    @property
    def log_jacobian(self) -> float:
        """Σ log s."""
        return 0.0 if self.scales is None else float(self.scales.double().log().sum())


def _inside(
    landscape: _Landscape,
    taus: list[float],
    directions: Callable[[int], Tensor] | None,
    progress: Progress | None,
) -> dict[float, Volume]:
    settings, size = landscape.settings, len(landscape.theta)
    farthest, limits = settings.r_max * landscape.unit_radius, [landscape.limit(tau) for tau in taus]
    start, smooth = _START * farthest, settings.metric == "loss"
    search = RadiusSearch(limits, start=start, r_max=farthest, rtol=settings.rtol, smooth=smooth)
    dtype = torch.promote_types(landscape.theta.dtype, torch.float32)
    found: list[list[Exit]] = []
    reentrant = [0] * len(taus)
    for block in _blocks(settings.num_directions):
        units = [direction(settings.seed, i, size, dtype) if directions is None else directions(i) for i in block]
        steps = [landscape.step(unit) for unit in units]
        exits = drive([search.ray() for _ in block], partial(_rises_of, landscape, steps))
        for index, step, own in zip(block, steps, exits, strict=True):
            checked = index < settings.num_checked
            found.append(_checked(landscape, step, own, limits, reentrant) if checked else own)
        if progress is not None:
            progress(len(found), settings.num_directions, "directions")
    return {
        tau: Volume(
            tau,
            settings,
            landscape.level,
            torch.tensor([exits[k].radius for exits in found], dtype=torch.float64),
            torch.tensor([exits[k].censored for exits in found]),
            size,
            landscape.log_jacobian,
            converged=all(exits[k].converged for exits in found),
            num_losses=landscape.num_losses,
            num_reentrant=reentrant[k],
            num_checked=min(settings.num_checked, settings.num_directions),
        )
        for k, tau in enumerate(taus)
    }


def _blocks(num_directions: int) -> Iterator[range]:
    """The first direction by itself, because the others start from what it found, then several side by side."""
    yield range(1)
    for start in range(1, num_directions, BLOCK):
        yield range(start, min(start + BLOCK, num_directions))


def _rises_of(
    landscape: _Landscape, steps: Sequence[Tensor], indices: list[int], radii: Sequence[float]
) -> list[float]:
    return landscape.rises([steps[i] for i in indices], radii)


def _checked(
    landscape: _Landscape, step: Tensor, exits: list[Exit], limits: list[float], reentrant: list[int]
) -> list[Exit]:
    """The exits, or an inner point at which the set had been left before; such are counted in ``reentrant``."""
    checked, last, number = list[Exit](), 0.0, landscape.settings.num_inner
    for k, (exit_, limit) in enumerate(zip(exits, limits, strict=True)):
        inner = [last + (exit_.radius - last) * (i + 1) / (number + 1) for i in range(number)]
        rises = landscape.rises([step] * number, inner)
        outside = [r for r, rise in zip(inner, rises, strict=True) if not rise <= limit]
        checked.append(Exit(outside[0]) if outside else exit_)
        reentrant[k] += bool(outside)
        last = exit_.radius
    return checked
