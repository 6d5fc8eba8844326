"""Volumes and learning coefficients as they are logged during a run, and of modules without one."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from lmc_lightning import (
    Langevin,
    LocalLearningCoefficient,
    MinimaVolume,
    VolumeSettings,
    local_learning_coefficient,
    measure,
    minima_volumes,
    volume_table,
)
from tests.callbacks.runs import Classifier, TensorBoardLogger, batches, cross_entropy, documented, fit, is_picture

CHEAP: dict[str, Any] = {"num_directions": 6, "threshold": "rise", "on_error": "raise"}
SCALARS = {key for key, text in documented(MinimaVolume).items() if not is_picture(text)}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[TensorBoardLogger, MinimaVolume, Classifier]:
    logger, ours = TensorBoardLogger(), MinimaVolume((0.2, 0.05), coordinates="filter", epochs=[0, 2], **CHEAP)
    module = Classifier()
    fit(module, ours, logger=logger, default_root_dir=tmp_path_factory.mktemp("volumes"))
    return logger, ours, module


def test_volumes_are_logged_under_the_keys_of_the_table(logged: Any) -> None:
    logger, ours, _ = logged
    keys = logger.by_step("volume")
    assert sorted(keys) == [0, 6]
    names = {key.removesuffix("_stderr") for key in keys[6]}
    assert names == {f"{key}/tau_{tau}" for key in SCALARS for tau in ("0.2", "0.05")}
    assert {key for _, key in logger.figures} == {"volume/radii"}
    evidence = ours.results[-1].evidence
    assert evidence["num_losses"] <= 1 + 8 * 6 + 6 * 8 * 2
    assert {"quantiles", "level", "num_reentrant", "threshold", "coordinates"} <= set(evidence)
    assert (evidence["coordinates"], evidence["num_directions"]) == ("filter", 6)


def test_offline_finds_the_same_volumes(logged: Any) -> None:
    _, ours, module = logged
    found = measure(module, batches(), [MinimaVolume((0.2,), coordinates="filter", **CHEAP)])
    (record,) = [r for r in ours.results if (r.name, r.step) == ("volume/mean_log_r/tau_0.2", 6)]
    assert found["volume/mean_log_r/tau_0.2"] == pytest.approx(record.value, rel=1e-2)


def test_a_state_above_an_absolute_threshold_is_cut_off_and_says_so() -> None:
    found = measure(Classifier(), batches(), [MinimaVolume((1e-6,), num_directions=3)])
    assert found == {"volume/cutoff/tau_1e-06": 1.0}


def test_fewer_directions_are_the_first_of_them(logged: Any) -> None:
    _, _, module = logged
    settings = VolumeSettings((0.2,), threshold="rise", num_directions=6, num_checked=0)
    few, all_ = (
        minima_volumes({"net": module}, {"data": batches()}, settings.with_directions(n))["net", "data"][0.2]
        for n in (3, 6)
    )
    torch.testing.assert_close(few.radii, all_.radii[:3], rtol=2e-3, atol=0)


def test_several_networks_are_measured_along_the_same_directions_in_several_landscapes() -> None:
    networks = {"a": Classifier(), "b": Classifier()}
    with torch.no_grad():
        networks["b"].net[4].weight.mul_(1.5)
    data = {"all": batches(), "few": batches(8)}
    settings = VolumeSettings((0.1,), threshold="rise", num_directions=4)
    volumes = minima_volumes(networks, data, settings)
    assert list(volumes) == [("a", "all"), ("b", "all"), ("a", "few"), ("b", "few")]
    assert len(volume_table(volumes)) == 4
    with pytest.raises(ValueError, match="equal numbers of parameters"):
        minima_volumes({"a": Classifier(), "b": Classifier(batch_norm=True)}, data, settings)


def test_a_learning_coefficient_is_logged_with_its_diagnostics() -> None:
    sampling = Langevin(num_chains=2, num_burn_in=10, num_draws=30, gamma=1000.0, seed=3)
    logger, ours = TensorBoardLogger(), LocalLearningCoefficient(sampling, epochs=[2], on_error="raise")
    module = Classifier()
    with pytest.warns(UserWarning, match="did not converge"):  # the end of two epochs is no minimum
        fit(module, ours, logger=logger)
    rows = documented(LocalLearningCoefficient)
    assert logger.by_step("llc")[6] == {k for k, t in rows.items() if not is_picture(t)} | {"llc/llc_stderr"}
    assert {key for _, key in logger.figures} == {"llc/chains"}
    (record,) = [r for r in ours.results if r.name == "llc/llc"]
    assert record.evidence["num_gradients"] == 80
    assert len(record.evidence["per_chain"]) == 2
    found = local_learning_coefficient(module, batches(), sampling)
    assert found.n_beta == pytest.approx(24 / math.log(24))
    assert found.value == pytest.approx(record.value, rel=1e-3)


def test_plain_modules_need_their_loss() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(ValueError, match="has no training_step"):
        local_learning_coefficient(module, batches())
    with pytest.raises(ValueError, match="has no training_step"):
        minima_volumes({"net": module}, {"data": batches()})
    sampling = Langevin(num_chains=2, num_burn_in=2, num_draws=8)
    found = local_learning_coefficient(module, batches(), sampling, loss_fn=cross_entropy, batch_size=8)
    assert found.traces.shape == (2, 10)
