"""Trace of a symmetric operator from random probes, with an honest standard error, to a requested precision."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from scipy import special
from torch import Tensor

from lmc_lightning.linalg.lanczos import lanczos
from lmc_lightning.linalg.subspace import Deflation, dot64, orthogonalise_
from lmc_lightning.types import Matvec

MIN_PROBES = 8
"""Fewest probes that an interval is based on."""

MIN_PROBES_TO_STOP = 16
"""Fewest probes after which the estimated error may end a run: earlier stops favour samples that happen to agree."""


@dataclass(frozen=True)
class TraceEstimate:
    """An unbiased estimate of tr A.

    Attributes:
        value: The estimate.
        stderr: Its standard error over probes.
        num_probes: Random probes behind ``stderr``.
        num_matvecs: Products spent, those of a sketch included.
        converged: False if a requested precision was not reached.
    """

    value: float
    stderr: float
    num_probes: int
    num_matvecs: int
    converged: bool = True

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student-t confidence interval with n − 1 degrees of freedom.

        Raises:
            ValueError: Fewer than 8 probes.
        """
        if self.num_probes < MIN_PROBES:
            raise ValueError(f"an interval needs at least {MIN_PROBES} probes, got {self.num_probes}")
        half_width = self.half_width(confidence)
        return self.value - half_width, self.value + half_width

    def half_width(self, confidence: float = 0.95) -> float:
        """Half of the length of the ``interval``."""
        return float(special.stdtrit(self.num_probes - 1, 0.5 + confidence / 2)) * self.stderr


def trace_to_precision(
    matvec: Matvec,
    draw_probe: Callable[[], Tensor],
    *,
    tolerance: float = 0.01,
    num_sketch: int = 16,
    deflation: Deflation | None = None,
    earlier: Sequence[float] = (),
    max_products: int = 256,
    should_stop: Callable[[], bool] | None = None,
) -> TraceEstimate:
    """tr A until the half-width of its 95 % interval is ``tolerance``·|value| or less: Hutch++ on a Krylov sketch.

    The trace on a subspace is taken exactly, that on its complement by Hutchinson's estimator (Hutch++, arXiv
    2010.09649). The subspace is a Krylov space (arXiv 2205.01736): m products give m directions, the outliers of both
    ends among them, where a random sketch takes 2m. Samples are independent given the sketch, hence the t interval.
    (XTrace, arXiv 2301.07825, has correlated leave-one-out values, and intervals from their spread cover too rarely.)
    Stops on the estimated error, never because the mean has stopped moving, and not before 16 probes.

    With the stopping rule on, 95 % intervals covered in 92–95 % of 2,000 runs, and in 90–93 % where few eigenvalues
    carried the sampled part, whose samples are skewed: raise ``num_sketch`` for steep spectra.

    Args:
        matvec: The operator A.
        draw_probe: Gives a new probe ``(P,)`` at every call, independent with E vvᵀ = I (Rademacher or Gaussian).
        tolerance: Half-width of the interval relative to |value|.
        num_sketch: Dimension of the Krylov sketch, 0 for none; held in memory. Unused if ``deflation`` is given.
        deflation: What is known of A already, in place of a sketch; independent of the probes.
        earlier: Independent samples of tr A that are there already, taken under the same ``deflation``.
        max_products: Budget, sketch included; at least 8 probes are always taken.
        should_stop: Asked after every product from the eighth probe on; True ends the run with what there is.
    """
    spent = 0
    if deflation is None and num_sketch > 0:
        deflation = lanczos(matvec, draw_probe(), num_sketch).deflation()
        spent = len(deflation.values)
    samples = list(earlier)
    while True:
        if len(samples) < MIN_PROBES:
            samples.append(_sample(matvec, draw_probe(), deflation))
            spent += 1
            continue
        estimate = _estimate(samples, spent)
        precise = estimate.half_width() <= tolerance * abs(estimate.value)
        if precise and len(samples) >= MIN_PROBES_TO_STOP:
            return estimate
        if estimate.num_matvecs >= max_products or (should_stop is not None and should_stop()):
            return replace(estimate, converged=precise)
        samples.append(_sample(matvec, draw_probe(), deflation))
        spent += 1


def _sample(matvec: Matvec, probe: Tensor, deflation: Deflation | None) -> float:
    """One unbiased sample of tr A."""
    if deflation is None:
        return dot64(probe, matvec(probe).detach())
    rest = probe.clone()
    orthogonalise_(rest, deflation.blocks)
    return float(deflation.values.sum()) + dot64(rest, matvec(rest).detach())


def _estimate(samples: list[float], num_matvecs: int) -> TraceEstimate:
    values = torch.tensor(samples, dtype=torch.float64)
    count = len(samples)
    return TraceEstimate(float(values.mean()), float(values.std()) / math.sqrt(count), count, num_matvecs)
