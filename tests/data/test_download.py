import pytest
import torchvision.datasets

from lmc_lightning.data import DATA_MODULES, build_datamodule
from lmc_lightning.data import __main__ as command_line
from lmc_lightning.data.datamodule import VisionDataModule
from lmc_lightning.data.download import DOWNLOADS, download


def record_calls(monkeypatch, name: str) -> list[tuple[tuple, dict]]:
    calls = []
    monkeypatch.setattr(torchvision.datasets, name, lambda *args, **kwargs: calls.append((args, kwargs)))
    return calls


def test_every_set_with_a_public_place_can_be_fetched():
    vision = {name for name, module in DATA_MODULES.items() if issubclass(module, VisionDataModule)}
    assert set(DOWNLOADS) == vision - {"digits", "image_folder"}


@pytest.mark.parametrize(("name", "dataset"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_the_command_of_the_error_message_calls_torchvision(tmp_path, monkeypatch, name, dataset):
    calls = record_calls(monkeypatch, dataset)
    command_line.main(["download", name, "--data-dir", str(tmp_path / "data")])
    assert calls == [((tmp_path / "data",), {"download": True})]
    assert (tmp_path / "data").is_dir()


def test_both_files_of_svhn_go_where_the_module_looks(tmp_path, monkeypatch):
    calls = record_calls(monkeypatch, "SVHN")
    download("svhn", tmp_path)
    assert calls == [((tmp_path / "SVHN",), {"split": split, "download": True}) for split in ("train", "test")]


def test_cifar10_goes_where_the_module_looks(tmp_path, monkeypatch):
    calls = record_calls(monkeypatch, "CIFAR10")
    download("cifar10", tmp_path)
    assert calls == [((tmp_path,), {"download": True})]


def test_tiny_imagenet_comes_from_its_own_page_with_a_checksum(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "torchvision.datasets.utils.download_and_extract_archive", lambda *args, **kwargs: calls.append((args, kwargs))
    )
    download("tiny_imagenet", tmp_path)
    ((url, folder), kwargs) = calls[0]
    assert url.endswith("/tiny-imagenet-200.zip")
    assert (folder, len(kwargs["md5"])) == (str(tmp_path), 32)


@pytest.mark.parametrize("failure", [OSError("no route to host"), RuntimeError("Error downloading")])
def test_a_failed_download_names_the_set_and_the_folder(tmp_path, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    with pytest.raises(ConnectionError, match=rf"Downloading mnist into {tmp_path} failed: {failure}"):
        build_datamodule("mnist", data_dir=tmp_path, download=True).prepare_data()


@pytest.mark.parametrize("arguments", [[], ["download"], ["download", "imagenet"]])
def test_the_command_line_refuses_what_it_does_not_know(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        command_line.main(arguments)
    assert "usage: python -m lmc_lightning.data" in capsys.readouterr().err
