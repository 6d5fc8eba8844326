"""A long visit says how far it is, in the bar that Lightning shows, and nowhere else."""

import io
import re
from contextlib import redirect_stdout
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from lmc_lightning.callbacks.visits.progress import DELAY, ProgressDisplay
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.recording import Measurement
from tests.zoo.harness import Run, Setting, train
from tests.zoo.module import examples
from tests.zoo.outputs import Plain
from tests.zoo.probe import Probe


class Terminal(io.StringIO):
    """Takes all that is shown, and says that it is watched."""

    def isatty(self) -> bool:
        return True

    def shown(self) -> list[str]:
        """What stood in a line, one after the other, without what follows the description."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())
        lines = [line.split("|")[0].split("━")[0].strip() for line in re.split(r"[\r\n]", text)]
        return [line for line in lines if line]


class Slow(Probe):
    """Takes a second for each of six products."""

    now = 0.0
    seconds_a_product = 1.0

    def __init__(self, **options: Any) -> None:
        super().__init__(on_error="raise", probe_dataloader=[examples(8)], steps=[0, 2], **options)
        self.clock = lambda: self.now  # type: ignore[method-assign]

    def measure(self, visit: Visit) -> Measurement:
        for done in range(1, 7):
            self.now += self.seconds_a_product
            visit.progress(done, 6, "products")
        return super().measure(visit)


SEEN = [f"Slow {done}/6 products" for done in (3, 4, 5, 6)]
"""From the third second on."""


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    return Terminal()


def run(slow: Slow, terminal: Terminal, *bars: Any, **options: Any) -> Run:
    # Our callback comes before the bar, as the trainer appends its own.
    with redirect_stdout(terminal):
        return train(
            Setting(Plain), [slow, *bars], **{"enable_progress_bar": bool(bars), "num_sanity_val_steps": 0, **options}
        )


def test_a_long_visit_is_shown_and_then_the_epoch_again(terminal: Terminal) -> None:
    bar = TQDMProgressBar()
    run(Slow(), terminal, bar)
    shown = [line.split(":")[0] for line in terminal.shown()]
    assert shown[:4] == SEEN  # before the first epoch has a bar
    assert shown[4] == "Training"
    first = shown.index(SEEN[0], 4)
    assert shown[first - 1] == "Epoch 0"
    assert shown[first : first + 4] == SEEN
    assert set(shown[first + 4 :]) == {"Epoch 0", "Epoch 1"} | {line for line in shown if line.startswith("Validation")}
    assert bar.train_progress_bar.desc == "Epoch 1: "


@pytest.mark.parametrize("num_sanity_val_steps", [0, 1])
def test_a_long_visit_is_shown_by_rich_too(terminal: Terminal, num_sanity_val_steps: int) -> None:
    pytest.importorskip("rich").reconfigure(file=terminal, width=100, force_terminal=True)
    bar = RichProgressBar(console_kwargs={"file": terminal, "width": 100})
    run(Slow(), terminal, bar, num_sanity_val_steps=num_sanity_val_steps)
    lines = [line.split("/1")[0] for line in terminal.shown()]  # rich also draws by a clock of its own
    shown = [line for line, _ in groupby(line for line in lines if line != "Sanity Checking")]
    assert shown[:4] == SEEN  # before the first epoch has a bar
    assert shown[4] == "Epoch 0"
    again = shown.index(SEEN[0], 4)
    assert shown[again - 1] == "Epoch 0"
    assert shown[again : again + 4] == SEEN
    assert shown[again + 4] == "Epoch 0"
    assert shown[-1] == "Epoch 1"


def test_the_training_is_the_same(terminal: Terminal) -> None:
    beside = run(Slow(), terminal, TQDMProgressBar())
    assert SEEN[0] in terminal.getvalue()
    assert beside.differs_from(train(Setting(Plain), num_sanity_val_steps=0)) == []


class Quick(Slow):
    seconds_a_product = DELAY / 7


@pytest.mark.parametrize(
    ("cls", "bars", "is_terminal"),
    [
        (Quick, lambda: [TQDMProgressBar()], True),
        (Slow, lambda: [TQDMProgressBar()], False),
        (Slow, lambda: [TQDMProgressBar(refresh_rate=0)], True),
        (Slow, lambda: [ProgressBar()], True),
        (Slow, list, True),
    ],
    ids=["quick", "no terminal", "switched off", "another bar", "no bar"],
)
def test_otherwise_nothing_is_shown(
    cls: type[Slow], bars: Any, is_terminal: bool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "isatty", lambda: is_terminal)
    run(cls(), terminal, *bars())
    assert "products" not in terminal.getvalue()


def test_what_is_shown_changes_a_few_times_a_second(terminal: Terminal) -> None:
    slow = Slow()
    bar = TQDMProgressBar()
    trainer = SimpleNamespace(progress_bar_callback=bar)
    with redirect_stdout(terminal), ProgressDisplay("Slow", trainer, lambda: slow.now) as progress:
        for done in range(1, 101):
            slow.now += 0.125
            progress(done, 100, "products")
    texts = {line for line in terminal.shown() if line.startswith("Slow")}
    assert texts == {f"Slow {done}/100 products" for done in range(24, 101, 2)}  # from 3 s on, every 0.25 s


class Unusual(TQDMProgressBar):
    """Has another notion of a bar."""

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.set_description_str = None
        return bar


def test_a_bar_of_another_kind_fails_no_visit(terminal: Terminal) -> None:
    slow = Slow()
    run(slow, terminal, Unusual())
    assert {r.step for r in slow.results} == {0, 2}
    assert not slow.failures
