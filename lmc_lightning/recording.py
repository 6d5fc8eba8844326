"""Records of what was measured, and the one place that writes them: memory, table file, loggers."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from lmc_lightning.core.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Status = Literal["ok", "not_converged", "undefined", "failed"]
"""``undefined``: the number does not exist or is not finite; ``failed``: the visit raised."""


@dataclass(frozen=True)
class Quantity:
    """One number with its evidence."""

    name: str
    """The key under which it is logged."""
    value: float | None
    stderr: float | None = None
    """Over random probes; of quantities without probes, over examples."""
    stderr_data: float | None = None
    """Over examples, of quantities that have probes too."""
    unit: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    status: Status = "ok"


@dataclass(frozen=True)
class Measurement:
    """What one visit found: numbers, and what is to be drawn of them."""

    quantities: tuple[Quantity, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """What all its numbers share: probe set, mode, cost."""
    histograms: Mapping[str, np.ndarray] = field(default_factory=dict)
    figures: Mapping[str, Callable[[], "Figure"]] = field(default_factory=dict)
    """Drawn only where they are written."""

    def scalars(self) -> dict[str, float]:
        """The values and standard errors by logged key."""
        named: dict[str, float | None] = {}
        for q in self.quantities:
            named |= {q.name: q.value, f"{q.name}_stderr": q.stderr, f"{q.name}_stderr_data": q.stderr_data}
        return {k: float(v) for k, v in named.items() if v is not None and math.isfinite(v)}


@dataclass(frozen=True)
class Record:
    """A number measured at a step: a line of the table file."""

    kind: str
    step: int
    epoch: int
    name: str
    value: float | None
    stderr: float | None = None
    unit: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    status: Status = "ok"


class Recorder:
    """Keeps the records of one callback and writes them.

    Args:
        kind: what the callback measures, e.g. ``"hessian"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.records: list[Record] = []
        self.directory: Path | None = None
        self.file_name = f"{kind}.jsonl"
        self._file_error: str | None = None

    def add(self, measurement: Measurement, *, step: int, epoch: int, loggers: Iterable[Any] = ()) -> None:
        """Record a measurement of the state after ``step`` optimizer steps, and show it in ``loggers``."""
        fresh = [_record(self.kind, step, epoch, quantity, measurement.evidence) for quantity in measurement.quantities]
        self._merge(fresh)
        shown = list(loggers)
        drawn = self.directory is not None or any(_is_tensorboard(logger) for logger in shown)
        figures = {key: draw() for key, draw in measurement.figures.items()} if drawn else {}
        for logger in shown:
            log_measurement(logger, measurement, figures, step)
        for key, figure in figures.items():
            self._save_figure(figure, key, step)

    def add_failure(self, reason: str, *, step: int, epoch: int) -> None:
        """Record that the visit at ``step`` failed, and why."""
        self._merge([Record(self.kind, step, epoch, self.kind, None, evidence={"reason": reason}, status="failed")])

    def drop_after(self, step: int) -> None:
        """Forget what was measured beyond ``step``: a resumed run measures it anew."""
        self.records = [r for r in self.records if r.step <= step]

    @property
    def failures(self) -> list[Record]:
        """The failed visits."""
        return [r for r in self.records if r.status == "failed"]

    def _merge(self, fresh: list[Record]) -> None:
        replaced = {(r.step, r.name) for r in fresh}
        self.records = [r for r in self.records if (r.step, r.name) not in replaced] + fresh
        self.save()

    def save(self) -> None:
        """Write all records to ``<directory>/<file_name>``; a full disk is remembered, never raised."""
        if self.directory is None:
            return
        lines = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in self.records)
        try:
            write_atomic(self.directory / self.file_name, lines.encode())
            self._file_error = None
        except OSError as error:
            self._file_error = str(error)

    @property
    def file_error(self) -> str | None:
        """Why the table file could not be written, if it could not."""
        return self._file_error

    def _save_figure(self, figure: "Figure", key: str, step: int) -> None:
        if self.directory is None:
            return
        path = self.directory / "figures" / f"{slug(key)}_{step:06d}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except OSError as error:
            self._file_error = str(error)

    def to_pandas(self, *, wide: bool = False) -> pd.DataFrame:
        """The records as a table: a row per number, or per step with a column per key (``wide=True``)."""
        table = pd.DataFrame([asdict(r) for r in self.records], columns=list(Record.__dataclass_fields__))
        if not wide:
            return table
        measured = table[table["status"] != "failed"]
        return measured.pivot_table(index=["step", "epoch"], columns="name", values="value").reset_index()

    def state(self) -> list[dict[str, Any]]:
        """The records as plain values for a checkpoint."""
        return [asdict(r) for r in self.records]

    def load_state(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Take over the records of a checkpoint; unknown fields of other versions are ignored."""
        known = set(Record.__dataclass_fields__)
        self.records = [Record(**{k: v for k, v in entry.items() if k in known}) for entry in state]


def _record(kind: str, step: int, epoch: int, quantity: Quantity, shared: Mapping[str, Any]) -> Record:
    value = _finite(quantity.value)
    errors = {} if quantity.stderr_data is None else {"stderr_data": quantity.stderr_data}
    evidence = plain({**shared, **quantity.evidence, **errors})
    status = quantity.status if value is not None else "undefined"
    return Record(kind, step, epoch, quantity.name, value, _finite(quantity.stderr), quantity.unit, evidence, status)


def log_measurement(logger: Any, measurement: Measurement, figures: Mapping[str, "Figure"], step: int) -> None:
    """Show a measurement in one Lightning logger at x = ``step``: scalars everywhere, pictures where it can."""
    scalars = measurement.scalars()
    if scalars:
        logger.log_metrics(scalars, step=step)
    if not _is_tensorboard(logger):
        return
    for key, values in measurement.histograms.items():
        logger.experiment.add_histogram(key, values, global_step=step)
    for key, figure in figures.items():
        logger.experiment.add_figure(key, figure, global_step=step, close=False)


def _is_tensorboard(logger: Any) -> bool:
    # By name: `lightning` and `pytorch_lightning` have a class of this name each, and either may be in use.
    return any(c.__name__ == "TensorBoardLogger" for c in type(logger).__mro__)


def plain(value: Any) -> Any:
    """``value`` in Python's own types only, so that checkpoints load under ``weights_only=True`` and JSON holds it."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return _finite(value)
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def slug(text: str) -> str:
    """``text`` as a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_")
