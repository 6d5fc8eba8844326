"""What an intervention does to the curves of a run: child − trunk, step by step, on the same batches."""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.nodes import Node
from lmc_lightning.branching.traces.curves import read_curves
from lmc_lightning.callbacks.pairs.pair import Pair, pairs_of
from lmc_lightning.core.files import write_atomic
from lmc_lightning.loggers import Chart, log_picture
from lmc_lightning.media import draw, save_arrays, save_picture
from lmc_lightning.plotting.differences import plot_effect
from lmc_lightning.plotting.style import deferred

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "run",
    "parent",
    "k1",
    "branch_step",
    "intervention",
    "quantity",
    "step",
    "trunk",
    "child",
    "difference",
    "paired",
)
"""Of :func:`paired_differences`."""

FILE = "differences.csv"


def paired_differences(family: Family) -> pd.DataFrame:
    """Child − trunk after every step of those children to which something was done at the fork.

    ``train_loss`` at step s is the loss on the batch of that step, before its update, so that the first one after the
    fork differs only if the parameters or the loss were changed; the metrics are those of the validation after step s.
    ``paired`` says whether both saw the same batches under the same dropout, so that the noise of the two cancels and
    what is left is the effect of the intervention; otherwise it is that of the noise too.

    Args:
        family: with the curves in its folder.
    """
    rows = [row for pair in _counterfactuals(family) for row in _rows(family, pair.second)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _counterfactuals(family: Family) -> list[Pair]:
    return [pair for pair in pairs_of(family, ["trunk"]) if pair.second.variant is not None]


def _rows(family: Family, child: Node) -> Iterator[dict[str, Any]]:
    trunk, own = (read_curves(family.curves_path(node)) for node in (family.trunk, child))
    common = {
        "run": child.name,
        "parent": family.trunk.name,
        "k1": child.k1,
        "branch_step": child.branch_step,
        "intervention": child.variant,
        "paired": not child.is_own("order", "augmentation", "dropout") and child.shared.get("batches") is not False,
    }
    for quantity, curve in own.items():
        for step in sorted(set(curve) & set(trunk.get(quantity, ()))):
            values = {"trunk": trunk[quantity][step], "child": curve[step]}
            difference = values["child"] - values["trunk"]
            yield {**common, "quantity": quantity, "step": step, **values, "difference": difference}


def report_differences(family: Family, trainer: Any, known: set[str]) -> None:
    """Write the differences of a family to its folder and to the trunk's loggers.

    The table has every step; of the training loss loggers get the steps at which Lightning logs.

    Args:
        family: of the trunk.
        trainer: of the trunk.
        known: the keys that loggers have; gets the others.
    """
    table = paired_differences(family)
    content = table.to_csv(index=False).encode()
    write_atomic(family.folder / FILE, lambda file: file.write(content))
    curves = {
        f"difference/{quantity}/{pair.label}": curve[
            (curve["step"] % trainer.log_every_n_steps == 0) | (quantity != "train_loss")
        ]
        for pair in _counterfactuals(family)
        if pair.second.status == "completed"
        for quantity, curve in table[table["run"] == pair.second.name].groupby("quantity")
    }
    if curves.keys() <= known:
        return
    for key in sorted(curves.keys() - known):
        known.add(key)
        for row in curves[key].itertuples():
            for logger in trainer.loggers:
                logger.log_metrics({key: row.difference}, step=int(row.step))
    for key, figure in difference_figures(table).items():
        picture = draw(figure)
        save_picture(family.folder.parent, picture, key, family.end.step)
        save_arrays(family.folder.parent, picture.data, key, family.end.step)
        for logger in trainer.loggers:
            log_picture(logger, key, picture.pixels, family.end.step)
    for logger in trainer.loggers:
        logger.save()


def difference_charts(logged: set[str], *, expected: bool) -> list[Chart]:
    """The differences of all children in one chart for each quantity.

    Args:
        logged: keys that loggers have.
        expected: whether there will be some.
    """
    known = sorted({key.split("/k1_")[0] for key in logged}) or ["difference/train_loss"] * expected
    return [Chart(f"{key.partition('/')[2]}, child − trunk", (f"{re.escape(key)}/.*",)) for key in known]


def difference_figures(table: pd.DataFrame) -> dict[str, Callable[[], "Figure"]]:
    """One figure for each quantity and intervention, by key.

    Args:
        table: from :func:`paired_differences`.
    """
    groups = table.groupby(["quantity", "intervention"])
    return {f"difference_curves/{quantity}/{name}": deferred(plot_effect, rows) for (quantity, name), rows in groups}
