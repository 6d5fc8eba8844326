import gzip

import pytest
import torch

from lmc_lightning.data.idx import idx_file, read_idx
from tests.data.layouts import idx_bytes, pixels


@pytest.mark.parametrize("shape", [(7,), (5, 4, 3)])
@pytest.mark.parametrize("compress", [True, False])
def test_reads_what_was_written(tmp_path, shape, compress):
    array = pixels(*shape)
    path = tmp_path / ("images.gz" if compress else "images")
    path.write_bytes(gzip.compress(idx_bytes(array)) if compress else idx_bytes(array))
    assert torch.equal(read_idx(path), torch.from_numpy(array))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_raw_file_goes_before_the_gzipped_one(tmp_path):
    assert idx_file(tmp_path, "images") is None
    (tmp_path / "images.gz").touch()
    assert idx_file(tmp_path, "images") == tmp_path / "images.gz"
    (tmp_path / "images").touch()
    assert idx_file(tmp_path, "images") == tmp_path / "images"


@pytest.mark.parametrize("raw", [b"", b"\0\0", b"<!DOCTYPE html>", bytes([0, 0, 0x0D, 1, 0, 0, 0, 0])])
def test_other_contents_are_refused(tmp_path, raw):
    (tmp_path / "images").write_bytes(raw)
    with pytest.raises(ValueError, match="images is no IDX file of unsigned bytes: it starts with"):
        read_idx(tmp_path / "images")


@pytest.mark.parametrize("kept", [6, 40, 71])
def test_a_file_cut_short_is_refused(tmp_path, kept):
    (tmp_path / "images").write_bytes(idx_bytes(pixels(5, 4, 3))[:kept])
    with pytest.raises(ValueError, match="cut short or damaged"):
        read_idx(tmp_path / "images")
