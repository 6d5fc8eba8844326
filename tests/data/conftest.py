"""Sets that several tests read."""

import pytest

from tests.data.layouts import write_cifar10_batches


@pytest.fixture(scope="module")
def cifar_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar10_batches(folder / "cifar-10-batches-py")
    return folder
