"""Which runs of a family are compared, and what their keys end in."""

from pathlib import Path

import pytest

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.nodes import Node
from lmc_lightning.callbacks.pairs.pair import pairs_of, variant_of


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """A child after no epoch, another made later, three after one, of which one failed, and one within an epoch."""
    found = Family(tmp_path)
    found.trunk.epochs = {0: 0, 1: 3, 2: 6}
    found.children = [
        Node("k1_000_child_0", k1=0, child=0, branch_step=0, status="completed", epochs={0: 0, 2: 6}),
        *(Node(f"k1_001_child_{j}", k1=1, child=j, status="completed", epochs={1: 3, 2: 6}) for j in range(3)),
        Node("k1_step_000004_child_0", k1_step=4, child=0, branch_step=4, status="completed", epochs={2: 6}),
        Node(
            "k1_000_lr_half", k1=0, branch_step=0, status="completed", epochs={2: 6}, intervention={"name": "lr_half"}
        ),
    ]
    found.children[2].status = "failed"
    return found


def test_children_are_compared_with_their_trunk(family: Family) -> None:
    pairs = pairs_of(family, ["trunk"])
    assert [pair.label for pair in pairs] == [
        "k1_000",
        "k1_000/lr_half",
        "k1_001/child_0",
        "k1_001/child_1",
        "k1_001/child_2",
        "k1_step_000004",
    ]
    assert all(pair.first is family.trunk for pair in pairs)
    assert pairs[0].epochs == [0, 2]
    assert (pairs[0].lineage["intervention"], pairs[1].lineage["intervention"]) == (None, "lr_half")


def test_siblings_are_compared_where_both_are_completed(family: Family) -> None:
    (pair,) = pairs_of(family, ["siblings"])
    assert pair.label == "k1_001/siblings_0_2"
    assert pair.lineage["run"] == "k1_001_child_2"
    assert pair.lineage["parent"] == "k1_001_child_0"


def test_what_was_done_to_children_is_part_of_their_label(family: Family) -> None:
    done = {"name": "lr_x0.5", "seed": 1}
    family.children = [
        Node(f"k1_001_lr_x0.5_child_{j}", k1=1, child=j, status="completed", epochs={2: 6}, intervention=done)
        for j in range(2)
    ]
    labels = [pair.label for pair in pairs_of(family, ["trunk", "siblings"])]
    assert labels == ["k1_001/lr_x0.5/child_0", "k1_001/lr_x0.5/child_1", "k1_001/lr_x0.5/siblings_0_1"]
    del family.children[1]
    (pair,) = pairs_of(family, ["trunk"])
    assert (pair.label, pair.lineage["intervention"]) == ("k1_001/lr_x0.5", "lr_x0.5")
    assert variant_of(family) == "lr_x0.5"
