"""The entries of a family: its runs, and the snapshots that they start from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

Axis: TypeAlias = Literal["epoch", "step"]
Stream: TypeAlias = Literal["order", "augmentation", "dropout"]
Choice: TypeAlias = Literal["fresh", "same"]
Status: TypeAlias = Literal["pending", "running", "completed", "interrupted", "failed", "missing"]

_BY_EPOCH = ("epochs", "batch_digests", "order_digests", "augmentation_digests", "state_digests")


@dataclass
class Position:
    """How far a run has come: completed epochs, optimizer steps, training batches."""

    epoch: int = 0
    step: int = 0
    batches: int = 0


@dataclass(frozen=True)
class Point:
    """A branch point: after ``at`` completed epochs or optimizer steps."""

    axis: Axis
    at: int

    @property
    def label(self) -> str:
        """The part of names and log keys that says so: ``k1_005`` or ``k1_step_000500``."""
        return f"k1_{self.at:03d}" if self.axis == "epoch" else f"k1_step_{self.at:06d}"

    @classmethod
    def of(cls, label: str) -> "Point":
        """The branch point of this ``label``."""
        axis: Axis = "step" if label.startswith("k1_step_") else "epoch"
        return cls(axis, int(label.rsplit("_", 1)[1]))

    def is_at(self, here: Position) -> bool:
        """Whether a run between two epochs is there; a batch may take several steps, and go past."""
        return self.at == here.epoch if self.axis == "epoch" else self.at <= here.step

    def is_behind(self, here: Position) -> bool:
        """Whether a run has come by."""
        return self.at < (here.epoch if self.axis == "epoch" else here.step)


@dataclass
class Node:
    """One training run of a family: the trunk, or a child that left it after some epochs or steps.

    Args:
        name: ``"trunk"``, or the ``label`` followed by the intervention's name, if any, and ``_child_{j}``; its folder
            among the kept weights.
        k1: completed epochs at which it left the trunk; None for the trunk, and where ``k1_step`` says so in steps.
        k1_step: optimizer steps taken at which it was to leave the trunk; None where ``k1`` says so in epochs.
        child: j, counted from 0 among the children of one ``k1``; None for the trunk and for runs from elsewhere.
        branch_step: optimizer steps taken at the fork; None until the trunk has been there. Greater than ``k1_step``
            where one batch takes several steps (each optimizer's count).
        end_step: optimizer steps taken at its end; None until it has come there.
        noise: for each of order, augmentation and dropout, whether it is the trunk's.
        noise_seed: the seed that its own noise follows from; None: all is the trunk's.
        seeds: derived from ``noise_seed`` for each stream that is its own, where not all are.
        intervention: what else was to be done to it at the fork, with its ``name`` and the ``seed`` of what it draws;
            None: nothing.
        effect: what the intervention did there: the values that it changed, the size of the step that it took.
        status: ``"completed"`` children have weights at every later epoch that the trunk kept, or a ``reason`` why not;
            ``"missing"`` ones have no snapshot to start from.
        reason: why it is not completed, or what is unusual about it.
        exact_replay: if all noise is the trunk's and nothing was done to it, whether all batches seen and weights kept
            equal the trunk's bit for bit; else None.
        shared: for order, augmentation and batches, whether the digests equal the trunk's in all epochs that both have;
            without what was not digested.
        seconds: wall time of the training [s].
        first_batches: sha256 of the tensors of the first two batches after the fork.
        epochs: completed epochs -> optimizer steps taken, for every epoch whose weights were kept, in order.
        batch_digests: epoch -> sha256 of the tensors of the first two batches of the epoch that starts there.
        order_digests: epoch -> sha256 of the indices of all examples of that epoch, of loaders with an index sampler.
        augmentation_digests: epoch -> sha256 of all draws of that epoch, of data sets with an ``augmentation_digest``.
        state_digests: epoch -> sha256 of the kept weights.
    """

    name: str
    k1: int | None = None
    k1_step: int | None = None
    child: int | None = None
    branch_step: int | None = None
    end_step: int | None = None
    noise: dict[Stream, Choice] = field(default_factory=dict)
    noise_seed: int | None = None
    seeds: dict[Stream, int] = field(default_factory=dict)
    intervention: dict[str, Any] | None = None
    effect: dict[str, Any] = field(default_factory=dict)
    status: Status = "pending"
    reason: str | None = None
    exact_replay: bool | None = None
    shared: dict[str, bool] = field(default_factory=dict)
    seconds: float | None = None
    first_batches: str | None = None
    epochs: dict[int, int] = field(default_factory=dict)
    batch_digests: dict[int, str] = field(default_factory=dict)
    order_digests: dict[int, str] = field(default_factory=dict)
    augmentation_digests: dict[int, str] = field(default_factory=dict)
    state_digests: dict[int, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Node":
        """The node that ``dataclasses.asdict`` and JSON (whose keys are strings) made ``values`` of."""
        known: dict[str, Any] = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for name in _BY_EPOCH:
            known[name] = {int(epoch): kept for epoch, kept in known.get(name, {}).items()}
        return cls(**known)

    @property
    def label(self) -> str:
        """Where it left the trunk: ``k1_005`` or ``k1_step_000500``; ``trunk`` for the trunk."""
        return "trunk" if self.name == "trunk" else self.point.label

    @property
    def point(self) -> Point:
        """Where it left the trunk; the start, for the trunk."""
        return Point("epoch", self.k1 or 0) if self.k1_step is None else Point("step", self.k1_step)

    @property
    def variant(self) -> str | None:
        """The name of what was done to it at the fork; None: nothing."""
        return None if self.intervention is None else str(self.intervention["name"])

    @property
    def is_replay(self) -> bool:
        """Whether it is to repeat the trunk."""
        return self.noise_seed is None and self.intervention is None

    def is_own(self, *streams: Stream) -> bool:
        """Whether its noise of any of these streams is not the trunk's."""
        return any(self.noise.get(stream) == "fresh" for stream in streams)

    def forget_after(self, epoch: int) -> None:
        """Drop what was kept later than ``epoch``: training was resumed there and comes by again."""
        for name in _BY_EPOCH:
            kept: dict[int, Any] = getattr(self, name)
            for later in [e for e in kept if e > epoch]:
                del kept[later]

    def restart(self) -> None:
        """Forget an earlier attempt."""
        self.status, self.reason, self.exact_replay, self.shared = "running", None, None, {}
        self.end_step = self.first_batches = self.seconds = None
        self.effect = {}
        for name in _BY_EPOCH:
            setattr(self, name, {})


@dataclass
class Fork:
    """A snapshot from which children start.

    Args:
        position: where in training.
        folder: of its files, relative to the family's.
        digests: file -> sha256 of its bytes.
        first_batches: sha256 of the tensors of the first two batches that the trunk trained on after it.
    """

    position: Position
    folder: str
    digests: dict[str, str] = field(default_factory=dict)
    first_batches: str | None = None

    @property
    def checkpoint(self) -> str:
        """Lightning's checkpoint, relative to the family's folder."""
        return f"{self.folder}/checkpoint.ckpt"

    def noise(self, rank: int = 0) -> str:
        """What checkpoints leave out, of one process, relative to the family's folder."""
        return f"{self.folder}/noise_{rank}.pt"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Fork":
        """The fork that ``dataclasses.asdict`` made ``values`` of."""
        return cls(**{**values, "position": Position(**values["position"])})
