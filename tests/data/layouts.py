"""Tiny data sets on disk, in the layouts of the real ones."""

import gzip
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from lmc_lightning.data.sources import CIFAR10_FILES, MNIST_FILES
from lmc_lightning.data.vision import CIFAR10DataModule


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels(size: int, num_classes: int = 10) -> np.ndarray:
    return np.arange(size, dtype=np.uint8) % num_classes


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_mnist(folder: Path, train: int = 40, test: int = 12, compress: bool = True) -> dict[str, np.ndarray]:
    """The four IDX files; returns the images of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {"train": pixels(train, 28, 28), "test": pixels(test, 28, 28, seed=1)}
    for split, stems in MNIST_FILES.items():
        for stem, array in zip(stems, (images[split], labels(len(images[split]))), strict=True):
            raw = idx_bytes(array)
            (folder / f"{stem}.gz" if compress else folder / stem).write_bytes(gzip.compress(raw) if compress else raw)
    return images


def write_cifar10_batches(folder: Path, per_batch: int = 8) -> dict[str, np.ndarray]:
    """The six pickles; returns the images of each split ``(N, 3, 32, 32)``."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for split, names in CIFAR10_FILES.items():
        arrays = [pixels(per_batch, 3, 32, 32, seed=i + len(names)) for i in range(len(names))]
        for name, array in zip(names, arrays, strict=True):
            batch = {"data": array.reshape(per_batch, -1), "labels": labels(per_batch).tolist()}
            (folder / name).write_bytes(pickle.dumps(batch))
        images[split] = np.concatenate(arrays)
    return images


def write_class_folders(
    folder: Path, classes: tuple[str, ...] = CIFAR10DataModule.class_names, per_class: int = 2, edge: int = 32
) -> None:
    """``folder/<class>/0000.png`` of one grey level per file: ``10 * class + number``."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            image = np.full((edge, edge, 3), 10 * label + number, np.uint8)
            Image.fromarray(image).save(folder / name / f"{number:04d}.png")


def write_svhn(folder: Path, size: int = 20) -> dict[str, np.ndarray]:
    """Both ``.mat`` files; returns the stored images ``(32, 32, 3, N)``."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {split: pixels(32, 32, 3, size, seed=i) for i, split in enumerate(("train", "test"))}
    for split, array in images.items():
        savemat(folder / f"{split}_32x32.mat", {"X": array, "y": np.arange(1, size + 1)[:, None] % 10 + 1})
    return images


def write_tiny_imagenet(folder: Path, wnids: tuple[str, ...] = ("n03", "n01", "n02")) -> list[tuple[str, int]]:
    """Three classes; returns the annotated wnid and the grey level of each validation image."""
    for level, wnid in enumerate(wnids):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for number in range(4):
            image = Image.fromarray(np.full((64, 64, 3), 50 * level + number, np.uint8))
            image.save(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    held_out = [(wnids[i % 3], 200 + i) for i in range(5)]
    (folder / "val" / "images").mkdir(parents=True)
    for i, (_, level) in enumerate(held_out):
        Image.fromarray(np.full((64, 64), level, np.uint8)).save(folder / "val" / "images" / f"val_{i}.JPEG")  # grey
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t0\t63\t63" for i, (wnid, _) in enumerate(held_out)]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return held_out
