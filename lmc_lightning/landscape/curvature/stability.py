"""Stability of an optimizer's steps: the curvature in units of that at which they diverge."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lmc_lightning.core.hvp import CurvatureProduct
from lmc_lightning.core.params import ParameterLayout
from lmc_lightning.core.random_vectors import gaussian
from lmc_lightning.linalg.eigen import extreme_eigenpairs
from lmc_lightning.types import Matvec

GUARD_PAIRS = 1
"""Pairs beyond the top one that must converge too."""

_SHARED_BY_GROUPS = ("momentum", "dampening", "nesterov", "beta1", "maximize", "decoupled")


@dataclass(frozen=True)
class SecondMoment:
    """What Adam divides by, of one parameter: the running mean of squared gradients, with AMSGrad its maximum."""

    mean: Tensor
    num_steps: float


@dataclass(frozen=True)
class OptimizerState:
    """What the dynamics of an optimizer depend on, at one step; of the live optimizer, it refers to its tensors."""

    kind: type[Optimizer]
    groups: tuple[Mapping[str, Any], ...]
    """Hyper-parameters of each group; ``params`` are names of the module's parameters."""
    moments: Mapping[str, SecondMoment]
    """By name, of the parameters that have been stepped on; of Adam and its kin only."""

    @classmethod
    def of(cls, optimizer: Optimizer, module: nn.Module) -> "OptimizerState":
        """The present state of an optimizer of the parameters of ``module``, which is only read."""
        names = {id(p): name for name, p in module.named_parameters()}
        groups = tuple(
            {**group, "params": [names[id(p)] for p in group["params"] if id(p) in names]}
            for group in optimizer.param_groups
        )
        owned = [p for group in optimizer.param_groups for p in group["params"] if id(p) in names]
        # `state` is a defaultdict: it must not be asked by [] for what it does not have.
        states = {names[id(p)]: optimizer.state.get(p, {}) for p in owned} if _is_adam(type(optimizer)) else {}
        moments = {n: _second_moment(state) for n, state in states.items() if "exp_avg_sq" in state}
        return cls(type(optimizer), groups, moments)

    def copy(self) -> "OptimizerState":
        """One whose tensors are its own, since the optimizer is about to step."""
        groups = tuple({k: v.clone() if isinstance(v, Tensor) else v for k, v in g.items()} for g in self.groups)
        moments = {name: replace(m, mean=m.mean.clone()) for name, m in self.moments.items()}
        return OptimizerState(self.kind, groups, moments)

    @property
    def num_bytes(self) -> int:
        """What a copy takes."""
        return sum(m.mean.numel() * m.mean.element_size() for m in self.moments.values())


@dataclass(frozen=True)
class Stability:
    """Curvature over that at which the optimizer's linearised full-batch steps diverge; above 1 they are unstable.

    Attributes:
        value: λ/λ_crit.
        reason: Why there is no value.
        per_curvature: What ``value`` grows by per unit of curvature, of SGD with one learning rate: 1/λ_crit.
        decay: Coupled weight decay that counts as curvature, where there is ``per_curvature``.
        small_batch_limit: Where ``batch_sharpness`` in these units saturates for small batches, (1−β)/(1+β).
        num_fixed: Entries of θ that the optimizer does not move, which take no part.
        residual: ‖Au − λu‖ of the rescaled operator whose λ is ``value``, where it took products.
        num_matvecs: Hessian products spent.
        converged: Whether ``residual`` is within its tolerance.
    """

    value: float | None
    reason: str | None = None
    per_curvature: float | None = None
    decay: float = 0.0
    small_batch_limit: float | None = None
    num_fixed: int = 0
    residual: float | None = None
    num_matvecs: int = 0
    converged: bool = True


@dataclass(frozen=True)
class Dynamics:
    """A linearised optimizer as an operator: λ_max of C(H + W)C is 1 where its full-batch steps start to diverge.

    Attributes:
        scale: The diagonal of C, ``(P,)``, or ``()`` where all entries are equal; float64.
        decay: The diagonal of W, of the same shape.
        small_batch_limit: See :class:`Stability`.
    """

    scale: Tensor
    decay: Tensor
    small_batch_limit: float | None = None

    @property
    def is_uniform(self) -> bool:
        """Whether one learning rate and decay serve all of θ."""
        return not self.scale.ndim

    @property
    def num_fixed(self) -> int:
        """Entries of θ that are not moved."""
        return 0 if self.is_uniform else int((self.scale == 0).sum())


class UnknownThresholdError(ValueError):
    """The optimizer is none whose threshold is known."""


