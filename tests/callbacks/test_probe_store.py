from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lmc_lightning.callbacks.bridge.probe_set import ProbeSet, between, share
from lmc_lightning.callbacks.bridge.probe_store import ProbeStore
from lmc_lightning.callbacks.bridge.step import StepBatch
from lmc_lightning.core.collective import Collective
from tests.zoo.batches import Graphs, loader_of
from tests.zoo.harness import Setting, train
from tests.zoo.module import BATCH_SIZE, ZooModule, examples
from tests.zoo.outputs import NamesItsArgumentsOtherwise, Plain, TakesNoIndex
from tests.zoo.probe import Probe


def step_batches(*sizes: int) -> list[StepBatch]:
    x, y = examples(sum(sizes))
    return [StepBatch(batch, index) for index, batch in enumerate(zip(x.split(sizes), y.split(sizes), strict=True))]


def probe_set(*sizes: int) -> ProbeSet:
    return ProbeSet("train", "captured", tuple(step_batches(*sizes)))


def rows(batches: Any) -> Tensor:
    return torch.cat([b.batch[0] for b in batches])


# -- sets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 7, 8, 9, 17, 20, 50, None])
def test_the_first_examples_are_the_first_whatever_the_batches(number: int | None) -> None:
    first = probe_set(8, 8, 4).first(number)
    assert torch.equal(rows(first.batches), examples(20)[0][:number])
    assert first.num_examples == min(number or 20, 20)


def test_batches_that_cannot_be_cut_are_kept_whole() -> None:
    graphs = [StepBatch(Graphs(*b.batch), b.batch_idx) for b in step_batches(8, 8)]
    assert [b.batch_idx for b in between(graphs, 0, 20)] == [0, 1]  # sixteen nodes each
    assert [b.batch_idx for b in between(graphs, 0, 16)] == [0]
    assert [b.batch_idx for b in between(graphs, 4, 20)] == [1]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_the_parts_of_the_processes_are_the_whole_once(num_processes: int) -> None:
    whole = probe_set(8, 8, 4)
    parts = [whole.part(process, num_processes) for process in range(num_processes)]
    assert torch.equal(torch.cat([rows(p.batches) for p in parts]), rows(whole.batches))
    assert {p.digest for p in parts} == {whole.digest}
    assert [share(20, process, num_processes) for process in (0, num_processes)] == [0, 20]


def test_a_digest_names_the_tensors_and_their_order() -> None:
    assert probe_set(8, 4).digest == probe_set(8, 4).digest
    assert probe_set(8, 4).digest != probe_set(4, 8).digest
    changed = probe_set(8, 4)
    changed.batches[1].batch[0][0, 0] += 1e-6
    assert changed.digest != probe_set(8, 4).digest


def test_labels_are_counted_where_there_are_any() -> None:
    batch = {"x": torch.zeros(5, 2), "y": torch.tensor([0, 2, 2, 2, 1])}
    assert ProbeSet("train", "captured", (StepBatch(batch),)).label_counts() == {0: 1, 1: 1, 2: 3}
    assert ProbeSet("train", "captured", (StepBatch(torch.zeros(5)),)).label_counts() == {}


# -- capture -----------------------------------------------------------------------------------------------------------


def captured(cls: type[ZooModule], num_examples: int = 2 * BATCH_SIZE, **options: Any) -> tuple[ProbeSet, list[Any]]:
    """The set that a run captures, and the batches that its steps were called with, cloned."""
    seen: list[Any] = []

    class Watched(cls):  # type: ignore[misc, valid-type]
        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            if self.trainer.training:
                seen.append((x.clone(), y.clone()))
            return super().loss(x, y)

    probe = Probe(num_examples=num_examples, on_error="raise", epochs=[0])
    run = train(Setting(Watched), [probe], **options)
    return ProbeStore.of(run.trainer).get("train", num_examples), seen


@pytest.mark.parametrize("cls", [Plain, NamesItsArgumentsOtherwise, TakesNoIndex], ids=lambda c: c.__name__)
def test_batches_are_what_the_first_steps_were_called_with(cls: type[ZooModule]) -> None:
    found, seen = captured(cls)
    assert found.source == "captured"
    assert [b.batch_idx for b in found.batches] == [0, 1]
    for step_batch, (x, y) in zip(found.batches, seen, strict=False):
        assert torch.equal(step_batch.batch[0], x)
        assert torch.equal(step_batch.batch[1], y)


