"""Similarity of representations between a run and its children, its start, its last visit or a checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import nan
from statistics import fmean
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import nn

from lmc_lightning.branching.lineage import Family
from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.bridge import StepBatch
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.callbacks.guards import check_choice, check_listed
from lmc_lightning.callbacks.memory import Meter
from lmc_lightning.callbacks.pairs import PAIR_KINDS, Pair, PairKind, pairs_of
from lmc_lightning.callbacks.references import Reference, check_reference, state_of_module
from lmc_lightning.callbacks.visits import NO_DERIVATIVES, Visit, probe_evidence
from lmc_lightning.core.glassbox import glass_box
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.layer_outputs import mixed_up, representations
from lmc_lightning.landscape.paths import Endpoint, endpoint_of
from lmc_lightning.landscape.similarity import Representation, Similarity, similarity
from lmc_lightning.plotting.similarity import plot_similarity
from lmc_lightning.plotting.style import figure_of
from lmc_lightning.recording import Measurement, Quantity
from lmc_lightning.schedule import Axis

Inputs: TypeAlias = Literal["data", "mixup"]
INPUTS: tuple[Inputs, ...] = ("data", "mixup")

NUM_EXAMPLES = 1024
"""By default; the Gram matrix of a wide layer takes n² numbers and n²p products."""


class RepresentationSimilarity(MeasurementCallback):
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
        reference: ``"initial"``, ``"previous"`` (the last visit) or the path of a checkpoint; only without branching.
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
        **common: Any,
    ) -> None:
        super().__init__(num_examples=num_examples, **common)
        check_listed("pairs", pairs, PAIR_KINDS)
        check_choice("inputs", inputs, INPUTS)
        self.reference, self.pairs, self.inputs = reference, tuple(pairs), inputs
        self.layers = None if layers is None else tuple(layers)
        self.similarities: dict[tuple[str, int], Similarity] = {}
        """Full results by (key of the mean, step)."""
        self._reference = Reference(reference)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that there is something to compare with.

        Raises:
            ValueError: no reference without branching, or one beside it; steps for later epochs beside it.
        """
        if stage == "fit":
            branching = any(isinstance(c, CheckpointBranching) for c in trainer.callbacks)
            check_reference(self.reference, self.schedule, branching, name=type(self).__name__)
            self.similarities.clear()
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the reference."""
        self._reference.begin(pl_module, trainer.global_step, self.parameters)
        super().on_train_start(trainer, pl_module)

    def is_due(self, axis: Axis, count: int) -> bool:
        """Whether to compare the run with its reference; children are compared when all are done."""
        return self.reference is not None and super().is_due(axis, count)

    def measure(self, visit: Visit) -> Measurement:
        """CKA between the reference and the state of this visit."""
        reference, measurement = self._reference, Measurement(())
        if reference.state is not None:
            options = {"trainer": visit.trainer, "loss_fn": visit.loss_fn}
            objective = self._objective(visit.module, visit.objective.batches, **options)
            states = (endpoint_of(objective, reference.state), endpoint_of(objective))
            found = similarity(*(self._represented(objective, state) for state in states))
            measurement = self._result(found, reference.label, visit.step, (str(self.reference), f"step {visit.step}"))
        if self.reference == "previous":
            reference.take(state_of_module(visit.module), visit.step)
        evidence = {"reference": self.reference, "reference_step": reference.step, **NO_DERIVATIVES}
        return replace(measurement, evidence=evidence)

    def measure_family(self, family: Family, trainer: Any, pl_module: Any) -> None:
        """CKA between the pairs of a family at the scheduled later epochs that they share; a further call adds more."""
        started = self.clock()
        self._recorder.drop_failures()
        with self._recorded(self.kind, self._step, family.end.epoch):
            sets = self._probe_sets(trainer, final=True)
            if sets is None:
                raise RuntimeError("There is no training probe set: the run ended before a batch was seen.")
            with glass_box():
                objective = self._objective(pl_module, sets["train"].batches, trainer=trainer)
                evidence = probe_evidence(sets["train"], objective)
            pairs = [pair for pair in pairs_of(family, self.pairs) if pair.second.status == "completed"]
            for epoch in sorted({epoch for pair in pairs for epoch in pair.epochs}):
                known: dict[str, dict[str, Representation]] = {}
                for pair in (p for p in pairs if epoch in p.epochs and self._is_wanted(p, epoch)):
                    with self._recorded(f"{self.kind}/{pair.label}", pair.second.epochs[epoch], epoch):
                        self._compare(pair, family, epoch, objective, known, evidence, trainer)
        for logger in trainer.loggers:
            logger.save()
        self.seconds += self.clock() - started

    def _is_wanted(self, pair: Pair, epoch: int) -> bool:
        step = pair.second.epochs[epoch]
        at_branch = pair.kind == "trunk" and step == pair.second.branch_step
        is_new = (f"{self.key('cka')}/{pair.label}", step) not in self.similarities
        return is_new and (at_branch or self.schedule.is_due("epoch", epoch))

    def _compare(
        self,
        pair: Pair,
        family: Family,
        epoch: int,
        objective: Objective,
        known: dict[str, dict[str, Representation]],
        evidence: Mapping[str, Any],
        trainer: Any,
    ) -> None:
        names, step = (pair.first.name, pair.second.name), pair.second.epochs[epoch]
        with glass_box(), Meter(trainer.strategy.root_device, self.clock) as meter:
            for name in names:
                if name not in known:
                    known[name] = self._represented(objective, endpoint_of(objective, family.state(name, epoch)))
            measurement = self._result(similarity(*(known[n] for n in names)), pair.label, step, names)
        of_trunk = ("probe_loss", "probe_error", "mean_max_probability")
        shared = {name: value for name, value in evidence.items() if name not in of_trunk}
        shared |= {**pair.lineage, "later_epoch": epoch, **NO_DERIVATIVES, **meter.evidence}
        self._recorder.add(replace(measurement, evidence=shared), step=step, epoch=epoch, loggers=trainer.loggers)

    @contextmanager
    def _recorded(self, name: str, step: int, epoch: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.on_error == "raise":
                raise
            reason = f"{type(error).__name__}: {error}"
            self._recorder.add_failure(reason, step=step, epoch=epoch, name=name)
            self._recorder.warn_once(reason, f"{name} at step {step} failed: {reason}")

    def _objective(self, module: nn.Module, batches: Sequence[StepBatch], **options: Any) -> Objective:
        return self.objective(module, mixed_up(batches, self.seed) if self.inputs == "mixup" else batches, **options)

    def _represented(self, objective: Objective, state: Endpoint) -> dict[str, Representation]:
        return representations(objective, state.theta, state.buffers, layers=self.layers)

    def _result(self, found: Similarity, label: str, step: int, names: tuple[str, str]) -> Measurement:
        key, by_layer = f"{self.key('cka')}/{label}", found.same_layers()
        self.similarities[key, step] = found
        shared = {"layers": len(by_layer), "rows": found.num_examples, "inputs": self.inputs}
        means = [fmean(v) for v in zip(*by_layer.values(), strict=True)] or [nan, nan]
        quantities = [Quantity(key, means[0], evidence={**shared, "biased": means[1]})]
        for layer, value in by_layer.items():
            evidence = {**shared, "biased": value.biased}
            quantities.append(Quantity(f"{key}/{layer}", value.debiased, value.stderr, evidence=evidence, log="value"))
        picture = "/".join(part for part in ("similarity_map", self.name, label) if part)
        caption = "inputs mixed up" if self.inputs == "mixup" else ""
        arrays = {name: getattr(found, name).numpy() for name in ("debiased", "biased", "stderr")}
        return Measurement(
            tuple(quantities),
            figures={picture: partial(_drawn, found, names, caption)},
            arrays={picture: {**arrays, "layers_a": _text(found.layers_a), "layers_b": _text(found.layers_b)}},
        )

    def state_dict(self) -> dict[str, Any]:
        """The records, and the weights that later visits are compared with."""
        return super().state_dict() | self._reference.saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the records of a checkpoint, against the same reference."""
        super().load_state_dict(state_dict)
        self._reference.load(state_dict)


def _drawn(found: Similarity, names: tuple[str, str], caption: str) -> Any:
    return figure_of(plot_similarity(found, names=names, caption=caption))


def _text(names: Sequence[str]) -> Any:
    return np.array(names, dtype=str)
