import pytest
import torch
from torch import nn

from lmc_lightning.core.params import parameter_layout
from lmc_lightning.landscape.sharpness.perturbations import deviations, filter_norms, lengths, norm, on_sphere
from tests.problems import generator, normal


class Mixed(nn.Module):
    """A convolution with a bias, a scalar, a complex matrix and an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.scale = nn.Parameter(torch.tensor(-2.0))
        self.phase = nn.Parameter(torch.complex(torch.ones(2, 2), 2 * torch.ones(2, 2)))
        self.nothing = nn.Parameter(torch.zeros(0))


LAYOUT = parameter_layout(Mixed())
THETA = LAYOUT.flatten(dict(Mixed().named_parameters()))


def by_name(vector: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(LAYOUT.names, vector.split(LAYOUT.sizes), strict=True))


def test_filters_are_slices_of_weights_and_single_entries_of_vectors() -> None:
    found, theta = by_name(filter_norms(THETA, LAYOUT)), by_name(THETA)
    rows = theta["conv.weight"].reshape(3, -1)
    torch.testing.assert_close(found["conv.weight"].reshape(3, -1), rows.norm(dim=1, keepdim=True).expand(3, 8))
    torch.testing.assert_close(found["conv.bias"], theta["conv.bias"].abs())
    assert found["scale"].item() == 2
    torch.testing.assert_close(found["phase"], torch.full((8,), 10.0).sqrt())
    assert found["nothing"].numel() == 0


def test_lengths_are_those_of_the_unit() -> None:
    assert lengths(THETA, "absolute", LAYOUT).item() == 1
    assert lengths(THETA, "relative", LAYOUT).item() == pytest.approx(float(THETA.norm()), rel=1e-6)
    assert torch.equal(lengths(THETA, "filter", LAYOUT), filter_norms(THETA, LAYOUT))


def test_noise_of_size_1_has_the_norm_of_theta_as_a_whole_or_in_each_filter() -> None:
    assert deviations(THETA, "absolute", LAYOUT).item() == 1
    expected = THETA.numel() ** 0.5 * deviations(THETA, "relative", LAYOUT)
    assert expected.item() == pytest.approx(float(THETA.norm()), rel=1e-6)
    squares = by_name(deviations(THETA, "filter", LAYOUT) ** 2)["conv.weight"].reshape(3, 8).sum(1)
    torch.testing.assert_close(squares.sqrt(), by_name(THETA)["conv.weight"].reshape(3, 8).norm(dim=1))


def test_a_direction_lies_on_the_sphere_and_points_where_it_was_drawn() -> None:
    draw = torch.randn(THETA.shape, generator=generator(0))
    for radius, length in (("absolute", 1.0), ("relative", norm(THETA))):
        found = on_sphere(draw, THETA, radius, LAYOUT)
        assert norm(found) == pytest.approx(length, rel=1e-6)
        torch.testing.assert_close(found / found.norm(), draw / draw.norm())
    found = on_sphere(draw, THETA, "filter", LAYOUT)
    torch.testing.assert_close(filter_norms(found, LAYOUT), filter_norms(THETA, LAYOUT))
    assert torch.equal(found.sign(), draw.sign())


def test_a_filter_of_zeros_stays_and_so_does_one_that_was_drawn_as_zeros() -> None:
    theta = THETA.clone()
    draw = normal(len(theta), seed=1).float()
    weights = {n: slice(sum(LAYOUT.sizes[:i]), sum(LAYOUT.sizes[: i + 1])) for i, n in enumerate(LAYOUT.names)}
    first = weights["conv.weight"].start
    theta[first : first + 8] = 0
    draw[first + 8 : first + 16] = 0
    found = on_sphere(draw, theta, "filter", LAYOUT)
    assert torch.equal(found[first : first + 16].abs(), torch.zeros(16))
    assert bool(found.isfinite().all())