def test_the_capture_ends_with_the_first_epoch() -> None:
    found, _ = captured(Plain, num_examples=1000)
    assert found.num_examples == 3 * BATCH_SIZE


def test_one_store_serves_all_callbacks_of_a_trainer() -> None:
    small, large = Probe(num_examples=5, epochs=[2]), Probe(num_examples=20, epochs=[2], name="large")
    run = train(Setting(Plain), [small, large])
    store = ProbeStore.of(run.trainer)
    assert torch.equal(rows(store.get("train", 5).batches), rows(store.get("train", 20).batches)[:5])
    digests = [c.results[0].evidence["probe_digest"] for c in (small, large)]
    assert digests == [store.get("train", n).digest for n in (5, 20)]


class ManySteps(Plain):
    """Twelve steps an epoch, always in one order."""

    def train_dataloader(self) -> Any:
        return DataLoader(self.dataset(), batch_size=2)


def small_beside_large(**options: Any) -> tuple[Probe, Probe]:
    common = {"on_error": "raise", **options}
    return Probe(num_examples=5, every_n_train_steps=1, **common), Probe(
        num_examples=1000, epochs=[1], name="large", **common
    )


def test_a_small_request_is_served_before_a_larger_one_of_another_callback() -> None:
    small, large = small_beside_large()
    alone, _ = small_beside_large()
    beside = train(Setting(ManySteps), [small, large], max_epochs=1)
    assert train(Setting(ManySteps), [alone], max_epochs=1).differs_from(beside) == []
    assert values(small) == values(alone)
    assert {r.step for r in small.results} == set(range(13))
    assert {r.evidence["num_examples"] for r in large.results} == {24}


def values(probe: Probe) -> list[tuple[int, str, float | None, str]]:
    return [(r.step, r.name, r.value, r.evidence["probe_digest"]) for r in probe.results]


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_there_serves_requests_of_its_size_only(split: Any) -> None:
    store = ProbeStore()
    for number in (5, 20):
        store.request(split, number)
    assert not store.is_ready(split, 5)
    store.receive(split, (examples(8), 0))
    assert store.is_ready(split, 5)
    assert not store.is_ready(split, 9)
    early = store.get(split, 5)
    assert early.digest == ProbeSet(split, "captured", tuple(step_batches(8))).first(5).digest
    for index in (1, 2):
        store.receive(split, (examples(8), index))
    assert store.is_ready(split, None)
    assert store.get(split, 5) is early
    assert store.get(split, 20).num_examples == 20


class Refuses(Callback):
    """Skips the first epoch, before its first step."""

    def __init__(self) -> None:
        self.skipped = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> int | None:
        if self.skipped:
            return None
        self.skipped = True
        return -1


class Fails(Plain):
    """The first step raises."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise ArithmeticError("no step")


def test_the_modules_step_is_its_own_again_after_each_call_and_after_an_exception() -> None:
    run = train(Setting(Plain), [Probe(num_examples=1000)])
    assert "training_step" not in vars(run.module)
    run = train(Setting(Fails), [Probe(num_examples=1000)], raises=ArithmeticError)
    assert "training_step" not in vars(run.module)
    run = train(Setting(Plain), [Probe(num_examples=1000), Refuses()])
    assert "training_step" not in vars(run.module)


class Uncopyable:
    """A batch that refuses to be copied."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("held by a device")

    def to(self, device: Any, **options: Any) -> "Uncopyable":
        return self


class YieldsUncopyables(Plain):
    """Batches are such objects."""

    def training_step(self, batch: Uncopyable, batch_idx: int) -> Tensor:
        return self.loss(*batch.batch)

    def train_dataloader(self) -> Any:
        return loader_of(lambda x, y: Uncopyable((x, y)))


def test_batches_that_cannot_be_copied_fail_the_visit_and_not_the_step() -> None:
    probe = Probe(epochs=[1])
    with pytest.warns(UserWarning, match=r"held by a device\. Pass probe_dataloader="):
        train(Setting(YieldsUncopyables), [probe])
    (failure,) = probe.failures
    assert "held by a device" in failure.evidence["reason"]


class OneLabel(Plain):
    """All examples but one carry one label."""

    def dataset(self) -> Any:
        x, _ = examples()
        return torch.utils.data.TensorDataset(x, torch.arange(len(x)).clamp(max=1))


