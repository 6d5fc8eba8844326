"""A study as a YAML file: one LightningCLI configuration, what is varied, and what is done with the runs."""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any

import yaml

from lmc_lightning.experiments.plans.classes import defaults, without_defaults

Config = dict[str, Any]
Overrides = dict[str, Any]
"""Dotted keys of a LightningCLI configuration, e.g. ``{"model.init_args.lr": 0.1}``."""

_NOT_IN_IDENTITY = ("logger", "enable_progress_bar", "enable_model_summary", "default_root_dir")
"""Arguments of the Trainer that leave the numbers as they are."""

_IN_YAML = {"zipped": "zip", "listed": "list"}


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Args:
        config: of LightningCLI, whole.
        overrides: what the study varies, by dotted key: this cell's value, or that of ``base``.
        seed: of this repetition; None where the study has no seeds.
        measured: callbacks that measure the trained network.
    """

    config: Config
    overrides: Overrides
    seed: int | None = None
    measured: Sequence[Config] = ()

    @cached_property
    def id(self) -> str:
        """A hash of the part of the configuration that differs from defaults: it survives new options with defaults."""
        trainer = {k: v for k, v in self.config.get("trainer", {}).items() if k not in _NOT_IN_IDENTITY}
        afterwards = {"measured": [*self.measured]} if self.measured else {}
        told = without_defaults({**self.config, "trainer": trainer, **afterwards})
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What identifies the cell in a table: the overrides under their shortest unambiguous names, and the seed."""
        short = _short_names(self.overrides)
        seed = {} if self.seed is None else {"seed": self.seed}
        return {short[key]: value for key, value in self.overrides.items()} | seed


@dataclass(frozen=True)
class Pairing:
    """Pairs of trained cells that are compared: those that differ in nothing but ``across``.

    Args:
        across: ``"seed"``, or a dotted key that the study varies.
        measures: name of each measure (``"barrier"``, ``"similarity"``, ``"curve"``) and its arguments.
        where: only cells whose configuration has these values at dotted keys.
        against: compare every cell with the one that has this value of ``across``, which comes first; by default every
            two cells.
        itself: with ``against``, compare that cell with itself too.
    """

    measures: Mapping[str, Mapping[str, Any]]
    across: str = "seed"
    where: Mapping[str, Any] = field(default_factory=dict)
    against: Any = None
    itself: bool = False


