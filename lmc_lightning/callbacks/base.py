"""The abstract measuring callback: when to visit, on which state and data, and what becomes of the result."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lmc_lightning.callbacks.bridge.guards import check_common, check_module, check_names, check_trainer
from lmc_lightning.callbacks.bridge.objectives import collective_of, objective_of
from lmc_lightning.callbacks.bridge.probe_set import ProbeSet, Split
from lmc_lightning.callbacks.bridge.probes import Probes
from lmc_lightning.callbacks.bridge.step import StepBatch
from lmc_lightning.callbacks.bridge.views import trainer_view
from lmc_lightning.callbacks.visits.agenda import Agenda
from lmc_lightning.callbacks.visits.budget import Budget
from lmc_lightning.callbacks.visits.examination import examine
from lmc_lightning.callbacks.visits.reporting import Reporting
from lmc_lightning.callbacks.visits.tolerance import OnError
from lmc_lightning.callbacks.visits.visit import Pending, Visit, optimizer_states
from lmc_lightning.core.files import slug
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.shadow import Mode
from lmc_lightning.recording import Measurement, Recorder
from lmc_lightning.schedule import Axis, Schedule
from lmc_lightning.types import BatchWeight, LossFn


class MeasurementCallback(Reporting, ABC):
    """Measures the training state at scheduled points and leaves training bit-identical.

    Leaves implement :meth:`measure`. Results are kept in ``results``, written to ``<log_dir>/lmc/<name>.jsonl`` and
    shown in every logger at x = optimizer steps taken. Standard errors are logged as ``<key>_stderr``; TensorBoard has
    ``<key>/low`` and ``<key>/high`` instead, of those numbers that a chart of custom scalars shows with a band.

    Args:
        every_n_epochs: visit the start and every n-th completed epoch.
        epochs: visit after these numbers of completed epochs; 0 is the start.
        every_n_train_steps: visit the start and every n-th optimizer step.
        steps: visit after these numbers of optimizer steps. Without any of the four: every epoch and the start.
        num_examples: size of the probe set; ``None`` for all of ``probe_dataloader`` or of the datamodule's split.
        probe_dataloader: where the probe set is read from, once, with a private random stream.
        parameters: name patterns of the parameters to measure, e.g. ``["encoder.*"]``; all trainable ones by default.
        batch_weight: ``batch -> float``, how much a batch counts; its number of examples by default.
        expose: also give the numbers to ``EarlyStopping`` and ``ModelCheckpoint`` as metrics of the epoch.
        on_error: ``"record"`` a failed visit with its reason and go on training, or ``"raise"``.
        loss_fn: ``(module, batch) -> scalar mean loss`` in place of the module's own ``training_step``.
        mode: ``"eval"``, or ``"train"`` for batch statistics (dropout off).
        match_precision: measure in the precision of the training, its autocast included, in place of true float32.
        seed: of this callback's random vectors and probe examples.
        max_overhead: time of this callback's visits over training time, at most, e.g. ``0.1``: visits that would take
            more are skipped, and after a skipped one, fewer random probes will do.
        name: a suffix for the keys of a second instance.
    """

    kind: str
    """First segment of the logged keys."""
    advice: str = ""
    """What helps where a number has not converged."""
    splits: tuple[Split, ...] = ("train",)
    """Whose probe sets a visit needs."""
    min_effort: float = 1.0
    """Least share of its random probes with which a visit is worth making; 1 if it cannot do with fewer."""
    clock = staticmethod(time.perf_counter)
    """Tells the time [s]."""

    def __init__(
        self,
        *,
        every_n_epochs: int | None = None,
        epochs: list[int] | None = None,
        every_n_train_steps: int | None = None,
        steps: list[int] | None = None,
        num_examples: int | None = 2048,
        probe_dataloader: Iterable[Any] | None = None,
        parameters: list[str] | None = None,
        batch_weight: BatchWeight | None = None,
        expose: bool = False,
        on_error: OnError = "record",
        loss_fn: LossFn | None = None,
        mode: Mode = "eval",
        match_precision: bool = False,
        seed: int = 0,
        max_overhead: float | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.schedule = Schedule.from_arguments(
            every_n_epochs=every_n_epochs, epochs=epochs, every_n_train_steps=every_n_train_steps, steps=steps
        )
        check_common(on_error, mode, num_examples, max_overhead)
        self.parameters, self.batch_weight, self.loss_fn = parameters, batch_weight, loss_fn
        self.num_examples, self.mode, self.match_precision, self.seed = num_examples, mode, match_precision, seed
        self.expose, self.on_error, self.name = expose, on_error, name
        self.seconds = 0.0
        """Spent on visits in this run."""
        self._budget = Budget(max_overhead)
        self._recorder = Recorder(self.kind if name is None else f"{self.kind}_{slug(name)}")
        self._probes = Probes(self.splits, num_examples, probe_dataloader, seed)
        self._agenda = Agenda(self._recorder)
        self._step, self._last_global_step = 0, 0

    @abstractmethod
    def measure(self, visit: Visit) -> Measurement:
        """The quantities of one visit. Runs inside the glass box, on a shadow; an exception becomes a record."""

    def forget(self) -> None:
        """Start without knowledge of another run; called in ``setup``."""
        self._step, self._agenda, self.seconds = 0, Agenda(self._recorder), 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that this run can be measured, and ask for its probe set."""
        if stage != "fit":
            return
        self.forget()
        check_trainer(trainer)
        check_names(trainer.callbacks, self)
        check_module(pl_module, loss_fn=self.loss_fn, captures=self._probes.captures(trainer))
        directory = Path(trainer.log_dir or trainer.default_root_dir) / "lmc"  # a broadcast: every rank asks
        self._recorder.directory = directory if trainer.is_global_zero and not trainer.fast_dev_run else None
        if not trainer.loggers and not trainer.fast_dev_run:
            rank_zero_info(f"No logger: {type(self).__name__} writes to {directory} only.")
        self._probes.setup(trainer, None if trainer.fast_dev_run else directory)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Visit the start, or what a resumed run has left open."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step = trainer.global_step
        if trainer.global_step == 0 or not self._step:
            self._step, self._budget = trainer.global_step, Budget(self._budget.max_overhead)
        self._budget.start(self.clock(), _measuring(trainer))
        self._recorder.drop_after(self._step)
        self.draw_probes(trainer, pl_module)
        if self._step:
            self._continue(trainer, pl_module)
        elif not trainer.fast_dev_run:
            self._recorder.drop_failures(0)
            self.visit_if_due(trainer, pl_module, "epoch", 0)
            self.visit_if_due(trainer, pl_module, "step", 0)

    def draw_probes(self, trainer: Any, pl_module: Any) -> None:
        """Read the probe sets that need no training steps."""
        collective_of(trainer, interruptible=False).agree(lambda: self._probes.start(trainer, pl_module))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Capture this batch if the probe set still lacks examples."""
        self._probes.before_step(trainer, pl_module, "train")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step, and visit it."""
        self._visit_pending(trainer)
        if trainer.global_step == self._last_global_step:
            return
        self._last_global_step = trainer.global_step
        self._step += 1
        self.visit_if_due(trainer, pl_module, "step", self._step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Visit the completed epoch."""
        self._probes.close("train")
        self._visit_pending(trainer)
        if trainer.is_last_batch:
            self.visit_if_due(trainer, pl_module, "epoch", trainer.current_epoch + 1)
        if self.expose:
            for name, value in self._recorder.latest().items():
                # All processes have the same value, and are asked to say so. `log` is set by Lightning.
                self.log(name, value, logger=False, sync_dist=trainer.world_size > 1)  # type: ignore[attr-defined]

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Capture this batch if the validation probe set still lacks examples."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._probes.before_step(trainer, pl_module, "val")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """The first validation run ends the capture of its split."""
        if not trainer.sanity_checking:
            self._probes.close("val")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the visits that still wait."""
        self._probes.close("train")
        self._visit_pending(trainer, final=True)
        for visit in self._agenda.take():
            reason = ["The run ended before its probe set was complete.", *self._probes.errors]
            self._agenda.fail(" ".join(reason), visit.step, visit.epoch)
        for error in [*self._recorder.errors, *self._probes.errors]:
            self._recorder.warn_once(error)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the visits that a run left open at its very end: resumed there, it does not train any more."""
        if self._agenda.open:
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module's steps alone."""
        self._probes.detach()

    def is_due(self, axis: Axis, count: int) -> bool:
        """Whether the state after ``count`` epochs or steps is to be visited."""
        return self.schedule.is_due(axis, count)

    def leads_to_a_visit(self, trainer: Any) -> bool:
        """Whether the state after the coming step is to be visited, asked in ``on_train_batch_start``."""
        ends_epoch = trainer.is_last_batch and self.is_due("epoch", trainer.current_epoch + 1)
        return bool(ends_epoch or trainer.fast_dev_run or self.is_due("step", self._step + 1))

    def visit_if_due(self, trainer: Any, pl_module: Any, axis: Axis, count: int) -> None:
        """Visit the state after ``count`` epochs or steps, if scheduled; the only epoch of a fast_dev_run is."""
        if (trainer.fast_dev_run and axis == "epoch") or self.is_due(axis, count):
            self._request(trainer, pl_module, count if axis == "epoch" else trainer.current_epoch)

    def _continue(self, trainer: Any, pl_module: Any) -> None:
        """Take up a resumed run: what its file has beyond the checkpoint, and the visits that it left open."""
        earlier = self._recorder.read(self._step) if trainer.is_global_zero else []
        self._recorder.add_missing(trainer.strategy.broadcast(earlier))
        for epoch in self._agenda.reopen(self._step):
            self._request(trainer, pl_module, epoch)

    def _request(self, trainer: Any, pl_module: Any, epoch: int) -> None:
        """Visit the present state, now or, while the probe set is awaited, later on a copy."""
        visit = Pending(self._step, epoch, pl_module, optimizer_states(trainer, pl_module), trainer_view(trainer))
        self._agenda.add(visit)
        self._visit_pending(trainer)
        if self._agenda.waiting:
            with self._agenda.attempt(visit, self.on_error):
                collective_of(trainer).agree(lambda: self._agenda.postpone(self._probes.num_examples))

    def _visit_pending(self, trainer: Any, *, final: bool = False) -> None:
        probes = self._probe_sets(trainer, final=final) if self._agenda.waiting else None
        if probes is not None:
            for visit in self._agenda.take():
                self._visit(trainer, visit, probes)

    def _probe_sets(self, trainer: Any, *, final: bool = False) -> dict[Split, ProbeSet] | None:
        """The probe sets of a visit; ``None`` while one of them is still awaited."""
        return self._probes.sets(trainer, optional=("val",) if final or not trainer.enable_validation else ())

    def _visit(self, trainer: Any, visit: Pending, probes: Mapping[Split, ProbeSet]) -> None:
        started, collective = self.clock(), collective_of(trainer, interruptible=False)
        effort = self._budget.effort(started, _measuring(trainer), self.min_effort, collective)
        if not effort:
            self._budget.skip()
            self._agenda.skip(visit, self._budget.reason)
            return
        with self._agenda.attempt(visit, self.on_error):
            examine = partial(self.examine, visit.module, probes, trainer=visit.trainer, optimizers=visit.optimizers)
            examine = partial(examine, step=visit.step, epoch=visit.epoch, effort=effort)
            measurement = collective_of(trainer).agree(examine)
            self._agenda.record(visit, measurement, trainer.loggers if trainer.is_global_zero else (), self.advice)
        seconds = self.clock() - started
        self.seconds += seconds
        self._budget.spend(effort, seconds)

    def examine(self, module: nn.Module, probes: Mapping[Split, ProbeSet], **options: Any) -> Measurement:
        """One measurement of a module on given probe sets; for the options see :func:`examine`."""
        return examine(self, module, probes, **options)

    def objective(self, module: nn.Module, batches: Sequence[StepBatch], **options: Any) -> Objective:
        """The module's loss on given batches, under this callback's options and those of :func:`objective_of`."""
        names = ("loss_fn", "parameters", "batch_weight", "mode", "match_precision", "seed")
        own = {name: getattr(self, name) for name in names}
        return objective_of(module, batches, **own | {k: v for k, v in options.items() if v is not None})

    @property
    def state_key(self) -> str:
        """Names this instance in checkpoints."""
        return self._generate_state_key(kind=self.kind, name=self.name, schedule=str(self.schedule))

    def __getstate__(self) -> dict[str, Any]:
        """Without the ties to the module of the last run, which Lightning leaves on a callback."""
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}

    def state_dict(self) -> dict[str, Any]:
        """Plain values only: records and open visits, step count, and the names of the files that belong to them."""
        return {
            "version": 1,
            "step": self._step,
            "records": self._recorder.state(),
            "open": self._agenda.state(),
            "budget": self._budget.state(),
            "file": None if self._recorder.path is None else str(self._recorder.path),
            "probes": self._probes.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the records of a checkpoint; a state of another version starts empty."""
        if state_dict.get("version") != 1:
            rank_zero_warn(f"{type(self).__name__} cannot read the state of version {state_dict.get('version')!r}.")
            return
        self._step = int(state_dict["step"])
        self._recorder.load_state(state_dict["records"])
        self._agenda.load_state(state_dict.get("open", []))
        self._budget.load_state(state_dict.get("budget", {}))
        self._recorder.earlier_file = state_dict.get("file")
        self._probes.load_state(state_dict["probes"])


def _measuring(trainer: Any) -> float:
    """Time that all measuring callbacks of a run have taken so far [s]."""
    return sum(c.seconds for c in trainer.callbacks if isinstance(c, MeasurementCallback))
