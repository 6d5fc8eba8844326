"""Heat maps of similarity: what is written, labelled and left grey."""

import torch
from matplotlib.colors import to_rgb

from lmc_lightning.landscape.similarity.cka import Similarity
from lmc_lightning.plotting.similarity import plot_similarity
from lmc_lightning.plotting.style import BLANK, figure_of, pixels


def of(num_a: int, num_b: int) -> Similarity:
    values = torch.linspace(0, 1, num_a * num_b, dtype=torch.float64).reshape(num_a, num_b)
    names = [tuple(f"net.layer_{i}" for i in range(n)) for n in (num_a, num_b)]
    return Similarity(names[0], names[1], values, values.flip(0), 0 * values, 64)


def test_cells_hold_the_debiased_values_and_axes_the_distinct_part_of_the_names() -> None:
    ax = plot_similarity(of(2, 3), names=("start", "step 6"), caption="digits")
    assert [t.get_text() for t in ax.texts if "." in t.get_text()] == ["0.00", "0.20", "0.40", "0.60", "0.80", "1.00"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["layer_0", "layer_1"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layers of step 6", "layers of start")
    assert "64 examples · digits" in [t.get_text() for t in ax.texts]


def test_what_is_undefined_stays_grey_without_a_number() -> None:
    one = of(1, 1)
    one.debiased.fill_(torch.nan)
    ax = plot_similarity(one)
    assert not [t for t in ax.texts if "nan" in t.get_text()]
    grey = (255 * torch.tensor(to_rgb(BLANK))).round().to(torch.uint8)
    assert bool((torch.from_numpy(pixels(figure_of(ax))) == grey).all(-1).sum() > 10_000)


def test_large_maps_have_few_labels_and_no_numbers() -> None:
    ax = plot_similarity(of(60, 60))
    assert len(ax.get_xticklabels()) <= 24
    assert not [t for t in ax.texts if t.get_text().startswith("0.")]
