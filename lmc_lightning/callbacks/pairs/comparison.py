"""Two states of a network compared on several splits: barriers of loss, error and named metrics, and extras."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lmc_lightning.callbacks.bridge.guards import check_choice
from lmc_lightning.callbacks.bridge.logged import LogRecorder, logged_metrics
from lmc_lightning.callbacks.bridge.step import StepBatch
from lmc_lightning.landscape.alignment.aligned import Alignment
from lmc_lightning.landscape.paths.attribution import Attribution, attribution
from lmc_lightning.landscape.paths.barrier import DEFINITIONS, Barrier, NumPoints, barriers_on, line_profiles
from lmc_lightning.landscape.paths.batchnorm import has_batch_norm
from lmc_lightning.landscape.paths.layer_barriers import Barriers, layer_barriers
from lmc_lightning.landscape.paths.line import NUM_POINTS, BatchStats, Endpoint
from lmc_lightning.landscape.paths.profiles import Profile
from lmc_lightning.landscape.paths.soup import soup_gains
from lmc_lightning.landscape.paths.states import Metrics, StateEvaluator
from lmc_lightning.landscape.similarity.distances import parameter_distance, prediction_distance
from lmc_lightning.landscape.similarity.predictions import Outputs, outputs_at
from lmc_lightning.recording import Quantity

Extra: TypeAlias = Literal["distances", "soup", "layers", "attribution", "figures"]
EXTRAS: tuple[Extra, ...] = ("distances", "soup", "layers", "attribution", "figures")

_OF_BARRIERS = ("metric", "peak_t", "barrier_lower", "distinguishable_from_zero", "num_points", "num_samples")
"""What the evidence has of a barrier beside all conventions."""

ALIGNED = "aligned"
"""The part of a key that says that the second state had its channels permuted."""

NamedMetrics: TypeAlias = Mapping[str, Literal["min", "max"]]
"""Metrics of ``validation_step``, and which end of each is better."""


@dataclass(frozen=True)
class Finding:
    """One number of a pair: ``{family}/{quantity}/<the pair>[/{qualifier}]``."""

    family: str
    quantity: str
    value: float
    stderr: float | None = None
    qualifier: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def recorded(self, label: str, name: str | None = None) -> Quantity:
        """As it is recorded and logged, of a pair by a callback."""
        key = "/".join(part for part in (self.family, self.quantity, name, label, self.qualifier) if part)
        return Quantity(key, self.value, self.stderr, evidence=self.evidence)


Findings: TypeAlias = list[Finding]


@dataclass(frozen=True)
class Pairing:
    """What was found for a pair of states."""

    barriers: Mapping[str, Barrier]
    """By ``{split}_{metric}``, and by name for named metrics."""
    findings: Sequence[Finding]
    """Everything that is logged, the barriers first."""
    attributions: Mapping[str, Attribution] = field(default_factory=dict)
    aligned: Mapping[str, Barrier] = field(default_factory=dict)
    """Where alignment is asked for: barriers to the second state with its channels permuted, by the same names."""


def metrics_of(names: NamedMetrics, objective: Any, validation: Sequence[StepBatch], recorder: LogRecorder) -> Metrics:
    """Named metrics of a state, each with the sign with which smaller is better; ``−accuracy`` is that of accuracy.

    Args:
        names: of what ``validation_step`` logs.
        objective: made with ``recorder`` in place of ``self.log``.
        validation: the validation split.
        recorder: what the module logs to.
    """

    def metrics(theta: Tensor, buffers: Mapping[str, Tensor]) -> dict[str, float]:
        logged = logged_metrics(objective, theta, validation, recorder, dict(buffers))
        unknown = [name for name in names if name not in logged]
        if unknown:
            known = ", ".join(map(repr, logged)) or "nothing"
            raise ValueError(f"validation_step logs {known}, not {unknown[0]!r}.")
        return {signed(name, better): logged[name] * (-1 if better == "max" else 1) for name, better in names.items()}

    return metrics


def check_metrics(metrics: NamedMetrics, splits: Sequence[str]) -> None:
    """Refuse named metrics that cannot be had or logged.

    Raises:
        ValueError: neither end is better, one would share the key of a split's own metric, or there is no such split.
    """
    for name, better in metrics.items():
        check_choice(f"metrics[{name!r}]", better, ("min", "max"))
        if name in {f"{split}_{metric}" for split in splits for metric in ("loss", "error")}:
            raise ValueError(
                f"{name!r} in metrics would be logged under the key of the {name.split('_')[0]} split's own "
                f"{name.split('_')[1]}, which is measured anyhow. Leave it out; if validation_step computes another "
                f"quantity, let it log that under another name."
            )
    if metrics and "val" not in splits:
        raise ValueError("metrics are of the validation split, which probe_dataloader= replaces. Leave one out.")


def signed(name: str, better: str) -> str:
    """What a named metric is called with the sign with which smaller is better."""
    return f"−{name}" if better == "max" else name


@dataclass(frozen=True)
class Comparison:
    """What pairs of states are compared by, prepared once for all states of one module."""

    states: StateEvaluator
    num_points: NumPoints = NUM_POINTS
    metrics: NamedMetrics = field(default_factory=dict)
    definitions: Sequence[str] = ("barrier",)
    extras: Sequence[Extra] = ()
    evidence: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of the data of each split."""
    start: Endpoint | None = None
    """Where distances are measured from."""
    alignment: Alignment | None = None
    """How the second state of a pair is aligned to the first, for barriers beside those without."""
    _outputs: WeakKeyDictionary[Endpoint, dict[str, Outputs]] = field(default_factory=WeakKeyDictionary, repr=False)

    def between(self, end_a: Endpoint, end_b: Endpoint) -> Pairing:
        """Everything that is asked of the pair A (t = 0) and B (t = 1)."""
        profiles = line_profiles(self.states, end_a, end_b, num_points=self.num_points)
        barriers = self._named(barriers_on(profiles))
        attributions = dict(self._attributions(profiles, barriers)) if "attribution" in self.extras else {}
        findings = [f for name, b in barriers.items() for f in self._of_barrier(name, b, attributions.get(name))]
        aligned, further = ({}, []) if self.alignment is None else self._aligned(self.alignment, end_a, end_b)
        findings += further
        if "distances" in self.extras:
            findings += self._distances(end_a, end_b)
        if "soup" in self.extras:
            findings += self.soup([end_a, end_b])
        if "layers" in self.extras:
            findings += self._layers(end_a, end_b)
        return Pairing(barriers, findings, attributions, aligned)

    def _aligned(self, alignment: Alignment, end_a: Endpoint, end_b: Endpoint) -> tuple[dict[str, Barrier], Findings]:
        end, matching = alignment.aligned(end_a, end_b)
        barriers = self._named(barriers_on(line_profiles(self.states, end_a, end, num_points=self.num_points)))
        found = [finding for name, barrier in barriers.items() for finding in self._of_barrier(name, barrier, None)]
        report = matching.report()
        return barriers, [
            replace(f, qualifier="/".join(filter(None, (ALIGNED, f.qualifier))), evidence={**f.evidence, **report})
            for f in found
        ]

    def _named(self, by_split: Barriers) -> dict[str, Barrier]:
        return {self._name(s, m): b for s, barriers in by_split.items() for m, b in barriers.items()}

    def _name(self, split: str, metric: str) -> str:
        named = {signed(name, better): name for name, better in self.metrics.items()}
        return f"{split}_{metric}" if metric in ("loss", "error") else named[metric]

    def _of_barrier(self, name: str, barrier: Barrier, shares: Attribution | None) -> Iterator[Finding]:
        evidence = self._evidence(barrier)
        if shares is not None:
            evidence["class_shares"] = shares.by_class
        yield Finding("barrier", name, barrier.barrier, barrier.stderr_data["barrier"], evidence=evidence)
        for definition in self.definitions:
            if definition != "barrier":
                value, stderr = getattr(barrier, definition), barrier.stderr_data[definition]
                of = {**self._data(barrier.split), "metric": barrier.metric, "definition": definition}
                yield Finding("barrier", name, value, stderr, definition, of)

    def _evidence(self, barrier: Barrier) -> dict[str, Any]:
        return {
            **self._data(barrier.split),
            **{name: getattr(barrier, name) for name in (*DEFINITIONS, *_OF_BARRIERS)},
            "definition": "barrier",
            "sample_unit": barrier.unit,
            "ends": [float(barrier.values[0]), float(barrier.values[-1])],
            "own_ends": list(barrier.own_ends),
            "stderrs": dict(barrier.stderr_data),
        }

    def _data(self, split: str) -> dict[str, Any]:
        return {**self.evidence.get(split, {}), "eval_split": split, "batch_stats": self.states.batch_stats}

    # -- asked for by name -------------------------------------------------------------------------------------------

    def _attributions(
        self, profiles: Mapping[str, Profile], barriers: Mapping[str, Barrier]
    ) -> Iterator[tuple[str, Attribution]]:
        for name, barrier in barriers.items():
            if profiles[barrier.split].curves[barrier.metric].samples is not None:
                yield name, attribution(barrier, profiles[barrier.split], self._labels.get(barrier.split))

    @cached_property
    def _labels(self) -> dict[str, Tensor]:
        """The class of each example that counts, by split, where the loss is over classes."""
        outputs = self._outputs_of(Endpoint(self.states.objective.theta(), self.states.objective.buffers))
        return {split: found.labels[found.weights > 0] for split, found in outputs.items()}

    def _outputs_of(self, end: Endpoint) -> dict[str, Outputs]:
        """What a classifier says on each split, with the statistics of the policy; nothing of another network."""
        if end not in self._outputs:
            buffers = self.states.buffers_at(end.theta, end.buffers)
            found = {s: outputs_at(o, end.theta, buffers) for s, o in self.states.objectives.items()}
            self._outputs[end] = {s: outputs for s, outputs in found.items() if outputs is not None}
        return self._outputs[end]

    def _distances(self, end_a: Endpoint, end_b: Endpoint) -> Iterator[Finding]:
        for name, value in vars(parameter_distance(end_a, end_b, self.start)).items():
            yield Finding("distance", name, value, evidence={"definition": name})
        others = self._outputs_of(end_b)
        for split, outputs in self._outputs_of(end_a).items():
            for name, mean in vars(prediction_distance(outputs, others[split])).items():
                evidence = {**self._data(split), "definition": name, "num_samples": int((outputs.weights > 0).sum())}
                yield Finding("distance", f"{split}_{name}", mean.value, mean.stderr, evidence=evidence)

    def soup(self, ends: Sequence[Endpoint]) -> Iterator[Finding]:
        """How much better the average of networks is than the best of them, by split and metric."""
        for split, gains in soup_gains(self.states, ends).items():
            for metric, found in gains.items():
                evidence = {
                    **self._data(split),
                    "definition": "soup_gain",
                    "metric": metric,
                    "average": found.average,
                    "networks": list(found.networks),
                }
                yield Finding("soup_gain", self._name(split, metric), found.gain, found.stderr, evidence=evidence)

    def _layers(self, end_a: Endpoint, end_b: Endpoint) -> Iterator[Finding]:
        found = layer_barriers(self.states, end_a, end_b, num_points=self.num_points)
        for rest, by_group in (("", found.at_a), ("at_b", found.at_b), ("cumulative", found.cumulative)):
            for group, by_split in by_group.items():
                for name, barrier in self._named(by_split).items():
                    evidence = {**self._evidence(barrier), "group": group, "rest": rest or "at_a", "order": found.order}
                    qualifier = "/".join(part for part in (group, rest) if part)
                    stderr = barrier.stderr_data["barrier"]
                    yield Finding("barrier_layer", name, barrier.barrier, stderr, qualifier, evidence)


def needs_statistics(module: nn.Module, batch_stats: BatchStats | None) -> bool:
    """Whether BatchNorm statistics have to be recomputed on a path between states of ``module``."""
    return batch_stats in (None, "recompute") and has_batch_norm(module)
