"""A run or a study as one static page: figures, tables, definitions, environment, costs, and what failed."""

import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from lmc_lightning.branching.lineage import versions
from lmc_lightning.core.files import write_atomic
from lmc_lightning.experiments.collect import hyperparameters, runs
from lmc_lightning.experiments.definitions import definitions
from lmc_lightning.experiments.figures import draw_study
from lmc_lightning.experiments.page import Section, details, image, note, page, preformatted, relief, table
from lmc_lightning.experiments.settings import Summary, setting_table
from lmc_lightning.experiments.tasks import Outcome, cell_folder, outcome_of
from lmc_lightning.landscape.surface.slices import load_surface
from lmc_lightning.plotting.interactive import interactive_relief, plotly_program
from lmc_lightning.recording import NOT_MADE
from lmc_lightning.tables import read_table

EMBEDDED_BYTES = 20_000_000
"""Pictures beyond that stay beside the page."""

_COSTS = ("seconds", "num_matvecs", "num_gradients", "num_losses")


def report(folder: Path | str, output: Path | str) -> Path:
    """Write the page of a run, or of a study, whose figures are drawn first.

    Pictures are part of the page, up to 20 MB together; further ones are linked where they are. With plotly installed
    (the extra ``html``) the last loss surface of each run can be turned; its program, 2 MB, is part of the page too.

    Args:
        folder: of a run, with ``lmc/*.jsonl`` in it, or of a study, with ``records``.
        output: the file.

    Raises:
        FileNotFoundError: the folder is neither.
    """
    folder, output = Path(folder), Path(output)
    pictures = _Pictures(output)
    if any((folder / "records").glob("*.json")):
        sections = [*_study(folder, pictures)]
    elif any((folder / "lmc").glob("*.jsonl")):
        sections = [*_run(folder, pictures)]
    else:
        raise FileNotFoundError(f"Expected the folder of a run, with lmc/*.jsonl, or of a study, got {folder}.")
    program = plotly_program() if pictures.num_reliefs else ""
    content = page(folder.resolve().name, sections, plotly=program).encode()
    write_atomic(output, lambda file: file.write(content))
    return output


class _Pictures:
    """Embeds PNG files until the page is large, and loss surfaces to be turned."""

    def __init__(self, output: Path) -> None:
        self.left, self.home = EMBEDDED_BYTES, output.absolute().parent
        self.num_reliefs = 0

    def __call__(self, files: Iterable[Path]) -> str:
        return "".join(self._one(file) for file in files)

    def _one(self, file: Path) -> str:
        self.left -= file.stat().st_size
        if self.left >= 0:
            return image(file.stem, content=file.read_bytes())
        return image(file.stem, source=Path(os.path.relpath(file.absolute(), self.home)).as_posix())

    def reliefs(self, folder: Path) -> str:
        """Of each loss surface of a run the last one on a plane, to be turned."""
        files = _newest((folder / "lmc" / "arrays").glob("landscape_surface_*.npz"))
        planes = {file: found for file in files if (found := load_surface(file)).ys is not None}
        if planes and find_spec("plotly") is None:
            return note("Loss surfaces can be turned here if plotly is installed: pip install 'lmc-lightning[html]'.")
        self.num_reliefs += len(planes)
        figures = (interactive_relief(found, title=f"Loss surface, {_at(file)}") for file, found in planes.items())
        return "".join(relief(figure.to_json()) for figure in figures)


# -- a run ------------------------------------------------------------------------------------------------------------


def _records(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "lmc").glob("*.jsonl"))
    return [record for file in files for record in read_table(file)]


def _run(folder: Path, pictures: _Pictures) -> Iterator[Section]:
    records = _records(folder)
    yield Section("Visits", table(_visits(records)))
    figures = sorted((folder / "lmc" / "figures").glob("*.png"))
    newest = _newest(figures)
    older = [figure for figure in figures if figure not in newest]
    shown = pictures.reliefs(folder) + pictures(newest)
    if older:
        shown += details(f"{len(older)} of earlier visits", pictures(older))
    if shown:
        yield Section("Figures", shown)
    yield from _common(records)
    texts = [(name, folder / name) for name in ("config.yaml", "hparams.yaml") if (folder / name).is_file()]
    settings = "".join(details(name, preformatted(path.read_text("utf-8"))) for name, path in texts)
    if settings:
        yield Section("Configuration", settings)
    here = pd.DataFrame([versions()])
    yield Section("Environment", note("Of the process that wrote this page.") + table(here))


