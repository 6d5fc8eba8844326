"""Named parameters of a module as one flat vector θ, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter


@dataclass(frozen=True)
class ParameterLayout:
    """Where each named tensor lies in θ ``(P,)``. Tied tensors count once, complex entries as two real numbers."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def sizes(self) -> list[int]:
        """Entries of θ that each tensor takes."""
        return [s.numel() * (2 if d.is_complex else 1) for s, d in zip(self.shapes, self.dtypes, strict=True)]

    @property
    def num_params(self) -> int:
        """The length P of θ."""
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """θ ``(P,)``: a detached copy of the named tensors in one vector of their common real dtype."""
        parts = [_real(tensors[name].detach()).reshape(-1) for name in self.names]
        dtype = parts[0].dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        return torch.cat([part.to(dtype) for part in parts])

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """The named tensors as differentiable views of θ (casts where a module mixes dtypes)."""
        if theta.shape != (self.num_params,):
            raise ValueError(f"Expected θ of shape ({self.num_params},), got {tuple(theta.shape)}.")
        # One view each: of several views made at once, as by split, none may be changed in place, as some steps do.
        ends = accumulate(self.sizes)
        return self.shaped([theta.narrow(0, end - size, size) for size, end in zip(self.sizes, ends, strict=True)])

    def shaped(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """The named tensors as differentiable views of the flat parts of θ that belong to them."""
        named = zip(self.names, self.shapes, self.dtypes, parts, strict=True)
        return {name: _shaped(part, shape, dtype) for name, shape, dtype, part in named}


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _shaped(part: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if dtype.is_complex:
        # No view: one of complex numbers may only begin at an even place of θ, or of a vector that H is applied to.
        return torch.complex(*part.to(dtype.to_real()).reshape(*shape, 2).unbind(-1))
    return part.to(dtype).view(shape)


def refuse_sharded(module: nn.Module) -> None:
    """Refuse a module whose parameters are spread over processes: to autograd its loss does not depend on them.

    Raises:
        ValueError: a parameter is a ``DTensor``.
    """
    for name, parameter in module.named_parameters():
        if any(c.__name__ == "DTensor" for c in type(parameter).__mro__):  # by name: torch may lack torch.distributed
            raise ValueError(
                f"Parameter {name} is a DTensor, spread over processes, so its derivatives cannot be taken here. "
                f"Load a consolidated checkpoint into an unsharded module and measure that: "
                f"lmc_lightning.measure(module, dataloader, [callback])."
            )


def parameter_layout(module: nn.Module, patterns: Sequence[str] | None = None) -> ParameterLayout:
    """The layout of the trainable parameters of ``module`` whose names match one of ``patterns`` (all by default).

    Raises:
        ValueError: no parameter is trainable, no name matches, or a lazy parameter has no shape yet.
    """
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            f"{type(module).__name__} has no parameter with requires_grad=True: nothing to measure. "
            "Call requires_grad_() on what shall be measured."
        )
    chosen = {n: p for n, p in trainable.items() if patterns is None or any(fnmatchcase(n, q) for q in patterns)}
    if not chosen:
        known = ", ".join(list(trainable)[:8])
        raise ValueError(
            f"No trainable parameter matches {list(patterns or [])}. The first names are: {known}. "
            "A * stands for any part."
        )
    lazy = [n for n, p in chosen.items() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ValueError(f"Parameter {lazy[0]} has no shape yet. Run one batch through the module before measuring.")
    return ParameterLayout(
        names=tuple(chosen),
        shapes=tuple(p.shape for p in chosen.values()),
        dtypes=tuple(p.dtype for p in chosen.values()),
    )