def stability(
    optimizers: Sequence[OptimizerState],
    layout: ParameterLayout,
    *,
    lambda_max: float | None = None,
    product: CurvatureProduct | None = None,
    tolerance: float = 1e-3,
    max_products: int = 64,
    max_basis: int | None = None,
) -> Stability:
    """λ/λ_crit of the optimizer that moves θ: the curvature in units of that at which its steps diverge.

    Per coordinate, with learning rate η, decay w and the top eigenvalue λ of C(H+W)C:

    - SGD, momentum β, dampening d: C² = η(1−d)/(2(1+β)), no d where β = 0; Nesterov η(1+2β)/(2(1+β)); W = w
      (arXiv 2103.00065).
    - Adam: C² = η(1−β₁)/(2(1+β₁)s) with s = (1−β₁ᵗ)(√v̂+ε), v̂ = v/(1−β₂ᵗ), AMSGrad's v its maximum; W = w
      (arXiv 2207.14484).
    - AdamW: C² = η(1−β₁)/((1+β₁)(2−ηw)s), W = 0.

    Gradient clipping is not taken into account. Where one learning rate and decay serve all of θ, SGD's value follows
    from ``lambda_max`` at no cost; otherwise a Lanczos run of its own takes about 10 to 20 Hessian products, a vector
    of memory for each.

    Args:
        optimizers: Those of the run; the threshold of one is known.
        layout: Where each parameter lies in θ; of those that the optimizer does not hold, or has never moved, the
            curvature does not count.
        lambda_max: Largest eigenvalue of the Hessian without decay.
        product: v ↦ Hv, for what does not follow from ``lambda_max``.
        tolerance: Residual relative to the value.
        max_products: Most Hessian products.
        max_basis: Most Lanczos vectors held, by restarts; ``None`` for as many as there are products.
    """
    try:
        dynamics = linearised(optimizers, layout)
    except UnknownThresholdError as error:
        return Stability(None, str(error))
    known = Stability(None, num_fixed=dynamics.num_fixed, small_batch_limit=dynamics.small_batch_limit)
    if dynamics.is_uniform:
        square, decay = float(dynamics.scale**2), float(dynamics.decay)
        known = replace(known, per_curvature=square, decay=decay)
        if lambda_max is not None:
            return replace(known, value=square * (lambda_max + decay))
    if not bool(dynamics.scale.any()):
        return replace(known, value=0.0)
    if product is None:
        return replace(known, reason="It takes Hessian products of its own, and there are none.")
    return _by_lanczos(product, dynamics, known, tolerance=tolerance, max_products=max_products, max_basis=max_basis)


def _by_lanczos(product: CurvatureProduct, dynamics: Dynamics, known: Stability, **options: Any) -> Stability:
    theta = product.theta
    start = gaussian(theta.numel(), torch.Generator().manual_seed(0)).to(theta)
    scale, decay = dynamics.scale.to(theta), dynamics.decay.to(theta)
    pairs = extreme_eigenpairs(
        preconditioned(product, scale, decay),
        start * (scale != 0),  # what the optimizer does not move would only add zeros
        num_largest=1,
        num_smallest=0,
        guard=GUARD_PAIRS,
        **options,
    )
    return replace(
        known,
        value=float(pairs.eigenvalues[0]),
        residual=float(pairs.residuals[0]),
        num_matvecs=pairs.num_matvecs,
        converged=bool(pairs.converged[0]),
    )


def preconditioned(product: Matvec, scale: Tensor, decay: Tensor) -> Matvec:
    """v ↦ C(H + W)Cv for diagonal C and W.

    Args:
        product: v ↦ Hv.
        scale: Diagonal of C, ``(P,)`` or ``()``.
        decay: Diagonal of W, ``(P,)`` or ``()``.
    """

    def matvec(vector: Tensor) -> Tensor:
        scaled = scale * vector
        return scale * (product(scaled) + decay * scaled)

    return matvec


def linearised(optimizers: Sequence[OptimizerState], layout: ParameterLayout) -> Dynamics:
    """The operator whose top eigenvalue is the stability; entries of C are 0 where the optimizer does not move θ.

    Raises:
        UnknownThresholdError: The message says why there is none.
    """
    if len(optimizers) != 1:
        raise UnknownThresholdError(f"The threshold is known for one optimizer, there are {len(optimizers)}.")
    (state,) = optimizers
    if not (_is_adam(state.kind) or _follows(state.kind, SGD)):
        raise UnknownThresholdError(f"The threshold is known for SGD, Adam and AdamW, not for {state.kind.__name__}.")
    own = [_rule(group) for group in _measured(state, layout)]
    if not own:
        raise UnknownThresholdError("The optimizer holds none of the measured parameters.")
    differing = [n for n in _SHARED_BY_GROUPS if len({rule[n] for rule in own}) > 1]
    if differing:
        raise UnknownThresholdError(f"The parameter groups differ in {', '.join(differing)}.")
    if own[0]["maximize"]:
        raise UnknownThresholdError("The optimizer maximises.")
    if _is_adam(state.kind):
        return _of_adam(state, own, layout)
    return _of_sgd(own, layout)


