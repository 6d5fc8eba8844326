"""Small problems that carry their exact answer, in float64."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.types import Batch, LossFn


@dataclass(frozen=True)
class Problem:
    """A module, its probe set and loss, with the exact Hessian and gradient of the mean loss at its parameters."""

    module: nn.Module
    batches: list[Batch]
    loss_fn: LossFn
    hessian: Tensor = field(repr=False)
    gradient: Tensor = field(repr=False)

    def objective(self, **options: Any) -> Objective:
        return Objective(self.module, self.batches, self.loss_fn, **options)

    @property
    def eigenvalues(self) -> Tensor:
        """Of the Hessian, descending."""
        return torch.linalg.eigvalsh(self.hessian).flip(0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def split(data: Any, sizes: Sequence[int]) -> list[Any]:
    """The examples of a tuple or dict of tensors in batches of the given sizes."""
    if isinstance(data, dict):
        columns = [t.split(list(sizes)) for t in data.values()]
        return [dict(zip(data, parts, strict=True)) for parts in zip(*columns, strict=True)]
    return list(zip(*(t.split(list(sizes)) for t in data), strict=True))


class Vector(nn.Module):
    """θ itself as a module."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())


def rotation(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def with_spectrum(eigenvalues: Sequence[float], seed: int = 0) -> Tensor:
    """A dense symmetric matrix with the prescribed eigenvalues (a diagonal one would make Rademacher probes exact)."""
    basis = rotation(len(eigenvalues), seed)
    matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    return (matrix + matrix.T) / 2


def quadratic(hessian: Tensor, theta: Tensor | None = None, slope: Tensor | None = None) -> Problem:
    """L(θ) = ½ θᵀHθ + gᵀθ on one batch that is not looked at."""
    theta = torch.zeros(len(hessian), dtype=hessian.dtype) if theta is None else theta
    slope = torch.zeros_like(theta) if slope is None else slope

    def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
        return 0.5 * module.theta @ hessian @ module.theta + slope @ module.theta

    return Problem(Vector(theta), [torch.zeros(1)], loss_fn, hessian, hessian @ theta + slope)


def weighted_quadratics(hessians: Tensor, sizes: Sequence[int], theta: Tensor) -> Problem:
    """Batch b has the loss ½ θᵀH_bθ for every one of its ``sizes[b]`` examples; cutting batches is impossible."""
    batches = [{"hessian": h, "weight": float(n)} for h, n in zip(hessians, sizes, strict=True)]
    weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    mean = torch.einsum("b,bij->ij", weights, hessians)

    def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
        return 0.5 * module.theta @ batch["hessian"] @ module.theta

    return Problem(Vector(theta), batches, loss_fn, mean, mean @ theta)


def linear_regression(num_examples: int = 70, num_features: int = 6, sizes: Sequence[int] = (64, 6)) -> Problem:
    """Mean squared error of a linear map to one output: H = (2/N) XᵀX."""
    x, y = normal(num_examples, num_features, seed=1), normal(num_examples, 1, seed=2)
    module = nn.Linear(num_features, 1, bias=False, dtype=torch.float64)
    weight = normal(1, num_features, seed=3)
    module.weight.data.copy_(weight)
    gradient = 2 / num_examples * x.T @ (x @ weight.T - y)
    return Problem(module, split((x, y), sizes), mean_squared_error, 2 / num_examples * x.T @ x, gradient.reshape(-1))


def softmax_regression(
    num_examples: int = 70, num_features: int = 5, num_classes: int = 4, sizes: Sequence[int] = (64, 6)
) -> Problem:
    """Cross-entropy of a linear map: H = mean (diag p − ppᵀ) ⊗ xxᵀ."""
    x = normal(num_examples, num_features, seed=4)
    y = torch.randint(num_classes, (num_examples,), generator=generator(5))
    module = nn.Linear(num_features, num_classes, bias=False, dtype=torch.float64)
    weight = normal(num_classes, num_features, seed=6)
    module.weight.data.copy_(weight)
    p = (x @ weight.T).softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessian = torch.einsum("nab,ni,nj->aibj", curvature, x, x) / num_examples
    gradient = (p - F.one_hot(y, num_classes)).T @ x / num_examples
    size = num_classes * num_features
    return Problem(module, split((x, y), sizes), cross_entropy, hessian.reshape(size, size), gradient.reshape(-1))


def matrix_factorisation(rows: int = 3, rank: int = 2, columns: int = 4) -> Problem:
    """L = ½‖UV − M‖² with θ = (U, V): blocks I ⊗ VVᵀ and UᵀU ⊗ I, off them U V-terms and the residual."""
    u, v, target = normal(rows, rank, seed=7), normal(rank, columns, seed=8), normal(rows, columns, seed=9)
    residual = u @ v - target
    eye_rows, eye_columns = torch.eye(rows, dtype=u.dtype), torch.eye(columns, dtype=u.dtype)
    uu = torch.einsum("ab,ij->aibj", eye_rows, v @ v.T).reshape(rows * rank, rows * rank)
    vv = torch.einsum("ij,ab->iajb", u.T @ u, eye_columns).reshape(rank * columns, rank * columns)
    uv = torch.einsum("aj,ib->aijb", u, v) + torch.einsum("ab,ij->aijb", residual, torch.eye(rank, dtype=u.dtype))
    uv = uv.reshape(rows * rank, rank * columns)
    hessian = torch.cat([torch.cat([uu, uv], 1), torch.cat([uv.T, vv], 1)])
    gradient = torch.cat([(residual @ v.T).reshape(-1), (u.T @ residual).reshape(-1)])
    module = nn.ParameterDict({"u": nn.Parameter(u), "v": nn.Parameter(v)})
    return Problem(module, [target], factorisation_error, hessian, gradient)


def double_well(theta: float) -> Problem:
    """L(θ) = (θ² − 1)²: minima at ±1 with curvature 8, a maximum at 0 with −4, barrier 1 between them."""
    value = torch.tensor([theta], dtype=torch.float64)

    def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
        return ((module.theta**2 - 1) ** 2).sum()

    return Problem(
        Vector(value), [torch.zeros(1)], loss_fn, (12 * value**2 - 4).reshape(1, 1), 4 * value * (value**2 - 1)
    )


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def mean_squared_error(module: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(module(batch[0]), batch[1])


def factorisation_error(module: nn.Module, batch: Batch) -> Tensor:
    return 0.5 * (module["u"] @ module["v"] - batch).square().sum()


class ConvNet(nn.Module):
    """BatchNorm with statistics that are not those of the data, dropout, ReLU, an unused layer: 86 + 6 parameters."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.5)
        )
        self.head = nn.Linear(12, 4)
        self.unused = nn.Linear(2, 2)
        self.to(dtype)
        with torch.no_grad():
            for index, tensor in enumerate(self.parameters()):
                tensor.copy_(0.7 * normal(*tensor.shape, seed=100 + index))
            self.body[1].running_mean.copy_(0.3 * normal(3, seed=20))
            self.body[1].running_var.copy_(0.5 + normal(3, seed=21).square())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def images(num_examples: int = 70, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = normal(num_examples, 1, 6, 6, seed=10).to(dtype)
    return x, torch.randint(4, (num_examples,), generator=generator(11))
