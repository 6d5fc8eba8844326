"""The spectrum that is logged is that of a dense float64 Hessian, under the documented keys, at the scheduled steps."""

import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lmc_lightning import HessianSpectrum, measure
from tests import oracles
from tests.callbacks.runs import (
    BATCH_SIZE,
    NUM_EXAMPLES,
    Classifier,
    Rows,
    TensorBoardLogger,
    batches,
    cross_entropy,
    documented,
    fit,
    is_picture,
    with_errors,
)
from tests.problems import quadratic, with_spectrum

CHEAP: dict[str, Any] = {"num_eigenvalues": 2, "num_probes": 2, "num_steps": 4, "on_error": "raise"}


def expanded(rows: dict[str, str], num_eigenvalues: int, num_negative: int) -> dict[str, str]:
    """The rows with ``{2..k}`` written out."""
    found = {}
    for key, text in rows.items():
        last = num_negative if "negative" in key else num_eigenvalues
        numbers = range(2, last + 1) if "{2..k}" in key else [0]
        found |= {key.replace("{2..k}", str(number)): text for number in numbers}
    return found


def dense_hessian(module: Any, probes: list[Any]) -> Tensor:
    loss = oracles.mean_loss(module, probes, cross_entropy, [float(len(labels)) for _, labels in probes])
    return oracles.dense_hessian(loss, oracles.flat_parameters(module))


def latest(callback: HessianSpectrum) -> dict[str, Any]:
    return {r.name.removeprefix("hessian/"): r for r in callback.results}


# -- keys and steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "steps"), [({}, [0, 3, 6]), ({"epochs": [0, 2]}, [0, 6]), ({"every_n_train_steps": 4}, [0, 4])]
)
def test_the_keys_of_the_table_are_logged_at_the_scheduled_steps_and_no_others(
    schedule: dict[str, Any], steps: list[int]
) -> None:
    logger = Rows()
    asked = CHEAP | {"num_eigenvalues": 3, "num_negative": 2, "probe_dataloader": batches(160)}  # two chunks
    fit(Classifier(), HessianSpectrum(**asked, **schedule), logger=logger)
    rows = expanded(documented(HessianSpectrum), num_eigenvalues=3, num_negative=2)
    assert logger.by_step("hessian") == {step: set(with_errors(rows)) for step in steps}


def test_the_pictures_of_the_table_are_shown_at_the_scheduled_steps_and_no_others() -> None:
    logger = TensorBoardLogger()
    fit(Classifier(), HessianSpectrum(epochs=[0, 2], **CHEAP), logger=logger)
    pictures = {key for key, text in documented(HessianSpectrum).items() if is_picture(text)}
    assert {key for _, key in logger.histograms + logger.figures} == pictures
    assert [step for step, _ in logger.histograms] == [step for step, _ in logger.figures] == [0, 6]


def test_what_is_not_asked_for_is_not_logged() -> None:
    logger = TensorBoardLogger()
    fit(Classifier(), HessianSpectrum(num_eigenvalues=1, num_negative=0, num_probes=0, epochs=[2]), logger=logger)
    stability = {"hessian/stability"}
    of_lambda = {f"hessian/lambda_max{suffix}" for suffix in ("", "_residual")}
    assert logger.by_step("hessian") == {6: of_lambda | stability}
    assert not logger.histograms + logger.figures


def test_without_density_there_are_numbers_and_no_pictures() -> None:
    logger = TensorBoardLogger()
    fit(Classifier(), HessianSpectrum(density=False, epochs=[2], **CHEAP), logger=logger)
    assert "hessian/trace" in logger.by_step("hessian")[6]
    assert not logger.histograms + logger.figures


def test_a_second_instance_logs_under_its_name() -> None:
    logger = Rows()
    fit(
        Classifier(),
        HessianSpectrum(epochs=[1], **CHEAP),
        HessianSpectrum(epochs=[2], name="head", parameters=["net.6.*"], **CHEAP),
        logger=logger,
    )
    keys = logger.by_step("hessian")
    assert keys[6] == {re.sub(r"(_stderr)?$", r"/head\1", key, count=1) for key in keys[3]}


# -- the numbers -------------------------------------------------------------------------------------------------------


