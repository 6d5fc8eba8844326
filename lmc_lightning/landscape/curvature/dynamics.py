"""What mini-batch training sees of the loss: curvature along its own gradients, their noise, and its next update."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmc_lightning.core.hvp import CurvatureProduct
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.sharpness.perturbations import norm
from lmc_lightning.landscape.statistics.bands import stderr_data


@dataclass(frozen=True)
class BatchStatistics:
    """Curvature and noise of the gradients g_b of B batches of n examples each.

    Attributes:
        batch_sharpness: Mean over batches of g_bᵀH_b g_b/‖g_b‖² (arXiv 2412.20553).
        batch_sharpness_stderr: Over batches, from two on.
        gradient_noise_scale: tr Σ/‖g‖² [examples], Σ the covariance of the gradients of single examples
            (arXiv 1812.06162); ``None`` below two batches, and where the estimate of ‖g‖² is not positive: there the
            mean gradient cannot be told from noise.
        gradient_noise_scale_stderr: By the jackknife over batches, from three on.
        noise_trace: tr Σ.
        gradient_sq: ‖g‖² of the mean gradient over fresh examples.
        num_batches: B, of all processes.
        batch_size: n.
        num_gradients: Gradients of the whole probe set spent beside the one product of each batch.
    """

    batch_sharpness: float
    batch_sharpness_stderr: float | None
    gradient_noise_scale: float | None
    gradient_noise_scale_stderr: float | None
    noise_trace: float | None
    gradient_sq: float | None
    num_batches: int
    batch_size: float
    num_gradients: int


def batch_statistics(objective: Objective, theta: Tensor, gradient: Tensor | None = None) -> BatchStatistics:
    """Batch sharpness and gradient noise scale at θ, from one gradient and one Hessian product of each batch.

    With ḡ the mean of the g_b: tr Σ ≈ n/(B−1) Σ_b ‖g_b − ḡ‖² and ‖g‖² ≈ ‖ḡ‖² − tr Σ/(nB). Both are unbiased for batches
    of independent examples; their ratio is not, by O(1/B), and its distribution is wide where ‖ḡ‖² is mostly noise.

    Costs 3 to 4 gradients over the probe set, one more without ``gradient``, and the memory of one batch's graph.

    Args:
        objective: Its chunks are the batches, of equal size: ``Objective(…, keep_batches=True)``.
        theta: The point ``(P,)``.
        gradient: Mean gradient ``(P,)`` at θ, if it is known.
    """
    mean = (objective.grad(theta) if gradient is None else gradient).double()
    weights = objective.baseline.local_weights

    with objective.hvp(theta) as product:

        def rows() -> Tensor:
            used = [i for i, weight in enumerate(weights.tolist()) if weight]
            return torch.tensor([_row(product, i, mean) for i in used], dtype=torch.float64).reshape(-1, 3)

        found = objective.collective.gather(rows)
    sharpness, norms, overlaps = found.T
    sharpness = sharpness[norms > 0]
    count = len(found)
    size = (objective.num_examples or count) / count
    noise = _noise(norms.sum(), overlaps.sum(), float(mean @ mean), count, size) if count > 1 else (None, None)
    return BatchStatistics(
        batch_sharpness=float(sharpness.mean()),
        batch_sharpness_stderr=float(sharpness.std() / len(sharpness) ** 0.5) if len(sharpness) > 1 else None,
        gradient_noise_scale=_ratio(*noise),
        gradient_noise_scale_stderr=_jackknife(norms, overlaps, float(mean @ mean), size),
        noise_trace=noise[0],
        gradient_sq=noise[1],
        num_batches=count,
        batch_size=size,
        num_gradients=2 if gradient is None else 1,
    )


def _row(product: CurvatureProduct, index: int, mean: Tensor) -> tuple[float, float, float]:
    """gᵀHg/‖g‖², ‖g‖² and gᵀḡ of one batch."""
    gradient, curved = (v.double() for v in product.chunk_derivatives(index))
    product.release()
    square = float(gradient @ gradient)
    return float(gradient @ curved) / square if square else math.nan, square, float(gradient @ mean)


def chunk_step(objective: Objective, index: int, theta: Tensor) -> tuple[float, Tensor] | None:
    """Mean loss of one chunk at θ and its gradient ``(P,)``; one forward and one backward pass over the chunk.

    ``None`` where the step skips the chunk or its loss does not depend on θ.
    """
    leaves = objective.leaves(theta)
    with objective.box(), torch.enable_grad():
        loss = objective.step(objective.module_at(leaves), objective.batches[index], seed=index)
        if loss is None or not loss.requires_grad:
            return None
        found = torch.autograd.grad(loss.reshape(()), leaves, allow_unused=True)
    parts = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
    return loss.item(), torch.cat(parts)


def _noise(norms: Tensor, overlaps: Tensor, mean_sq: float, count: int, size: float) -> tuple[float, float]:
    """Tr Σ and ‖g‖², from Σ_b ‖g_b‖², Σ_b g_bᵀḡ and ‖ḡ‖²."""
    scatter = float(norms - 2 * overlaps) + count * mean_sq
    noise_trace = size * scatter / (count - 1)
    return noise_trace, mean_sq - noise_trace / (size * count)


def _ratio(noise_trace: float | None, gradient_sq: float | None) -> float | None:
    if noise_trace is None or gradient_sq is None or gradient_sq <= 0:
        return None
    return noise_trace / gradient_sq


def _jackknife(norms: Tensor, overlaps: Tensor, mean_sq: float, size: float) -> float | None:
    """Standard error of the noise scale from leaving out each batch in turn."""
    count, ratios = len(norms), list[float]()
    for j in range(count if count > 2 else 0):
        # Of the mean without g_j, m = (Bḡ − g_j)/(B − 1), only the norm is needed: Σ_i≠j g_iᵀm = (B − 1)‖m‖².
        others = float(count**2 * mean_sq - 2 * count * overlaps[j] + norms[j]) / (count - 1) ** 2
        left, overlap = norms.sum() - norms[j], norms.new_tensor((count - 1) * others)
        ratio = _ratio(*_noise(left, overlap, others, count - 1, size))
        if ratio is None:
            return None
        ratios.append(ratio)
    return float(torch.tensor(ratios, dtype=torch.float64).std() * (count - 1) / count**0.5) if ratios else None


@dataclass(frozen=True)
class UpdatePrediction:
    """What the quadratic model at θ says an update Δ does to the loss, and what it did.

    Attributes:
        predicted: −gᵀΔ + ½ΔᵀHΔ.
        predicted_stderr: Over chunks, from two on.
        realised: L(θ − Δ) − L(θ).
        realised_stderr: Over chunks, of the paired differences.
        slope: −gᵀΔ, the first term alone.
        curvature: ½ΔᵀHΔ.
        update_norm: ‖Δ‖₂.
    """

    predicted: float
    predicted_stderr: float | None
    realised: float
    realised_stderr: float | None
    slope: float
    curvature: float
    update_norm: float


def update_prediction(objective: Objective, before: Tensor, after: Tensor) -> UpdatePrediction:
    """Predicted beside realised change of the mean loss by an update Δ = before − after.

    Where they part, the third order counts: on the scale of one update the loss is no longer quadratic, as when it is
    about to rise. Costs 3 to 4 gradients and 2 losses over the probe set, and the memory of one chunk's graph.

    Args:
        objective: The mean loss; its chunks give the standard errors.
        before: θ ``(P,)``.
        after: θ − Δ ``(P,)``.
    """
    update = before - after
    weights = objective.baseline.local_weights

    with objective.hvp(before) as product:

        def terms() -> Tensor:
            found = torch.zeros(len(weights), 2, dtype=torch.float64)
            for index, weight in enumerate(weights.tolist()):
                if weight:
                    pair = product.chunk_derivatives(index, update)
                    product.release()
                    slope, curvature = (float(v.double() @ update.double()) for v in pair)
                    found[index] = torch.tensor([-slope, curvature / 2], dtype=found.dtype)
            return found

        slopes, curvatures = objective.collective.gather(terms).T
    first, second = objective.evaluate(before), objective.evaluate(after)
    shares = first.weights
    changes = second.chunk_losses - first.chunk_losses
    changes, predictions = torch.where(shares > 0, changes, 0), slopes + curvatures
    return UpdatePrediction(
        predicted=float(shares @ predictions),
        predicted_stderr=stderr_data(predictions, shares),
        realised=float(shares @ changes),
        realised_stderr=stderr_data(changes, shares),
        slope=float(shares @ slopes),
        curvature=float(shares @ curvatures),
        update_norm=norm(update),
    )
