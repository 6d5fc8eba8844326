"""The noise of a fork, played back in a child at the moments where the trunk had it."""

import copy
from typing import Any

import torch

from lmc_lightning.branching import internals
from lmc_lightning.branching.family.nodes import Node
from lmc_lightning.branching.forks.noise import noise_roots, seeds_of_process, set_noise_state
from lmc_lightning.branching.forks.snapshot import NOISE_VERSION
from lmc_lightning.branching.forks.streams import check_separable, renew, renew_workers, restore_workers
from lmc_lightning.core.glassbox import rng_state, set_rng_state
from lmc_lightning.core.structure import digest


class Replay:
    """Brings a child to where the trunk was, with its own noise from there on.

    What comes before the fork (splits of the data, construction of loaders, the start of the epoch) is the trunk's in
    any case. A child that forks between two batches starts the epoch as the trunk did and fetches the batches that the
    trunk had trained on, in its own order if it has one.

    Args:
        noise: of the fork, as it was written beside the checkpoint.
        node: of the child.
        rank: of this process among those that train together.

    Raises:
        ValueError: the noise is of another version.
    """

    def __init__(self, noise: dict[str, Any], node: Node, rank: int) -> None:
        if noise["version"] != NOISE_VERSION:
            raise ValueError(f"The snapshot has version {noise['version']}, this package reads {NOISE_VERSION}.")
        self._noise, self._node = noise, node
        self._loaders_made = False
        self._seed_of = seeds_of_process(rank, noise["apart"])
        self._renewed: list[Any] = []

    @property
    def is_mid_epoch(self) -> bool:
        """Whether the fork is between two batches of an epoch."""
        return self._noise["between"] is not None

    def set_up(self, trainer: Any, pl_module: Any, ready: Any) -> None:
        """Repeat the trunk's ``setup``, and see to it that the loaders are made under its noise.

        Args:
            trainer: the child's, in ``setup``.
            pl_module: its module.
            ready: called when loaders are made, before they have an iterator.
        """
        set_rng_state(self._noise["setup"])

        def make(setup_data: Any) -> None:
            if not self._loaders_made and self._noise["loaders"] is not None:
                set_noise_state(self._noise["loaders"], noise_roots(trainer, pl_module))
            setup_data()

        def loaders_are_ready() -> None:
            if not self._loaders_made:
                internals.set_loader_states(trainer, self._noise["loader_states"])
            self._loaders_made = True
            check_separable(trainer, self._node.noise)
            restore_workers(self._renewed)
            self._renewed = renew_workers(self._node, trainer)
            ready()

        internals.wrap_setup_data(trainer, make, loaders_are_ready)

    def begin_epoch(self, trainer: Any, pl_module: Any) -> None:
        """Start the child's first epoch as the trunk started it, called in ``on_train_epoch_start``."""
        epoch, roots = self._noise["epoch"], noise_roots(trainer, pl_module)
        internals.continue_as_if_never_interrupted(trainer, first_iterator=epoch["first_iterator"])
        internals.set_reload_epochs(trainer, epoch["reload_epochs"])
        internals.metrics(trainer).update(epoch["metrics"])
        set_noise_state(epoch["noise"], roots)
        self._restore_buffers(pl_module)
        if not epoch["first_iterator"]:
            internals.set_loader_states(trainer, epoch["loader_states"])
        if not self.is_mid_epoch:
            renew(self._node, trainer, roots, self._seed_of)
            if self._node.is_own("order"):
                # Also persistent workers, whose own random states are those of the trunk.
                self._renew_iterator(trainer, now=epoch["first_iterator"])

    def go_between(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on to a fork between two batches, called before the first batch of the epoch is fetched."""
        between, roots = self._noise["between"], noise_roots(trainer, pl_module)
        restore_again(trainer, pl_module, checkpoint)
        self._restore_buffers(pl_module)
        fetched = between["progress"]["fetched"]
        if self._node.is_own("order"):
            set_noise_state(between["noise"], roots)
            renew(self._node, trainer, roots, self._seed_of)
            self._renew_iterator(trainer, now=True, fetched=fetched)
        else:
            renew(
                self._node, trainer, roots, self._seed_of
            )  # seeds of an augmentation, which are read when the first batch is
            for state in between["fetches"]:
                set_rng_state(state)
                internals.drop_batches(trainer, 1 + internals.num_fetched(trainer))
            internals.drop_batches(trainer, fetched)
            set_noise_state(between["noise"], roots)
            renew(self._node, trainer, roots, self._seed_of)
        internals.set_progress(trainer, between["progress"])
        internals.metrics(trainer).clear()
        internals.metrics(trainer).update(between["metrics"])
        for parameter, gradient in zip(pl_module.parameters(), between["gradients"] or [], strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def _restore_buffers(self, pl_module: Any) -> None:
        with torch.no_grad():
            for buffer, saved in zip(pl_module.buffers(), self._noise["buffers"] or (), strict=False):
                buffer.copy_(saved)

    def _renew_iterator(self, trainer: Any, *, now: bool, fetched: int = 0) -> None:
        state = rng_state()
        internals.renew_iterator(trainer, now=now)
        internals.drop_batches(trainer, fetched)
        if not self._node.is_own("dropout"):  # an iterator may draw its base seed from dropout's stream
            set_rng_state(state)

    def close(self) -> None:
        """Leave the loaders as they were."""
        restore_workers(self._renewed)
        self._renewed = []


def restore_again(trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> bool:
    """Load once more what hooks of the start may have moved on, which the trunk's had done before the fork.

    Returns what :func:`restore_optimizers` does.
    """
    match_weights(pl_module, checkpoint)
    complete = restore_optimizers(trainer, checkpoint)
    for callback in trainer.callbacks:
        state = checkpoint["callbacks"].get(callback.state_key)
        if state:
            callback.load_state_dict(copy.deepcopy(state))
    return complete


def restore_optimizers(trainer: Any, checkpoint: dict[str, Any]) -> bool:
    """Load the states of optimizers and schedulers, and say whether the schedulers are there.

    ``StochasticWeightAveraging`` takes the schedulers away when it resumes, and makes one at the start of the epoch,
    which changes the rates.
    """
    trainer.strategy.load_optimizer_state_dict({"optimizer_states": copy.deepcopy(checkpoint["optimizer_states"])})
    there = len(trainer.lr_scheduler_configs) == len(checkpoint["lr_schedulers"])
    if there:
        for config, state in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
    return there


def match_weights(pl_module: Any, checkpoint: dict[str, Any]) -> None:
    """Give a module the very weights that were trained.

    Lightning loads checkpoints into float32 before it makes the module float64, and a checkpoint saved beside an
    average of the weights has the average in their place.
    """
    state = checkpoint.get("current_model_state", checkpoint["state_dict"])
    if digest(list(pl_module.state_dict().values())) != digest(list(state.values())):
        pl_module.load_state_dict(state, strict=False)
    mine = {id(parameter) for parameter in pl_module.parameters()}
    optimized = [p for o in pl_module.trainer.optimizers for group in o.param_groups for p in group["params"]]
    if any(id(parameter) not in mine for parameter in optimized):
        raise RuntimeError("The optimizer holds parameters of the trunk: make it anew in `configure_optimizers`.")
