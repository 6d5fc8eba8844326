"""Numbers of pairs of states in TensorBoard's custom scalars."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields

from lmc_lightning.callbacks.pairs.comparison import Extra
from lmc_lightning.landscape.paths.barrier import DEFINITIONS
from lmc_lightning.landscape.paths.connections import LEVELS
from lmc_lightning.landscape.similarity.distances import ParameterDistance, PredictionDistance
from lmc_lightning.loggers import Chart

Tag = Callable[..., str]
"""Quantity and family -> regular expression of the keys that begin with them."""


def quantities_of(splits: Iterable[str], metrics: Iterable[str]) -> list[str]:
    """Loss and error on each split, and named metrics, as they stand in keys."""
    return [*(f"{split}_{metric}" for metric in ("loss", "error") for split in splits), *metrics]


def barrier_charts(tag: Tag, quantities: Iterable[str], definitions: Sequence[str], suffixes: str = "") -> list[Chart]:
    """All pairs in one chart for each quantity and convention of the barrier that has keys of its own.

    Args:
        tag: of the callback.
        quantities: from :func:`quantities_of`.
        definitions: conventions; the first of ``DEFINITIONS`` has no suffix.
        suffixes: further ones, ``"max|mean"``, of what is no barrier.
    """
    suffixed = "|".join([*DEFINITIONS[1:], *filter(None, [suffixes])])
    return [
        Chart(
            f"{definition} of {quantity}",
            (
                f"{tag(re.escape(quantity))}/"
                + (rf"(?!.*/({suffixed})$).*" if definition == DEFINITIONS[0] else f".*/{definition}"),
            ),
        )
        for quantity in quantities
        for definition in definitions
    ]


def extra_charts(
    tag: Tag, quantities: Iterable[str], splits: Iterable[str], extras: Sequence[Extra]
) -> Iterator[Chart]:
    """All pairs in one chart for each number that an extra adds."""
    if "distances" in extras:
        for name in (f.name for f in fields(ParameterDistance)):
            yield Chart(f"distance of parameters: {name}", (f"{tag(name, 'distance')}/.*",))
        for name in (f.name for f in fields(PredictionDistance)):
            of_splits = f"({'|'.join(splits)})_{name}"
            yield Chart(f"predictions: {name.replace('_', ' ')}", (f"{tag(of_splits, 'distance')}/.*",))
    for extra, family, title in (("soup", "soup_gain", "gain of the average"), ("layers", "barrier_layer", "modules")):
        if extra in extras:
            for quantity in quantities:
                yield Chart(f"{title}: {quantity}", (f"{tag(re.escape(quantity), family)}/.*",))


def curve_charts(tag: Tag, quantities: Sequence[str], definitions: Sequence[str]) -> Iterator[Chart]:
    """Barriers of curves and lines, levels on the curves, and their lengths, of all pairs in one chart each."""
    levels = "|".join(LEVELS)
    yield from barrier_charts(tag, quantities, definitions, levels)
    for quantity in quantities:
        yield Chart(f"{quantity} on the curve", (f"{tag(re.escape(quantity))}/.*/({levels})",))
    for name in ("length", "length_ratio", "training_loss"):
        yield Chart(f"{name.replace('_', ' ')} of the curve", (f"{tag(name)}/.*",))
