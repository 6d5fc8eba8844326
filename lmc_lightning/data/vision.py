"""The image sets of the field, each as a LightningDataModule; arguments: ``VisionDataModule``."""

from pathlib import Path
from typing import Any

import torch

from lmc_lightning.data import sources
from lmc_lightning.data.datamodule import VisionDataModule
from lmc_lightning.data.images import ImageFiles, LabelledExamples
from lmc_lightning.data.order import derived_generator

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DigitsDataModule(VisionDataModule):
    """Handwritten digits of scikit-learn: 1,797 images of 8x8 pixels, 10 classes. Needs no file and no network.

    They have no official test set: a fifth is held out by ``split_seed``, and ``val_fraction`` is a share of the rest.
    By default they are enlarged to 28x28, the input of MNIST networks. ``data_dir`` and ``download`` do nothing here.
    """

    dataset_name = "digits"
    native_dims = (1, 8, 8)
    num_classes = 10
    default_mean = (0.3053,)
    default_std = (0.3761,)
    test_fraction = 0.2

    def __init__(
        self, data_dir: str | Path = "data", *, val_fraction: float = 0.2, image_size: int | None = 28, **kwargs: Any
    ) -> None:
        super().__init__(data_dir, val_fraction=val_fraction, image_size=image_size, **kwargs)

    def locate(self) -> Path:
        """Any folder will do: the images ship inside scikit-learn."""
        return self.data_dir

    def read(self, folder: Path) -> sources.Splits:
        """The digits, their 17 grey levels spread over 0 to 255."""
        from sklearn.datasets import load_digits  # scikit-learn is slow to import and needed here only

        digits = load_digits()
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        test, train = _hold_out(len(labels), self.test_fraction, self.split_seed)
        return {
            "train": LabelledExamples(images[train], labels[train]),
            "test": LabelledExamples(images[test], labels[test]),
        }


