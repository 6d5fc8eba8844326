"""A child with the trunk's noise is the trunk, bit for bit, and the trunk does not notice that it has children."""

import copy
import gc
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.nodes import Node
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.core.glassbox import rng_state, seed_everything
from lmc_lightning.schedule import Schedule
from tests.branching import runs
from tests.branching.runs import RUNS, Fingerprint, fit, fit_beside, loader, net, plain, sha, stop_early

pytestmark = [
    pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric val_loss which is not available"),
    pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling"),
]


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Fingerprint.runs.clear()
    before = rng_state()
    yield
    torch.set_rng_state(before["torch"])


def same(*epochs: int, **arguments: Any) -> CheckpointBranching:
    return CheckpointBranching(epochs=epochs, noise="same", **arguments)


def assert_same_states(family: Family, child: Node) -> None:
    for epoch in child.epochs:
        mine, trunks = family.state(child, epoch), family.state("trunk", epoch)
        assert mine.keys() == trunks.keys()
        assert all(torch.equal(mine[name], trunks[name]) for name in mine)


@pytest.mark.parametrize("name", RUNS)
def test_child_with_the_same_noise_is_the_trunk_and_the_trunk_does_not_notice(name: str) -> None:
    kind, data, arguments, others = RUNS[name]
    branching = same(0, 1, 2)
    trainer = fit_beside(branching, kind, data, others, prints=Fingerprint, **arguments)
    trunk, *children = Fingerprint.runs
    assert len(children) == 3
    family = branching.family
    for child, fingerprints in zip(family.children, children, strict=True):
        assert fingerprints == {moment: trunk[moment] for moment in fingerprints}
        assert fingerprints.keys() == {m for m in trunk if m == "end" or m >= child.k1}
        assert (child.status, child.reason, child.exact_replay) == ("completed", None, True)
        assert list(child.epochs) == list(range(child.k1 or 0, family.end.epoch + 1))
        assert child.end_step == family.end.step == trainer.global_step
        assert_same_states(family, child)


@pytest.mark.parametrize("kind", [runs.Net, runs.OneCycle])
def test_two_workers(kind: type[runs.Net]) -> None:
    branching = same(0, 2)
    data = loader(runs.Augmented(), num_workers=2, batch_size=14)
    fit(net(kind), (data, None), runs.DrawingTimer(), branching, Fingerprint(), max_epochs=3)
    trunk, *children = Fingerprint.runs
    assert [child.exact_replay for child in branching.family.children] == [True, True]
    assert all(fingerprints["end"] == trunk["end"] for fingerprints in children)


def test_persistent_workers_repeat_what_does_not_depend_on_their_own_random_state() -> None:
    branching = same(0, 2)
    fit(net(), (loader(num_workers=1, persistent_workers=True, batch_size=20), None), branching, max_epochs=3)
    assert [child.exact_replay for child in branching.family.children] == [True, True]


def test_loaders_are_left_as_without_children() -> None:
    def states(*callbacks: Any) -> tuple[Any, ...]:
        data = runs.OwnGenerators()
        mine = loader(data, generator=torch.Generator().manual_seed(3))
        fit(net(), (mine, None), *callbacks)
        return sha(mine.generator.get_state()), sha(data.torch.get_state()), str(data.sources)

    alone = states()
    assert states(CheckpointBranching(epochs=[0, 2]))[:2] == alone[:2]


FRESH: dict[str, Callable[[], Any]] = {
    "shuffled": plain,
    "user generator": lambda: (loader(generator=torch.Generator().manual_seed(3)), None),
    "own generators, in order": lambda: (loader(runs.OwnGenerators(), shuffle=False), None),
    "whole set in one batch": lambda: (loader(batch_size=runs.SIZE), None),
    "noise_seed of a data set": lambda: (loader(runs.Seeded(), shuffle=False), None),
    "noise_seed of a datamodule": runs.SeededData,
    "worker": lambda: (loader(num_workers=1, batch_size=20), None),
}


