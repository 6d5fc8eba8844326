"""Children of one family in several processes, from folders alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmc_lightning.branching.__main__ import main
from lmc_lightning.branching.children.portable import load_blueprint
from lmc_lightning.branching.family.claims import claimed, is_claimed
from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.storage import DamagedFileError
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from tests.branching import runs
from tests.branching.runs import fit, loader, net, plain


def snapshots(noise: Any = "same", **arguments: Any) -> CheckpointBranching:
    branching = CheckpointBranching(epochs=[1], steps=[3, 8], noise=noise, when="never", **arguments)
    fit(net(), (loader(runs.Augmented()), loader(shuffle=False)), branching, max_epochs=3)
    return branching


def test_never_leaves_the_children_to_others(tmp_path: Path) -> None:
    folder = snapshots().family.folder
    assert [child.status for child in Family.load(folder).children] == ["pending"] * 3
    files = sorted(path.name for path in (folder / "snapshots" / "k1_step_000003").iterdir())
    assert files == ["blueprint.pkl", "checkpoint.ckpt", "noise_0.pt", "snapshot.json"]


def test_a_family_is_finished_in_another_process_bit_for_bit(tmp_path: Path) -> None:
    folder = snapshots().family.folder
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "lmc_lightning.branching", str(folder)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    family = Family.load(folder)
    assert [(child.status, child.exact_replay) for child in family.children] == [("completed", True)] * 3
    assert json.loads((folder / "lineage.json").read_text())["children"][0]["status"] == "completed"
    assert not list((folder / "claims").glob("*.json"))


def test_what_is_finished_is_skipped_and_what_was_interrupted_goes_on(tmp_path: Path) -> None:
    branching = snapshots()
    folder = branching.family.folder
    branching.run_children()
    done = Family.load(folder)
    times = {child.name: (folder / "nodes" / f"{child.name}.json").stat().st_mtime_ns for child in done.children}
    done.children[1].status = "interrupted"
    done.save_child(done.children[1])
    assert main([str(folder)]) == 0
    again = {child.name: (folder / "nodes" / f"{child.name}.json").stat().st_mtime_ns for child in done.children}
    assert [name for name in times if times[name] != again[name]] == [done.children[1].name]
    assert Family.load(folder).children[1].exact_replay


def test_a_child_of_a_snapshot_joins_its_family() -> None:
    folder = snapshots().family.folder
    arguments = [str(folder / "snapshots" / "k1_step_000008"), "--noise-seed", "7"]
    assert main(arguments) == 0
    family = Family.load(folder)
    child = family.node("k1_step_000008_child_seed7")
    assert (child.status, child.noise_seed, child.end_step, child.branch_step) == ("completed", 7, 15, 8)
    assert child.shared == {"order": False, "batches": False}
    assert sorted(set(child.epochs) & set(family.trunk.epochs)) == [2, 3]
    digests = child.state_digests
    assert main(arguments) == 0  # finished
    assert main([arguments[0], "--noise-seed", "8"]) == 0
    loaded = Family.load(folder)
    assert loaded.node("k1_step_000008_child_seed7").state_digests == digests
    assert loaded.node("k1_step_000008_child_seed8").state_digests[3] != digests[3]


def test_a_snapshot_stands_for_itself(tmp_path: Path) -> None:
    folder = snapshots().family.folder
    trunk = Family.load(folder).trunk
    moved = tmp_path / "copied"
    (folder / "snapshots" / "k1_step_000008").rename(moved)
    folder.rename(tmp_path / "gone")
    assert main([str(moved), "--noise", "same", "--output", str(tmp_path / "elsewhere")]) == 0
    family = Family.load(tmp_path / "elsewhere")
    (child,) = family.children
    assert child.name == "k1_step_000008_child_same"
    assert child.exact_replay
    assert {e: child.state_digests[e] for e in (2, 3)} == {e: trunk.state_digests[e] for e in (2, 3)}


@pytest.mark.parametrize("name", ["checkpoint.ckpt", "noise_0.pt"])
def test_a_damaged_snapshot_is_named(name: str) -> None:
    branching = snapshots()
    path = branching.family.folder / "snapshots" / "k1_001" / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=rf"k1_001_child_0 failed, DamagedFileError: .*k1_001/{name} is damaged"):
        family = branching.run_children()
    assert [child.status for child in family.children] == ["failed", "completed", "completed"]


def test_damaged_files_of_a_family_are_named() -> None:
    family = snapshots().family
    path = family.weights_path(family.trunk, 3)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match=r"trunk/epoch_0003.pt cannot be read"):
        family.state("trunk", 3)
    torch.save(family.state("trunk", 2), path)
    with pytest.raises(DamagedFileError, match=r"epoch_0003.pt is damaged: its weights are not those that trunk had"):
        family.state("trunk", 3)
    (family.folder / "blueprint.pkl").write_bytes(b"\x80")
    with pytest.raises(DamagedFileError, match=r"blueprint.pkl is damaged"):
        load_blueprint(family.folder / "blueprint.pkl")
    (family.folder / "lineage.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"lineage.json is damaged"):
        Family.load(family.folder)


def test_what_is_no_snapshot_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a family \(with lineage.json\) or of a snapshot"):
        main([str(tmp_path)])


def test_what_does_not_pickle_is_trained_here_only() -> None:
    class Local(runs.Net):
        pass

    branching = CheckpointBranching(epochs=[0], noise="same", when="never")
    with pytest.warns(UserWarning, match="for other processes, but the module does not pickle"):
        fit(net(Local), plain(), branching, max_epochs=1)
    with pytest.raises(FileNotFoundError, match=r"blueprint.pkl does not exist: .* did not pickle"):
        main([str(branching.family.folder)])
    assert branching.run_children().children[0].exact_replay


def test_two_processes_do_not_train_the_same_child(tmp_path: Path) -> None:
    branching = snapshots()
    family = branching.family
    path = family.folder / "claims" / "k1_step_000003_child_0.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    branching.run_children()
    assert [child.status for child in family.children] == ["completed", "pending", "completed"]
    assert is_claimed(family.folder, "k1_step_000003_child_0")
    os.utime(path, (0, 0))  # no sign of life for long
    branching.run_children()
    assert [child.exact_replay for child in family.children] == [True] * 3


def test_claims(tmp_path: Path) -> None:
    with claimed(tmp_path, "a") as first:
        assert first
        assert is_claimed(tmp_path, "a")
        with claimed(tmp_path, "a") as second, claimed(tmp_path, "b") as other:
            assert (second, other) == (False, True)
        assert is_claimed(tmp_path, "a")
    assert not is_claimed(tmp_path, "a")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "claims" / "a.json").write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid}))
    assert not is_claimed(tmp_path, "a")
    with claimed(tmp_path, "a") as third:
        assert third
    assert list((tmp_path / "claims").iterdir()) == []
