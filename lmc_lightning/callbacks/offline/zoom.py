"""A part of a run once more, measured more closely: what was forgotten at a spike of the loss is found afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn

from lmc_lightning.branching.children.isolation import isolated
from lmc_lightning.branching.children.portable import BLUEPRINT, load_blueprint
from lmc_lightning.branching.children.training import Children
from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.nodes import Node, Point
from lmc_lightning.branching.family.plan import child_of
from lmc_lightning.branching.internals import end_now
from lmc_lightning.branching.traces.curves import TRAIN_LOSS, read_curves
from lmc_lightning.branching.traces.evidence import common_digests, judge, keep_what_compares
from lmc_lightning.callbacks.bridge.probe_store import ProbeStore
from lmc_lightning.plotting.zoom import plot_zoom
from lmc_lightning.recording import Record
from lmc_lightning.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_EVIDENCE = {
    "first_batches": "digest after the fork",
    "batches": "at starts of epochs",
    "order": "of orders",
    "augmentation": "of augmentations",
    "weights": "of weights",
    "losses": "losses of steps",
}


@dataclass(frozen=True)
class Zoom:
    """What :func:`replay` found, on the step axis of the trunk."""

    start: int
    stop: int
    snapshot: str
    """Where the replay began, e.g. ``k1_step_001000``."""
    exact: bool
    """Whether everything that could be compared with the trunk was equal, bit for bit."""
    reason: str | None
    """Why it is not exact."""
    compared: dict[str, int]
    """How many things were equal or not: ``first_batches`` after the fork, ``batches`` at the start of epochs,
    ``order`` and ``augmentation`` of whole epochs, kept ``weights``, ``losses`` of steps."""
    folder: Path
    """Of its curves and records."""
    callbacks: Sequence[Any] = field(repr=False)
    """Those that were given, with their results."""
    losses: dict[int, float] = field(repr=False)
    """The training loss by step, from the snapshot on: that of step s is at the state after s − 1 steps."""
    trunk_losses: dict[int, float] = field(repr=False)
    """That of the trunk, over the whole run."""

    @property
    def results(self) -> list[Record]:
        """The records of all callbacks, by step."""
        found = [record for callback in self.callbacks for record in getattr(callback, "results", ())]
        return sorted((r for r in found if self.start <= r.step <= self.stop), key=lambda r: r.step)

    def to_pandas(self) -> pd.DataFrame:
        """A row per step, with a column per key, and the loss of the step."""
        losses = [Record("train", s, 0, TRAIN_LOSS, v) for s, v in self.losses.items() if self.start <= s <= self.stop]
        rows = [(r.step, r.name, r.value) for r in [*losses, *self.results] if r.is_measured]
        table = pd.DataFrame(rows, columns=["step", "name", "value"]).astype({"value": float})
        return table.pivot(index="step", columns="name", values="value").rename_axis(columns=None)

    def figure(self, keys: Sequence[str] = ()) -> "Figure":
        """The loss around the replayed part, and under it what was measured there.

        Args:
            keys: of what is drawn; by default the first three.

        Raises:
            KeyError: nothing was measured under a key; the message lists the keys.
        """
        table = self.to_pandas()
        known = [str(key) for key in table if key != TRAIN_LOSS]
        unknown = [key for key in keys if key not in known]
        if unknown:
            raise KeyError(f"Expected keys among {', '.join(known)}, got {unknown[0]!r}.")
        margin = max(10, self.stop - self.start)
        losses = sorted((self.trunk_losses or self.losses).items())
        around = [(s, loss) for s, loss in losses if self.start - margin <= s <= self.stop + margin]
        panels = {TRAIN_LOSS: np.array(around, dtype=float).reshape(-1, 2)}
        panels |= {key: table[key].dropna().reset_index().to_numpy(dtype=float) for key in keys or known[:3]}
        proof = ", ".join(f"{number} {_EVIDENCE[what]}" for what, number in self.compared.items() if number)
        caption = f"equal to the run bit for bit: {proof}" if self.exact else f"NOT the same run: {self.reason}"
        title = f"Steps {self.start} to {self.stop} once more, from {self.snapshot}"
        return plot_zoom(panels, (self.start, self.stop), title=title, caption=caption)


def replay(
    family: Family | Path | str,
    *,
    start: int,
    stop: int,
    every: int = 1,
    callbacks: Sequence[Callback] = (),
) -> Zoom:
    """Train the trunk again from the nearest snapshot at or before ``start``, and measure steps that it did not.

    A child with all of the trunk's noise is trained as far as ``stop``, in this process, with the module, data and
    Trainer of the family's blueprint, and the callbacks visit ``start``, ``start + every``, … ``stop``: exactly what
    they would have recorded in the trunk with those steps in their schedule, if the result is ``exact``. For that the
    digests of its batches, order, augmentation and kept weights are compared with the trunk's, and its loss at each
    step. The family itself gets no further child; curves and records go to ``branches/replay_001200_001300``.

    Probe sets are those of the callback's own ``probe_dataloader`` or of the datamodule; where the run's own batches
    are the probe set, the trunk's are taken if a callback of the trunk has captured as many, and otherwise those after
    the snapshot, which is then better some way before ``start``. A visit at a snapshot between two epochs finds the
    learning rate of the coming epoch.

    Cost: the training from the snapshot to ``stop``, and the visits.

    Args:
        family: or its folder, ``<log_dir>/lmc/family``. Its blueprint is a pickle: use only folders that you trust.
        start: first optimizer step whose state is visited.
        stop: the last, where the replay ends.
        every: distance of the steps visited.
        callbacks: new ones; their schedules are replaced. Others than measuring ones run as they are.

    Raises:
        ValueError: impossible steps, no snapshot before ``start``, callbacks that have measured before, or a run in
            which several optimizers step.
        FileNotFoundError: there is no family, or its trunk could not be pickled.
        DamagedFileError: a file is not what was written; the message names it.
    """
    family = family if isinstance(family, Family) else Family.load(family)
    steps = _steps(family, start, stop, every)
    if any(getattr(callback, "results", None) for callback in callbacks):
        raise ValueError("Expected new callbacks, got one that has measured already: its records would be mixed.")
    label = _nearest(family, start)
    branches = (family.folder / family.configuration["branches"]).resolve()
    node = child_of(Point.of(label), "replay", "same", 0)
    node.name = _free_name(branches, f"replay_{start:06d}_{stop:06d}")
    apart = _alone(family, label)
    window = _Window(steps, callbacks, family.folder.parent)
    children = Children(apart, load_blueprint(family.folder / BLUEPRINT), branches, roots={})
    with isolated():
        children.train(node, extra=[window, *callbacks], at_fork=window)
    own, trunk = (read_curves(f.curves_path(n)).get(TRAIN_LOSS, {}) for f, n in ((apart, node), (family, family.trunk)))
    keep_what_compares(node, family.trunk, window.num_batches, window.cut)
    node.reason = None
    judge(node, family.trunk, family.forks[label].first_batches)
    reason = _difference(node, own, trunk)
    compared = {**common_digests(node, family.trunk), "losses": len(own.keys() & trunk)}
    if reason:
        rank_zero_warn(f"The replay of steps {start} to {stop} is not the run that it repeats: {reason}.")
    failures = [f for callback in callbacks for f in getattr(callback, "failures", ())]
    if failures:
        rank_zero_warn(f"{len(failures)} visits of the replay failed, the first: {failures[0].evidence['reason']}")
    folder = branches / node.name
    return Zoom(start, stop, label, reason is None, reason, compared, folder, list(callbacks), own, trunk)


def _steps(family: Family, start: int, stop: int, every: int) -> frozenset[int]:
    numbers = (start, stop, every)
    if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers) or not 0 <= start <= stop or every < 1:
        raise ValueError(f"Expected 0 ≤ start ≤ stop and every ≥ 1, got start={start}, stop={stop}, every={every}.")
    if stop > family.end.step:
        raise ValueError(f"Expected stop of at most {family.end.step}, where the trunk has come to, got {stop}.")
    if family.end.step > family.end.batches:
        raise ValueError("Several optimizers step at each batch of this run: its steps cannot be told apart.")
    return frozenset(range(start, stop + 1, every))


def _nearest(family: Family, start: int) -> str:
    """The label of the last snapshot at or before a step."""
    before = {label: f.position for label, f in family.forks.items() if f.position.step <= start}
    if not before:
        known = ", ".join(str(step) for step in sorted(f.position.step for f in family.forks.values())) or "none"
        raise ValueError(f"There is no snapshot at or before step {start}; snapshots are after steps {known}.")
    return max(before, key=lambda label: (before[label].batches, label))


def _free_name(branches: Path, name: str) -> str:
    names = [name, *(f"{name}_{number}" for number in range(2, 10_000))]
    return next(n for n in names if not (branches / n).exists())


def _alone(family: Family, label: str) -> Family:
    """A temporary family with that snapshot alone, so that the real one gets no half-finished child."""
    apart, fork = Family(), family.forks[label]
    apart.trunk.status, apart.configuration = "missing", family.configuration
    apart.forks[label] = replace(fork, folder=str((family.folder / fork.folder).resolve()))
    return apart


class _Window(Callback):
    """Opens the schedules of callbacks at the fork, and ends the run after the last step.

    Args:
        steps: to be visited.
        callbacks: whose schedules are replaced.
        directory: where the trunk's callbacks have written their probe set.
    """

    name = "replay"

    def __init__(self, steps: frozenset[int], callbacks: Sequence[Any], directory: Path) -> None:
        self._steps, self._directory = steps, directory
        self._scheduled = [callback for callback in callbacks if hasattr(callback, "visit_if_due")]
        for callback in self._scheduled:  # what leads up to the fork is none of theirs
            callback.schedule = Schedule("step", None, frozenset())
        self.num_batches = 0
        """Trained on since the fork."""
        self.cut: tuple[int, int] | None = None
        """The epoch that was not run to its end, and how many of its batches were."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure on what the trunk's callbacks have measured on."""
        ProbeStore.of(trainer).adopt(self._directory)

    def record(self) -> dict[str, Any]:
        """Nothing is done to the training."""
        return {}

    def check_module(self, pl_module: Any) -> None:
        """Any module will do."""

    def check(self, trainer: Any) -> None:
        """Any run will do."""

    def apply(self, trainer: Any, pl_module: Any, seed: int) -> dict[str, Any]:
        """Visit the state of the fork itself, if it is the first of the steps."""
        for callback in self._scheduled:
            callback.schedule = Schedule("step", None, self._steps)
            callback.visit_if_due(trainer, pl_module, "step", trainer.global_step)
        return {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the run."""
        self.num_batches += 1
        if trainer.global_step >= max(self._steps) and not trainer.should_stop:
            if not trainer.is_last_batch:
                self.cut = trainer.current_epoch, batch_idx + 1
            end_now(trainer)


def _difference(node: Node, own: dict[int, float], trunk: dict[int, float]) -> str | None:
    """Why what was judged to be a replay is not one."""
    if not all(node.shared.values()):
        seen = ", ".join(what for what, same in node.shared.items() if not same)
        return f"its {seen} differ from the trunk's: the data has changed since, or the loader has state of its own"
    if not node.exact_replay:
        return node.reason
    steps = sorted(own.keys() & trunk)
    first = next((s for s in steps if own[s] != trunk[s] and not (isnan(own[s]) and isnan(trunk[s]))), None)
    return None if first is None else f"the loss differs from the trunk's first at step {first}"