@pytest.mark.parametrize("name", FRESH)
def test_fresh_noise_differs_from_the_first_step_and_repeats(name: str) -> None:
    def family() -> Family:
        branching = CheckpointBranching(epochs=[0, 1], children=2, seed=7)
        fit(net(), FRESH[name](), branching, max_epochs=2)
        return branching.family

    first, second = family(), family()
    digests = []
    for child, again in zip(first.children, second.children, strict=True):
        assert child.status == "completed", child.reason
        assert child.noise_seed is not None
        assert child.exact_replay is None
        assert child.epochs == {e: s for e, s in first.trunk.epochs.items() if e >= (child.k1 or 0)}
        assert child.state_digests[child.k1 or 0] == first.trunk.state_digests[child.k1 or 0]
        assert child.batch_digests == again.batch_digests
        assert child.state_digests == again.state_digests
        digests.append(child.batch_digests[1])
        digests.append(child.state_digests[2])
    assert len({first.trunk.batch_digests[1], first.trunk.state_digests[2], *digests}) == 2 + len(digests)


def test_another_seed_is_another_noise() -> None:
    def digest(seed: int) -> str:
        branching = CheckpointBranching(epochs=[0], seed=seed)
        fit(net(), plain(), branching, max_epochs=1)
        return branching.family.children[0].batch_digests[0]

    assert digest(0) == digest(0) != digest(1)


def test_order_that_depends_on_no_seed_is_a_failed_child() -> None:
    branching = CheckpointBranching(epochs=[0, 1])
    with pytest.warns(UserWarning, match="k1_000_child_0 failed, SharedNoiseError: .* does not depend on any seed"):
        fit(net(), (loader(shuffle=False), None), branching, max_epochs=2)
    assert [child.status for child in branching.family.children] == ["failed", "failed"]


def test_loader_with_state_of_its_own_is_no_exact_replay() -> None:
    class Endless(runs.Stream):
        count = 0

        def __iter__(self) -> Iterator[Any]:
            self.count += 1
            return iter([(x + self.count, y) for x, y in runs.points()])

    branching = same(1)
    fit(net(), (loader(Endless()), None), branching, max_epochs=3)
    child = branching.family.children[0]
    assert (child.status, child.exact_replay) == ("completed", False)
    assert child.reason == "the batches of epoch 1 differ from the trunk's: the loader has state of its own"


def test_branch_point_at_the_end_is_the_trunks_end() -> None:
    branching = CheckpointBranching(epochs=[2])
    trainer = fit(net(), plain(), branching, max_epochs=2)
    family = branching.family
    (child,) = family.children
    assert (child.status, child.branch_step, child.epochs) == ("completed", trainer.global_step, {2: 10})
    assert_same_states(family, child)


def test_branch_points_that_an_early_stop_cuts_off_are_missing() -> None:
    branching = CheckpointBranching(epochs=[1, 6])
    with pytest.warns(UserWarning, match="no snapshot after epochs 6: the trunk ended after 2 epochs"):
        fit(net(), plain(), branching, stop_early(), max_epochs=9)
    family = branching.family
    assert family.trunk.reason == "stopped early after 2 epochs, 10 steps"
    assert [(child.status, child.end_step) for child in family.children] == [("completed", 10), ("missing", None)]
    assert family.children[1].reason == "the trunk ended after 2 epochs, 10 steps"
    assert family.configuration["left_out"] == ["EarlyStopping"]


def test_early_stopping_is_passed_on_where_it_is_asked_for() -> None:
    """A child of the trunk's length does not stop with its own validation, unless its Trainer is given that."""

    def make_trainer(**overrides: Any) -> pl.Trainer:
        own = EarlyStopping("train_loss", patience=1, min_delta=10.0, check_on_train_epoch_end=True)
        callbacks = [*overrides.pop("callbacks"), own]
        return pl.Trainer(max_epochs=9, accelerator="cpu", callbacks=callbacks, **overrides)

    for arguments, end, reason in (
        ({}, 15, None),
        ({"make_trainer": make_trainer}, 10, "ended after 10 steps, the trunk after 15"),
    ):
        branching = CheckpointBranching(epochs=[0], **arguments)
        fit(net(), plain(), stop_early(2), branching, max_epochs=9)
        assert branching.family.trunk.reason == "stopped early after 3 epochs, 15 steps"
        (child,) = branching.family.children
        assert (child.status, child.end_step, child.reason) == ("completed", end, reason)


class Reader(pl.Callback):
    def __init__(self, *epochs: int) -> None:
        self.schedule = Schedule.from_arguments(epochs=epochs)
        self.calls: list[tuple[Family, Any, Any]] = []

    def measure_family(self, family: Family, trainer: Any, pl_module: Any) -> None:
        torch.rand(1)
        assert all(child.status == "completed" for child in family.children)
        self.calls.append((family, trainer, pl_module))


