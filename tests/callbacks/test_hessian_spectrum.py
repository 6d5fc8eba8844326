"""The spectrum that is logged is that of a dense float64 Hessian, under the documented keys, at the scheduled steps."""

import copy
import math
import pickle
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lmc_lightning import HessianSpectrum, measure
from lmc_lightning.callbacks.bridge.probe_set import ProbeSet
from lmc_lightning.callbacks.bridge.step import StepBatch
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
    is_unlogged,
    with_errors,
)
from tests.problems import quadratic, with_spectrum

CHEAP: dict[str, Any] = {"num_eigenvalues": 2, "num_probes": 2, "num_steps": 4, "on_error": "raise"}


TENSORS = [name for name, _ in Classifier().named_parameters()]
"""Five, so that loggers show the share of each."""


def expanded(
    rows: dict[str, str],
    *,
    step: int = 3,
    num_eigenvalues: int = 2,
    num_negative: int = 1,
    blocks: Any = (),
    classes: Any = (),
) -> dict[str, str]:
    """The rows of a visit with their placeholders written out."""
    found = {}
    for key, text in rows.items():
        last = num_negative if "negative" in key else num_eigenvalues
        names = {"{2..k}": range(2, last + 1), "{tensor}": TENSORS, "{block}": blocks, "{class}": classes}
        if "attribution=True" in text and not classes:
            continue
        placeholder = next((p for p in names if p in key), "")
        if step or key != "hessian/overlap":  # which needs an earlier visit
            found |= {key.replace(placeholder, str(n)): text for n in names.get(placeholder, [""])}
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
    rows = documented(HessianSpectrum)
    expected = {s: with_errors(expanded(rows, step=s, num_eigenvalues=3, num_negative=2)) for s in steps}
    assert logger.by_step("hessian") == {step: set(keys) for step, keys in expected.items()}


@pytest.mark.parametrize("blocks", ["module", "tensor"])
def test_the_table_has_what_its_rows_say_and_the_blocks_that_are_asked_for(blocks: Any) -> None:
    options = {**CHEAP, "num_steps": 20, "probe_dataloader": batches(160)}
    logger, callback = TensorBoardLogger(), HessianSpectrum(**options, blocks=blocks, epochs=[0, 2])
    fit(Classifier(), callback, logger=logger)
    assert (6, "hessian/block_density") in logger.figures
    names = TENSORS if blocks == "tensor" else ["net.0", "net.4", "net.6"]
    rows = expanded(documented(HessianSpectrum), blocks=names)
    shown = {f"hessian/{of}/{name}" for of in ("lambda_max", "trace") for name in names}
    assert logger.by_step("hessian")[6] == set(with_errors(rows)) | shown
    records = [r for r in callback.results if r.step == 6]
    unlogged = {key for key, text in rows.items() if is_unlogged(text)} - shown
    assert {r.name for r in records if r.log == "none"} == unlogged
    values = {key for key, text in rows.items() if not is_picture(text) and not key.endswith("_stderr_data")}
    assert {r.name for r in records} == values


def test_the_pictures_of_the_table_are_shown_at_the_scheduled_steps_and_no_others() -> None:
    logger = TensorBoardLogger()
    fit(Classifier(), HessianSpectrum(epochs=[0, 2], **CHEAP), logger=logger)
    pictures = {key for key, text in documented(HessianSpectrum).items() if is_picture(text)} - {
        "hessian/block_density",
        "hessian/attribution",
    }
    assert {key for _, key in logger.histograms + logger.figures} == pictures
    assert [step for step, _ in logger.histograms] == [step for step, _ in logger.figures] == [0, 6]


def test_what_is_not_asked_for_is_not_logged() -> None:
    logger = TensorBoardLogger()
    fit(Classifier(), HessianSpectrum(num_eigenvalues=1, num_negative=0, num_probes=0, epochs=[2]), logger=logger)
    others = {"hessian/stability", "hessian/grad_in_topk", *(f"hessian/layer_mass/{name}" for name in TENSORS)}
    of_lambda = {f"hessian/lambda_max{suffix}" for suffix in ("", "_residual")}
    assert logger.by_step("hessian") == {6: of_lambda | others}
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
    others = {key for key in keys[3] if "layer_mass" not in key or "net.6" in key}
    others |= {"hessian/trace_stderr_data"}  # over examples, as the trace in the last layer alone is exact
    assert keys[6] == {re.sub(r"(_stderr(_data)?)?$", r"/head\1", key, count=1) for key in others}


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


