"""Sharpness-aware minimisation as an optimizer that is right under Lightning's automatic optimization."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class SAM(Optimizer):
    """SAM and ASAM: a step of another optimizer along ∇L(θ + ε), ε the ascent of length ρ (arXiv 2010.01412, eq. 2).

    ε = ρ g/‖g‖ over all parameters together; with ``adaptive=True``, ASAM's ε = ρ T²g/‖Tg‖ (arXiv 2102.11600, eq. 4)
    with T = abs(θ) + ``eta`` on tensors of two and more dimensions and T = 1 on biases and norms. The gradient is that
    of the batch, so this is m-SAM with m the batch size, per process under DDP after averaging.

    ``step(closure)`` calls the closure twice, at θ and at θ + ε. The closure computes the loss and calls ``backward``,
    as Lightning's does: no manual optimization is needed, ``global_step`` counts one step, and schedulers see the base
    optimizer's own groups. What Lightning hands to ``on_train_batch_end`` as outputs is of the second call. Costs two
    gradients a step.

    Args:
        params: parameters or parameter groups.
        base: class of the optimizer that makes the step.
        rho: radius ρ; of ASAM usually ten times that of SAM, e.g. 0.5.
        adaptive: ASAM.
        eta: η of ASAM.
        module: whose buffers (BatchNorm's running statistics) and, for a LightningModule, logged values are those of
            the first call alone. Without it both calls count.
        **kwargs: of ``base``, e.g. ``lr=0.1, momentum=0.9``.

    Raises:
        ValueError: a negative ``rho``.
        RuntimeError: from ``step``: no closure (as under ``precision="16-mixed"``), or gradients are there before it
            (accumulated over batches whose closures do not run again).
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.01,
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if rho < 0:
            raise ValueError(f"`rho` is a radius, at least 0, got {rho}.")
        self.base = base(params, **kwargs)
        self.rho, self.adaptive, self.eta = rho, adaptive, eta
        self._modules = () if module is None else (module,)
        self._left: dict[Tensor, tuple[Tensor, int]] = {}
        super().__init__(self.base.param_groups, self.base.defaults)
        self._share()

    def _share(self) -> None:
        """One set of groups and states for both optimizers."""
        self.base.param_groups, self.base.state = self.param_groups, self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure returned at θ."""
        if closure is None:
            raise RuntimeError(
                "SAM.step needs a closure that computes the gradient again at the perturbed parameters. "
                "Call step(closure); precision='16-mixed' calls it without one, use 'bf16-mixed' or '32-true'."
            )
        self._refuse_accumulated()
        loss = self._gradient(closure)
        ascended = [(p, p.clone()) for p in self._parameters() if p.grad is not None]
        try:
            self._ascend([p for p, _ in ascended])
            with self._unseen():
                self._gradient(closure)
        finally:
            for parameter, value in ascended:
                parameter.copy_(value)
        self.base.step()
        self._left = {p: (p.grad, p.grad._version) for p in self._parameters() if p.grad is not None}
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over groups and states of a checkpoint, also one of the base optimizer alone."""
        super().load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        own = {"base": self.base, "rho": self.rho, "adaptive": self.adaptive, "eta": self.eta}
        return {**super().__getstate__(), **own, "_modules": (), "_left": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _ascend(self, parameters: list[Tensor]) -> None:
        """θ → θ + ε in place."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        scales = [self._scale(p) for p in parameters]
        scaled = [g if s is None else s * g for g, s in zip(gradients, scales, strict=True)]
        wide = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in scaled]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in wide]))
        if not torch.isfinite(norm) or norm == 0:
            return
        for parameter, gradient, scale in zip(parameters, scaled, scales, strict=True):
            direction = gradient if scale is None else scale * gradient
            parameter.add_(direction * (self.rho / norm).to(direction))

    def _scale(self, parameter: Tensor) -> Tensor | None:
        """T of ASAM; ``None`` for 1."""
        return parameter.abs() + self.eta if self.adaptive and parameter.ndim > 1 else None

    def _gradient(self, closure: Callable[[], Any]) -> Any:
        """What the closure returns; the gradients are those of this call alone."""
        for parameter in self._parameters():
            parameter.grad = None
        with torch.enable_grad():
            return closure()

    def _refuse_accumulated(self) -> None:
        """Gradients that are neither zero nor those of the last step come from batches that cannot be run again."""
        for parameter in self._parameters():
            gradient = parameter.grad
            left, version = self._left.get(parameter, (None, 0))
            if gradient is not None and not (gradient is left and gradient._version == version) and gradient.any():
                raise RuntimeError(
                    "SAM.step found gradients that were computed before it. The closure computes them, twice; those of "
                    "accumulated batches cannot be computed again at the perturbed parameters. "
                    "Use accumulate_grad_batches=1, and no backward() before step(closure)."
                )

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """The second call leaves no trace in the module's buffers and logs."""
        buffers = [(b, b.clone()) for module in self._modules for b in module.buffers()]
        logging = [module for module in self._modules if hasattr(module, "log_dict")]
        try:
            for module in logging:
                module.__dict__.update(log=_ignore, log_dict=_ignore)
            yield
        finally:
            for module in logging:
                module.__dict__.pop("log"), module.__dict__.pop("log_dict")
            for buffer, value in buffers:
                buffer.copy_(value)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """A value that is not logged."""