def _visits(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A row a visit, a column a number; those of children and branch points have the branch point in their names."""
    made = [r for r in records if r["value"] is not None and r["status"] not in NOT_MADE and r.get("log") != "none"]
    rows = pd.DataFrame(made, columns=["epoch", "step", "name", "value"])
    wide = rows.pivot_table(index=["epoch", "step"], columns="name", values="value", aggfunc="last", sort=False)
    return wide.sort_index().reset_index().rename_axis(columns=None)


def _newest(figures: Iterable[Path]) -> list[Path]:
    """Of figures ``<name>_<step>.png`` the last one of each name."""
    return [*{figure.stem.rpartition("_")[0]: figure for figure in sorted(figures)}.values()]


def _at(file: Path) -> str:
    return f"step {int(file.stem.rpartition('_')[2])}"


def _common(records: list[dict[str, Any]]) -> Iterator[Section]:
    lost = [r for r in records if r["status"] in NOT_MADE]
    if lost:
        rows = [{k: r[k] for k in ("kind", "epoch", "step", "status")} | {"reason": _reason(r)} for r in lost]
        yield Section("Failed and skipped visits", table(pd.DataFrame(rows)))
    if costs := _costs(records):
        yield Section("Costs of measuring", table(pd.DataFrame(costs)))
    families = {str(r["name"]).partition("/")[0] for r in records}
    if defined := definitions(families):
        yield Section("Definitions", table(pd.DataFrame(defined, columns=["key", "definition"])))


def _reason(record: Mapping[str, Any]) -> str:
    return str(record.get("evidence", {}).get("reason", ""))


def _costs(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By kind; the records of one visit all carry what it has cost."""
    visits: dict[tuple[str, str, int], dict[str, float]] = {}
    for r in records:
        found = {name: r["evidence"][name] for name in _COSTS if isinstance(r["evidence"].get(name), int | float)}
        if found:
            visits.setdefault((r["kind"], str(r.get("cell", "")), r["step"]), {}).update(found)
    rows: dict[str, dict[str, Any]] = {}
    for (kind, *_), found in visits.items():
        row = rows.setdefault(kind, {"kind": kind, "visits": 0})
        row["visits"] += 1
        for name, value in found.items():
            row[name] = row.get(name, 0) + value
    return [*rows.values()]


# -- a study ----------------------------------------------------------------------------------------------------------


def _study(folder: Path, pictures: _Pictures) -> Iterator[Section]:
    outcomes = [o for f in sorted((folder / "records").glob("*.json")) if (o := outcome_of(folder, f.stem)) is not None]
    yield Section("Tasks", table(_tasks(outcomes)))
    summary = Summary(folder)
    found = summary.table
    draw_study(folder, summary)
    if (found["kind"] == "cell").any():
        wide = runs(found).dropna(axis=1, how="all")
        yield Section("Runs", table(wide.sort_values([c for c in _varied(found) if c in wide], kind="stable")))
    if (pairs := found[(found["kind"] == "pair") & found["value"].notna()]).size:
        grouped = pairs.assign(value=pairs["value"].astype(float)).groupby("name", sort=False)["value"]
        spread = grouped.agg(["mean", "std", "min", "max", "count"]).reset_index()
        yield Section("Pairs of runs", table(spread))
    if summary.means.size:
        yield Section("Means over seeds, with standard errors", table(setting_table(summary.means)))
    if summary.correlations.size:
        yield Section("Correlations over runs", table(summary.correlations))
    own = sorted({*folder.glob("*.png"), *(folder / "figures").glob("*.png")})
    cells = [o for o in outcomes if o.kind == "cell"]
    shown = "".join(_figures_of(folder, cell, pictures) for cell in cells)
    if own or shown:
        yield Section("Figures", pictures(own) + shown)
    failed = [o for o in outcomes if o.status == "failed"]
    if failed:
        rows = [{"task": o.id, "kind": o.kind, **o.hyperparameters, "reason": o.reason} for o in failed]
        yield Section("Failed tasks", table(pd.DataFrame(rows)))
    yield from _common([{**r, "cell": c.id} for c in cells for r in _records(cell_folder(folder, c.id))])
    yield Section("Environment", table(_environment(outcomes)))


def _varied(found: pd.DataFrame) -> list[str]:
    return [name for name in hyperparameters(found) if found[name].map(type).nunique() == 1]


def _tasks(outcomes: Iterable[Outcome]) -> pd.DataFrame:
    rows = pd.DataFrame([{"kind": o.kind, "status": o.status, "seconds": o.seconds} for o in outcomes])
    by = rows.groupby(["kind", "status"], sort=False)["seconds"]
    return by.agg(tasks="count", seconds="sum", seconds_each="mean").reset_index()


def _figures_of(folder: Path, cell: Outcome, pictures: _Pictures) -> str:
    home = cell_folder(folder, cell.id)
    shown = pictures.reliefs(home) + pictures(_newest((home / "lmc" / "figures").glob("*.png")))
    setting = ", ".join(f"{name}={value}" for name, value in cell.hyperparameters.items())
    return details(f"{cell.id}  {setting}", shown) if shown else ""


def _environment(outcomes: Iterable[Outcome]) -> pd.DataFrame:
    rows = [
        {**o.about.get("versions", {}), "device": o.about.get("device"), "threads": o.about.get("threads")}
        for o in outcomes
    ]
    return pd.DataFrame(rows).value_counts(dropna=False).rename("tasks").reset_index()
