"""Two states of a network compared by what their layers represent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from statistics import fmean
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from lmc_lightning.landscape.paths.line import Endpoint
from lmc_lightning.landscape.paths.states import StateEvaluator
from lmc_lightning.landscape.similarity.cka import Representation, Similarity, similarity
from lmc_lightning.landscape.similarity.layer_outputs import representations
from lmc_lightning.recording import Quantity


@dataclass(frozen=True)
class SimilarityPairing:
    """What was found for a pair of states."""

    similarity: Similarity
    data: Mapping[str, Any]
    """The evidence of the examples."""


@dataclass(frozen=True)
class SimilarityComparison:
    """What pairs of states are compared by; each state is run once."""

    states: StateEvaluator
    layers: Sequence[str] | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    """The evidence of the examples, where it is not that of a visit."""
    _known: WeakKeyDictionary[Endpoint, dict[str, Representation]] = field(
        default_factory=WeakKeyDictionary, repr=False
    )

    def between(self, end_a: Endpoint, end_b: Endpoint) -> SimilarityPairing:
        """CKA of every layer of one state with every layer of the other."""
        return SimilarityPairing(similarity(self._represented(end_a), self._represented(end_b)), self.data)

    def _represented(self, end: Endpoint) -> dict[str, Representation]:
        if end not in self._known:
            self._known[end] = representations(self.states.objective, end.theta, end.buffers, layers=self.layers)
        return self._known[end]


def similarity_quantities(found: SimilarityPairing, key: str, inputs: str) -> list[Quantity]:
    """The mean over layers under a key, and each layer under a longer one."""
    by_layer = found.similarity.same_layers()
    shared = {**found.data, "layers": len(by_layer), "rows": found.similarity.num_examples, "inputs": inputs}
    means = [fmean(v) for v in zip(*by_layer.values(), strict=True)] or [nan, nan]
    quantities = [Quantity(key, means[0], evidence={**shared, "biased": means[1]})]
    for layer, value in by_layer.items():
        evidence = {**shared, "biased": value.biased}
        quantities.append(Quantity(f"{key}/{layer}", value.debiased, value.stderr, evidence=evidence, log="value"))
    return quantities


def similarity_arrays(found: Similarity) -> dict[str, np.ndarray]:
    """The map of every layer with every layer, and what its rows and columns are."""
    names = {name: np.array(getattr(found, name), dtype=str) for name in ("layers_a", "layers_b")}
    return {name: getattr(found, name).numpy() for name in ("debiased", "biased", "stderr")} | names
