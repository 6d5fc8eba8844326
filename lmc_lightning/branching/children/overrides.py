"""One setting of a child made another than the trunk's from the fork on: of its optimizers, or of its module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeAlias

import torch
from torch import Tensor

Value: TypeAlias = float | int | bool | str | Sequence[float]
"""A value to be set, or ``"*x"`` or ``"+x"`` to be worked out from what there is."""


@dataclass(frozen=True)
class Change:
    """What becomes of a value: ``*`` or ``+`` an amount, or ``=`` another value.

    Raises:
        ValueError: what follows ``*`` or ``+`` is no finite number.
    """

    operation: str
    amount: Any

    @classmethod
    def of(cls, key: str, value: Value) -> "Change":
        """The change that the value of an override stands for."""
        if not isinstance(value, str) or value[:1] not in ("*", "+"):
            return cls("=", list(value) if isinstance(value, tuple) else value)
        try:
            amount = float(value[1:])
        except ValueError:
            amount = float("nan")
        if not isfinite(amount):
            raise ValueError(f'Expected override[{key!r}] to be a value, "*x" or "+x" with a number x, got {value!r}.')
        return cls(value[0], amount)

    @property
    def name(self) -> str:
        """As a part of a name: ``x0.5``, ``plus0.1``, ``0.01``."""
        if self.operation != "=":
            return f"{'x' if self.operation == '*' else 'plus'}{self.amount:g}"
        values = self.amount if isinstance(self.amount, list) else [self.amount]
        return "_".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)

    def __call__(self, old: Any) -> Any:
        """The new value in place of ``old``."""
        if self.operation == "*":
            return old * self.amount
        if self.operation == "+":
            return old + self.amount
        if isinstance(old, Tensor):
            return torch.full_like(old, self.amount)
        return tuple(self.amount) if isinstance(old, tuple) and isinstance(self.amount, list) else self.amount

    def refusal(self, old: Any) -> str:
        """Why it cannot be made of ``old``; empty if it can."""
        if callable(old) or (isinstance(old, Tensor) and old.numel() != 1):
            return f"it is no plain value but a {type(old).__name__}"
        number = isinstance(old, Tensor) or (isinstance(old, int | float) and not isinstance(old, bool))
        if self.operation != "=" and not number:
            return f"{old!r} is no number; give the value that it is to have"
        if number and not isinstance(self.amount, int | float):
            return f"it is a number, and {self.amount!r} is none"
        if isinstance(old, tuple | list) and (not isinstance(self.amount, list) or len(old) != len(self.amount)):
            return f"{old!r} has {len(old)} parts; give as many"
        return ""


class Override:
    """Settings that a child has for its own from the fork on, every other thing being the trunk's.

    ``"optimizer.lr"`` is the setting of every parameter group of every optimizer, ``"optimizer.0.lr"`` that of the
    first one alone, and ``"module.<path>"`` a plain attribute of the module or of a part of it.

    Those of optimizers hold whenever they step: the value that its schedule gives, whatever schedule that is (closed
    form, recursive, chained, plateau, by hand in a hook), is changed for the time of the step and put back afterwards.
    ``"*0.5"`` is half of the trunk's schedule to the end, a number is that number to the end, and no scheduler sees or
    undoes it. A plateau scheduler goes by the child's own metric. What monitors of the learning rate show between the
    steps is the schedule.

    Args:
        changes: the new values by key.

    Raises:
        ValueError: no changes, a key of another form, or a value that is impossible.
    """

    def __init__(self, changes: Mapping[str, Value]) -> None:
        if not changes:
            raise ValueError('Expected override to change something, e.g. {"optimizer.lr": "*0.5"}, got nothing.')
        for key in changes:
            kind, _, rest = key.partition(".")
            if kind not in ("optimizer", "module") or not all(rest.split(".")):
                raise ValueError(
                    f'Expected the keys of override to be "optimizer.<setting>", "optimizer.<index>.<setting>" or '
                    f'"module.<attribute>", got {key!r}.'
                )
        self.changes = {key: Change.of(key, value) for key, value in changes.items()}
        self._given = {key: list(value) if isinstance(value, tuple) else value for key, value in changes.items()}

    @property
    def name(self) -> str:
        """``lr_x0.5`` of ``{"optimizer.lr": "*0.5"}``."""
        parts = (f"{k.removeprefix('optimizer.')}_{change.name}" for k, change in self.changes.items())
        return "_".join(parts).replace("/", "_")

    def record(self) -> dict[str, Any]:
        """The override as it was given."""
        return {"override": self._given}

    def __repr__(self) -> str:
        return repr(self._given)

    def check_module(self, pl_module: Any) -> None:
        """See to it that the module has the attributes.

        Raises:
            ValueError: it has no such attribute, or it cannot be changed so.
        """
        for key, change in self._of("module").items():
            owner, name = _owner(pl_module, key)
            _refuse(key, change.refusal(getattr(owner, name)))

    def check(self, trainer: Any) -> None:
        """See to it that the optimizers have the settings.

        Raises:
            ValueError: there is no such optimizer or setting, or it cannot be changed so.
        """
        for key, change in self._of("optimizer").items():
            for optimizer, name in _settings(trainer.optimizers, key):
                if not hasattr(optimizer, "register_step_pre_hook"):
                    raise ValueError(f"override needs optimizers of torch.optim, got a {type(optimizer).__name__}.")
                for group in optimizer.param_groups:
                    if name not in group:
                        known = ", ".join(n for n in group if n not in ("params", "param_names"))
                        raise ValueError(f"{type(optimizer).__name__} has no {name!r} ({key!r} in override): {known}.")
                    _refuse(key, change.refusal(group[name]))

    def apply(self, trainer: Any, pl_module: Any, seed: int) -> dict[str, Any]:
        """Change the module's attributes, and the optimizers' settings whenever they step."""
        effect = {}
        for key, change in self._of("module").items():
            owner, name = _owner(pl_module, key)
            old = getattr(owner, name)
            setattr(owner, name, change(old))
            effect[key] = {"from": _plain(old), "to": _plain(getattr(owner, name))}
        of_optimizer: dict[int, dict[str, Change]] = {}
        for key, change in self._of("optimizer").items():
            for optimizer, name in _settings(trainer.optimizers, key):
                of_optimizer.setdefault(id(optimizer), {})[name] = change
                index = trainer.optimizers.index(optimizer)
                values = [group[name] for group in optimizer.param_groups]
                told = {"from": [_plain(v) for v in values], "to": [_plain(change(v)) for v in values]}
                effect[f"optimizer.{index}.{name}"] = told
        for optimizer in trainer.optimizers:
            if id(optimizer) in of_optimizer:
                _Stepping(of_optimizer[id(optimizer)]).attach(optimizer)
        return effect

    def _of(self, kind: str) -> dict[str, Change]:
        return {key: change for key, change in self.changes.items() if key.startswith(f"{kind}.")}


class _Stepping:
    """Changes settings of an optimizer while it steps.

    Its closure, in which the user's step and hooks run, finds the schedule's values and may set others.
    """

    def __init__(self, changes: Mapping[str, Change]) -> None:
        self._changes = changes
        self._schedule: list[dict[str, Any]] = []

    def attach(self, optimizer: Any) -> None:
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(lambda stepped, *_: self._restore(stepped))

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._change(optimizer)

        def wrapped(closure: Any) -> Any:
            def evaluate() -> Any:
                self._restore(optimizer)
                loss = closure()
                self._change(optimizer)
                return loss

            return evaluate

        args = tuple(wrapped(a) if callable(a) and a is not optimizer else a for a in args)
        return args, {k: wrapped(v) if k == "closure" and v is not None else v for k, v in kwargs.items()}

    def _change(self, optimizer: Any) -> None:
        self._schedule = [{name: group[name] for name in self._changes} for group in optimizer.param_groups]
        for group, values in zip(optimizer.param_groups, self._schedule, strict=True):
            group.update({name: self._changes[name](value) for name, value in values.items()})

    def _restore(self, optimizer: Any) -> None:
        for group, values in zip(optimizer.param_groups, self._schedule, strict=True):
            group.update(values)


def _settings(optimizers: Sequence[Any], key: str) -> list[tuple[Any, str]]:
    """The optimizers that a key names, each with the name of the setting."""
    index, _, name = key.removeprefix("optimizer.").rpartition(".")
    if not index:
        return [(optimizer, name) for optimizer in optimizers]
    if not index.isdigit() or int(index) >= len(optimizers):
        raise ValueError(f"There is no optimizer {index!r} ({key!r} in override): there are {len(optimizers)}.")
    return [(optimizers[int(index)], name)]


def _owner(pl_module: Any, key: str) -> tuple[Any, str]:
    """The object that has the attribute which a key names, and its name."""
    *path, name = key.split(".")[1:]
    owner = pl_module
    for part in [*path, name]:
        if not hasattr(owner, part):
            raise ValueError(f"{type(owner).__name__} has no attribute {part!r} ({key!r} in override).")
        owner, before = getattr(owner, part), owner
    return before, name


def _refuse(key: str, reason: str) -> None:
    if reason:
        raise ValueError(f"override[{key!r}] is impossible: {reason}.")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
