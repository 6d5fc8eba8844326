"""Which part of a run's noise comes from where, and giving a child some parts of its own and others of the trunk's.

Order, augmentation and dropout can be told apart only where they are drawn from streams of their own: from the seeds of
a datamodule that has an ``order_seed`` and an ``augmentation_seed``, from the generator or seed of a loader's sampler,
in worker processes, on a GPU. Whatever draws from the global generators of the main process is one stream.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import torch

from lmc_lightning.branching import internals
from lmc_lightning.branching.family.nodes import Choice, Node, Stream
from lmc_lightning.branching.forks.noise import SeedOf, reachable, renew_noise, seed_generator
from lmc_lightning.core.glassbox import seed_everything
from lmc_lightning.core.random_vectors import derive_seed
from lmc_lightning.core.shared_state import GENERATORS

GLOBAL = "the global generators"
_SEEDS = "the datamodule's seeds"
_SAMPLER = "the samplers' own generators"
_WORKERS = "worker processes"
_CUDA = "the GPU's generator"


def is_seeded(datamodule: Any) -> bool:
    """Whether order and augmentation of a datamodule follow from seeds of its own, without any generator."""
    return hasattr(type(datamodule), "order_seed") and hasattr(type(datamodule), "augmentation_seed")


def sources_of(trainer: Any, choices: Mapping[Stream, Choice]) -> dict[Stream, str]:
    """Where each stream comes from in a run whose loaders are made."""
    loaders = internals.loaders(trainer.fit_loop)
    dropout = _CUDA if trainer.strategy.root_device.type == "cuda" else GLOBAL
    if is_seeded(trainer.datamodule):
        return {"order": f"{_SEEDS} (order)", "augmentation": f"{_SEEDS} (augmentation)", "dropout": dropout}
    order = _SAMPLER if loaders and all(map(_has_own_order, loaders)) else GLOBAL
    augmentation = GLOBAL
    if loaders and all(getattr(loader, "num_workers", 0) for loader in loaders):
        # Seeds of workers are drawn in the main process, and can be changed, but not be kept, apart from it.
        own_base = all(getattr(loader, "generator", None) is not None for loader in loaders)
        augmentation = _WORKERS if choices.get("augmentation") == "fresh" else _SAMPLER if own_base else GLOBAL
    return {"order": order, "augmentation": augmentation, "dropout": dropout}


def _has_own_order(loader: Any) -> bool:
    sampler = getattr(loader, "sampler", None)
    seeded = hasattr(type(sampler), "set_epoch") and isinstance(getattr(sampler, "seed", None), int)
    return seeded or getattr(sampler, "generator", None) is not None


def check_separable(trainer: Any, choices: Mapping[Stream, Choice]) -> None:
    """See to it that what is to differ from the trunk is drawn apart from what is to be the same.

    Raises:
        ValueError: two streams are one; the message names them.
    """
    sources = sources_of(trainer, choices)
    for one, other in combinations(choices, 2):
        if choices[one] == choices[other]:
            continue
        by_position = (one, other) == ("order", "augmentation") and choices[one] == "fresh"
        if sources[one] == sources[other]:
            why = f"both are drawn from {sources[one]}"
        elif by_position and not is_seeded(trainer.datamodule):
            why = "the draws of the augmentation are handed out in the order of the examples"
        else:
            continue
        raise ValueError(
            f"Expected {one} and {other} to have streams of their own to be '{choices[one]}' and '{choices[other]}', "
            f"but {why}. Make both the same or both fresh, or separate them: a datamodule of this package has seeds "
            "for order and augmentation; otherwise shuffle with a generator of the loader's own, augment in workers."
        )


def renew(node: Node, trainer: Any, roots: Mapping[str, Any], seed_of: SeedOf) -> None:
    """Give a child its own noise where it is to have some; everything else is left as it is."""
    if node.noise_seed is None:
        return
    if len(node.seeds) == 0:
        renew_noise(node.noise_seed, roots, seed_of)
        return
    sources = sources_of(trainer, node.noise)
    if any(sources[stream] == GLOBAL for stream in node.seeds):
        _seed_main_process(seed_of(derive_seed(node.noise_seed, "global"), "global"))
    if "dropout" in node.seeds and sources["dropout"] == _CUDA:
        torch.cuda.manual_seed_all(seed_of(node.seeds["dropout"], "global"))
    for stream in ("order", "augmentation"):
        if stream in node.seeds and is_seeded(trainer.datamodule):
            setattr(trainer.datamodule, f"{stream}_seed", node.seeds[stream])
    _renew_generators(node, internals.loaders(trainer.fit_loop), roots, seed_of)


def _seed_main_process(seed: int) -> None:
    """As ``seed_everything``, but for the GPUs."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


def _renew_generators(node: Node, loaders: list[Any], roots: Mapping[str, Any], seed_of: SeedOf) -> None:
    ordering = {id(generator) for loader in loaders for generator in _order_generators(loader)}
    for path, value in reachable({name: root for name, root in roots.items() if not name.startswith("val")}):
        if isinstance(value, GENERATORS):
            is_modules = path.split(".")[0].split("[")[0] == "module"
            stream: Stream = "order" if id(value) in ordering else "dropout" if is_modules else "augmentation"
            if stream in node.seeds:
                seed_generator(value, seed_of(derive_seed(node.seeds[stream], "generator", path), path))
    samplers: list[Any] = [getattr(loader, "sampler", None) for loader in loaders]
    for sampler in samplers:
        if "order" in node.seeds and hasattr(type(sampler), "set_epoch") and hasattr(sampler, "seed"):
            sampler.seed = derive_seed(node.seeds["order"], "sampler")


def _order_generators(loader: Any) -> Iterator[Any]:
    for owner in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        yield getattr(owner, "generator", None)


class FreshWorkers:
    """In place of ``worker_init_fn``: seeds of a worker's own, as many as there were, then what was there before."""

    def __init__(self, seed: int, before: Callable[[int], object] | None) -> None:
        self.seed, self.before = seed, before

    def __call__(self, worker_id: int) -> None:
        """Seed this worker."""
        seed_everything(derive_seed(self.seed, "worker", torch.initial_seed()))
        if self.before is not None:
            self.before(worker_id)


def renew_workers(node: Node, trainer: Any) -> list[Any]:
    """Seed the workers of a child with augmentation of its own alone; returns the loaders that this has changed."""
    if not node.seeds or sources_of(trainer, node.noise)["augmentation"] != _WORKERS:
        return []
    loaders = internals.loaders(trainer.fit_loop)
    for loader in loaders:
        loader.worker_init_fn = FreshWorkers(node.seeds["augmentation"], loader.worker_init_fn)
    return loaders


def restore_workers(loaders: list[Any]) -> None:
    """Undo :func:`renew_workers`: the trunk's loaders are shared."""
    for loader in loaders:
        if isinstance(loader.worker_init_fn, FreshWorkers):
            loader.worker_init_fn = loader.worker_init_fn.before
