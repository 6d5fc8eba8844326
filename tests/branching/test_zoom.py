"""A part of a run once more: what is measured then is what the run would have recorded, and changed data is noticed."""

import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import Tensor
from torch.utils.data import Dataset

from lmc_lightning import replay
from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.callbacks.hessian_spectrum import HessianSpectrum
from lmc_lightning.callbacks.sharpness import Sharpness
from lmc_lightning.core.glassbox import rng_state
from lmc_lightning.recording import Record
from tests.branching import runs
from tests.branching.runs import fit, loader, net, plain, sha

pytestmark = [
    pytest.mark.filterwarnings("ignore:More than half of the captured .* examples have one label"),
    pytest.mark.filterwarnings("ignore:.*did not converge:UserWarning"),
]


def spectrum(**arguments: Any) -> HessianSpectrum:
    few = {"num_eigenvalues": 1, "num_probes": 2, "num_steps": 2, "max_products": 8, "density": False}
    return HessianSpectrum(num_examples=12, on_error="raise", **few, **arguments)


def sharpness(**arguments: Any) -> Sharpness:
    return Sharpness(num_examples=12, num_samples=2, on_error="raise", **arguments)


def trunk(*callbacks: Any, steps: Any = (3, 8), kind: Any = runs.Cosine, **arguments: Any) -> CheckpointBranching:
    branching = CheckpointBranching(steps=steps, noise="same", when="never")
    data = loader(runs.Augmented()), loader(shuffle=False)
    fit(net(kind), data, branching, *callbacks, **{"max_epochs": 3, **arguments})
    return branching


def values(records: list[Record]) -> dict[tuple[int, str], Any]:
    return {(r.step, r.name): (r.value, r.stderr, r.evidence.get("probe_digest")) for r in records}


@pytest.mark.parametrize(
    ("start", "stop", "snapshot"),
    [
        (5, 9, "k1_step_000003"),
        (8, 8, "k1_step_000008"),
        pytest.param(10, 15, "k1_step_000008", marks=pytest.mark.slow),
    ],
)
def test_what_is_measured_afterwards_is_what_the_run_would_have_recorded(start: int, stop: int, snapshot: str) -> None:
    steps = list(range(start, stop + 1))
    kinds = [spectrum, sharpness] if len(steps) < 6 else [sharpness]
    during = [kind(steps=steps) for kind in kinds]
    branching = trunk(*during)
    before, module = sha(rng_state()), sha([c.results for c in during])
    afterwards = [kind() for kind in kinds]
    found = replay(branching.family, start=start, stop=stop, callbacks=afterwards)
    assert (found.exact, found.reason, found.snapshot) == (True, None, snapshot)
    assert values(found.results) == values([r for callback in during for r in callback.results])
    assert sorted({r.step for r in found.results}) == steps
    assert sha(rng_state()) == before
    assert sha([c.results for c in during]) == module
    assert list(found.losses) == list(range(int(snapshot[-6:]) + 1, max(stop, int(snapshot[-6:]) + 1) + 1))
    assert found.compared["losses"] == len(found.losses)
    assert found.losses.items() <= found.trunk_losses.items()
    assert not [child for child in Family.load(branching.family.folder).children if "replay" in child.name]


def test_every_other_step_from_the_folder_alone() -> None:
    folder = trunk(kind=runs.StepDecay).family.folder
    found = replay(str(folder), start=4, stop=12, every=4, callbacks=[sharpness()])
    assert (found.exact, sorted({r.step for r in found.results})) == (True, [4, 8, 12])
    assert found.compared == {
        "first_batches": 1,
        "batches": 2,  # at the start of the next epoch, and of that in which it ends
        "order": 2,
        "augmentation": 0,
        "weights": 2,
        "losses": 9,
    }
    assert found.folder == folder.parent.parent / "branches" / "replay_000004_000012"
    assert (found.folder / "lmc" / "sharpness.jsonl").is_file()
    assert replay(folder, start=4, stop=12).folder.name == "replay_000004_000012_2"
    table = found.to_pandas()
    assert list(table.index) == list(range(4, 13))
    assert table["train_loss"].notna().all()
    assert found.figure().axes
    with pytest.raises(KeyError, match="Expected keys among sharpness/"):
        found.figure(["hessian/trace"])


