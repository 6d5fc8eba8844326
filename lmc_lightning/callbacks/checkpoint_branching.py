"""Exact forks of a run at chosen epochs or steps, trained on under other noise."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pandas as pd
from lightning.pytorch import Callback

from lmc_lightning.branching.checks import refuse_same_names
from lmc_lightning.branching.children.blueprint import MakeTrainer
from lmc_lightning.branching.children.overrides import Value
from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.plan import Noise, Plan, When
from lmc_lightning.branching.forks.snapshot import rewind_to_epoch_start
from lmc_lightning.branching.internals import signals_restored_by_teardown
from lmc_lightning.branching.trunk import Trunk
from lmc_lightning.callbacks.pairs.differences import difference_charts, paired_differences, report_differences
from lmc_lightning.callbacks.perturbation import intervention_of
from lmc_lightning.loggers import Chart


class CheckpointBranching(Callback):
    """Children that leave the run after k₁ epochs or steps and train to its end under fresh noise.

    While the run (the trunk) trains, an exact snapshot is taken at each branch point: parameters, buffers, optimizers,
    schedulers, loop position, scaler, callback states, every random state. The children are trained with copies of its
    own module, datamodule and callbacks, by Trainers with its arguments. They end at the trunk's last step, also where
    that stopped early: early stopping is not passed on, nor are checkpointing, progress bars, timers, tuners and
    callbacks of this package. Their curves go to ``<log_dir>/branches/k1_000_child_0`` (``k1_step_000500_child_0``);
    weights of trunk and children to the :class:`Family` in ``<log_dir>/lmc/family``, kept at the epochs that the
    ``schedule`` of any callback with a ``measure_family`` asks for (at every epoch without one), and at branch points
    and the end. Then ``measure_family(family, trainer, pl_module)`` of those callbacks is called. The training of the
    trunk is the same, bit for bit, with and without.

    Under ``strategy="ddp"`` (also spawned, or launched from outside) the same processes train the children, each under
    its own part of the noise, which it writes beside the snapshot; all else the first one writes, into a folder that
    all can read. Digests are of all processes. A child that fails on one of them alone ends the run, once the others
    have not come to its end within minutes; to train what is left, resume the run.

    Under ``WeightAveraging``, ``EMAWeightAveraging`` and ``StochasticWeightAveraging`` the weights themselves are
    forked and kept, not their average, and children average on from where the trunk had come; only after the epoch in
    which SWA recomputes the statistics of BatchNorm is the average what is kept.

    A child that fails, also one whose fresh noise turns out to be the trunk's, is recorded with its reason and the
    others go on. A trunk that is interrupted or fails starts no children; :meth:`run_children` trains them to where it
    had come, and continues after an interruption among them, and ``python -m lmc_lightning.branching`` does so in
    another process. ``fast_dev_run`` runs one child from the start and leaves no files.

    With ``perturb`` or ``override`` every child is a counterfactual: one thing is done to it at the fork, and what it
    trains on is the trunk's. Its keys and names say what (``barrier/train_loss/k1_005/lr_x0.5``), and at the end its
    curves are compared with the trunk's, step by step: in ``differences``, in ``differences.csv`` in the family's
    folder, and as

    ===================================================  ============================================================
    ``difference/train_loss/k1_{005}/{lr_x0.5}``         child − trunk, of the loss on the batch of each step
    ``difference/{metric}/k1_{005}/{lr_x0.5}``           likewise of what ``validation_step`` logs
    ``…/child_{j}``                                      appended when a branch point has several children
    ``difference_curves/{train_loss}/{lr_x0.5}``         figure, of all children
    ===================================================  ============================================================

    Cost: T + Σ(T − k₁) epochs, a checkpoint per branch point, a ``state_dict`` per run and kept epoch on disk, and
    copies of the module in memory; a fork at a step fetches again the batches before it in its epoch. Source: Frankle
    et al., arXiv:1912.05671, algorithm 1.

    Args:
        epochs: branch points k₁ in completed epochs; 0 is the start. ``max_epochs`` itself gives a child that is the
            trunk's end. None: 0, 1, 2 and 5, or no epochs if ``steps`` are given.
        steps: branch points k₁ in optimizer steps. Several optimizers each count: the fork is where k₁ is reached.
        children: how many from each.
        noise: ``"fresh"``: order, augmentation and dropout from the branch point on follow from a seed derived from
            ``seed``, k₁ and the child's number; ``"same"``: the trunk's own, so that the child repeats it bit for bit;
            or one of them for each of ``{"order": …, "augmentation": …, "dropout": …}``, where they are drawn apart.
            None: ``"fresh"``, or ``"same"`` with ``perturb`` or ``override``.
        perturb: the arguments of a :class:`Perturbation`, e.g. ``{"size": 0.01, "relative": True}``: the parameters are
            displaced once, by a Gaussian vector or along the gradient of one batch.
        override: settings that are the child's own, e.g. ``{"optimizer.lr": "*0.5"}`` or ``{"module.smoothing": 0.1}``;
            see :class:`Override`.
        seed: of all fresh noise.
        when: children are trained at the ``"end"`` of the run; ``"immediately"``, as soon as there is a snapshot; or
            ``"never"`` by the run itself: by :meth:`run_children`, or elsewhere from the snapshots' folders.
        make_trainer: ``make_trainer(**overrides) -> Trainer``, needed where the trunk's Trainer was given what cannot
            be read back: plugins, a strategy or accelerator of your own, a subclass.

    Raises:
        ValueError: impossible arguments; before the first step a setting that is not there, a branch point past the
            end, several devices without ``ddp``, a Trainer that cannot be read back without ``make_trainer``, or noise
            that cannot be had apart.
        TypeError: in ``setup``, if the datamodule or a callback cannot be copied.
    """

    kind, name = "difference", None

    def __init__(
        self,
        *,
        epochs: Sequence[int] | None = None,
        steps: Sequence[int] = (),
        children: int = 1,
        noise: Noise | None = None,
        perturb: Mapping[str, Any] | None = None,
        override: Mapping[str, Value] | None = None,
        seed: int = 0,
        when: When = "end",
        make_trainer: MakeTrainer | None = None,
    ) -> None:
        self.plan = Plan.of(epochs, steps, children, noise, seed, intervention_of(perturb, override))
        if when not in get_args(When):
            raise ValueError(f"Expected when to be 'end', 'immediately' or 'never', got {when!r}.")
        self.when, self.make_trainer = when, make_trainer
        self._trunk: Trunk | None = None
        self.logged: set[str] = set()
        """Keys of all differences that loggers have."""
        self._earlier: str | None = None

    @property
    def family(self) -> Family:
        """The trunk, its children and their weights.

        Raises:
            RuntimeError: no ``fit`` has started with this callback.
        """
        return self._fitted().family

    def run_children(self) -> Family:
        """Train the children that are not completed and have a snapshot, and measure the family again.

        Raises:
            RuntimeError: no ``fit`` has started with this callback.
        """
        trunk = self._fitted()
        trunk.run_children()
        if self.plan.intervention is not None and trunk.family.writes and not trunk.trainer.fast_dev_run:
            with trunk.guarded("compare the curves"):
                report_differences(trunk.family, trunk.trainer, self.logged)
        return trunk.family

    def charts(self) -> list[Chart]:
        """The differences of all children in one chart for each quantity."""
        return difference_charts(self.logged, expected=self.plan.intervention is not None)

    @property
    def differences(self) -> pd.DataFrame:
        """Child − trunk at every step of those children to which something was done at the fork."""
        return paired_differences(self.family)

    @property
    def state_key(self) -> str:
        """One per configuration."""
        return self._generate_state_key(**self.plan.record())

    def state_dict(self) -> dict[str, Any]:
        """Where the family is, for a run resumed from this checkpoint."""
        return {"version": 1, "family": str(self._trunk.family.folder)} if self._trunk else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where the family of the earlier run is."""
        self._earlier = state_dict.get("family")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Copy what children are built from, before anything is trained."""
        if stage == "fit":
            branchings = [c for c in trainer.callbacks if isinstance(c, CheckpointBranching)]
            place = branchings.index(self)
            refuse_same_names(self.plan, [earlier.plan for earlier in branchings[:place]], trainer.callbacks)
            if self.plan.intervention is not None:
                self.plan.intervention.check_module(pl_module)
            self.logged.clear()
            self._trunk = Trunk(trainer, pl_module, self, place)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what is to be done to the children, now that there are optimizers."""
        if self.plan.intervention is not None:
            self.plan.intervention.check(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the family."""
        with self._fitted().guarded("start the family") as trunk:
            trunk.begin(self._earlier)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep weights and take a snapshot, where either is due."""
        with self._fitted().guarded("keep weights") as trunk:
            trunk.begin_epoch()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Digest the first batches of each epoch."""
        with self._fitted().guarded("digest a batch", together=False) as trunk:
            trunk.see_batch(batch, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the loss."""
        with self._fitted().guarded("note the loss", together=False) as trunk:
            trunk.curves.see_batch(trainer, outputs)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the metrics."""
        if trainer.state.fn == "fit":
            with self._fitted().guarded("note the metrics", together=False) as trunk:
                trunk.curves.see_validation(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Digest the order of the epoch."""
        with self._fitted().guarded("digest an epoch") as trunk:
            trunk.end_epoch()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the last weights."""
        with self._fitted().guarded("keep the last weights") as trunk:
            trunk.end_training()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Train the children and measure the family."""
        trunk = self._fitted()
        trunk.close()
        if trunk.family.trunk.status == "running":  # and not a fit without a single batch
            trunk.complete()
            if self.when != "never":
                with signals_restored_by_teardown(trainer):
                    self.run_children()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Note that the trunk ended here."""
        if self._trunk is not None:
            self._trunk.break_off(exception)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Correct the loop state of our own snapshots; other checkpoints are none of our business."""
        if self._trunk is not None and self._trunk.is_forking:
            rewind_to_epoch_start(checkpoint)

    def _fitted(self) -> Trunk:
        if self._trunk is None:
            raise RuntimeError(
                "There is no family yet: call trainer.fit with this CheckpointBranching in callbacks. Processes that "
                "Lightning spawned have left theirs in files: lmc_lightning.Family.load('<log_dir>/lmc/family')."
            )
        return self._trunk

    def __getstate__(self) -> dict[str, Any]:
        """Without the live run, whose trainer neither pickles nor copies."""
        return {**self.__dict__, "_trunk": None}

    def __repr__(self) -> str:
        given = {**vars(self.plan), "when": self.when}
        usual = {"steps": (), "intervention": None, "when": "end"}
        told = (f"{name}={value!r}" for name, value in given.items() if name not in usual or usual[name] != value)
        return f"CheckpointBranching({', '.join(told)})" + (f"\n{self.family!r}" if self._trunk else "")
