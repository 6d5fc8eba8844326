"""State that a module shares with all of its kind: attributes of its classes, generators that live in their files."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lmc_lightning.core.structure import PLAIN, contents_of, restore_contents, walk

_LIBRARIES = ("torch", "torchmetrics", "torchvision", "lightning", "pytorch_lightning", "builtins", "abc", "typing")
_CONTAINERS = (list, tuple, dict, set)
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_LARGEST = 64
"""Members of a container in a file that are looked through for generators."""


class SharedState:
    """What no copy of a module can have for itself, and every copy therefore has to leave as it was.

    Args:
        module: whose own classes, and those of its submodules, are meant; not those of torch and Lightning.
    """

    def __init__(self, module: nn.Module) -> None:
        classes = dict.fromkeys(c for m in module.modules() for c in type(m).__mro__)
        self._classes = [c for c in classes if c.__module__.partition(".")[0] not in _LIBRARIES]
        files = {c.__module__: sys.modules.get(c.__module__) for c in self._classes}
        found = [g for file in files.values() for g in _generators_in(vars(file) if file else {})]
        self._generators = list({id(g): g for g in found}.values())

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """After the block it is as before."""
        attributes = [(c, _data_of(c)) for c in self._classes]
        contents = contents_of(v for _, data in attributes for v in walk(data, _is_no_container))
        restores = [_back_to_now(g) for g in self._generators]
        try:
            yield
        finally:
            restore_contents(contents)
            for cls, data in attributes:
                _restore_data(cls, data)
            for restore in restores:
                restore()


def _data_of(cls: type) -> dict[str, Any]:
    held = (*PLAIN, *_CONTAINERS)
    return {n: v for n, v in vars(cls).items() if isinstance(v, held) and not (n.startswith("__") and n.endswith("__"))}


def _restore_data(cls: type, before: dict[str, Any]) -> None:
    now = _data_of(cls)
    for name in now.keys() - before.keys():
        delattr(cls, name)
    for name, value in before.items():
        if name not in now or now[name] is not value:
            setattr(cls, name, value)


def _is_no_container(value: object) -> bool:
    return not isinstance(value, _CONTAINERS)


def _generators_in(variables: dict[str, Any]) -> list[Any]:
    members = [v for v in variables.values() if isinstance(v, _CONTAINERS) and len(v) <= _LARGEST]
    reached = [*variables.values(), *walk(members, _is_no_container)]
    return [v for v in reached if isinstance(v, GENERATORS)]


def _back_to_now(generator: Any) -> Callable[[], object]:
    """What puts a generator back to its present state."""
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, np.random.RandomState):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    bits = generator.bit_generator
    return partial(setattr, bits, "state", bits.state)
