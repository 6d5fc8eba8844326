"""What is planned: where children leave the trunk, and which of the trunk's noise each has for its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, get_args

from lmc_lightning.branching.family.nodes import Choice, Node, Point, Stream
from lmc_lightning.core.random_vectors import derive_seed

STREAMS: tuple[Stream, ...] = get_args(Stream)
When: TypeAlias = Literal["end", "immediately", "never"]
Noise: TypeAlias = Choice | Mapping[Stream, Choice]
"""``"fresh"`` or ``"same"``, for all streams or for each."""


class Intervention(Protocol):
    """What is done to a child at the moment of its fork, other than giving it noise of its own."""

    @property
    def name(self) -> str:
        """What names of runs and log keys say of it, e.g. ``lr_x0.5``."""

    def record(self) -> dict[str, Any]:
        """Values as JSON has them that say what is done; kept in the child's node."""

    def check_module(self, pl_module: Any) -> None:
        """Refuse a module to which it cannot be done, in the trunk's ``setup``."""

    def check(self, trainer: Any) -> None:
        """Refuse a run to which it cannot be done, in the trunk's ``on_fit_start``."""

    def apply(self, trainer: Any, pl_module: Any, seed: int) -> dict[str, Any]:
        """Do it: everything of the fork is restored, and the next batch is not yet fetched.

        Args:
            trainer: the child's.
            pl_module: its module.
            seed: of what is drawn for it.

        Returns:
            What was found and done, as JSON has it, for the child's node.
        """


def noise_of(noise: Noise) -> dict[Stream, Choice]:
    """The choice for each stream.

    Raises:
        ValueError: another word, another stream, or a stream is missing.
    """
    if isinstance(noise, str):
        if noise not in get_args(Choice):
            raise ValueError(f"Expected noise to be 'fresh' or 'same', got {noise!r}.")
        return dict.fromkeys(STREAMS, noise)
    if set(noise) != set(STREAMS) or not set(noise.values()) <= set(get_args(Choice)):
        raise ValueError(
            f"Expected noise to say 'fresh' or 'same' for each of {', '.join(STREAMS)}, got {dict(noise)!r}."
        )
    return {stream: noise[stream] for stream in STREAMS}


@dataclass(frozen=True)
class Plan:
    """Which children there shall be: ``children`` from each branch point, under which noise."""

    epochs: tuple[int, ...]
    steps: tuple[int, ...]
    children: int
    noise: Noise
    seed: int
    intervention: Intervention | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        epochs: Sequence[int] | None,
        steps: Sequence[int],
        children: int,
        noise: Noise | None,
        seed: int,
        intervention: Intervention | None = None,
    ) -> "Plan":
        """A plan of checked arguments; ``epochs`` and ``noise`` that are None follow from the others.

        Raises:
            ValueError: a branch point that is no integer of at least 0, none at all, no children, or impossible noise.
        """
        if epochs is None:
            epochs = () if steps else (0, 1, 2, 5)
        if noise is None:
            noise = "fresh" if intervention is None else "same"
        for name, points in (("epochs", epochs), ("steps", steps)):
            wrong = [p for p in points if isinstance(p, bool) or not isinstance(p, int) or p < 0]
            if wrong or not (epochs or steps):
                raise ValueError(f"Expected {name} to list integers of at least 0, got {points!r}.")
        if isinstance(children, bool) or not isinstance(children, int) or children < 1:
            raise ValueError(f"Expected children to be an integer of at least 1, got {children!r}.")
        noise_of(noise)
        return cls(tuple(sorted(set(epochs))), tuple(sorted(set(steps))), children, noise, seed, intervention)

    @property
    def points(self) -> list[Point]:
        """The branch points, epochs before steps."""
        return [Point("epoch", at) for at in self.epochs] + [Point("step", at) for at in self.steps]

    def nodes(self) -> list[Node]:
        """The children, none of them started."""
        prefix = "" if self.intervention is None else f"{self.intervention.name}_"
        return [
            child_of(
                point, f"{prefix}child_{j}", self.noise, self._seed(point, j), child=j, intervention=self.intervention
            )
            for point in self.points
            for j in range(self.children)
        ]

    def _seed(self, point: Point, child: int) -> int:
        return derive_seed(self.seed, "branch", point.axis, point.at, "child", child)

    def record(self) -> dict[str, Any]:
        """The arguments as plain values."""
        noise = self.noise if isinstance(self.noise, str) else dict(self.noise)
        intervention = None if self.intervention is None else _recorded(self.intervention)
        return {
            "epochs": list(self.epochs),
            "steps": list(self.steps),
            "children": self.children,
            "noise": noise,
            "seed": self.seed,
            "intervention": intervention,
        }


def child_of(
    point: Point,
    suffix: str,
    noise: Noise,
    noise_seed: int,
    *,
    child: int | None = None,
    intervention: Intervention | None = None,
) -> Node:
    """A child that has not started; the seeds of what it draws for itself follow from ``noise_seed`` and names."""
    choices = noise_of(noise)
    done = None
    if intervention is not None:
        done = _recorded(intervention) | {"seed": derive_seed(noise_seed, "intervention")}
    fresh = [stream for stream in STREAMS if choices[stream] == "fresh"]
    return Node(
        f"{point.label}_{suffix}",
        k1=point.at if point.axis == "epoch" else None,
        k1_step=point.at if point.axis == "step" else None,
        child=child,
        noise=choices,
        noise_seed=noise_seed if fresh else None,
        seeds={stream: derive_seed(noise_seed, stream) for stream in fresh} if 0 < len(fresh) < len(STREAMS) else {},
        intervention=done,
    )


def _recorded(intervention: Intervention) -> dict[str, Any]:
    return {"name": intervention.name, **intervention.record()}
