"""Two processes measure what one would on all their examples; what fails on one is recorded on both."""

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import strategies
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

import lmc_lightning
from lmc_lightning import (
    CheckpointBranching,
    EdgeOfStability,
    HessianSpectrum,
    InterpolationBarrier,
    MeasurementCallback,
    Sharpness,
    measure,
)
from lmc_lightning.callbacks.bridge.guards import check_trainer
from lmc_lightning.core.collective import Collective
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.structure import digest
from lmc_lightning.landscape.paths.line import endpoint_of, linear_path
from lmc_lightning.landscape.paths.profiles import profiles_along
from lmc_lightning.landscape.paths.states import StateEvaluator
from lmc_lightning.tables import read_table
from tests.scripts import ddp_script, deaths, distributed
from tests.scripts.processes import PATIENCE, free_port, pair

pytestmark = [
    pytest.mark.filterwarnings("ignore:More than half of the captured train probe examples:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
]


def captured(folder: Path, split: str = "train") -> list[Any]:
    """The batches that both processes have kept of a split."""
    files = sorted(folder.rglob("probes_*.pt"))
    assert [f.name for f in files] == ["probes_0.pt", "probes_1.pt"]
    return [batch for f in files for batch, _ in torch.load(f, weights_only=True)[split]]


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    both = pair(distributed.attached, folder=tmp_path)
    for process in both:
        without, with_ours = process["fingerprints"]
        assert without == with_ours
    assert both[0]["records"] == both[1]["records"]
    assert not both[0]["failures"]
    assert {(r["kind"], r["step"]) for r in both[0]["records"]} == {
        (kind, step) for kind in ("hessian", "sharpness", "barrier") for step in (0, 10, 20)
    }
    # Process 0 alone writes, but for the probe examples that each has captured.
    log_dir = tmp_path / "with" / "lightning_logs" / "version_0"
    files = {p.relative_to(log_dir).as_posix() for p in log_dir.rglob("*") if p.is_file()}
    tables = {f"lmc/{kind}.jsonl" for kind in ("hessian", "sharpness", "barrier")}
    figures = {f"lmc/figures/hessian_density_0000{step}.png" for step in ("00", "10", "20")}
    arrays = {f for f in files if f.startswith("lmc/arrays/hessian_")}
    others = {"metrics.csv", "lmc/report.md", "lmc/probes_0.pt", "lmc/probes_1.pt"}
    assert files - arrays == {*tables, *figures, *others}
    rows = [row for row in (log_dir / "metrics.csv").read_text().splitlines() if "e" in row]
    assert len(rows) == len(set(rows))


@pytest.fixture(scope="module")
def unions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("unions")
    return folder, pair(distributed.unions, dict.fromkeys(distributed.SOURCES, "64-true"), folder=folder)


def batches_of(source: str, folder: Path, dtype: torch.dtype) -> list[Any]:
    """All probe examples, in one process."""
    if source == "captured":
        return captured(folder)
    inputs, labels = distributed.examples(75, seed=9) if source == "datamodule" else distributed.examples(100, seed=4)
    return [(inputs.to(dtype), labels)]


def assert_as_one_process(source: str, both: list[Any], folder: Path, dtype: torch.dtype, names: list[str]) -> None:
    assert both[0][source]["records"] == both[1][source]["records"]
    batches = batches_of(source, folder / source, dtype)
    start, end = (distributed.seeded().to(dtype) for _ in range(2))
    end.load_state_dict(both[0][source]["end"])
    for epoch, module in ((0, start), (1, end)):
        ours = distributed.callbacks(num_examples=distributed.SOURCES[source])
        alone = measure(module, batches, ours)
        found = {r["name"]: r for r in both[0][source]["records"] if r["epoch"] == epoch}
        assert found["hessian/trace"]["evidence"]["num_examples"] == distributed.SOURCES[source]
        inputs, labels = (torch.cat(parts)[: distributed.SOURCES[source]] for parts in zip(*batches, strict=True))
        loss = F.cross_entropy(module.net(inputs), labels).item()
        assert math.isclose(found["hessian/trace"]["evidence"]["probe_loss"], loss, rel_tol=1e-6)
        for name in names:
            # The trace is deflated by eigenvectors, and so are the ranks; the run starts them from its last visit's.
            tolerance = 1e-5 if name in ("hessian/trace", "hessian/effective_rank", "hessian/stable_rank") else 1e-6
            assert math.isclose(found[name]["value"], alone[name], rel_tol=tolerance), name


@pytest.mark.parametrize("source", distributed.SOURCES)
def test_two_processes_measure_as_one_does_on_the_union(source: str, unions: tuple[Path, list[Any]]) -> None:
    folder, both = unions
    names = ["hessian/lambda_max", "hessian/trace", "hessian/effective_rank"]
    names += [f"sharpness/{name}" for name in ("worst_case", "adaptive", "average", "gradient_norm")]
    assert_as_one_process(source, both, folder, torch.float64, names)


def test_in_single_precision_too(tmp_path: Path) -> None:
    both = pair(distributed.unions, {"captured": "32-true"}, folder=tmp_path)
    names = ["hessian/lambda_max", "hessian/trace", "sharpness/gradient_norm"]
    assert_as_one_process("captured", both, tmp_path, torch.float32, names)


def test_the_probe_set_of_a_run_has_one_digest(unions: tuple[Path, list[Any]]) -> None:
    """A set that every process reads whole is named as it is in one process."""
    folder, both = unions
    for source in ("datamodule", "probe_dataloader"):
        inputs, labels = batches_of(source, folder, torch.float64)[0]
        sizes = [75] if source == "datamodule" else [32, 32, 11]
        parts = zip(inputs[:75].split(sizes), labels[:75].split(sizes), strict=True)
        digests = {r["evidence"]["probe_digest"] for r in both[0][source]["records"]}
        assert digests == {digest([list(part) for part in parts])}
    parts = captured(folder / "captured")
    digests = {r["evidence"]["probe_digest"] for r in both[0]["captured"]["records"]}
    assert len(digests) == 1
    assert digests.isdisjoint({digest(parts[: distributed.NUM_BATCHES]), digest(parts[distributed.NUM_BATCHES :])})


def test_batch_norm_statistics_are_those_of_both_processes(tmp_path: Path) -> None:
    both = pair(distributed.batch_norm, folder=tmp_path)
    assert not both[0]["failures"]
    start, end = (distributed.seeded(batch_norm=True).double() for _ in range(2))
    end.load_state_dict(both[0]["end"])

    def loss(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module.net(batch[0]), batch[1])

    train = captured(tmp_path)
    objectives = {split: Objective(start, captured(tmp_path, split), loss) for split in ("train", "val")}
    statistics = Objective(start, train, loss, mode="train", keep_batches=True)
    tensors = {**dict(end.named_parameters()), **dict(end.named_buffers())}
    path = linear_path(endpoint_of(objectives["train"]), endpoint_of(objectives["train"], tensors))
    ts = torch.linspace(0, 1, 5, dtype=torch.float64)
    states = StateEvaluator(objectives, batch_stats="recompute", stats_objective=statistics)
    profiles = profiles_along(states, path, ts)
    for process in both:
        for split, profile in profiles.items():
            curve = process["curves"][f"barrier/{split}_loss/initial"]
            torch.testing.assert_close(curve, profile.losses, rtol=1e-9, atol=0)
        # What validation logs is averaged over both processes' examples.
        torch.testing.assert_close(
            process["curves"]["barrier/logged/initial"], profiles["val"].losses, rtol=1e-9, atol=0
        )


def test_batch_norm_layers_that_one_process_skips_take_the_statistics_of_the_other(tmp_path: Path) -> None:
    alone = distributed.detour_statistics((0, 1), Collective())
    for process in pair(distributed.detour, folder=tmp_path):
        torch.testing.assert_close(process, alone, rtol=1e-12, atol=0)
        assert torch.equal(process["never.running_mean"], torch.zeros(6, dtype=torch.float64))


def test_synchronized_batch_norm_is_measured_in_train_mode_with_statistics_of_each_batch(tmp_path: Path) -> None:
    alone = distributed.synchronized_products((0, 1), torch.nn.BatchNorm1d(3), Collective())
    for process in pair(distributed.synchronized, folder=tmp_path):
        torch.testing.assert_close(process, alone, rtol=1e-9, atol=1e-12)


def test_visits_wait_until_every_process_has_its_probe_set(tmp_path: Path) -> None:
    both = pair(distributed.uneven_capture, folder=tmp_path)
    assert both[0]["records"] == both[1]["records"]
    # 50 examples each: 3 batches of 22, 7 batches of 8.
    assert both[0]["seen"] == both[1]["seen"] == [[]] * 6 + [[0, 2, 5]] * 2 + [[0, 2, 5, 9]] * 2
    start = measure(distributed.seeded(), captured(tmp_path), [Sharpness(num_samples=2, num_examples=100)])
    found = {r["name"]: r["value"] for r in both[0]["records"] if r["step"] == 0}
    assert math.isclose(found["sharpness/gradient_norm"], start["sharpness/gradient_norm"], rel_tol=1e-6)


def test_a_failure_on_one_process_is_recorded_on_both(tmp_path: Path) -> None:
    both = pair(distributed.failing, folder=tmp_path)
    for process in both:
        without, with_ours = process["fingerprints"]
        assert without == with_ours
        assert [r["step"] for r in process["unlucky"] if r["status"] == "ok"] == [0, 0, 10, 10]
        assert {r["status"] for r in process["lucky"]} == {"ok"}
        assert [r["step"] for r in process["lucky"]][::4] == [0, 2, 4, 6, 8, 10]
    places = {2: "preparation", 4: "loss", 6: "middle", 8: "end"}
    for rank, text in ((0, "RuntimeError: The measurement failed on process 1: {}"), (1, "{}")):
        failed = {r["step"]: r["evidence"]["reason"] for r in both[rank]["unlucky"] if r["status"] == "failed"}
        reasons = {step: text.format(f"ValueError: no luck with the {place}") for step, place in places.items()}
        assert failed == reasons


def test_what_is_refused_ends_both_processes(tmp_path: Path) -> None:
    zero, one = pair(distributed.refused, folder=tmp_path)
    assert one["raise"] == "ValueError: no luck with the loss"
    assert zero["raise"] == "RuntimeError: The measurement failed on process 1: ValueError: no luck with the loss"
    assert one["loader"] == "OSError: no such file"
    assert zero["loader"] == "RuntimeError: The measurement failed on process 1: OSError: no such file"
    for process in (zero, one):
        assert process["branching"].startswith(
            "ValueError: CheckpointBranching needs a single device or strategy='ddp'"
        )
        assert process["sharded"].startswith("RuntimeError: ModelParallelStrategy shards the parameters")
        assert "lmc_lightning.measure(module, dataloader, [callback])" in process["sharded"]


def test_an_objective_refuses_sharded_parameters(tmp_path: Path) -> None:
    for answer in pair(distributed.sharded, folder=tmp_path):
        assert answer.startswith("Parameter net.0.weight is a DTensor, spread over processes")
        assert "Load a consolidated checkpoint" in answer


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_sharded_strategies_are_refused(name: str) -> None:
    """Unmade, since two of them need a GPU or a package."""
    kind = getattr(strategies, name)
    strategy = kind.__new__(kind)
    with pytest.raises(RuntimeError, match=f"{name} shards the parameters, .* Save a consolidated checkpoint"):
        check_trainer(SimpleNamespace(strategy=strategy))


def test_a_step_that_gathers_is_refused_and_waits_for_nobody(tmp_path: Path) -> None:
    zero, one = pair(distributed.gathering, folder=tmp_path)
    own = "The step gathers from other processes"
    assert zero[0].startswith(f"RuntimeError: {own}")
    assert one[0].startswith(f"RuntimeError: {own}")


def test_exposed_numbers_stop_both_processes(tmp_path: Path) -> None:
    for process in pair(distributed.monitored, folder=tmp_path):
        last = process["records"][-1]
        assert (last["name"], last["step"]) == ("sharpness/gradient_norm", 30)
        assert process["value"] == pytest.approx(last["value"], rel=1e-7)
        assert process["epochs"] == 3


def test_a_resumed_run_measures_on_the_examples_of_both_processes(tmp_path: Path) -> None:
    for process in pair(distributed.resumed, folder=tmp_path):
        assert {r["step"] for r in process["whole"]} == {0, 10, 20}
        after = [[r for r in process[run] if (r["kind"], r["step"]) == ("hessian", 20)] for run in ("whole", "pieces")]
        rest = [[r for r in process[run] if (r["kind"], r["step"]) != ("hessian", 20)] for run in ("whole", "pieces")]
        assert rest[0] == rest[1]
        # Lanczos starts cold again, so that the numbers agree to its tolerance only, and there is no overlap.
        tops = [next(r for r in rows if r["name"] == "hessian/lambda_max") for rows in after]
        assert tops[0]["evidence"]["probe_digest"] == tops[1]["evidence"]["probe_digest"]
        assert tops[0]["evidence"]["probe_loss"] == tops[1]["evidence"]["probe_loss"]
        assert tops[0]["value"] == pytest.approx(tops[1]["value"], rel=1e-3)


@pytest.mark.parametrize("start_method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_that_lightning_spawns(start_method: Any, tmp_path: Path) -> None:
    """Callbacks travel by pickle, and results come back by file."""
    ours = distributed.callbacks(num_examples=100, epochs=[0, 1])
    strategy = DDPStrategy(start_method=start_method, process_group_backend="gloo", timeout=timedelta(seconds=30))
    with mock.patch.dict(os.environ):
        trainer = distributed.make_trainer(ours, strategy=strategy, root=tmp_path, max_epochs=1)
        trainer.fit(distributed.seeded())
    assert not ours[0].results
    tables = {p.name: read_table(p) for p in tmp_path.rglob("*.jsonl")}
    assert tables.keys() == {"hessian.jsonl", "sharpness.jsonl"}
    for rows in tables.values():
        assert {row["step"] for row in rows} == {0, 10}
        assert {(row["status"], row["evidence"]["num_examples"]) for row in rows} == {("ok", 100)}
        assert len({(row["step"], row["name"]) for row in rows}) == len(rows)


def assert_interrupted_at_step_5(root: Path) -> None:
    (path,) = root.rglob("slow.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["status"]) for row in rows] == [(2, "ok"), (5, "failed")]
    assert rows[1]["evidence"]["reason"] == "A process was asked to end during the measurement."
    saved = torch.load(root / "root" / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    assert [state["open"] for key, state in saved.items() if key.startswith("Terminated")] == [[[5, 0]]]


def test_a_script_that_lightning_launches_and_a_scheduler_terminates(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    script = [sys.executable, str(root / "tests" / "scripts" / "ddp_script.py")]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr  # Lightning ends a terminated run with SystemExit
    assert done.stderr.count("Received SIGTERM") == 2
    assert_interrupted_at_step_5(tmp_path)


def test_two_processes_that_are_both_terminated_while_they_compute_end_together(tmp_path: Path) -> None:
    """Inside a collective call, Lightning's own handler would wait until the time-out of the group."""
    assert pair(ddp_script.main, folder=tmp_path, returns=False) == [0, 0]
    assert_interrupted_at_step_5(tmp_path)


MAKE: dict[str, Callable[[], pl.Callback]] = {
    "CheckpointBranching": lambda: CheckpointBranching(epochs=[0]),
    "EdgeOfStability": lambda: EdgeOfStability(num_examples=20, max_products=64),
    "HessianSpectrum": lambda: HessianSpectrum(num_examples=20, num_probes=2, num_steps=2),
    "InterpolationBarrier": lambda: InterpolationBarrier(reference="initial", num_points=3, num_examples=20),
    "LocalLearningCoefficient": lambda: lmc_lightning.LocalLearningCoefficient(
        lmc_lightning.Langevin(num_chains=2, num_burn_in=1, num_draws=4), num_examples=20
    ),
    "LossSurface": lambda: lmc_lightning.LossSurface(num_points=3, num_examples=20),
    "MinimaVolume": lambda: lmc_lightning.MinimaVolume(num_directions=4, threshold="rise", rtol=0.1, num_examples=20),
    "ModeConnectivity": lambda: lmc_lightning.ModeConnectivity(
        lmc_lightning.CurveTraining(num_epochs=1), num_points=3, reference="initial", num_examples=20
    ),
    "RepresentationSimilarity": lambda: lmc_lightning.RepresentationSimilarity(reference="initial", num_examples=20),
    "Sharpness": lambda: Sharpness(num_examples=20),
    "WeightTrajectory": lambda: lmc_lightning.WeightTrajectory(
        record_every_n_train_steps=1, loss_points=2, num_examples=20
    ),
}


@pytest.mark.filterwarnings("ignore:.*did not converge:UserWarning")
@pytest.mark.filterwarnings("ignore:CheckpointBranching. k1_000_child_0 failed, SharedNoiseError:UserWarning")
def test_every_callback_pickles_before_and_after_a_run() -> None:
    exported = {name: getattr(lmc_lightning, name) for name in lmc_lightning.__all__}
    kinds = {n for n, k in exported.items() if isinstance(k, type) and issubclass(k, pl.Callback)}
    assert kinds - {"MeasurementCallback"} == MAKE.keys()
    for name, make in MAKE.items():
        callback = pickle.loads(pickle.dumps(make()))
        deaths.fit(name, [callback], max_epochs=1)
        again = pickle.loads(pickle.dumps(callback))
        if isinstance(callback, MeasurementCallback):
            assert callback.results
            assert again.results == callback.results
            assert again.state_dict()["probes"] == callback.state_dict()["probes"]
        deaths.fit(f"{name}_again", [again], max_epochs=1)
