"""Classes by the names that configurations use, and which of their arguments are defaults."""

import inspect
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

_HOMES = (
    "lmc_lightning",
    "lmc_lightning.models",
    "lmc_lightning.data",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
)
"""Where short names are looked up."""


@cache
def resolve(class_path: str) -> type | None:
    """The class that a configuration names, by its path or, for the usual ones, by its name alone; None if unknown."""
    module, _, name = class_path.rpartition(".")
    for home in (module,) if module else _HOMES:
        try:
            found = getattr(import_module(home), name, None)
        except ImportError:
            continue
        if isinstance(found, type):
            return found
    return None


def import_ours() -> None:
    """Import every public class, so that configurations may name it without its path."""
    for home in ("lmc_lightning", "lmc_lightning.models", "lmc_lightning.data"):
        module = import_module(home)
        for name in module.__all__:
            getattr(module, name)


def without_defaults(config: Any) -> Any:
    """A configuration less the arguments that have their class's default, with class names in place of paths."""
    if isinstance(config, Mapping) and "class_path" in config:
        path = str(config["class_path"])
        usual = defaults(path)
        given = {k: without_defaults(v) for k, v in (config.get("init_args") or {}).items()}
        told = {k: v for k, v in given.items() if k not in usual or usual[k] != v}
        return {"class": path.rpartition(".")[2], **told}
    if isinstance(config, Mapping):
        return {str(k): without_defaults(v) for k, v in config.items() if v is not None}
    if isinstance(config, list | tuple):
        return [without_defaults(v) for v in config]
    return config


@cache
def defaults(class_path: str) -> dict[str, Any]:
    """The default arguments of a class, those that it hands on to its bases included; lists for tuples, as in YAML."""
    found: dict[str, Any] = {}
    for base in getattr(resolve(class_path), "__mro__", ()):
        if "__init__" not in vars(base) or base is object:
            continue
        for name, parameter in inspect.signature(base.__init__).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                found.setdefault(name, _plain(parameter.default))
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
