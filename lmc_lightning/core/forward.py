"""Forward passes of an objective: what evaluations may share is found out once, by watching the first pass."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, product
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from lmc_lightning.core.evaluation import ChunkEvaluation, Evaluation, Parts, chunk_weight, combined, example_rows
from lmc_lightning.core.leading import LeadingLayer, Mix, Shortcuts, Theta, point_of
from lmc_lightning.core.losstap import LossTap
from lmc_lightning.core.shadow import state_of
from lmc_lightning.core.structure import tensors_in
from lmc_lightning.types import Batch, BatchWeight

if TYPE_CHECKING:
    from lmc_lightning.core.objective import Objective

Buffers: TypeAlias = Mapping[str, Tensor] | None
State: TypeAlias = tuple[Theta, Buffers]

BLOCK, BLOCK_BYTES = 32, 2**28
"""Points that are evaluated together: at most so many, and of so many bytes; the latter also for leading layers."""
MANY_PARAMETERS = 2**20
"""From here on, a CPU sets a network's parameters once for all chunks rather than once for each."""


class ForwardPasses:
    """Evaluates an objective's chunks at one or many points.

    Every evaluation starts from the same module, batch and seed. Steps that were seen to leave their module as it is
    share one, which is moved from point to point; others, and steps that need a graph, get a fresh one each time.

    Args:
        objective: whose step and batches.
        batch_weight: how much a batch counts.
    """

    def __init__(self, objective: "Objective", batch_weight: BatchWeight | None) -> None:
        self.stateful: bool | None = None
        """Whether a step changes its module; unknown before :meth:`watched`."""
        self._objective, self._batch_weight = objective, batch_weight
        self._needs_grad = self._alters_batches = False

    def watched(self, theta: Tensor) -> Parts:
        """The pass over the probe set that finds out what steps do to their module and batches."""
        try:
            return self._watch(theta)
        except RuntimeError as error:
            self._allow_grad(error)
            return self._watch(theta)

    def _watch(self, theta: Tensor) -> Parts:
        batches, module = self._objective.batches, self._objective.module_at(self._leaf(theta))
        before, found = state_of(module), []
        self.stateful = False
        for index, batch in enumerate(batches):
            placed = self._objective.placed(batch)
            given = _state_of_batch(placed)
            found.append(self._evaluate(module, index, batch, placed))
            self._alters_batches |= _state_of_batch(placed) != given
            # After one chunk, for what changes to and fro, and after all, for what few of them do.
            if index in (0, len(batches) - 1) and state_of(module) != before:
                self.stateful = True
                return self.over(batches, theta)
        return _parts(found, self._objective.mode)

    def _allow_grad(self, error: RuntimeError) -> None:
        """Some steps differentiate inside themselves and cannot run without a graph."""
        if self._needs_grad or isinstance(error, torch.OutOfMemoryError):
            raise error
        self._needs_grad = True

    def over(self, batches: Sequence[Batch], theta: Tensor) -> Parts:
        """One pass over any batches, with a fresh module for each."""
        found = [self.afresh(theta, index, batch) for index, batch in enumerate(batches)]
        return _parts(found, self._objective.mode)

    def evaluate(self, states: Iterable[State]) -> list[Evaluation]:
        """All states, in blocks; see :meth:`Objective.evaluate_many`."""
        found: list[Evaluation] = []
        collective, drawn = self._objective.collective, iter(states)
        while block := list(_block(drawn)):
            parts = collective.agree(partial(self._together, block))
            found += [combined(part, collective) for part in parts]
        return found

    def _together(self, states: Sequence[State]) -> list[Parts]:
        """Every chunk at every state: each chunk is read once, or each state set once where that is the dearer."""
        batches, together = self._objective.batches, not self._moves_are_dear
        shared = None if self.stateful or self._needs_grad else _Scratch(self._objective, states, together)
        order = product(range(len(batches)), range(len(states)))
        pairs = list(order) if together else sorted(order, key=lambda pair: pair[1])
        found: list[list[ChunkEvaluation | None]] = [[None] * len(batches) for _ in states]
        placed: tuple[int, Batch] | None = None
        for index, number in pairs:
            batch, (theta, buffers) = batches[index], states[number]
            if shared is None:
                found[number][index] = self.afresh(point_of(theta), index, batch, buffers)
            else:
                if placed is None or placed[0] != index or self._alters_batches:
                    placed = index, self._objective.placed(batch)
                module, layer = shared.at(states[number]), shared.layer(states[number], index)
                found[number][index] = self._evaluate(module, index, batch, placed[1], layer)
            self._objective.collective.poll()
        return [_parts(column, self._objective.mode) for column in found]

    @property
    def _moves_are_dear(self) -> bool:
        """Whether setting all parameters takes a share of a chunk's evaluation that counts."""
        theta = self._objective.theta()
        return theta.device.type == "cpu" and theta.numel() > MANY_PARAMETERS

    def afresh(self, theta: Tensor, index: int, batch: Batch, buffers: Buffers = None) -> ChunkEvaluation | None:
        """One batch at θ by a module of its own."""
        module = self._objective.module_at(self._leaf(theta), buffers=buffers)
        try:
            return self._evaluate(module, index, batch, self._objective.placed(batch))
        except RuntimeError as error:
            self._allow_grad(error)
            return self.afresh(theta, index, batch, buffers)

    def _leaf(self, theta: Tensor) -> Tensor:
        # Private to the step, which may clamp or re-normalise its parameters in place.
        return theta.detach().clone().requires_grad_(self._needs_grad)

    def _evaluate(
        self,
        module: nn.Module,
        index: int,
        batch: Batch,
        placed: Batch,
        layer: Callable[..., Tensor | None] | None = None,
    ) -> ChunkEvaluation | None:
        with torch.set_grad_enabled(self._needs_grad), Shortcuts(layer), LossTap() as tap:
            loss = self._objective.run(module, placed, seed=index)
        if loss is None:
            return None
        with torch.no_grad(), torch._C.DisableTorchFunction():  # what is ours needs no repair, nor its overhead
            loss = loss.detach().reshape(())
            tapped = tap.match(loss)
            weight = chunk_weight(batch, tapped, self._batch_weight)
            return (loss.item(), weight, None) if tapped is None else (tapped.mean, weight, example_rows(tapped))


