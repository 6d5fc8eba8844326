"""What each logged key means, from the tables in the docstrings of the callbacks."""

import re
from collections.abc import Collection, Iterator
from inspect import cleandoc

import lmc_lightning
from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.visits.run_report import documented_keys
from lmc_lightning.landscape.paths.barrier import DEFINITIONS, Barrier


def definitions(families: Collection[str]) -> list[tuple[str, str]]:
    """Key and meaning, for keys whose first segment is in ``families``, e.g. ``{"hessian", "barrier"}``."""
    found: dict[str, str] = {}
    for name in lmc_lightning.__all__:
        callback = getattr(lmc_lightning, name)
        if isinstance(callback, type) and issubclass(callback, MeasurementCallback):
            family = ""
            for key, meaning in documented_keys(callback).items():
                text = meaning.replace("`", "")
                family = family if key.startswith("…") else key.partition("/")[0]
                if family in families:
                    found.setdefault(key if not key.startswith("…") else f"{family}/{key}", text)
    if "barrier" in families:
        found |= {f"barrier/…/{name}": text for name, text in _attributes(Barrier.__doc__ or "", DEFINITIONS)}
    return [*found.items()]


def _attributes(docstring: str, names: Collection[str]) -> Iterator[tuple[str, str]]:
    for entry in re.split(r"\n    (?=\w+: )", cleandoc(docstring)):
        name, _, text = entry.partition(": ")
        if name in names:
            yield name, " ".join(text.split())
