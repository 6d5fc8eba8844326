"""Paths between two states of a network, and the loss along them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lmc_lightning.core.evaluation import Evaluation
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.batchnorm import running_statistics

BatchStats: TypeAlias = Literal["recompute", "interpolate", "endpoint"]
"""What BatchNorm normalises with on a path: see :func:`loss_profiles`."""

Path: TypeAlias = Callable[[float], tuple[Tensor, Mapping[str, Tensor]]]
"""t ↦ (θ ``(P,)``, buffers by name) for t in [0, 1]."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called as ``progress(done, total)``."""

NUM_POINTS = 25


@dataclass(frozen=True)
class Endpoint:
    """A state of a network: its parameters θ ``(P,)`` and its buffers by name."""

    theta: Tensor
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


def endpoint_of(objective: Objective, tensors: Mapping[str, Tensor] | None = None) -> Endpoint:
    """The state of the objective's module, with the tensors of a state dict, by name, in place of its own.

    Buffers that ``tensors`` lacks (non-persistent ones) are the module's. Parameters outside θ, frozen or not selected,
    always stay as they are in the objective's module.
    """
    theta, buffers = objective.theta(), objective.buffers
    if tensors is None:
        return Endpoint(theta, buffers)
    missing = [name for name in objective.layout.names if name not in tensors]
    if missing:
        raise ValueError(
            f"The state dict has no {missing[0]!r} ({len(missing)} of {len(objective.layout.names)} parameters are "
            "missing). Give the state dict of a module of the same architecture, with the same prefix of names."
        )
    stored = {name: tensors[name].detach().to(own, copy=True) for name, own in buffers.items() if name in tensors}
    return Endpoint(objective.layout.flatten(tensors).to(theta), buffers | stored)


