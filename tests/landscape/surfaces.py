"""Losses around a point of which sharpness is known, and a network that can be rescaled around its ReLU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from tests import problems
from tests.problems import ConvNet, cross_entropy, images, normal, split

SPECTRUM = [6.0, 3.0, 1.0, 0.5, 0.1, 0.0, 0.0, 0.0]
MINIMUM = normal(8, seed=3)


def at_minimum(eigenvalues: list[float] = SPECTRUM, offset: float = 0.0) -> Objective:
    """½(θ − θ*)ᵀH(θ − θ*) + offset at θ*, a point that is not 0."""
    hessian = problems.with_spectrum(eigenvalues)
    minimum = MINIMUM[: len(eigenvalues)]

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return 0.5 * (module.theta - minimum) @ hessian @ (module.theta - minimum) + offset

    return Objective(problems.Vector(minimum), [torch.zeros(1)], loss_fn)


def linear(slope: Tensor, theta: Tensor) -> Objective:
    return problems.quadratic(torch.zeros(len(slope), len(slope)).double(), theta, slope).objective()


def along_line(profile: Any, theta: float = 0.0) -> Objective:
    """A loss of one number."""
    start = torch.tensor([theta], dtype=torch.float64)
    return Objective(problems.Vector(start), [torch.zeros(1)], lambda module, batch: profile(module.theta).sum())


def conv_net(dtype: torch.dtype = torch.float64, **options: Any) -> Objective:
    return Objective(ConvNet(dtype), split(images(dtype=dtype), [64, 6]), cross_entropy, **options)


class TwoLayers(nn.Module):
    """A classifier whose first layer is multiplied and whose second is divided by a factor: always one function."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6).double(), nn.Linear(6, 4).double()
        with torch.no_grad():
            for index, tensor in enumerate(self.parameters()):
                tensor.copy_(normal(*tensor.shape, seed=30 + index))
            self.first.weight *= factor
            self.first.bias *= factor
            self.second.weight /= factor

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def rescaled(factor: float, **options: Any) -> Objective:
    batch = normal(30, 3, seed=1), torch.arange(30) % 4
    return Objective(TwoLayers(factor), [batch], lambda m, b: F.cross_entropy(m(b[0]), b[1]), **options)


class Counting(Objective):
    """Counts its losses and gradients of the whole probe set."""

    losses = gradients = 0

    def evaluate_many(self, *args: Any, **options: Any) -> Any:
        found = super().evaluate_many(*args, **options)
        self.losses += len(found)
        return found

    def grad(self, theta: Tensor) -> Tensor:
        self.gradients += 1
        return super().grad(theta)
