"""Is the Hessian product that autograd gives the derivative of the gradient? One test in float64 answers for a module.

Some operations have a wrong or missing second derivative and raise no error; some steps have no Hessian at all, because
what they call gradient is not that of the computed loss (straight-through estimators, power iterations).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from lmc_lightning.core.collective import InterruptedMeasurementError
from lmc_lightning.core.gauss_newton import output_hessian
from lmc_lightning.core.hvp import relative_step
from lmc_lightning.core.losstap import TappedLoss
from lmc_lightning.core.memory import is_out_of_memory
from lmc_lightning.core.objective import Objective

TOLERANCE = 1e-3
"""Largest relative disagreement that is put down to rounding and kinks."""
_STEPS = (1.0, 1e3, 1e5)
"""Multiples of the smallest step, which crosses no kinks: parts of a step that compute in float32 need a larger one."""
_LARGEST_SEARCH = 64
NUM_DIRECTIONS = 3
NUM_EXAMPLES = 16
"""Enough to see a wrong derivative; more only bring more kinks into the differences."""

Verdict = Literal["exact", "finite_differences", "no_hessian", "unchecked"]


@dataclass(frozen=True)
class SelfCheck:
    """Whether second derivatives can be trusted, and by which route to take them."""

    verdict: Verdict
    reason: str = ""
    relative_error: float = 0.0
    """Of the product against central differences of gradients, along one random direction."""
    suspect: str = ""
    """The parameter along which the disagreement is largest."""


def self_check(objective: Objective, seed: int = 0) -> SelfCheck:
    """The verdict on one objective, best made in float64 on few examples. Costs about 15 gradients of these.

    Args:
        objective: made with ``dtype=torch.float64``.
        seed: of the random directions.
    """
    theta = objective.theta()
    directions = _directions(theta, seed)
    losses = [float(objective.loss(theta)) for _ in range(2)]
    if not all(map(isfinite, losses)):
        return SelfCheck("unchecked", f"the loss is {losses[0]}")
    if losses[0] != losses[1]:
        return SelfCheck("no_hessian", "two evaluations at one point give different losses")
    error = _gradient_error(objective, theta, directions[0])
    if error > TOLERANCE:
        reason = f"the gradient is not that of the loss (relative error {error:.1e} along a random direction)"
        return SelfCheck("no_hessian", f"{reason}: straight-through estimates and power iterations do this", error)
    return _check_products(objective, theta, directions)


def _check_products(objective: Objective, theta: Tensor, directions: Tensor) -> SelfCheck:
    pruned = pruned_nodes(torch.cat(objective.tensor_gradients(0, objective.leaves(theta))))
    try:
        with objective.hvp(theta) as product:
            products = [product(v) for v in directions]
            asymmetry = _asymmetry(directions, products)
            # A difference that crosses a kink is wrong along its direction; a wrong product is so along all.
            pairs = zip(directions, products, strict=True)
            error = _first_small(_product_error(objective, theta, v, hv) for v, hv in pairs)
            if objective.collective.everywhere(not pruned) and max(error, asymmetry) <= TOLERANCE:
                return SelfCheck("exact", relative_error=error)
            suspect = _suspect(objective, theta, directions[1], product)
    except RuntimeError as failure:
        if isinstance(failure, InterruptedMeasurementError) or is_out_of_memory(failure):
            raise
        return SelfCheck("finite_differences", f"no double backward: {str(failure).splitlines()[0]}")
    reason = f"double backward is wrong (relative error {error:.1e}, asymmetry {asymmetry:.1e})"
    if pruned:
        reason = f"double backward skips {', '.join(sorted(pruned))}"
    return SelfCheck("finite_differences", reason, error, suspect)


def self_check_outputs(objective: Objective, seed: int = 0) -> SelfCheck:
    """The verdict on products through the network's outputs: are they those of the differences of the outputs?

    Args:
        objective: made with ``dtype=torch.float64``, of one batch on each process.
        seed: of the random directions.
    """
    theta = objective.theta()
    directions = _directions(theta, seed)
    with objective.ggn(theta) as product:
        products = [product(v) for v in directions]
    asymmetry = _asymmetry(directions, products)
    pairs = zip(directions, products, strict=True)
    error = _first_small(_form_error(objective, theta, v, float(v @ gv)) for v, gv in pairs)
    if max(error, asymmetry) <= TOLERANCE:
        return SelfCheck("exact", relative_error=error)
    reason = f"the outputs' derivatives are wrong (relative error {error:.1e}, asymmetry {asymmetry:.1e})"
    return SelfCheck("no_hessian", reason, error)


def _directions(theta: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_DIRECTIONS, len(theta), generator=generator, dtype=theta.dtype).to(theta.device)


def _asymmetry(directions: Tensor, products: Sequence[Tensor]) -> float:
    """abs(uᵀCv − vᵀCu) of the first two directions, relative to their lengths."""
    (u, v), (cu, cv) = directions[:2], products[:2]
    return float((u @ cv - v @ cu).abs() / (u.norm() * cv.norm()).clamp(min=1e-300))


def _form_error(objective: Objective, theta: Tensor, v: Tensor, form: float) -> float:
    """Relative error of vᵀGv against dᵀB d, with d the central difference of the outputs along v."""
    share = float(objective.baseline.local_weights[0])

    def tapped(point: Tensor) -> TappedLoss:
        return objective.tap(objective.module_at(point), objective.batches[0])

    def local(step: float) -> Tensor:
        with objective.box():
            ahead, behind = (tapped(theta + s * step * v).outputs.detach() for s in (1, -1))
            change = (ahead - behind) / (2 * step)
            return share * (change * output_hessian(tapped(theta))(change)).sum()

    def error(step: float) -> float:
        expected = float(objective.collective.total(partial(local, step)))
        return abs(form - expected) / max(expected, 1e-300) if form or expected else 0.0

    return _first_small(error(multiple * relative_step(theta, v)) for multiple in _STEPS)


def _gradient_error(objective: Objective, theta: Tensor, v: Tensor) -> float:
    gradient = objective.grad(theta)
    if not gradient.any():
        return 0.0
    direction = gradient / gradient.norm() + v / v.norm()
    slope = float(gradient @ direction)

    def error(step: float) -> float:
        rise = float(objective.loss(theta + step * direction) - objective.loss(theta - step * direction))
        return abs(rise / (2 * step) - slope) / abs(slope)

    return _first_small(error(multiple * relative_step(theta, direction)) for multiple in _STEPS)


def _product_error(objective: Objective, theta: Tensor, v: Tensor, product: Tensor) -> float:
    floor = 1e-6 * float(objective.grad(theta).norm() * v.norm() / theta.norm().clamp(min=1e-12))

    def error(step: float) -> float:
        difference = (objective.grad(theta + step * v) - objective.grad(theta - step * v)) / (2 * step)
        return float((product - difference).norm()) / max(float(difference.norm()), floor, 1e-300)

    return _first_small(error(multiple * relative_step(theta, v)) for multiple in _STEPS)


def _first_small(errors: Iterable[float]) -> float:
    """The first error within the tolerance, without asking for more; the smallest where none is."""
    smallest = float("inf")
    for error in errors:
        smallest = min(smallest, error)
        if smallest <= TOLERANCE:
            break
    return smallest


def _suspect(objective: Objective, theta: Tensor, v: Tensor, product: Callable[[Tensor], Tensor]) -> str:
    """The parameter tensor along which product and differences disagree most; the first ones only in large modules."""
    worst, name_of_worst = 0.0, ""
    for name, part in _parts(objective, v):
        error = _product_error(objective, theta, part, product(part))
        if error > worst:
            worst, name_of_worst = error, name
    return name_of_worst


def _parts(objective: Objective, v: Tensor) -> Iterator[tuple[str, Tensor]]:
    start = 0
    for name, size in list(zip(objective.layout.names, objective.layout.sizes, strict=True))[:_LARGEST_SEARCH]:
        part = torch.zeros_like(v)
        part[start : start + size] = v[start : start + size]
        yield name, part
        start += size


def pruned_nodes(gradient: Tensor) -> set[str]:
    """Names of the nodes behind a differentiable gradient that would raise if the engine did not prune them."""
    found: set[str] = set()
    seen: set[object] = set()
    stack = [gradient.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "Error" in node.name() or "NotImplemented" in node.name():
            found.add(node.name())
        stack.extend(parent for parent, _ in node.next_functions)
    return found
