"""Exact forks of a run at chosen epochs, trained on under other noise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback

from lmc_lightning.branching.internals import let_teardown_restore_signals
from lmc_lightning.branching.lineage import Family
from lmc_lightning.branching.snapshot import rewind_to_epoch_start
from lmc_lightning.branching.spawn import MakeTrainer
from lmc_lightning.branching.trunk import Plan, Trunk


class CheckpointBranching(Callback):
    """Children that leave the run after k₁ epochs and train to its end under fresh noise: instability analysis.

    While the run (the trunk) trains, an exact snapshot is taken at each branch point: parameters, buffers, optimizers,
    schedulers, loop position, scaler, callback states, every random state. When it has ended, in ``on_fit_end``, the
    children are trained one after another with copies of its own module, datamodule and callbacks, by Trainers with its
    arguments. They end at the trunk's last step, also where that stopped early: early stopping is not passed on, nor
    are checkpointing, progress bars, timers, tuners and callbacks of this package. Their curves go to
    ``<log_dir>/branches/k1_000_child_0``; weights of trunk and children to the :class:`Family` in
    ``<log_dir>/lmc/family``, kept at the epochs that the ``schedule`` of any callback with a ``measure_family`` asks
    for (at every epoch without one), and at branch points and the end. Then ``measure_family(family, trainer,
    pl_module)`` of those callbacks is called. The training of the trunk is the same, bit for bit, with and without.

    A child that fails, also one whose fresh noise turns out to be the trunk's, is recorded with its reason and the
    others go on. A trunk that is interrupted or fails starts no children; :meth:`run_children` trains them to where it
    had come, and continues after an interruption among them. ``fast_dev_run`` runs one child from the start and leaves
    no files.

    Cost: T + Σ(T − k₁) epochs, a checkpoint per branch point, a ``state_dict`` per run and kept epoch on disk, and
    copies of the module in memory. Source: Frankle et al., arXiv:1912.05671, algorithm 1.

    Args:
        epochs: branch points k₁ in completed epochs; 0 is the start. ``max_epochs`` itself gives a child that is the
            trunk's end.
        children: how many from each.
        noise: ``"fresh"``: order, augmentation and dropout from the branch point on follow from a seed derived from
            ``seed``, k₁ and the child's number; ``"same"``: the trunk's own, so that the child repeats it bit for bit.
        seed: of all fresh noise.
        make_trainer: ``make_trainer(**overrides) -> Trainer``, needed where the trunk's Trainer was given what cannot
            be read back: plugins, a strategy or accelerator of your own, a subclass.

    Raises:
        ValueError: impossible arguments; in ``setup`` a branch point past ``max_epochs``, several devices, or a Trainer
            that cannot be read back without ``make_trainer``.
        TypeError: in ``setup``, if the datamodule or a callback cannot be copied.
    """

    def __init__(
        self,
        *,
        epochs: Sequence[int] = (0, 1, 2, 5),
        children: int = 1,
        noise: Literal["fresh", "same"] = "fresh",
        seed: int = 0,
        make_trainer: MakeTrainer | None = None,
    ) -> None:
        super().__init__()
        wrong = [e for e in epochs if isinstance(e, bool) or not isinstance(e, int) or e < 0]
        if wrong or not epochs:
            raise ValueError(f"Expected epochs to list integers of at least 0, got {epochs!r}.")
        if isinstance(children, bool) or not isinstance(children, int) or children < 1:
            raise ValueError(f"Expected children to be an integer of at least 1, got {children!r}.")
        if noise not in ("fresh", "same"):
            raise ValueError(f"Expected noise to be 'fresh' or 'same', got {noise!r}.")
        self.plan = Plan(tuple(sorted(set(epochs))), children, noise, seed)
        self.make_trainer = make_trainer
        self._trunk: Trunk | None = None
        self._saving = False
        self._earlier: Path | None = None

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
        self._fitted().run_children()
        return self.family

    @property
    def state_key(self) -> str:
        """One per configuration."""
        return self._generate_state_key(**vars(self.plan))

    def state_dict(self) -> dict[str, Any]:
        """Where the family is, for a run resumed from this checkpoint."""
        return {"version": 1, "family": str(self._trunk.family.folder)} if self._trunk else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where the family of the earlier run is."""
        self._earlier = Path(state_dict["family"]) if "family" in state_dict else None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Copy what children are built from, before anything is trained."""
        if stage == "fit":
            place = [c for c in trainer.callbacks if isinstance(c, CheckpointBranching)].index(self)
            self._trunk = Trunk(trainer, pl_module, self, place)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the family."""
        trunk = self._fitted()
        with trunk.guarded("start the family"):
            trunk.begin(self._earlier)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep weights and take a snapshot, where either is due."""
        trunk = self._fitted()
        with trunk.guarded("keep weights"):
            trunk.begin_epoch(self._own_save)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Digest the first batches of each epoch."""
        trunk = self._fitted()
        with trunk.guarded("digest a batch"):
            trunk.see_batch(batch, batch_idx)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the last weights."""
        trunk = self._fitted()
        with trunk.guarded("keep the last weights"):
            trunk.end_training()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Train the children and measure the family."""
        trunk = self._fitted()
        trunk.close()
        if trunk.family.trunk.status == "running":  # and not a fit without a single batch
            trunk.complete()
            try:
                trunk.run_children()
            except KeyboardInterrupt:
                let_teardown_restore_signals(trainer)
                raise

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Note that the trunk ended here."""
        if self._trunk is not None:
            self._trunk.close()
            self._trunk.break_off(exception)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Correct the loop state of our own snapshots; other checkpoints are none of our business."""
        if self._saving:
            rewind_to_epoch_start(checkpoint)

    @contextmanager
    def _own_save(self) -> Iterator[None]:
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def _fitted(self) -> Trunk:
        if self._trunk is None:
            raise RuntimeError("There is no family yet: call trainer.fit with this CheckpointBranching in callbacks.")
        return self._trunk

    def __getstate__(self) -> dict[str, Any]:
        """Without the live run, whose trainer neither pickles nor copies."""
        return {**self.__dict__, "_trunk": None}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self.plan).items())
        return f"CheckpointBranching({arguments})" + (f"\n{self.family!r}" if self._trunk else "")
