"""What a shift does to the training examples, and that it does nothing else."""

import pytest
import torch

from lmc_lightning.data import DataShift, DigitsDataModule, TeacherStudentDataModule
from lmc_lightning.data.images import ImageFiles, LabelledExamples

N, C = 4000, 10


def examples() -> LabelledExamples:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return LabelledExamples(images, torch.arange(N) % C)


def shifted(rows: torch.Tensor | None = None, **kwargs) -> tuple[LabelledExamples, LabelledExamples, torch.Tensor]:
    before = examples()
    after, rows = DataShift(**kwargs).apply(before, torch.arange(N) if rows is None else rows, C)
    return before, after, rows


def changed(before: LabelledExamples, after: LabelledExamples) -> torch.Tensor:
    return before.labels != after.labels


def test_label_noise_replaces_a_share_by_other_classes_evenly():
    before, after, _ = shifted(label_noise=0.3)
    hit = changed(before, after)
    assert abs(hit.double().mean() - 0.3) < 4 * (0.3 * 0.7 / N) ** 0.5
    offsets = ((after.labels - before.labels) % C)[hit]
    counts = torch.bincount(offsets, minlength=C)[1:].double()
    expected = len(offsets) / (C - 1)
    assert ((counts - expected).square() / expected).sum() < 26.1  # χ²₈ at 0.1 %


def test_poison_maps_each_class_to_the_next():
    before, after, _ = shifted(poison=0.4)
    hit = changed(before, after)
    assert abs(hit.double().mean() - 0.4) < 4 * (0.4 * 0.6 / N) ** 0.5
    assert torch.equal(after.labels[hit], (before.labels[hit] + 1) % C)


@pytest.mark.parametrize("kind", ["label_noise", "poison", "image_noise"])
def test_larger_shares_hit_the_same_examples_and_more(kind):
    before, small, _ = shifted(**{kind: 0.1})
    _, large, _ = shifted(**{kind: 0.5})
    if kind == "image_noise":
        hits = [(before.images != some.images).flatten(1).any(1) for some in (small, large)]
        assert torch.equal(small.images[hits[0]], large.images[hits[0]])
    else:
        hits = [changed(before, some) for some in (small, large)]
        assert torch.equal(small.labels[hits[0]], large.labels[hits[0]])
    assert 0 < hits[0].sum() < hits[1].sum()
    assert not (hits[0] & ~hits[1]).any()


def test_all_labels_are_wrong_at_share_one():
    before, after, _ = shifted(label_noise=1.0)
    assert changed(before, after).all()
    before, after, _ = shifted(label_noise=0.5, poison=0.5)
    assert changed(before, after).all()


def test_image_noise_has_the_moments_of_the_set():
    before, after, _ = shifted(image_noise=1.0)
    assert torch.equal(before.labels, after.labels)
    old, new = before.images.double(), after.images.double()
    assert abs(old.mean() - new.mean()) < 1.5
    assert new.std() < old.std()  # clamped to 0 … 255
    assert not torch.equal(after.images[0], after.images[1])


def test_imbalance_keeps_an_exponential_profile():
    _, after, rows = shifted(imbalance=100.0)
    counts = torch.bincount(after.labels[rows], minlength=C)
    assert counts.tolist() == [-(-400 * 100.0 ** (-c / 9) // 1) for c in range(C)]
    assert counts[0] == 100 * counts[-1]


def test_the_first_examples_stay_clean():
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    before, after, rows = shifted(order, label_noise=0.5, poison=0.5, image_noise=1.0, imbalance=10.0, clean=100)
    assert torch.equal(rows[:100], order[:100])
    assert torch.equal(before.labels[order[:100]], after.labels[order[:100]])
    assert torch.equal(before.images[order[:100]], after.images[order[:100]])
    assert changed(before, after)[rows[100:]].all()


def test_examples_outside_the_subset_and_the_source_stay():
    untouched = examples()
    before, after, _ = shifted(torch.arange(1000), label_noise=1.0, image_noise=1.0)
    assert torch.equal(after.labels[1000:], untouched.labels[1000:])
    assert torch.equal(after.images[1000:], untouched.images[1000:])
    assert torch.equal(before.labels, untouched.labels)
    assert torch.equal(before.images, untouched.images)


def test_a_shift_is_a_function_of_its_seed():
    first, again, other = (shifted(label_noise=0.5, seed=seed)[1].labels for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_data_module_shifts_training_examples_alone():
    plain, noisy = DigitsDataModule(), DigitsDataModule(shift=DataShift(label_noise=1.0))
    for split in ("val", "test"):
        for (_, a), (_, b) in zip(plain.probe_batches(split), noisy.probe_batches(split), strict=True):
            assert torch.equal(a, b)
    labels = [torch.cat([y for _, y in module.probe_batches("train")]) for module in (plain, noisy)]
    assert (labels[0] != labels[1]).all()


def test_seeds_of_subset_split_and_order_are_apart():
    def chosen(split: str = "train", **kwargs) -> torch.Tensor:
        module = DigitsDataModule(**kwargs)
        return torch.cat([images.flatten(1) for images, _ in module.probe_batches(split)])

    first = chosen(max_train_examples=50, subset_seed=1)
    assert torch.equal(first, chosen(max_train_examples=50, subset_seed=1, noise_seed=9))
    assert not torch.equal(first, chosen(max_train_examples=50, subset_seed=2))
    assert torch.equal(chosen("val", subset_seed=1), chosen("val", subset_seed=2))
    half = chosen(max_train_examples=0.5, subset_seed=1)
    assert len(half) == round(0.5 * len(chosen()))
    rows = {tuple(row) for row in half.tolist()}
    assert all(tuple(row) in rows for row in first.tolist())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"label_noise": 1.5}, r"`label_noise` is a share in \[0, 1\], got 1.5"),
        ({"label_noise": 0.6, "poison": 0.6}, "shares of the same labels"),
        ({"imbalance": 0.5}, "`imbalance` is at least 1"),
    ],
)
def test_impossible_shifts_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DataShift(**kwargs)


def test_a_share_of_examples_lies_in_its_range():
    with pytest.raises(ValueError, match=r"a share in \(0, 1\], got 1.5"):
        DigitsDataModule(max_train_examples=1.5)


def test_real_targets_have_no_wrong_labels():
    module = TeacherStudentDataModule(20, shift=DataShift(label_noise=0.5))
    with pytest.raises(ValueError, match="need integer labels"):
        module.setup()


def test_images_in_files_cannot_be_replaced(tmp_path):
    files = LabelledExamples(ImageFiles((tmp_path / "a.png",), 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="Raise `memory_limit`"):
        DataShift(image_noise=1.0).apply(files, torch.arange(1), 2)


def test_a_shift_names_what_it_changes():
    assert str(DataShift(label_noise=0.2, seed=3)) == "DataShift(label_noise=0.2, seed=3)"
