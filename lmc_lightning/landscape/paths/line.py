"""States of a network, and paths between two of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lmc_lightning.core.leading import Anchors, Mix
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.params import ParameterLayout

BatchStats: TypeAlias = Literal["recompute", "interpolate", "endpoint"]
"""What BatchNorm normalises with on a path: see :class:`~lmc_lightning.landscape.paths.states.StateEvaluator`."""

Path: TypeAlias = Callable[[float], tuple[Tensor, Mapping[str, Tensor]]]
"""t ↦ (θ ``(P,)``, buffers by name) for t in [0, 1]."""

NUM_POINTS = 25


@dataclass(frozen=True, eq=False)
class Endpoint:
    """A state of a network: its parameters θ ``(P,)``, its buffers by name, and which tensors θ is made of."""

    theta: Tensor
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    layout: ParameterLayout | None = None


def endpoint_of(objective: Objective, tensors: Mapping[str, Tensor] | None = None) -> Endpoint:
    """The state of the objective's module, with the tensors of a state dict, by name, in place of its own.

    Buffers that ``tensors`` lacks (non-persistent ones) are the module's. Parameters outside θ, frozen or not selected,
    always stay as they are in the objective's module. A tied parameter is found under any of its names.

    Raises:
        ValueError: a parameter is missing, has another shape, or is tied in the module and not in ``tensors``.
    """
    layout, buffers = objective.layout, objective.buffers
    if tensors is None:
        return Endpoint(objective.theta(), buffers, layout)
    tensors = _under_own_names(objective, tensors)
    missing = [name for name in layout.names if name not in tensors]
    if missing:
        raise ValueError(
            f"The state dict has no {missing[0]!r} ({len(missing)} of {len(layout.names)} parameters are "
            "missing). Give the state dict of a module of the same architecture, with the same prefix of names."
        )
    own = dict(zip(layout.names, layout.shapes, strict=True)) | {name: b.shape for name, b in buffers.items()}
    for name, shape in own.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(
                f"{name!r} is of shape {list(tensors[name].shape)} in the state dict and of {list(shape)} in the "
                "module. Only networks of one architecture can be interpolated."
            )
    stored = {name: tensors[name].detach().to(b, copy=True) for name, b in buffers.items() if name in tensors}
    return Endpoint(layout.flatten(tensors).to(objective.theta()), buffers | stored, layout)


def _under_own_names(objective: Objective, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``tensors`` with every tied parameter under the name that it has in θ."""
    names = objective.layout.names
    if tensors.keys() <= {*names, *objective.buffers} and len(tensors.keys() & {*names}) == len(names):
        return tensors
    shadow = list(objective.module_at(objective.theta()).named_parameters(remove_duplicate=False))
    own = {id(tensor): name for name, tensor in reversed(shadow) if name in names}
    found = dict(tensors)
    for alias, tensor in shadow:
        name = own.get(id(tensor), alias)
        if name == alias or alias not in tensors:
            continue
        if not torch.equal(found.setdefault(name, tensors[alias]), tensors[alias]):
            raise ValueError(
                f"{name!r} and {alias!r} are one parameter in the module and two different ones in the state dict. "
                "Only networks that tie the same parameters can be interpolated."
            )
    return found


def linear_path(
    end_a: Endpoint, end_b: Endpoint, *, buffers: Literal["interpolate", "endpoint"] = "interpolate"
) -> "Line":
    """The straight line θ(t) = (1−t)θ_A + tθ_B, exact at both ends and everywhere when θ_A = θ_B.

    Args:
        end_a: at t = 0.
        end_b: at t = 1.
        buffers: ``"interpolate"`` moves floating buffers along and keeps A's integer ones, ``"endpoint"`` keeps all of
            A's; either way B's own buffers are used at t = 1.

    Raises:
        ValueError: the ends differ in the length of θ, or in names or shapes of parameters or buffers.
    """
    _check_alike(end_a, end_b)
    return Line(Anchors((end_a.theta, end_b.theta)), end_a.buffers, end_b.buffers, moving=buffers == "interpolate")


@dataclass(frozen=True)
class Line:
    """A path that is straight in θ, so that points of it can be evaluated together.

    Attributes:
        ends: θ at 0 and at 1.
        buffers_a: Buffers at 0 and, unless they are ``moving``, up to 1.
        buffers_b: Buffers at 1.
        moving: Whether floating buffers go along.
    """

    ends: Anchors
    buffers_a: Mapping[str, Tensor]
    buffers_b: Mapping[str, Tensor]
    moving: bool

    def __call__(self, t: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        """θ and buffers at t."""
        mix, buffers = self.point(t)
        return mix.theta, buffers

    def point(self, t: float) -> tuple[Mix, Mapping[str, Tensor]]:
        """The same, θ as a mix of the ends."""
        mix = self.ends.at(t)
        if t == 1:
            return mix, self.buffers_b
        if t == 0 or not self.moving:
            return mix, self.buffers_a
        return mix, {name: _between(a, self.buffers_b[name], t) for name, a in self.buffers_a.items()}


def _check_alike(end_a: Endpoint, end_b: Endpoint) -> None:
    if end_a.theta.shape != end_b.theta.shape:
        raise ValueError(
            f"The ends have {end_a.theta.numel()} and {end_b.theta.numel()} parameters. "
            "Only networks of one architecture can be interpolated."
        )
    layouts = [end.layout for end in (end_a, end_b) if end.layout is not None]
    parameters = [{n: tuple(s) for n, s in zip(of.names, of.shapes, strict=True)} for of in layouts]
    buffers = [{n: tuple(b.shape) for n, b in end.buffers.items()} for end in (end_a, end_b)]
    for kind, shapes in (("parameters", parameters), ("buffers", buffers)):
        differing = sorted({n for of in shapes for n in of if any(other.get(n) != of[n] for other in shapes)})
        if differing:
            raise ValueError(
                f"The ends differ in their {kind} {', '.join(differing[:4])}. Take both from modules of one "
                "architecture."
            )
    if any(list(of) != list(parameters[0]) for of in parameters):
        raise ValueError("The ends hold the same parameters in another order. Take both from one objective.")


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


def checked_ts(ts: Tensor | Sequence[float]) -> Tensor:
    """``ts`` as ``(T,)`` float64 on the CPU.

    Raises:
        ValueError: they do not ascend from 0 to 1.
    """
    grid = torch.as_tensor(ts, dtype=torch.float64).cpu()
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or bool((grid.diff() <= 0).any()):
        raise ValueError(f"Expected ts ascending from 0 to 1, both included, got {grid.tolist()}.")
    return grid
