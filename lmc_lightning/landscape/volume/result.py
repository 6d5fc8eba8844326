"""The volume of low loss around a network: what set it is of, and all that its radii say."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import lgamma, log, nan, pi, sqrt
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lmc_lightning.landscape.sharpness.measured import require_positive

Threshold: TypeAlias = Literal["absolute", "rise"]
VolumeMetric: TypeAlias = Literal["loss", "accuracy"]
Coordinates: TypeAlias = Literal["plain", "filter"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MIN_EFFECTIVE = 8
"""Fewer effective directions give no standard error of log E r^P."""


@dataclass(frozen=True)
class VolumeSettings:
    """What set of points is measured, and how.

    Attributes:
        thresholds: τ, of the loss, or accuracies.
        threshold: ``"absolute"`` {L ≤ τ}, or ``"rise"`` {L ≤ L(θ) + τ}; of the accuracy {acc ≥ τ} and {acc ≥ acc(θ) −
            τ}.
        metric: ``"loss"`` or ``"accuracy"``.
        coordinates: ``"plain"``: ε = r u, u uniform on the unit sphere; ``"filter"``: ε = r s ⊙ u, s the norm of the
            weight's filter, 1 for biases and other vectors (and for filters of norm 0).
        num_directions: n.
        r_max: rays longer than that are censored, in units of ‖θ‖ (``"plain"``) or of √P (``"filter"``).
        rtol: relative tolerance of a radius.
        seed: of the directions, which equal seeds share in every model with as many parameters.
        num_checked: of so many directions the stretch before the exit is looked at, at ``num_inner`` points each.
        num_inner: see there.
    """

    thresholds: tuple[float, ...] = (0.1,)
    threshold: Threshold = "absolute"
    metric: VolumeMetric = "loss"
    coordinates: Coordinates = "plain"
    num_directions: int = 500
    r_max: float = 100.0
    rtol: float = 1e-3
    seed: int = 0
    num_checked: int = 8
    num_inner: int = 8

    def __post_init__(self) -> None:
        """Refuse what defines no volume.

        Raises:
            ValueError: unknown names, no thresholds, or numbers that are not positive.
        """
        for name, choice in (("threshold", Threshold), ("metric", VolumeMetric), ("coordinates", Coordinates)):
            if getattr(self, name) not in get_args(choice):
                raise ValueError(f"Expected {name} to be one of {get_args(choice)}, got {getattr(self, name)!r}.")
        if not self.thresholds:
            raise ValueError("Expected at least one threshold, e.g. thresholds=(0.1,).")
        positive = {f"thresholds[{i}]": tau for i, tau in enumerate(self.thresholds)}
        require_positive(num_directions=self.num_directions, r_max=self.r_max, rtol=self.rtol, **positive)

    def with_directions(self, number: int) -> "VolumeSettings":
        """The same set along so many of the directions."""
        return replace(self, num_directions=number)


@dataclass(frozen=True)
class Volume:
    """The volume of {L ≤ τ} that is seen from θ along straight rays.

    Attributes:
        tau: the threshold.
        settings: what set it is.
        level: L(θ), or the accuracy.
        radii: r(u) of each direction, in the coordinates that were chosen, ``(n,)`` float64; zeros where ``cutoff``.
        censored: which rays were still inside at ``r_max``, ``(n,)``.
        num_params: P.
        log_jacobian: Σ_i log s_i, of filter coordinates; 0 of plain ones.
        cutoff: θ itself is not inside, and the volume is 0.
        converged: whether every radius reached its tolerance.
        num_losses: forward passes over the probe set, all thresholds together.
        num_reentrant: of the directions that were looked at, those that leave the set before the exit that was found;
            these have the earlier exit.
        num_checked: how many were.
    """

    tau: float
    settings: VolumeSettings
    level: float
    radii: Tensor = field(repr=False)
    censored: Tensor = field(repr=False)
    num_params: int
    log_jacobian: float = 0.0
    cutoff: bool = False
    converged: bool = True
    num_losses: int = 0
    num_reentrant: int = 0
    num_checked: int = 0

    def __repr__(self) -> str:
        if self.cutoff:
            return f"Volume(τ = {self.tau:g}: θ is not inside)"
        rays = f"{len(self.radii)} rays, {self.fraction_censored:.0%} censored"
        return f"Volume(τ = {self.tau:g}: log volume {self.log_volume:.5g}, {rays})"

    @property
    def log_ball(self) -> float:
        """Log volume of the unit ball in P dimensions, ½P log π − log Γ(½P + 1)."""
        return 0.5 * self.num_params * log(pi) - lgamma(0.5 * self.num_params + 1)

    @cached_property
    def _log_radii(self) -> Tensor:
        return self.radii.log()

    @property
    def log_mean_r_pow(self) -> float:
        """Log E r^P over directions, in the coordinates that were chosen; −∞ where ``cutoff``.

        Carried by the longest few rays when P is large: see ``effective_sample_size``.
        """
        return float(torch.logsumexp(self.num_params * self._log_radii, 0)) - log(len(self.radii))

    @property
    def log_volume(self) -> float:
        """Euclidean, in nats: log V_ball(P) + log E r^P, plus Σ log s in filter coordinates. A lower one if censored.

        Not invariant to rescaling around a ReLU, whatever the coordinates: these only change the directions.
        """
        return self.log_ball + self.log_mean_r_pow + self.log_jacobian

    @property
    def log_volume_normalised(self) -> float:
        """Log V_ball(P) + log E r^P in filter coordinates, without their Jacobian; NaN of plain ones.

        Invariant to rescaling around a ReLU of weights without biases.
        """
        return self.log_ball + self.log_mean_r_pow if self.settings.coordinates == "filter" else nan

    @property
    def log_volume_bound(self) -> float:
        """A lower bound of ``log_volume`` by Jensen: log V_ball(P) + P E log r (+ Σ log s), a mean over all rays."""
        return self.log_ball + self.num_params * self.mean_log_r + self.log_jacobian

    @property
    def mean_log_r(self) -> float:
        """E log r, the log of the geometric mean radius."""
        return float(self._log_radii.mean())

    @property
    def mean_log_r_stderr(self) -> float:
        """Standard error of E log r over directions; P times that of ``log_volume_bound``."""
        return float(self._log_radii.std()) / sqrt(len(self.radii)) if len(self.radii) > 1 and not self.cutoff else nan

    @property
    def effective_sample_size(self) -> float:
        """(Σ r^P)² / Σ r^2P: how many directions carry E r^P; 0 where ``cutoff``."""
        if self.cutoff:
            return 0.0
        powers = self.num_params * self._log_radii
        return float((2 * torch.logsumexp(powers, 0) - torch.logsumexp(2 * powers, 0)).exp())

    @property
    def log_mean_r_pow_stderr(self) -> float:
        """Standard error of log E r^P over directions, √((1/ESS − 1/n) n/(n − 1)); NaN below 8 effective directions."""
        size, effective = len(self.radii), self.effective_sample_size
        if effective < MIN_EFFECTIVE:
            return nan
        return sqrt(max(0.0, 1 / effective - 1 / size) * size / (size - 1))

    @property
    def fraction_censored(self) -> float:
        """Share of rays that were still inside at ``r_max``."""
        return float(self.censored.double().mean())

    def quantiles(self, shares: Sequence[float] = QUANTILES) -> Tensor:
        """Of the radii."""
        return self.radii.quantile(torch.tensor(shares, dtype=torch.float64))

    def evidence(self) -> dict[str, Any]:
        """What a record says of the numbers beside their values and errors."""
        return {
            "tau": self.tau,
            "level": self.level,
            "threshold": self.settings.threshold,
            "metric": self.settings.metric,
            "coordinates": self.settings.coordinates,
            "num_directions": len(self.radii),
            "quantiles": dict(zip(map(str, QUANTILES), self.quantiles().tolist(), strict=True)),
            "log_jacobian": self.log_jacobian,
            "num_reentrant": self.num_reentrant,
            "num_checked": self.num_checked,
        }

    def of(self, directions: Tensor) -> "Volume":
        """The volume from some of the directions only, by index ``(m,)``."""
        return replace(self, radii=self.radii[directions], censored=self.censored[directions])
