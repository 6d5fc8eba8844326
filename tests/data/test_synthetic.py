"""Sets that are made, against their formulas."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons

from lmc_lightning.data import (
    ModularAdditionDataModule,
    SwissRollDataModule,
    TeacherStudentDataModule,
    TwoMoonsDataModule,
    build_datamodule,
)


def whole(module, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    features, labels = zip(*module.probe_batches(split), strict=True)
    return torch.cat(features), torch.cat(labels)


def test_two_moons_are_those_of_scikit_learn():
    features, labels = whole(TwoMoonsDataModule(200, noise=0.2, data_seed=42))
    points, classes = make_moons(200, noise=0.2, random_state=42)
    assert np.array_equal(features.numpy(), points.astype(np.float32))
    assert np.array_equal(labels.numpy(), classes)


def test_the_swiss_roll_lies_on_its_arms():
    features, labels = whole(SwissRollDataModule(100, turns=2, noise=0.0))
    radius = features.norm(dim=1)
    angle = 2 * math.pi * 2 * radius + math.pi * labels
    torch.testing.assert_close(features, torch.stack([radius * angle.cos(), radius * angle.sin()], 1))
    assert radius.min() >= 0.1
    assert radius.max() <= 1.0
    assert labels.sum() == 50


def test_modular_addition_has_every_pair_once():
    p = 11
    module = ModularAdditionDataModule(p, train_fraction=0.3)
    (train, train_labels), (test, test_labels) = whole(module), whole(module, "test")
    assert len(train) == round(0.3 * p**2)
    features, labels = torch.cat([train, test]), torch.cat([train_labels, test_labels])
    a, b = features[:, :p].argmax(1), features[:, p:].argmax(1)
    assert features.sum() == 2 * p**2
    assert sorted((p * a + b).tolist()) == list(range(p**2))
    assert torch.equal(labels, (a + b) % p)


def test_the_teacher_answers_as_it_says():
    module = TeacherStudentDataModule(50, num_features=4, hidden=3, num_outputs=2)
    features, targets = whole(module)
    first, last = module.teacher[0].weight, module.teacher[2].weight
    torch.testing.assert_close(targets, (features @ first.T).clamp(min=0) @ last.T)
    classes = TeacherStudentDataModule(50, num_features=4, hidden=3, num_classes=2)
    assert torch.equal(whole(classes)[1], targets.argmax(1))


@pytest.mark.parametrize("name", ["two_moons", "swiss_roll", "modular_addition", "teacher_student"])
def test_sets_are_functions_of_their_seed_and_draw_from_no_global_generator(name):
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (whole(build_datamodule(name, data_seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    module = build_datamodule(name, batch_size=32)
    features, _ = next(iter(module.train_dataloader()))
    assert features.shape == (32, *module.dims)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_training_and_test_points_differ():
    module = TwoMoonsDataModule(200)
    assert not torch.equal(whole(module)[0], whole(module, "test")[0][:200])


def test_a_share_of_pairs_lies_in_its_range():
    with pytest.raises(ValueError, match="share of the pairs"):
        ModularAdditionDataModule(train_fraction=1.0)