def test_readers_say_what_is_kept_and_get_the_family() -> None:
    module, readers, branching = net(), [Reader(3), Reader(0, 3, 9)], CheckpointBranching(epochs=[1])
    trainer = fit(module, plain(), readers[0], branching, readers[1], max_epochs=5)
    after = rng_state()
    family = branching.family
    assert list(family.trunk.epochs) == [0, 1, 3, 5]
    assert sorted(family.children[0].epochs) == [1, 3, 5]
    assert [reader.calls for reader in readers] == [[(family, trainer, module)]] * 2
    assert branching.run_children() is family
    assert len(readers[0].calls) == 1  # nothing was left to do
    fit(net(), plain(), max_epochs=5)
    assert sha(rng_state()) == sha(after)


def test_children_get_copies_of_other_callbacks() -> None:
    class Spy(pl.Callback):
        seen: list[Any] = []  # noqa: RUF012

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.seen.append((self, [type(callback).__name__ for callback in trainer.callbacks]))

    class OfThisPackage(Spy):
        __module__ = "lmc_lightning.callbacks"

    spy, branching = Spy(), CheckpointBranching(epochs=[0])
    fit(
        net(),
        plain(),
        stop_early(),
        OfThisPackage(),
        branching,
        spy,
        max_epochs=1,
        enable_checkpointing=True,
        max_time="01:00:00:00",
    )
    (_, _), (trunk, _), (child, names) = Spy.seen
    assert trunk is spy
    assert child is not spy
    assert names == ["Child", "Spy"]


