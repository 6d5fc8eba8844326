import copy
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lmc_lightning.data import CIFAR10DataModule, MNISTDataModule, VisionDataModule, datamodule, epoch_order
from tests.data.layouts import write_mnist

PLAIN = {"mean": (0.0,), "std": (1 / 255,)}


def make(cifar_dir, **kwargs) -> CIFAR10DataModule:
    return CIFAR10DataModule(cifar_dir, **{"batch_size": 16, "val_fraction": 0.1, **kwargs})


def one_pass(loader: DataLoader, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    loader.sampler.set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def trainer_on_cpu(distributed_sampler_kwargs: dict[str, int] | None = None) -> SimpleNamespace:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(strategy=strategy, distributed_sampler_kwargs=distributed_sampler_kwargs)


def split_images(module: VisionDataModule, split: str) -> torch.Tensor:
    return torch.cat([images for images, _ in module.probe_batches(split)])


def rows_of(images: torch.Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in images.flatten(1)[:, :20].tolist()]


def test_a_pass_is_the_epoch_order_of_the_training_split(cifar_dir):
    module = make(cifar_dir, noise_seed=5)
    images = split_images(module, "train")
    loader = module.train_dataloader()
    for epoch in (0, 3):
        assert torch.equal(one_pass(loader, epoch)[0], images[epoch_order(36, 5, epoch)])


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [16, 16, 4]), (True, [16, 16])])
def test_batch_sizes(cifar_dir, drop_last, sizes):
    module = make(cifar_dir, drop_last=drop_last)
    assert [len(labels) for _, labels in module.train_dataloader()] == sizes
    assert [len(labels) for _, labels in make(cifar_dir, drop_last=drop_last, batch_size=3).val_dataloader()] == [3, 1]


def test_batches_are_normalised_floats_and_labels(cifar_dir):
    images, labels = next(iter(make(cifar_dir, augment=True).train_dataloader()))
    assert (images.dtype, labels.dtype, images.shape) == (torch.float32, torch.int64, (16, 3, 32, 32))


def test_any_epoch_is_replayed_bit_for_bit_by_another_module(cifar_dir):
    first, second = (make(cifar_dir, noise_seed=4, augment=True) for _ in range(2))
    loader = first.train_dataloader()
    passes = [one_pass(loader, epoch)[0] for epoch in range(4)]
    assert torch.equal(one_pass(second.train_dataloader(), 3)[0], passes[3])
    assert not torch.equal(passes[2], passes[3])


def test_each_stream_follows_its_own_seed(cifar_dir):
    module = make(cifar_dir, noise_seed=4, augment=True)
    images, labels = one_pass(module.train_dataloader())
    back = epoch_order(36, 4, 0).argsort()
    module.order_seed = 9
    reordered, _ = one_pass(module.train_dataloader())
    assert torch.equal(reordered, images[back][epoch_order(36, 9, 0)])
    module.order_seed, module.augmentation_seed = None, 9
    augmented, same_labels = one_pass(module.train_dataloader())
    assert torch.equal(same_labels, labels)
    assert not torch.equal(augmented, images)


def test_seeds_set_at_any_time_rule_the_next_pass(cifar_dir):
    expected = one_pass(make(cifar_dir, noise_seed=7, augment=True).train_dataloader(), 2)[0]
    module = make(cifar_dir, augment=True)
    loader = module.train_dataloader()
    before = one_pass(loader, 2)[0]
    module.noise_seed = 7
    assert not torch.equal(before, expected)
    assert torch.equal(one_pass(loader, 2)[0], expected)
    early = make(cifar_dir, augment=True)
    early.noise_seed = 7
    assert torch.equal(one_pass(early.train_dataloader(), 2)[0], expected)


