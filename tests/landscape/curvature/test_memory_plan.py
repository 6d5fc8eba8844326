"""Vectors take up to half of the budget but never fewer than are needed; graphs get the rest."""

from typing import Any

import pytest
import torch

from lmc_lightning.core.collective import Collective
from lmc_lightning.landscape.curvature.memory_plan import FEWEST_STEPS, MemoryPlan, memory_plan

VECTOR = 4 * 1000
"""Bytes of a vector of 1,000 numbers."""


def plan(budget: int, **options: Any) -> MemoryPlan:
    request: dict[str, Any] = {
        "num_pairs": 6,
        "guard": 2,
        "max_products": 64,
        "num_probes": 8,
        "num_steps": 24,
        "block_size": None,
    }
    return memory_plan(torch.zeros(1000), budget, options.pop("collective", Collective()), **request | options)


def test_a_large_budget_restricts_nothing() -> None:
    found = plan(1000 * VECTOR)
    assert found == MemoryPlan(1000 * VECTOR, (1000 - 64) * VECTOR, None, 24, 1)


def test_a_small_budget_means_restarts_and_no_graphs_beyond_half_of_it() -> None:
    found = plan(80 * VECTOR)
    assert (found.max_basis, found.graphs, found.num_steps) == (40, 40 * VECTOR, 24)
    found = plan(50 * VECTOR)
    assert (found.max_basis, found.num_steps) == (25, 25 - 6)


@pytest.mark.parametrize("budget", [0, VECTOR, 10 * VECTOR])
def test_what_the_algorithms_need_is_there_whatever_the_budget(budget: int) -> None:
    found = plan(budget)
    assert (found.max_basis, found.num_steps, found.block_size) == (16, FEWEST_STEPS, 1)
    assert 0 <= found.graphs <= budget


def test_fewer_steps_are_not_made_more() -> None:
    assert plan(0, num_steps=3).num_steps == 3
    assert plan(0, max_products=10).max_basis == 16


def test_a_block_size_that_is_asked_for_is_taken_and_never_exceeds_the_probes() -> None:
    assert plan(1000 * VECTOR, block_size=4).block_size == 4
    assert plan(1000 * VECTOR, block_size=16).block_size == 8
    assert plan(0, block_size=4).block_size == 4
    assert plan(1000 * VECTOR, block_size=4, num_probes=0, num_pairs=3).block_size == 3
    assert plan(1000 * VECTOR, block_size=4).graphs == (1000 - (6 + 4 * 24)) * VECTOR


def test_vectors_go_in_blocks_elsewhere_than_on_the_cpu_as_memory_allows() -> None:
    theta = torch.zeros(1000, device="meta")
    common = {"num_pairs": 6, "guard": 2, "max_products": 64, "num_probes": 32, "num_steps": 24, "block_size": None}
    sizes = [memory_plan(theta, n * VECTOR, Collective(), **common).block_size for n in (10_000, 2 * (6 + 3 * 24), 0)]
    assert sizes == [16, 3, 1]


class Poorer(Collective):
    """Another process has less memory."""

    def gather(self, compute: Any) -> torch.Tensor:
        return torch.cat([compute(), torch.tensor([50 * VECTOR])])


def test_all_processes_decide_alike() -> None:
    assert plan(1000 * VECTOR, collective=Poorer()) == plan(50 * VECTOR)