def test_a_capture_of_mostly_one_label_is_pointed_out() -> None:
    with pytest.warns(
        UserWarning, match=r"More than half of the captured train probe examples have one label: \{.*1: "
    ):
        train(Setting(OneLabel), [Probe(num_examples=20)])


class OnlyLooksAtTheSecondLoader(Plain):
    """Two validation loaders of other sizes."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(*batch))

    def val_dataloader(self) -> Any:
        return [super().val_dataloader(), super().train_dataloader()]


class ProbeOfBoth(Probe):
    """A probe that needs validation examples too."""

    kind = "both"
    splits = ("train", "val")


def test_the_validation_split_is_that_of_the_first_loader() -> None:
    probe = ProbeOfBoth(num_examples=1000, on_error="raise")
    run = train(Setting(OnlyLooksAtTheSecondLoader), [probe])
    found = ProbeStore.of(run.trainer).get("val", 1000)
    assert torch.equal(rows(found.batches), examples(BATCH_SIZE)[0])
    assert "validation_step" not in vars(run.module)


# -- a resumed run -----------------------------------------------------------------------------------------------------


def stored(directory: Path) -> ProbeStore:
    """A store that has captured a batch."""
    store = ProbeStore()
    store.directory = directory
    store.request("train", 8)
    store.receive("train", (examples(8), 0))
    store.name("train", 8, Collective())
    return store


def test_a_resumed_run_takes_the_same_set_from_the_side_file(tmp_path: Path) -> None:
    store, resumed = stored(tmp_path / "first"), ProbeStore()
    resumed.directory = tmp_path / "second"
    resumed.resume(tmp_path / "first", dict(store.digests), Collective())
    assert resumed.get("train", 8).digest == store.get("train", 8).digest
    assert resumed.digests == store.digests
    again = ProbeStore()
    again.resume(tmp_path / "second", dict(store.digests), Collective())
    assert again.is_ready("train", None)


def test_a_resumed_run_takes_what_visits_were_made_on_and_captures_the_rest(tmp_path: Path) -> None:
    store, resumed = ProbeStore(), ProbeStore()
    store.directory = tmp_path
    store.request("train", 20)
    store.receive("train", (examples(8), 0))
    store.name("train", 5, Collective())
    early = dict(store.digests)
    for index in (1, 2):  # after the checkpoint from which the other run goes on
        store.receive("train", (examples(8), index))
    resumed.request("train", 20)
    resumed.resume(tmp_path, early, Collective())
    assert resumed.get("train", 5).digest == store.get("train", 5).digest == early["train"][1]
    assert not resumed.is_ready("train", 6)
    for index in (7, 8):
        resumed.receive("train", (examples(8), index))
    assert resumed.get("train", 5).digest == early["train"][1]
    assert [(b.batch_idx, len(b.batch[0])) for b in resumed.get("train", 20).batches] == [(0, 5), (7, 8), (8, 7)]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")
@pytest.mark.filterwarnings("ignore:More than half of the captured train probe examples:UserWarning")
def test_a_run_that_is_resumed_before_the_capture_has_ended_measures_on_the_same_set(tmp_path: Path) -> None:
    whole, _ = small_beside_large()
    train(Setting(ManySteps), [whole], max_epochs=1)
    saves = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=4)
    train(Setting(ManySteps), [*small_beside_large(), saves], max_steps=6, enable_checkpointing=True)
    resumed, large = small_beside_large()
    checkpoint = tmp_path / "half.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 4
    train(Setting(ManySteps), [resumed, large], max_epochs=1, ckpt_path=checkpoint)
    # Lightning starts the interrupted epoch's loader anew, so that later weights differ.
    assert [v for v in values(resumed) if v[0] <= 4] == [v for v in values(whole) if v[0] <= 4]
    assert {(step, digest) for step, _, _, digest in values(resumed)} == {
        (step, digest) for step, _, _, digest in values(whole)
    }
    assert {r.step for r in large.results} == {12}


def test_a_side_file_of_another_run_is_refused(tmp_path: Path) -> None:
    stored(tmp_path)
    with pytest.raises(ValueError, match="does not hold the train probe set of this run"):
        ProbeStore().resume(tmp_path, {"train": (None, "0" * 64)}, Collective())


def test_a_full_disk_is_remembered(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    store = stored(tmp_path / "taken" / "folder")
    assert store.is_ready("train", None)
    assert any("cannot be kept for a resumed run" in error for error in store.errors)