@pytest.mark.parametrize(
    ("arguments", "stop"),
    [
        ({"min_steps": 15}, 7),
        ({"accumulate_grad_batches": 2, "max_epochs": 4}, 8),
        ({"max_epochs": -1, "max_steps": 14}, 10),
        ({"val_check_interval": 2}, 9),
    ],
)
def test_a_replay_ends_where_it_is_told_to(arguments: dict[str, Any], stop: int) -> None:
    found = replay(trunk(steps=[1, 3], kind=runs.Net, **arguments).family, start=stop - 1, stop=stop)
    assert (found.exact, max(found.losses)) == (True, stop)


def test_a_replay_of_a_single_step_between_epochs() -> None:
    branching = CheckpointBranching(epochs=[0, 1], when="never")
    fit(net(runs.Plateau), plain(), branching, max_epochs=3)
    one, whole = (replay(branching.family, start=a, stop=b, callbacks=[sharpness()]) for a, b in ((5, 6), (0, 5)))
    assert (one.snapshot, one.exact, one.compared["first_batches"], list(one.losses)) == ("k1_001", True, 0, [6])
    assert (whole.snapshot, whole.exact, list(whole.losses)) == ("k1_000", True, [1, 2, 3, 4, 5])
    assert whole.compared["weights"] == 2
    assert [sorted({r.step for r in zoom.results}) for zoom in (one, whole)] == [[5, 6], [0, 1, 2, 3, 4, 5]]


class Shifting(Dataset[tuple[Tensor, Tensor]]):
    """Data that somebody may have changed since: every example, or one alone."""

    shift: ClassVar[float] = 0.0
    changed: ClassVar[range] = range(runs.SIZE)

    def __init__(self) -> None:
        self.points = runs.points()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, label = self.points[index]
        return inputs + (self.shift if index in self.changed else 0.0), label


def test_changed_data_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    branching = CheckpointBranching(steps=[3], noise="same", when="never")
    # In order, so that it is known which example is in which step: 16 to 23 are in step 8.
    fit(net(), (loader(Shifting(), shuffle=False), None), branching, max_epochs=3)
    assert replay(branching.family, start=4, stop=12).exact
    monkeypatch.setattr(Shifting, "shift", 1.0)
    with pytest.warns(UserWarning, match="is not the run that it repeats: its batches"):
        found = replay(branching.family, start=4, stop=12)
    assert (found.exact, found.reason) == (
        False,
        "its batches differ from the trunk's: the data has changed since, or the loader has state of its own",
    )
    monkeypatch.setattr(Shifting, "changed", range(20, 21))
    with pytest.warns(UserWarning, match="is not the run that it repeats"):
        found = replay(branching.family, start=4, stop=9)  # no digest of a batch has seen that example
    assert found.reason == "the loss differs from the trunk's first at step 8"
    assert found.figure().axes[0].texts[0].get_text().startswith("NOT the same run: the loss differs")


def test_what_cannot_be_replayed() -> None:
    family = trunk().family
    for arguments, message in {
        (5, 4, 1): "0 ≤ start ≤ stop and every ≥ 1, got start=5, stop=4",
        (5, 9, 0): "every=0",
        (5, 99, 1): "at most 15, where the trunk has come to, got 99",
        (2, 9, 1): "no snapshot at or before step 2; snapshots are after steps 3, 8",
    }.items():
        start, stop, every = arguments
        with pytest.raises(ValueError, match=message):
            replay(family, start=start, stop=stop, every=every)
    used = sharpness()
    replay(family, start=4, stop=4, callbacks=[used])
    with pytest.raises(ValueError, match="Expected new callbacks"):
        replay(family, start=4, stop=4, callbacks=[used])
    manual = CheckpointBranching(steps=[4], noise="same", when="never")
    fit(net(runs.TwoOptimizers), plain(), manual, max_epochs=1)
    with pytest.raises(ValueError, match="Several optimizers step at each batch"):
        replay(manual.family, start=5, stop=6)


def test_a_script_that_replays_its_own_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(runs.Net):
        pass

    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('run again')")
    main = types.ModuleType("__main__")
    main.__file__, main.Mine = str(script), Mine  # type: ignore[attr-defined]
    Mine.__module__, Mine.__qualname__ = "__main__", "Mine"
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert replay(trunk(kind=Mine).family, start=8, stop=9).exact
