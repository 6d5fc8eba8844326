"""Paths on which the activations keep the means and deviations that the ends have, for networks without BatchNorm."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.alignment.channels import reason_of
from lmc_lightning.landscape.alignment.groups import Groups
from lmc_lightning.landscape.paths.batchnorm import run_batches
from lmc_lightning.landscape.paths.line import Endpoint, Path, linear_path

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

Moments = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and standard deviation of every output channel ``(C,)`` of a layer, float64, by the layer's name."""


def repair_path(objective: Objective, groups: Groups, end_a: Endpoint, end_b: Endpoint) -> Path:
    """The straight line with the activations of its inner points rescaled (REPAIR, arXiv 2211.08403, eq. 4–5).

    Averaged weights give activations that vary less from layer to layer. Each hidden linear or convolutional layer with
    a bias is therefore given, channel by channel, mean (1−t)μ_A + tμ_B and standard deviation (1−t)σ_A + tσ_B, which is
    folded into its weight and bias; the ends stay as they are. As in the source, batches are normalised one after the
    other in one pass and the moments pooled: exact for a single batch. Costs a pass over the batches for each end and
    each point. With BatchNorm, recompute its statistics instead, which does the same.

    Args:
        objective: the module on training batches.
        groups: its channels; layers whose outputs are in none, as the last one's, stay.
        end_a: at t = 0.
        end_b: at t = 1, aligned to A.

    Raises:
        ValueError: there is no layer to rescale.
    """
    line, layers = linear_path(end_a, end_b), list(_hidden_layers(objective, groups))
    if not layers:
        raise ValueError("No hidden linear or convolutional layer has a bias, so REPAIR has nothing to rescale.")
    ends = [_moments(objective, end.theta, end.buffers, layers) for end in (end_a, end_b)]

    def path(t: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        theta, buffers = line(t)
        if t in (0, 1):
            return theta, buffers
        target = {
            name: (torch.lerp(ends[0][name][0], ends[1][name][0], t), torch.lerp(ends[0][name][1], ends[1][name][1], t))
            for name in layers
        }
        return _rescaled(objective, theta, _moments(objective, theta, buffers, layers, target), target), buffers

    return path


def _hidden_layers(objective: Objective, groups: Groups) -> Iterator[str]:
    """Names of the layers whose weight and bias are in θ and whose output channels are in a group."""
    for name, layer in objective.module_at(objective.theta()).named_modules():
        own = f"{name}.weight", f"{name}.bias"
        if isinstance(layer, _LAYERS) and set(own) <= set(objective.layout.names):
            axis = groups.axes.get(own[1], ())
            if axis and reason_of(axis[0]) is None:
                yield name


@dataclass
class _Pool:
    """Sums of the outputs of one layer over all batches, by channel ``(C,)``, float64."""

    axis: int
    target: tuple[Tensor, Tensor] | None
    count: int = 0
    sums: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)

    def see(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        """Take the outputs of one batch, and give them the target's moments where there is one."""
        rows = output.movedim(self.axis, 0).flatten(1).double()
        self.count += rows.shape[1]
        self.sums.append(rows.sum(1))
        self.squares.append(rows.square().sum(1))
        if self.target is None:
            return None
        mean, std = rows.mean(1), rows.std(1, correction=0)
        gain, shift = _correction((mean, std), self.target)
        shape = [-1 if i == self.axis % output.ndim else 1 for i in range(output.ndim)]
        return output * gain.reshape(shape).to(output) + shift.reshape(shape).to(output)

    def moments(self, objective: Objective) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over all batches of all processes."""
        count = objective.collective.total(lambda: torch.tensor(float(self.count), dtype=torch.float64))
        mean = objective.collective.total(lambda: torch.stack(self.sums).sum(0)) / count.to(self.sums[0].device)
        square = objective.collective.total(lambda: torch.stack(self.squares).sum(0)) / count.to(mean.device)
        return mean, (square - mean.square()).clamp(min=0).sqrt()


def _correction(found: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gain and shift that give the target's mean and deviation; channels that never vary are only shifted."""
    (mean, std), (wanted, wanted_std) = found, target
    gain = torch.where(std > 1e-12 * (std + mean.abs()), wanted_std / std, torch.ones_like(std))
    return gain, wanted - gain * mean


def _moments(
    objective: Objective,
    theta: Tensor,
    buffers: Mapping[str, Tensor],
    layers: list[str],
    targets: Moments | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Moments of the layers' outputs over all batches; with ``targets``, each layer's inputs are already corrected."""
    with objective.box():
        module = objective.module_at(theta, buffers=buffers)
        pools = {}
        for name in layers:
            layer = module.get_submodule(name)
            axis = -1 if isinstance(layer, nn.Linear) else 1
            pools[name] = _Pool(axis, targets[name] if targets else None)
            layer.register_forward_hook(pools[name].see)
        objective.collective.agree(partial(run_batches, objective, module))
    return {name: pool.moments(objective) for name, pool in pools.items()}


def _rescaled(objective: Objective, theta: Tensor, found: Moments, target: Moments) -> Tensor:
    """θ with the corrections in the layers' weights and biases."""
    tensors = objective.layout.unflatten(theta.clone())
    for name, moments in found.items():
        gain, shift = (part.to(theta) for part in _correction(moments, target[name]))
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        weight.mul_(gain.reshape(-1, *[1] * (weight.ndim - 1)))
        bias.mul_(gain).add_(shift)
    return objective.layout.flatten(tensors)
