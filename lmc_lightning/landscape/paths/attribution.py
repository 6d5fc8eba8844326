"""Which examples and which classes a barrier is made of."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmc_lightning.landscape.paths.barrier import Barrier
from lmc_lightning.landscape.paths.profiles import Profile


@dataclass(frozen=True)
class Attribution:
    """Shares of a barrier, each example's weighted gap to the chord at the peak.

    Attributes:
        shares: Of each example that counts, or of each chunk where single examples are not known, ``(N,)`` float64,
            in the order of the probe set; they sum to the barrier.
        by_class: Sums over the examples of each class, where these are known.
    """

    shares: Tensor
    by_class: Mapping[int, float]


def attribution(barrier: Barrier, profile: Profile, labels: Tensor | None = None) -> Attribution:
    """The shares of ``barrier``, which was found on ``profile``; no further evaluation.

    Args:
        barrier: of loss or error.
        profile: the path that it is the barrier of.
        labels: class of each example that counts, ``(N,)``.

    Raises:
        ValueError: the metric has no parts, or there are not as many labels as examples.
    """
    curve = profile.curves[barrier.metric]
    if curve.samples is None or curve.weights is None:
        raise ValueError(f"{barrier.metric!r} is known as a mean only, so that it cannot be attributed to examples.")
    peak = int(barrier.gaps.argmax())
    rows = curve.samples
    shares = curve.weights * (rows[peak] - torch.lerp(rows[0], rows[-1], float(barrier.ts[peak])))
    if labels is None or curve.unit != "example":
        return Attribution(shares, {})
    if len(labels) != len(shares):
        raise ValueError(f"Expected a label for each of {len(shares)} examples, got {len(labels)}.")
    return Attribution(shares, {int(c): float(shares[labels == c].sum()) for c in labels.unique()})
