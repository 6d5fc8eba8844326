from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.sharpness.ascent import worst_case
from lmc_lightning.landscape.sharpness.logits import with_normalized_logits
from tests.problems import ConvNet, cross_entropy, images, normal


class Linear(nn.Module):
    def __init__(self, factor: float = 1.0, num_classes: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(3, num_classes).double()
        with torch.no_grad():
            for index, tensor in enumerate(self.parameters()):
                tensor.copy_(factor * normal(*tensor.shape, seed=50 + index))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


BATCH = (normal(20, 3, seed=1), torch.arange(20) % 4)


def normalized(logits: Tensor) -> Tensor:
    centred = logits - logits.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt()


def objective(loss_fn: Any = cross_entropy, factor: float = 1.0, **options: Any) -> Objective:
    return Objective(Linear(factor), [BATCH], with_normalized_logits(loss_fn), **options)


def test_the_loss_is_that_of_logits_over_their_standard_deviation() -> None:
    expected = F.cross_entropy(normalized(Linear()(BATCH[0])), BATCH[1])
    assert objective().baseline.loss == pytest.approx(expected.item(), rel=1e-12)


def test_the_gradient_goes_through_the_normalisation() -> None:
    module = Linear()
    F.cross_entropy(normalized(module(BATCH[0])), BATCH[1]).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in module.parameters()])  # type: ignore[union-attr]
    ours = objective()
    torch.testing.assert_close(ours.grad(ours.theta()), expected, rtol=1e-10, atol=1e-14)


def test_the_scale_of_the_logits_drops_out() -> None:
    losses = [objective(factor=f).baseline.loss for f in (1.0, 10.0)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    values = []
    for factor in (1.0, 10.0):
        ours = objective(factor=factor)
        values.append(worst_case(ours, ours.theta(), 0.01, radius="relative").value)
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    plain = [Objective(Linear(f), [BATCH], cross_entropy).baseline.loss for f in (1.0, 10.0)]
    assert abs(plain[0] - plain[1]) > 0.1


def test_examples_errors_and_chunks_are_seen_as_ever() -> None:
    whole, cut = objective(), objective(chunk_size=6)
    plain = Objective(Linear(), [BATCH], cross_entropy).baseline
    assert whole.baseline.error == plain.error
    assert len(cut.batches) == 4
    assert cut.baseline.loss == pytest.approx(whole.baseline.loss, rel=1e-12)
    assert whole.baseline.example_losses is not None
    assert float(whole.baseline.example_losses.mean()) == pytest.approx(whole.baseline.loss, rel=1e-12)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda m, b: nn.CrossEntropyLoss()(m(b[0]), b[1]),
        lambda m, b: F.cross_entropy(input=m(b[0]), target=b[1]),
        lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.0),
        lambda m, b: F.cross_entropy(m(b[0]), target=F.one_hot(b[1], 4).double()),
    ],
    ids=["module", "keywords", "option", "probabilities"],
)
def test_however_it_is_called(loss_fn: Any) -> None:
    assert objective(loss_fn).baseline.loss == pytest.approx(objective().baseline.loss, rel=1e-12)


def test_of_maps_the_classes_are_the_second_axis() -> None:
    logits, targets = normal(2, 4, 3, 3, seed=3), torch.arange(18).reshape(2, 3, 3) % 4
    found = with_normalized_logits(lambda m, b: F.cross_entropy(logits, targets))(nn.Identity(), None)
    assert found.item() == pytest.approx(F.cross_entropy(normalized(logits), targets).item(), rel=1e-12)


def test_logits_that_are_all_equal_stay() -> None:
    equal = torch.full((5, 4), 3.0)
    found = with_normalized_logits(lambda m, b: F.cross_entropy(equal, BATCH[1][:5]))(nn.Identity(), None)
    assert found.item() == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda m, b: F.nll_loss(m(b[0]).log_softmax(1), b[1]),
        lambda m, b: F.mse_loss(m(b[0]), F.one_hot(b[1], 4).double()),
        lambda m, b: F.cross_entropy(m(b[0]), b[1]) + m.layer.weight.square().sum(),
        lambda m, b: F.cross_entropy(m(b[0]), b[1]) + F.cross_entropy(m(b[0]), b[1]),
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum") / 20,
    ],
    ids=["nll", "mse", "decay", "two", "sum"],
)
def test_other_losses_are_refused_with_the_reason(loss_fn: Any) -> None:
    with pytest.raises(ValueError, match=r"logit_normalized=True needs a loss that is one mean by .*cross_entropy"):
        objective(loss_fn).evaluate(Objective(Linear(), [BATCH], cross_entropy).theta())


def test_a_batch_that_is_skipped_is_still_skipped() -> None:
    skipping = with_normalized_logits(lambda m, b: None)  # type: ignore[arg-type, return-value]
    assert skipping(ConvNet(), images()) is None
