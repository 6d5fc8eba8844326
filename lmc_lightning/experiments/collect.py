"""All that a study has found, as one tidy table, and as one row a run."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lmc_lightning.core.files import write_atomic
from lmc_lightning.experiments.work.tasks import Outcome, cell_folder, outcome_of
from lmc_lightning.tables import read_table

OWN = ("task", "kind", "cell", "second_cell", "child", "task_status", "seconds", "device")
"""Columns of a task, before those of its hyper-parameters."""
NUMBER = (
    "name",
    "step",
    "epoch",
    "value",
    "stderr",
    "stderr_data",
    "unit",
    "status",
    "split",
    "definition",
    "num_examples",
)
"""Columns of a number, after them."""


def hyperparameters(table: pd.DataFrame) -> list[str]:
    """The columns of a table that are hyper-parameters, in the order of the study's file; the seed is one of them."""
    return [c for c in table.columns if c not in (*OWN, *NUMBER) and not c.startswith("version_")]


def collect(folder: Path | str) -> pd.DataFrame:
    """One row for each number of a study: of runs, of their callbacks at every visit, of children and of pairs.

    Columns are those of ``OWN``, the hyper-parameters, ``version_<package>``, and those of ``NUMBER``. Tasks that
    failed have a row without a number.

    Args:
        folder: of the study.

    Raises:
        FileNotFoundError: there are no records in it.
    """
    folder = Path(folder)
    files = sorted((folder / "records").glob("*.json"))
    if not files:
        raise FileNotFoundError(f"Expected the folder of a study, with records in it, got {folder}.")
    outcomes = [outcome_of(folder, file.stem) for file in files]
    known = [outcome for outcome in outcomes if outcome is not None]
    names = list(dict.fromkeys(name for outcome in known for name in outcome.hyperparameters))
    packages = list(dict.fromkeys(f"version_{p}" for o in known for p in o.about.get("versions", {})))
    rows = [row for outcome in known for row in _rows(outcome, folder)]
    return pd.DataFrame(rows, columns=[*OWN, *names, *packages, *NUMBER])


def _rows(outcome: Outcome, folder: Path) -> Iterator[dict[str, Any]]:
    about = outcome.about
    common: dict[str, Any] = {name: _cell_value(v) for name, v in outcome.hyperparameters.items()}
    common |= {f"version_{package}": version for package, version in about.get("versions", {}).items()}
    common |= {
        "task": outcome.id,
        "kind": outcome.kind,
        "cell": outcome.cells[0],
        "second_cell": outcome.cells[1] if len(outcome.cells) > 1 else None,
        "child": about.get("child"),
        "task_status": outcome.status,
        "seconds": outcome.seconds,
        "device": about.get("device"),
    }
    if outcome.status != "completed":
        yield {**common, "status": "failed"}
        return
    step, epoch = outcome.metrics.get("steps"), outcome.metrics.get("epochs")
    for name, value in outcome.metrics.items() if outcome.kind != "family" else ():
        yield {**common, "name": name, "value": value, "step": step, "epoch": epoch, "status": "ok"}
    if outcome.kind in ("cell", "family"):
        for record in records(cell_folder(folder, outcome.cells[0])):
            evidence = record.pop("evidence", {})
            if ("later_epoch" in evidence) != (outcome.kind == "family"):
                continue
            extra = {"stderr_data": evidence.get("stderr_data"), "split": evidence.get("eval_split")}
            extra |= {"definition": evidence.get("definition"), "num_examples": evidence.get("num_examples")}
            yield {**common, **{k: v for k, v in record.items() if k in NUMBER}, **extra, "child": evidence.get("run")}


def records(home: Path) -> list[dict[str, Any]]:
    """What the callbacks of a run have recorded, from its folder."""
    return [record for file in sorted((home / "lmc").glob("*.jsonl")) for record in read_table(file)]


def _cell_value(value: Any) -> Any:
    """Lists and mappings as text, so that tables can be grouped by them."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def runs(table: pd.DataFrame, epochs: Sequence[int] | None = None) -> pd.DataFrame:
    """One row for each training run, with its hyper-parameters and a column for each number.

    Args:
        table: from :func:`collect`.
        epochs: of the visits of callbacks, in columns ``<name>@<epoch>``; None: the last visit, in columns ``<name>``.
    """
    cells = table[(table["kind"] == "cell") & table["value"].notna()]
    if epochs is None:
        chosen = cells.sort_values("step", kind="stable").drop_duplicates(["cell", "name"], keep="last")
    else:
        chosen = cells[cells["epoch"].isin(epochs)]
        chosen = chosen.assign(name=chosen["name"] + "@" + chosen["epoch"].astype(int).astype(str))
    wide = chosen.pivot_table(index="cell", columns="name", values="value", aggfunc="last")
    about = table[table["kind"] == "cell"].drop_duplicates("cell").set_index("cell")
    return about[[*hyperparameters(table), "task_status", "seconds"]].join(wide).reset_index().rename_axis(columns=None)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """A table as CSV, or as Parquet where the name ends so.

    Raises:
        ModuleNotFoundError: Parquet without pyarrow.
    """
    if path.suffix != ".parquet":
        content = table.to_csv(index=False).encode()
        write_atomic(path, lambda file: file.write(content))
        return
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Parquet needs pyarrow (pip install pyarrow); a name in .csv does not.") from error
    # A column of numbers and texts, as a hyper-parameter may be, has one type there.
    mixed = [c for c in table.columns if table[c].map(type).nunique() > 1 and table[c].dtype == object]
    plain = table.astype(dict.fromkeys(mixed, "string"))
    write_atomic(path, lambda file: plain.to_parquet(file, index=False))
