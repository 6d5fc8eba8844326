import random
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.core.shared_state import SharedState
from tests.problems import cross_entropy

OF_TORCH, OF_NUMPY = torch.Generator().manual_seed(0), np.random.default_rng(0)
OLDER = {"numpy": np.random.RandomState(0), "python": [random.Random(0)]}


def draws() -> list[float]:
    """One number from every generator of this file."""
    older = float(OLDER["numpy"].rand()), OLDER["python"][0].random()
    return [float(torch.rand((), generator=OF_TORCH)), float(OF_NUMPY.random()), *older]


class Base(nn.Linear):
    """State on a parent class."""

    calls = 0
    seen: ClassVar[list[Any]] = []


class Counts(Base):
    """Writes on its classes whatever can be written there, and computes with it."""

    table: ClassVar[dict[str, Any]] = {"nested": {"rows": [1]}}
    name = "a"

    def forward(self, x: Tensor) -> Tensor:
        Base.calls += 1
        Counts.name += "b"
        self.seen.append(1)
        self.table["nested"]["rows"].append(2)
        Counts.added = 3
        scale = Base.calls + sum(draws())
        return scale * super().forward(x)


def shared() -> list[Any]:
    return [Base.calls, Counts.name, list(Base.seen), repr(Counts.table), hasattr(Counts, "added")]


def test_classes_and_the_generators_of_their_files_are_as_before() -> None:
    module, before = nn.Sequential(Counts(2, 2)), shared()
    state = SharedState(module)
    with state.preserved():
        expected = draws()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), state.preserved():
        module(torch.ones(1, 3))
    assert shared() == before
    assert draws() == expected


def test_every_evaluation_starts_from_the_same_shared_state() -> None:
    module, before = Counts(2, 2), shared()
    objective = Objective(
        module, [(torch.ones(2, 2), torch.zeros(2, dtype=torch.long))] * 3, cross_entropy, chunk_size=2
    )
    theta = objective.theta()
    losses = objective.evaluate(theta).chunk_losses
    assert torch.equal(losses, objective.evaluate(theta).chunk_losses)
    assert len(set(losses.tolist())) == 1
    assert shared() == before


def test_the_classes_of_torch_are_left_alone() -> None:
    assert SharedState(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)))._classes == []
