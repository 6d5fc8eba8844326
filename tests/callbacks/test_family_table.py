"""The table of a family, its means over seeds, and the onset that is read off it."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from lmc_lightning.callbacks.pairs.family_table import COLUMNS, family_table, onset_of, seed_means, write_tables
from lmc_lightning.landscape.paths.barrier import DEFINITIONS
from lmc_lightning.recording import Record


def record(
    value: float, *, k1: int | None = 0, child: int = 0, later: int = 3, status: str = "ok", **more: object
) -> Record:
    evidence = dict.fromkeys(DEFINITIONS, value / 2) | {
        "barrier": value,
        "definition": "barrier",
        "metric": "error",
        "eval_split": "test",
        "batch_stats": None,
        "pair": "trunk",
        "run": f"k1_{k1}_child_{child}",
        "parent": "trunk",
        "k1": k1,
        "branch_step": 10 * (k1 or 0) if k1 is not None else 5,
        "later_epoch": later,
        "own_ends": [0.1, 0.2],
        "stderrs": dict.fromkeys(DEFINITIONS, 0.01),
        "num_samples": 100,
        **more,
    }
    return Record("barrier", 10 * later, later, "barrier/test_error/…", value, 0.01, evidence=evidence)


def test_a_barrier_is_a_row_for_each_definition() -> None:
    table = family_table([record(0.4)], "a")
    assert list(table.columns) == list(COLUMNS)
    assert list(table["definition"]) == list(DEFINITIONS)
    assert dict(zip(table["definition"], table["value"], strict=True)) == dict.fromkeys(DEFINITIONS, 0.2) | {
        "barrier": 0.4
    }
    assert set(table["stderr_data"]) == {0.01}
    assert set(table["family"]) == {"a"}
    assert set(table["own_first"]) == {0.1}
    assert set(table["n"]) == {100}


def test_other_numbers_are_one_row_and_what_was_not_measured_is_none() -> None:
    distance = Record("barrier", 30, 3, "distance/l2/k1_000", 2.5, None, evidence={"definition": "l2", "pair": "trunk"})
    again = Record("barrier", 30, 3, "barrier/x/k1_000/dip", -1.0, evidence={"definition": "dip"})  # is in its barrier
    lost = [replace(record(0.1), status="failed"), replace(record(0.1), status="skipped")]
    table = family_table([distance, again, *lost])
    assert list(table["definition"]) == ["l2"]
    assert list(table["value"]) == [2.5]


def test_means_are_over_children_with_the_error_over_them() -> None:
    values = [0.1, 0.4, 0.2, 0.5]
    means = seed_means(family_table([record(v, child=j) for j, v in enumerate(values)]))
    (row,) = means[means["definition"] == "barrier"].itertuples()
    assert row.value == pytest.approx(0.3)
    assert row.stderr_seed == pytest.approx(float(pd.Series(values).std() / 2))
    assert (row.num_nodes, row.num_pairs, row.n) == (4, 4, 100)
    assert row.stderr_data == pytest.approx(0.01)
    few = seed_means(family_table([record(v, child=j) for j, v in enumerate(values[:2])]))
    assert few["stderr_seed"].isna().all()


def test_repetitions_are_the_nodes_of_several_families() -> None:
    tables = [family_table([record(0.1 * r, child=j) for j in range(3)], str(r)) for r in range(3)]
    means = seed_means(pd.concat(tables))
    (row,) = means[means["definition"] == "barrier"].itertuples()
    assert (row.num_nodes, row.num_pairs) == (3, 9)
    assert row.stderr_seed == pytest.approx(0.1 / 3**0.5)


def test_a_mean_of_an_undefined_number_is_undefined() -> None:
    means = seed_means(family_table([record(math.nan), record(0.2, child=1)]))
    assert means[means["definition"] == "barrier"]["value"].isna().all()


def families(*instabilities: dict[int, float]) -> pd.DataFrame:
    """The table of several families by k1; earlier later epochs are stable and do not count."""
    tables = []
    for name, of in enumerate(instabilities):
        early = [record(0.0, k1=k1, later=2, instability=0.0) for k1 in of]
        late = [record(0.0, k1=k1, later=3, instability=value) for k1, value in of.items()]
        tables.append(family_table([*early, *late], str(name)))
    return pd.concat(tables)


def test_the_onset_is_that_of_the_instability_at_the_end() -> None:
    found = onset_of(families({0: 0.5, 1: 0.1, 2: 0.01}, {0: 0.5, 1: 0.0, 2: 0.01}), split="test")
    assert (found.k1, found.replicates) == (2, {0: 2, 1: 2, 2: 2})
    assert found.instability == pytest.approx({0: 0.5, 1: 0.05, 2: 0.01})
    assert onset_of(families({0: 0.5, 1: 0.1, 2: 0.01}), split="test", threshold=0.2).k1 == 1


def test_branch_points_within_epochs_are_named_by_their_step() -> None:
    table = family_table([record(0.0, k1=None, instability=0.3), record(0.0, k1=1, instability=0.0)])
    assert onset_of(table, split="test").k1 == 10


@pytest.mark.parametrize(("name", "stem"), [(None, "barriers"), ("my late", "barriers_my_late")])
def test_two_instances_write_tables_of_their_own(name: str | None, stem: str, tmp_path: Path) -> None:
    write_tables(family_table([record(0.1)]), tmp_path, name)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{stem}.csv", f"{stem}_mean.csv"]
    assert len(pd.read_csv(tmp_path / f"{stem}_mean.csv")) == len(DEFINITIONS)


def test_an_onset_needs_the_split_that_it_names() -> None:
    with pytest.raises(ValueError, match=r"no instability of the error on 'val' between trunk\. Splits: \['test'\]"):
        onset_of(families({0: 0.1}), split="val")
