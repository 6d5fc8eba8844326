from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.losstap import LossTap, TappedLoss
from tests.problems import generator, normal

N, C = 7, 3


def labels(*shape: int) -> Tensor:
    return torch.randint(C, shape, generator=generator(1))


def ignoring(*shape: int) -> Tensor:
    targets = labels(*shape)
    targets.view(-1)[::3] = -100
    return targets


LOGITS = normal(N, C, seed=2)
PIXELS = normal(N, C, 2, 2, seed=3)
PREDICTIONS = normal(N, 2, seed=4)
WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
SOFT = normal(N, C, seed=5).softmax(1)
BITS = (normal(N, 2, seed=6) > 0).double()

LOSSES: dict[str, Callable[[], Tensor]] = {
    "cross entropy": lambda: F.cross_entropy(LOGITS, labels(N)),
    "module": lambda: nn.CrossEntropyLoss()(LOGITS, labels(N)),
    "keywords": lambda: F.cross_entropy(target=labels(N), input=LOGITS),
    "ignore_index": lambda: F.cross_entropy(LOGITS, ignoring(N)),
    "ignore_index of its own": lambda: F.cross_entropy(LOGITS, labels(N), ignore_index=1),
    "class weights": lambda: F.cross_entropy(LOGITS, ignoring(N), weight=WEIGHTS),
    "label smoothing": lambda: F.cross_entropy(LOGITS, labels(N), label_smoothing=0.1),
    "everything": lambda: F.cross_entropy(LOGITS, ignoring(N), weight=WEIGHTS, label_smoothing=0.1),
    "soft targets": lambda: F.cross_entropy(LOGITS, SOFT),
    "soft targets, class weights, smoothing": lambda: F.cross_entropy(
        LOGITS, SOFT, weight=WEIGHTS, label_smoothing=0.2
    ),
    "pixels": lambda: F.cross_entropy(PIXELS, ignoring(N, 2, 2), weight=WEIGHTS),
    "nll": lambda: F.nll_loss(LOGITS.log_softmax(1), ignoring(N), weight=WEIGHTS),
    "mse": lambda: F.mse_loss(PREDICTIONS, BITS),
    "bce": lambda: F.binary_cross_entropy(PREDICTIONS.sigmoid(), BITS),
    "bce with logits": lambda: F.binary_cross_entropy_with_logits(
        PREDICTIONS, BITS, pos_weight=torch.tensor([1.0, 3.0], dtype=torch.float64)
    ),
}


def tapped(loss: Callable[[], Tensor]) -> TappedLoss:
    with LossTap() as tap:
        value = loss()
    match = tap.match(value)
    assert match is not None
    return match


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_weighted_mean_of_the_losses_per_example_is_the_loss(loss: Callable[[], Tensor]) -> None:
    match = tapped(loss)
    assert match.losses.shape == match.weights.shape == (N,)
    assert float(match.weights @ match.losses / match.weights.sum()) == pytest.approx(loss().item(), rel=1e-14)


def test_losses_are_those_of_the_examples_alone() -> None:
    targets = labels(N)
    alone = [F.cross_entropy(LOGITS[i : i + 1], targets[i : i + 1], label_smoothing=0.1) for i in range(N)]
    match = tapped(lambda: F.cross_entropy(LOGITS, targets, label_smoothing=0.1))
    torch.testing.assert_close(match.losses, torch.stack(alone))


def test_ignored_examples_have_no_weight_no_loss_and_no_error() -> None:
    targets = ignoring(N)
    match = tapped(lambda: F.cross_entropy(LOGITS, targets))
    ignored = targets == -100
    assert match.weights.tolist() == (~ignored).double().tolist()
    assert match.losses[ignored].tolist() == [0.0] * int(ignored.sum())
    assert match.errors is not None
    assert match.errors[ignored].tolist() == [0.0] * int(ignored.sum())


def test_a_batch_without_any_target_has_no_weight() -> None:
    with LossTap() as tap:
        loss = F.cross_entropy(LOGITS, torch.full((N,), -100))
    match = tap.match(loss.reshape(()))
    assert loss.isnan()
    assert match is not None
    assert match.weights.tolist() == match.losses.tolist() == [0.0] * N


def test_errors_of_classes() -> None:
    targets = LOGITS.argmax(1)
    targets[0] = (targets[0] + 1) % C
    match = tapped(lambda: F.cross_entropy(LOGITS, targets))
    assert match.errors is not None
    assert match.errors.tolist() == [1.0] + [0.0] * (N - 1)


def test_errors_of_soft_targets_go_by_their_largest_entry() -> None:
    match = tapped(lambda: F.cross_entropy(SOFT.log(), SOFT))
    assert match.errors is not None
    assert match.errors.tolist() == [0.0] * N


