"""Fetching the public sets, only when asked to."""

from collections.abc import Callable, Mapping
from pathlib import Path

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

# torchvision is imported inside the functions: it takes a second, and nothing else here needs it.


def download_mnist(data_dir: Path) -> None:
    """MNIST into ``<data_dir>/MNIST/raw``."""
    from torchvision.datasets import MNIST

    MNIST(data_dir, download=True)


def download_fashion_mnist(data_dir: Path) -> None:
    """Fashion-MNIST into ``<data_dir>/FashionMNIST/raw``."""
    from torchvision.datasets import FashionMNIST

    FashionMNIST(data_dir, download=True)


def download_cifar10(data_dir: Path) -> None:
    """CIFAR-10 into ``<data_dir>/cifar-10-batches-py``."""
    from torchvision.datasets import CIFAR10

    CIFAR10(data_dir, download=True)


def download_svhn(data_dir: Path) -> None:
    """The cropped digits of SVHN into ``<data_dir>/SVHN``."""
    from torchvision.datasets import SVHN

    for split in ("train", "test"):
        SVHN(data_dir / "SVHN", split=split, download=True)


def download_tiny_imagenet(data_dir: Path) -> None:
    """TinyImageNet (248 MB) into ``<data_dir>/tiny-imagenet-200``."""
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(TINY_IMAGENET_URL, str(data_dir), md5=TINY_IMAGENET_MD5)


DOWNLOADS: Mapping[str, Callable[[Path], None]] = {
    "mnist": download_mnist,
    "fashion_mnist": download_fashion_mnist,
    "cifar10": download_cifar10,
    "svhn": download_svhn,
    "tiny_imagenet": download_tiny_imagenet,
}


def download(name: str, data_dir: Path) -> None:
    """Fetch the set ``name`` into ``data_dir``.

    Raises:
        ConnectionError: the download failed.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        DOWNLOADS[name](data_dir)
    except (OSError, RuntimeError) as error:  # torchvision raises either, as the set and the failure have it
        raise ConnectionError(f"Downloading {name} into {data_dir.absolute()} failed: {error}") from error
