"""Similarity of representations between a run and its children, its start, its last visit or a checkpoint."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from torch import Tensor

from lmc_lightning.callbacks.bridge.guards import check_choice
from lmc_lightning.callbacks.pairs.pair import PairKind
from lmc_lightning.callbacks.pairs.similarity import (
    SimilarityComparison,
    SimilarityPairing,
    similarity_arrays,
    similarity_quantities,
)
from lmc_lightning.callbacks.pairs.state_pairs import StatePairs
from lmc_lightning.callbacks.visits.common import CommonButExamples, Unpack
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.landscape.paths.states import StateEvaluator
from lmc_lightning.landscape.similarity.cka import Similarity
from lmc_lightning.landscape.similarity.layer_outputs import mixed_up
from lmc_lightning.loggers import Chart
from lmc_lightning.plotting.similarity import plot_similarity
from lmc_lightning.plotting.style import deferred
from lmc_lightning.recording import Measurement

Inputs: TypeAlias = Literal["data", "mixup"]
INPUTS: tuple[Inputs, ...] = ("data", "mixup")

NUM_EXAMPLES = 1024
"""By default; the Gram matrix of a wide layer takes n² numbers and n²p products."""


class RepresentationSimilarity(StatePairs):
    """How alike the layers of two states of a network represent the same examples: linear CKA, 1 when equal.

    Beside :class:`CheckpointBranching`, the children of each branch point are compared with the trunk, or with each
    other, at the same later epochs, when all have been trained. Without it, the run is compared with ``reference``.
    CKA is blind to rotations and scale of a layer's output, so two networks can be alike although their weights are
    far apart (arXiv 1905.00414). Costs a forward pass for each state, and 2·n·min(n, p)² float64 operations for each
    pair of layers with p features on n examples.

    Logged at x = steps taken, debiased; the table has the biased value in the evidence, and of each layer the standard
    error over examples:

    ==========================================  =====================================================================
    ``similarity/cka/{reference}``              mean over layers of the CKA of each layer with itself in the reference:
                                                ``initial``, ``previous``, or the checkpoint's name
    ``similarity/cka/{reference}/{layer}``      of one layer
    ``similarity/cka/k1_{005}``                 beside branching: of child and trunk; likewise ``/{layer}``
    ``…/child_{j}``                             appended to ``k1_{005}`` when a branch point has several children
    ``…/siblings_{i}_{j}``                      likewise, for two children of it, with ``pairs=("siblings",)``
    ``similarity_map/…``                        figure and array of every layer with every layer
    ==========================================  =====================================================================

    Args:
        reference: ``"initial"``, ``"previous"`` (the last visit), ``"average"`` (of the weights, by one of Lightning's
            averaging callbacks) or the path of a checkpoint; only without branching.
        pairs: ``"trunk"``: each child with the trunk; ``"siblings"``: the children of a branch point with each other.
        layers: name patterns of submodules whose outputs are compared, ``"logits"`` and ``"softmax"``, their
            probabilities; by default all leaf modules with parameters, or the logits where no such module runs.
        inputs: ``"data"``, or ``"mixup"``: mixtures of two examples each, λ ~ Beta(16, 16) (arXiv 2107.11228).
        num_examples: n, the size of the probe set.
        **common: see :class:`MeasurementCallback`.

    Raises:
        ValueError: unknown names.
    """

    kind = "similarity"
    offline = "representation_similarity"

    def __init__(
        self,
        *,
        reference: str | None = None,
        pairs: Sequence[PairKind] = ("trunk",),
        layers: Sequence[str] | None = None,
        inputs: Inputs = "data",
        num_examples: int | None = NUM_EXAMPLES,
        **common: Unpack[CommonButExamples],
    ) -> None:
        super().__init__(reference=reference, pairs=pairs, num_examples=num_examples, **common)
        check_choice("inputs", inputs, INPUTS)
        self.inputs, self.layers = inputs, None if layers is None else tuple(layers)

    @property
    def similarities(self) -> dict[tuple[str, int], Similarity]:
        """Full results by (key of the mean, step)."""
        return {(f"{self.key('cka')}/{label}", step): found.similarity for (label, step), found in self._found.items()}

    def _comparison(self, visit: Visit, start: Mapping[str, Tensor] | None) -> SimilarityComparison:
        batches = visit.objective.batches
        mixed = mixed_up(batches, self.seed) if self.inputs == "mixup" else batches
        objective = visit.loss_on(mixed)
        data = {} if self.reference else self._data(self._sets(visit.trainer)["train"], objective)
        return SimilarityComparison(StateEvaluator({"train": objective}, batch_stats="endpoint"), self.layers, data)

    def _result(self, pairing: SimilarityPairing, label: str, names: tuple[str, str]) -> Measurement:
        picture = "/".join(part for part in ("similarity_map", self.name, label) if part)
        caption = "inputs mixed up" if self.inputs == "mixup" else ""
        return Measurement(
            tuple(similarity_quantities(pairing, f"{self.key('cka')}/{label}", self.inputs)),
            figures={picture: deferred(plot_similarity, pairing.similarity, names=names, caption=caption)},
            arrays={picture: similarity_arrays(pairing.similarity)},
        )

    def charts(self) -> list[Chart]:
        """The means of all pairs in one chart, and the layers in another."""
        known = sorted({re.escape(key) for key, _ in self.similarities}) or [f"{self.tag('cka')}/[^/]+"]
        layers = f"(?!({'|'.join(known)})$){self.tag('cka')}/.*"
        return [Chart("CKA, mean over layers", tuple(known)), Chart("CKA of single layers", (layers,))]