@pytest.mark.parametrize("augment", [False, True])
def test_two_processes_see_the_halves_of_the_one_process_epoch(cifar_dir, augment):
    whole, labels = one_pass(make(cifar_dir, augment=augment).train_dataloader(), 2)
    for rank in range(2):
        module = make(cifar_dir, augment=augment)
        module.trainer = trainer_on_cpu({"num_replicas": 2, "rank": rank})
        shard, shard_labels = one_pass(module.train_dataloader(), 2)
        assert torch.equal(shard, whole[rank::2])
        assert torch.equal(shard_labels, labels[rank::2])


def test_without_a_trainer_the_process_group_decides(cifar_dir, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    sampler = make(cifar_dir).train_dataloader().sampler
    assert list(sampler) == epoch_order(36, 0, 0).tolist()[2::3]


def test_a_new_seed_waits_for_the_end_of_a_pass(cifar_dir):
    module = make(cifar_dir, augment=True)
    loader = module.train_dataloader()
    expected = one_pass(loader)[0]
    iterator = iter(loader)
    begun = [next(iterator)[0]]
    module.noise_seed = 7
    assert torch.equal(torch.cat(begun + [images for images, _ in iterator]), expected)


def test_a_deep_copy_shares_images_but_not_seeds_nor_trainer(cifar_dir):
    module = make(cifar_dir, augment=True)
    expected = one_pass(module.train_dataloader())[0]
    module.trainer = trainer_on_cpu()
    child = copy.deepcopy(module)
    child.noise_seed = 7
    assert child.trainer is None
    assert module.trainer is not None
    assert module.noise_seed == 0
    sources = [m.train_dataloader().dataset.source.images for m in (module, child)]
    assert sources[0].data_ptr() == sources[1].data_ptr()
    assert torch.equal(one_pass(module.train_dataloader())[0], expected)
    assert not torch.equal(one_pass(child.train_dataloader())[0], expected)


@pytest.mark.parametrize("set_up", [False, True])
def test_pickles(cifar_dir, set_up):
    module = make(cifar_dir, noise_seed=2, augment=True)
    if set_up:
        module.setup()
    unpickled = pickle.loads(pickle.dumps(module))
    assert torch.equal(one_pass(unpickled.train_dataloader(), 1)[0], one_pass(module.train_dataloader(), 1)[0])


def global_generators() -> tuple[object, ...]:
    numpy_state = np.random.get_state()  # noqa: NPY002 - the legacy global generator is the one to watch
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist()


def test_no_global_generator_moves(cifar_dir):
    module = make(cifar_dir, augment=True)
    before = global_generators()
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        list(loader)
        next(iter(loader))
    module.probe_batches("train", 7, seed=3)
    assert global_generators() == before


def test_splits_are_disjoint_and_cover_the_training_set(cifar_dir):
    module = make(cifar_dir, val_fraction=0.25, **PLAIN)
    train, val = (rows_of(split_images(module, split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (30, 10)
    assert not set(train) & set(val)
    assert set(train) | set(val) == set(rows_of(split_images(make(cifar_dir, val_fraction=0, **PLAIN), "train")))


def test_the_split_is_a_function_of_its_seed_alone(cifar_dir):
    def held_out(**kwargs):
        return rows_of(split_images(make(cifar_dir, **kwargs), "val"))

    assert held_out(split_seed=1) == held_out(split_seed=1, noise_seed=5, augment=True, batch_size=2)
    assert held_out(split_seed=1) != held_out(split_seed=2)


def test_without_a_validation_share_all_is_trained_on_and_validation_is_the_test_set(cifar_dir):
    module = make(cifar_dir, val_fraction=0)
    assert len(module.train_dataloader().dataset) == 40
    assert torch.equal(split_images(module, "val"), split_images(module, "test"))
    assert torch.equal(torch.cat([images for images, _ in module.val_dataloader()]), split_images(module, "test"))


def test_evaluation_neither_augments_nor_shuffles(cifar_dir):
    plain, augmented = make(cifar_dir), make(cifar_dir, augment=True)
    for split in ("val", "test"):
        loader = getattr(augmented, f"{split}_dataloader")()
        assert torch.equal(torch.cat([images for images, _ in loader]), split_images(plain, split))
    assert torch.equal(split_images(augmented, "train"), split_images(plain, "train"))


def test_limited_training_sets_are_nested(cifar_dir):
    few, more = (rows_of(split_images(make(cifar_dir, max_train_examples=n), "train")) for n in (5, 20))
    assert (len(few), len(more)) == (5, 20)
    assert set(few) < set(more) < set(rows_of(split_images(make(cifar_dir), "train")))
    assert len(split_images(make(cifar_dir, max_train_examples=5), "val")) == 4


def test_probe_samples_are_nested_and_of_one_seed(cifar_dir):
    module = make(cifar_dir)
    small, large, other = (
        torch.cat([images for images, _ in module.probe_batches("train", n, seed)])
        for n, seed in ((8, 1), (20, 1), (8, 2))
    )
    assert torch.equal(small, large[:8])
    assert not torch.equal(small, other)
    assert len(set(rows_of(large))) == 20


def test_probe_samples_ignore_noise_augmentation_and_loaders(cifar_dir):
    plain, noisy = make(cifar_dir), make(cifar_dir, noise_seed=9, augment=True, batch_size=4)
    one_pass(noisy.train_dataloader(), 3)
    for batch, other in zip(plain.probe_batches("train", 12), noisy.probe_batches("train", 12), strict=True):
        assert torch.equal(batch[0], other[0])
        assert torch.equal(batch[1], other[1])


def test_probe_batches_hold_256_examples_and_at_most_the_split(tmp_path):
    write_mnist(tmp_path, train=600)
    module = MNISTDataModule(tmp_path, val_fraction=0)
    assert [len(labels) for _, labels in module.probe_batches("train")] == [256, 256, 88]
    assert [len(labels) for _, labels in module.probe_batches("train", 300)] == [256, 44]
    assert [len(labels) for _, labels in module.probe_batches("test", 2048)] == [12]
    ((images, labels),) = module.probe_batches("test", 2048)
    ((whole, _),) = module.probe_batches("test")
    assert sorted(rows_of(images)) == sorted(rows_of(whole))
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("split", ["training", "predict"])
def test_an_unknown_split_is_refused(cifar_dir, split):
    with pytest.raises(ValueError, match=f"`split` is 'train', 'val' or 'test', got '{split}'"):
        make(cifar_dir).probe_batches(split)


@pytest.mark.parametrize("val_fraction", [-0.1, 1, 5000])
def test_an_impossible_validation_share_is_refused(val_fraction):
    with pytest.raises(ValueError, match=r"share of the training set in \[0, 1\), got"):
        MNISTDataModule(val_fraction=val_fraction)


def test_statistics_need_a_value_per_channel():
    with pytest.raises(ValueError, match=r"one value per channel \(3\)"):
        CIFAR10DataModule(mean=(0.5, 0.5))


def test_images_are_resized_and_padded_to_the_network(tmp_path):
    write_mnist(tmp_path)
    for kwargs in ({"image_size": 32}, {"resize": 28, "image_size": 32}, {"resize": 36, "image_size": 32}):
        module = MNISTDataModule(tmp_path, augment=True, **kwargs)
        assert module.dims == (1, 32, 32)
        assert next(iter(module.train_dataloader()))[0].shape[1:] == (1, 32, 32)
    assert MNISTDataModule(tmp_path, resize=20).dims == (1, 20, 20)


def test_a_missing_set_is_fetched_only_when_asked_for(tmp_path, monkeypatch):
    fetched = []

    def fetch(name, data_dir):
        fetched.append((name, data_dir))
        write_mnist(data_dir / "MNIST" / "raw")

    monkeypatch.setattr(datamodule, "download", fetch)
    MNISTDataModule(tmp_path).prepare_data()
    assert fetched == []
    module = MNISTDataModule(tmp_path, download=True)
    assert len(module.probe_batches("test")) == 1
    module.prepare_data()
    assert fetched == [("mnist", tmp_path)]
