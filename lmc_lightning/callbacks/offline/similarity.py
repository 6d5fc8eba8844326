"""Similarity of two modules' representations without a trainer."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lmc_lightning.callbacks.bridge.guards import check_choice, check_loss
from lmc_lightning.callbacks.bridge.objectives import objective_of
from lmc_lightning.callbacks.bridge.probes import draw, to_device
from lmc_lightning.callbacks.representation_similarity import INPUTS, NUM_EXAMPLES, Inputs
from lmc_lightning.core.glassbox import glass_box
from lmc_lightning.landscape.similarity.cka import Similarity, similarity
from lmc_lightning.landscape.similarity.layer_outputs import mixed_up, representations
from lmc_lightning.types import LossFn


def representation_similarity(
    module_a: nn.Module,
    module_b: nn.Module,
    dataloader: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    layers_b: Sequence[str] | None = None,
    inputs: Inputs = "data",
    num_examples: int | None = NUM_EXAMPLES,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> Similarity:
    """Linear CKA between every layer of ``module_a`` and every layer of ``module_b``, which may differ in architecture.

    The modules are not changed, and are compared in eval mode. Pass one module twice to compare its own layers.

    Args:
        module_a: a LightningModule, or any ``nn.Module`` together with ``loss_fn``.
        module_b: another, on the same device.
        dataloader: the examples.
        layers: name patterns of submodules, ``"logits"`` and ``"softmax"``, their probabilities; by default all leaf
            modules with parameters.
        layers_b: of ``module_b``, where they differ.
        inputs: ``"data"``, or ``"mixup"``: mixtures of two examples each, λ ~ Beta(16, 16).
        num_examples: ``None`` for all.
        loss_fn: ``(module, batch) -> scalar mean loss``, which runs the module, in place of its ``training_step``.
        seed: of the loader's private random stream and of the mixtures.

    Raises:
        ValueError: a plain module comes without ``loss_fn``, or nothing matches a pattern.
    """
    check_choice("inputs", inputs, INPUTS)
    found = []
    batches = draw(dataloader, num_examples, seed)
    with glass_box():
        for module, names in ((module_a, layers), (module_b, layers_b or layers)):
            check_loss(module, loss_fn)
            placed = to_device(batches, module)
            mixed = mixed_up(placed, seed) if inputs == "mixup" else placed
            found.append(representations(objective_of(module, mixed, loss_fn=loss_fn, seed=seed), layers=names))
    return similarity(*found)
