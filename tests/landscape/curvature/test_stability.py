"""The threshold of every optimizer is where torch's own steps start to diverge on a quadratic."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lmc_lightning.core.objective import Objective
from lmc_lightning.core.params import parameter_layout
from lmc_lightning.landscape.curvature.stability import OptimizerState, Stability, linearised, preconditioned, stability
from tests.problems import Problem, Vector, normal, quadratic, with_spectrum

FROZEN = {"betas": (0.9, 1 - 1e-12)}
"""With these and after 1e14 steps, which float32 cannot count further, Adam's preconditioner does not move."""

SECOND_MOMENT = 0.01


def freeze(optimizer: Optimizer, second_moments: dict[Tensor, Tensor]) -> None:
    """Give Adam second moments that further steps leave as they are, AMSGrad a larger maximum."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(1e14)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = second_moments[parameter].clone()
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = 4 * second_moments[parameter]


def diverging(optimizer: Optimizer, parts: list[Tensor], gradient: Callable[[Tensor], Tensor]) -> Tensor:
    """Which of several independent problems, one a row, end farther out than they begin.

    Adam's second moments grow where it has diverged far enough, and let it come back.
    """
    peaks = torch.zeros(len(parts[0]), dtype=torch.float64)
    for _ in range(800):
        theta = torch.cat([part.detach() for part in parts], 1)
        peaks = torch.maximum(peaks, theta.norm(dim=1))
        for part, own in zip(parts, gradient(theta).split([p.shape[1] for p in parts], 1), strict=True):
            part.grad = own.contiguous()
        optimizer.step()
    end = torch.cat([part.detach() for part in parts], 1).norm(dim=1)
    return ~(end < START * sum(p.shape[1] for p in parts) ** 0.5) | (peaks > 1e4 * START)


START = 1e-3


def threshold(
    low: float, high: float, sizes: Sequence[int], make: Callable[[list[Tensor]], Optimizer], hessian: Tensor
) -> float:
    """The factor c from which torch's own optimizer diverges on ½c θᵀHθ: a grid, twice refined."""
    for _ in range(2):
        factors = torch.linspace(low, high, 301, dtype=torch.float64)
        parts = [torch.full((len(factors), n), START, dtype=torch.float64).requires_grad_() for n in sizes]
        found = diverging(make(parts), parts, lambda theta, c=factors: c[:, None] * (theta @ hessian))  # type: ignore[misc]
        first = int(found.int().argmax())
        low, high = float(factors[first - 1]), float(factors[first])
    return high


def divergence_threshold(kind: type[Optimizer], options: dict[str, Any]) -> float:
    def make(parts: list[Tensor]) -> Optimizer:
        optimizer = kind(parts, lr=0.1, **options)  # type: ignore[call-arg]
        if kind is not SGD:
            freeze(optimizer, {p: torch.full_like(p.detach(), SECOND_MOMENT) for p in parts})
        return optimizer

    return threshold(1.0, 100.0, [1], make, torch.eye(1, dtype=torch.float64))


def of_scalar(kind: type[Optimizer], options: dict[str, Any], curvature: float) -> Stability:
    problem = quadratic(torch.tensor([[curvature]], dtype=torch.float64), slope=torch.ones(1, dtype=torch.float64))
    optimizer = kind(problem.module.parameters(), lr=0.1, **options)
    if kind is not SGD:
        theta = problem.module.theta
        freeze(optimizer, {theta: torch.full_like(theta.detach(), SECOND_MOMENT)})
    return measured(problem, optimizer)


def measured(problem: Problem, *optimizers: Optimizer, **options: Any) -> Stability:
    objective = problem.objective()
    states = [OptimizerState.of(o, problem.module) for o in optimizers]
    with objective.hvp(objective.theta()) as product:
        return stability(states, objective.layout, product=product, tolerance=1e-10, **options)