def test_curves_beside_the_trunks(tmp_path: Path) -> None:
    branching = CheckpointBranching(epochs=[0, 1])
    loggers = [TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv")]
    monitor = LearningRateMonitor()
    trainer = fit(net(), plain(), branching, monitor, logger=loggers, max_epochs=2, log_every_n_steps=2)
    assert branching.family.folder == Path(trainer.log_dir) / "lmc" / "family"
    folder = Path(trainer.log_dir) / "branches" / "k1_001_child_0"
    assert len(list(folder.glob("events.*"))) == 1
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    assert {"train_loss", "val_loss", "lr-SGD"} <= set(header.split(","))
    assert rows
    assert not list(tmp_path.rglob("*.ckpt.*"))


def test_no_logger(tmp_path: Path) -> None:
    branching = CheckpointBranching(epochs=[0])
    fit(net(), plain(), branching, default_root_dir=tmp_path / "run")
    assert branching.family.folder == tmp_path / "run" / "lmc" / "family"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lmc"]
    assert branching.family.children[0].status == "completed"
    loaded = Family.load(branching.family.folder)
    assert loaded.children == branching.family.children
    assert loaded.trunk == branching.family.trunk
    assert loaded.end == branching.family.end


def test_fast_dev_run_leaves_no_files(tmp_path: Path) -> None:
    reader, branching = Reader(4), CheckpointBranching()
    fit(net(), plain(), branching, reader, fast_dev_run=True)
    family = branching.family
    assert [(child.k1, child.status, child.epochs) for child in family.children] == [(0, "completed", {0: 0, 1: 1})]
    assert len(reader.calls) == 1
    assert family.state(family.children[0], 1).keys() == family.state("trunk", 1).keys()
    assert list(tmp_path.iterdir()) == []
    folder = family.folder
    assert folder.is_dir()
    del branching, family, reader
    gc.collect()
    assert not folder.exists()


def test_a_fit_without_a_batch() -> None:
    branching = CheckpointBranching(epochs=[0])
    fit(net(), plain(), branching, limit_train_batches=0)
    assert branching.family.trunk.status == "pending"


class Failing(runs.Net):
    """Fails in its ``fail_at``-th run, in the last epoch."""

    run, fail_at, error = 0, -1, RuntimeError("no luck")

    def on_train_start(self) -> None:
        type(self).run += 1

    def on_train_batch_end(self, *args: Any) -> None:
        if type(self).run == self.fail_at and self.trainer.current_epoch == 2:
            raise self.error


@pytest.fixture
def failing() -> Iterator[type[Failing]]:
    yield Failing
    Failing.run, Failing.fail_at, Failing.error = 0, -1, RuntimeError("no luck")


def test_a_failing_child_is_recorded_and_the_others_go_on(failing: type[Failing]) -> None:
    failing.fail_at = 2
    branching = same(0, 1, 2)
    with pytest.warns(UserWarning, match="k1_000_child_0 failed, RuntimeError: no luck"):
        fit(net(failing), plain(), branching, max_epochs=3)
    family = branching.family
    assert [child.status for child in family.children] == ["failed", "completed", "completed"]
    assert list(family.children[0].epochs) == [0, 1, 2]
    failing.fail_at = -1
    branching.run_children()
    assert [child.exact_replay for child in family.children] == [True, True, True]


def test_an_interrupted_child_ends_the_fit_and_is_continued_later(failing: type[Failing]) -> None:
    failing.fail_at, failing.error = 3, KeyboardInterrupt()  # type: ignore[assignment]
    reader, branching = Reader(1), same(0, 1, 2)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with pytest.raises(SystemExit):
        fit(net(failing), plain(), branching, reader, Fingerprint(), max_epochs=3)
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    family = Family.load(branching.family.folder)
    assert family.trunk.status == "completed"
    assert [child.status for child in family.children] == ["completed", "interrupted", "pending"]
    assert family.children[1].reason == "KeyboardInterrupt"
    assert reader.calls == []
    failing.fail_at = -1
    assert [child.exact_replay for child in branching.run_children().children] == [True, True, True]
    assert len(reader.calls) == 1
    assert len(Fingerprint.runs) == 5  # trunk, child 0, child 1 twice, child 2


def test_a_failed_trunk_starts_no_children_until_asked(failing: type[Failing]) -> None:
    failing.fail_at = 1
    branching = same(0, 1, 2)
    with pytest.raises(RuntimeError, match="no luck"):
        fit(net(failing), plain(), branching, Fingerprint(), max_epochs=5)
    family = branching.family
    assert (family.trunk.status, family.trunk.reason) == ("failed", "RuntimeError: no luck")
    assert len(Fingerprint.runs) == 1
    branching.run_children()
    assert [(child.status, child.end_step) for child in family.children] == [
        ("completed", 10),
        ("completed", 10),
        ("pending", None),
    ]
    assert all(child.exact_replay for child in family.children[:2])
    assert list(family.children[0].epochs) == [0, 1, 2]


def test_an_interrupted_trunk_is_recorded(failing: type[Failing]) -> None:
    failing.fail_at, failing.error = 1, KeyboardInterrupt()  # type: ignore[assignment]
    branching = same(0)
    with pytest.raises(SystemExit):
        fit(net(failing), plain(), branching, max_epochs=3)
    assert Family.load(branching.family.folder).trunk.status == "interrupted"


def checkpointed(module: pl.LightningModule, branching: Any, folder: Path, epochs: int, **arguments: Any) -> Path:
    saver = pl.callbacks.ModelCheckpoint(folder, "last", save_top_k=1, every_n_epochs=1)
    fit(module, plain(), branching, saver, enable_checkpointing=True, max_epochs=epochs, **arguments)
    return Path(saver.best_model_path)


@pytest.mark.parametrize("place", ["same folder", "another folder"])
def test_a_resumed_trunk_keeps_earlier_forks(tmp_path: Path, place: str) -> None:
    first = same(0, 1, 2)
    path = checkpointed(net(), first, tmp_path / "checkpoints", 2, default_root_dir=tmp_path / "a")
    assert [child.end_step for child in first.family.children] == [10, 10, 10]
    second = same(0, 1, 2)
    root = tmp_path / ("a" if place == "same folder" else "b")
    fit(net(), plain(), second, max_epochs=4, ckpt_path=path, default_root_dir=root)
    family = second.family
    assert family.folder == root / "lmc" / "family"
    assert list(family.trunk.epochs) == [0, 1, 2, 3, 4]
    # Replay ends where the trunk was resumed, which restores no random state.
    assert [(child.status, child.end_step) for child in family.children] == [("completed", 20)] * 3
    assert family.children[2].exact_replay
    for child in family.children[:2]:
        assert child.state_digests[2] == family.trunk.state_digests[2] == first.family.trunk.state_digests[2]
        assert child.exact_replay is False


def test_a_resumed_trunk_without_earlier_forks_says_so(tmp_path: Path) -> None:
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "last")
    fit(net(), plain(), saver, enable_checkpointing=True, max_epochs=2)
    branching = same(0, 3)
    with pytest.warns(UserWarning, match="no snapshot after epochs 0: training was resumed after 2 epochs, without it"):
        fit(net(), plain(), branching, max_epochs=5, ckpt_path=saver.best_model_path)
    assert [(child.status, child.exact_replay) for child in branching.family.children] == [
        ("missing", None),
        ("completed", True),
    ]


