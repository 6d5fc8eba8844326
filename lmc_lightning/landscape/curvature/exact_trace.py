"""Trace of the Hessian without sampling, for networks that are piecewise linear in each of their parameter tensors.

There the diagonal blocks of the Hessian are those of the Gauss–Newton matrix, and with a square root B = SSᵀ of the
loss's Hessian by the outputs, tr H = mean over examples of Σ_c ‖J_nᵀ s_nc‖²: a backward pass for each class but one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lmc_lightning.core.collective import InterruptedMeasurementError
from lmc_lightning.core.gauss_newton import DiagonalCurvature, output_hessian
from lmc_lightning.core.hvp import CurvatureProduct
from lmc_lightning.core.losstap import TappedLoss
from lmc_lightning.core.memory import FREE_MEMORY_SHARE, free_bytes
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.random_vectors import gaussian
from lmc_lightning.core.sample_norms import SampleNorms
from lmc_lightning.core.structure import NotSliceableError, cut, leading_size
from lmc_lightning.landscape.statistics.bands import stderr_data
from lmc_lightning.types import Batch

NUM_EXAMPLES = 8
"""On which the check is made, in float64."""
TOLERANCE = 1e-8
"""Largest abs(vᵀHv − vᵀGv) relative to vᵀGv that is rounding, for v in one parameter tensor."""
_ROUNDING = 1e-13
"""The same relative to ‖Jv‖², for predictions so certain that B is small."""
_NUM_ALONE = 3
"""Examples whose gradients are also taken one by one, to check those that come from the layers."""
_LAYER_TOLERANCE = 1e-9
ELSEWHERE = "it cannot be had on another process"


@dataclass(frozen=True)
class ExactnessCheck:
    """Whether, and how, the trace of a module's Hessian can be had without sampling.

    Attributes:
        reason: Why it cannot; empty if it can.
        curved: Tensors along which the outputs are curved.
        one_by_one: Tensors whose gradients take a backward pass for each single example: all but those of the layers
            that :class:`SampleNorms` knows.
        num_passes: Backward passes over the probe set: outputs of an example, less one for a softmax.
        bytes_per_example: What a pass keeps of the layers' inputs [bytes].
        error: Largest abs(vᵀHv − vᵀGv)/vᵀGv of a tensor.
    """

    reason: str = ""
    curved: tuple[str, ...] = ()
    one_by_one: tuple[str, ...] = ()
    num_passes: int = 0
    bytes_per_example: int = 0
    error: float = 0.0


@dataclass(frozen=True)
class ExactTrace:
    """tr H and its parts, free of sampling error, or the reason why it cannot be had.

    Attributes:
        value: The trace, or ``None``.
        tensors: Its parts by parameter tensor ``(T,)`` float64, in the order of θ.
        stderr_data: Over the examples, by the delta method; speaks of a new probe set.
        example_traces: tr ∇²ℓ_n of each example ``(N,)``.
        example_weights: Share of each example ``(N,)``, so that ``value`` is the weighted mean of ``example_traces``.
        example_labels: Class of each example ``(N,)``, −1 for none.
        num_gradients: Backward passes over the probe set, each at most a gradient.
        check: What was found about the module, to be passed on to the next visit.
    """

    value: float | None
    tensors: Tensor = field(repr=False)
    stderr_data: float | None
    example_traces: Tensor = field(repr=False)
    example_weights: Tensor = field(repr=False)
    example_labels: Tensor = field(repr=False)
    num_gradients: int
    check: ExactnessCheck

    @property
    def reason(self) -> str:
        """Why there is no value; empty if there is one."""
        return self.check.reason


def exact_trace(
    objective: Objective,
    theta: Tensor,
    *,
    generator: torch.Generator,
    check: ExactnessCheck | None = None,
    max_passes: int = 128,
) -> ExactTrace:
    """tr H at θ, its parts by tensor and by example, where the network is piecewise linear in each parameter tensor.

    ReLU networks with pooling, BatchNorm in eval mode and residual connections are, with cross-entropy, squared error
    or binary cross-entropy behind them; networks with smooth activations, attention, gates, re-parametrised or reused
    weights are not, and are told by ``check``. Other values than a mean over examples of the outputs' loss, such as a
    penalty on the weights, are refused too.

    Cost: one forward and ``num_passes`` backward passes; the gradients of single examples are never formed. Memory: one
    chunk's activations, twice.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        generator: Of the directions of the check.
        check: Of an earlier visit to the same module; made anew by default, in float64 on few examples.
        max_passes: Most backward passes; beyond, sampling is cheaper.

    Raises:
        InterruptedMeasurementError: The run was asked to end.
    """
    check = check or exactness(objective, theta, generator)
    if not check.reason and check.num_passes > max_passes:
        check = replace(check, reason=f"it takes {check.num_passes} backward passes, more than max_passes={max_passes}")
    if check.reason:
        return _none(check)
    parts = objective.collective.agree(lambda: _parts_if_possible(objective, theta, check))
    if not objective.collective.everywhere(not isinstance(parts, str)) or isinstance(parts, str):
        reason = parts if isinstance(parts, str) else ELSEWHERE
        return _none(replace(check, reason=reason))
    weights, traces, labels = objective.collective.gather(lambda: parts.examples).T
    tensors = objective.collective.total(lambda: parts.tensors)
    return ExactTrace(
        value=float(weights @ traces),
        tensors=tensors,
        stderr_data=stderr_data(traces, weights),
        example_traces=traces,
        example_weights=weights,
        example_labels=labels.long(),
        num_gradients=check.num_passes,
        check=check,
    )


def _none(check: ExactnessCheck) -> ExactTrace:
    nothing = torch.zeros(0, dtype=torch.float64)
    return ExactTrace(None, nothing, None, nothing, nothing, nothing.long(), 0, check)


@dataclass(frozen=True)
class _Parts:
    """What one process found."""

    examples: Tensor
    """Weight, trace and label of each example ``(n, 3)``."""
    tensors: Tensor
    """``(T,)``"""


def _parts_if_possible(objective: Objective, theta: Tensor, check: ExactnessCheck) -> _Parts | str:
    try:
        return _parts(objective, theta, check)
    except ValueError as error:
        return str(error)


def _parts(objective: Objective, theta: Tensor, check: ExactnessCheck) -> _Parts:
    tensors = torch.zeros(len(objective.layout.names), dtype=torch.float64)
    rows = []
    for index, share in enumerate(objective.baseline.local_weights.tolist()):
        if not share:
            continue
        pieces = list(_pieces(objective, theta, index, check))
        weights = torch.cat([piece.weights for piece in pieces])
        weights = share * weights / weights.sum()
        traces = torch.cat([piece.traces for piece in pieces], 1)
        tensors += traces @ weights
        labels = torch.cat([piece.labels for piece in pieces]).double()
        rows.append(torch.stack([weights, traces.sum(0), labels], 1))
    return _Parts(torch.cat(rows), tensors)


@dataclass(frozen=True)
class _Piece:
    """Some examples of one chunk."""

    weights: Tensor
    labels: Tensor
    traces: Tensor
    """Of each example's own Hessian by tensor ``(T, n)``."""