def test_errors_of_pixels_are_shares_of_those_that_count() -> None:
    targets = PIXELS.argmax(1)
    targets[0, 0, 0] = -100
    targets[0, 0, 1] = (targets[0, 0, 1] + 1) % C
    match = tapped(lambda: F.cross_entropy(PIXELS, targets))
    assert match.errors is not None
    assert match.errors.tolist() == pytest.approx([1 / 3] + [0.0] * (N - 1))


@pytest.mark.parametrize("probabilities", [False, True])
def test_errors_of_bits(probabilities: bool) -> None:
    bits = (PREDICTIONS > 0).double()
    bits[0, 0] = 1 - bits[0, 0]
    loss = F.binary_cross_entropy if probabilities else F.binary_cross_entropy_with_logits
    outputs = PREDICTIONS.sigmoid() if probabilities else PREDICTIONS
    match = tapped(lambda: loss(outputs, bits))
    assert match.errors is not None
    assert match.errors.tolist() == [0.5] + [0.0] * (N - 1)


def test_regression_has_no_errors_and_no_confidence() -> None:
    match = tapped(LOSSES["mse"])
    assert match.errors is None
    assert match.confidences is None
    assert match.probabilities is None


@pytest.mark.parametrize("probabilities", [False, True])
def test_probabilities_of_bits(probabilities: bool) -> None:
    loss = F.binary_cross_entropy if probabilities else F.binary_cross_entropy_with_logits
    match = tapped(lambda: loss(PREDICTIONS.sigmoid() if probabilities else PREDICTIONS, BITS))
    assert match.probabilities is not None
    torch.testing.assert_close(match.probabilities, PREDICTIONS.sigmoid())
    assert match.confidences is None


@pytest.mark.parametrize("kind", ["cross_entropy", "nll_loss"])
def test_confidence_is_the_largest_probability(kind: str) -> None:
    outputs = LOGITS if kind == "cross_entropy" else LOGITS.log_softmax(1)
    match = tapped(lambda: getattr(F, kind)(outputs, labels(N)))
    assert match.confidences is not None
    torch.testing.assert_close(match.confidences, LOGITS.softmax(1).amax(1))


def test_the_call_that_is_the_loss_is_told_from_the_others() -> None:
    with LossTap() as tap:
        F.mse_loss(PREDICTIONS, BITS)
        loss = F.cross_entropy(LOGITS, labels(N))
        F.cross_entropy(LOGITS, SOFT)
    match = tap.match(loss.reshape(()))
    assert match is not None
    assert match.kind == "cross_entropy"
    assert match.outputs is LOGITS


def refused(loss: Callable[[], Tensor]) -> None:
    with LossTap() as tap:
        value = loss()
    assert tap.match(value) is None


def test_two_equal_calls_are_ambiguous() -> None:
    def twice() -> Tensor:
        F.cross_entropy(LOGITS, labels(N))
        return F.cross_entropy(LOGITS, labels(N))

    refused(twice)


@pytest.mark.parametrize(
    "loss",
    [
        lambda: F.cross_entropy(LOGITS, labels(N)) + 0.1 * LOGITS.square().sum(),
        lambda: 2 * F.cross_entropy(LOGITS, labels(N)),
        lambda: F.cross_entropy(LOGITS, labels(N), reduction="sum"),
        lambda: F.cross_entropy(LOGITS, labels(N), reduction="none").mean(),
        lambda: F.cross_entropy(LOGITS[0], labels(N)[0]),
        lambda: F.binary_cross_entropy_with_logits(PREDICTIONS, BITS, weight=torch.rand(2)),
        lambda: F.l1_loss(PREDICTIONS, BITS),
    ],
    ids=["regularised", "scaled", "sum", "none", "unbatched", "element weights", "unwatched"],
)
def test_what_is_not_one_mean_over_examples_is_not_matched(loss: Callable[[], Tensor]) -> None:
    refused(loss)


def test_the_tap_changes_no_gradient() -> None:
    leaf = LOGITS.clone().requires_grad_()
    with LossTap() as tap:
        loss = F.cross_entropy(leaf, labels(N))
        tap.match(loss)
    (gradient,) = torch.autograd.grad(loss, leaf)
    (expected,) = torch.autograd.grad(F.cross_entropy(leaf, labels(N)), leaf)
    assert torch.equal(gradient, expected)


def test_a_call_whose_targets_were_overwritten_afterwards_is_not_known() -> None:
    logits, targets = normal(5, 3, seed=1), torch.arange(5) % 3
    with LossTap() as tap:
        loss = F.cross_entropy(logits, targets)
        assert tap.match(loss) is not None
        targets.copy_(logits.argmax(1))
    assert tap.match(loss) is None
