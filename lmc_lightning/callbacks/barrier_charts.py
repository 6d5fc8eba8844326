"""Barriers in TensorBoard's custom scalars."""

from collections.abc import Callable, Iterable

from lmc_lightning.landscape.barrier import DEFINITIONS
from lmc_lightning.loggers import Chart


def barrier_charts(
    tag: Callable[[str], str], splits: Iterable[str], metrics: Iterable[str], definitions: Iterable[str]
) -> list[Chart]:
    """All branch points in one chart for each split and metric, and for each convention that has keys of its own.

    Args:
        tag: quantity -> regular expression of the keys that begin with it.
        splits: on which loss and error are measured.
        metrics: further ones by name.
        definitions: conventions of the barrier; the first of ``DEFINITIONS`` has no suffix.
    """
    suffixed = "|".join(DEFINITIONS[1:])
    charts = []
    for quantity in [*(f"{s}_{m}" for m in ("loss", "error") for s in splits), *metrics]:
        for definition in definitions:
            rest = rf"(?!.*/({suffixed})$).*" if definition == DEFINITIONS[0] else f".*/{definition}"
            charts.append(Chart(f"{definition} of {quantity}", (f"{tag(quantity)}/{rest}",)))
    return charts