def _pieces(objective: Objective, theta: Tensor, index: int, check: ExactnessCheck) -> Iterator[_Piece]:
    batch = objective.batches[index]
    affordable = int(FREE_MEMORY_SHARE * free_bytes(theta.device)) // max(1, check.bytes_per_example)
    names = [n for n in objective.layout.names if n not in check.one_by_one]
    for piece in _cut_in_pieces(batch, max(1, affordable)):
        with objective.box():
            tapped, squares, _ = _by_layers(objective, theta, piece, index, names)
            if check.one_by_one:
                squares |= _one_by_one(objective, theta, piece, index, check.one_by_one, len(tapped.weights))
        zero = torch.zeros_like(tapped.weights).cpu()
        traces = torch.stack([squares.get(name, zero) for name in objective.layout.names])
        labels = torch.full_like(zero, -1) if tapped.labels is None else tapped.labels.cpu()
        yield _Piece(tapped.weights.cpu(), labels, traces)


def _cut_in_pieces(batch: Batch, size: int) -> Iterator[Batch]:
    total = leading_size(batch) or 1
    if total <= size:
        yield batch
        return
    try:
        yield from [cut(batch, start, start + size) for start in range(0, total, size)]
    except NotSliceableError:
        yield batch


def _by_layers(
    objective: Objective, theta: Tensor, batch: Batch, index: int, names: Sequence[str]
) -> tuple[TappedLoss, dict[str, Tensor], int]:
    """tr of each example's own block by tensor ``(n,)``, with the loss call behind it and the bytes it took."""
    module = objective.module_at(theta.detach().clone().requires_grad_())
    with SampleNorms(module, names) as norms:
        tapped = objective.tap(module, batch, seed=index)
    form = output_hessian(tapped, per_example=True)
    factors = (form.factor(k).to(tapped.outputs.dtype) for k in range(form.num_factors))
    squares, held = norms.squares(tapped.outputs, factors)
    return tapped, squares, held


def _one_by_one(
    objective: Objective, theta: Tensor, batch: Batch, index: int, names: Sequence[str], count: int
) -> dict[str, Tensor]:
    """The same by passes over single examples, for tensors of any kind."""
    found = [_alone(objective, theta, cut(batch, n, n + 1), index, names)[1] for n in range(count)]
    return {name: torch.stack([one[name] for one in found]) for name in names}


