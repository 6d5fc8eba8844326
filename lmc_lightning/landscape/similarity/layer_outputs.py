"""What each layer of a network makes of the examples of a probe set."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lmc_lightning.core.losstap import LossTap
from lmc_lightning.core.memory import FREE_MEMORY_SHARE, free_bytes
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.random_vectors import derive_seed
from lmc_lightning.core.structure import NotSliceableError, cut, join, leading_size, tensors_in, with_tensors
from lmc_lightning.landscape.similarity.cka import Representation
from lmc_lightning.types import Batch

LOGITS = "logits"
"""Names what the loss was given, which need not be any module's output."""

PROBABILITIES = "softmax"
"""Names the probabilities that a loss over classes makes of the logits."""

_OF_THE_LOSS = (LOGITS, PROBABILITIES)

MIXUP_SHAPE = 16
"""Both parameters of the Beta distribution of mixup's weights."""


def layer_names(module: nn.Module, patterns: Sequence[str] | None = None) -> list[str]:
    """Submodules whose names match a pattern, and of ``"logits"`` and ``"softmax"`` what is listed.

    By default leaves with parameters.

    Raises:
        ValueError: nothing matches a pattern.
    """
    known = [name for name, _ in module.named_modules() if name]
    if patterns is None:
        return [n for n, m in module.named_modules() if n and not [*m.children()] and [*m.parameters(recurse=False)]]
    for pattern in patterns:
        if pattern not in _OF_THE_LOSS and not any(fnmatchcase(name, pattern) for name in known):
            shown = ", ".join(known[:8]) or "none"
            raise ValueError(
                f"No submodule matches {pattern!r}. The first names are: {shown}; 'logits' and 'softmax' are names too."
            )
    chosen = [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return chosen + [name for name in _OF_THE_LOSS if name in patterns and name not in chosen]


def representations(
    objective: Objective,
    theta: Tensor | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    *,
    layers: Sequence[str] | None = None,
) -> dict[str, Representation]:
    """Representations of the objective's examples at θ, by layer in the order of the module.

    Captured by hooks on shadows of the module. Of a layer that runs several times in a step the last output counts, of
    several tensors the first. One forward pass, and more where layers with more features than examples do not fit into
    a quarter of the free memory together.

    Args:
        objective: of the network.
        theta: the state's parameters ``(P,)``; by default the module's own.
        buffers: the state's buffers by name; by default the module's own.
        layers: patterns of names of submodules, ``"logits"`` and ``"softmax"``, the probabilities of a loss over
            classes; by default all leaf modules with parameters whose outputs have as many rows as the last one's, or
            the logits where no such module runs.

    Raises:
        ValueError: nothing matches a pattern, a layer that was asked for gives no rows of features for the examples, or
            no layer does.
    """
    theta = (objective.theta() if theta is None else theta).detach()
    names = layer_names(objective.module_at(theta), layers)
    with objective.box():
        widths = objective.collective.agree(lambda: _widths(objective, theta, buffers, names or [LOGITS]))
        if not widths and layers is None:
            widths = objective.collective.agree(lambda: _widths(objective, theta, buffers, [LOGITS]))
        found: dict[str, Representation] = {}
        for group in _groups(widths, objective):
            found |= _representations(objective, theta, buffers, group)
    last = len(next(reversed(found.values())).squares) if found else 0
    kept = {name: r for name, r in found.items() if len(r.squares) == last}
    lost = [name for name in names if name not in kept]
    if not kept or (lost and layers is not None):
        raise ValueError(
            f"{', '.join(map(repr, lost)) or 'No layer'}: no rows of features for the examples of every batch, as many "
            f"as other layers have. Name others, layers=[…]; 'logits' is what the loss is given."
        )
    return kept


def _widths(
    objective: Objective, theta: Tensor, buffers: Mapping[str, Tensor] | None, names: Sequence[str]
) -> dict[str, int]:
    """The features of each layer that runs, from the first batch, in the order of ``names``."""
    outputs = _outputs(objective, theta, buffers, 0, names)
    return {name: outputs[name].shape[1] * outputs[name].element_size() for name in names if name in outputs}


def _groups(widths: Mapping[str, int], objective: Objective) -> Iterator[list[str]]:
    """Layers whose outputs fit into memory together."""
    free = free_bytes(objective.theta().device)
    own = torch.tensor([objective.memory_budget or int(FREE_MEMORY_SHARE * free)])
    budget = int(objective.collective.gather(lambda: own).min())
    rows = objective.num_examples or sum(leading_size(b) or 1 for b in objective.batches)
    group, used = list[str](), 0
    for name, width in widths.items():
        if group and used + rows * width > budget:
            yield group
            group, used = [], 0
        group, used = [*group, name], used + rows * width
    if group:
        yield group


def _representations(
    objective: Objective, theta: Tensor, buffers: Mapping[str, Tensor] | None, names: Sequence[str]
) -> dict[str, Representation]:
    def rows() -> list[dict[str, Tensor]]:
        return [_outputs(objective, theta, buffers, i, names) for i in range(len(objective.batches))]

    parts = objective.collective.agree(rows)
    found: dict[str, Representation] = {}
    for name in names:
        own = [part.pop(name) for part in parts if name in part]
        whole = len(own) == len(parts) and len({rows.shape[1] for rows in own}) == 1
        if objective.collective.everywhere(whole):
            gathered = objective.collective.gather(lambda own=own: torch.cat(own))  # type: ignore[misc]
            found[name] = Representation.of(gathered.to(theta.device))
    return found


def _outputs(
    objective: Objective, theta: Tensor, buffers: Mapping[str, Tensor] | None, index: int, names: Sequence[str]
) -> dict[str, Tensor]:
    """The output ``(n, p)`` of each layer that runs on one batch."""
    module, found = objective.module_at(theta, buffers=buffers), dict[str, Tensor]()

    def keep(name: str, output: Any) -> None:
        rows = next((t for t in tensors_in(output) if t.ndim and t.numel()), None)
        if rows is not None:
            real = torch.view_as_real(rows) if rows.is_complex() else rows
            # A copy: what follows may work in place.
            found[name] = real.detach().clone().reshape(len(rows), -1)

    for name in names:
        if name not in _OF_THE_LOSS:
            module.get_submodule(name).register_forward_hook(lambda *args, name=name: keep(name, args[-1]))
    with LossTap() as tap:
        loss = objective.step(module, objective.batches[index], seed=index)
    tapped = None if loss is None else tap.match(loss)
    if LOGITS in names and tapped is not None:
        keep(LOGITS, tapped.outputs)
    if PROBABILITIES in names and tapped is not None:
        keep(PROBABILITIES, tapped.probabilities)
    return found


def mixed_up(batches: Sequence[Batch], seed: int = 0) -> list[Batch]:
    """The batches with every example x replaced by λx + (1−λ)x′, x′ a random other and λ ~ Beta(16, 16).

    Inputs between those of the data (arXiv 2107.11228, §3.2, after mixup, arXiv 1710.09412). Every floating tensor with
    an example axis is mixed, targets that are numbers included. The result depends on the examples and the seed, and
    not on how they are cut into batches.

    Raises:
        ValueError: the batches cannot be joined and cut, or hold nothing to mix.
    """
    sizes = [leading_size(b) or 0 for b in batches]
    total, generator = sum(sizes), torch.Generator().manual_seed(derive_seed(seed, "mixup"))
    # A sum of k standard exponentials is Gamma(k, 1), and A/(A + B) of two such sums Beta(k, k).
    gammas = (
        -torch.rand(total, 2, MIXUP_SHAPE, generator=generator, dtype=torch.float64).clamp_min_(1e-300).log().sum(2)
    )
    shares, circle = gammas[:, 0] / gammas.sum(1), torch.randperm(total, generator=generator)
    partners = torch.empty_like(circle).index_copy_(0, circle, circle.roll(1))  # nobody is its own partner

    def mix(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.ndim or len(tensor) != total:
            return tensor
        weights = shares.to(tensor).reshape(-1, *[1] * (tensor.ndim - 1))
        return torch.lerp(tensor[partners.to(tensor.device)], tensor, weights)

    try:
        joined = join(batches)
        if not any(t.is_floating_point() and t.ndim and len(t) == total for t in tensors_in(joined)):
            raise NotSliceableError("They hold no floating tensor with an example axis.")
        mixed, ends = with_tensors(joined, mix), torch.tensor(sizes).cumsum(0).tolist()
        return [cut(mixed, end - size, end) for end, size in zip(ends, sizes, strict=True)]
    except NotSliceableError as error:
        raise ValueError(f"inputs='mixup' cannot mix these batches. {error} Leave it out.") from error
