"""Which networks of a family are compared with which, and under which names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, Literal, TypeAlias

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.nodes import Node
from lmc_lightning.callbacks.pairs.comparison import Comparison, Pairing
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.line import Endpoint, endpoint_of

PairKind: TypeAlias = Literal["trunk", "siblings"]
PAIR_KINDS: tuple[PairKind, ...] = ("trunk", "siblings")


@dataclass(frozen=True)
class Pair:
    """Two runs of a family: a child and its trunk, or two children of one branch point."""

    kind: PairKind
    first: Node
    """At t = 0."""
    second: Node
    """At t = 1; always a child."""
    label: str
    """The last part of the keys, e.g. ``k1_005``, ``k1_005/lr_x0.5``, ``k1_005/child_1`` or ``k1_005/siblings_0_1``."""

    @property
    def epochs(self) -> list[int]:
        """The completed epochs at which the weights of both are known."""
        return sorted(set(self.first.epochs) & set(self.second.epochs))

    @property
    def ends(self) -> tuple[str, str]:
        """What the two are called in figures."""
        siblings = f"child {self.first.child}", f"child {self.second.child}"
        return ("trunk", "child") if self.kind == "trunk" else siblings

    @property
    def lineage(self) -> dict[str, Any]:
        """Which runs these are, for a record."""
        first, second = self.first.child, self.second.child
        return {
            "intervention": self.second.variant,
            "pair": self.kind,
            "run": self.second.name,
            "parent": self.first.name,
            "k1": self.second.k1,
            "branch_step": self.second.branch_step,
            "child": second if self.kind == "trunk" else f"{first} and {second}",
        }


def pairs_of(family: Family, kinds: Sequence[PairKind]) -> list[Pair]:
    """The pairs of a family in the order of its children; those of siblings only where both are completed."""
    branches: dict[tuple[str, str | None], list[Node]] = {}
    for child in family.children:
        branches.setdefault((child.label, child.variant if child.child is not None else None), []).append(child)
    return [pair for _, children in branches.items() for pair in _pairs(family.trunk, children, kinds)]


def _pairs(trunk: Node, children: Sequence[Node], kinds: Sequence[PairKind]) -> Iterator[Pair]:
    planned = [c for c in children if c.child is not None]
    variant = planned[0].variant if planned else None
    label = f"{children[0].label}/{variant}" if variant else children[0].label
    if "trunk" in kinds:
        for child in children:
            # Those that were made afterwards do not change the keys of the planned ones.
            own = child.name.removeprefix(f"{label.replace('/', '_')}_")
            own = own if len(planned) > 1 or child not in planned else ""
            yield Pair("trunk", trunk, child, f"{label}/{own}" if own else label)
    if "siblings" in kinds:
        for one, other in combinations([c for c in planned if c.status == "completed"], 2):
            yield Pair("siblings", one, other, f"{label}/siblings_{one.child}_{other.child}")


@dataclass(frozen=True)
class Work:
    """One comparison that is due in a family."""

    label: str
    """Of its keys."""
    step: int
    epoch: int
    lineage: Mapping[str, Any]
    measure: Callable[[], Pairing]


def work_on(
    family: Family,
    pairs: Sequence[Pair],
    comparison: Any,
    is_wanted: Callable[[Pair, int], bool],
    *,
    with_soup: bool,
) -> Iterator[Work]:
    """Every wanted comparison, one later epoch after the other, so that each network is read and evaluated once.

    Args:
        family: with the kept weights.
        pairs: to be compared.
        comparison: by what.
        is_wanted: of a pair at a later epoch.
        with_soup: average the trunk and all compared children of an epoch too.
    """
    for epoch in sorted({epoch for pair in pairs for epoch in pair.epochs}):
        ends = _Ends(family, epoch, comparison.states.objective)
        due = [pair for pair in pairs if epoch in pair.epochs and is_wanted(pair, epoch)]
        for pair in due:
            step = pair.second.epochs[epoch]
            yield Work(pair.label, step, epoch, pair.lineage, partial(_compare, comparison, ends, pair))
        names = [family.trunk.name, *dict.fromkeys(name for pair in pairs for name in _apart(pair, epoch))]
        if with_soup and any(_apart(pair, epoch) for pair in due):
            lineage = {"pair": "family", "run": "family", "parent": family.trunk.name, "runs": names}
            label = "/".join(part for part in ("family", variant_of(family)) if part)
            yield Work(label, family.step_of_epoch(epoch), epoch, lineage, partial(_mix, comparison, ends, names))


def variant_of(family: Family) -> str:
    """The name of what was done to the children of a family; empty where it was nothing."""
    return next((child.variant for child in family.children if child.variant), "")


class _Ends:
    """The networks of a family after so many epochs, each read once."""

    def __init__(self, family: Family, epoch: int, objective: Objective) -> None:
        self._family, self._epoch, self._objective = family, epoch, objective
        self._known: dict[str, Endpoint] = {}

    def __call__(self, name: str) -> Endpoint:
        if name not in self._known:
            self._known[name] = endpoint_of(self._objective, self._family.state(name, self._epoch))
        return self._known[name]


def _apart(pair: Pair, epoch: int) -> list[str]:
    """The children of a pair that have left the trunk by then."""
    children = [node for node in (pair.first, pair.second) if node.branch_step is not None]
    return [node.name for node in children if node.epochs.get(epoch, 0) > (node.branch_step or 0)]


def _compare(comparison: Comparison, ends: _Ends, pair: Pair) -> Pairing:
    return comparison.between(ends(pair.first.name), ends(pair.second.name))


def _mix(comparison: Comparison, ends: _Ends, names: Sequence[str]) -> Pairing:
    return Pairing({}, list(comparison.soup([ends(name) for name in names])))
