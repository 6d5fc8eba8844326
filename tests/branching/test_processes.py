"""Forks of a run that two processes train: children are the trunk on both of them, and fail on both."""

from pathlib import Path
from typing import Any

import pytest

from lmc_lightning.branching.lineage import Family
from tests.scripts import forks
from tests.scripts.processes import pair


def assert_forks_are_exact(both: list[Any]) -> None:
    for process in both:
        trunk, *children = process["same"]
        assert trunk == process["alone"]
        assert process["quiet"]
        told = process["told"]
        assert len(children) == len(told["nodes"]) - 1 == 4
        for child, prints in zip(told["nodes"][1:], children, strict=True):
            assert (child["status"], child["reason"], child["exact_replay"]) == ("completed", None, True)
            label = f"k1_{child['k1']:03d}" if child["k1_step"] is None else f"k1_step_{child['k1_step']:06d}"
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
    assert both[0]["barriers"] == both[1]["barriers"]


def test_children_of_two_processes_with_one_sampler(tmp_path: Path) -> None:
    both = pair(forks.forked, forks.Shared, folder=tmp_path)
    assert_forks_are_exact(both)
    # Still apart: what one process visits in an epoch the other does not.
    family = Family.load(tmp_path / "same" / "lightning_logs" / "version_0" / "lmc" / "family")
    assert forks.told(family) == both[0]["told"]
    files = {p.relative_to(family.folder).as_posix() for p in family.folder.rglob("*") if p.is_file()}
    print(sorted(files))


def test_children_of_two_processes_with_data_of_their_own(tmp_path: Path) -> None:
    assert_forks_are_exact(pair(forks.forked, forks.Own, folder=tmp_path))
