"""Epoch forks: a checkpoint at the start of an epoch, and beside it the noise that checkpoints leave out."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from lmc_lightning.branching import internals
from lmc_lightning.branching.lineage import Fork, Position
from lmc_lightning.branching.noise import NoiseState, noise_roots, noise_state, renew_noise, set_noise_state
from lmc_lightning.core.files import write_atomic
from lmc_lightning.core.glassbox import RngState, preserved_rng, rng_state

NOISE_VERSION = 1


class NoiseWatch:
    """Notes the noise of a run at the two moments before its first epoch that a fork has to repeat.

    ``setup``, where modules split their data, and just before the training loaders and their first iterator are made,
    which with worker processes fixes the order of the whole epoch. Reads only; nothing of the run changes.
    """

    def __init__(self, trainer: Any, pl_module: Any) -> None:
        self.at_setup: RngState = rng_state()
        self.before_loaders: NoiseState | None = None
        self._trainer, self._module = trainer, pl_module
        internals.wrap_setup_data(trainer, self._watch)

    def _watch(self, setup_data: Callable[[], None]) -> None:
        loop = self._trainer.fit_loop
        before, state = internals.combined_loader(loop), noise_state(noise_roots(self._trainer, self._module))
        setup_data()
        if internals.combined_loader(loop) is not before:
            self.before_loaders = state

    def close(self) -> None:
        """Take the watch off the fit loop."""
        internals.unwrap_setup_data(self._trainer)


def position(trainer: Any) -> Position:
    """Where in training a trainer is, between two epochs."""
    return Position(trainer.current_epoch, trainer.global_step, trainer.fit_loop.total_batch_idx + 1)


def take_fork(
    trainer: Any, pl_module: Any, watch: NoiseWatch, folder: Path, saving: Callable[[], AbstractContextManager[None]]
) -> Fork:
    """A snapshot of the run, called in ``on_train_epoch_start``; the run itself is not changed by it.

    Args:
        trainer: of the trunk.
        pl_module: its module.
        watch: has been on since ``setup``.
        folder: of the family.
        saving: a context in which the caller's ``on_save_checkpoint`` calls :func:`rewind_to_epoch_start`.

    Raises:
        OSError: Lightning reported success but left no file (a failing last move is swallowed by its writer).
    """
    here = position(trainer)
    stem = f"snapshots/epoch_{here.epoch:04d}"
    fork = Fork(here, f"{stem}.ckpt", f"{stem}.noise.pt")
    noise = {
        "version": NOISE_VERSION,
        "setup": watch.at_setup,
        "loaders": watch.before_loaders,
        "epoch": noise_state(noise_roots(trainer, pl_module)),
        "first_iterator": internals.runs_on_first_iterator(trainer),
        "reload_epochs": internals.reload_epochs(trainer),
        # A plateau scheduler may step on a metric of an earlier epoch.
        "metrics": {name: v.detach().clone() for name, v in internals.metrics(trainer).items()},
    }
    path = folder / fork.checkpoint
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with preserved_rng(), saving():
        trainer.save_checkpoint(path, weights_only=False)
    if not path.is_file() or path.stat().st_size == 0:
        raise OSError(f"The snapshot {path} was not written. Is there space left, and may this user write there?")
    write_atomic(folder / fork.noise, lambda file: torch.save(noise, file))
    return fork


def rewind_to_epoch_start(checkpoint: dict[str, Any]) -> None:
    """Make the loop state of a checkpoint saved in ``on_train_epoch_start`` that of an epoch not yet started.

    As Lightning saves it, the epoch counts as ready and the counters of the finished epoch are still in place, so that
    the resumed epoch would skip most of its batches.
    """
    loops = checkpoint["loops"]["fit_loop"]
    for counters in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
        counters["ready"] = counters["started"]
    for name in ("epoch_loop.batch_progress", "epoch_loop.scheduler_progress"):
        loops[name]["current"] = dict.fromkeys(loops[name]["current"], 0)
    loops["epoch_loop.batch_progress"]["is_last_batch"] = False


class Replay:
    """The noise of a fork, played back in a child at the moments where the trunk had it.

    ``noise_seed=None`` repeats the trunk's noise; a seed makes all noise from the branch point on a function of it,
    while what comes before (splits of the data, construction of loaders) stays the trunk's.
    """

    def __init__(self, noise_file: Path, noise_seed: int | None) -> None:
        self._noise = torch.load(noise_file, map_location="cpu", weights_only=True)
        self._noise_seed = noise_seed
        self._loaders_made = False

    @property
    def at_setup(self) -> RngState:
        """The global random state of the trunk in ``setup``."""
        state: RngState = self._noise["setup"]
        return state

    def watch_loaders(self, trainer: Any, pl_module: Any) -> None:
        """See to it that the child makes its loaders, and their first iterator, under the trunk's noise."""

        def make(setup_data: Callable[[], None]) -> None:
            if not self._loaders_made and self._noise["loaders"] is not None:
                set_noise_state(self._noise["loaders"], noise_roots(trainer, pl_module))
            self._loaders_made = True
            setup_data()

        internals.wrap_setup_data(trainer, make)

    def begin_epoch(self, trainer: Any, pl_module: Any) -> None:
        """Start the child's first epoch as the trunk started it, called in ``on_train_epoch_start``."""
        roots = noise_roots(trainer, pl_module)
        first_iterator = self._noise["first_iterator"]
        internals.continue_as_if_never_interrupted(trainer, first_iterator=first_iterator)
        internals.set_reload_epochs(trainer, self._noise["reload_epochs"])
        internals.metrics(trainer).update(self._noise["metrics"])
        set_noise_state(self._noise["epoch"], roots)
        if self._noise_seed is not None:
            renew_noise(self._noise_seed, roots)
            # Also persistent workers, whose own random states are those of the trunk.
            internals.renew_iterator(trainer, now=first_iterator)
