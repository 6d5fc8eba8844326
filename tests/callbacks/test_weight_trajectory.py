"""The way of a run: what is recorded, what is said of it, what survives, and what is drawn at the end."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lmc_lightning import (
    CheckpointBranching,
    WeightTrajectory,
    convergence_statistics,
    family_trajectories,
    measure,
    pca_plane,
    read_trajectory,
)
from lmc_lightning.landscape.trajectory.sketch import count_sketch
from tests.callbacks.runs import Classifier, TensorBoardLogger, batches, documented, fit, is_picture, is_unlogged

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


class Watches(Callback):
    """Copies the weights after every step."""

    def __init__(self) -> None:
        self.points: list[Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.points.append(self.weights(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *more: Any) -> None:
        self.points.append(self.weights(pl_module))

    @staticmethod
    def weights(module: Any) -> Tensor:
        return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def way(**options: Any) -> WeightTrajectory:
    return WeightTrajectory(**{"on_error": "raise", "probe_dataloader": batches(), **options})


def values(callback: Any, key: str) -> dict[int, float]:
    return {r.step: r.value for r in callback.results if r.name == f"trajectory/{key}"}


def test_every_step_is_recorded_as_it_was(tmp_path: Path) -> None:
    watch, ours = Watches(), way(record_every_n_train_steps=1)
    fit(Classifier(), watch, ours, default_root_dir=tmp_path)
    found, points = read_trajectory(tmp_path / "lmc" / "trajectory", "mine"), torch.stack(watch.points)
    assert torch.equal(found.points, points)
    assert (found.name, list(found.steps)) == ("mine", list(range(7)))
    exact, moved = points.double(), points.double().diff(dim=0)
    for k in (0, 3, 6):
        assert values(ours, "norm")[k] == pytest.approx(float(exact[k].norm()))
        assert values(ours, "distance_from_start")[k] == pytest.approx(float((exact[k] - exact[0]).norm()), rel=1e-5)
        assert values(ours, "path_length")[k] == pytest.approx(float(moved[:k].norm(dim=1).sum()), rel=1e-5)
    assert values(ours, "step_length").keys() == values(ours, "step_cosine").keys() == {3, 6}
    cosine = torch.cosine_similarity(moved[5], moved[4], dim=0)
    assert values(ours, "step_cosine")[6] == pytest.approx(float(cosine), abs=1e-5)
    assert {r.evidence["num_snapshots"] for r in ours.results if r.step == 6} == {7}


def test_visits_alone_are_recorded_by_default_and_parameters_can_be_chosen(tmp_path: Path) -> None:
    watch, ours = Watches(), way(epochs=[1], parameters=["net.0.*"])
    fit(Classifier(), watch, ours, default_root_dir=tmp_path)
    found = read_trajectory(tmp_path / "lmc" / "trajectory")
    assert list(found.steps) == [0, 3, 6]  # the start and the end belong to every way
    assert torch.equal(found.points, torch.stack([watch.points[k][:10] for k in (0, 3, 6)]))
    assert {r.step for r in ours.results} == {3}


def test_sketches_are_recorded_in_place_of_weights(tmp_path: Path) -> None:
    watch, ours = Watches(), way(dimension=8, seed=5)
    fit(Classifier(), watch, ours, default_root_dir=tmp_path)
    found = read_trajectory(tmp_path / "lmc" / "trajectory")
    assert torch.equal(found.points, torch.stack([count_sketch(watch.points[k], 8, 5) for k in (0, 3, 6)]))
    assert {r.evidence["dimension"] for r in ours.results} == {8}


def test_what_fills_the_buffer_is_written_during_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4 * sum(p.numel() for p in Classifier().parameters())
    monkeypatch.setattr("lmc_lightning.callbacks.trajectory.snapshots.BUFFER_BYTES", 3 * size)
    watch, ours = Watches(), way(record_every_n_train_steps=1)
    fit(Classifier(), watch, ours, default_root_dir=tmp_path)
    assert [count for _, _, count in ours.snapshots.files] == [3, 3, 1]
    assert torch.equal(read_trajectory(tmp_path / "lmc" / "trajectory").points, torch.stack(watch.points))
    monkeypatch.setattr("lmc_lightning.callbacks.trajectory.snapshots.free_bytes", lambda device: 4 * 3 * size)
    few = read_trajectory(tmp_path / "lmc" / "trajectory")  # three states may be in memory: every third
    assert list(few.steps) == [0, 3, 6]
    assert torch.equal(few.points, torch.stack(watch.points)[[0, 3, 6]])


def test_a_resumed_run_goes_on_with_the_way_and_the_checkpoint_holds_no_weights(tmp_path: Path) -> None:
    whole = way(record_every_n_train_steps=1)
    fit(Classifier(), whole, max_epochs=3, default_root_dir=tmp_path / "whole")
    first = way(record_every_n_train_steps=1)
    saving = ModelCheckpoint(tmp_path / "saved", filename="half")
    fit(Classifier(), first, saving, max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path / "half")
    content = torch.load(tmp_path / "saved" / "half.ckpt", weights_only=True)["callbacks"][first.state_key]
    assert sum(count for _, _, count in content["snapshots"]) == 7
    assert not [v for v in content.values() if isinstance(v, Tensor)]
    resumed = way(record_every_n_train_steps=1)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        fit(
            Classifier(),
            resumed,
            max_epochs=3,
            default_root_dir=tmp_path / "other",
            ckpt_path=tmp_path / "saved" / "half.ckpt",
        )
    found, expected = (read_trajectory(tmp_path / run / "lmc" / "trajectory") for run in ("other", "whole"))
    assert list(found.steps) == list(range(10))
    assert torch.equal(found.points[:7], expected.points[:7])
    for key in ("distance_from_start", "path_length", "step_cosine"):
        assert values(resumed, key)[6] == values(whole, key)[6]
        assert values(resumed, key).keys() == values(whole, key).keys()
    # The loader of these runs does not resume its order, so the last epochs differ; the way still adds up.
    moved = found.points.double().diff(dim=0).norm(dim=1)
    assert values(resumed, "path_length")[9] == pytest.approx(float(moved.sum()), rel=1e-5)


def test_a_way_whose_files_are_damaged_begins_anew_and_says_so(tmp_path: Path) -> None:
    first, saving = way(), ModelCheckpoint(tmp_path / "saved", filename="half")
    fit(Classifier(), first, saving, enable_checkpointing=True, default_root_dir=tmp_path)
    path = torch.load(tmp_path / "saved" / "half.ckpt")["callbacks"][first.state_key]["snapshots"][-1][0]
    content = torch.load(path)
    content["points"][0] += 1
    torch.save(content, path)
    with pytest.raises(ValueError, match="is damaged: it does not hold the weights that were written"):
        read_trajectory(tmp_path / "lmc" / "trajectory")
    resumed = way(on_error="record")
    with (
        pytest.warns(UserWarning, match="The way up to step 6 is lost: ValueError"),
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint"),
    ):
        fit(Classifier(), resumed, max_epochs=3, default_root_dir=tmp_path, ckpt_path=tmp_path / "saved" / "half.ckpt")
    assert values(resumed, "distance_from_start")[9] == values(resumed, "path_length")[9]
    assert {r.evidence["start_step"] for r in resumed.results if r.step == 9} == {6}


def test_a_full_disk_is_told_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    ours = way()
    monkeypatch.setattr("lmc_lightning.callbacks.trajectory.snapshots.write_atomic", full)
    with pytest.warns(UserWarning, match="The weights of the trajectory cannot be kept: OSError: No space left"):
        fit(Classifier(), ours, default_root_dir=tmp_path)
    assert values(ours, "path_length").keys() == {0, 3, 6}


class Projected(TensorBoardLogger):
    """Notes the points that the projector gets."""

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[str, Any] = {}

    def add_embedding(self, points: Any, rows: Any, global_step: int, tag: str, metadata_header: list[str]) -> None:
        assert tag not in self.points
        self.points[tag] = (np.asarray(points), [dict(zip(metadata_header, row, strict=True)) for row in rows])


def test_the_plane_of_the_run_is_drawn_once_with_the_true_loss(tmp_path: Path) -> None:
    logger, module = Projected(), Classifier()
    ours = way(record_every_n_train_steps=1, loss_points=3, tsne=True)
    fit(module, ours, logger=logger, default_root_dir=tmp_path)
    plane = pca_plane(read_trajectory(tmp_path / "lmc" / "trajectory"))
    with np.load(next(tmp_path.rglob("trajectory_plane_000006.npz"))) as stored:
        np.testing.assert_allclose(stored["coordinates"], plane.coordinates[0].numpy(), atol=1e-9)
        np.testing.assert_allclose(stored["plane_distance"], plane.distances[0].numpy(), atol=1e-9)
        assert stored["losses"].shape == (3, 3)
        theta = plane.centre + plane.directions @ torch.tensor([stored["xs"][2], stored["ys"][0]]).float()
        torch.nn.utils.vector_to_parameters(theta, module.parameters())
        with torch.no_grad():
            losses = [torch.nn.functional.cross_entropy(module(x), y) for x, y in batches()]
        assert stored["losses"][0, 2] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    rows = documented(WeightTrajectory)
    assert {key for _, key in logger.figures} == {k for k, t in rows.items() if is_picture(t) and "/" not in k}
    scalars = {k for k, text in rows.items() if not is_picture(text) and not is_unlogged(text)}
    assert logger.by_step("trajectory")[6] == scalars
    points, metadata = logger.points["trajectory"]
    assert points.shape == (7, 6)  # seven states span six dimensions
    assert [row["__next__"] for row in metadata] == ["1", "2", "3", "4", "5", "6", ""]


def test_children_and_trunk_are_drawn_on_one_plane(tmp_path: Path) -> None:
    logger, module = Projected(), Classifier()
    branching, ours = CheckpointBranching(epochs=(1,), children=2), way()
    fit(module, branching, ours, logger=logger, max_epochs=3, default_root_dir=tmp_path)
    runs = family_trajectories(branching.family, module)
    assert [(r.name, list(r.steps)) for r in runs] == [
        ("trunk", [0, 3, 6, 9]),
        ("k1_001_child_0", [3, 6, 9]),
        ("k1_001_child_1", [3, 6, 9]),
    ]
    assert torch.equal(runs[0].points[1], runs[1].points[0])  # where the child left
    own = read_trajectory(next(tmp_path.rglob("trajectory.json")).parent)
    assert torch.equal(own.points, runs[0].points)
    points, metadata = logger.points["trajectory/family"]
    assert len(points) == 10
    assert [row["__next__"] for row in metadata] == ["1", "2", "3", "", "5", "6", "", "8", "9", ""]
    assert {row["run"] for row in metadata} == {r.name for r in runs}
    assert {key for _, key in logger.figures} >= {"trajectory_plane/family", "trajectory_variance/family"}


def test_ends_of_several_runs_are_compared() -> None:
    modules, starts = [], []
    for seed in range(3):
        module = Classifier()
        with torch.no_grad():
            module.net[0].weight.add_(0.1 * seed)
        starts.append({name: value.clone() for name, value in module.state_dict().items()})
        fit(module)
        modules.append(module)
    found = convergence_statistics(modules, batches(), starts=starts, threshold=10.0)
    watch = [Watches.weights(module) for module in modules]
    assert float(found.distances[0, 2]) == pytest.approx(float((watch[0] - watch[2]).norm()), rel=1e-5)
    assert found.summary()["fraction"] == 1.0
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    with torch.no_grad():
        assert float(found.losses[1]) == pytest.approx(
            float(torch.nn.functional.cross_entropy(modules[1](x), y)), rel=1e-5
        )


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected dimension of at least 2 or None"):
        way(dimension=1)
    with pytest.raises(ValueError, match="on a plane of weights, got 5 with dimension=8"):
        way(dimension=8, loss_points=5)
    with pytest.raises(ValueError, match="every_n_train_steps to be an integer of at least 1"):
        way(record_every_n_train_steps=0)
    with pytest.raises(RuntimeError, match="Only a run has a way of its weights"):
        measure(Classifier(), batches(), [way()])
    with pytest.raises(FileNotFoundError, match=re.escape("Expected a folder with trajectory.json")):
        read_trajectory("nowhere")


def test_the_manifest_names_files_beside_it(tmp_path: Path) -> None:
    fit(Classifier(), way(), default_root_dir=tmp_path)
    folder = next(tmp_path.rglob("trajectory.json")).parent
    content = json.loads((folder / "trajectory.json").read_text())
    assert all((folder / name).is_file() and "/" not in name for name, _, _ in content["files"])
    moved = folder.rename(tmp_path / "elsewhere")
    assert len(read_trajectory(moved).steps) == 3
