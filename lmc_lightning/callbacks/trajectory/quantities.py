"""The numbers of the way of a run under their logged names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isnan
from typing import Any

from lmc_lightning.landscape.trajectory.components import Trajectory
from lmc_lightning.landscape.trajectory.walk import Stride
from lmc_lightning.recording import Quantity, Record


def stride_quantities(stride: Stride, key: Callable[[str], str]) -> Iterator[Quantity]:
    """The way to one state, and its last step; undefined numbers are left out."""
    values = {
        "distance_from_start": stride.distance,
        "path_length": stride.path,
        "step_length": stride.length,
        "step_cosine": stride.cosine,
        "norm": stride.norm,
    }
    for name, value in values.items():
        if not isnan(value):
            yield Quantity(key(name), value)


def loss_column(run: Trajectory, records: Sequence[Record]) -> Mapping[str, list[Any]]:
    """The loss at each state of a run for the projector's table, where every one of them was visited."""
    losses = {r.step: r.evidence.get("probe_loss") for r in records if r.is_measured}
    known = [losses.get(step) for step in run.steps]
    return {} if None in known else {"loss": known}
