import functools
import io
import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from lmc_lightning.branching.forks.noise import noise_state, reachable, renew_noise, seeds_of_process, set_noise_state

ONE_PROCESS = seeds_of_process(0, ())


class Box:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class EpochSampler(Box):
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def roots() -> dict[str, Any]:
    bit_generators = [np.random.PCG64(1), np.random.MT19937(2), np.random.Philox(3), np.random.SFC64(4)]
    numpy = {type(b).__name__: np.random.Generator(b) for b in bit_generators}
    own = {"torch": torch.Generator().manual_seed(5), "legacy": np.random.RandomState(6)}
    data = Box(numpy=numpy, inner=Box(transforms=[Box(own=own), functools.partial(print, random.Random(7))]))
    return {
        "train": [data, EpochSampler(seed=8)],
        "datamodule": Box(noise_seed=9, seed=10),
        "val": Box(g=random.Random(11)),
    }


def draws(roots: dict[str, Any]) -> list[float]:
    values = [float(torch.rand(1)), float(np.random.rand()), random.random()]  # noqa: NPY002
    for _, value in reachable(roots):
        if isinstance(value, torch.Generator):
            values.append(float(torch.rand(1, generator=value)))
        elif isinstance(value, np.random.Generator):
            values += [float(value.normal()), float(value.random(dtype=np.float32))]
        elif isinstance(value, np.random.RandomState):
            values.append(float(value.randn()))
        elif isinstance(value, random.Random):
            values.append(value.gauss(0, 1))
    return values


def plain(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_noise_is_replayed_in_copies_from_a_plain_file() -> None:
    mine, copies = roots(), roots()
    draws(mine)  # leaves half-used normals and 32-bit words behind
    state = plain(noise_state(mine))
    expected = draws(mine)
    assert len(expected) == 3 + 2 * 4 + 4
    set_noise_state(state, copies)
    assert draws(copies) == expected


def test_seeds_are_part_of_the_noise() -> None:
    mine = roots()
    state = noise_state(mine)
    assert state["seeds"] == {"train[1].seed": 8, "datamodule.noise_seed": 9}  # a `seed` alone may mean anything
    renew_noise(1234, mine, ONE_PROCESS)
    assert mine["datamodule"].noise_seed == 1234
    assert mine["datamodule"].seed == 10
    assert mine["train"][1].seed not in (8, 1234)
    set_noise_state(state, mine)
    assert (mine["train"][1].seed, mine["datamodule"].noise_seed) == (8, 9)


def test_new_noise_is_a_function_of_the_seed_and_leaves_validation_alone() -> None:
    def renewed(seed: int) -> list[float]:
        mine = roots()
        renew_noise(seed, mine, ONE_PROCESS)
        return draws(mine)

    validation = random.Random(11).gauss(0, 1)
    first, second, old = renewed(1), renewed(2), draws(roots())
    assert renewed(1) == first
    assert first[-1] == second[-1] == old[-1] == validation
    assert not set(first[:-1]) & set(second[:-1])
    assert len(set(first)) == len(first)


def test_a_generator_in_two_places_is_seeded_once() -> None:
    generator = torch.Generator()
    loader = DataLoader([1, 2, 3], shuffle=True, generator=generator)  # type: ignore[arg-type]
    state = noise_state({"train": [loader], "again": generator})
    assert len(state["generators"]) == 1


def test_looks_at_nothing_that_is_made_on_demand() -> None:
    class Lazy:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"{name} was looked at")

    assert noise_state({"train": Lazy(), "module": Box(trainer=Box(g=torch.Generator()))})["generators"] == {}


def test_depth_is_limited_and_cycles_end() -> None:
    deep = Box(a=Box(a=Box(a=Box(g=random.Random(0), a=Box(g=random.Random(1))))))
    deep.cycle = deep
    assert list(noise_state({"r": deep})["generators"]) == ["r.a.a.a.g"]
