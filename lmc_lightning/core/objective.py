"""The one evaluator: loss, error, gradient and Hessian products of a module on fixed data, as functions of θ."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lmc_lightning.core.chunks import Chunks, Weighting, first_examples, rechunk, suited_size
from lmc_lightning.core.collective import Collective
from lmc_lightning.core.convolution import LeanLayers
from lmc_lightning.core.evaluation import Evaluation, combined
from lmc_lightning.core.forward import Buffers, ForwardPasses
from lmc_lightning.core.gauss_newton import GaussNewtonProduct, OutputCurvature, outer_products, output_hessian
from lmc_lightning.core.glassbox import glass_box, seed_everything
from lmc_lightning.core.hvp import CurvatureProduct, FiniteDifferenceProduct, HessianProduct
from lmc_lightning.core.leading import Theta
from lmc_lightning.core.losstap import NO_OUTPUTS, LossTap, TappedLoss
from lmc_lightning.core.params import parameter_layout, refuse_sharded
from lmc_lightning.core.shadow import LOW_PRECISION, Mode, Shadow, cast, preserved_state
from lmc_lightning.core.shared_state import SharedState
from lmc_lightning.core.structure import leading_size, with_tensors
from lmc_lightning.types import Batch, BatchWeight, LossFn

SecondOrder: TypeAlias = Literal["autograd", "finite_differences"]


class Objective:
    """θ ↦ mean loss of a module over fixed batches, where θ is the flat vector of its selected parameters.

    Nothing is ever run on ``module`` itself: a shadow computes, with fresh buffers, Python state and seed for each
    chunk, so that the objective is one deterministic function and the module never notices.

    Args:
        module: any ``nn.Module``; its current parameters are ``theta()``.
        batches: the probe set.
        loss_fn: ``(module, batch) -> ()``, the mean loss of a batch; ``None`` for a batch to be skipped.
        parameters: name patterns of the parameters in θ; all trainable ones by default.
        batch_weight: how much a batch counts; by default its examples, or its targets that are not ignored.
        mode: ``"eval"``, or ``"train"`` (batch statistics, dropout off).
        seed: of the random numbers that the step itself draws, the same at each evaluation.
        dtype: floating dtype to compute in; by default that of the parameters, float32 if these are of 16 bits.
        chunk_size: examples evaluated at a time; by default from the device and from shapes, see :func:`suited_size`.
        keep_batches: evaluate the batches as they are given, uncut.
        memory_budget: bytes that cached gradient graphs may take; by default a quarter of what is free.
        replacements: attributes to set on the shadow.
        precision: context in which the step runs, to measure in the precision of the training, e.g. its autocast; by
            default in true float32, or float64 for a module of that dtype.
        second_order: ``"finite_differences"`` of gradients where double backward is missing or wrong; in float64 only.
        collective: the processes that hold the other batches of the probe set.

    Raises:
        ValueError: no batches, no parameters to measure, or parameters that are sharded over processes.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Batch],
        loss_fn: LossFn,
        *,
        parameters: Sequence[str] | None = None,
        batch_weight: BatchWeight | None = None,
        mode: Mode = "eval",
        seed: int = 0,
        dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        keep_batches: bool = False,
        memory_budget: int | None = None,
        replacements: Mapping[str, object] | None = None,
        precision: Callable[[], AbstractContextManager[Any]] | None = None,
        second_order: SecondOrder = "autograd",
        collective: Collective | None = None,
    ) -> None:
        refuse_sharded(module)
        same: dict[str, Any] = {"parameters": parameters, "batch_weight": batch_weight, "mode": mode, "seed": seed}
        same |= {"replacements": replacements, "collective": collective}
        self._alike = partial(Objective, module, loss_fn=loss_fn, **same)
        self.mode, self.seed, self.second_order = mode, seed, second_order
        self.memory_budget, self.precision = memory_budget, precision
        self._recurrent, self._dtype = any(isinstance(m, nn.RNNBase) for m in module.modules()), dtype
        self._module, self._loss_fn, self._batch_weight = module, loss_fn, batch_weight
        self._shared = SharedState(module)
        self.collective = collective or Collective()
        self._passes = ForwardPasses(self, batch_weight)
        self._without_graph: set[int] = set()
        self._latest: tuple[object, nn.Module] | None = None
        with self.box():
            self._shadow = Shadow(module, replacements=replacements, dtype=dtype, keep_precision=precision is not None)
            self.layout = parameter_layout(self._shadow.module, parameters)
            theta = self.layout.flatten(dict(self._shadow.module.named_parameters()))
            self._theta = theta.float() if theta.dtype in LOW_PRECISION else theta
            chunks = self.collective.agree(lambda: self._chunks(batches, chunk_size, keep_batches))
        self.batches, self.additive = chunks.batches, self.collective.everywhere(chunks.additive)

    def _chunks(self, batches: Iterable[Batch], size: int | None, keep_batches: bool) -> Chunks:
        given = [self._prepared(b) for b in batches]
        if not given:
            raise ValueError("Expected at least one probe batch, got none. Give a loader that yields batches.")
        if keep_batches:
            return Chunks(tuple(given), additive=False)

        def mean_loss(some: Sequence[Batch]) -> float:
            return self._passes.over(some, self._theta).mean()

        return rechunk(given, size or suited_size(self._theta, given[0], mean_loss), mean_loss)

    @contextmanager
    def box(self) -> Iterator[None]:
        """The glass box, and the module's own Python state behind it: whatever runs inside leaves no trace."""
        with self._light_box(), preserved_state(self._module), self._shared.preserved():
            yield

    def _light_box(self) -> AbstractContextManager[None]:
        precise = self.precision is None
        return glass_box(match_precision=not precise, without_cudnn=self._recurrent, dtype=self._dtype)

    def _prepared(self, batch: Batch) -> Batch:
        # Batches stay on the device they come on, so that a probe set may be larger than the GPU's memory.
        converted = self._shadow.dtype
        return with_tensors(batch, lambda t: t.detach() if converted is None else cast(t.detach(), converted))

    def placed(self, batch: Batch) -> Batch:
        """A private copy of a batch on the device of θ."""
        device = self._theta.device
        return with_tensors(batch, lambda t: t.detach().to(device, copy=True))

    @cached_property
    def baseline(self) -> Evaluation:
        """The evaluation at ``theta()``; its weights are those of every mean over the probe set."""
        with self.box():
            return combined(self.collective.agree(lambda: self._passes.watched(self._theta)), self.collective)

    @property
    def num_params(self) -> int:
        """The length P of θ."""
        return self.layout.num_params

    @cached_property
    def num_examples(self) -> int | None:
        """Examples in the probe set, of all processes, where they can be counted."""
        sizes = [leading_size(b) for b in self.batches]
        counts = self.collective.gather(lambda: torch.tensor([-1 if n is None else n for n in sizes]))
        return None if bool((counts < 0).any()) else int(counts.sum())

    @property
    def weighting(self) -> Weighting:
        """What a mean is over."""
        if self._batch_weight is not None:
            return "batch_weight"
        if self.num_examples is None:
            return "batches"
        counts = self.baseline.example_weights
        uneven = counts is not None and bool((counts != counts[0]).any())
        return "targets" if uneven else "examples"

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Detached copies of the module's buffers by name, as they were when the objective was made."""
        return {n: b.detach().clone() for n, b in self._shadow.module.named_buffers()}

    def theta(self) -> Tensor:
        """The parameters ``(P,)`` as they were when the objective was made, a copy."""
        return self._theta.clone()

    def loss(self, theta: Tensor) -> Tensor:
        """The mean loss over the probe set, ``()`` in float64."""
        return torch.tensor(self.evaluate(theta).loss, dtype=torch.float64)

    def evaluate(self, theta: Tensor, *, buffers: Mapping[str, Tensor] | None = None) -> Evaluation:
        """Loss, error and their values per example at θ, one forward pass over the probe set."""
        return self.evaluate_many([theta], buffers=[buffers])[0]

    def evaluate_many(self, thetas: Iterable[Theta], *, buffers: Iterable[Buffers] | None = None) -> list[Evaluation]:
        """:meth:`evaluate` at each of many points, which share whatever does not depend on θ.

        Bit for bit what :meth:`evaluate` finds, except at points given as :class:`~lmc_lightning.core.leading.Mix`: at
        these a leading linear layer is computed at the anchors alone, on CPUs, which agrees up to rounding.

        Args:
            thetas: the points; an iterator is drawn from in blocks, so that not all are in memory at once.
            buffers: those of each point.
        """
        if self._passes.stateful is None:
            _ = self.baseline  # the pass that watches the steps; if they keep no state, all further ones are cheaper
        given = ((theta, None) for theta in thetas) if buffers is None else zip(thetas, buffers, strict=True)
        with self.box():
            return self._passes.evaluate(given)

    def known(self, theta: Tensor, buffers: Mapping[str, Tensor]) -> Evaluation | None:
        """The baseline, where that is what :meth:`evaluate` would find."""
        own = self.buffers
        same = torch.equal(theta, self._theta) and all(torch.equal(b, own[n]) for n, b in buffers.items())
        return self.baseline if same else None

    def grad(self, theta: Tensor) -> Tensor:
        """∇L(θ) ``(P,)``, summed over chunks in float64."""
        weights = self.baseline.local_weights
        with self.box():
            return self.collective.total(lambda: self._local_gradient(theta, weights)).to(theta.dtype)

    def _local_gradient(self, theta: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(theta, dtype=torch.float64)
        leaves = self.leaves(theta)
        for index, weight in enumerate(weights.tolist()):
            if weight:
                total.add_(torch.cat(self.tensor_gradients(index, leaves, create_graph=False)), alpha=weight)
        self._latest = None
        return total

    def hvp(self, theta: Tensor, *, memory_budget: int | None = None) -> CurvatureProduct:
        """v ↦ ∇²L(θ) v at a fixed θ; gradient graphs are kept between products as far as the memory budget goes."""
        weights, common = self.baseline.local_weights, {"sizes": self.layout.sizes, "collective": self.collective}
        if self.second_order == "finite_differences":
            return FiniteDifferenceProduct(theta, self.chunk_gradient, weights, context=self.box, **common)
        budget = self.memory_budget if memory_budget is None else memory_budget
        return HessianProduct(theta, self.tensor_gradients, weights, budget, context=self._light_box, **common)

    def ggn(
        self,
        theta: Tensor,
        *,
        memory_budget: int | None = None,
        curvature: Callable[[TappedLoss], OutputCurvature] = output_hessian,
    ) -> GaussNewtonProduct:
        """v ↦ Jᵀ B J v at a fixed θ, J the outputs' Jacobian, B the loss's Hessian by the outputs' natural parameters.

        For losses over classes or bits this is the Fisher information matrix. ``curvature`` gives another form B.

        Raises:
            ValueError: the loss is not one that :class:`LossTap` can see.
        """
        weights, common = self.baseline.local_weights, {"sizes": self.layout.sizes, "collective": self.collective}
        if self.baseline.example_losses is None:
            raise ValueError(NO_OUTPUTS)

        def tap(index: int, leaves: tuple[Tensor, ...]) -> TappedLoss:
            with self.box(), LeanLayers():
                tapped = self.tap(self._module_for(leaves), self.batches[index], seed=index)
            if not tapped.outputs.requires_grad:
                self._constant(index, leaves)
            return tapped

        budget = self.memory_budget if memory_budget is None else memory_budget
        return GaussNewtonProduct(theta, tap, curvature, weights, budget, context=self._light_box, **common)

    def empirical_fisher(self, theta: Tensor, *, memory_budget: int | None = None) -> GaussNewtonProduct:
        """v ↦ mean over examples of g_n (g_nᵀ v) at a fixed θ, g_n the gradient of the example's own loss; as ggn."""
        return self.ggn(theta, memory_budget=memory_budget, curvature=outer_products)

    def tap(self, module: nn.Module, batch: Batch, *, seed: int = 0) -> TappedLoss:
        """The loss call behind :meth:`step`, its outputs with their graph; to be made inside :meth:`box`.

        Raises:
            ValueError: the loss is not one that :class:`LossTap` can see.
        """
        with LossTap() as tap:
            loss = self.step(module, batch, seed=seed)
        return tap.required(loss)

    def excerpt(self, num_examples: int, *, dtype: torch.dtype | None = None) -> "Objective":
        """The same loss on the first examples of this process, e.g. for a check in float64."""
        few = first_examples(self.batches[0], num_examples)
        return self._alike(batches=[few], dtype=dtype or self._dtype, keep_batches=True)

    def chunk_loss(self, index: int, theta: Tensor) -> float:
        """One chunk's mean loss at θ; NaN where the step skips it."""
        with self.box():
            part = self._passes.afresh(theta, index, self.batches[index])
        return float("nan") if part is None else part[0]

    def chunk_gradient(self, index: int, theta: Tensor) -> Tensor:
        """The gradient ``(P,)`` of one chunk's mean loss at θ."""
        return torch.cat(self.tensor_gradients(index, self.leaves(theta), create_graph=False))

    def leaves(self, theta: Tensor) -> tuple[Tensor, ...]:
        """A differentiable copy of each parameter tensor's part of θ."""
        return tuple(part.detach().clone().requires_grad_() for part in theta.split(self.layout.sizes))

    def tensor_gradients(
        self, index: int, leaves: tuple[Tensor, ...], *, create_graph: bool = True
    ) -> tuple[Tensor, ...]:
        """The gradient of one chunk's mean loss with respect to each tensor of θ as a flat leaf, with its graph."""
        with self.box(), LeanLayers() if create_graph else nullcontext():
            loss = self.step(self._module_for(leaves), self.batches[index], seed=index)
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if loss is not None and loss.requires_grad:
                found = torch.autograd.grad(loss.reshape(()), leaves, create_graph=create_graph, allow_unused=True)
        if all(gradient is None for gradient in found):
            return self._constant(index, leaves)
        return tuple(torch.zeros_like(a) if b is None else b for a, b in zip(leaves, found, strict=True))

    def _constant(self, index: int, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The zero gradient of a chunk whose loss has no graph to θ, as that of another task; not of all chunks."""
        self._without_graph.add(index)
        if len(self._without_graph) == len(self.batches):
            raise ValueError(
                f"The loss does not depend on the measured parameters in mode={self.mode!r}: the step detaches it. "
                f"Try mode='train', where a step keeps its graph, or other parameters."
            )
        return tuple(torch.zeros_like(leaf) for leaf in leaves)

    def module_at(
        self, theta: Tensor | Sequence[Tensor], *, buffers: Mapping[str, Tensor] | None = None, mode: Mode | None = None
    ) -> nn.Module:
        """A fresh module whose selected parameters are differentiable views of θ, or of the tensors' parts of it."""
        tensors = self.layout.unflatten(theta) if isinstance(theta, Tensor) else self.layout.shaped(theta)
        return self.module_with(tensors, buffers=buffers, mode=mode)

    def module_with(
        self, tensors: Mapping[str, Tensor], *, buffers: Buffers = None, mode: Mode | None = None
    ) -> nn.Module:
        """A fresh module that computes with these very tensors as its selected parameters."""
        return self._shadow.at(tensors, buffers=buffers, mode=mode or self.mode)

    def _module_for(self, leaf: tuple[Tensor, ...]) -> nn.Module:
        """A module at ``leaf`` in its pristine state: the last one, where steps were seen to leave that as it is."""
        if self._passes.stateful is False and self._latest is not None and self._latest[0] is leaf:
            return self._latest[1]
        module = self.module_at(leaf)
        self._latest = (leaf, module)
        return module

    def step(self, module: nn.Module, batch: Batch, *, seed: int = 0) -> Tensor | None:
        """The loss of ``batch`` by the user's own step on ``module`` (from :meth:`module_at`), under a fixed seed."""
        return self.run(module, self.placed(batch), seed=seed)

    def run(self, module: nn.Module, placed: Batch, *, seed: int = 0) -> Tensor | None:
        """As :meth:`step`, on a private copy of a batch, which the user's step may change."""
        seed_everything(self.seed + seed)
        with self.precision() if self.precision else nullcontext(), self._shared.preserved():
            return self._loss_fn(module, placed)