SGD_VARIANTS: list[tuple[dict[str, Any], float]] = [
    ({}, 20.0),
    ({"momentum": 0.9}, 38.0),
    ({"momentum": 0.9, "nesterov": True}, 3.8 / 0.28),
    ({"momentum": 0.9, "dampening": 0.5}, 76.0),
    ({"dampening": 0.5}, 20.0),
    ({"weight_decay": 2.0}, 18.0),
    ({"momentum": 0.9, "weight_decay": 2.0}, 36.0),
    ({"momentum": 0.5, "nesterov": True, "weight_decay": 1.0}, 14.0),
    ({"momentum": 0.9, "dampening": 0.5, "weight_decay": 4.0}, 72.0),
    ({"momentum": 0.9, "foreach": True}, 38.0),
]
ADAM_VARIANTS: list[tuple[type[Optimizer], dict[str, Any], float]] = [
    (Adam, {}, 38.0),  # 38/η of the preconditioned curvature, whose root second moment is η here
    (Adam, {"betas": (0.5, FROZEN["betas"][1])}, 6.0),
    (Adam, {"eps": 0.1}, 76.0),
    (Adam, {"weight_decay": 5.0}, 33.0),
    (Adam, {"amsgrad": True}, 76.0),
    (AdamW, {"weight_decay": 4.0}, 30.4),
    (AdamW, {"weight_decay": 4.0, "amsgrad": True}, 60.8),
    (Adam, {"foreach": True}, 38.0),
]
VARIANTS = [(SGD, *row) for row in SGD_VARIANTS] + [(kind, FROZEN | o, critical) for kind, o, critical in ADAM_VARIANTS]


@pytest.mark.parametrize(("kind", "options", "critical"), VARIANTS)
def test_stability_is_one_where_the_optimizer_starts_to_diverge(
    kind: type[Optimizer], options: dict[str, Any], critical: float
) -> None:
    assert divergence_threshold(kind, options) == pytest.approx(critical, rel=1e-3)
    assert of_scalar(kind, options, critical).value == pytest.approx(1, rel=1e-6)
    coupled = 0.0 if kind is AdamW else options.get("weight_decay", 0.0)
    assert of_scalar(kind, options, 2 * critical + coupled).value == pytest.approx(2, rel=1e-6)


HESSIAN = with_spectrum([9.0, 4.0, 2.0, 0.5], seed=3)
GROUPS: list[tuple[type[Optimizer], dict[str, Any], list[dict[str, Any]]]] = [
    (SGD, {"momentum": 0.9}, [{"lr": 0.05}, {"lr": 0.2, "weight_decay": 3.0}]),
    (SGD, {"momentum": 0.6, "nesterov": True}, [{"lr": 0.3, "weight_decay": 1.0}, {"lr": 0.1}]),
    (Adam, {}, [{"lr": 0.05, "weight_decay": 2.0}, {"lr": 0.2, "eps": 0.01}]),
    (AdamW, {}, [{"lr": 0.05, "weight_decay": 8.0}, {"lr": 0.2, "weight_decay": 1.0, "amsgrad": True}]),
]
"""Optimizers of two groups that differ in what may differ, over two pairs of coordinates."""


def second_moments(like: Tensor, group: int) -> Tensor:
    return torch.tensor([[0.01, 0.04], [0.09, 0.0225]], dtype=like.dtype)[group].expand_as(like)


def split_optimizer(kind: type[Optimizer], common: dict[str, Any], groups: list[dict[str, Any]], parts: Any) -> Any:
    own = {} if kind is SGD else FROZEN
    optimizer = kind([{"params": [p], **g} for p, g in zip(parts, groups, strict=True)], **(own | common))
    if kind is not SGD:
        freeze(optimizer, {p: second_moments(p.detach(), number) for number, p in enumerate(parts)})
    return optimizer


