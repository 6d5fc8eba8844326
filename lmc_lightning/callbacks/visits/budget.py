"""How much of the training time a callback may take: which visits it makes, and with how many random probes."""

from collections.abc import Mapping
from typing import Any

import torch

from lmc_lightning.core.collective import Collective

EFFORTS = (1.0, 0.5, 0.25)
"""Shares of the usual random probes with which a visit may be made."""


class Budget:
    """Whether a visit is made in full, with fewer random probes, or not at all, by the time that the last one took.

    The first visit is made. A later one is skipped if the callback would then have taken more than its share of the
    training time so far; after a skipped visit, fewer probes will do. Neither changes the probe set.

    Args:
        max_overhead: time of this callback's visits over training time, at most; ``None`` for no limit.
    """

    def __init__(self, max_overhead: float | None) -> None:
        self.max_overhead = max_overhead
        self.training = 0.0
        """Training time so far, that of all measuring callbacks taken off [s]."""
        self.spent = 0.0
        """Time of this callback's visits so far [s]."""
        self._began = (0.0, 0.0, 0.0)
        self._last: tuple[float, float] | None = None
        self._costs: dict[float, float] = {}
        self._has_skipped = False

    @property
    def reason(self) -> str:
        """Why a visit is skipped."""
        return f"It would have taken this callback beyond max_overhead={self.max_overhead:g} of the training time."

    def start(self, now: float, measuring: float) -> None:
        """Training begins or is resumed at time ``now``, when all callbacks have taken ``measuring`` seconds."""
        self._began = now, measuring, self.training

    def effort(self, now: float, measuring: float, least: float, collective: Collective) -> float:
        """The share of its usual probes that a visit due now may spend, 0 for none at all; the same on all processes.

        Args:
            now: the time [s].
            measuring: what all callbacks have taken so far [s].
            least: smallest effort with which a visit is worth making.
            collective: the processes, of which the slowest decides.
        """
        if self.max_overhead is None:
            return 1.0
        began, before, earlier = self._began
        self.training = earlier + (now - began) - (measuring - before)
        own = torch.tensor([self._affordable(least)], dtype=torch.float64)
        return float(collective.gather(lambda: own).min())

    def _affordable(self, least: float) -> float:
        left = (self.max_overhead or 0.0) * self.training - self.spent
        efforts = [e for e in EFFORTS if e >= least] if self._has_skipped else EFFORTS[:1]
        return next((e for e in efforts if self._expected(e) <= left), 0.0) if self._last else 1.0

    def _expected(self, effort: float) -> float:
        assert self._last is not None
        last, seconds = self._last
        # Part of the cost does not depend on the effort, so that scaling is too high upwards and too low downwards.
        scaled = seconds * effort / last
        known = self._costs.get(effort, scaled)
        return min(scaled, known) if effort >= last else known

    def skip(self) -> None:
        """Note that a visit is not made."""
        self._has_skipped = True

    def spend(self, effort: float, seconds: float) -> None:
        """Note what a visit took."""
        self.spent += seconds
        self._last = effort, seconds
        self._costs[effort] = seconds
        self._has_skipped = False

    def state(self) -> dict[str, Any]:
        """What a resumed run starts from, as plain values; nothing without a limit."""
        if self.max_overhead is None:
            return {}
        last = None if self._last is None else list(self._last)
        return {"training": self.training, "spent": self.spent, "last": last, "has_skipped": self._has_skipped}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from the times of the run that is resumed."""
        if state:
            self.training, self.spent = float(state["training"]), float(state["spent"])
            self._last = None if state["last"] is None else (float(state["last"][0]), float(state["last"][1]))
            self._has_skipped = bool(state["has_skipped"])