def _measured(state: OptimizerState, layout: ParameterLayout) -> Iterator[Mapping[str, Any]]:
    """The groups with those of their parameters that are part of θ, where there are any."""
    for group in state.groups:
        names = [name for name in group["params"] if name in layout.names]
        if names:
            decoupled = group.get("decoupled_weight_decay", issubclass(state.kind, AdamW))
            yield {**group, "params": names, "decoupled": decoupled}


def _rule(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a group as plain values."""
    betas = group.get("betas", (0.0, 0.0))
    return {
        **group,
        **{n: float(group.get(n, 0.0)) for n in ("lr", "weight_decay", "momentum", "dampening", "eps")},
        "beta1": float(betas[0]),
        "beta2": float(betas[1]),
        "nesterov": bool(group.get("nesterov", False)),
        "maximize": bool(group.get("maximize", False)),
    }


def _of_sgd(groups: Sequence[Mapping[str, Any]], layout: ParameterLayout) -> Dynamics:
    beta, dampening, nesterov = (groups[0][n] for n in ("momentum", "dampening", "nesterov"))
    gain = 1 + 2 * beta if nesterov else 1 - dampening if beta else 1.0
    limit = None if nesterov else (1 - beta) / (1 + beta)
    squares = {n: _scalar(g["lr"] * gain / (2 * (1 + beta))) for g in groups for n in g["params"]}
    decays = {n: _scalar(g["weight_decay"]) for g in groups for n in g["params"]}
    return _dynamics(squares, decays, layout, limit)


def _of_adam(state: OptimizerState, groups: Sequence[Mapping[str, Any]], layout: ParameterLayout) -> Dynamics:
    squares, decays = dict[str, Tensor](), dict[str, Tensor]()
    for group in groups:
        decoupled = group["lr"] * group["weight_decay"] if group["decoupled"] else 0.0
        if decoupled >= 2:
            raise UnknownThresholdError(f"lr · weight_decay is {decoupled:.3g}: decay alone diverges from 2 on.")
        gain = group["lr"] * (1 - group["beta1"]) / ((1 + group["beta1"]) * (2 - decoupled))
        for name in group["params"]:
            if name in state.moments:
                squares[name] = gain / _preconditioner(state.moments[name], group)
                decays[name] = _scalar(0.0 if group["decoupled"] else group["weight_decay"])
    if not squares:
        raise UnknownThresholdError(f"{state.kind.__name__} has not taken a step: it has no second moments yet.")
    return _dynamics(squares, decays, layout, None)


def _preconditioner(moment: SecondMoment, group: Mapping[str, Any]) -> Tensor:
    """S: the update is η times the exponential mean of gradients over it."""
    first, second = (1 - group[name] ** moment.num_steps for name in ("beta1", "beta2"))
    mean = torch.view_as_real(moment.mean) if moment.mean.is_complex() else moment.mean
    divisor: Tensor = (mean.detach().double() / second).sqrt() + float(group["eps"])
    return divisor * float(first)


def _dynamics(
    squares: Mapping[str, Tensor], decays: Mapping[str, Tensor], layout: ParameterLayout, limit: float | None
) -> Dynamics:
    """From C² and W by name; a name that is missing is not moved."""
    uniform = len(squares) == len(layout.names) and all(not s.ndim for s in squares.values())
    if uniform and len({(float(squares[n]), float(decays[n])) for n in layout.names}) == 1:
        return Dynamics(squares[layout.names[0]].sqrt(), decays[layout.names[0]], limit)

    device = next((square.device for square in squares.values() if square.ndim), torch.device("cpu"))

    def diagonal(entries: Mapping[str, Tensor]) -> Tensor:
        sizes = zip(layout.names, layout.sizes, strict=True)
        return torch.cat([entries.get(n, _scalar(0.0)).to(device).reshape(-1).expand(size) for n, size in sizes])

    return Dynamics(diagonal(squares).sqrt(), diagonal(decays))


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _second_moment(state: Mapping[str, Any]) -> SecondMoment:
    return SecondMoment(state.get("max_exp_avg_sq", state["exp_avg_sq"]), float(state["step"]))


def _is_adam(kind: type[Optimizer]) -> bool:
    return _follows(kind, Adam) or _follows(kind, AdamW)


def _follows(kind: type[Optimizer], base: type[Optimizer]) -> bool:
    """Whether the optimizer steps by the rule of ``base``: a subclass with a step of its own may do anything."""
    return issubclass(kind, base) and inspect.unwrap(kind.step) is inspect.unwrap(base.step)
