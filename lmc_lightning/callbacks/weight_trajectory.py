"""The way of the weights through parameter space: how far, how straight, and on which plane."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.trajectory.families import family_trajectories
from lmc_lightning.callbacks.trajectory.figures import trajectory_pictures
from lmc_lightning.callbacks.trajectory.options import check_trajectory
from lmc_lightning.callbacks.trajectory.quantities import loss_column, stride_quantities
from lmc_lightning.callbacks.trajectory.snapshots import Snapshots
from lmc_lightning.callbacks.visits.common import Common, Unpack
from lmc_lightning.callbacks.visits.tolerance import tolerated
from lmc_lightning.callbacks.visits.visit import NO_DERIVATIVES, Visit
from lmc_lightning.core.glassbox import glass_box
from lmc_lightning.landscape.trajectory.components import Trajectory, pca_plane, plane_losses
from lmc_lightning.loggers import Chart
from lmc_lightning.recording import Measurement
from lmc_lightning.schedule import Axis, Schedule

MIN_SNAPSHOTS = 3
"""That span a plane."""


class WeightTrajectory(MeasurementCallback):
    """The way of the weights: recorded at every visit, or every few steps, and drawn on its principal plane at the end.

    Recording costs a copy of P numbers to the CPU and a pass over them, about 25 ns a parameter and step; the
    weights go to ``<log_dir>/lmc/trajectory`` in files of 64 MiB, of which checkpoints hold the digests only;
    :func:`read_trajectory` reads them. A visit adds one forward pass, for the loss. The plane is that of all recorded
    weights, or of as many as fit into a quarter of the free memory; T states cost T²P operations. Beside
    :class:`CheckpointBranching` all runs of the family are drawn on one plane too, when the children are done. Source:
    arXiv 1712.09913, §7; the reference of a random walk: arXiv 1806.08805.

    Logged at x = steps taken, of the recorded states up to there:

    ==================================  ==============================================================================
    ``trajectory/distance_from_start``  ‖θ_k − θ_0‖₂
    ``trajectory/path_length``          Σ‖θ_i − θ_{i−1}‖₂ over recorded states, at most the length of the way
    ``trajectory/step_length``          ‖θ_k − θ_{k−1}‖₂ from the last recorded state; not at the first
    ``trajectory/step_cosine``          of the last two such steps; not at the first two
    ``trajectory/norm``                 ‖θ_k‖₂
    ``trajectory_plane``                figure and array of the principal plane, once, at the end
    ``trajectory_variance``             figure of its explained variance beside that of a random walk, 6/(π²j²)
    ``trajectory_tsne``                 figure, with ``tsne``
    ``trajectory_plane/family``         figure and array of the runs of a family; likewise the other figures
    ``trajectory``                      table only: the points of TensorBoard's projector; likewise ``/family``
    ==================================  ==============================================================================

    Args:
        record_every_n_train_steps: also record between visits, after every n-th optimizer step.
        dimension: record sketches of so many numbers in place of the weights
            (:func:`~lmc_lightning.landscape.trajectory.sketch.count_sketch`); all numbers are then of the sketches,
            right to about √(2/dimension), and the loss on the plane is not known.
        loss_points: points on each axis of a grid in the plane on which the true loss is drawn, each a pass over the
            probe set; 0 for none. BatchNorm has the statistics of the end.
        tsne: draw t-SNE too.
        **common: see :class:`MeasurementCallback`; ``seed`` is that of sketches, and equal in all runs to be compared.

    Raises:
        ValueError: impossible numbers, or the loss on a plane of sketches.
    """

    kind = "trajectory"

    def __init__(
        self,
        *,
        record_every_n_train_steps: int | None = None,
        dimension: int | None = None,
        loss_points: int = 0,
        tsne: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        check_trajectory(dimension, loss_points)
        self.dimension, self.loss_points, self.tsne = dimension, loss_points, tsne
        every = record_every_n_train_steps
        self.recording = None if every is None else Schedule.from_arguments(every_n_train_steps=every)
        self.snapshots = Snapshots(self.parameters, dimension, self.seed)
        self._earlier: list[Any] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that the loss on the plane can be had.

        Raises:
            ValueError: several processes, of which one alone knows the plane.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.loss_points and trainer.world_size > 1:
            raise ValueError("The loss on the plane is drawn by one process only. Pass loss_points=0.")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Record the start, or go on with the way of a resumed run."""
        resumed = bool(trainer.global_step and self._step)
        directory = self._recorder.directory
        self.snapshots.begin(directory and directory / self._recorder.kind, keeps=trainer.is_global_zero)
        if resumed:
            lost = f"The way up to step {self._step} is lost"
            with tolerated(lambda why: self._recorder.warn_once(f"{lost}: {why}"), "record"):
                self.snapshots.resume(self._earlier)
        if self.snapshots.step is None:
            self._record(pl_module, self._step if resumed else trainer.global_step)
        super().on_train_start(trainer, pl_module)

    def visit_if_due(self, trainer: Any, pl_module: Any, axis: Axis, count: int) -> None:
        """Record the state if that or a visit is due, then visit it."""
        only = trainer.fast_dev_run and axis == "epoch"
        if only or self.is_due(axis, count) or (self.recording is not None and self.recording.is_due(axis, count)):
            self._record(pl_module, self._step)
        super().visit_if_due(trainer, pl_module, axis, count)

    def _record(self, module: nn.Module, step: int) -> None:
        if self.snapshots.step != step:
            with self._aside(f"recording at step {step}"):
                self.snapshots.add(step, module)

    def measure(self, visit: Visit) -> Measurement:
        """The way up to this visit, as it was recorded."""
        number, stride = self.snapshots.up_to(visit.step)
        start = self.snapshots.walk.strides[0].step
        evidence = {"num_snapshots": number, "start_step": start, "dimension": self.dimension, **NO_DERIVATIVES}
        return Measurement(tuple(stride_quantities(stride, self.key)), evidence=evidence)

    def charts(self) -> list[Chart]:
        """Way and distance together, and the steps."""
        return [
            Chart("length of the way, and distance from the start", (self.tag("(path_length|distance_from_start)"),)),
            Chart("length of a step", (self.tag("step_length"),)),
            Chart("cosine of a step with the last one", (self.tag("step_cosine"),)),
            Chart("norm of the weights", (self.tag("norm"),)),
        ]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the end, and draw the way."""
        self._record(pl_module, self._step)
        super().on_train_end(trainer, pl_module)
        self.snapshots.flush()
        for error in self.snapshots.errors:
            self._recorder.warn_once(error)
        if trainer.is_global_zero and len(self.snapshots) >= MIN_SNAPSHOTS:
            with self._aside("drawing the way"):
                run = self.snapshots.trajectory()
                here, columns = (self._step, trainer.current_epoch), loss_column(run, self.results)
                self._draw([run], trainer, pl_module, here, columns=columns)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write what was recorded."""
        self.snapshots.flush()
        super().on_exception(trainer, pl_module, exception)

    def measure_family(self, family: Family, trainer: Any, pl_module: Any) -> None:
        """Draw the trunk and its children on one plane."""
        with self._aside("drawing the family"):
            runs = family_trajectories(family, pl_module, self.parameters)
            runs = [replace(run, points=torch.stack([*map(self.snapshots.sketched, run.points)])) for run in runs]
            self._draw(runs, trainer, pl_module, (family.end.step, family.end.epoch), "/family")
        for logger in trainer.loggers:
            logger.save()

    def _draw(
        self, runs: list[Trajectory], trainer: Any, pl_module: Any, at: tuple[int, int], suffix: str = "", **shown: Any
    ) -> None:
        """Draw runs on their plane, at a step and epoch."""
        with glass_box():
            try:
                plane = pca_plane(runs)
            except ValueError as error:
                self._recorder.tell_once(str(error), f"draws no plane: {error}")
                return
            sets = self._probe_sets(trainer, final=True) if self.loss_points else None
            losses = None
            if sets is not None:
                objective = self.objective(pl_module, sets["train"].batches, trainer=trainer)
                losses = plane_losses(objective, plane, num_points=self.loss_points)
            suffix = f"/{self.name}{suffix}" if self.name else suffix
            caption = f"sketches of {self.dimension} numbers" if self.dimension else ""
            shown |= {"losses": losses, "with_tsne": self.tsne, "caption": caption}
            drawn = trajectory_pictures(plane, suffix=suffix, **shown)
            self._recorder.add(drawn, step=at[0], epoch=at[1], loggers=trainer.loggers)

    @contextmanager
    def _aside(self, doing: str) -> Iterator[None]:
        """Beside the visits: the time is counted, and failures are warned of, unless they are to be raised."""
        started = self.clock()
        failed = f"{doing} failed and training goes on"
        with tolerated(lambda why: self._recorder.warn_once(f"{failed}: {why}"), self.on_error):
            yield
        self.seconds += self.clock() - started

    def state_dict(self) -> dict[str, Any]:
        """The records, and names and digests of the files of weights."""
        return super().state_dict() | {"snapshots": self.snapshots.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the records and the way of a checkpoint."""
        super().load_state_dict(state_dict)
        self._earlier = list(state_dict.get("snapshots", []))
