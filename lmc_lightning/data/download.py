"""Fetching the public sets, only when asked to."""

from pathlib import Path

# torchvision is imported inside the functions: it takes a second, and nothing else here needs it.

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
DOWNLOADS = ("mnist", "fashion_mnist", "cifar10", "svhn", "tiny_imagenet")
"""The sets that have a public place."""


def download(name: str, data_dir: Path) -> None:
    """Fetch the set ``name`` into ``data_dir``, in the layout of torchvision.

    Raises:
        ConnectionError: the download failed.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(name, data_dir)
    except (OSError, RuntimeError) as error:  # torchvision raises either, as the set and the failure have it
        raise ConnectionError(f"Downloading {name} into {data_dir.absolute()} failed: {error}") from error


def _fetch(name: str, data_dir: Path) -> None:
    from torchvision import datasets

    if name == "tiny_imagenet":  # 248 MB
        datasets.utils.download_and_extract_archive(TINY_IMAGENET_URL, str(data_dir), md5=TINY_IMAGENET_MD5)
    elif name == "svhn":
        for split in ("train", "test"):
            datasets.SVHN(data_dir / "SVHN", split=split, download=True)
    else:
        {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name](
            data_dir, download=True
        )
