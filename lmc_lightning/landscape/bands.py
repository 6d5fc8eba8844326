"""Standard errors of means over examples, and bands that cover a whole curve of such means."""

from math import nan, sqrt

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

MIN_SAMPLES = 8
"""Fewer samples give a standard error but no interval."""

_BLOCK_ENTRIES = 2**22


def standard_error(samples: Tensor, weights: Tensor) -> Tensor:
    """Standard error of the weighted means x̄ of ``(…, N)``: SE² = Σ w_n² (x_n − x̄)² · N/(N−1); NaN for N = 1.

    Args:
        samples: one per example or chunk, float64.
        weights: their shares ``(N,)``, summing to 1.
    """
    size = len(weights)
    if size < 2:
        return samples.new_full(samples.shape[:-1], nan)
    deviations = samples - (samples @ weights).unsqueeze(-1)
    return (deviations.square() @ weights.square() * (size / (size - 1))).sqrt()


def student_quantile(num_samples: int, confidence: float = 0.95) -> float:
    """Half the width of the two-sided Student interval [standard errors]; NaN below 8 samples."""
    return float(stdtrit(num_samples - 1, 0.5 + confidence / 2)) if num_samples >= MIN_SAMPLES else nan


def sup_t_quantile(
    samples: Tensor, weights: Tensor, *, confidence: float = 0.95, num_bootstrap: int = 1000, seed: int = 0
) -> float:
    """The c for which x̄_t ± c·SE_t covers the true means at all t together: the quantile of max_t |x̄*_t − x̄_t|/SE_t.

    x̄* is the mean of a resample of the N samples with replacement. Few samples are allowed for as in Student's interval
    against the normal one, by t_{N−1}/z, and by √(N/(N−1)), because a resample has the variance of divisor N. Curves
    whose samples are all equal have no error and are left out; 0 when all are.

    Args:
        samples: ``(T, N)`` float64; NaN below 8 samples.
        weights: their shares ``(N,)``, summing to 1.
        confidence: of the band.
        num_bootstrap: resamples.
        seed: of the resamples.
    """
    size = len(weights)
    if size < MIN_SAMPLES:
        return nan
    stderr = standard_error(samples, weights)
    active = stderr.isfinite() & (stderr > 0)
    if not active.any():
        return 0.0
    samples, stderr = samples[active], stderr[active]
    means, generator = samples @ weights, torch.Generator().manual_seed(seed)
    largest: list[Tensor] = []
    block = max(1, _BLOCK_ENTRIES // size)
    for start in range(0, num_bootstrap, block):
        drawn = torch.randint(size, (min(block, num_bootstrap - start), size), generator=generator)
        shares = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, weights[drawn])
        resampled = (shares @ samples.T) / shares.sum(1, keepdim=True)
        largest.append(((resampled - means).abs() / stderr).amax(1))
    quantile = float(torch.cat(largest).quantile(confidence))
    return quantile * sqrt(size / (size - 1)) * student_quantile(size, confidence) / float(ndtri(0.5 + confidence / 2))
