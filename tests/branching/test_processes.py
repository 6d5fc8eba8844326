"""Forks of a run that two processes train: children are the trunk on both of them, and fail on both."""

import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lmc_lightning import CheckpointBranching
from lmc_lightning.branching.__main__ import main
from lmc_lightning.branching.children.blueprint import trainer_arguments
from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.forks.noise import seeds_of_process, stream_digests
from lmc_lightning.core.glassbox import rng_state
from tests.scripts import forks
from tests.scripts.processes import PATIENCE, free_port, pair


def family_in(folder: Path) -> Family:
    return Family.load(folder / "lightning_logs" / "version_0" / "lmc" / "family")


def assert_forks_are_exact(both: list[Any]) -> None:
    for process in both:
        trunk, *children = process["same"]
        assert trunk == process["alone"]
        assert process["quiet"]
        told = process["told"]
        assert len(children) == len(told["nodes"]) - 1 == 4
        for child, prints in zip(told["nodes"][1:], children, strict=True):
            assert (child["status"], child["reason"], child["exact_replay"]) == ("completed", None, True)
            label = child["name"].removesuffix("_child_0")
            assert prints == {at: trunk[at] for at in trunk if at >= told["forks"][label].position.batches}
        for name in ("fresh", "again"):
            assert process[name][0] == trunk
            for prints in process[name][1:]:
                assert all(prints[at][1] != trunk[at][1] and prints[at][5] != trunk[at][5] for at in prints)
        assert process["fresh"] == process["again"]
        assert not process["failures"]
        assert {(row[1], row[3]) for row in process["barriers"]} == {(0, "ok"), (5, "ok"), (10, "ok")}
        assert all(row[2] == 0 for row in process["barriers"])
    assert both[0]["told"] == both[1]["told"]
    assert both[0]["told fresh"] == both[1]["told fresh"]
    assert both[0]["barriers"] == both[1]["barriers"]
    # The processes see other batches, and have the same weights.
    for name in ("same", "fresh"):
        for one, other in zip(both[0][name], both[1][name], strict=True):
            assert all(one[at][1] == other[at][1] and one[at][5] != other[at][5] for at in one)


def test_children_of_two_processes_with_one_sampler(tmp_path: Path) -> None:
    both = pair(forks.forked, forks.Shared, folder=tmp_path)
    assert_forks_are_exact(both)
    family = family_in(tmp_path / "same")
    assert forks.told(family) == both[0]["told"]
    files = {p.relative_to(family.folder).as_posix() for p in family.folder.rglob("*") if p.is_file()}
    snapshots = {f"snapshots/{label}/{name}" for label in family.forks for name in family.forks[label].digests}
    assert {Path(name).name for name in snapshots} == {"checkpoint.ckpt", "noise_0.pt", "noise_1.pt"}
    assert {f for f in files if f.endswith((".ckpt", ".pt"))} - snapshots == {
        f"weights/{node.name}/epoch_{epoch:04d}.pt"
        for node in (family.trunk, *family.children)
        for epoch in node.epochs
    }
    for folder in (family.folder, family.folder / "snapshots" / "k1_000"):
        with pytest.raises(
            ValueError, match="is of a trunk that 2 processes trained, each with random states of its own"
        ):
            main([str(folder)])


@pytest.mark.slow
def test_children_of_two_processes_with_data_of_their_own(tmp_path: Path) -> None:
    assert_forks_are_exact(pair(forks.forked, forks.Own, folder=tmp_path))


@pytest.mark.slow
def test_children_of_a_script_that_lightning_launches(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    script = [sys.executable, str(root / "tests" / "scripts" / "forks.py")]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert_forks_are_exact([pickle.loads((tmp_path / f"answer_{rank}.pickle").read_bytes()) for rank in range(2)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log\\('val_loss'")
def test_children_of_processes_that_lightning_spawns(tmp_path: Path) -> None:
    """Results come back by file."""
    branching = CheckpointBranching(epochs=[0, 1], steps=[2], noise="same")
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo", timeout=timedelta(seconds=30))
    with mock.patch.dict(os.environ):
        forks.fit(0, forks.seeded(forks.Shared), [branching], strategy=strategy, root=tmp_path)
    with pytest.raises(RuntimeError, match="Processes that Lightning spawned have left theirs in files"):
        branching.family  # noqa: B018
    family = family_in(tmp_path)
    assert [(child.status, child.exact_replay, child.reason) for child in family.children] == [
        ("completed", True, None)
    ] * 3
    assert family.end.step == 10


def test_what_fails_on_both_processes_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    for process in pair(forks.failing, folder=tmp_path):
        assert process["training"] == [("failed", "ValueError: no luck"), ("completed", None)]
        assert [status for status, _ in process["noise"]] == ["failed", "failed"]
        assert all(reason.startswith("SharedNoiseError: Under noise_seed=") for _, reason in process["noise"])
        assert [status for status, _ in process["damage"]] == ["failed", "completed"]
        assert "noise_1.pt is damaged" in process["damage"][0][1]


def test_what_fails_on_one_process_alone_hangs_none(tmp_path: Path) -> None:
    zero, one = pair(forks.lost, folder=tmp_path)
    assert one.startswith("LostProcessError: A child's training failed on some processes only (no luck)")
    assert zero != "completed"
    assert [child.status for child in family_in(tmp_path / "root").children] == ["failed", "pending"]


@pytest.mark.slow
def test_a_resumed_trunk_of_two_processes_keeps_its_forks(tmp_path: Path) -> None:
    for process in pair(forks.resumed, folder=tmp_path):
        assert [node["status"] for node in process["before"]["nodes"]] == ["failed", *["pending"] * 3]
        for whole, after in zip(process["whole"]["nodes"][1:], process["after"]["nodes"][1:], strict=True):
            # Lightning restores no random state, so that the second half is another run than the whole.
            assert (after["status"], after["branch_step"], after["end_step"]) == ("completed", whole["branch_step"], 10)


def test_seeds_are_shared_where_the_trunks_streams_were() -> None:
    assert seeds_of_process(0, ())(3, "global") == seeds_of_process(1, ["x"])(3, "global") == 3
    assert seeds_of_process(1, ["x"])(3, "x") != seeds_of_process(2, ["x"])(3, "x") != 3
    state = {"rng": rng_state(), "generators": {"own": {"kind": "Generator", "state": torch.Generator().get_state()}}}
    before = stream_digests(state)
    torch.rand(1)
    after = stream_digests({**state, "rng": rng_state()})
    assert before.keys() == {"global", "own"}
    assert before["own"] == after["own"]
    assert before["global"] != after["global"]


def test_a_communication_hook_cannot_be_read_back() -> None:
    strategy = DDPStrategy(ddp_comm_hook=lambda state, bucket: bucket, process_group_backend="gloo")
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="the communication hook of the strategy cannot be read back"):
        trainer_arguments(trainer)


def test_children_amid_the_trunk_need_a_single_device() -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    branching = CheckpointBranching(when="immediately")
    trainer.callbacks.append(branching)
    trainer.fit_loop.max_epochs = 5
    with pytest.raises(ValueError, match=r"whose processes wait for each other. Use when='end'"):
        branching.setup(trainer, forks.seeded(forks.Shared), "fit")
