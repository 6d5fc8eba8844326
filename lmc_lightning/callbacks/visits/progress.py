"""How far a long visit is, shown inside Lightning's own progress bar."""

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

DELAY = 3.0
"""Visits that take less are not shown [s]."""
INTERVAL = 0.2
"""Between two changes of what is shown [s]."""


class _Line(Protocol):
    """A piece of a terminal that a text can be shown on for a while."""

    def show(self, text: str) -> None: ...

    def restore(self) -> None: ...


class ProgressDisplay:
    """``progress(12, 64, "products")`` shows "HessianSpectrum 12/64 products" in the trainer's bar, until the end.

    Shows nothing before 3 s have passed, off a terminal, without a trainer, or without one of Lightning's two bars.

    Args:
        name: of what is measured.
        trainer: whose progress bar is used.
        clock: seconds.
    """

    def __init__(self, name: str, trainer: Any | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._name, self._clock = name, clock
        self._bar = getattr(trainer, "progress_bar_callback", None)
        self._line: _Line | None = None
        self._next = clock() + DELAY

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(self, *exception: object) -> None:
        self._attempt(lambda: self._line.restore() if self._line else None)

    def __call__(self, done: int, total: int, text: str) -> None:
        """Tell that ``done`` of ``total`` are done, of what ``text`` names."""
        if self._bar is None or self._clock() < self._next:
            return
        self._next = self._clock() + INTERVAL
        self._attempt(lambda: self._show(f"{self._name} {done}/{total} {text}"))

    def _show(self, text: str) -> None:
        if self._line is None:
            self._line = _line_in(self._bar)
        if self._line is None:
            self._bar = None
        else:
            self._line.show(text)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:  # of a bar that somebody has made otherwise: no reason to fail a measurement
            self._bar = self._line = None


def _line_in(bar: Any) -> _Line | None:
    # By name: `lightning` and `pytorch_lightning` have classes of these names each, and either may be in use.
    names = {c.__name__ for c in type(bar).__mro__}
    if not getattr(bar, "is_enabled", False):
        return None
    if "TQDMProgressBar" in names:
        return _TqdmLine(bar) if sys.stdout.isatty() else None
    return _rich_line(bar) if "RichProgressBar" in names else None


class _TqdmLine:
    """The description of the bar of the epoch; a line of its own while there is none."""

    def __init__(self, bar: Any) -> None:
        try:
            self._tqdm = bar.train_progress_bar
        except TypeError:  # not set yet
            self._tqdm = None
        self._is_own = self._tqdm is None or self._tqdm.disable
        if self._is_own:
            position = 2 * bar.process_position
            self._tqdm = Tqdm(bar_format="{desc}", position=position, leave=False, dynamic_ncols=True, file=sys.stdout)
        self._before = self._tqdm.desc

    def show(self, text: str) -> None:
        self._tqdm.set_description_str(text if self._is_own else f"{text}: ")

    def restore(self) -> None:
        if self._is_own:
            self._tqdm.close()
        else:
            self._tqdm.set_description_str(self._before)


def _rich_line(bar: Any) -> _Line | None:
    from rich import get_console

    progress = bar.progress
    console = get_console() if progress is None else progress.console
    if not console.is_terminal:
        return None
    tasks = [] if progress is None or not progress.live.is_started else progress.tasks
    known = [bar.train_progress_bar_id, bar.val_sanity_progress_bar_id]
    task = next((t for i in known for t in tasks if t.id == i), None)
    return _RichLine(progress, task) if task else _OwnRichLine(console)


class _RichLine:
    """The description of a task that Lightning shows."""

    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task.id
        self._before = {"description": task.description, "visible": task.visible}

    def show(self, text: str) -> None:
        self._progress.update(self._task, description=text, visible=True, refresh=True)

    def restore(self) -> None:
        self._progress.update(self._task, **self._before, refresh=True)


class _OwnRichLine:
    """A line for the time before Lightning has begun to show anything."""

    def __init__(self, console: Any) -> None:
        from rich.progress import Progress, TextColumn

        column = TextColumn("{task.description}")
        self._progress = Progress(column, console=console, transient=True, auto_refresh=False)
        self._progress.start()
        self._task = self._progress.add_task("")

    def show(self, text: str) -> None:
        self._progress.update(self._task, description=text, refresh=True)

    def restore(self) -> None:
        self._progress.stop()
