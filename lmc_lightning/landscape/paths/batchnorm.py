"""Running statistics of BatchNorm at a given θ, estimated anew from training batches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmc_lightning.core.collective import Collective
from lmc_lightning.core.objective import Objective

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` normalises with running statistics of batches, which a change of θ leaves stale."""
    return any(True for _ in _tracking(module))


def running_statistics(
    objective: Objective, theta: Tensor, buffers: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The buffers at θ with BatchNorm's running statistics of the training data in place of the given ones.

    One pass in train mode with dropout off. A layer normalises batch b by the batch's own mean μ_b and variance σ_b²
    over n_b values a channel, as in training, and these are pooled in float64 over N = Σ n_b values:
    mean = Σ n_b μ_b / N, var = Σ n_b (σ_b² + μ_b²) / N − mean², times N/(N−1). In deeper layers they depend on how the
    data are cut into batches, so the batches belong to the result. Costs a forward pass over them.

    Layers that training itself keeps in eval mode (frozen statistics) and that no batch reaches keep what they have;
    so do ``num_batches_tracked`` and InstanceNorm.

    Args:
        objective: the module on the training batches, made with ``mode="train"`` and ``chunk_size`` of the batches'
            size, so that they stay as they are.
        theta: the point ``(P,)``.
        buffers: by name; by default those of the objective's module.

    Raises:
        ValueError: the objective is one in eval mode.
    """
    if objective.mode != "train":
        raise ValueError(
            f"Expected an Objective with mode='train' for BatchNorm statistics, got mode={objective.mode!r}. "
            "Make one from the training batches with mode='train'."
        )
    given = objective.buffers | dict(buffers or {})
    # θ carries no gradient, so that nothing is recorded although a step may differentiate by its inputs.
    with objective.box():
        module = objective.module_at(theta.detach(), buffers=given)
        frozen = {name for name, layer in _tracking(module) if module.training and not layer.training}
        pools = {name: _Pool.of(layer) for name, layer in _tracking(module) if name not in frozen}
        objective.collective.agree(lambda: run_batches(objective, module))
    for name, pool in pools.items():
        found = pool.statistics(objective.collective)
        if found is not None:
            mean, variance = found
            given[f"{name}running_mean"] = mean.to(given[f"{name}running_mean"])
            given[f"{name}running_var"] = variance.to(given[f"{name}running_var"])
    return given


def run_batches(objective: Objective, module: nn.Module) -> None:
    """One step on each batch, for what hooks of the module see of it."""
    for index, batch in enumerate(objective.batches):
        objective.step(module, batch, seed=index)


def _tracking(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with running statistics, each with the prefix of its buffers' names."""
    for name, layer in module.named_modules():
        if isinstance(layer, _BATCH_NORMS) and layer.running_mean is not None:
            yield (f"{name}." if name else ""), layer


@dataclass
class _Pool:
    """Statistics of the batches that a layer has seen: values a channel, means and unbiased variances ``(C,)``."""

    counts: list[int]
    means: list[Tensor]
    variances: list[Tensor]

    @classmethod
    def of(cls, layer: Any) -> "_Pool":
        """A pool filled by ``layer`` each time it runs; at momentum 1 its buffers are the batch's own statistics."""
        nothing = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        pool = cls([0], [nothing], [nothing])
        layer.train()
        layer.momentum = 1.0
        layer.running_mean.zero_()  # 0 · NaN would stay
        layer.running_var.fill_(1)
        layer.register_forward_hook(pool.add, with_kwargs=True)
        return pool

    def add(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take the statistics of the batch that ``layer`` has just seen."""
        values: Tensor = args[0] if args else kwargs["input"]
        self.counts.append(values.numel() // values.shape[1])
        self.means.append(layer.running_mean.to(torch.float64, copy=True))
        self.variances.append(layer.running_var.to(torch.float64, copy=True))

    def statistics(self, collective: Collective) -> tuple[Tensor, Tensor] | None:
        """Mean and unbiased variance of all values of all processes, ``(C,)`` each, in float64, if there are any."""
        means = torch.stack(self.means)
        counts = means.new_tensor(self.counts).unsqueeze(1)
        total = collective.total(counts.sum)
        if total == 0:
            return None
        mean = collective.total(lambda: (counts * means).sum(0)) / total
        # Within and between batches: the same sum as E[x²] − mean², without its cancellation.
        squares = (counts - 1) * torch.stack(self.variances) + counts * (means - mean).square()
        return mean, collective.total(lambda: squares.sum(0)) / (total - 1)
