"""The noise of a run: every random state that decides its order, augmentation and dropout, and how to set it.

Beside the global generators of python, numpy and torch a run may draw from generators owned by its loaders, samplers,
data sets, transforms or the module itself, and from seeds that say what the noise of an epoch is. They are found by a
walk over attributes and named by their paths, so that a child built from copies finds its own.
"""

import functools
import hashlib
import json
import random
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lmc_lightning.branching import internals
from lmc_lightning.core.glassbox import RngState, rng_state, seed_everything, set_rng_state
from lmc_lightning.core.random_vectors import derive_seed
from lmc_lightning.core.shared_state import GENERATORS

NoiseState: TypeAlias = dict[str, Any]
"""``rng``, ``generators`` and ``seeds``; plain values and tensors only."""

SeedOf: TypeAlias = Callable[[int, str], int]
"""``(seed, path) -> seed`` of one process; see :func:`seeds_of_process`."""

Generator: TypeAlias = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
_LEAVES = (Tensor, np.ndarray, str, bytes, int, float, complex, bool, type(None), type, types.ModuleType)
_SKIPPED = ("_iterator", "trainer", "_trainer")  # live iterators; the way back to the trainer
_MAX_ELEMENTS = 256
MAX_DEPTH = 4


def noise_roots(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Where a run's random state may live, by name; ``val`` is not part of the training noise."""
    train, val = internals.data_sources(trainer)
    owners = (pl_module, trainer.datamodule)
    return {
        "module": pl_module,
        "datamodule": trainer.datamodule,
        "train_source": None if any(train is owner for owner in owners) else train,
        "train": internals.loaders(trainer.fit_loop),
        "val_source": None if any(val is owner for owner in owners) else val,
        "val": internals.loaders(internals.val_loop(trainer)),
    }


def reachable(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """``(path, object)`` of what can be reached over at most four attributes from each root, each object once."""
    seen: set[int] = set()
    pending = [(name, root, 0) for name, root in reversed(list(roots.items()))]
    while pending:
        path, value, depth = pending.pop()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        yield path, value
        if not isinstance(value, GENERATORS):
            pending.extend(reversed(list(_children(path, value, depth))))


def _children(path: str, value: Any, depth: int) -> Iterator[tuple[str, Any, int]]:
    if isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", element, depth) for key, element in islice(value.items(), _MAX_ELEMENTS))
    elif isinstance(value, list | tuple):
        yield from ((f"{path}[{i}]", element, depth) for i, element in enumerate(value[:_MAX_ELEMENTS]))
    elif isinstance(value, types.MethodType):
        yield f"{path}.__self__", value.__self__, depth
    elif isinstance(value, functools.partial):
        yield from ((f"{path}.{name}", getattr(value, name), depth) for name in ("func", "args", "keywords"))
    elif depth < MAX_DEPTH and not isinstance(value, types.FunctionType):
        attributes = getattr(value, "__dict__", {})
        yield from ((f"{path}.{n}", v, depth + 1) for n, v in attributes.items() if n not in _SKIPPED)


def noise_state(roots: Mapping[str, Any]) -> NoiseState:
    """The global random state, that of every reachable generator, and every reachable ``noise_seed``."""
    rng: RngState = rng_state()
    objects = list(reachable(roots))
    generators = {path: _generator_state(o) for path, o in objects if isinstance(o, GENERATORS)}
    seeds = {f"{path}.{name}": getattr(o, name) for path, o in objects for name in _seed_names(o)}
    return {"rng": rng, "generators": generators, "seeds": seeds}


def set_noise_state(state: NoiseState, roots: Mapping[str, Any]) -> None:
    """Put everything back that :func:`noise_state` read, as far as the same paths lead somewhere."""
    set_rng_state(state["rng"])
    for path, value in reachable(roots):
        saved = state["generators"].get(path)
        if saved is not None and isinstance(value, GENERATORS) and saved["kind"] == type(value).__name__:
            _set_generator_state(value, saved["state"])
        for name in _seed_names(value):
            if f"{path}.{name}" in state["seeds"]:
                setattr(value, name, state["seeds"][f"{path}.{name}"])


def stream_digests(state: NoiseState) -> dict[str, str]:
    """For the global generators of the main process, called ``global``, and for each other one, what its state is."""
    streams = {"global": [state["rng"][name] for name in ("python", "numpy", "torch")], **state["generators"]}
    texts = {path: json.dumps(stream, default=Tensor.tolist) for path, stream in streams.items()}
    return {path: hashlib.sha256(text.encode()).hexdigest() for path, text in texts.items()}


def seeds_of_process(rank: int, apart: Collection[str]) -> SeedOf:
    """New seeds for the streams of one of several processes: its own where the trunk's stream was, else shared.

    Args:
        rank: of the process.
        apart: paths of the streams whose state was not that of the first process.
    """
    return lambda seed, path: derive_seed(seed, "process", rank) if path in apart else seed


def renew_noise(noise_seed: int, roots: Mapping[str, Any], seed_of: SeedOf) -> None:
    """Fresh noise everywhere, a function of ``noise_seed``, the paths and the process alone.

    Global generators, reachable generators, ``noise_seed`` attributes, and the ``seed`` of samplers that have
    ``set_epoch``. What belongs to validation keeps its state.
    """
    seed_everything(seed_of(derive_seed(noise_seed, "global"), "global"))
    for path, value in reachable({name: root for name, root in roots.items() if not name.startswith("val")}):
        if isinstance(value, GENERATORS):
            seed_generator(value, seed_of(derive_seed(noise_seed, "generator", path), path))
        for name in _seed_names(value):
            setattr(value, name, noise_seed if name == "noise_seed" else derive_seed(noise_seed, "sampler"))


def _seed_names(value: Any) -> list[str]:
    """Which attributes of an object are seeds of its noise; looks up nothing that an object makes on demand."""
    names = ["noise_seed", "seed"] if hasattr(type(value), "set_epoch") else ["noise_seed"]
    present = [n for n in names if n in getattr(value, "__dict__", {}) or hasattr(type(value), n)]
    return [name for name in present if isinstance(getattr(value, name), int)]


def _generator_state(generator: Generator) -> dict[str, Any]:
    state: Any
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
    elif isinstance(generator, np.random.Generator):
        state = _plain(generator.bit_generator.state)
    elif isinstance(generator, np.random.RandomState):
        state = _plain(generator.get_state(legacy=False))
    else:
        state = list(generator.getstate())
    return {"kind": type(generator).__name__, "state": state}


def _set_generator_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _from_plain(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_from_plain(state))
    else:
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))


def seed_generator(generator: Generator, seed: int) -> None:
    """Put a generator to the start of the stream ``seed``."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)


def _plain(state: Any) -> Any:
    """numpy's states without numpy types, which a checkpoint must not hold."""
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return {"dtype": str(state.dtype), "values": [int(v) for v in state]}
    return state.item() if isinstance(state, np.generic) else state


def _from_plain(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    if state.keys() == {"dtype", "values"}:
        return np.asarray(state["values"], dtype=state["dtype"])
    return {key: _from_plain(value) for key, value in state.items()}
