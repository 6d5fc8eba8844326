"""The volume of low loss around a network while it trains."""

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.visits.common import Common, Unpack
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.landscape.volume.estimate import minimum_volumes
from lmc_lightning.landscape.volume.result import Coordinates, Threshold, Volume, VolumeMetric, VolumeSettings
from lmc_lightning.loggers import Band, Chart
from lmc_lightning.plotting.style import deferred
from lmc_lightning.plotting.volume import plot_radii
from lmc_lightning.recording import Measurement, Quantity

if TYPE_CHECKING:
    pass


class MinimaVolume(MeasurementCallback):
    """How large the set of parameters around θ is whose loss is at or below a threshold τ (in nats: log volume).

    r(u) is where the ray from θ in a random direction u leaves the set, and log V = log V_ball(P) + log E r^P. The
    directions are the same at every visit and in every run with as many parameters and the same ``seed``. Costs about 3
    forward passes over the probe set a direction for one threshold and 2 for each further one. E r^P is carried by the
    longest few rays: read ``mean_log_r``, a mean over all of them, beside it.

    Each key ends in ``/tau_{τ}``, and then in the name of an instance:

    ====================================  =============================================================================
    ``volume/log_volume``                 log V [nats], a lower one where rays are censored
    ``volume/log_volume_bound``           log V_ball + P · E log r (+ the Jacobian) ≤ log V, ``_stderr`` over directions
    ``volume/log_volume_normalised``      with ``coordinates="filter"``: log V in units of each filter's norm, invariant
                                          to rescaling around a ReLU of weights without biases
    ``volume/log_mean_r_pow``             log E r^P alone, ``_stderr`` where 8 directions or more carry it
    ``volume/mean_log_r``                 E log r, ``_stderr`` over directions
    ``volume/radius_median``              median of r
    ``volume/effective_sample_size``      how many directions carry E r^P
    ``volume/fraction_censored``          share of the rays that are still inside at ``r_max``
    ``volume/cutoff``                     1 where θ itself is not inside: the volume is 0 and nothing else is logged
    ``volume/radii``                      figure: distribution of r for each threshold
    ====================================  =============================================================================

    Args:
        thresholds: τ, of the loss or of the accuracy.
        threshold: ``"absolute"`` {L ≤ τ}, or ``"rise"`` {L ≤ L(θ) + τ}; of the accuracy {acc ≥ τ}, {acc ≥ acc(θ) − τ}.
        metric: ``"loss"`` or ``"accuracy"`` (about 10 passes a direction).
        coordinates: ``"plain"``, or ``"filter"``: directions in units of the norm of each filter.
        num_directions: rays.
        r_max: longest ray, in units of ‖θ‖ (``"plain"``) or √P (``"filter"``).
        rtol: relative tolerance of a radius.
        **common: see :class:`MeasurementCallback`.

    Raises:
        ValueError: unknown names or numbers that are not positive.
    """

    kind = "volume"
    min_effort = 0.25
    advice = "Some rays are too rough for the search; the loss may not be finite near θ."

    def __init__(
        self,
        thresholds: Sequence[float] = (0.1,),
        *,
        threshold: Threshold = "absolute",
        metric: VolumeMetric = "loss",
        coordinates: Coordinates = "plain",
        num_directions: int = 100,
        r_max: float = 100.0,
        rtol: float = 1e-3,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        self.settings = VolumeSettings(
            tuple(thresholds),
            threshold,
            metric,
            coordinates,
            num_directions=num_directions,
            r_max=r_max,
            rtol=rtol,
            seed=self.seed,
        )

    def measure(self, visit: Visit) -> Measurement:
        """The volumes at this visit."""
        settings = self.settings.with_directions(visit.scaled(self.settings.num_directions))
        volumes = minimum_volumes(visit.objective, visit.theta, settings, progress=visit.progress)
        inside = {tau: volume for tau, volume in volumes.items() if not volume.cutoff}
        name, title = self.key("radii"), f"Radii of low loss after epoch {visit.epoch}"
        return Measurement(
            tuple(q for volume in volumes.values() for q in self._quantities(volume)),
            evidence={
                "num_matvecs": 0,
                "num_gradients": 0,
                "num_losses": max(volume.num_losses for volume in volumes.values()),
            },
            figures={name: deferred(plot_radii, inside, title=title)} if inside else {},
            arrays={name: {f"tau_{tau:g}": volume.radii.numpy() for tau, volume in inside.items()}} if inside else {},
        )

    def charts(self) -> list[Chart | Band]:
        """Log volume, its bound and the mean log radius with their errors, and all thresholds together."""
        bands = [("log volume", "log_volume"), ("bound of it", "log_volume_bound"), ("mean log radius", "mean_log_r")]
        taus = [f"tau_{tau:g}" for tau in self.settings.thresholds]
        together = [
            ("log volume in units of filters", "log_volume_normalised"),
            ("log mean r^P", "log_mean_r_pow"),
            ("median radius", "radius_median"),
            ("directions that carry the volume", "effective_sample_size"),
            ("censored rays, and whether θ is outside", "(fraction_censored|cutoff)"),
        ]
        return [
            *(Band(f"{title}, τ = {tau[4:]}", self.key(f"{name}/{tau}")) for title, name in bands for tau in taus),
            *(Chart(title, (self.tag(f"{name}/tau_[^/]+"),)) for title, name in together),
        ]

    def _quantities(self, volume: Volume) -> Iterator[Quantity]:
        evidence = volume.evidence()
        yield Quantity(self._key("cutoff", volume), float(volume.cutoff), evidence=evidence)
        if volume.cutoff:
            return
        num_params = volume.num_params
        values = {
            "log_volume": (volume.log_volume, volume.log_mean_r_pow_stderr),
            "log_volume_bound": (volume.log_volume_bound, num_params * volume.mean_log_r_stderr),
            "log_volume_normalised": (volume.log_volume_normalised, volume.log_mean_r_pow_stderr),
            "log_mean_r_pow": (volume.log_mean_r_pow, volume.log_mean_r_pow_stderr),
            "mean_log_r": (volume.mean_log_r, volume.mean_log_r_stderr),
            "radius_median": (float(volume.radii.median()), None),
            "effective_sample_size": (volume.effective_sample_size, None),
            "fraction_censored": (volume.fraction_censored, None),
        }
        for name, (value, stderr) in values.items():
            if isfinite(value):
                status = "ok" if volume.converged else "not_converged"
                known = stderr if stderr is not None and isfinite(stderr) else None
                yield Quantity(self._key(name, volume), value, known, evidence=evidence, status=status)  # type: ignore[arg-type]

    def _key(self, quantity: str, volume: Volume) -> str:
        return self.key(f"{quantity}/tau_{volume.tau:g}")
