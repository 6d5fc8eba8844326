import pytest
import torch

from lmc_lightning.core.random_vectors import derive_seed, gaussian, rademacher, sphere


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("draw", [rademacher, gaussian, sphere])
def test_a_seed_gives_the_same_vector_in_every_dtype(draw):
    single = draw(1000, generator())
    double = draw(1000, generator(), dtype=torch.float64)
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    assert single.shape == double.shape == (1000,)
    torch.testing.assert_close(single, double.float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("draw", [rademacher, gaussian, sphere])
def test_draws_follow_the_generator_alone(draw):
    before = torch.get_rng_state()
    stream = generator()
    first, second = draw(64, stream), draw(64, stream)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, draw(64, generator()))
    assert not torch.equal(first, second)


def test_rademacher_entries_are_fair_signs():
    vector = rademacher(100_000, generator())
    assert torch.equal(vector.abs(), torch.ones(100_000))
    assert abs(vector.mean()) < 4 / 100_000**0.5


def test_gaussian_has_unit_variance_and_fourth_moment_three():
    vector = gaussian(100_000, generator(), dtype=torch.float64)
    assert abs(vector.mean()) < 4 / 100_000**0.5
    assert abs(vector.var() - 1) < 4 * (2 / 100_000) ** 0.5
    assert abs((vector**4).mean() - 3) < 4 * (96 / 100_000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sphere_has_norm_one_to_rounding(dtype):
    norm = torch.linalg.vector_norm(sphere(10_000, generator(), dtype=dtype).double())
    assert abs(norm - 1) < 4 * torch.finfo(dtype).eps


def test_sphere_is_isotropic():
    draws = torch.stack([sphere(3, stream) for stream in [generator(9)] for _ in range(4000)])
    torch.testing.assert_close(draws.T @ draws / 4000, torch.eye(3) / 3, rtol=0, atol=0.03)


def test_derived_seeds_are_frozen():
    assert derive_seed(0) == 7520536977032167579
    assert derive_seed(0, "order", 1) == 8677279991123922410


def test_derived_seeds_of_different_names_differ():
    seeds = [
        derive_seed(0),
        derive_seed(1),
        derive_seed(0, "order"),
        derive_seed(0, "order", 1),
        derive_seed(0, "order", "1"),
        derive_seed(0, "order1"),
        derive_seed(0, "ord", "er"),
        derive_seed(0, 1, "order"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
