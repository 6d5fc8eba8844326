"""What a run was trained on, as digests: the proof of what a child shares with the trunk."""

import hashlib
from array import array
from collections.abc import Iterator
from typing import Any

from lmc_lightning.branching import internals
from lmc_lightning.branching.family.nodes import Node
from lmc_lightning.core.collective import Collective, joint_digest
from lmc_lightning.core.structure import digest, tensors_in

DIGESTED_BATCHES = 2


class _Recorded:
    """In place of the sampler inside a batch sampler: yields the same indices at the same moments, and notes them."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.indices = array("q")

    def __iter__(self) -> Iterator[Any]:
        self.indices = indices = array("q")
        for index in self.sampler:
            if isinstance(index, int):
                indices.append(index)
            yield index

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # half-made copies and pickles have none yet
            raise AttributeError(name)
        return getattr(self.sampler, name)


def chained(earlier: str, batch: Any, processes: Collective) -> str:
    """The digest of some batches and one more, each of all processes together."""
    joint = joint_digest(processes.agree(lambda: digest(batch)), processes)
    return hashlib.sha256(f"{earlier}{joint}".encode()).hexdigest()


class Evidence:
    """Digests of the batches of a run, written into its node while it trains.

    The indices come from the samplers inside of the loaders' batch samplers, which are wrapped until :meth:`close`.
    A loader that has no such sampler, or yields other things than integers, has batches as its only evidence. Where
    several processes train together, each digest is of what all of them saw.
    """

    def __init__(self, node: Node, processes: Collective) -> None:
        self._node, self._processes = node, processes
        self._recorded: list[tuple[Any, _Recorded]] = []

    def watch(self, trainer: Any) -> None:
        """Wrap the samplers of loaders that were just made and have no iterator yet."""
        self.close()
        for loader in internals.loaders(trainer.fit_loop):
            batch_sampler: Any = getattr(loader, "batch_sampler", None)
            if "sampler" in getattr(batch_sampler, "__dict__", {}) and hasattr(batch_sampler, "batch_size"):
                recorded = _Recorded(batch_sampler.sampler)
                batch_sampler.sampler = recorded
                self._recorded.append((batch_sampler, recorded))

    def see_batch(self, epoch: int, batch: Any, batch_idx: int) -> None:
        """Let the first two batches of an epoch enter its digest."""
        digests = self._node.batch_digests
        if batch_idx < DIGESTED_BATCHES and (batch_idx == 0 or epoch in digests) and tensors_in(batch):
            digests[epoch] = chained(digests[epoch] if batch_idx else "", batch, self._processes)

    def end_epoch(self, trainer: Any) -> None:
        """Digest the indices and the augmentation of an epoch that was run to its end."""
        epoch, batches = trainer.current_epoch, trainer.fit_loop.batch_idx + 1
        taken = [r.indices[: batches * sampler.batch_size].tobytes() for sampler, r in self._recorded]
        if any(taken):
            self._node.order_digests[epoch] = self._joint(b"".join(taken))
        datasets: list[Any] = [getattr(loader, "dataset", None) for loader in internals.loaders(trainer.fit_loop)]
        draws = [data.augmentation_digest() for data in datasets if hasattr(type(data), "augmentation_digest")]
        if draws:
            self._node.augmentation_digests[epoch] = self._joint("".join(draws).encode())

    def _joint(self, own: bytes) -> str:
        return joint_digest(hashlib.sha256(own).hexdigest(), self._processes)

    def close(self) -> None:
        """Unwrap the samplers."""
        for batch_sampler, recorded in self._recorded:
            if batch_sampler.sampler is recorded:
                batch_sampler.sampler = recorded.sampler
        self._recorded.clear()


def judge(child: Node, trunk: Node, first_batches: str | None) -> None:
    """Compare a child with the trunk, by all digests that both have, and say what is unusual about it."""
    differing = {what: _first_difference(*pair) for what, pair in _digests(child, trunk).items()}
    at_once = child.first_batches is not None and child.first_batches != first_batches
    seen = {"order": child.order_digests, "augmentation": child.augmentation_digests, "batches": child.first_batches}
    same = {what: differing[what] is None for what in seen} | {"batches": differing["batches"] is None and not at_once}
    child.shared = {what: same[what] for what, found in seen.items() if found}
    if child.reason is None:
        child.reason = _reason(child, differing["order"], differing["batches"], at_once)
    if child.is_replay:
        weights = differing["weights"]
        child.exact_replay = all(child.shared.values()) and weights is None
        if child.reason is None and weights is not None:
            child.reason = f"the weights differ from the trunk's first after {weights} epochs, on the same batches"


def _digests(child: Node, trunk: Node) -> dict[str, tuple[dict[int, str], dict[int, str]]]:
    """Those of both by epoch, and by what they are of."""
    return {
        "batches": (child.batch_digests, trunk.batch_digests),
        "order": (child.order_digests, trunk.order_digests),
        "augmentation": (child.augmentation_digests, trunk.augmentation_digests),
        "weights": (child.state_digests, trunk.state_digests),
    }


def _first_difference(mine: dict[int, str], theirs: dict[int, str]) -> int | None:
    return next((e for e in sorted(mine) if e in theirs and mine[e] != theirs[e]), None)


def common_digests(child: Node, trunk: Node) -> dict[str, int]:
    """How many digests :func:`judge` has compared, by what they are of."""
    counts = {what: len(mine.keys() & theirs) for what, (mine, theirs) in _digests(child, trunk).items()}
    return {"first_batches": int(child.first_batches is not None), **counts}


def keep_what_compares(child: Node, trunk: Node, num_batches: int, cut: tuple[int, int] | None) -> None:
    """Forget the digests of a child that ended before the trunk where they are of less than the trunk's.

    Args:
        child: that has ended.
        trunk: with which it is to be judged.
        num_batches: that it has trained on.
        cut: the epoch that was not run to its end, and how many of its batches were.
    """
    if cut is not None:
        for digests in (child.order_digests, child.augmentation_digests):
            digests.pop(cut[0], None)
        if cut[1] < DIGESTED_BATCHES:
            child.batch_digests.pop(cut[0], None)
    if num_batches < DIGESTED_BATCHES:
        child.first_batches = None
    for epoch in [e for e, step in child.epochs.items() if trunk.epochs.get(e) != step]:
        del child.state_digests[epoch]


def _reason(child: Node, order: int | None, batches: int | None, at_once: bool) -> str | None:
    own_state = "differ from the trunk's: the loader has state of its own"
    if order is not None and not child.is_own("order"):
        return f"the examples of epoch {order} {own_state}"
    if not child.is_own("order", "augmentation") and (batches is not None or at_once):
        return f"the batches {'after the fork' if batches is None else f'of epoch {batches}'} {own_state}"
    if child.is_own("order") and child.shared.get("order"):
        return "its order is the trunk's: the loader's order does not follow from any seed that can be set here"
    return None
