"""What may go wrong beside a training that goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

OnError = Literal["record", "raise"]


@contextmanager
def tolerated(report: Callable[[str], object], on_error: OnError) -> Iterator[None]:
    """A measurement may fail, the run may not, unless asked to; the reason is reported."""
    try:
        yield
    except Exception as error:
        if on_error == "raise":
            raise
        report(f"{type(error).__name__}: {error}")
