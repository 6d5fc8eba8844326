"""The one callback of ours in a child: it starts the child as the fork says, keeps its weights and ends it."""

import copy
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback

from lmc_lightning.branching import internals
from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.nodes import Fork, Node, Position
from lmc_lightning.branching.family.plan import Intervention
from lmc_lightning.branching.forks.replay import Replay, restore_again, restore_optimizers
from lmc_lightning.branching.traces.averaging import LiveWeights
from lmc_lightning.branching.traces.curves import Curves
from lmc_lightning.branching.traces.evidence import DIGESTED_BATCHES, Evidence, chained
from lmc_lightning.core.structure import tensors_in


class SharedNoiseError(RuntimeError):
    """A child with fresh noise was given the batches of the trunk."""


class Child(Callback):
    """Replays the fork at its first epoch, keeps weights where the trunk kept some, stops where the trunk stopped.

    Args:
        node: the child's entry in the family.
        family: that it belongs to.
        fork: that it starts from.
        replay: the fork's noise.
        advance: called after each batch.
        end: where it ends; None: where its Trainer ends it.
        intervention: applied at the fork.
    """

    def __init__(
        self,
        node: Node,
        family: Family,
        fork: Fork,
        replay: Replay,
        advance: Callable[[], object],
        end: Position | None = None,
        intervention: Intervention | None = None,
    ) -> None:
        self._node, self._family, self._fork, self._replay = node, family, fork, replay
        self._advance, self._end, self._intervention = advance, end, intervention
        self._processes = family.processes
        self._evidence = Evidence(node, family.processes)
        self.curves = Curves(family.curves_path(node) if family.writes else None, fork.position.step)
        self._checkpoint: dict[str, Any] | None = None
        self._late: dict[str, Any] | None = None
        self._epoch_started = self._forked = self._trains = False
        self._first_batches = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Repeat the trunk's random state of this moment, from which modules may split their data."""
        self._live = LiveWeights(trainer.callbacks)
        self._replay.set_up(trainer, pl_module, lambda: self._evidence.watch(trainer))
        internals.wrap_advance(trainer, lambda: self._before_batch(trainer, pl_module))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Hold on to the checkpoint until the fork, as it is before anything shares its tensors and lists."""
        kept = {key: checkpoint[key] for key in ("optimizer_states", "lr_schedulers", "callbacks")}
        self._checkpoint = {**checkpoint, **copy.deepcopy(kept)}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the first epoch as the trunk did; keep weights."""
        with self._processes.agreed():
            self._begin_epoch(trainer, pl_module)

    def _begin_epoch(self, trainer: Any, pl_module: Any) -> None:
        if not self._epoch_started:
            self._epoch_started = True
            if not (self._replay.is_mid_epoch or restore_again(trainer, pl_module, self._checkpoint or {})):
                self._late = self._checkpoint
            self._replay.begin_epoch(trainer, pl_module)
            if not self._replay.is_mid_epoch:
                self._leave_trunk(trainer, pl_module)
        if self._forked:
            self._keep(trainer, pl_module)

    def _before_batch(self, trainer: Any, pl_module: Any) -> None:
        if self._late is not None:
            restore_optimizers(trainer, self._late)
            self._late = None
        if self._forked:
            return
        with self._processes.agreed():
            self._replay.go_between(trainer, pl_module, self._checkpoint or {})
            self._leave_trunk(trainer, pl_module)

    def _leave_trunk(self, trainer: Any, pl_module: Any) -> None:
        self._forked, self._checkpoint = True, None
        if trainer.global_step != self._fork.position.step:
            raise RuntimeError(f"Expected {self._fork.position.step} steps at the fork, got {trainer.global_step}.")
        if self._intervention is not None:
            seed = (self._node.intervention or {}).get("seed", 0)
            self._node.effect = self._intervention.apply(trainer, pl_module, seed)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """See to it that the child trains itself."""
        if not self._trains and all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                "The child's step computes no gradient of the child's parameters: its module holds a function that "
                "refers to the trunk's. Make it a method."
            )
        self._trains = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Compare the first batches with the trunk's, at the last moment before they are trained on."""
        self._evidence.see_batch(trainer.current_epoch, batch, batch_idx)
        if self._first_batches < DIGESTED_BATCHES:
            self._first_batches += 1
            if tensors_in(batch):
                self._node.first_batches = chained(self._node.first_batches or "", batch, self._processes)
            if self._first_batches == DIGESTED_BATCHES:
                self._check_noise(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop in the middle of an epoch if the trunk did, unless the child's own ``max_steps`` does it."""
        self._advance()
        self.curves.see_batch(trainer, outputs)
        if self._arrived(trainer) and not trainer.is_last_batch and trainer.global_step != trainer.max_steps:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the metrics."""
        self.curves.see_validation(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop at the end of the trunk's last epoch."""
        with self._processes.agreed():
            self._evidence.end_epoch(trainer)
        self._live.end_epoch(pl_module)
        self.curves.write()
        if self._arrived(trainer):
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the last weights."""
        if self._first_batches < DIGESTED_BATCHES:
            self._check_noise(trainer)
        self._keep(trainer, pl_module, always=self._end is None)
        self._node.end_step = trainer.global_step
        if self._end is not None and not self._arrived(trainer):
            self._node.reason = f"ended after {trainer.global_step} steps, the trunk after {self._end.step}"

    def close(self) -> None:
        """Leave the loaders as they were, however the child has ended."""
        self.curves.write()
        self._evidence.close()
        self._replay.close()

    def _arrived(self, trainer: Any) -> bool:
        return self._end is not None and bool(trainer.fit_loop.total_batch_idx + 1 >= self._end.batches)

    def _keep(self, trainer: Any, pl_module: Any, *, always: bool = False) -> None:
        if always or self._family.keeps(trainer.current_epoch):
            live = self._live.between_epochs(pl_module)
            self._family.keep(self._node, trainer.current_epoch, trainer.global_step, live)

    def _check_noise(self, trainer: Any) -> None:
        mine, trunks = self._node.first_batches, self._fork.first_batches
        if self._node.is_own("order", "augmentation") and mine is not None and mine == trunks:
            raise SharedNoiseError(
                f"Under noise_seed={self._node.noise_seed} the first batches of epoch {trainer.current_epoch} are the "
                "trunk's: the loader's order does not depend on any seed that can be set here. Shuffle with "
                "`shuffle=True` or a `torch.Generator`, or give the datamodule, data set or sampler an integer "
                "attribute `noise_seed` that its order follows from."
            )