def test_spectrum_and_trace_are_those_of_the_dense_hessian_in_float64() -> None:
    module = Classifier()
    probes = batches(double=True)
    callback = HessianSpectrum(
        num_eigenvalues=3, num_probes=32, num_steps=6, tolerance=1e-8, epochs=[2], probe_dataloader=probes
    )
    fit(module, callback, precision="64-true")
    hessian = dense_hessian(module, probes)
    exact, found = torch.linalg.eigvalsh(hessian).flip(0), latest(callback)
    assert found["lambda_max"].value == pytest.approx(float(exact[0]), rel=1e-10)
    assert found["eigenvalue_3"].value == pytest.approx(float(exact[2]), rel=1e-10)
    assert found["lambda_min"].value == pytest.approx(float(exact[-1]), rel=1e-10)
    assert found["trace"].stderr < 0.1 * float(exact.sum())
    assert abs(found["trace"].value - float(exact.sum())) < 3 * found["trace"].stderr
    assert all(found[name].evidence["residual"] < 1e-6 for name in ("lambda_max", "eigenvalue_2"))


def test_the_trace_is_exact_where_every_eigenpair_is_known() -> None:
    module = Classifier()
    num_params = sum(p.numel() for p in module.parameters())
    asked = {"num_eigenvalues": num_params - 1, "num_negative": 1, "max_products": 4 * num_params, "tolerance": 1e-6}
    callback = HessianSpectrum(num_probes=2, num_steps=2, **asked)
    found = measure(module.double(), batches(double=True), [callback])
    hessian = dense_hessian(module, batches(double=True))
    assert found["hessian/trace"] == pytest.approx(float(hessian.trace()), rel=1e-8)


def test_float32_agrees_with_the_dense_float64_hessian() -> None:
    module = Classifier()
    callback = HessianSpectrum(num_probes=0, epochs=[1, 2], probe_dataloader=batches())
    fit(module, callback)
    exact = torch.linalg.eigvalsh(dense_hessian(module, batches()))
    assert latest(callback)["lambda_max"].value == pytest.approx(float(exact[-1]), rel=1e-5)
    assert latest(callback)["lambda_min"].value == pytest.approx(float(exact[0]), rel=1e-3)


def test_batch_norm_and_dropout_are_those_of_evaluation() -> None:
    module = Classifier(batch_norm=True)
    callback = HessianSpectrum(num_probes=0, epochs=[2], probe_dataloader=batches())
    fit(module, callback)
    exact = torch.linalg.eigvalsh(dense_hessian(module, batches()))
    assert latest(callback)["lambda_max"].value == pytest.approx(float(exact[-1]), rel=1e-5)