class WithRMSprop(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.RMSprop(self.parameters())


def test_stability_is_not_reported_where_it_is_not_known_and_the_evidence_says_why() -> None:
    callback = HessianSpectrum(epochs=[2], **CHEAP)
    fit(WithRMSprop(), callback)
    found = latest(callback)
    assert "stability" not in found
    assert "SGD, Adam and AdamW, not for RMSprop" in found["lambda_max"].evidence["no_stability"]


class WithAdam(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_stability_under_adam_takes_products_of_its_own_that_are_counted_and_is_not_defined_at_the_start() -> None:
    callback = HessianSpectrum(num_eigenvalues=1, num_probes=0, epochs=[0, 2], probe_dataloader=batches())
    trainer = fit(module := WithAdam(), callback)
    assert {r.step for r in callback.results if r.name == "hessian/stability"} == {6}
    first, last = (next(r for r in callback.results if r.step == step) for step in (0, 6))
    assert "has not taken a step" in first.evidence["no_stability"]
    state = trainer.optimizers[0].state
    roots = [(s["exp_avg_sq"] / (1 - 0.999**6)).sqrt() + 1e-8 for s in (state[p] for p in module.parameters())]
    scale = (1 - 0.9**6) * torch.cat([root.flatten() for root in roots]).double()
    preconditioned = dense_hessian(module, batches()) / scale.sqrt().outer(scale.sqrt())
    expected = 0.01 * (1 - 0.9) * float(torch.linalg.eigvalsh(preconditioned)[-1]) / (2 * (1 + 0.9))
    assert latest(callback)["stability"].value == pytest.approx(expected, rel=1e-4)
    alone = measure(module, batches(), [sgd := HessianSpectrum(num_eigenvalues=1, num_probes=0)])
    assert alone["hessian/lambda_max"] == pytest.approx(latest(callback)["lambda_max"].value, rel=1e-4)
    assert last.evidence["num_matvecs"] > 15
    assert sgd.min_effort == 1.0


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
    assert re.search(r"at step 0 did not converge: hessian/lambda_max.*Raise max_products \(num", ours[0])
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
        ({"num_steps": 1}, r"num_steps ≥ 2"),
        ({"operator": "fisher"}, r"Expected operator to be 'hessian' or 'ggn' or 'empirical_fisher', got 'fisher'"),
        ({"operator": "ggn", "num_negative": 1}, r"operator='ggn' has no negative eigenvalues: expected num_negative"),
        ({"trace": "exact"}, r"Expected trace to be 'auto' or 'sampled', got 'exact'"),
        ({"trace_tolerance": 1.0}, r"Expected 0 < trace_tolerance < 1 or None, got 1.0"),
        ({"blocks": "layer"}, r"Expected blocks to be 'module' or 'tensor', got 'layer'"),
        ({"memory_budget": -1}, r"Expected memory_budget ≥ 0 \[bytes\] or None, got -1"),
        ({"block_size": 0}, r"Expected block_size ≥ 1 or None, got 0"),
        ({"chunk_size": 0}, r"Expected chunk_size ≥ 1 or None, got 0"),
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


# -- from visit to visit -----------------------------------------------------------------------------------------------


def values_at(callback: HessianSpectrum, step: int) -> dict[str, float | None]:
    return {r.name: r.value for r in callback.results if r.step == step}


def test_a_later_visit_starts_from_the_vectors_of_the_last_and_finds_the_same_eigenvalues() -> None:
    options = {**CHEAP, "tolerance": 1e-4, "probe_dataloader": batches()}
    warm, cold = HessianSpectrum(**options), HessianSpectrum(**options, warm_start=False, name="cold")
    fit(Classifier(), warm, cold)
    for step in (0, 3, 6):
        of_both = values_at(warm, step), {k.removesuffix("/cold"): v for k, v in values_at(cold, step).items()}
        assert (of_both[0] == of_both[1]) is (step == 0)
        for name in ("hessian/lambda_max", "hessian/eigenvalue_2", "hessian/lambda_min"):
            assert of_both[0][name] == pytest.approx(of_both[1][name], rel=1e-4)
        assert ("hessian/overlap" in of_both[0]) is ("hessian/overlap" in of_both[1]) is (step > 0)
    assert values_at(warm, 3)["hessian/overlap"] == pytest.approx(values_at(cold, 3)["hessian/overlap/cold"], rel=0.01)


def test_the_overlap_is_that_of_the_top_eigenvectors_of_two_visits() -> None:
    class Keeps(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.states: list[Tensor] = []

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.states.append(oracles.flat_parameters(self))

    module = Keeps()
    start = oracles.flat_parameters(module)
    probes = batches(double=True)
    callback = HessianSpectrum(
        num_eigenvalues=2, num_probes=0, tolerance=1e-8, steps=[0, 2], probe_dataloader=probes, on_error="raise"
    )
    fit(module, callback, precision="64-true")
    loss = oracles.mean_loss(module, probes, cross_entropy, [float(len(labels)) for _, labels in probes])
    old, new = (torch.linalg.eigh(oracles.dense_hessian(loss, theta))[1][:, -2:] for theta in (start, module.states[1]))
    expected = float((old.T @ new).square().sum()) / 2
    assert values_at(callback, 2)["hessian/overlap"] == pytest.approx(expected, rel=1e-6)


def test_a_run_knows_nothing_of_an_earlier_one_nor_a_copy_of_the_original() -> None:
    callback = HessianSpectrum(num_eigenvalues=2, num_probes=0, epochs=[0, 2], probe_dataloader=batches())
    fit(Classifier(), callback)
    first = values_at(callback, 0), values_at(callback, 6)
    for again in (copy.deepcopy(callback), callback):
        fit(module := Classifier(), again)
        assert (values_at(again, 0), values_at(again, 6)) == first
    single = HessianSpectrum(num_eigenvalues=2, num_probes=0)
    assert measure(module, batches(), [callback]) == measure(module, batches(), [single])
    assert pickle.loads(pickle.dumps(callback))._last_visit.vectors is None


def test_visits_that_waited_for_the_probe_set_start_from_one_another_in_order() -> None:
    waiting = HessianSpectrum(**CHEAP, num_examples=NUM_EXAMPLES, every_n_train_steps=1)
    fit(Classifier(), waiting)
    assert waiting.results[0].evidence["probe_source"] == "captured"
    assert [r.step for r in waiting.results if r.name == "hessian/overlap"] == [1, 2, 3, 4, 5, 6]


def test_another_number_of_parameters_starts_cold() -> None:
    class Thaws(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net[0].requires_grad_(True)

    callback = HessianSpectrum(**CHEAP, probe_dataloader=batches(), steps=[0, 1, 4, 5])
    fit(Thaws(), callback)
    assert [r.step for r in callback.results if r.name == "hessian/overlap"] == [1, 5]


def test_eigenvectors_are_kept_as_plain_arrays(tmp_path: Any) -> None:
    callback = HessianSpectrum(
        **{**CHEAP, "num_eigenvalues": 3, "tolerance": 1e-6}, keep_eigenvectors=True, probe_dataloader=batches()
    )
    module = Classifier()
    fit(module, callback, default_root_dir=tmp_path)
    files = sorted((tmp_path / "lmc" / "arrays").glob("hessian_eigenvectors_*"))
    assert [f.name for f in files] == [f"hessian_eigenvectors_{step:06d}.npz" for step in (0, 3, 6)]
    with np.load(files[-1], allow_pickle=False) as kept:
        vectors, values = torch.from_numpy(kept["eigenvectors"]).double(), torch.from_numpy(kept["eigenvalues"])
        sizes = dict(zip(kept["tensor_names"].tolist(), kept["tensor_sizes"].tolist(), strict=True))
        residuals = torch.from_numpy(kept["residuals"])
    assert sizes == {name: p.numel() for name, p in module.named_parameters()}
    defects = (vectors @ dense_hessian(module, batches()) - values[:, None] * vectors).norm(dim=1)
    torch.testing.assert_close(defects, residuals, rtol=0, atol=1e-5)


# -- other matrices, memory, trace -------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["ggn", "empirical_fisher"])
def test_other_matrices_log_under_their_own_names(operator: Any) -> None:
    logger = TensorBoardLogger()
    callback = HessianSpectrum(**CHEAP, operator=operator, epochs=[2], probe_dataloader=batches(160))
    fit(Classifier(), callback, HessianSpectrum(**CHEAP, epochs=[2], probe_dataloader=batches(160)), logger=logger)
    without = {"hessian/lambda_min", "hessian/stability", "hessian/negative_mass", "hessian/negative_mass_stderr"}
    expected = {key.replace("hessian", operator) for key in logger.by_step("hessian")[6] - without}
    assert logger.by_step(operator)[6] == expected
    assert all(r.evidence["self_check"]["verdict"] == "exact" for r in callback.results)
    assert {key.split("/")[0] for _, key in logger.figures} == {"hessian", operator}


def test_the_memory_budget_and_the_block_size_are_recorded_and_change_no_number() -> None:
    module = Classifier()
    probes = batches(512)
    ample, tight = (HessianSpectrum(num_probes=2, num_steps=4, memory_budget=b, tolerance=1e-5) for b in (None, 0))
    found = [measure(module, probes, [c]) for c in (ample, tight)]
    for name in ("lambda_max", "lambda_min", "trace", "effective_rank"):
        assert found[1][f"hessian/{name}"] == pytest.approx(found[0][f"hessian/{name}"], rel=1e-3)
    recorded = HessianSpectrum(**CHEAP, memory_budget=0, block_size=2, epochs=[2], probe_dataloader=probes)
    recorded.num_examples = None
    fit(module, recorded)
    evidence = latest(recorded)["lambda_max"].evidence
    assert (evidence["num_chunks"], evidence["num_cached"], evidence["block_size"]) == (4, 0, 2)
    assert (evidence["memory_budget"], evidence["max_basis"]) == (0, 10)


def test_the_chunk_size_can_be_set_and_is_recorded() -> None:
    callback = HessianSpectrum(**CHEAP, chunk_size=32, num_examples=None, epochs=[2], probe_dataloader=batches(512))
    fit(Classifier(), callback)
    evidence = latest(callback)["lambda_max"].evidence
    assert (evidence["num_chunks"], evidence["chunk_size"]) == (16, 32)


def examined(callback: HessianSpectrum, **options: Any) -> dict[str, Any]:
    """The quantities of one visit of a fresh module, by name."""
    probes = tuple(StepBatch(batch, index) for index, batch in enumerate(batches()))
    measurement = callback.examine(Classifier(), {"train": ProbeSet("train", "probe_dataloader", probes)}, **options)
    return {q.name.removeprefix("hessian/"): q for q in measurement.quantities}


def test_the_record_of_the_trace_says_how_it_was_taken() -> None:
    common: dict[str, Any] = {"num_probes": 4, "num_steps": 4}
    head = {**common, "parameters": ["net.6.*"]}
    asked = [head, {**head, "trace": "sampled"}, {**common, "trace_tolerance": 0.1}, common]
    traces = [examined(HessianSpectrum(**options))["trace"] for options in asked]
    assert [t.evidence["method"] for t in traces] == ["exact", "quadrature", "hutch++", "quadrature"]
    exact, by_probes = traces[:2]
    assert exact.value == pytest.approx(float(dense_hessian(Classifier(), batches())[-12:, -12:].trace()), rel=1e-4)
    assert (exact.stderr, exact.evidence["not_exact"]) == (0, "")
    assert exact.evidence["by_other_methods"]["quadrature"]["value"] == pytest.approx(by_probes.value, rel=1e-6)
    assert "not piecewise linear" in traces[3].evidence["not_exact"]
    assert traces[2].evidence["num_probes"] >= 16


def test_less_effort_means_fewer_probes_and_says_so() -> None:
    callback = HessianSpectrum(num_probes=8, num_steps=3)
    full, quarter = (examined(callback, effort=effort) for effort in (1.0, 0.25))
    assert [found["trace"].evidence["num_probes"] for found in (full, quarter)] == [8, 2]
    assert full["lambda_max"].value == quarter["lambda_max"].value
    assert (callback.min_effort, HessianSpectrum(num_probes=0).min_effort) == (0.25, 1.0)
