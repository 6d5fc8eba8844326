"""How far two networks are from each other: in their parameters, and in what they say of examples."""

from dataclasses import dataclass
from math import log, nan

import torch
from torch import Tensor

from lmc_lightning.landscape.paths.line import Endpoint
from lmc_lightning.landscape.similarity.predictions import Outputs
from lmc_lightning.landscape.statistics.bands import standard_error


@dataclass(frozen=True)
class ParameterDistance:
    """Distance of networks A and B in parameter space.

    Attributes:
        l2: ‖θ_A − θ_B‖₂.
        relative: l2 / ‖θ_A − θ_0‖₂; NaN without θ_0, or where A has not moved.
        cosine: Of the displacements θ_A − θ_0 and θ_B − θ_0; NaN likewise.
    """

    l2: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class Mean:
    """A mean over examples."""

    value: float
    stderr: float


@dataclass(frozen=True)
class PredictionDistance:
    """Distance of classifiers A and B in what they predict, as means over examples with paired standard errors.

    Attributes:
        disagreement: Share of examples for which they name different classes.
        kl: KL(p_A ‖ p_B) [nats].
        jsd: Jensen–Shannon divergence ½KL(p_A‖m) + ½KL(p_B‖m), m = ½(p_A+p_B), at most ln 2 [nats].
        logit_cosine: Cosine of the two vectors of logits.
        ensemble_accuracy: Accuracy of the class with the largest ½(p_A+p_B).
    """

    disagreement: Mean
    kl: Mean
    jsd: Mean
    logit_cosine: Mean
    ensemble_accuracy: Mean


def parameter_distance(end_a: Endpoint, end_b: Endpoint, start: Endpoint | None = None) -> ParameterDistance:
    """Distance in parameter space, sums in float64.

    Args:
        end_a: network A.
        end_b: network B.
        start: θ_0, where both come from.
    """
    a, b = end_a.theta.double(), end_b.theta.double()
    l2 = float((a - b).norm())
    if start is None:
        return ParameterDistance(l2, nan, nan)
    moved_a, moved_b = a - start.theta, b - start.theta
    norm_a, norm_b = float(moved_a.norm()), float(moved_b.norm())
    return ParameterDistance(
        l2,
        relative=l2 / norm_a if norm_a else nan,
        cosine=float(moved_a @ moved_b) / (norm_a * norm_b) if norm_a * norm_b else nan,
    )


def prediction_distance(outputs_a: Outputs, outputs_b: Outputs) -> PredictionDistance:
    """Distance of two classifiers on the same examples, in float64."""
    log_a, log_b = outputs_a.log_probabilities, outputs_b.log_probabilities
    mean = torch.logaddexp(log_a, log_b) - log(2)
    agree = log_a.argmax(1) == log_b.argmax(1)
    rows = {
        "disagreement": (~agree).double(),
        "kl": _divergence(log_a, log_b),
        "jsd": (_divergence(log_a, mean) + _divergence(log_b, mean)) / 2,
        "logit_cosine": torch.cosine_similarity(outputs_a.logits, outputs_b.logits, dim=1),
        "ensemble_accuracy": (mean.argmax(1) == outputs_a.labels).double(),
    }
    return PredictionDistance(**{name: _mean(values, outputs_a.weights) for name, values in rows.items()})


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) of each row; classes of probability 0 count nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)


def _mean(values: Tensor, weights: Tensor) -> Mean:
    counted = weights > 0
    values, weights = values[counted], weights[counted]
    return Mean(float(values @ weights), float(standard_error(values, weights)))
