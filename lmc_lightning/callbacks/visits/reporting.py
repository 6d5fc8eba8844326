"""What the measuring callbacks of a run show together: one layout of charts, and one report at the end."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lmc_lightning.callbacks.visits.run_report import run_report
from lmc_lightning.core.files import write_atomic
from lmc_lightning.loggers import Band, Chart, Layout, log_hparams, log_layout, log_text
from lmc_lightning.recording import NOT_MADE, Record, Recorder
from lmc_lightning.schedule import Schedule

HEADLINES = (
    "hessian/lambda_max",
    "hessian/trace",
    "hessian/stability",
    "sharpness/worst_case",
    "sharpness/gradient_norm",
    "trajectory/distance_from_start",
    "llc/llc",
    r"barrier/(val|test)_error/k1_(step_)?\d+",
)
"""Keys of the numbers that stand beside the hyper-parameters of a run. All would be too many columns to look at."""

FILE, TAG = "report.md", "report/measured"


@runtime_checkable
class HasCharts(Protocol):
    """A callback whose numbers belong in charts."""

    kind: str
    name: str | None

    @property
    def logged(self) -> set[str]:
        """Keys of all numbers so far."""

    def charts(self) -> Sequence[Chart | Band]:
        """Which of them belong together."""


class Reporting(Callback):
    """Has the first of the measuring callbacks speak for all of a run."""

    kind: str
    name: str | None
    schedule: Schedule
    num_examples: int | None
    _recorder: Recorder
    _step: int

    def __repr__(self) -> str:
        named = f"num_examples={self.num_examples}" + (f", name={self.name!r}" if self.name else "")
        visits = len({r.step for r in self.results if r.is_measured})
        lost = ((status, sum(r.status == status for r in self.results)) for status in NOT_MADE)
        counts = [f"{visits} visit{'s' * (visits != 1)}", *(f"{count} {status}" for status, count in lost if count)]
        return f"{type(self).__name__}({self.schedule.argument}, {named}): {', '.join(counts)}"

    @property
    def results(self) -> list[Record]:
        """All records so far."""
        return self._recorder.records

    @property
    def failures(self) -> list[Record]:
        """Visits that failed, with their reasons."""
        return self._recorder.failures

    def to_pandas(self, *, wide: bool = False) -> pd.DataFrame:
        """The records as a table: a row per number, or per step with a column per key (``wide=True``)."""
        return self._recorder.to_pandas(wide=wide)

    @property
    def logged(self) -> set[str]:
        """Keys of all numbers so far."""
        return {r.name for r in self.results if r.is_measured}

    @property
    def drawn(self) -> set[str]:
        """Keys of all pictures so far, of histograms, surfaces and point clouds."""
        return self._recorder.drawn

    def charts(self) -> Sequence[Chart | Band]:
        """What TensorBoard's tab of custom scalars shows of this callback; of the keys of bands it gets the ends."""
        return ()

    def key(self, quantity: str) -> str:
        """The logged name of a quantity."""
        return f"{self.kind}/{quantity}" + (f"/{self.name}" if self.name else "")

    def tag(self, quantity: str, family: str | None = None) -> str:
        """The keys of a regular expression of quantities, for a :class:`~lmc_lightning.loggers.Chart`.

        Args:
            quantity: what they have after their first segment.
            family: the first segment, where it is not the callback's own.
        """
        return f"{family or self.kind}/{quantity}" + (f"/{re.escape(self.name)}" if self.name else "")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say which numbers belong together."""
        self._recorder.banded = frozenset(chart.key for chart in self.charts() if isinstance(chart, Band))
        if self is _reporting(trainer)[0]:
            _show_layout(trainer, layout_of(trainer.callbacks))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Tell what was measured, when children have been compared too."""
        ours = _reporting(trainer) if stage == "fit" else [None]
        if self is not ours[0] or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        complete, found = layout_of(trainer.callbacks), layout_of(trainer.callbacks, measured=True)
        if found != complete:
            _show_layout(trainer, found)
        try:
            text = run_report(ours)
            if self._recorder.directory is not None:
                write_atomic(self._recorder.directory / FILE, lambda file: file.write(text.encode()))
            logged = {key for callback in ours for key in callback.logged}
            metrics = [*sorted(trainer.logged_metrics), *chosen(logged, HEADLINES)]
            seen = (record.step for callback in ours for record in callback.results)
            last = max([self._step, *seen])  # a family may have been trained before
            for logger in trainer.loggers:
                log_text(logger, TAG, text, last)
                log_hparams(logger, metrics)
        except OSError as error:  # the recorders have warned of a full disk
            rank_zero_info(f"The report of the run cannot be written: {error}")
        except Exception as error:  # a logger out of network, after a run that has succeeded
            rank_zero_warn(f"The report of the run cannot be shown: {type(error).__name__}: {error}")


def chosen(keys: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """The keys that are wanted, in the order of the regular expressions that say so."""
    found = sorted(keys)
    return [key for pattern in wanted for key in found if re.fullmatch(pattern, key)]


def layout_of(callbacks: Iterable[Any], *, measured: bool = False) -> Layout:
    """The charts of all callbacks that have some, under their kinds; with ``measured``, only those with numbers."""
    layout: dict[str, list[Chart | Band]] = {}
    for callback in (c for c in callbacks if isinstance(c, HasCharts)):
        charts = [chart for chart in callback.charts() if not measured or _has(chart, callback.logged)]
        title = f"{{}} ({callback.name})" if callback.name else "{}"
        layout.setdefault(callback.kind, []).extend(replace(c, title=title.format(c.title)) for c in charts)
    return layout


def _has(chart: Chart | Band, names: set[str]) -> bool:
    if isinstance(chart, Band):
        return chart.key in names
    return any(re.fullmatch(tag, name) for tag in chart.tags for name in names)


def _reporting(trainer: Any) -> list[Reporting]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Reporting)]


def _show_layout(trainer: Any, layout: Layout) -> None:
    for logger in trainer.loggers if trainer.is_global_zero and not trainer.fast_dev_run else ():
        try:
            log_layout(logger, layout)
        except Exception as error:
            rank_zero_warn(f"Charts cannot be laid out in {type(logger).__name__}: {error}")