class _Scratch:
    """One module, moved from state to state by writing into its parameters and buffers."""

    def __init__(self, objective: "Objective", states: Sequence[State], together: bool) -> None:
        self._layout, self._objective = objective.layout, objective
        self._theta = objective.theta()
        self._tensors = self._layout.unflatten(self._theta)
        self._are_views = all(dtype == self._theta.dtype for dtype in self._layout.dtypes)
        self._module = objective.module_with(self._tensors)
        self._pristine: Mapping[str, Tensor] = {}
        self._state: State | None = None
        mixes = Counter(theta.anchors for theta, _ in states if isinstance(theta, Mix))
        exact = objective.precision is None and self._theta.device.type == "cpu"
        names = {id(tensor): name for name, tensor in self._tensors.items()}
        self._layers = {
            anchors: LeadingLayer(anchors, self._layout, names, 0 if together else BLOCK_BYTES)
            for anchors, count in mixes.items()
            if exact and count > len(anchors.thetas)
        }

    def layer(self, state: State, index: int) -> Callable[..., Tensor | None] | None:
        """What gives the output of the first linear layer at a state on a chunk, where it saves something."""
        theta = state[0]
        if not isinstance(theta, Mix) or theta.anchors not in self._layers:
            return None
        return partial(self._layers[theta.anchors].output, index, theta)

    @torch.no_grad()
    def at(self, state: State) -> nn.Module:
        """The module at a state."""
        if state is not self._state:
            self._state = state
            theta, buffers = state
            if isinstance(theta, Mix):
                theta.of(theta.anchors.thetas, out=self._theta)
            else:
                self._theta.copy_(theta)
            if not self._are_views:
                for name, tensor in self._layout.unflatten(self._theta).items():
                    self._tensors[name].copy_(tensor)
            self._set(buffers)
        return self._module

    def _set(self, buffers: Buffers) -> None:
        if buffers and not self._pristine:
            self._pristine = self._objective.buffers
        for name, value in {**self._pristine, **(buffers or {})}.items():
            self._module.get_buffer(name).copy_(value)


def _block(states: Iterator[State]) -> Iterator[State]:
    """The first of the states, as many as are held at a time; mixes are made when their turn comes."""
    size = 0
    for state in islice(states, BLOCK):
        yield state
        theta = state[0]
        size += 0 if isinstance(theta, Mix) else theta.numel() * theta.element_size()
        if size >= BLOCK_BYTES:
            return


def _parts(chunks: Sequence[ChunkEvaluation | None], mode: str) -> Parts:
    if not any(chunks):
        raise ValueError(
            f"The step returned no loss for any of {len(chunks)} batches in mode={mode!r}. "
            "Return it, or pass loss_fn=(module, batch) -> scalar mean loss."
        )
    return Parts.of(chunks)


def _state_of_batch(batch: Batch) -> object:
    return state_of(batch), [t.requires_grad for t in tensors_in(batch)]
