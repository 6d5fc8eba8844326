"""Image sets on disk, each in the layouts that people have, as uint8 tensors in their official order."""

import hashlib
import os
import pickle
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmc_lightning.data.idx import idx_file, read_idx
from lmc_lightning.data.images import ImageFiles, LabelledExamples

MNIST_FILES: Mapping[str, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CIFAR10_FILES: Mapping[str, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test": ("test_batch",),
}
SVHN_FILES: Mapping[str, str] = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

Splits = dict[str, LabelledExamples]
"""The official splits of a set by name."""


def find_folder(candidates: Sequence[Path], is_complete: Callable[[Path], bool], contents: str, advice: str) -> Path:
    """The first of the folders that holds the whole set.

    Raises:
        FileNotFoundError: none does; the message names them, what they should hold, and how to get it.
    """
    for folder in candidates:
        if is_complete(folder):
            return folder
    looked_in = "\n".join(f"  {folder.absolute()}" for folder in candidates)
    raise FileNotFoundError(f"No complete data set in\n{looked_in}\nExpected {contents}.\n{advice}")


def download_advice(name: str, data_dir: Path) -> str:
    """How to fetch a set, as the last lines of an error."""
    command = f"python -m lmc_lightning.data download {name} --data-dir {shlex.quote(str(data_dir))}"
    return f"With a network, this command fetches it (as does `download=True`):\n  {command}"


def has_idx_files(folder: Path) -> bool:
    """Whether all four files of an MNIST-type set are there."""
    return all(idx_file(folder, stem) for stems in MNIST_FILES.values() for stem in stems)


def read_idx_splits(folder: Path) -> Splits:
    """An MNIST-type set, ``(N, 1, 28, 28)``."""
    return {split: _read_idx_pair(folder, *stems) for split, stems in MNIST_FILES.items()}


def _read_idx_pair(folder: Path, images: str, labels: str) -> LabelledExamples:
    files = idx_file(folder, images), idx_file(folder, labels)
    pixels, classes = (read_idx(path) for path in files if path is not None)
    return LabelledExamples(pixels.unsqueeze(1), classes.long())


def has_cifar10_batches(folder: Path) -> bool:
    """Whether the pickled batches of CIFAR-10 are there."""
    return all((folder / name).is_file() for names in CIFAR10_FILES.values() for name in names)


def read_cifar10_batches(folder: Path) -> Splits:
    """CIFAR-10 from the pickled batches of its home page, ``(N, 3, 32, 32)``."""
    return {split: _read_cifar10_split(folder, names) for split, names in CIFAR10_FILES.items()}


def _read_cifar10_split(folder: Path, names: Sequence[str]) -> LabelledExamples:
    batches = [pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in names]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([batch["labels"] for batch in batches])
    return LabelledExamples(torch.from_numpy(images), torch.from_numpy(labels).long())


def has_svhn_files(folder: Path) -> bool:
    """Whether both cropped-digit files of SVHN are there."""
    return all((folder / name).is_file() for name in SVHN_FILES.values())


def read_svhn(folder: Path) -> Splits:
    """SVHN's cropped digits, ``(N, 3, 32, 32)``; the digit 0, stored as 10, is class 0."""
    from scipy.io import loadmat  # scipy.io is slow to import and needed here only

    splits = {}
    for split, name in SVHN_FILES.items():
        arrays = loadmat(str(folder / name))
        images = np.ascontiguousarray(arrays["X"].transpose(3, 2, 0, 1))
        labels = arrays["y"].reshape(-1).astype(np.int64) % 10
        splits[split] = LabelledExamples(torch.from_numpy(images), torch.from_numpy(labels))
    return splits


def class_folders(folder: Path) -> list[str]:
    """Names of the sub-folders, sorted: their positions are the labels."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def has_class_folders(folder: Path) -> bool:
    """Whether there is any sub-folder."""
    return bool(class_folders(folder))


def list_images(folder: Path, classes: Sequence[str]) -> tuple[tuple[Path, ...], Tensor]:
    """Image files below ``folder/<class>`` at any depth, sorted, and their labels ``(N,)``.

    Raises:
        FileNotFoundError: there are none.
    """
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise FileNotFoundError(
            f"No image files ({', '.join(sorted(IMAGE_SUFFIXES))}) below {folder.absolute()}/<class>."
        )
    return tuple(path for path, _ in files), torch.tensor([label for _, label in files], dtype=torch.int64)


def read_class_folders(folder: Path, classes: Sequence[str], edge: int) -> LabelledExamples:
    """All images below ``folder/<class>``, which must have ``edge`` x ``edge`` pixels, decoded into memory."""
    paths, labels = list_images(folder, classes)
    return LabelledExamples(ImageFiles(paths, edge).read_all(), labels)


def keep_decoded(cache: Path, folder: Path, classes: Sequence[str], edge: int) -> LabelledExamples:
    """``read_class_folders``, with the pixels kept in ``cache`` for the next time where that can be written.

    A cache made of files of other names or sizes is made anew.
    """
    paths, labels = list_images(folder, classes)
    names = "".join(f"{path.relative_to(folder)} {path.stat().st_size}\n" for path in paths)
    made_of = hashlib.sha256(names.encode()).hexdigest()
    stored = torch.load(cache, weights_only=True) if cache.is_file() else {}
    if stored.get("made_of") != made_of:
        stored = {"made_of": made_of, "images": ImageFiles(paths, edge).read_all()}
        with suppress(OSError, RuntimeError):  # torch raises the second where a file cannot be opened or written
            _save_atomically(stored, cache)
    return LabelledExamples(stored["images"], labels)


def _save_atomically(content: dict[str, Any], path: Path) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        torch.save(content, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def has_tiny_imagenet(folder: Path) -> bool:
    """Whether TinyImageNet's own layout is there."""
    return (folder / "train").is_dir() and (folder / "val" / "val_annotations.txt").is_file()


def read_tiny_imagenet(folder: Path) -> Splits:
    """TinyImageNet, ``(N, 3, 64, 64)``, with its labelled ``val`` folder as ``test``.

    The official test set has no labels. Classes are the sorted folder names of ``train``.
    """
    classes = class_folders(folder / "train")
    lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    names, wnids = zip(*(line.split("\t")[:2] for line in lines if line), strict=True)
    labels = torch.tensor([classes.index(wnid) for wnid in wnids], dtype=torch.int64)
    paths = tuple(folder / "val" / "images" / name for name in names)
    return {
        "train": read_class_folders(folder / "train", classes, 64),
        "test": LabelledExamples(ImageFiles(paths, 64).read_all(), labels),
    }
