"""Records of what was measured, and the one place that writes them: memory, table file, loggers."""

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lmc_lightning.core.files import slug, write_atomic
from lmc_lightning.loggers import (
    Embedding,
    Mesh,
    Scalars,
    log_embedding,
    log_histogram,
    log_mesh,
    log_picture,
    log_scalars,
    shows_pictures,
)
from lmc_lightning.media import Picture, draw, save_arrays, save_picture
from lmc_lightning.tables import read_table, to_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Status = Literal["ok", "not_converged", "unreliable", "undefined", "failed", "skipped"]
"""``unreliable``: the self-check says that there is no such quantity; ``undefined``: the number is not finite;
``failed``: the visit raised; ``skipped``: it would have cost more than ``max_overhead`` allows."""

NOT_MADE = ("failed", "skipped")
"""Of visits that gave no number."""

Shown = Literal["all", "value", "none"]
"""What loggers show of a number: the value with its errors, without them, or nothing; the table holds all."""


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
    log: Shown = "all"


@dataclass(frozen=True)
class Measurement:
    """What one visit found: numbers, and what is to be drawn of them."""

    quantities: tuple[Quantity, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """What all its numbers share: probe set, mode, cost."""
    histograms: Mapping[str, np.ndarray] = field(default_factory=dict)
    figures: Mapping[str, Callable[[], "Figure"]] = field(default_factory=dict)
    """Drawn only where they are written."""
    arrays: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    """Named arrays by key; each key becomes a file beside the table."""
    meshes: Mapping[str, Mesh] = field(default_factory=dict)
    embeddings: Mapping[str, Embedding] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """All values and standard errors by key."""
        shown = [replace(q, log="all") for q in self.quantities]
        scalars = replace(self, quantities=tuple(shown)).scalars()
        return {**scalars.values, **scalars.errors}

    def scalars(self, banded: Collection[str] = ()) -> Scalars:
        """What loggers show, with a band of ± 2 standard errors for some keys."""
        shown = [q for q in self.quantities if q.log != "none"]
        errors = [(q.name, q) for q in shown if q.log == "all"]
        return Scalars(
            _finite_only((q.name, q.value) for q in shown),
            _finite_only(pair for name, q in errors for pair in _errors(name, q)),
            {q.name: _band(q) for q in shown if q.name in banded and _finite(q.value) is not None},
        )


def _errors(name: str, quantity: Quantity) -> Iterator[tuple[str, float | None]]:
    yield f"{name}_stderr", quantity.stderr
    yield f"{name}_stderr_data", quantity.stderr_data


def _band(quantity: Quantity) -> tuple[float, float]:
    """Over probes and over examples, which are drawn independently; of no width where no error is known.

    There has to be a band at every step of the value: TensorBoard draws none of them otherwise.
    """
    value, *errors = (_finite(x) or 0.0 for x in (quantity.value, quantity.stderr, quantity.stderr_data))
    half = 2 * math.hypot(*errors)
    return value - half, value + half


def _finite_only(numbers: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    return {k: float(v) for k, v in numbers if v is not None and math.isfinite(v)}


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
    evidence: Mapping[str, Any] = field(default_factory=dict, repr=False)
    status: Status = "ok"
    log: Shown = "all"

    @property
    def is_measured(self) -> bool:
        """Whether the visit was made and came to its end."""
        return self.status not in NOT_MADE


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
        self.earlier_file: str | None = None
        """The table file of the run that is resumed."""
        self.banded: frozenset[str] = frozenset()
        """Keys of which a chart shows the error as a band."""
        self.drawn: set[str] = set()
        """Keys of pictures, histograms, surfaces and point clouds."""
        self.errors: list[str] = []
        """Why something could not be written or shown; each reason once."""
        self._warned: set[str] = set()

    @property
    def path(self) -> Path | None:
        """The table file, where one is written."""
        return None if self.directory is None else self.directory / self.file_name

    def add(self, measurement: Measurement, *, step: int, epoch: int, loggers: Iterable[Any] = ()) -> None:
        """Record a measurement of the state after ``step`` optimizer steps, and show it in ``loggers``."""
        fresh = [_record(self.kind, step, epoch, quantity, measurement.evidence) for quantity in measurement.quantities]
        self._merge(fresh)
        shown = list(loggers)
        pictures = self._pictures(measurement, shown)
        for logger in shown:
            with self._noted():
                _show(logger, measurement, measurement.scalars(self.banded), pictures, step)
        self.drawn |= {*pictures, *measurement.histograms, *measurement.meshes, *measurement.embeddings}
        drawn = {key: picture.data for key, picture in pictures.items()}
        counted = {key: {"values": values} for key, values in measurement.histograms.items()}
        for key, picture in pictures.items():
            self._keep(save_picture, picture, key, step)
        for key, arrays in {**drawn, **counted, **measurement.arrays}.items():
            self._keep(save_arrays, arrays, key, step)

    def _pictures(self, measurement: Measurement, loggers: list[Any]) -> dict[str, Picture]:
        """The figures, each rendered once for all who show it."""
        found: dict[str, Picture] = {}
        if self.directory is not None or any(shows_pictures(logger) for logger in loggers):
            for key, figure in measurement.figures.items():
                with self._noted():
                    found[key] = draw(figure)
        return found

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """A logger out of disk or network, a figure that cannot be drawn: the numbers and the others are kept."""
        try:
            yield
        except Exception as error:
            self._note(f"Cannot show {self.kind}: {type(error).__name__}: {error}")

    def add_failure(
        self, reason: str, *, step: int, epoch: int, name: str | None = None, status: Status = "failed"
    ) -> None:
        """Record that the visit at ``step`` failed or was skipped, or a named part of it, and why."""
        lost = Record(self.kind, step, epoch, name or self.kind, None, evidence={"reason": reason}, status=status)
        self._merge([lost])

    def drop_after(self, step: int) -> None:
        """Forget what was measured beyond ``step``: a resumed run measures it anew."""
        self.records = [r for r in self.records if r.step <= step]

    def drop_failures(self, step: int | None = None) -> None:
        """Forget that visits at ``step``, or all, failed: they are made again."""
        self.records = [r for r in self.records if r.status != "failed" or step not in (None, r.step)]

    def add_missing(self, records: Iterable[Record]) -> None:
        """Take over records that are not there yet."""
        known = {(r.step, r.name) for r in self.records}
        missing = [r for r in records if (r.step, r.name) not in known]
        self.records = sorted(self.records + missing, key=lambda r: r.step)

    def read(self, step: int) -> list[Record]:
        """The numbers up to ``step`` in the table file of the run that is resumed, by default the present one."""
        file = self.path if self.earlier_file is None else Path(self.earlier_file)
        if file is None or not file.is_file():
            return []
        try:
            found = _records(read_table(file))
        except (OSError, ValueError, TypeError) as error:
            self._note(f"Cannot read {file}: {error}")
            return []
        return [r for r in found if r.step <= step and r.status != "failed"]

    @property
    def steps(self) -> set[int]:
        """Where there are numbers."""
        return {r.step for r in self.records if r.is_measured}

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
        if self.path is not None:
            self._write(self.path, to_lines(self.state()).encode())

    def _keep(self, save: Callable[[Path, Any, str, int], None], what: Any, key: str, step: int) -> None:
        if self.directory is not None:
            try:
                save(self.directory, what, key, step)
            except OSError as error:
                self._note(f"Cannot write {slug(key)}: {error}")

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_atomic(path, lambda file: file.write(content))
        except OSError as error:
            self._note(f"Cannot write {path.name}: {error}")

    def _note(self, error: str) -> None:
        if error not in self.errors:
            self.errors.append(error)

    def warn_of_unconverged(self, measurement: Measurement, step: int, advice: str) -> None:
        """Name the quantities that have not converged, once."""
        names = [q.name for q in measurement.quantities if q.status == "not_converged"]
        if names:
            self.warn_once(advice, f"at step {step} did not converge: {', '.join(names)}. {advice}")

    def warn_once(self, reason: str, message: str | None = None) -> None:
        """Warn of ``reason`` when it comes up for the first time."""
        if reason not in self._warned:
            self._warned.add(reason)
            rank_zero_warn(f"{self.kind}: {message or reason}")

    def tell_once(self, reason: str, message: str) -> None:
        """Say what happens, as asked for, when it happens for the first time."""
        if reason not in self._warned:
            self._warned.add(reason)
            rank_zero_info(f"{self.kind} {message}")

    def latest(self) -> dict[str, float]:
        """The last value of each key: a visit that failed must not make a monitored key vanish."""
        known = sorted((r for r in self.records if r.value is not None), key=lambda r: r.step)
        return {r.name: r.value for r in known if r.value is not None}

    def to_pandas(self, *, wide: bool = False) -> pd.DataFrame:
        """The records as a table: a row per number, or per step with a column per key (``wide=True``)."""
        table = pd.DataFrame([asdict(r) for r in self.records], columns=list(Record.__dataclass_fields__))
        if not wide:
            return table
        measured = table[~table["status"].isin(NOT_MADE)]
        rows = measured.astype({"value": float}).pivot(index=["step", "epoch"], columns="name", values="value")
        return rows.reset_index().rename_axis(columns=None)

    def state(self) -> list[dict[str, Any]]:
        """The records as plain values for a checkpoint."""
        return [asdict(r) for r in self.records]

    def load_state(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Take over the records of a checkpoint; unknown fields of other versions are ignored."""
        self.records = _records(copy.deepcopy(list(state)))


def _records(entries: Iterable[Mapping[str, Any]]) -> list[Record]:
    known = set(Record.__dataclass_fields__)
    return [Record(**{k: v for k, v in entry.items() if k in known}) for entry in entries]


def _record(kind: str, step: int, epoch: int, quantity: Quantity, shared: Mapping[str, Any]) -> Record:
    value = _finite(quantity.value)
    errors = {} if quantity.stderr_data is None else {"stderr_data": quantity.stderr_data}
    evidence = plain({**shared, **quantity.evidence, **errors})
    status = quantity.status if value is not None else "undefined"
    stderr = _finite(quantity.stderr)
    return Record(kind, step, epoch, quantity.name, value, stderr, quantity.unit, evidence, status, quantity.log)


def _show(logger: Any, measurement: Measurement, scalars: Scalars, pictures: Mapping[str, Picture], step: int) -> None:
    """Show a measurement in one Lightning logger at x = ``step``: scalars everywhere, the rest where it can."""
    if scalars.values:
        log_scalars(logger, scalars, step)
    for key, values in measurement.histograms.items():
        log_histogram(logger, key, values, step)
    for key, picture in pictures.items():
        log_picture(logger, key, picture.pixels, step)
    for key, mesh in measurement.meshes.items():
        log_mesh(logger, key, mesh, step)
    for key, embedding in measurement.embeddings.items():
        log_embedding(logger, key, embedding, step)


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
