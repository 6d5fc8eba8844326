"""The one callback of ours in a child: it starts the child as the fork says, keeps its weights and ends it."""

import hashlib
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from lmc_lightning.branching.lineage import Family, Node
from lmc_lightning.branching.snapshot import Replay
from lmc_lightning.core.glassbox import set_rng_state
from lmc_lightning.core.structure import digest, tensors_in

DIGESTED_BATCHES = 2


class SharedNoiseError(RuntimeError):
    """A child with fresh noise was given the batches of the trunk."""


def add_batch(node: Node, epoch: int, batch: Any, batch_idx: int) -> None:
    """Let a batch enter the digest of its epoch: the first two do."""
    if batch_idx < DIGESTED_BATCHES and tensors_in(batch):
        earlier = node.batch_digests.get(epoch, "") if batch_idx else ""
        node.batch_digests[epoch] = hashlib.sha256(f"{earlier}{digest(batch)}".encode()).hexdigest()


def _tensors(module: Any) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


class Child(Callback):
    """Replays the fork at its first epoch, keeps weights where the trunk kept some, stops where the trunk stopped.

    Args:
        node: the child's entry in the family.
        family: whose trunk has ended.
        replay: the fork's noise.
        advance: called after each batch.
    """

    def __init__(self, node: Node, family: Family, replay: Replay, advance: Callable[[], object]) -> None:
        self._node, self._family, self._replay, self._advance = node, family, replay, advance
        self._started = self._trains = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Repeat the trunk's random state of this moment, from which modules may split their data."""
        set_rng_state(self._replay.at_setup)
        self._replay.watch_loaders(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the first epoch as the trunk did; keep weights."""
        if not self._started:
            self._started = True
            self._match_trunk(trainer, pl_module)
            self._replay.begin_epoch(trainer, pl_module)
        self._keep(trainer, pl_module)

    def _match_trunk(self, trainer: Any, pl_module: Any) -> None:
        trunk, epoch = self._family.trunk, trainer.current_epoch
        if digest(_tensors(pl_module)) != trunk.state_digests[epoch]:
            # Lightning loads checkpoints into float32 before it makes the module float64.
            pl_module.load_state_dict(self._family.state(trunk, epoch), strict=False)
        mine = {id(parameter) for parameter in pl_module.parameters()}
        optimized = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        if any(id(parameter) not in mine for parameter in optimized):
            raise RuntimeError("The optimizer holds parameters of the trunk: make it anew in `configure_optimizers`.")

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
        add_batch(self._node, trainer.current_epoch, batch, batch_idx)
        if batch_idx == DIGESTED_BATCHES - 1:
            self._check_noise(trainer.current_epoch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop in the middle of an epoch if the trunk did, unless the child's own ``max_steps`` does it."""
        self._advance()
        if self._arrived(trainer) and not trainer.is_last_batch and trainer.global_step != trainer.max_steps:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop at the end of the trunk's last epoch."""
        self._check_noise(trainer.current_epoch)
        if self._arrived(trainer):
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the last weights."""
        self._keep(trainer, pl_module)
        self._node.end_step = trainer.global_step
        if not self._arrived(trainer):
            self._node.reason = f"ended after {trainer.global_step} steps, the trunk after {self._family.end.step}"

    def _arrived(self, trainer: Any) -> bool:
        return bool(trainer.fit_loop.total_batch_idx + 1 >= self._family.end.batches)

    def _keep(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch in self._family.trunk.epochs:
            self._family.keep(self._node, trainer.current_epoch, trainer.global_step, pl_module)

    def _check_noise(self, epoch: int) -> None:
        mine, trunks = (node.batch_digests.get(epoch) for node in (self._node, self._family.trunk))
        if self._node.noise_seed is not None and epoch == self._node.k1 and mine is not None and mine == trunks:
            raise SharedNoiseError(
                f"Under noise_seed={self._node.noise_seed} the first batches of epoch {epoch} are those of the trunk: "
                "the loader's order does not depend on any seed that can be set here. Shuffle with `shuffle=True` or a "
                "`torch.Generator`, or give the datamodule, data set or sampler an integer attribute `noise_seed` that "
                "its order follows from."
            )
