"""When to measure: at which completed epochs, or after which optimizer steps."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Axis: TypeAlias = Literal["epoch", "step"]


@dataclass(frozen=True)
class Schedule:
    """Points on one axis of training: completed epochs or optimizer steps taken; 0 is the state before training.

    Either a fixed set of ``points`` or every multiple of ``every`` (0 included).
    """

    axis: Axis = "epoch"
    every: int | None = 1
    points: frozenset[int] = frozenset()

    @classmethod
    def from_arguments(
        cls,
        *,
        every_n_epochs: int | None = None,
        epochs: Iterable[int] | None = None,
        every_n_train_steps: int | None = None,
        steps: Iterable[int] | None = None,
    ) -> "Schedule":
        """The schedule that a callback's arguments ask for; every epoch and the start when all are ``None``.

        Raises:
            ValueError: more than one argument is given, an interval is below 1, or a point is negative.
        """
        given = {
            name: value
            for name, value in {
                "every_n_epochs": every_n_epochs,
                "epochs": epochs,
                "every_n_train_steps": every_n_train_steps,
                "steps": steps,
            }.items()
            if value is not None
        }
        if len(given) > 1:
            raise ValueError(f"Expected one schedule, got {' and '.join(given)}. Keep one of them.")
        if not given:
            return cls()
        name, value = next(iter(given.items()))
        axis: Axis = "epoch" if "epoch" in name else "step"
        if not name.startswith("every"):
            return cls(axis, every=None, points=_points(name, value))
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"Expected {name} to be an integer of at least 1, got {value!r}.")
        return cls(axis, every=value)

    @property
    def argument(self) -> str:
        """How a callback is asked for it."""
        if self.every is None:
            return f"{self.axis}s={sorted(self.points)}"
        return f"every_n_{'epochs' if self.axis == 'epoch' else 'train_steps'}={self.every}"

    def is_due(self, axis: Axis, count: int) -> bool:
        """Whether the state after ``count`` epochs or steps is to be measured."""
        if axis != self.axis:
            return False
        return count in self.points if self.every is None else count % self.every == 0


def _points(name: str, values: Any) -> frozenset[int]:
    if not isinstance(values, Iterable):
        every = f"every_n_{name.replace('steps', 'train_steps')}"
        raise ValueError(f"Expected {name} to list integers, got {values!r}. Pass {name}=[{values!r}], or {every}=.")
    points = list(values)
    wrong = [p for p in points if isinstance(p, bool) or not isinstance(p, int) or p < 0]
    if wrong or not points:
        raise ValueError(f"Expected {name} to list integers of at least 0, got {points!r}.")
    return frozenset(points)