def test_state_is_plain(tmp_path: Path) -> None:
    branching = CheckpointBranching(epochs=[0])
    path = checkpointed(net(), branching, tmp_path, 1)
    state = torch.load(path, weights_only=True)["callbacks"][branching.state_key]
    assert state == {"version": 1, "family": str(branching.family.folder)}
    assert CheckpointBranching(epochs=[1]).state_key != CheckpointBranching(epochs=[2]).state_key


def test_an_earlier_family_is_set_aside() -> None:
    fit(net(), plain(), CheckpointBranching(epochs=[0], seed=1), max_epochs=1)
    branching = CheckpointBranching(epochs=[0], seed=2)
    fit(net(), plain(), branching, max_epochs=1)
    folder = branching.family.folder
    assert Family.load(folder).configuration["seed"] == 2
    assert Family.load(folder.with_name("family_old_1")).configuration["seed"] == 1


def test_two_callbacks_side_by_side() -> None:
    first, second = same(0), CheckpointBranching(epochs=[1])
    fit(net(), plain(), first, second, Fingerprint(), max_epochs=2)
    assert [b.family.folder.name for b in (first, second)] == ["family", "family_1"]
    assert first.family.children[0].exact_replay
    assert second.family.children[0].status == "completed"


def test_pytorch_lightning_namespace() -> None:
    namespace = pytest.importorskip("pytorch_lightning")

    class Twin(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    branching = same(0, 1)
    arguments = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = namespace.Trainer(
        **arguments, enable_checkpointing=False, enable_model_summary=False, callbacks=[branching]
    )
    seed_everything(0)
    trainer.fit(Twin(), loader())
    assert [child.exact_replay for child in branching.family.children] == [True, True]


def test_the_process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meddling(runs.Net):
        def on_train_start(self) -> None:
            if type(self.trainer.callbacks[0]).__name__ == "Child":
                os.environ["MEDDLED"] = "1"
                os.environ.pop("KEPT")
                signal.signal(signal.SIGUSR2, signal.SIG_IGN)
                torch.use_deterministic_algorithms(True)
                torch.set_default_dtype(torch.float64)

    monkeypatch.setenv("KEPT", "yes")
    env, handlers = dict(os.environ), {n: signal.getsignal(n) for n in signal.valid_signals()}
    with torch.no_grad():
        fit(net(Meddling), plain(), CheckpointBranching(epochs=[0]), max_epochs=1)
        assert torch.is_grad_enabled()  # Lightning switches it on for the trunk
    assert dict(os.environ) == env
    assert {n: signal.getsignal(n) for n in signal.valid_signals()} == handlers
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_progress_is_shown_only_where_the_trunk_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    fit(net(), plain(), CheckpointBranching(epochs=[0]), max_epochs=1)
    assert "child" not in capsys.readouterr().err
    fit(net(), plain(), CheckpointBranching(epochs=[0]), max_epochs=1, enable_progress_bar=True)
    assert "k1_000_child_0: 100%" in capsys.readouterr().err


def test_one_line_announces(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(net(), plain(), CheckpointBranching(epochs=[0, 1], children=2), max_epochs=3)
    after = [record.message for record in caplog.records]
    after = after[next(i for i, message in enumerate(after) if "max_epochs" in message) + 1 :]
    (line,) = after
    start, _, seconds = line.rpartition("about ")
    assert start == "CheckpointBranching: 4 children leave the trunk after 0, 1 epochs and train for 10 epochs in all, "
    assert seconds.endswith(" s.")


class OwnStrategy(pl.strategies.SingleDeviceStrategy):
    pass


class OwnTrainer(pl.Trainer):
    pass


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"plugins": [pl.plugins.TorchCheckpointIO()]}, "the plugin TorchCheckpointIO"),
        ({"plugins": [pl.plugins.DoublePrecision()]}, "the plugin DoublePrecision"),
        ({"strategy": OwnStrategy(torch.device("cpu"))}, "the strategy OwnStrategy"),
    ],
)
def test_what_cannot_be_read_back_raises(arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} cannot be read back. Pass make_trainer"):
        fit(net(), plain(), CheckpointBranching(epochs=[0]), **arguments)


def test_make_trainer_makes_the_children() -> None:
    made = []

    def make_trainer(**overrides: Any) -> pl.Trainer:
        made.append(OwnTrainer(max_epochs=2, accelerator="cpu", plugins=[pl.plugins.TorchCheckpointIO()], **overrides))
        return made[-1]

    branching = same(0, make_trainer=make_trainer)
    fit(net(), plain(), branching, plugins=[pl.plugins.TorchCheckpointIO()], max_epochs=2)
    assert len(made) == 1
    assert branching.family.children[0].exact_replay


