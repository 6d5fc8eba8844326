"""Sharpness of the loss while a network trains."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.visits.common import Common, Unpack
from lmc_lightning.callbacks.visits.last_step import LastSteps
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.core.chunks import are_cut
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.structure import leading_size
from lmc_lightning.landscape.sharpness.family import (
    CHUNK_MEASURES,
    DEFAULT_MEASURES,
    Direction,
    SharpnessSettings,
    require_known,
    sharpness,
)
from lmc_lightning.landscape.sharpness.flatness import RADII
from lmc_lightning.landscape.sharpness.logits import with_normalized_logits
from lmc_lightning.landscape.sharpness.measured import Measured
from lmc_lightning.landscape.sharpness.perturbations import Radius
from lmc_lightning.loggers import Band, Chart
from lmc_lightning.recording import Measurement, Quantity, Status

RISES = ("worst_case", "adaptive", "average", "adaptive_linf", "m_sharpness", "random_max", "average_adaptive")
"""Measures in units of the loss."""

OTHERS = {
    "gradient_norm": "norm of the gradient",
    "gradient_norm_rms": "norm of the gradients of chunks",
    "keskar": "rise in Keskar's box [%]",
    "noise_robustness": "loss of accuracy by noise",
    "critical_sharpness": "critical sharpness 2/η",
}
"""Measures in units of their own, each with a chart of its own."""


class Sharpness(MeasurementCallback):
    """How far the mean training loss rises near θ: in the worst case, under relative changes, on average, and more.

    The same probe examples before and after, and the same random directions at every visit and in every branch; they
    depend on ``seed`` and the measure alone. The default four cost ``num_steps`` gradients and ``2 + num_steps +
    2 · num_samples`` losses over the probe set; the right column says what each further one adds (G gradients, F
    losses, n = ``num_samples``). Under w₁ → cw₁, w₂ → w₂/c around a ReLU, measures marked ● do not change, those marked
    ○ do not with ``radius="filter"``, and λ_max and all others do.

    ==================================  ===============================================================================
    ``sharpness/worst_case``            ○ max of L(θ+ε) − L(θ) over ‖ε‖₂ ≤ ρ, from below by ascent (one step is SAM's)
    ``sharpness/adaptive``              ● the same over ‖ε/abs(θ)‖₂ ≤ ρ, one step (ASAM's)
    ``sharpness/average``               ○ mean of L(θ+ε) − L(θ) over Gaussian ε, with ``_stderr`` over directions
    ``sharpness/gradient_norm``         ‖∇L(θ)‖₂ of the whole probe set
    ``sharpness/adaptive_linf``         ● the worst case over ‖ε/abs(θ)‖_∞ ≤ ρ: 1 F a step
    ``sharpness/m_sharpness``           ○ mean over chunks of m examples of the chunk's own worst case: 1 G, 2 F; with
                                        its ``_stderr`` over chunks
    ``sharpness/keskar``                100·(max L − L)/(1 + L) [%] in the box abs(ε_i) ≤ c(abs(θ_i) + 1): ≤ 10 G, 10 F
    ``sharpness/random_max``            ○ largest rise among 20 draws on the sphere ‖δ‖ = .02‖θ‖, at least 0: 20 F
    ``sharpness/average_adaptive``      ● mean rise over ε ~ N(0, σ² diag θ²): 2n F; with ``_stderr`` over directions
    ``sharpness/flatness_profile/r_k``  ○ mean rise on spheres of 1 to 5 % of ‖θ‖, k = 1 to 5: 10n F; with ``_stderr``
                                        over directions
    ``sharpness/noise_robustness``      ○ loss of accuracy on the first of these spheres: 2n F, or none beside the
                                        profile; with ``_stderr`` over directions
    ``sharpness/critical_sharpness``    2/η_c, η_c the smallest step along the gradient at which L has risen: 10–40 F;
                                        with ``direction="update"`` the key ends in /update
    ``sharpness/gradient_norm_rms``     √ of the mean of ‖g‖² over chunks: 1 G; with ``_stderr`` over chunks
    ==================================  ===============================================================================

    Losses that are not finite, stationary points and searches without result are named in ``flags`` of the record. With
    ``logit_normalized=True`` the keys end in ``/logit_normalized``.

    Sources: arXiv 2010.01412 (worst case, m-sharpness), 2102.11600 (adaptive), 2302.07011 (adaptive on average and in
    the maximum norm, normalised logits), 1609.04836 (Keskar et al.), 2601.16979 (critical sharpness).

    Args:
        measures: what to measure, by the names in the table.
        radius: unit of the radii: ``"absolute"``, ``"relative"`` to ‖θ‖, or ``"filter"``, relative to the norm of each
            filter. By default absolute for ``rho``, relative for ``sigma``, ``max_radius`` and ``radii``.
        rho: radius of ``worst_case`` and ``m_sharpness``.
        adaptive_rho: radius of ``adaptive``, in relative changes.
        num_steps: ascent steps of ``worst_case``, ``m_sharpness`` and ``adaptive_linf``.
        sigma: size of the noise of ``average`` (absolute: its standard deviation; else its expected norm) and of the
            relative changes of ``average_adaptive``.
        num_samples: random directions of each mean, each taken both ways; 8 or more for intervals.
        linf_rho: radius of ``adaptive_linf``.
        m: examples a chunk of ``m_sharpness`` and ``gradient_norm_rms``.
        box: half the width of Keskar's box.
        max_radius: radius of ``random_max``.
        num_draws: draws of ``random_max``.
        radii: of ``flatness_profile``; ``noise_robustness`` is taken at the first.
        direction: of ``critical_sharpness``: ``"gradient"``, or ``"update"``, the optimizer's step that led here, from
            where it was taken and in units of itself, so that above 2 it was too long; 1 G more, and a copy of θ
            before each step that is visited.
        eta_max: longest step of ``critical_sharpness``, beyond which it is censored; by default ten times ‖θ‖ long.
        logit_normalized: measure the loss of logits divided by their standard deviation, each example by its own.
            For losses that are one mean by ``F.cross_entropy``; a visit fails with the reason elsewhere.
        **common: see :class:`MeasurementCallback`.
    """

    kind = "sharpness"
    advice = "Raise eta_max."
    min_effort = 0.25

    def __init__(
        self,
        measures: Sequence[str] = DEFAULT_MEASURES,
        *,
        radius: Radius | None = None,
        rho: float = 0.05,
        adaptive_rho: float = 0.5,
        num_steps: int = 1,
        sigma: float = 0.01,
        num_samples: int = 8,
        linf_rho: float = 0.005,
        m: int = 128,
        box: float = 1e-3,
        max_radius: float = 0.02,
        num_draws: int = 20,
        radii: Sequence[float] = RADII,
        direction: Direction = "gradient",
        eta_max: float | None = None,
        logit_normalized: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        require_known(measures)
        if m < 1:
            raise ValueError(f"Expected m ≥ 1 examples a chunk, got {m}.")
        self.measures, self.m, self.logit_normalized = tuple(measures), m, logit_normalized
        self.settings = SharpnessSettings(
            radius=radius,
            rho=rho,
            adaptive_rho=adaptive_rho,
            num_steps=num_steps,
            sigma=sigma,
            num_samples=num_samples,
            linf_rho=linf_rho,
            box=box,
            max_radius=max_radius,
            num_draws=num_draws,
            radii=tuple(radii),
            direction=direction,
            eta_max=eta_max,
        )
        self._last_steps = LastSteps(self.parameters)

    def measure(self, visit: Visit) -> Measurement:
        """The sharpness at this visit."""
        objective = chunked = visit.objective
        if self.logit_normalized:
            objective = chunked = self._recut(visit, leading_size(objective.batches[0]))
        by_chunks = set(self.measures) & set(CHUNK_MEASURES)
        if by_chunks and not objective.collective.everywhere(are_cut(objective.batches, self.m)):
            chunked = self._recut(visit, self.m)
        result = sharpness(
            objective,
            visit.theta,
            self.measures,
            replace(self.settings, num_samples=visit.scaled(self.settings.num_samples)),
            seed=self.seed,
            chunked=chunked,
            before=self._last_steps.take(visit.step, visit.theta),
            progress=visit.progress,
        )
        return Measurement(
            tuple(self._quantity(name, found) for name, found in result.measures.items()),
            evidence={"num_matvecs": 0, "num_gradients": result.num_gradients, "num_losses": result.num_losses},
        )

    def charts(self) -> list[Chart | Band]:
        """The rises of the loss together, and the average one with its error."""
        end = "/logit_normalized" if self.logit_normalized else ""
        rises = tuple(self.tag(f"{name}{end}") for name in self.measures if name in RISES)
        charts: list[Chart | Band] = [Chart("rise of the loss near θ", rises)] if rises else []
        if "average" in self.measures:
            charts.append(Band("average rise", self.key(f"average{end}")))
        if "flatness_profile" in self.measures:
            charts.append(Chart("mean rise at growing radii", (self.tag(rf"flatness_profile/r_\d+{end}"),)))
        others = [name for name in OTHERS if name in self.measures]
        return [*charts, *(Chart(OTHERS[name], (self.tag(f"{name}(/update)?{end}"),)) for name in others)]

    def _quantity(self, name: str, found: Measured) -> Quantity:
        key = self.key(f"{name}/logit_normalized" if self.logit_normalized else name)
        evidence = found.evidence() | ({"m": self.m} if name in CHUNK_MEASURES else {})
        status: Status = "ok" if found.converged else "not_converged"
        return Quantity(key, found.value, found.stderr, unit=found.unit, evidence=evidence, status=status)

    def _recut(self, visit: Visit, chunk_size: int | None) -> Objective:
        """The visit's loss once more, in other chunks, or of normalised logits."""
        wrap = with_normalized_logits if self.logit_normalized else None
        return visit.loss_on(visit.objective.batches, chunk_size=chunk_size, wrap=wrap)

    def forget(self) -> None:
        """Forget the steps of another run too."""
        super().forget()
        self._last_steps = LastSteps(self.parameters)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the parameters before a step that will be visited."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        wanted = self.settings.direction == "update" and "critical_sharpness" in self.measures
        if wanted and self.leads_to_a_visit(trainer):
            self._last_steps.keep(self._step + 1, pl_module)