@dataclass(frozen=True)
class Study:
    """What is trained, varied and compared.

    Args:
        base: a LightningCLI configuration: ``model``, ``data``, ``trainer`` …, or the path of its YAML file.
        name: of the study.
        grid: every combination of the values of dotted keys.
        zipped: ``zip`` in YAML: dotted keys whose values go together, the first with the first.
        listed: ``list`` in YAML: cells given one by one, each a mapping of dotted keys.
        seeds: of the repetitions.
        seed_keys: the dotted keys that a repetition's seed is written to.
        branches: arguments of ``CheckpointBranching``; its children and their barriers are tasks of their own. An
            ``InterpolationBarrier`` is added where the base has none.
        measured: callbacks, as in ``trainer.callbacks``, that measure the trained network. That is the last one or,
            with a ``ModelCheckpoint`` that has a ``monitor`` among the base's callbacks, the best one.
        pairs: which trained cells are compared, and how.
        threads: of every task, so that numbers are the same wherever it runs.

    Raises:
        ValueError: unknown keys, or values of ``zip`` of different lengths.
    """

    base: Config
    name: str = "study"
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    zipped: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    listed: Sequence[Mapping[str, Any]] = ()
    seeds: Sequence[int] = ()
    seed_keys: Sequence[str] = ("seed_everything",)
    branches: Mapping[str, Any] | None = None
    measured: Sequence[Config] = ()
    pairs: Sequence[Pairing] = ()
    threads: int = 1

    @classmethod
    def load(cls, path: Path | str, variants: Sequence[str] = ()) -> "Study":
        """The study in a YAML file.

        Args:
            path: of the file.
            variants: which of the file's ``variants`` to take, one after another: each gives dotted keys of the study
                other values, ``base.trainer.max_epochs: 2`` or ``seeds: [0]``, and its name to that of the study.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no study, or has no such variant; the message names what is wrong.
        """
        path = Path(path)
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, Mapping) or "base" not in content:
            raise ValueError(f"{path} is no study: expected a mapping with `base`, a LightningCLI configuration.")
        content = dict(content)
        if isinstance(content["base"], str):
            content["base"] = yaml.safe_load((path.parent / content["base"]).read_text())
        known = content.pop("variants", {})
        for variant in variants:
            if variant not in known:
                raise ValueError(f"{path} has no variant {variant!r}. It has {', '.join(known) or 'none'}.")
            content = with_overrides(content, known[variant])
        return cls.of({**content, "name": "_".join([content.get("name", path.stem), *variants])})

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Study":
        """The study in a mapping."""
        known = {_IN_YAML.get(f.name, f.name) for f in fields(cls)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise ValueError(f"A study has no {unknown[0]!r}. It has {', '.join(sorted(known))}.")
        pairs = tuple(Pairing(**_checked_pairing(pairing)) for pairing in content.get("pairs") or ())
        given = {f.name: content.get(_IN_YAML.get(f.name, f.name)) for f in fields(cls)}
        return cls(**{**{k: v for k, v in given.items() if v is not None}, "pairs": pairs})

    def __post_init__(self) -> None:
        lengths = {key: len(values) for key, values in self.zipped.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Values of `zip` go together and need one length, got {lengths}.")

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All training runs, each once."""
        # Every task and every pairing asks for them, and a large study has thousands to hash.
        found: dict[str, Cell] = {}
        chosen = [*self._combinations()]
        keys = dict.fromkeys(key for overrides in chosen for key in overrides)
        usual = {key: value_at(self.base, key) for key in keys}
        for overrides in chosen:
            for seed in self.seeds or (None,):
                config = with_overrides(self.base, overrides)
                if seed is not None:
                    config = with_overrides(config, dict.fromkeys(self.seed_keys, seed))
                if self.branches is not None:
                    config = _with_branches(config, {"seed": seed or 0, **self.branches})
                cell = Cell(config, {**usual, **overrides}, seed, self.measured)
                found.setdefault(cell.id, cell)
        return tuple(found.values())

    def paired(self) -> list[tuple[Cell, Cell, Pairing]]:
        """The pairs of cells that are compared."""
        found = []
        for pairing in self.pairs:
            groups: dict[str, list[Cell]] = {}
            for cell in self.cells:
                if all(value_at(cell.config, key) == value for key, value in pairing.where.items()):
                    groups.setdefault(_all_but(cell, pairing.across), []).append(cell)
            found += [(a, b, pairing) for cells in groups.values() for a, b in _pairs(cells, pairing)]
        return found

    def _combinations(self) -> Iterator[Overrides]:
        rows = [dict(zip(self.zipped, v, strict=True)) for v in zip(*self.zipped.values(), strict=True)] or [{}]
        points = [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]
        for one, row, point in product(self.listed or ({},), rows, points):
            yield {**one, **row, **point}


def _checked_pairing(content: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = sorted(set(content) - {f.name for f in fields(Pairing)})
    if unknown or not content.get("measures"):
        raise ValueError(
            f"An entry of `pairs` has {', '.join(f.name for f in fields(Pairing))}, got {sorted(content)}."
        )
    return {**content, "measures": {name: dict(options or {}) for name, options in content["measures"].items()}}


def _with_branches(config: Config, branches: Mapping[str, Any]) -> Config:
    """The configuration of a trunk whose children are trained by other tasks."""
    callbacks = [*(config.get("trainer", {}).get("callbacks") or ())]
    if not any(str(c["class_path"]).endswith("InterpolationBarrier") for c in callbacks):
        callbacks.append({"class_path": "lmc_lightning.InterpolationBarrier"})
    init_args = {**branches, "when": "never"}
    callbacks.append({"class_path": "lmc_lightning.CheckpointBranching", "init_args": init_args})
    return with_overrides(config, {"trainer.callbacks": callbacks})


def _pairs(cells: Sequence[Cell], pairing: Pairing) -> Iterator[tuple[Cell, Cell]]:
    if pairing.against is None:
        yield from combinations(cells, 2)
        return
    first = [c for c in cells if {**c.overrides, "seed": c.seed}.get(pairing.across) == pairing.against]
    yield from ((a, b) for a in first for b in cells if b is not a or pairing.itself)


def _all_but(cell: Cell, across: str) -> str:
    rest = {**cell.overrides, "seed": cell.seed}
    rest.pop(across, None)
    return json.dumps(rest, sort_keys=True)


def with_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
    """A copy of a configuration in which dotted keys have other values; numbers are places in a list.

    Raises:
        ValueError: a key leads through something that has no keys; the message names it.
    """
    changed: Config = copy.deepcopy(dict(config))
    for key, value in overrides.items():
        *parents, last = key.split(".")
        place: Any = changed
        for part in parents:
            place = _step(place, part, key)
        if isinstance(place, list):
            place[_index(place, last, key)] = copy.deepcopy(value)
        else:
            place[last] = copy.deepcopy(value)
    return changed


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """What a configuration has at a dotted key: a class's default where it does not say, None where nobody does."""
    place: Any = config
    *parents, last = key.split(".")
    for part in parents:
        usual = defaults(str(place["class_path"])) if part == "init_args" and "class_path" in place else {}
        place = _step(place, part, key) if isinstance(place, list) else {**usual, **(place.get(part) or {})}
    return place[_index(place, last, key)] if isinstance(place, list) else place.get(last)


def _step(place: Any, part: str, key: str) -> Any:
    below = place[_index(place, part, key)] if isinstance(place, list) else place.setdefault(part, {})
    if not isinstance(below, dict | list):
        raise ValueError(f"The override {key!r} leads through {part!r}, which is {below!r} and has no keys.")
    return below


def _index(place: Sequence[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise ValueError(f"The override {key!r} needs a place from 0 to {len(place) - 1} of a list, got {part!r}.")
    return int(part)


def _short_names(keys: Mapping[str, Any]) -> dict[str, str]:
    """Each dotted key's shortest ending that no other one has."""
    names = {}
    for key in keys:
        parts = key.split(".")
        endings = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        others = [k for k in keys if k != key]
        names[key] = next(e for e in endings if not any(k == e or k.endswith(f".{e}") for k in others))
    return names