class MNISTDataModule(VisionDataModule):
    """MNIST: 60,000 + 10,000 grey images of 28x28 pixels, 10 classes, from the IDX files, gzipped or not.

    Looks in ``<data_dir>/MNIST/raw`` (torchvision's layout) and ``<data_dir>``.
    """

    dataset_name = "mnist"
    native_dims = (1, 28, 28)
    num_classes = 10
    default_mean = (0.1307,)
    default_std = (0.3081,)

    def locate(self) -> Path:
        """The folder with the four IDX files."""
        return self._find_idx([self.data_dir / "MNIST" / "raw", self.data_dir])

    def read(self, folder: Path) -> sources.Splits:
        """The official splits, ``(N, 1, 28, 28)``."""
        return sources.read_idx_splits(folder)

    def _find_idx(self, candidates: list[Path], advice: str = "") -> Path:
        contents = ", ".join(f"{stem}[.gz]" for stems in sources.MNIST_FILES.values() for stem in stems)
        advice = sources.download_advice(self.dataset_name, self.data_dir) + advice
        return sources.find_folder(candidates, sources.has_idx_files, contents, advice)


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST: 60,000 + 10,000 grey images of 28x28 pixels, 10 classes, from the IDX files, gzipped or not.

    Looks in ``<data_dir>/FashionMNIST/raw`` (torchvision's layout), ``<data_dir>``, and where Debian's package
    ``dataset-fashion-mnist`` puts it.
    """

    dataset_name = "fashion_mnist"
    default_mean = (0.2860,)
    default_std = (0.3530,)
    flip = True

    def locate(self) -> Path:
        """The folder with the four IDX files."""
        advice = "\nOn Debian: apt-get install dataset-fashion-mnist"
        return self._find_idx([self.data_dir / "FashionMNIST" / "raw", self.data_dir, DEBIAN_FASHION_MNIST], advice)


class CIFAR10DataModule(VisionDataModule):
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32 pixels, 10 classes.

    Looks for the pickled batches in ``<data_dir>/cifar-10-batches-py`` (torchvision's layout) and for
    ``train/<class>/*.jpg`` and ``test/<class>/*.jpg`` (or ``.png``) in ``<data_dir>/cifar10`` and ``<data_dir>``. The
    decoded pixels of such folders are kept beside them in ``train_uint8.pt`` and ``test_uint8.pt`` (184 MB) where that
    can be written, which saves ten seconds at the next start.
    """

    dataset_name = "cifar10"
    native_dims = (3, 32, 32)
    num_classes = 10
    default_mean = (0.4914, 0.4822, 0.4465)
    default_std = (0.2470, 0.2435, 0.2616)
    flip = True
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def locate(self) -> Path:
        """The folder of the batches, or the one that holds ``train`` and ``test``."""
        candidates = [self.data_dir / "cifar-10-batches-py", self.data_dir / "cifar10", self.data_dir]
        contents = "data_batch_1 … data_batch_5 and test_batch, or train/<class>/*.jpg and test/<class>/*.jpg"
        advice = sources.download_advice(self.dataset_name, self.data_dir)
        return sources.find_folder(candidates, self._is_complete, contents, advice)

    def read(self, folder: Path) -> sources.Splits:
        """The official splits, ``(N, 3, 32, 32)``."""
        if sources.has_cifar10_batches(folder):
            return sources.read_cifar10_batches(folder)
        return {
            split: sources.keep_decoded(folder / f"{split}_uint8.pt", folder / split, self.class_names, 32)
            for split in ("train", "test")
        }

    def _is_complete(self, folder: Path) -> bool:
        class_folders = (folder / split / name for split in ("train", "test") for name in self.class_names)
        return sources.has_cifar10_batches(folder) or all(path.is_dir() for path in class_folders)


class SVHNDataModule(VisionDataModule):
    """SVHN, cropped digits: 73,257 + 26,032 colour images of 32x32 pixels, 10 classes.

    Looks for ``train_32x32.mat`` and ``test_32x32.mat`` in ``<data_dir>/SVHN`` and ``<data_dir>``.
    """

    dataset_name = "svhn"
    native_dims = (3, 32, 32)
    num_classes = 10
    default_mean = (0.4377, 0.4438, 0.4728)
    default_std = (0.1980, 0.2010, 0.1970)

    def locate(self) -> Path:
        """The folder with both ``.mat`` files."""
        contents = " and ".join(sources.SVHN_FILES.values())
        advice = sources.download_advice(self.dataset_name, self.data_dir)
        return sources.find_folder([self.data_dir / "SVHN", self.data_dir], sources.has_svhn_files, contents, advice)

    def read(self, folder: Path) -> sources.Splits:
        """The official splits, ``(N, 3, 32, 32)``."""
        return sources.read_svhn(folder)


class TinyImageNetDataModule(VisionDataModule):
    """TinyImageNet: 100,000 + 10,000 colour images of 64x64 pixels, 200 classes, 1.4 GB in memory.

    Its labelled ``val`` folder is the test set here, for the official test set has no labels. Looks for ``train`` and
    ``val/val_annotations.txt`` in ``<data_dir>/tiny-imagenet-200`` and ``<data_dir>``. Normalised by the statistics of
    ImageNet. For networks of 224x224: ``resize=256, image_size=224``.
    """

    dataset_name = "tiny_imagenet"
    native_dims = (3, 64, 64)
    num_classes = 200
    default_mean = IMAGENET_MEAN
    default_std = IMAGENET_STD
    flip = True

    def locate(self) -> Path:
        """The folder that holds ``train`` and ``val``."""
        candidates = [self.data_dir / "tiny-imagenet-200", self.data_dir]
        advice = sources.download_advice(self.dataset_name, self.data_dir)
        contents = "train/<class>/images/*.JPEG and val/val_annotations.txt"
        return sources.find_folder(candidates, sources.has_tiny_imagenet, contents, advice)

    def read(self, folder: Path) -> sources.Splits:
        """The labelled splits, ``(N, 3, 64, 64)``."""
        return sources.read_tiny_imagenet(folder)


class ImageFolderDataModule(VisionDataModule):
    """Any images in ``train/<class>/`` and ``test/<class>/`` (or ``val/<class>/``), or just in ``<class>/``.

    Without a held-out folder a fifth is held out by ``split_seed``. Classes are the sorted folder names of the training
    set. The shorter side is resized to ``resize`` and the centre cropped when a file is decoded: once, while the set
    takes less than ``memory_limit``, else for every batch. Normalised by the statistics of ImageNet.

    Args:
        data_dir: the folder of the folders.
        image_size: edge of the images that the network sees [pixels].
        resize: length of the shorter side before cropping [pixels]; None: files have ``image_size`` pixels already.
        memory_limit: of the decoded set [GiB].
        **kwargs: of ``VisionDataModule``; ``download`` does nothing here.
    """

    dataset_name = "image_folder"
    default_mean = IMAGENET_MEAN
    default_std = IMAGENET_STD
    flip = True
    test_fraction = 0.2

    def __init__(
        self,
        data_dir: str | Path = "data",
        *,
        image_size: int = 224,
        resize: int | None = 256,
        memory_limit: float = 4.0,
        **kwargs: Any,
    ) -> None:
        self.native_dims = (3, image_size, image_size)
        self.decoded_resize = resize
        self.memory_limit = memory_limit
        super().__init__(data_dir, image_size=image_size, **kwargs)

    @property
    def class_names(self) -> list[str]:
        """The sorted folder names."""
        folder = self.locate()
        return sources.class_folders(folder / "train" if (folder / "train").is_dir() else folder)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of class folders."""
        return len(self.class_names)

    def prepare_data(self) -> None:
        """Nothing: there is no public place to fetch it from."""

    def locate(self) -> Path:
        """The folder itself, once it holds class folders."""
        contents = "train/<class>/ and test/<class>/ (or val/<class>/), or <class>/, with image files"
        return sources.find_folder(
            [self.data_dir], sources.has_class_folders, contents, "Set `data_dir` to such a folder."
        )

    def read(self, folder: Path) -> sources.Splits:
        """The splits as folders have them, else drawn; ``(N, 3, image_size, image_size)``."""
        held_out = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
        if (folder / "train").is_dir() and held_out:
            return {"train": self._read_folder(folder / "train"), "test": self._read_folder(folder / held_out)}
        paths, labels = sources.list_images(
            folder / "train" if (folder / "train").is_dir() else folder, self.class_names
        )
        test, train = _hold_out(len(paths), self.test_fraction, self.split_seed)
        rows = {"train": train, "test": test}
        return {
            name: self._load(tuple(paths[i] for i in chosen.tolist()), labels[chosen]) for name, chosen in rows.items()
        }

    def _read_folder(self, folder: Path) -> LabelledExamples:
        return self._load(*sources.list_images(folder, self.class_names))

    def _load(self, paths: tuple[Path, ...], labels: torch.Tensor) -> LabelledExamples:
        files = ImageFiles(paths, self.native_dims[-1], self.decoded_resize)
        num_bytes = len(paths) * 3 * self.native_dims[-1] ** 2
        return LabelledExamples(files.read_all() if num_bytes <= self.memory_limit * 2**30 else files, labels)


def _hold_out(size: int, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows held out and rows kept, in order."""
    permutation = torch.randperm(size, generator=derived_generator(seed, "test"))
    num_held_out = round(fraction * size)
    return permutation[:num_held_out].sort().values, permutation[num_held_out:].sort().values