def test_make_trainer_that_drops_its_overrides_is_a_failed_child() -> None:
    branching = same(0, make_trainer=lambda **overrides: pl.Trainer(accelerator="cpu", logger=False))
    with pytest.warns(UserWarning, match="must hand its overrides, callbacks included, to the Trainer"):
        fit(net(), plain(), branching, max_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": []}, "epochs to list integers"),
        ({"epochs": [-1]}, "epochs to list integers"),
        ({"epochs": [True]}, "epochs to list integers"),
        ({"children": 0}, "children to be an integer of at least 1, got 0"),
        ({"noise": "order"}, "noise to be 'fresh' or 'same', got 'order'"),
    ],
)
def test_impossible_arguments_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointBranching(**arguments)


def test_branch_points_past_the_end_raise_in_setup() -> None:
    with pytest.raises(ValueError, match=r"at most max_epochs=3 epochs, got \[5, 9\]"):
        fit(net(), plain(), CheckpointBranching(epochs=[1, 5, 9]), max_epochs=3)


def test_several_devices_raise_in_setup() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.world_size = 2  # type: ignore[attr-defined]
    trainer.fit_loop.max_epochs = 5
    branching = CheckpointBranching()
    trainer.callbacks.append(branching)
    with pytest.raises(ValueError, match="needs a single device or strategy='ddp', got a Trainer of 2"):
        branching.setup(trainer, net(), "fit")


class Borrowing(runs.Net):
    """Owns an optimizer, which is not copied along."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> Any:
        return self.optimizer


ORIGINAL: dict[str, runs.Net] = {}


def train_the_original(batch: Any, batch_idx: int) -> Any:
    return ORIGINAL["module"].loss(batch)


def test_children_that_would_train_the_trunk_fail() -> None:
    branching = CheckpointBranching(epochs=[0])
    with pytest.warns(UserWarning, match="The optimizer holds parameters of the trunk: make it anew"):
        fit(net(Borrowing), plain(), branching, max_epochs=1)
    module = ORIGINAL["module"] = net()
    module.training_step = train_the_original  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="computes no gradient of the child's parameters"):
        fit(module, plain(), branching, max_epochs=1)


def test_a_module_compiled_as_a_whole_raises_in_setup() -> None:
    with pytest.raises(ValueError, match=r"cannot copy torch.compile\(module\), whose steps belong to the original"):
        fit(torch.compile(net(), backend="eager"), plain(), CheckpointBranching(epochs=[0]))


def test_what_cannot_be_copied_raises_in_setup() -> None:
    class Locked(pl.Callback):
        def __init__(self) -> None:
            self.file = open(os.devnull)  # noqa: SIM115

        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle 'TextIOWrapper'")

    callback = Locked()
    with pytest.raises(TypeError, match=r"the callback Locked cannot be copied \(TypeError: cannot pickle"):
        fit(net(), plain(), callback, CheckpointBranching(epochs=[0]))
    callback.file.close()


def test_before_the_first_fit() -> None:
    with pytest.raises(RuntimeError, match=r"call trainer.fit with this CheckpointBranching"):
        CheckpointBranching().run_children()


def test_pickles_and_copies() -> None:
    branching = CheckpointBranching(epochs=[0])
    fit(net(), plain(), branching, max_epochs=1)
    for twin in (pickle.loads(pickle.dumps(branching)), copy.deepcopy(branching)):
        assert repr(twin) == "CheckpointBranching(epochs=(0,), children=1, noise='fresh', seed=0)"
    assert repr(branching).endswith("k1_000_child_0: completed")


def test_a_failing_snapshot_does_not_fail_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", lambda *args, **kwargs: None)
    branching = CheckpointBranching(epochs=[0])
    with pytest.warns(UserWarning, match="cannot branch after 0 epochs, no snapshot: OSError: .* was not written"):
        trainer = fit(net(), plain(), branching, max_epochs=2)
    assert trainer.global_step == 10
    assert [child.status for child in branching.family.children] == ["missing"]


@pytest.mark.filterwarnings("ignore:CheckpointBranching has no snapshot")
def test_a_full_disk_does_not_fail_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    branching = CheckpointBranching(epochs=[0])
    monkeypatch.setattr(Family, "keep", full)
    with pytest.warns(UserWarning, match="cannot keep .* OSError: No space left on device. The training goes on"):
        trainer = fit(net(), plain(), branching, max_epochs=2)
    assert trainer.global_step == 10
