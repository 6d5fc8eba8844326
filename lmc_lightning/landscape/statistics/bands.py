"""Standard errors of means over examples and over pairs of networks, and bands that cover a whole curve of means."""

from collections.abc import Hashable, Mapping, Sequence
from math import nan, sqrt

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

MIN_SAMPLES = 8
"""Fewer samples give a standard error but no interval."""

_BLOCK_ENTRIES = 2**22


def standard_error(samples: Tensor, weights: Tensor) -> Tensor:
    """Standard error of the weighted means x̄ of ``(…, N)``: SE² = Σ w_n² (x_n − x̄)² · n/(n−1), NaN for n = 1.

    Args:
        samples: one per example or chunk, float64.
        weights: their shares ``(N,)``, summing to 1; n of them are not 0.
    """
    size = int(weights.count_nonzero())
    if size < 2:
        return samples.new_full(samples.shape[:-1], nan)
    deviations = samples - (samples @ weights).unsqueeze(-1)
    return (deviations.square() @ weights.square() * (size / (size - 1))).sqrt()


def stderr_data(values: Tensor, weights: Tensor) -> float | None:
    """:func:`standard_error` of the values of chunks or examples ``(B,)``; ``None`` for a single one."""
    return None if weights.count_nonzero() < 2 else float(standard_error(values, weights))


MIN_NODES = 3
"""Fewer networks, or repetitions, give no standard error over seeds."""


def seed_standard_error(pairs: Sequence[tuple[Hashable, Hashable]], values: Sequence[float]) -> tuple[float, int]:
    """Standard error over seeds of the mean of ``values`` over pairs of networks, and the number n of nodes behind it.

    SE² = (n−1)/n Σ_i (m_i − m̄)², m_i the mean over the pairs without node i: pairs that share a network are not
    independent. On average it is rather too large than too small. Networks that no pair connects come from separate
    repetitions. With several of these a node is a repetition; else it is a network, and one without which no pair is
    left (the trunk that all children are compared with) is not left out, so that the error speaks of other children of
    the same trunk. NaN below 3 nodes.

    Args:
        pairs: the two networks of each value.
        values: one for each pair.
    """
    repetition = _connected(pairs)
    several = len(set(repetition.values())) > 1
    members = [{repetition[a]} if several else {a, b} for a, b in pairs]
    means: list[float] = []
    for node in {n for own in members for n in own}:
        kept = [value for value, own in zip(values, members, strict=True) if node not in own]
        means += [sum(kept) / len(kept)] if kept else []
    size = max(1, len(means))
    if size < MIN_NODES:
        return nan, size
    center = sum(means) / size
    return sqrt((size - 1) / size * sum((m - center) ** 2 for m in means)), size


def _connected(pairs: Sequence[tuple[Hashable, Hashable]]) -> Mapping[Hashable, Hashable]:
    """A representative of all networks that are connected with each network."""
    found: dict[Hashable, Hashable] = {node: node for pair in pairs for node in pair}
    for a, b in pairs:
        one, other = found[a], found[b]
        found = {node: one if root == other else root for node, root in found.items()}
    return found


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
