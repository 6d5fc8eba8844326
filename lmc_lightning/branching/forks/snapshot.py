"""Forks: a checkpoint at the start of an epoch or between two batches, and beside it what checkpoints leave out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lmc_lightning.branching import internals
from lmc_lightning.branching.family.nodes import Fork, Position
from lmc_lightning.branching.family.storage import sha256_of
from lmc_lightning.branching.forks.noise import NoiseState, noise_roots, noise_state, stream_digests
from lmc_lightning.core.collective import Collective
from lmc_lightning.core.files import write_atomic
from lmc_lightning.core.glassbox import RngState, preserved_rng, rng_state

NOISE_VERSION = 3


class NoiseWatch:
    """Notes the noise of a run at the moments that a fork has to repeat.

    ``setup``, where modules split their data; just before the training loaders and their first iterator are made, which
    with worker processes fixes the order of the whole epoch; and the start of the present epoch. Reads only; nothing of
    the run changes.

    Args:
        trainer: in ``setup``.
        pl_module: its module.
        ready: called when loaders are made, before they have an iterator.
        between: called between two batches.
    """

    def __init__(
        self, trainer: Any, pl_module: Any, ready: Callable[[], object], between: Callable[[], object]
    ) -> None:
        self.at_setup: RngState = rng_state()
        self.before_loaders: NoiseState | None = None
        self.loader_states: list[Any] = []
        self.epoch: dict[str, Any] | None = None
        self._fetches: list[RngState] = []
        self._trainer, self._module = trainer, pl_module
        self._ready = ready
        internals.wrap_setup_data(trainer, self._watch, self._loaders_are_ready)
        internals.wrap_advance(trainer, between)

    def _watch(self, setup_data: Callable[[], None]) -> None:
        loop = self._trainer.fit_loop
        before, state = internals.combined_loader(loop), noise_state(noise_roots(self._trainer, self._module))
        setup_data()
        if internals.combined_loader(loop) is not before:
            self.before_loaders = state

    def _loaders_are_ready(self) -> None:
        self.loader_states = internals.loader_states(self._trainer)
        self._ready()

    def begin_epoch(self) -> None:
        """Note the start of an epoch, in ``on_train_epoch_start``."""
        self._fetches = []
        self.epoch = {
            "noise": noise_state(noise_roots(self._trainer, self._module)),
            "first_iterator": internals.runs_on_first_iterator(self._trainer),
            "reload_epochs": internals.reload_epochs(self._trainer),
            "loader_states": internals.loader_states(self._trainer),
            # A plateau scheduler may step on a metric of an earlier epoch.
            "metrics": _metrics(self._trainer),
        }

    def before_fetch(self) -> None:
        """Note the random state of this moment, from which a loader that ends before others starts again."""
        if len(internals.loaders(self._trainer.fit_loop)) > 1:
            self._fetches.append(rng_state())

    def between_batches(self) -> dict[str, Any]:
        """What makes a moment between two batches differ from the start of its epoch."""
        manual = not self._module.automatic_optimization  # which may accumulate gradients as it likes
        return {
            "noise": noise_state(noise_roots(self._trainer, self._module)),
            "progress": internals.progress(self._trainer),
            "fetches": self._fetches,
            "metrics": _metrics(self._trainer),
            "gradients": [None if p.grad is None else p.grad.detach().clone() for p in self._module.parameters()]
            if manual
            else None,
        }

    def close(self) -> None:
        """Take the watch off the fit loop."""
        internals.unwrap_setup_data(self._trainer)
        internals.unwrap_advance(self._trainer)


def _metrics(trainer: Any) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in internals.metrics(trainer).items()}


def position(trainer: Any) -> Position:
    """Where in training a trainer is, between two batches or epochs."""
    return Position(trainer.current_epoch, trainer.global_step, trainer.fit_loop.total_batch_idx + 1)


def take_fork(
    trainer: Any,
    watch: NoiseWatch,
    fork: Fork,
    family_folder: Path,
    processes: Collective,
    *,
    mid_epoch: bool,
) -> None:
    """Write a snapshot of the run; the run itself is not changed by it.

    The caller's ``on_save_checkpoint`` has to call :func:`rewind_to_epoch_start`.

    Args:
        trainer: of the trunk, in ``on_train_epoch_start`` or between two batches.
        watch: has been on since ``setup``, and has seen the epoch start.
        fork: whose files are written; gets their digests.
        family_folder: which the files are relative to.
        processes: that train together, all of which call this; the first one writes the checkpoint.
        mid_epoch: whether it is between two batches.

    Raises:
        RuntimeError: the run was resumed within this epoch.
        OSError: Lightning reported success but left no file (a failing last move is swallowed by its writer).
    """
    if watch.epoch is None:
        raise RuntimeError("training was resumed within this epoch, whose order cannot be known")
    between = watch.between_batches() if mid_epoch else None
    digests = stream_digests((between or watch.epoch)["noise"])
    firsts = processes.first(lambda: digests)
    noise = {
        "version": NOISE_VERSION,
        "setup": watch.at_setup,
        "loaders": watch.before_loaders,
        "loader_states": watch.loader_states,
        "epoch": watch.epoch,
        "between": between,
        "apart": [path for path in digests if digests[path] != firsts.get(path)],
        # The checkpoint has those of the first process, which others may not share until the next forward pass.
        "buffers": None if trainer.is_global_zero else [b.detach().clone() for b in trainer.lightning_module.buffers()],
    }
    path, noise_path = family_folder / fork.checkpoint, family_folder / fork.noise(trainer.global_rank)
    with processes.agreed():
        write_atomic(noise_path, lambda file: torch.save(noise, file))
        if trainer.is_global_zero:
            path.unlink(missing_ok=True)
        with preserved_rng(), internals.without_barriers(trainer):
            trainer.save_checkpoint(path, weights_only=False)
    if trainer.is_global_zero and (not path.is_file() or path.stat().st_size == 0):
        raise OSError(f"The snapshot {path} was not written. Is there space left, and may this user write there?")
    names = [path.name, *(f"noise_{rank}.pt" for rank in range(trainer.world_size))]
    fork.digests = processes.first(lambda: {name: sha256_of(path.parent / name) for name in names})


def rewind_to_epoch_start(checkpoint: dict[str, Any]) -> None:
    """Make the loop state of one of our checkpoints that of an epoch not yet started.

    As Lightning saves it, the epoch counts as ready and the counters of the finished epoch are still in place, so that
    the resumed epoch would skip most of its batches. One saved between two batches starts its epoch again too, and goes
    over the batches that were trained on: so hooks at the start of the epoch are called, as in the trunk, and none of
    the ways in which a resumed epoch differs from one that was never interrupted comes into play.
    """
    loops = checkpoint["loops"]["fit_loop"]
    for counters in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
        counters["ready"] = counters["started"] = counters["processed"]
    for name in ("epoch_loop.batch_progress", "epoch_loop.scheduler_progress"):
        loops[name]["current"] = dict.fromkeys(loops[name]["current"], 0)
    loops["epoch_loop.batch_progress"]["is_last_batch"] = False
    loops["state_dict"].pop("combined_loader", None)  # beside the checkpoint, as of the start of the epoch