def linear_path(
    end_a: Endpoint, end_b: Endpoint, *, buffers: Literal["interpolate", "endpoint"] = "interpolate"
) -> Path:
    """The straight line θ(t) = (1−t)θ_A + tθ_B, exact at both ends and everywhere when θ_A = θ_B.

    Args:
        end_a: at t = 0.
        end_b: at t = 1.
        buffers: ``"interpolate"`` moves floating buffers along and keeps A's integer ones, ``"endpoint"`` keeps all of
            A's; either way B's own buffers are used at t = 1.

    Raises:
        ValueError: the ends differ in the length of θ or in names or shapes of buffers.
    """
    if end_a.theta.shape != end_b.theta.shape:
        raise ValueError(
            f"The ends have {end_a.theta.numel()} and {end_b.theta.numel()} parameters. "
            "Only networks of one architecture can be interpolated."
        )
    shapes_a, shapes_b = ({n: tuple(b.shape) for n, b in end.buffers.items()} for end in (end_a, end_b))
    if shapes_a != shapes_b:
        differing = sorted(str(n) for n in shapes_a.keys() | shapes_b.keys() if shapes_a.get(n) != shapes_b.get(n))
        raise ValueError(
            f"The ends differ in their buffers {', '.join(differing[:4])}. Take both from modules of one architecture."
        )
    moving = buffers == "interpolate"

    def path(t: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        theta = torch.lerp(end_a.theta, end_b.theta, t)
        if t == 1:
            return theta, end_b.buffers
        if t == 0 or not moving:
            return theta, end_a.buffers
        return theta, {name: _between(a, end_b.buffers[name], t) for name, a in end_a.buffers.items()}

    return path


def _between(a: Tensor, b: Tensor, t: float) -> Tensor:
    if not (a.is_floating_point() or a.is_complex()):
        return a
    # Equal entries stay as they are: −∞ in an attention mask would become NaN.
    return torch.where(a == b, a, torch.lerp(a, b, t))


def uniform_ts(num_points: int = NUM_POINTS) -> Tensor:
    """Equally spaced t in [0, 1], both ends included, ``(T,)`` float64; ½ is one of them when T is odd."""
    if num_points < 2:
        raise ValueError(f"Expected num_points >= 2 for a path with both ends, got {num_points}.")
    return torch.arange(num_points, dtype=torch.float64) / (num_points - 1)


@dataclass(frozen=True)
class Curve:
    """One metric along a path. Means are over examples, in float64.

    Attributes:
        values: The metric at each t, ``(T,)``.
        own_ends: The metric of the two end states with the BatchNorm statistics that they came with.
        samples: The metric of each example ``(T, N)`` where the loss tap sees them, else of each chunk ``(T, B)``;
            ``None`` for a metric that has no parts.
        weights: Share of each sample in the mean, ``(N,)`` or ``(B,)``.
        unit: What a sample is.
    """

    values: Tensor
    own_ends: tuple[float, float]
    samples: Tensor | None = field(default=None, repr=False)
    weights: Tensor | None = field(default=None, repr=False)
    unit: Literal["example", "chunk"] | None = None


@dataclass(frozen=True)
class Profile:
    """Loss and error, or any other metrics, along one path on one split.

    Attributes:
        ts: Ascending from 0 to 1, ``(T,)`` float64.
        curves: By metric, ``"loss"`` and, where the loss tap sees a classification, ``"error"`` (1 − accuracy).
        split: Name of the data.
        batch_stats: What BatchNorm normalised with on the path; ``None`` without BatchNorm.
        eps: Relative rounding of the parameters' dtype.
    """

    ts: Tensor
    curves: Mapping[str, Curve]
    split: str = ""
    batch_stats: BatchStats | None = None
    eps: float = 0.0

    @property
    def losses(self) -> Tensor:
        """The mean loss at each t, ``(T,)``."""
        return self.curves["loss"].values

    @property
    def errors(self) -> Tensor | None:
        """1 − accuracy at each t, ``(T,)``, where it is known."""
        return self.curves["error"].values if "error" in self.curves else None


def loss_profile(
    objective: Objective,
    path: Path,
    ts: Tensor | Sequence[float] | None = None,
    *,
    split: str = "",
    batch_stats: BatchStats | None = None,
    stats_objective: Objective | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Loss and error of one objective along a path: :func:`loss_profiles` for one split."""
    profiles = loss_profiles(
        {split: objective}, path, ts, batch_stats=batch_stats, stats_objective=stats_objective, progress=progress
    )
    return profiles[split]


def loss_profiles(
    objectives: Mapping[str, Objective],
    path: Path,
    ts: Tensor | Sequence[float] | None = None,
    *,
    batch_stats: BatchStats | None = None,
    stats_objective: Objective | None = None,
    progress: Progress | None = None,
) -> dict[str, Profile]:
    """Loss and error along a path, on several splits that share the work on BatchNorm statistics.

    Costs T forward passes over each split; ``"recompute"`` adds T passes over the training batches and two evaluations
    of the ends as they came.

    Args:
        objectives: one for each split, over one module.
        path: gives θ and buffers at t.
        ts: ascending from 0 to 1; 25 equally spaced points by default.
        batch_stats: ``"recompute"`` takes BatchNorm's statistics at each t, the ends included, from the batches of
            ``stats_objective``. ``"interpolate"`` and ``"endpoint"`` record how ``path`` itself treats them; ``None``
            records that there is no BatchNorm.
        stats_objective: the module on training batches, with ``mode="train"``.
        progress: told after each point.

    Raises:
        ValueError: ``ts`` does not ascend from 0 to 1, or ``"recompute"`` has no ``stats_objective``.
    """
    grid = checked_ts(uniform_ts() if ts is None else ts)
    if batch_stats == "recompute" and stats_objective is None:
        raise ValueError(
            "batch_stats='recompute' needs training batches: pass stats_objective=Objective(module, batches, loss_fn, "
            "mode='train'), or choose batch_stats='interpolate'."
        )
    along: list[dict[str, Evaluation]] = []
    own_ends: list[dict[str, Evaluation]] = []
    for t in grid.tolist():
        with torch.inference_mode(False):  # a step that differentiates by its inputs cannot save inference tensors
            theta, buffers = path(t)
        if batch_stats != "recompute" or t in (0, 1):
            passes = _evaluate(objectives, theta, buffers)
            if t in (0, 1):
                own_ends.append(passes)
        if batch_stats == "recompute" and stats_objective is not None:
            passes = _evaluate(objectives, theta, running_statistics(stats_objective, theta, buffers))
        along.append(passes)
        if progress is not None:
            progress(len(along), len(grid))
    eps = torch.finfo(theta.dtype).eps
    return {
        split: Profile(
            grid,
            _curves([p[split] for p in along], [p[split] for p in own_ends], objective.weighting != "batch_weight"),
            split,
            batch_stats,
            eps,
        )
        for split, objective in objectives.items()
    }


def checked_ts(ts: Tensor | Sequence[float]) -> Tensor:
    """``ts`` as ``(T,)`` float64 on the CPU.

    Raises:
        ValueError: they do not ascend from 0 to 1.
    """
    grid = torch.as_tensor(ts, dtype=torch.float64).cpu()
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or bool((grid.diff() <= 0).any()):
        raise ValueError(f"Expected ts ascending from 0 to 1, both included, got {grid.tolist()}.")
    return grid


def _evaluate(
    objectives: Mapping[str, Objective], theta: Tensor, buffers: Mapping[str, Tensor]
) -> dict[str, Evaluation]:
    return {split: objective.evaluate(theta, buffers=buffers) for split, objective in objectives.items()}


def _curves(along: list[Evaluation], own_ends: list[Evaluation], by_example: bool) -> dict[str, Curve]:
    curves = {"loss": _loss_curve(along, own_ends, by_example)}
    errors = [e.error for e in along + own_ends if e.error is not None]
    if len(errors) == len(along) + 2:
        values, ends = _vector(errors[:-2]), (errors[-2], errors[-1])
        samples, weights = _samples([e.example_errors for e in along], along[0].example_weights)
        curves["error"] = Curve(values, ends, samples, weights, None if samples is None else "example")
    return curves


def _loss_curve(along: list[Evaluation], own_ends: list[Evaluation], by_example: bool) -> Curve:
    values, ends = _vector([e.loss for e in along]), (own_ends[0].loss, own_ends[1].loss)
    if by_example:
        samples, weights = _samples([e.example_losses for e in along], along[0].example_weights)
        if samples is not None:
            return Curve(values, ends, samples, weights, "example")
    # A user's weights need not be additive over the examples of a batch: its mean is then the smallest part.
    samples, weights = _samples([e.chunk_losses for e in along], along[0].weights)
    return Curve(values, ends, samples, weights, None if samples is None else "chunk")


def _samples(parts: Sequence[Tensor | None], weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The parts stacked over t, without those of no weight, and their weights."""
    known = [p for p in parts if p is not None]
    if weights is None or len(known) < len(parts) or any(p.shape != weights.shape for p in known):
        return None, None
    return torch.stack(known)[:, weights > 0], weights[weights > 0]


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
