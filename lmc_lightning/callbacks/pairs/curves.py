"""Two states of a network joined by a trained curve: what is logged of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from lmc_lightning.callbacks.pairs.comparison import Comparison, Finding, Pairing
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.random_vectors import derive_seed
from lmc_lightning.landscape.paths.barrier import Barrier
from lmc_lightning.landscape.paths.connections import LEVELS, Connection, connection
from lmc_lightning.landscape.paths.curves import CurveTraining
from lmc_lightning.landscape.paths.line import Endpoint
from lmc_lightning.types import Progress

FAMILY = "path"


@dataclass(frozen=True, kw_only=True)
class CurvePairing(Pairing):
    """What was found along a curve."""

    lines: Mapping[str, Barrier]
    """Barriers of the straight line, by the names of those of the curve."""


@dataclass(frozen=True, kw_only=True)
class CurveComparison(Comparison):
    """Pairs of states compared by a curve that is trained between them."""

    objective: Objective
    """What curves are trained on."""
    training: CurveTraining
    seed: int
    progress: Progress

    def between(self, end_a: Endpoint, end_b: Endpoint) -> CurvePairing:
        """Train the curve from A (t = 0) to B (t = 1), with the same random numbers for every pair."""
        found = connection(
            self.states,
            self.objective,
            end_a,
            end_b,
            self.training,
            generator=torch.Generator().manual_seed(derive_seed(self.seed, "curve")),
            num_points=self.num_points,
            progress=self.progress,
        )
        barriers, lines = self._named(found.on_curve), self._named(found.on_line)
        findings = [*self._of_curve(found, barriers, lines), *self._of_path(found)]
        return CurvePairing(barriers, findings, lines=lines)

    def _of_curve(
        self, found: Connection, barriers: Mapping[str, Barrier], lines: Mapping[str, Barrier]
    ) -> Iterator[Finding]:
        about = _about(found)
        for name, barrier in barriers.items():
            for finding in self._of_barrier(name, barrier, None):
                yield replace(finding, family=FAMILY, evidence={**finding.evidence, **about})
            common = {**self._data(barrier.split), "metric": barrier.metric, **about}
            along = found.levels[barrier.split][barrier.metric]
            for level in LEVELS:
                evidence = {**common, "definition": level}
                yield Finding(FAMILY, name, getattr(along, level), along.stderr_data[level], level, evidence)
            line = lines[name]
            evidence = {**common, "definition": "line", "signed_deviation": line.signed_deviation}
            yield Finding(FAMILY, name, line.barrier, line.stderr_data["barrier"], "line", evidence)

    def _of_path(self, found: Connection) -> Iterator[Finding]:
        curve, line = found.curve, found.line_length
        evidence = _about(found)
        yield Finding(FAMILY, "length", curve.length, evidence={**evidence, "definition": "length"})
        if line > 0:
            ratio = {**evidence, "definition": "length_ratio"}
            yield Finding(FAMILY, "length_ratio", curve.length / line, evidence=ratio)
        if len(curve.losses):
            trained = {**evidence, "definition": "training_loss", "losses": curve.losses.tolist()}
            yield Finding(FAMILY, "training_loss", float(curve.losses[-1]), evidence=trained)


def _about(found: Connection) -> dict[str, object]:
    """The evidence of every number of a curve; gradients are of all the examples that it is trained on."""
    curve = found.curve
    common = {"path": curve.kind, "num_bends": curve.num_bends, "diverged": curve.diverged}
    return {**common, "num_gradients": len(curve.losses)}
