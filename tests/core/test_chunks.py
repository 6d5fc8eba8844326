from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lmc_lightning.core.chunks import LARGE_CHUNK, SMALL_CHUNK, rechunk, suited_size
from lmc_lightning.core.structure import leading_size
from tests.problems import split

VALUES = torch.arange(10.0).square()


def mean(batches: Sequence[Any]) -> float:
    values = torch.cat([b[0] for b in batches])
    return float(values.mean())


def mean_of_spreads(batches: Sequence[Any]) -> float:
    return sum(float(b[0].var()) * len(b[0]) for b in batches) / sum(len(b[0]) for b in batches)


def examples(batches: Sequence[Any]) -> Tensor:
    return torch.cat([b[0] for b in batches])


@pytest.mark.parametrize("sizes", [[10], [9, 1], [5, 5], [3, 3, 3, 1], [1] * 10, [2, 7, 1]])
def test_chunks_do_not_depend_on_how_the_loader_cut_the_data(sizes: list[int]) -> None:
    chunks = rechunk(split((VALUES,), sizes), 4, mean)
    assert chunks.additive
    assert [leading_size(b) for b in chunks.batches] == [4, 4, 2]
    assert torch.equal(examples(chunks.batches), VALUES)


@pytest.mark.parametrize("sizes", [[4, 4, 2], [4, 6], [10], [4], [3]])
def test_a_loss_that_is_no_mean_over_examples_keeps_its_batches(sizes: list[int]) -> None:
    batches = split((VALUES[: sum(sizes)],), sizes)
    chunks = rechunk(batches, 4, mean_of_spreads)
    assert all(a is b for a, b in zip(chunks.batches, batches, strict=True))
    assert not chunks.additive


@pytest.mark.parametrize(
    "batches",
    [
        [{"x": torch.zeros(4, 2), "length": torch.zeros(3)}, {"x": torch.zeros(2, 2), "length": torch.zeros(3)}],
        [torch.zeros(4, 2), torch.zeros(4, 3)],
        [3.0, 4.0],
    ],
    ids=["no common axis", "widths", "no tensors"],
)
def test_data_that_cannot_be_cut_keep_their_batches(batches: list[Any]) -> None:
    chunks = rechunk(batches, 3, lambda some: 1.0)
    assert chunks.batches == tuple(batches)
    assert not chunks.additive


@pytest.mark.parametrize("sizes", [[4, 4, 2], [4], [3], [1]])
def test_batches_of_the_right_size_are_taken_as_they_are(sizes: list[int]) -> None:
    batches = split((VALUES[: sum(sizes)],), sizes)
    chunks = rechunk(batches, 4, mean)
    assert all(a is b for a, b in zip(chunks.batches, batches, strict=True))
    assert chunks.additive


def test_a_step_that_fails_on_other_batches_keeps_its_own() -> None:
    batches = split((VALUES,), [5, 5])

    def fixed_size(some: Sequence[Any]) -> float:
        return mean([(b[0].view(5, 1),) for b in some])

    chunks = rechunk(batches, 4, fixed_size)
    assert chunks.batches == tuple(batches)
    assert not chunks.additive


def test_a_step_that_fails_on_its_own_batches_is_an_error() -> None:
    def broken(some: Sequence[Any]) -> float:
        raise RuntimeError("broken step")

    with pytest.raises(RuntimeError, match="broken step"):
        rechunk(split((VALUES,), [5, 5]), 4, broken)


def test_of_a_large_batch_two_chunks_are_evaluated_to_check() -> None:
    seen: list[int] = []

    def counting(some: Sequence[Any]) -> float:
        seen.append(sum(len(b[0]) for b in some))
        return mean(some)

    assert rechunk([(VALUES,)], 3, counting).additive
    assert seen == [6, 6]
    assert not rechunk([(VALUES,)], 3, lambda some: float(len(some))).additive


def test_a_step_that_takes_no_part_of_its_batch_keeps_it() -> None:
    def fixed_size(some: Sequence[Any]) -> float:
        return mean([(b[0].view(len(VALUES), 1),) for b in some])

    assert rechunk([(VALUES,)], 3, fixed_size).batches[0][0] is VALUES


def test_only_the_first_batches_are_evaluated_to_check() -> None:
    seen: list[int] = []

    def counting(some: Sequence[Any]) -> float:
        seen.append(sum(len(b[0]) for b in some))
        return mean(some)

    rechunk(split((VALUES,), [1] * 10), 3, counting)
    assert seen == [4, 4]


@pytest.mark.parametrize(
    ("num_params", "width", "expected"),
    [(1_000, 1, SMALL_CHUNK), (300_000, 10_000, SMALL_CHUNK), (300_000, 1_000, 512), (10_000_000, 1_000, LARGE_CHUNK)],
    ids=["weights in the cache", "activations outweigh", "weights outweigh", "at most"],
)
def test_chunks_are_as_large_as_it_takes_for_activations_to_outweigh_weights(
    num_params: int, width: int, expected: int
) -> None:
    theta = torch.zeros(num_params)

    def evaluate(some: Sequence[Any]) -> float:
        theta.clone()  # counted once for any number of examples
        return float((some[0][0] * torch.ones(1, width)).view(-1)[0])

    assert suited_size(theta, (torch.ones(64, 1),), evaluate) == expected


def test_a_step_that_refuses_a_few_examples_keeps_the_small_chunk() -> None:
    def whole(some: Sequence[Any]) -> float:
        return float(some[0][0].view(64).sum())

    assert suited_size(torch.zeros(10_000_000), (torch.ones(64, 1),), whole) == SMALL_CHUNK
    assert suited_size(torch.zeros(10_000_000), (torch.ones(1, 1),), whole) == SMALL_CHUNK


def test_additivity_is_seen_on_two_chunks_of_a_large_batch() -> None:
    seen = []

    def watched(some: Sequence[Any]) -> float:
        seen.append(sum(len(b[0]) for b in some))
        return mean(some)

    chunks = rechunk([(torch.arange(100.0),)], 4, watched)
    assert chunks.additive
    assert len(chunks.batches) == 25
    assert seen == [8, 8]
    assert not rechunk([(torch.arange(100.0),)], 4, mean_of_spreads).additive
