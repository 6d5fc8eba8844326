import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.nodes import Fork, Node, Position
from lmc_lightning.core.files import write_atomic


def module(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3, dtype=torch.float64), nn.BatchNorm1d(3).to(torch.bfloat16))


def family(folder: Path | None) -> Family:
    family = Family(folder)
    child = Node("k1_002_child_0", k1=2, child=0, branch_step=20, noise_seed=2**63 - 1)
    family.children = [child]
    family.end = Position(epoch=4, step=40, batches=80)
    family.forks = {"k1_002": Fork(Position(2, 20, 40), "snapshots/k1_002", {"checkpoint.ckpt": "ab"}, "cd")}
    family.configuration = {"epochs": [2], "seed": 3}
    for epoch in (0, 2, 4):
        family.keep(family.trunk, epoch, 10 * epoch, module(epoch))
    family.keep(child, 2, 20, module(2))
    family.keep(child, 4, 40, module(5))
    return family


def test_state_is_what_was_kept_with_buffers_and_dtypes(tmp_path: Path) -> None:
    kept = family(tmp_path)
    for node, epoch, seed in (("trunk", 0, 0), (kept.trunk, 4, 4), ("k1_002_child_0", 2, 2), (kept.children[0], 4, 5)):
        expected, state = module(seed).state_dict(), kept.state(node, epoch)
        assert state.keys() == expected.keys()
        assert {"0.weight", "1.running_mean", "1.num_batches_tracked"} <= state.keys()
        for name, value in state.items():
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name])


def test_files_are_plain(tmp_path: Path) -> None:
    kept = family(tmp_path)
    path = kept.weights_path(kept.trunk, 4)
    assert path == tmp_path / "weights" / "trunk" / "epoch_0004.pt"
    assert isinstance(torch.load(path, weights_only=True), dict)


def test_a_child_shares_the_file_of_the_weights_it_starts_from(tmp_path: Path) -> None:
    kept = family(tmp_path)
    (child,) = kept.children
    assert os.path.samefile(kept.weights_path(child, 2), kept.weights_path(kept.trunk, 2))
    kept.keep(kept.trunk, 2, 20, module(9))  # the trunk comes by again: the child keeps what it had
    assert torch.equal(kept.state(child, 2)["0.weight"], module(2)[0].weight)


def test_epochs_and_steps(tmp_path: Path) -> None:
    kept = family(tmp_path)
    assert kept.trunk.epochs == {0: 0, 2: 20, 4: 40}
    assert kept.step_of_epoch(4) == 40
    with pytest.raises(KeyError, match="trunk were kept after epochs 0, 2, 4, not after epoch 3"):
        kept.step_of_epoch(3)
    with pytest.raises(KeyError, match="k1_002_child_0 were kept after epochs 2, 4, not after epoch 0"):
        kept.state("k1_002_child_0", 0)
    with pytest.raises(KeyError, match="Expected one of trunk, k1_002_child_0, got 'child'"):
        kept.state("child", 2)


def test_a_family_is_its_folder(tmp_path: Path) -> None:
    kept = family(tmp_path)
    kept.children[0].status, kept.children[0].reason = "interrupted", "KeyboardInterrupt"
    kept.save()
    loaded = Family.load(str(tmp_path))
    for name in ("trunk", "children", "end", "forks", "configuration"):
        assert getattr(loaded, name) == getattr(kept, name)
    assert torch.equal(loaded.state("trunk", 4)["0.bias"], kept.state("trunk", 4)["0.bias"])
    content = json.loads((tmp_path / "lineage.json").read_text())
    assert content["versions"]["torch"] == torch.__version__
    assert "(KeyboardInterrupt)" in repr(loaded)


def test_what_is_no_family_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a family's folder with lineage\.json in it"):
        Family.load(tmp_path)
    Family(tmp_path).save()
    path = tmp_path / "lineage.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 9'))
    with pytest.raises(ValueError, match="has version 9, this package reads 2"):
        Family.load(tmp_path)


def test_forgetting_what_comes_later() -> None:
    node = Node("trunk", epochs={0: 0, 2: 20, 4: 40}, batch_digests={1: "a", 3: "b"}, state_digests={2: "c", 4: "d"})
    node.forget_after(2)
    assert (node.epochs, node.batch_digests, node.state_digests) == ({0: 0, 2: 20}, {1: "a"}, {2: "c"})


def test_atomic_writes_leave_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomic(path, lambda file: file.write(b"old"))

    def fail(file: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
