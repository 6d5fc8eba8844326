"""The surface of a run is that of its weights, logged under the documented keys, and the same without a trainer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lmc_lightning
from lmc_lightning import LossSurface, Surface, load_surface, loss_surface, measure
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.batchnorm import running_statistics
from lmc_lightning.loggers import Mesh, log_mesh
from tests import oracles
from tests.callbacks.runs import (
    Classifier,
    Rows,
    TensorBoardLogger,
    batches,
    cross_entropy,
    documented,
    fit,
    is_picture,
    loader,
)
from tests.callbacks.test_offline import state_of
from tests.problems import normal

KEYS = documented(LossSurface)
CHEAP: dict[str, Any] = {"num_points": 5, "on_error": "raise"}


class Shows(TensorBoardLogger):
    """Keeps meshes."""

    def __init__(self) -> None:
        super().__init__()
        self.meshes: list[tuple[int, str, Any]] = []

    def add_mesh(self, tag: str, vertices: Any, colors: Any, faces: Any, config_dict: Any, global_step: int) -> None:
        self.meshes.append((global_step, tag, config_dict))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[LossSurface, Shows, Classifier, Path]:
    folder = tmp_path_factory.mktemp("run")
    module, logger, callback = Classifier(), Shows(), LossSurface(probe_dataloader=batches(), **CHEAP)
    fit(module, callback, logger=logger, default_root_dir=folder)
    return callback, logger, module, folder


def test_every_documented_key_is_logged_at_every_visit(run: Any) -> None:
    _, logger, _, _ = run
    scalars = {key for key, text in KEYS.items() if not is_picture(text)}
    assert logger.by_step("landscape") == dict.fromkeys((0, 3, 6), scalars)
    drawn = {key for key in KEYS if key.endswith(("contours", "relief"))}
    assert sorted(logger.figures) == sorted((step, key) for step in (0, 3, 6) for key in drawn)
    assert set(KEYS) == scalars | drawn | {"landscape/profile", "landscape/mesh"}


def test_the_last_surface_is_shown_as_a_mesh_that_can_be_seen(run: Any) -> None:
    _, logger, _, _ = run
    ((step, key, config),) = logger.meshes
    assert (step, key) == (6, "landscape/mesh")
    assert config["material"] == {"cls": "MeshBasicMaterial", "side": 2, "color": "#ffffff"}
    assert config["camera"]["position"][1] > 0


def test_the_surface_at_the_end_is_that_of_the_weights(run: Any) -> None:
    callback, _, module, _ = run
    found = callback.surfaces[6]
    loss = oracles.mean_loss(module, batches(), cross_entropy, [8.0] * 3)
    assert found.centre["loss"] == pytest.approx(float(loss(oracles.flat_parameters(module))), rel=1e-6)
    numbers = {r.name.removeprefix("landscape/"): r.value for r in callback.results if r.step == 6}
    rises = found.losses - found.centre["loss"]
    assert numbers["mean_rise"] == pytest.approx(float(rises.mean()), rel=1e-12)
    assert (numbers["max_rise"], numbers["min_rise"]) == (float(rises.max()), float(rises.min()))
    assert numbers["min_rise"] <= 0
    step = 0.5
    line = found.losses[1:4, 2]
    assert numbers["curvature_1"] == pytest.approx(float(line[2] - 2 * line[1] + line[0]) / step**2, rel=1e-12)
    line = found.losses[2, 1:4]
    assert numbers["curvature_2"] == pytest.approx(float(line[2] - 2 * line[1] + line[0]) / step**2, rel=1e-12)


def test_every_visit_is_in_a_file(run: Any) -> None:
    callback, _, _, folder = run
    files = sorted(folder.rglob("landscape_surface_*.npz"))
    assert [file.name[-10:-4] for file in files] == ["000000", "000003", "000006"]
    for file, found in zip(files, callback.surfaces.values(), strict=True):
        assert torch.equal(load_surface(file).losses, found.losses)
        assert load_surface(file).marks == found.marks


def test_evidence(run: Any) -> None:
    for record in run[0].results:
        assert (record.evidence["num_points"], record.evidence["span"], record.evidence["num_nonfinite"]) == (
            25,
            1.0,
            0,
        )
        assert record.evidence["directions"].startswith("random directions, weights filter by filter")
        assert (record.evidence["num_matvecs"], record.evidence["num_gradients"]) == (0, 0)
        assert record.evidence["batch_stats"] is None


def test_without_a_trainer_it_is_the_same_bit_for_bit(run: Any) -> None:
    callback, _, module, _ = run
    found = loss_surface(module, batches(), num_points=5)
    assert isinstance(found, Surface)
    assert torch.equal(found.losses, callback.surfaces[6].losses)
    assert found.marks == callback.surfaces[6].marks
    numbers = {r.name: r.value for r in callback.results if r.step == 6}
    assert measure(module, batches(), [LossSurface(num_points=5)]) == numbers


def test_directions_of_all_visits_start_from_the_same_random_numbers() -> None:
    """A run that learns nothing has the same surface at every visit; another seed has another."""
    still = Classifier()
    still.configure_optimizers = lambda: torch.optim.SGD(still.parameters(), lr=0.0)  # type: ignore[method-assign]
    common: dict[str, Any] = {"probe_dataloader": batches(), "dimensions": 1, "epochs": [0, 2], **CHEAP}
    ours = [LossSurface(**common), LossSurface(seed=1, name="other", **common)]
    fit(still, *ours)
    first, *others = ours[0].surfaces.values()
    assert all(torch.equal(first.losses, other.losses) for other in others)
    assert not torch.allclose(first.losses, ours[1].surfaces[0].losses)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_hessian_directions_show_the_largest_eigenvalue(batch_norm: bool) -> None:
    module = Classifier(batch_norm).double()
    ours = LossSurface("hessian", span=1e-3, num_points=3, dimensions=1, on_error="raise")
    found = measure(module, batches(double=True), [ours])
    loss = oracles.mean_loss(module, batches(double=True), cross_entropy, [8.0] * 3)
    top = torch.linalg.eigvalsh(oracles.dense_hessian(loss, oracles.flat_parameters(module)))[-1]
    assert found["landscape/curvature_1"] == pytest.approx(float(top), rel=1e-5)
    assert "landscape/curvature_2" not in found


def test_on_a_line_there_is_a_profile_and_no_mesh() -> None:
    logger = Shows()
    fit(Classifier(), LossSurface(dimensions=1, epochs=[1], **CHEAP), logger=logger)
    assert logger.figures == [(3, "landscape/profile")]
    assert logger.meshes == []


@pytest.mark.parametrize(("mesh", "steps"), [("all", [3, 6]), ("none", [])])
def test_meshes_on_request(mesh: Any, steps: list[int]) -> None:
    logger = Shows()
    fit(Classifier(), LossSurface(mesh=mesh, epochs=[1, 2], num_points=3, on_error="raise"), logger=logger)
    assert [step for step, _, _ in logger.meshes] == steps


def test_given_directions_are_taken() -> None:
    module = Classifier()
    columns = normal(len(oracles.flat_parameters(module)), 2, seed=1).float()
    found = loss_surface(module, batches(), directions=columns, num_points=3, span=0.5)
    assert found.description == "given directions"
    loss = oracles.mean_loss(module, batches(), cross_entropy, [8.0] * 3)
    point = oracles.flat_parameters(module) + 0.5 * columns[:, 0] - 0.5 * columns[:, 1]
    assert float(found.losses[2, 0]) == pytest.approx(float(loss(point)), rel=1e-5)


# -- BatchNorm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["endpoint", "recompute", None])
def test_the_policy_of_batch_norm_is_in_every_record(policy: Any) -> None:
    callback = LossSurface(batch_stats=policy, num_points=3, epochs=[0, 2], on_error="raise")
    fit(Classifier(batch_norm=True), callback)
    expected = {0: "recompute" if policy == "recompute" else "initial", 6: policy or "endpoint"}
    assert {r.step: r.evidence["batch_stats"] for r in callback.results} == expected
    assert callback.surfaces[6].batch_stats == (policy or "endpoint")


def test_recomputed_statistics_are_those_of_the_training_batches() -> None:
    module, rest = Classifier(batch_norm=True), batches()
    common: dict[str, Any] = {"num_points": 3, "batch_stats": "recompute"}
    found = loss_surface(module, rest[:1], train_dataloader=rest, **common)
    objective = Objective(module, rest[:1], cross_entropy)
    training = Objective(module, rest, cross_entropy, mode="train", keep_batches=True)
    statistics = running_statistics(training, objective.theta())
    assert found.centre["loss"] == objective.evaluate(objective.theta(), buffers=statistics).loss
    assert measure(module, rest, [LossSurface(**common)])["landscape/mean_rise"] == pytest.approx(
        float(loss_surface(module, rest, **common).rises.mean()), rel=1e-6
    )


# -- planes through states ---------------------------------------------------------------------------------------------


def three(batch_norm: bool = False) -> list[Classifier]:
    modules = [Classifier(batch_norm) for _ in range(3)]
    for index, module in enumerate(modules):
        for number, parameter in enumerate(module.parameters()):
            parameter.data += 0.3 * index * normal(*parameter.shape, seed=50 * index + number).float()
    return modules


def loss_of(module: nn.Module) -> float:
    objective = Objective(module, batches(), cross_entropy)
    return float(objective.loss(objective.theta()))


def test_a_plane_through_three_modules_marks_each_with_its_own_loss() -> None:
    modules, data = three(), batches()
    before = [state_of(module) for module in modules]
    found = loss_surface(modules[0], data, through=modules[1:], num_points=5)
    assert [state_of(module) for module in modules] == before
    assert [mark.label for mark in found.marks] == ["A", "B", "C"]
    assert [mark.values["loss"] for mark in found.marks] == [loss_of(module) for module in modules]
    assert found.marks[1].position == pytest.approx((1, 0), abs=1e-6)
    for mark in found.marks:
        assert found.ys is not None
        assert found.xs[0] < mark.position[0] < found.xs[-1]
        assert found.ys[0] < mark.position[1] < found.ys[-1]


def test_the_line_through_two_modules_has_both_on_its_grid() -> None:
    first, second, _ = three()
    found = loss_surface(first, batches(), through=[second], dimensions=1, num_points=25)
    at = {round(x, 6): value for x, value in zip(found.xs.tolist(), found.losses.tolist(), strict=True)}
    assert at[0.0] == loss_of(first)
    assert at[1.0] == pytest.approx(loss_of(second), rel=1e-5)
    barrier = lmc_lightning.interpolation_barrier(first, second, batches(), num_points=17)
    inside = [value for x, value in at.items() if 0 <= x <= 1]
    np.testing.assert_allclose(inside, barrier.values.numpy(), rtol=1e-5)


def test_beside_the_line_of_two_modules_lies_a_random_direction() -> None:
    first, second, _ = three()
    found, other = (loss_surface(first, batches(), through=[second], num_points=5, seed=seed) for seed in (0, 1))
    middle = 2  # y = 0
    torch.testing.assert_close(found.losses[:, middle], other.losses[:, middle], rtol=1e-6, atol=0)
    assert not torch.allclose(found.losses[:, 0], other.losses[:, 0])


def test_checkpoints_stand_for_modules(tmp_path: Path) -> None:
    first, second, _ = three()
    torch.save(second.state_dict(), tmp_path / "b.pt")
    a, b = (loss_surface(first, batches(), through=[end], num_points=3) for end in (second, tmp_path / "b.pt"))
    assert torch.equal(a.losses, b.losses)


def test_between_networks_with_batch_norm_statistics_are_recomputed_by_default() -> None:
    first, second, _ = three(batch_norm=True)
    assert loss_surface(first, batches(), through=[second], num_points=3).batch_stats == "recompute"
    kept = loss_surface(first, batches(), through=[second], num_points=3, batch_stats="endpoint")
    assert kept.centre["loss"] == loss_of(first)


def test_an_interrupted_surface_goes_on(tmp_path: Path) -> None:
    module, path = Classifier(), tmp_path / "surface.npz"

    def stop(done: int, total: int, text: str) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loss_surface(module, loader(), num_points=5, path=path, progress=stop)
    found = loss_surface(module, loader(), num_points=5, path=path)
    assert torch.equal(found.losses, loss_surface(module, loader(), num_points=5).losses)
    with pytest.raises(ValueError, match="belongs to another surface"):
        loss_surface(module, loader(), num_points=5, path=path, seed=1)


# -- misuse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "gradient"}, "Expected directions to be 'random' or 'hessian', got 'gradient'"),
        ({"directions": torch.ones(41, 1)}, r"Expected a direction for each of 2 dimensions.* Pass dimensions=1"),
        ({"dimensions": 3}, r"Expected dimensions to be 1 \(a line\) or 2 \(a plane\), got 3"),
        ({"num_points": 4}, "Expected an odd num_points of at least 3"),
        ({"span": -1.0}, "a positive span"),
        ({"batch_stats": "interpolate"}, "Expected batch_stats to be 'endpoint' or 'recompute'"),
    ],
)
def test_misuse_raises_at_construction_and_in_the_twin(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSurface(**options)
    with pytest.raises(ValueError, match=message):
        loss_surface(Classifier(), batches(), **options)


def test_misuse_of_meshes_and_of_states() -> None:
    first, second, third = three()
    with pytest.raises(ValueError, match="Expected mesh to be 'last' or 'all' or 'none', got 'first'"):
        LossSurface(mesh="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected one or two further states to span a plane, got 3"):
        loss_surface(first, batches(), through=[second, third, first])
    with pytest.raises(ValueError, match="leave directions out, or leave out through"):
        loss_surface(first, batches(), through=[second], directions="hessian")
    with pytest.raises(ValueError, match="A line goes through two states"):
        loss_surface(first, batches(), through=[second, third], dimensions=1)
    with pytest.raises(ValueError, match="module_a and module_b differ in"):
        loss_surface(first, batches(), through=[Classifier(batch_norm=True)])
    with pytest.raises(ValueError, match=r"Sequential has no training_step"):
        loss_surface(first.net, batches())
    with pytest.raises(ValueError, match="The two states are the same point"):
        loss_surface(first, batches(), through=[first])


def test_a_logger_without_meshes_shows_none() -> None:
    log_mesh(Rows(), "landscape/mesh", Mesh(np.zeros((3, 3)), np.zeros((1, 3)), np.zeros((3, 3))), 0)