class Pairs(nn.Module):
    """½c θᵀHθ of θ in two halves."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.parts = nn.ParameterList([torch.ones(2, dtype=torch.float64) for _ in range(2)])

    def loss(self) -> Tensor:
        theta = torch.cat(list(self.parts))
        return 0.5 * self.factor * theta @ HESSIAN @ theta


@pytest.mark.parametrize(("kind", "common", "groups"), GROUPS)
def test_group_learning_rates_decay_and_second_moments_count_per_coordinate(
    kind: type[Optimizer], common: dict[str, Any], groups: list[dict[str, Any]]
) -> None:
    critical = threshold(0.1, 20.1, [2, 2], lambda parts: split_optimizer(kind, common, groups, parts), HESSIAN)
    module = Pairs(critical)
    objective = Objective(module, [torch.zeros(1)], lambda m, batch: m.loss())
    state = OptimizerState.of(split_optimizer(kind, common, groups, list(module.parts)), module)
    with objective.hvp(objective.theta()) as product:
        found = stability([state], objective.layout, product=product, tolerance=1e-10)
    assert found.value == pytest.approx(1, rel=1e-3)
    assert (found.num_matvecs, found.converged) == (product.num_products, True)
    dynamics = linearised([state], objective.layout)
    matvec = preconditioned(lambda v: critical * HESSIAN @ v, dynamics.scale, dynamics.decay)
    dense = torch.stack([matvec(row) for row in torch.eye(4, dtype=torch.float64)])
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-8)


def test_what_is_absorbed_is_what_turns_the_momentum_into_the_update_of_adam() -> None:
    theta = normal(6, seed=1).requires_grad_()
    module = Vector(theta.detach())
    optimizer = Adam(module.parameters(), lr=0.03, betas=(0.8, 0.9), eps=0.05)
    for step in range(3):
        before = module.theta.detach().clone()
        module.theta.grad = normal(6, seed=10 + step)
        optimizer.step()
    state = OptimizerState.of(optimizer, module)
    scale = linearised([state], parameter_layout(module)).scale
    momentum = optimizer.state[module.theta]["exp_avg"]
    gain = (1 - 0.8) / (2 * (1 + 0.8))
    torch.testing.assert_close(scale**2 / gain * momentum, before - module.theta.detach(), rtol=1e-10, atol=0)


def test_one_learning_rate_of_sgd_takes_no_product() -> None:
    problem = quadratic(HESSIAN)
    optimizer = SGD(problem.module.parameters(), lr=torch.tensor(0.1), momentum=0.5, weight_decay=1.0)
    state = OptimizerState.of(optimizer, problem.module)
    found = stability([state], parameter_layout(problem.module), lambda_max=9.0)
    assert found.value == pytest.approx(0.1 * (9 + 1) / 3, rel=1e-6)
    assert found.num_matvecs == 0
    assert found.per_curvature == pytest.approx(0.1 / 3, rel=1e-6)
    assert (found.decay, found.small_batch_limit) == (1.0, pytest.approx(1 / 3))
    by_lanczos = measured(problem, optimizer)
    assert by_lanczos.value == pytest.approx(found.value, rel=1e-8)
    assert by_lanczos.num_matvecs > 0
    assert by_lanczos.residual is not None
    assert by_lanczos.residual < 1e-8


def test_equal_groups_count_as_one() -> None:
    module = Pairs(1.0)
    groups = [{"params": [part]} for part in module.parts]
    state = OptimizerState.of(SGD(groups, lr=0.1, momentum=0.9), module)
    assert stability([state], parameter_layout(module), lambda_max=19.0).value == pytest.approx(0.5)


def test_a_learning_rate_of_zero_is_stable() -> None:
    module = Pairs(1.0)
    state = OptimizerState.of(SGD([{"params": [p], "lr": 0.0} for p in module.parts], lr=0.1), module)
    assert stability([state], parameter_layout(module), lambda_max=19.0).value == 0.0
    optimizer = split_optimizer(Adam, {}, [{"lr": 0.0}, {"lr": 0.0}], list(module.parts))
    assert stability([OptimizerState.of(optimizer, module)], parameter_layout(module)).value == 0.0


def test_what_the_optimizer_does_not_move_is_held_fixed() -> None:
    module = Pairs(1.0)
    objective = Objective(module, [torch.zeros(1)], lambda m, batch: m.loss())
    expected = 0.1 * float(torch.linalg.eigvalsh(HESSIAN[2:, 2:])[-1]) / 2
    with objective.hvp(objective.theta()) as product:
        partial = OptimizerState.of(SGD([module.parts[1]], lr=0.1), module)
        found = stability([partial], objective.layout, lambda_max=9.0, product=product, tolerance=1e-10)
        assert (found.value, found.num_fixed) == (pytest.approx(expected, rel=1e-8), 2)
        optimizer = Adam(module.parameters(), lr=0.1)
        module.parts[1].grad = torch.ones(2, dtype=torch.float64)
        optimizer.step()
        found = stability([OptimizerState.of(optimizer, module)], objective.layout, product=product)
        assert found.num_fixed == 2


def test_only_measured_parameters_count() -> None:
    module = Pairs(1.0)
    layout = parameter_layout(module, ["parts.1"])
    groups = [{"params": [module.parts[0]], "lr": 5.0, "momentum": 0.9}, {"params": [module.parts[1]]}]
    state = OptimizerState.of(SGD(groups, lr=0.1), module)
    assert stability([state], layout, lambda_max=10.0).value == pytest.approx(0.5)


# -- what is not reported, and why -------------------------------------------------------------------------------------


class Clipped(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Renamed(SGD):
    pass


def states(module: nn.Module, kind: type[Optimizer], *groups: dict[str, Any], **options: Any) -> list[OptimizerState]:
    parts = list(module.parameters())
    own = [{"params": [p], **g} for p, g in zip(parts, groups, strict=True)] if groups else parts
    return [OptimizerState.of(kind(own, **{"lr": 0.1, **options}), module)]  # type: ignore[arg-type, call-arg]


@pytest.mark.parametrize(
    ("kind", "groups", "options", "reason"),
    [
        (SGD, [{"momentum": 0.9}, {"momentum": 0.5}], {}, "The parameter groups differ in momentum."),
        (SGD, [{"dampening": 0.9}, {}], {"momentum": 0.5}, "The parameter groups differ in dampening."),
        (Adam, [{"betas": (0.8, 0.99)}, {}], {}, "The parameter groups differ in beta1."),
        (SGD, [], {"maximize": True}, "The optimizer maximises."),
        (Adam, [], {"maximize": True}, "The optimizer maximises."),
        (Adam, [], {}, "Adam has not taken a step: it has no second moments yet."),
        (AdamW, [], {"weight_decay": 20.0}, r"lr · weight_decay is 2: decay alone diverges from 2 on."),
        (RMSprop, [], {}, "The threshold is known for SGD, Adam and AdamW, not for RMSprop."),
        (Clipped, [], {}, "The threshold is known for SGD, Adam and AdamW, not for Clipped."),
    ],
)
def test_other_rules_are_not_reported_and_say_why(
    kind: type[Optimizer], groups: list[dict[str, Any]], options: dict[str, Any], reason: str
) -> None:
    module = Pairs(1.0)
    found = stability(states(module, kind, *groups, **options), parameter_layout(module), lambda_max=1.0)
    assert (found.value, found.reason) == (None, reason)


def test_a_subclass_with_the_same_step_counts_as_its_base() -> None:
    module = Pairs(1.0)
    assert stability(states(module, Renamed), parameter_layout(module), lambda_max=10.0).value == pytest.approx(0.5)


def test_it_takes_one_optimizer_that_holds_the_parameters_and_products_where_they_are_needed() -> None:
    module, other = Pairs(1.0), Pairs(1.0)
    layout = parameter_layout(module)
    assert stability([], layout).reason == "The threshold is known for one optimizer, there are 0."
    assert stability(states(module, SGD) * 2, layout).reason == "The threshold is known for one optimizer, there are 2."
    of_other = [OptimizerState.of(SGD(other.parameters(), lr=0.1), module)]
    assert stability(of_other, layout).reason == "The optimizer holds none of the measured parameters."
    varied = states(module, SGD, {"lr": 0.2}, {})
    assert (
        stability(varied, layout, lambda_max=1.0).reason == "It takes Hessian products of its own, and there are none."
    )


# -- the state of an optimizer -----------------------------------------------------------------------------------------


def test_reading_the_state_leaves_the_optimizer_as_it_is_and_a_copy_is_independent() -> None:
    module = Pairs(1.0)
    optimizer = Adam(module.parameters(), lr=0.1)
    assert OptimizerState.of(optimizer, module).moments == {}
    assert len(optimizer.state) == 0  # a defaultdict, which makes what it is asked for
    for _ in range(2):
        for part in module.parts:
            part.grad = torch.ones(2, dtype=torch.float64)
        live, kept = OptimizerState.of(optimizer, module), OptimizerState.of(optimizer, module).copy()
        optimizer.step()
    assert [m.num_steps for m in live.moments.values()] == [1.0, 1.0]
    assert kept.num_bytes == 2 * 2 * 8
    for name, part in zip(("parts.0", "parts.1"), module.parts, strict=True):
        assert live.moments[name].mean is optimizer.state[part]["exp_avg_sq"]
        torch.testing.assert_close(kept.moments[name].mean, torch.full((2,), 1e-3, dtype=torch.float64))


def test_complex_parameters_have_a_second_moment_of_each_part() -> None:
    module = nn.ParameterDict({"z": torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)})
    optimizer = Adam(module.parameters(), lr=0.1, eps=0.0, betas=(0.9, 0.5))
    module["z"].grad = torch.tensor([1 + 2j, 4 - 8j], dtype=torch.complex128)
    optimizer.step()
    scale = linearised([OptimizerState.of(optimizer, module)], parameter_layout(module)).scale
    expected = 0.1 * 0.1 / (2 * 1.9) / (0.1 * torch.tensor([1.0, 2, 4, 8], dtype=torch.float64))
    torch.testing.assert_close(scale**2, expected, rtol=1e-10, atol=0)