def test_chosen_parameters_give_the_block_of_their_hessian() -> None:
    module = Classifier()
    found = measure(module, batches(), [HessianSpectrum(num_probes=0, parameters=["net.6.*"])])
    block = dense_hessian(module, batches())[-12:, -12:]
    assert found["hessian/lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-5)


def test_the_errors_over_data_are_those_of_the_chunks() -> None:
    module = Classifier().double()
    probes = batches(256, double=True)
    found = measure(module, probes, [HessianSpectrum(num_examples=None, num_probes=0, tolerance=1e-9)])
    hessian = dense_hessian(module, probes)
    vector = torch.linalg.eigh(hessian)[1][:, -1]
    halves = [dense_hessian(module, probes[i : i + 16]) for i in (0, 16)]  # the chunks of a CPU have 128 examples
    forms = torch.stack([vector @ half @ vector for half in halves])
    expected = math.sqrt(float((0.25 * (forms - forms.mean()).square()).sum()) * 2 / 1)
    assert found["hessian/lambda_max_stderr_data"] == pytest.approx(expected, rel=1e-4)


def test_stability_is_lambda_in_units_of_the_threshold_of_the_optimizer() -> None:
    callback = HessianSpectrum(epochs=[2], **CHEAP)
    fit(Classifier(), callback)
    found = latest(callback)
    assert found["stability"].value == pytest.approx(0.2 * found["lambda_max"].value / (2 * (1 + 0.9)), rel=1e-12)


class WithAdam(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def test_stability_is_not_reported_where_it_is_not_known_and_the_evidence_says_why() -> None:
    callback = HessianSpectrum(epochs=[2], **CHEAP)
    fit(WithAdam(), callback)
    found = latest(callback)
    assert "stability" not in found
    assert "SGD, not for Adam" in found["lambda_max"].evidence["no_stability"]


def test_a_spectrum_of_few_dimensions_gives_the_pairs_that_there_are() -> None:
    problem = quadratic(with_spectrum([3.0, 1.0, -0.5]), slope=torch.ones(3, dtype=torch.float64))
    callback = HessianSpectrum(num_eigenvalues=5, num_negative=1, num_probes=8, num_steps=3)
    found = measure(problem.module, problem.batches, [callback], loss_fn=problem.loss_fn)
    assert found["hessian/lambda_max"] == pytest.approx(3.0, rel=1e-10)
    assert found["hessian/trace"] == pytest.approx(3.5, rel=1e-8)
    names = ("lambda_max", "eigenvalue_2", "eigenvalue_3", "lambda_min")
    assert [found[f"hessian/{name}"] for name in names] == pytest.approx([3.0, 1.0, -0.5, -0.5], rel=1e-8)
    assert "hessian/eigenvalue_4" not in found


# -- evidence and trouble ----------------------------------------------------------------------------------------------


def test_every_record_carries_its_evidence() -> None:
    callback = HessianSpectrum(epochs=[2], num_examples=16, probe_dataloader=batches(), **CHEAP)
    fit(Classifier(), callback)
    for record in callback.results:
        evidence = record.evidence
        assert (evidence["num_examples"], evidence["probe_source"]) == (16, "probe_dataloader")
        assert re.fullmatch(r"[0-9a-f]{64}", evidence["probe_digest"])
        assert (evidence["mode"], evidence["weighting"], evidence["eval_split"]) == ("eval", "examples", "train")
        assert evidence["num_matvecs"] > 8
        assert evidence["seconds"] > 0
        assert evidence["self_check"]["verdict"] == "exact"
        assert isinstance(evidence["converged"], bool)
        assert evidence["gradient_norm"] > 0
        assert evidence["probe_loss"] > 0


def test_what_has_not_converged_is_flagged_and_warned_of_once_with_advice() -> None:
    callback = HessianSpectrum(num_eigenvalues=3, max_products=4, num_probes=0, on_error="raise")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Classifier(), callback)
    ours = [str(w.message) for w in caught if "converge" in str(w.message)]
    assert len(ours) == 1
    assert re.search(r"at step 0 did not converge: hessian/lambda_max.*Raise max_products, or tolerance", ours[0])
    assert {r.status for r in callback.results if r.name == "hessian/eigenvalue_3"} == {"not_converged"}
    assert all(r.evidence["converged"] is False for r in callback.results)


class Diverges(Classifier):
    """Its weights are NaN from the second step on."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.net[-1].weight.fill_(math.nan)


def test_a_network_of_nan_is_a_recorded_failure_and_training_goes_on() -> None:
    callback, logger = HessianSpectrum(**CHEAP | {"on_error": "record"}, probe_dataloader=batches()), Rows()
    with pytest.warns(UserWarning, match="at step 3 failed and training goes on: FloatingPointError"):
        trainer = fit(Diverges(), callback, logger=logger)
    assert trainer.global_step == 6
    assert [(r.step, r.status) for r in callback.failures] == [(3, "failed"), (6, "failed")]
    assert "not finite" in callback.failures[0].evidence["reason"]
    assert set(logger.by_step("hessian")) == {0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_eigenvalues": 0}, r"Expected num_eigenvalues ≥ 1.*got 0, 1, 8 and 24"),
        ({"num_negative": -1}, r"num_negative ≥ 0.*got 5, -1, 8 and 24"),
        ({"num_steps": 0}, r"num_steps ≥ 1"),
        ({"num_probes": -2}, r"num_probes ≥ 0"),
        ({"tolerance": 0.0}, r"Expected 0 < tolerance < 1.*got 0.0"),
        ({"tolerance": 1.0}, r"Expected 0 < tolerance < 1"),
        ({"max_products": 0}, r"max_products ≥ 1, got 0.001 and 0"),
        ({"epochs": [1], "steps": [1]}, r"Expected one schedule, got epochs and steps"),
        ({"num_examples": 0}, r"Expected num_examples to be at least 1 or None"),
        ({"mode": "test"}, r"Expected mode to be 'eval' or 'train', got 'test'"),
        ({"on_error": "ignore"}, r"Expected on_error to be 'record' or 'raise', got 'ignore'"),
    ],
)
def test_misuse_raises_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HessianSpectrum(**arguments)


def test_more_products_change_nothing_in_numbers_that_have_converged() -> None:
    module = Classifier().double()
    found = [
        measure(module, batches(double=True), [HessianSpectrum(num_probes=0, max_products=n, tolerance=1e-8)])
        for n in (64, 640)
    ]
    assert found[0] == found[1]


def test_the_probe_set_is_capped_at_the_examples_asked_for() -> None:
    one, many = (HessianSpectrum(num_examples=n, num_probes=0) for n in (BATCH_SIZE, NUM_EXAMPLES))
    first = measure(Classifier(), batches()[:1], [many])
    assert measure(Classifier(), batches(), [one]) == first