def _alone(
    objective: Objective, theta: Tensor, example: Batch, index: int, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs of one example and tr of its own block by tensor, ``()``."""
    module = objective.module_at(theta.detach().clone().requires_grad_())
    tapped = objective.tap(module, example, seed=index)
    form = output_hessian(tapped, per_example=True)
    tensors = [tensor for name, tensor in module.named_parameters() if name in names]
    total = torch.zeros(len(tensors), dtype=torch.float64)
    for k in range(form.num_factors):
        cotangent = form.factor(k).to(tapped.outputs.dtype)
        found = torch.autograd.grad(tapped.outputs, tensors, cotangent, retain_graph=True, allow_unused=True)
        total += torch.stack([torch.zeros(()) if g is None else g.square().sum().double().cpu() for g in found])
    ordered = [name for name, _ in module.named_parameters() if name in names]
    return tapped.outputs.detach(), dict(zip(ordered, total, strict=True))


def exactness(objective: Objective, theta: Tensor, generator: torch.Generator) -> ExactnessCheck:
    """Whether the diagonal blocks of H are those of the Gauss–Newton matrix G: one check serves a module for a run.

    For every parameter tensor and a random v within it, abs(vᵀHv − vᵀGv) ≤ 1e-8·vᵀGv in float64 on a few examples; and
    the gradients that are found layer by layer are those of the examples alone. Costs two products for each tensor.
    (A comparison of traces by random probes would not see reused weights or gates.)
    """
    try:
        few = objective.excerpt(NUM_EXAMPLES, dtype=torch.float64)
        point = theta.to(few.theta())
        check = few.collective.agree(lambda: _layers_checked(few, point))
        if not few.collective.everywhere(not check.reason):
            return replace(check, reason=check.reason or ELSEWHERE)
        return _curvature_checked(check, few, point, generator)
    except InterruptedMeasurementError:
        raise
    except Exception as error:
        return ExactnessCheck(f"{type(error).__name__}: {error}")


def _layers_checked(objective: Objective, theta: Tensor) -> ExactnessCheck:
    names, batch = objective.layout.names, objective.batches[0]
    if any(dtype.is_complex for dtype in objective.layout.dtypes):
        return ExactnessCheck("it has complex parameters")
    with objective.box():
        tapped, squares, held = _by_layers(objective, theta, batch, 0, names)
        counted = tapped.weights.nonzero().flatten().tolist()[:_NUM_ALONE]
        alone = [(n, *_alone(objective, theta, cut(batch, n, n + 1), 0, names)) for n in counted]
    for n, outputs, _ in alone:
        if not torch.allclose(outputs[0], tapped.outputs[n], rtol=_LAYER_TOLERANCE, atol=1e-12):
            return ExactnessCheck("the outputs of an example depend on the others in its batch")
    wrong = {name for n, _, found in alone for name in names if not _agree(squares.get(name), found[name], n)}
    form, count = output_hessian(tapped), len(tapped.weights)
    ordered = tuple(name for name in names if name in wrong)
    return ExactnessCheck(one_by_one=ordered, num_passes=form.num_factors, bytes_per_example=held // count)


def _agree(by_layer: Tensor | None, alone: Tensor, example: int) -> bool:
    expected = float(alone)
    return abs((0.0 if by_layer is None else float(by_layer[example])) - expected) <= _LAYER_TOLERANCE * expected


def _curvature_checked(
    check: ExactnessCheck, objective: Objective, theta: Tensor, generator: torch.Generator
) -> ExactnessCheck:
    curved, largest = [], 0.0
    with objective.hvp(theta) as hessian, objective.ggn(theta) as gauss_newton:
        lengths = objective.ggn(theta, curvature=_identity)
        for number, (name, size) in enumerate(zip(objective.layout.names, objective.layout.sizes, strict=True)):
            v = gaussian(size, generator).to(theta)
            expected = _form(gauss_newton, number, v)
            error = abs(_form(hessian, number, v) - expected)
            if error > TOLERANCE * expected and error > _ROUNDING * _form(lengths, number, v):
                curved.append(name)
            largest = max(largest, error / expected if expected else 0.0)
    shown = ", ".join(curved[:3]) + (", …" if len(curved) > 3 else "")
    reason = f"the outputs are not piecewise linear in {shown}" if curved else ""
    return replace(check, reason=reason, curved=tuple(curved), error=largest)


def _form(product: CurvatureProduct, number: int, vector: Tensor) -> float:
    return float(vector @ product.on_tensors([number])(vector))


def _identity(tapped: TappedLoss) -> DiagonalCurvature:
    return DiagonalCurvature(torch.full_like(tapped.outputs.detach(), 1 / len(tapped.outputs)))
