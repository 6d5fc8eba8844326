from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning import HessianSpectrum, measure
from tests.callbacks.runs import Classifier, Rows, TensorBoardLogger, batches, documented, fit, with_errors
from tests.callbacks.test_hessian_spectrum import CHEAP, expanded

CLASSES = sorted({int(label) for _, labels in batches() for label in labels})
ASKED: dict[str, Any] = {**CHEAP, "attribution": True, "probe_dataloader": batches()}


class PiecewiseLinear(Classifier):
    """So that the trace is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*[nn.LeakyReLU() if isinstance(m, nn.Tanh) else m for m in self.net])


def by_name(callback: HessianSpectrum, step: int) -> dict[str, Any]:
    return {r.name.removeprefix("hessian/"): r for r in callback.results if r.step == step}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[HessianSpectrum, TensorBoardLogger]:
    callback, logger = HessianSpectrum(epochs=[1], **ASKED), TensorBoardLogger()
    fit(PiecewiseLinear(), callback, logger=logger, default_root_dir=tmp_path_factory.mktemp("run"))
    return callback, logger


def test_the_keys_of_the_table_are_logged(run: tuple[HessianSpectrum, TensorBoardLogger]) -> None:
    _, logger = run
    rows = {k: t for k, t in expanded(documented(HessianSpectrum), classes=CLASSES).items() if "attribution=True" in t}
    assert len(rows) == 2 * len(CLASSES) + 3
    assert set(with_errors(rows)) <= logger.by_step("hessian")[3]
    assert [(step, key) for step, key in logger.figures if "attribution" in key] == [(3, "hessian/attribution")]


@pytest.mark.parametrize("quantity", ["lambda_max", "trace"])
def test_the_shares_of_the_classes_sum_to_one_and_their_parts_to_the_number(
    run: tuple[HessianSpectrum, TensorBoardLogger], quantity: str
) -> None:
    found = by_name(run[0], 3)
    classes = [found[f"{quantity}_share/{c}"] for c in CLASSES]
    assert sum(r.value for r in classes) == pytest.approx(1, rel=1e-9)
    assert sum(r.evidence["part"] for r in classes) == pytest.approx(found[quantity].value, rel=1e-4)
    assert sum(r.evidence["share_of_examples"] for r in classes) == pytest.approx(1, rel=1e-9)


def test_the_examples_that_carry_most_are_named(run: tuple[HessianSpectrum, TensorBoardLogger]) -> None:
    record = by_name(run[0], 3)["lambda_max_top_percent"]
    shares = record.evidence["shares"]
    assert record.value == pytest.approx(shares[0])
    assert record.evidence["num_examples"] == 1
    assert shares == sorted(shares, reverse=True)
    assert len(set(record.evidence["examples"])) == len(shares) == 16


class Penalised(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1]) + 0.01 * self.net[0].weight.square().sum()


def test_where_single_examples_are_unknown_the_evidence_says_so() -> None:
    callback, logger = HessianSpectrum(epochs=[1], **ASKED), Rows()
    fit(Penalised(), callback, logger=logger)
    found = by_name(callback, 3)
    assert "losses of single examples are unknown" in found["lambda_max"].evidence["no_attribution"]
    assert not [name for name in found if "share" in name]


def test_other_operators_are_attributed_under_their_names() -> None:
    found = measure(Classifier(), batches(), [HessianSpectrum(operator="ggn", **ASKED)])
    assert sum(found[f"ggn/lambda_max_share/{c}"] for c in CLASSES) == pytest.approx(1, rel=1e-9)
