import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from lmc_lightning.callbacks.bridge.probes import draw, to_device
from lmc_lightning.callbacks.bridge.step import StepBatch
from lmc_lightning.core.structure import digest, leading_size
from tests.zoo.configurations import Augmented, OwnsItsNoise, shuffled
from tests.zoo.fingerprint import attributes, global_random_state, sha256
from tests.zoo.harness import Run, Setting, train
from tests.zoo.module import BATCH_SIZE, examples
from tests.zoo.outputs import Plain
from tests.zoo.probe import Probe


class Lines(IterableDataset[Any]):
    """A source with a position."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < 20:
            self.position += 1
            yield torch.full((2,), float(self.position)) + torch.randn(2)


def own_sampler() -> DataLoader[Any]:
    sampler = RandomSampler(range(24), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(*examples()), batch_sampler=BatchSampler(sampler, 5, drop_last=True))


LOADERS = {
    "shuffled": shuffled,
    "own generator": lambda: shuffled(generator=torch.Generator().manual_seed(3)),
    "augmented": lambda: shuffled(Augmented()),
    "noise of the data set": lambda: shuffled(OwnsItsNoise()),
    "persistent workers": lambda: shuffled(OwnsItsNoise(), num_workers=1, persistent_workers=True),
    "own sampler": own_sampler,
    "batches from the data set": lambda: DataLoader([examples(n) for n in (5, 6, 7)], batch_size=None, shuffle=True),
    "iterable": lambda: DataLoader(Lines(), batch_size=4),
}


@pytest.mark.parametrize("make_loader", LOADERS.values(), ids=LOADERS)
def test_drawing_from_a_loader_leaves_no_trace_and_repeats(make_loader: Any) -> None:
    loader = make_loader()
    before = sha256([global_random_state(), attributes(loader)])
    first = draw(loader, 10, seed=0)
    assert sha256([global_random_state(), attributes(loader)]) == before
    assert digest([b.batch for b in draw(loader, 10, seed=0)]) == digest([b.batch for b in first])
    assert loader._iterator is None
    assert sum(leading_size(b.batch) for b in first) == 10


def test_another_seed_draws_other_examples() -> None:
    loader = shuffled()
    drawn = [digest([b.batch for b in draw(loader, 10, seed=seed)]) for seed in (0, 1)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("number", [3, 8, 20, 24, None])
def test_as_many_examples_are_drawn_as_asked_for(number: int | None) -> None:
    loader = DataLoader(TensorDataset(*examples()), batch_size=BATCH_SIZE)
    drawn = draw(loader, number, seed=0)
    assert torch.equal(torch.cat([b.batch[0] for b in drawn]), examples()[0][:number])
    assert [b.batch_idx for b in drawn] == list(range(len(drawn)))


def test_any_iterable_of_batches_will_do() -> None:
    batches = [(torch.ones(3), torch.zeros(3))] * 2
    drawn = draw(batches, None, seed=0)
    assert [len(b.batch[0]) for b in drawn] == [3, 3]
    assert drawn[0].batch[0] is not batches[0][0]


class Transfers(Plain):
    """Changes batches in the hooks of their transfer."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0] + torch.randn(()) + random.random() + np.random.rand(), batch[1]]  # noqa: NPY002


def test_drawn_batches_pass_the_modules_own_transfer_hooks() -> None:
    module = Transfers()
    before = sha256(global_random_state())
    (moved,) = to_device([StepBatch(examples(4))], module)
    assert sha256(global_random_state()) == before
    shifts = moved.batch[0] - 2 * (examples(4)[0] + 1)
    assert shifts.std() < 1e-6 < shifts.mean().abs()
    torch.rand(())
    assert digest(to_device([StepBatch(examples(4))], module)) == digest([moved])


# -- where a run gets its probe set ------------------------------------------------------------------------------------


class HasProbes(LightningDataModule):
    """Knows a set of its own, like our datamodules."""

    def train_dataloader(self) -> Any:
        return shuffled()

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*examples(BATCH_SIZE)), batch_size=BATCH_SIZE)

    def probe_batches(self, split: str, num_examples: int | None, seed: int) -> Any:
        return [examples(num_examples or 24)]


def probed(probe: Probe, **setting: Any) -> tuple[Run, dict[str, Any]]:
    """A run, and the evidence of its first record."""
    run = train(Setting(Plain, **setting), [probe])
    (evidence,) = {r.evidence["probe_digest"]: r.evidence for r in probe.results}.values()
    return run, evidence


def test_a_loader_of_the_callback_comes_first_then_the_datamodule_then_the_run_itself() -> None:
    own = DataLoader(TensorDataset(*examples()), batch_size=4)
    options = {"num_examples": 12, "on_error": "raise"}
    digests = {}
    for source, loader, make in (
        ("probe_dataloader", own, HasProbes),
        ("datamodule", None, HasProbes),
        ("captured", None, lambda: None),
    ):
        _, evidence = probed(Probe(probe_dataloader=loader, **options), make_datamodule=make)
        assert (evidence["probe_source"], evidence["num_examples"]) == (source, 12)
        digests[source] = evidence["probe_digest"]
    assert digests["datamodule"] == digest([examples(12)])
    assert digests["captured"] not in (digests["datamodule"], digests["probe_dataloader"])


def test_two_callbacks_may_have_loaders_of_their_own() -> None:
    first = Probe(probe_dataloader=[examples(4)], on_error="raise")
    second = Probe(probe_dataloader=[examples(6)], on_error="raise", name="b")
    train(Setting(Plain), [first, second])
    assert [c.results[0].evidence["num_examples"] for c in (first, second)] == [4, 6]


def test_a_whole_split_needs_a_source_that_knows_it() -> None:
    _, evidence = probed(Probe(num_examples=None, on_error="raise"), make_datamodule=HasProbes)
    assert evidence["num_examples"] == 24
    with pytest.raises(ValueError, match=r"num_examples=None asks for a whole split.*Pass probe_dataloader="):
        train(Setting(Plain), [Probe(num_examples=None)])
