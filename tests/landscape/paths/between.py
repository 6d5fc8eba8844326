"""Barriers along the straight line between two states."""

from collections.abc import Sequence
from typing import Any

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.barrier import Barrier, barriers_on, line_profiles
from lmc_lightning.landscape.paths.line import NUM_POINTS, Endpoint
from lmc_lightning.landscape.paths.states import StateEvaluator


def barrier_between(
    objective: Objective,
    end_a: Endpoint,
    end_b: Endpoint,
    *,
    num_points: Any = NUM_POINTS,
    metrics: Sequence[str] | None = None,
    **policy: Any,
) -> dict[str, Barrier]:
    """The barriers by metric, with BatchNorm's statistics by ``policy``."""
    states = StateEvaluator({"": objective}, **policy)
    return barriers_on(line_profiles(states, end_a, end_b, num_points=num_points), metrics)[""]
