import shutil

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lmc_lightning.data import (
    CIFAR10DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    MNISTDataModule,
    SVHNDataModule,
    TinyImageNetDataModule,
    VisionDataModule,
    build_datamodule,
    vision,
)
from lmc_lightning.data.images import ImageFiles
from tests.data.layouts import (
    labels,
    write_cifar10_batches,
    write_class_folders,
    write_mnist,
    write_svhn,
    write_tiny_imagenet,
)

PLAIN = {"val_fraction": 0, "mean": (0.0,), "std": (1 / 255,), "batch_size": 1000}
"""Grey levels as they are, a split in one batch."""


def grey_levels(datamodule: VisionDataModule, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    ((images, classes),) = datamodule.probe_batches(split)
    return images.round().to(torch.uint8), classes


def assert_holds(datamodule: VisionDataModule, split: str, images: np.ndarray, classes: np.ndarray) -> None:
    found, found_classes = grey_levels(datamodule, split)
    assert torch.equal(found, torch.from_numpy(images))
    assert torch.equal(found_classes, torch.from_numpy(classes).long())


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("sub_folder", ["MNIST/raw", ""])
def test_mnist_is_read_in_place(tmp_path, compress, sub_folder):
    written = write_mnist(tmp_path / sub_folder, compress=compress)
    listing = sorted(path.name for path in (tmp_path / sub_folder).iterdir())
    for split, images in written.items():
        assert_holds(MNISTDataModule(tmp_path, **PLAIN), split, images[:, None], labels(len(images)))
    assert sorted(path.name for path in (tmp_path / sub_folder).iterdir()) == listing


def test_fashion_mnist_falls_back_on_the_debian_folder(tmp_path, monkeypatch):
    debian = write_mnist(tmp_path / "debian")
    monkeypatch.setattr(vision, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    datamodule = FashionMNISTDataModule(tmp_path / "data", **PLAIN)
    assert_holds(datamodule, "train", debian["train"][:, None], labels(40))
    own = write_mnist(tmp_path / "data" / "FashionMNIST" / "raw", train=20)
    assert_holds(FashionMNISTDataModule(tmp_path / "data", **PLAIN), "train", own["train"][:, None], labels(20))


def test_cifar10_from_pickled_batches(tmp_path):
    written = write_cifar10_batches(tmp_path / "cifar-10-batches-py")
    datamodule = CIFAR10DataModule(tmp_path, **PLAIN)
    assert_holds(datamodule, "train", written["train"], np.tile(labels(8), 5))
    assert_holds(datamodule, "test", written["test"], labels(8))


@pytest.mark.parametrize("sub_folder", ["cifar10", ""])
def test_cifar10_from_class_folders(tmp_path, sub_folder):
    write_class_folders(tmp_path / sub_folder / "train", per_class=3)
    write_class_folders(tmp_path / sub_folder / "test", per_class=1)
    images, classes = grey_levels(CIFAR10DataModule(tmp_path, **PLAIN), "train")
    assert images.shape == (30, 3, 32, 32)
    assert classes.tolist() == [label for label in range(10) for _ in range(3)]
    assert images[:, 0, 0, 0].tolist() == [10 * label + number for label in range(10) for number in range(3)]
    assert grey_levels(CIFAR10DataModule(tmp_path, **PLAIN), "test")[1].tolist() == list(range(10))


def test_decoded_folders_are_kept_until_their_files_change(tmp_path, monkeypatch):
    for split in ("train", "test"):
        write_class_folders(tmp_path / split)
    before = grey_levels(CIFAR10DataModule(tmp_path, **PLAIN), "train")[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "test_uint8.pt", "train", "train_uint8.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "read_all", None)  # nothing is decoded
        assert torch.equal(grey_levels(CIFAR10DataModule(tmp_path, **PLAIN), "train")[0], before)
    shutil.copy(tmp_path / "train" / "truck" / "0001.png", tmp_path / "train" / "airplane" / "0002.png")
    after, classes = grey_levels(CIFAR10DataModule(tmp_path, **PLAIN), "train")
    assert classes.tolist() == [0] * 3 + [label for label in range(1, 10) for _ in range(2)]
    assert torch.equal(after[[0, 1, *range(3, 21)]], before)
    assert torch.equal(after[2], before[-1])


@pytest.mark.parametrize("failure", [OSError("No space left on device"), RuntimeError("open file failed")])
def test_decoded_folders_are_read_where_nothing_can_be_kept(tmp_path, monkeypatch, failure):
    def fill_the_disk(content, path):
        path.write_bytes(b"part")
        raise failure

    for split in ("train", "test"):
        write_class_folders(tmp_path / split)
    monkeypatch.setattr(torch, "save", fill_the_disk)
    assert len(grey_levels(CIFAR10DataModule(tmp_path, **PLAIN), "test")[1]) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "train"]


def test_svhn_channels_and_the_digit_zero(tmp_path):
    written = write_svhn(tmp_path / "SVHN")
    digits = np.arange(1, 21) % 10 + 1  # as stored: 2 … 10, 1, …; 10 stands for the digit 0
    for split, images in written.items():
        assert_holds(SVHNDataModule(tmp_path, **PLAIN), split, images.transpose(3, 2, 0, 1), digits % 10)


@pytest.mark.parametrize("sub_folder", ["tiny-imagenet-200", ""])
def test_tiny_imagenet_classes_are_sorted_and_val_is_the_test_set(tmp_path, sub_folder):
    held_out = write_tiny_imagenet(tmp_path / sub_folder)
    datamodule = TinyImageNetDataModule(tmp_path, **PLAIN)
    images, classes = grey_levels(datamodule, "train")
    assert images.shape == (12, 3, 64, 64)
    assert classes.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images[:, 0, 0, 0].tolist() == [50, 51, 52, 53, 100, 101, 102, 103, 0, 1, 2, 3]  # n01, n02, n03
    images, classes = grey_levels(datamodule, "test")
    assert classes.tolist() == [int(wnid[-1]) - 1 for wnid, _ in held_out]
    assert images[:, 2, 5, 5].tolist() == [level for _, level in held_out]


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_image_folder_with_a_held_out_folder(tmp_path, held_out):
    write_class_folders(tmp_path / "train", ("cat", "dog", "emu"), per_class=4, edge=40)
    write_class_folders(tmp_path / held_out, ("cat", "dog", "emu"), per_class=1, edge=50)
    datamodule = ImageFolderDataModule(tmp_path, image_size=24, resize=32, **PLAIN)
    assert datamodule.dims == (3, 24, 24)
    assert datamodule.num_classes == 3
    assert datamodule.class_names == ["cat", "dog", "emu"]
    images, _ = grey_levels(datamodule, "train")
    assert images.shape == (12, 3, 24, 24)
    assert images[:, 0, 0, 0].tolist() == [10 * label + number for label in range(3) for number in range(4)]
    assert grey_levels(datamodule, "test")[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("sub_folder", ["train", ""])
def test_image_folder_without_a_held_out_folder_is_split(tmp_path, sub_folder):
    write_class_folders(tmp_path / sub_folder, ("cat", "dog"), per_class=5, edge=8)
    datamodule = ImageFolderDataModule(tmp_path, image_size=8, resize=None, **PLAIN)
    parts = [grey_levels(datamodule, split) for split in ("train", "test")]
    assert [len(classes) for _, classes in parts] == [8, 2]
    levels = torch.cat([images[:, 0, 0, 0] for images, _ in parts])
    assert sorted(levels.tolist()) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert torch.equal(levels // 10, torch.cat([classes for _, classes in parts]))


def test_image_folder_beyond_its_memory_limit_decodes_the_same_batches(tmp_path):
    write_class_folders(tmp_path, ("cat", "dog"), per_class=10, edge=12)
    eager, lazy = (
        ImageFolderDataModule(tmp_path, image_size=8, resize=9, augment=True, memory_limit=limit) for limit in (1, 0)
    )
    for loaders in (
        (eager.train_dataloader(), lazy.train_dataloader()),
        (eager.val_dataloader(), lazy.val_dataloader()),
    ):
        for (images, classes), (other_images, other_classes) in zip(*loaders, strict=True):
            assert torch.equal(images, other_images)
            assert torch.equal(classes, other_classes)


def test_digits_are_those_of_scikit_learn_split_in_three():
    datamodule = DigitsDataModule(image_size=8, mean=(0.0,), std=(1 / 255,))
    parts = [datamodule.probe_batches(split) for split in ("train", "val", "test")]
    assert [sum(len(classes) for _, classes in part) for part in parts] == [1150, 288, 359]
    found = torch.cat([images.flatten(1) for part in parts for images, _ in part])
    classes = torch.cat([classes for part in parts for _, classes in part])
    digits = load_digits()
    expected = np.column_stack([(digits.data * 255 / 16).round(), digits.target])
    assert sorted(map(tuple, torch.column_stack([found.round(), classes]).tolist())) == sorted(map(tuple, expected))


def test_digits_are_enlarged_to_the_input_of_mnist_networks():
    datamodule = DigitsDataModule()
    assert datamodule.dims == (1, 28, 28)
    images = torch.cat([images for images, _ in datamodule.probe_batches("train")])
    assert images.shape == (1150, 1, 28, 28)
    assert abs(images.mean().item()) < 0.05


@pytest.mark.parametrize(
    ("name", "dims", "num_classes"),
    [
        ("digits", (1, 28, 28), 10),
        ("mnist", (1, 28, 28), 10),
        ("fashion_mnist", (1, 28, 28), 10),
        ("cifar10", (3, 32, 32), 10),
        ("svhn", (3, 32, 32), 10),
        ("tiny_imagenet", (3, 64, 64), 200),
        ("image_folder", (3, 224, 224), 2),
    ],
)
def test_factory(tmp_path, name, dims, num_classes):
    write_class_folders(tmp_path, ("cat", "dog"))
    datamodule = build_datamodule(name, data_dir=tmp_path, noise_seed=3)
    assert datamodule.dataset_name == name
    assert (datamodule.dims, datamodule.num_classes, datamodule.noise_seed) == (dims, num_classes, 3)


def test_factory_names_the_choices():
    with pytest.raises(ValueError, match=r"Expected one of digits, mnist, .*, two_moons, .*, got 'imagenet'"):
        build_datamodule("imagenet")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "svhn", "tiny_imagenet"])
def test_a_missing_set_is_reported_with_folders_and_command(tmp_path, monkeypatch, name):
    monkeypatch.setattr(vision, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    folder = tmp_path / "my data"
    command = f"python -m lmc_lightning.data download {name} --data-dir '{folder}'"
    with pytest.raises(FileNotFoundError, match=rf"(?s)No complete data set in\n  {folder}.*Expected .*{command}"):
        build_datamodule(name, data_dir=folder).setup()


def test_a_missing_fashion_mnist_names_the_debian_package(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    with pytest.raises(FileNotFoundError, match=r"debian\n(.|\n)*apt-get install dataset-fashion-mnist"):
        FashionMNISTDataModule(tmp_path).setup()


def test_an_incomplete_set_is_missing(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte\[\.gz\]"):
        MNISTDataModule(tmp_path).setup()


def test_image_folder_without_classes_or_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="Set `data_dir` to such a folder"):
        ImageFolderDataModule(tmp_path).setup()
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No image files .* below .*/<class>"):
        ImageFolderDataModule(tmp_path).setup()
