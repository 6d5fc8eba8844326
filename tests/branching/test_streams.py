"""Order, augmentation and dropout, each the trunk's or not, with digests as the proof."""

import functools
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.plan import STREAMS, noise_of
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.core.random_vectors import derive_seed
from lmc_lightning.data import DigitsDataModule
from tests.branching import runs
from tests.branching.runs import fit, loader, net, plain

MIXED = [dict(zip(STREAMS, choice, strict=True)) for choice in product(("fresh", "same"), repeat=3)][1:-1]


class OnImages(runs.Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Dropout(0.3), nn.Linear(8, 10))


@functools.cache
def digits() -> DigitsDataModule:
    data = DigitsDataModule(batch_size=16, max_train_examples=64, augment=True)
    data.setup()
    return data


def family_of(noise: Any, module: Any, data: Any, **arguments: Any) -> Family:
    branching = CheckpointBranching(epochs=[1], steps=[2, 6], noise=noise)
    fit(module, data, branching, limit_val_batches=1, **arguments)
    return branching.family


@pytest.mark.parametrize("noise", MIXED, ids=lambda noise: "-".join(noise.values()))
def test_what_is_the_same_is_shared_and_what_is_fresh_is_not(noise: Any) -> None:
    family = family_of(noise, net(OnImages), digits(), max_epochs=3)
    for child in family.children:
        assert (child.status, child.reason) == ("completed", None)
        assert child.exact_replay is None
        assert child.noise == noise
        assert child.seeds == {
            stream: derive_seed(child.noise_seed or 0, stream) for stream in STREAMS if noise[stream] == "fresh"
        }
        same = {stream: noise[stream] == "same" for stream in ("order", "augmentation")}
        assert child.shared == {**same, "batches": all(same.values())}
        assert child.state_digests[3] != family.trunk.state_digests[3]


def test_dropout_alone_is_what_differs() -> None:
    noise = {"order": "same", "augmentation": "same", "dropout": "fresh"}

    def last(dropout: float) -> tuple[str, set[str]]:
        module = net(OnImages)
        module.net[2].p = dropout
        family = family_of(noise, module, digits(), max_epochs=2)
        return family.trunk.state_digests[2], {child.state_digests[2] for child in family.children}

    trunk, children = last(0.0)
    assert children == {trunk}
    trunk, children = last(0.3)
    assert len({trunk, *children}) == 4


def test_mixed_noise_repeats() -> None:
    noise = {"order": "same", "augmentation": "fresh", "dropout": "fresh"}
    first, second = (family_of(noise, net(OnImages), digits(), max_epochs=2) for _ in range(2))
    for one, other in zip(first.children, second.children, strict=True):
        assert one.state_digests == other.state_digests
        assert one.augmentation_digests == other.augmentation_digests


def test_order_of_its_own_by_the_generator_of_a_loader() -> None:
    def shared(**noise: str) -> list[dict[str, bool]]:
        mine = loader(runs.Augmented(), generator=torch.Generator().manual_seed(3))
        return [child.shared for child in family_of(noise, net(), (mine, None), max_epochs=3).children]

    assert shared(order="same", augmentation="fresh", dropout="fresh") == [{"order": True, "batches": False}] * 3


def test_augmentation_of_its_own_in_workers() -> None:
    mine = loader(runs.Augmented(), num_workers=1, batch_size=14)
    noise = {"order": "same", "augmentation": "fresh", "dropout": "same"}
    family = family_of(noise, net(), (mine, None), max_epochs=3)
    for child in family.children:
        assert (child.status, child.reason) == ("completed", None)
        assert child.shared == {"order": True, "batches": False}
    assert mine.worker_init_fn is None
    # Nothing is drawn in these workers: what is left is the trunk's order and dropout.
    with pytest.warns(UserWarning, match="k1_001_child_0 failed, SharedNoiseError"):
        family_of(noise, net(), (loader(num_workers=1, batch_size=14), None), max_epochs=2)


@pytest.mark.parametrize(
    ("noise", "data", "message"),
    [
        ("order", plain, "order and augmentation .* both are drawn from the global generators"),
        ("dropout", plain, "order and dropout .* both are drawn from the global generators"),
        ("augmentation", plain, "order and augmentation .* both are drawn"),
        (
            "order",
            lambda: (loader(generator=torch.Generator()), None),
            "order and augmentation .* handed out in the order of the examples",
        ),
        ("dropout", lambda: (loader(num_workers=1), None), "order and dropout .* both are drawn"),
    ],
)
def test_streams_that_are_one_raise(noise: Any, data: Any, message: str) -> None:
    choices = {stream: "fresh" if stream == noise else "same" for stream in STREAMS}
    with pytest.raises(ValueError, match=rf"Expected {message}.* Make both the same or both fresh"):
        fit(net(), data(), CheckpointBranching(epochs=[0], noise=choices), max_epochs=1)


@pytest.mark.parametrize(
    "noise", ["new", {"order": "fresh"}, {"order": "fresh", "augmentation": "old", "dropout": "same"}]
)
def test_impossible_noise_raises(noise: Any) -> None:
    with pytest.raises(ValueError, match="Expected noise to "):
        CheckpointBranching(noise=noise)
    assert set(noise_of("same").values()) == {"same"}
