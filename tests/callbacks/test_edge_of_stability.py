"""Stability is logged under the documented keys at the scheduled steps, and is that of the dense Hessian."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmc_lightning import EdgeOfStability, HessianSpectrum, measure
from tests import oracles
from tests.callbacks.runs import (
    BATCH_SIZE,
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

OF_UPDATE = {f"stability/update_{name}{suffix}" for name in ("prediction", "realised") for suffix in ("", "_stderr")}


def edge(**options: Any) -> EdgeOfStability:
    return EdgeOfStability(**{"on_error": "raise", "tolerance": 1e-6, **options})


def latest(callback: EdgeOfStability) -> dict[str, Any]:
    last = max(r.step for r in callback.results)
    return {r.name.removeprefix("stability/"): r for r in callback.results if r.step == last}


class Recorded(Classifier):
    """Keeps the parameters and their gradients of every step."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> None:
        super().__init__(batch_norm=options.pop("batch_norm", False))
        self.kind, self.options = optimizer, {"lr": 0.2, **options}
        self.thetas: list[Tensor] = []

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters(), **self.options)

    def on_train_start(self) -> None:
        self.thetas = [oracles.flat_parameters(self)]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.thetas.append(oracles.flat_parameters(self))


def by_own_statistics(module: nn.Module, batch: Any) -> Tensor:
    for submodule in module.train().modules():
        if isinstance(submodule, nn.BatchNorm2d):
            submodule.track_running_stats = False  # its buffers cannot change inside torch.func
    return cross_entropy(module, batch)


def dense(module: Classifier, parts: list[Any], theta: Tensor, loss_fn: Any = cross_entropy) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the mean over the given batches at θ, in float64."""
    loss = oracles.mean_loss(module, parts, loss_fn, [float(len(p[0])) for p in parts])
    return oracles.gradient(loss, theta), oracles.dense_hessian(loss, theta).detach()


# -- when, and under which names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "steps"), [({}, [0, 3, 6]), ({"epochs": [2]}, [6]), ({"every_n_train_steps": 4}, [0, 4])]
)
def test_the_keys_of_the_table_are_logged_at_the_scheduled_steps_and_no_others(
    schedule: dict[str, Any], steps: list[int]
) -> None:
    logger = Rows()
    fit(Classifier(), edge(probe_dataloader=batches(160), **schedule), logger=logger)  # two chunks
    keys = set(with_errors(documented(EdgeOfStability)))
    assert logger.by_step("stability") == {step: keys - (set() if step else OF_UPDATE) for step in steps}


def test_the_chart_is_shown_once_at_the_end() -> None:
    logger = TensorBoardLogger()
    fit(Classifier(), edge(), logger=logger)
    pictures = {key for key, text in documented(EdgeOfStability).items() if is_picture(text)}
    assert logger.figures == [(6, key) for key in pictures]
    assert not logger.histograms


def test_a_second_instance_logs_and_draws_under_its_name() -> None:
    logger = TensorBoardLogger()
    fit(Classifier(), edge(epochs=[1]), edge(epochs=[2], name="head", parameters=["net.6.*"]), logger=logger)
    keys = logger.by_step("stability")
    assert {key.replace("_stderr", "") + "/head" for key in keys[3]} == {k.replace("_stderr", "") for k in keys[6]}
    assert logger.figures == [(6, "stability/chart"), (6, "stability/chart/head")]


# -- the numbers -------------------------------------------------------------------------------------------------------


def test_all_numbers_are_those_of_dense_gradients_and_hessians() -> None:
    module, probes = Recorded(momentum=0.9, weight_decay=0.01), batches()
    callback = edge(epochs=[2], probe_dataloader=probes)
    fit(module, callback)
    found, theta = latest(callback), module.thetas[-1]
    _, hessian = dense(module, probes, theta)
    scale = 0.2 / (2 * 1.9)
    assert found["full_batch"].value == pytest.approx(
        scale * float(torch.linalg.eigvalsh(hessian)[-1] + 0.01), rel=1e-5
    )
    parts = [dense(module, [part], theta) for part in probes]
    quotients = torch.stack([g @ h @ g / (g @ g) for g, h in parts])
    sharpness = found["batch_sharpness"]
    assert sharpness.value == pytest.approx(float(quotients.mean()), rel=1e-5)
    assert sharpness.stderr == pytest.approx(float(quotients.std() / 3**0.5), rel=1e-4)
    assert found["mini_batch"].value == pytest.approx(scale * (sharpness.value + 0.01), rel=1e-8)
    assert found["mini_batch"].stderr == pytest.approx(scale * sharpness.stderr, rel=1e-8)
    assert found["mini_batch"].evidence["small_batch_limit"] == pytest.approx(0.1 / 1.9)
    gradients = torch.stack([g for g, _ in parts])
    mean = gradients.mean(0)
    noise = BATCH_SIZE * float((gradients - mean).square().sum()) / 2
    assert found["gradient_noise_scale"].value == pytest.approx(noise / float(mean @ mean - noise / 24), rel=1e-4)


def test_the_update_is_that_from_the_parameters_before_the_last_step_to_those_after() -> None:
    module, probes = Recorded(momentum=0.9), batches()
    callback = edge(every_n_train_steps=2, probe_dataloader=probes)
    fit(module, callback)
    for step in (2, 4, 6):
        found = {r.name.removeprefix("stability/"): r for r in callback.results if r.step == step}
        before, after = module.thetas[step - 1], module.thetas[step]
        gradient, hessian = dense(module, probes, before)
        update = before - after
        predicted = float(-gradient @ update + 0.5 * update @ hessian @ update)
        assert found["update_prediction"].value == pytest.approx(predicted, rel=1e-4)
        loss = oracles.mean_loss(module, probes, cross_entropy, [8.0] * 3)
        assert found["update_realised"].value == pytest.approx(float(loss(after) - loss(before)), rel=1e-3)
        assert found["update_prediction"].evidence["update_norm"] == pytest.approx(float(update.norm()), rel=1e-5)


def test_accumulated_gradients_make_one_step_and_one_batch() -> None:
    module, probes = Recorded(), batches()
    callback = edge(every_n_train_steps=1, probe_dataloader=probes)
    fit(module, callback, accumulate_grad_batches=3)
    found = latest(callback)
    assert found["batch_sharpness"].step == 2
    assert (found["full_batch"].evidence["batch_size"], found["full_batch"].evidence["num_batches"]) == (24, 1)
    gradient, hessian = dense(module, probes, module.thetas[-1])
    quotient = gradient @ hessian @ gradient / (gradient @ gradient)
    assert found["batch_sharpness"].value == pytest.approx(float(quotient), rel=1e-5)
    assert found["batch_sharpness"].stderr is None
    update = module.thetas[3] - module.thetas[6]  # the optimizer steps after every third batch
    assert found["update_prediction"].evidence["update_norm"] == pytest.approx(float(update.norm()), rel=1e-5)


def test_adam_is_taken_at_its_own_second_moments() -> None:
    module, probes = Recorded(torch.optim.Adam, lr=0.01, betas=(0.9, 0.99)), batches()
    callback, spectrum = (
        edge(epochs=[2], probe_dataloader=probes),
        HessianSpectrum(epochs=[2], num_probes=0, probe_dataloader=probes, on_error="raise"),
    )
    trainer = fit(module, callback, spectrum)
    _, hessian = dense(module, probes, module.thetas[-1])
    states = [trainer.optimizers[0].state[p] for p in module.parameters()]
    moments = torch.cat([s["exp_avg_sq"].flatten() for s in states]).double()
    divisor = (1 - 0.9**6) * ((moments / (1 - 0.99**6)).sqrt() + 1e-8)
    root = (0.01 * 0.1 / (2 * 1.9) / divisor).sqrt()
    exact = float(torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1])
    found = latest(callback)
    assert found["full_batch"].value == pytest.approx(exact, rel=1e-4)
    assert found["full_batch"].evidence["residual"] is not None
    beside = {r.name: r for r in spectrum.results}
    assert beside["hessian/stability"].value == pytest.approx(exact, rel=1e-4)
    assert "mini_batch" not in found
    assert list(found["full_batch"].evidence["not_reported"]) == ["mini_batch"]


def test_a_visit_that_waits_for_its_probe_set_keeps_the_state_of_the_optimizer_and_the_last_step() -> None:
    options = {"optimizer": torch.optim.Adam, "lr": 0.01}
    waiting, ready = Recorded(**options), Recorded(**options)
    captured = edge(steps=[1], num_examples=24)  # the third batch completes the probe set
    fit(waiting, captured)
    given = edge(steps=[1], probe_dataloader=captured_batches(waiting))
    fit(ready, given)
    assert [r.name for r in captured.results] == [r.name for r in given.results]
    for early, late in zip(given.results, captured.results, strict=True):
        assert late.value == pytest.approx(early.value, rel=1e-5)
    assert "stability/update_prediction" in {r.name for r in captured.results}


def captured_batches(module: Classifier) -> list[Any]:
    """The batches of the first epoch, as a run without callbacks sees them."""

    class Looks(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.current_epoch == 0:
                self.seen.append([t.clone() for t in batch])

    looks = Looks()
    fit(looks)
    return looks.seen


def test_batch_norm_is_taken_by_the_statistics_of_each_batch_and_the_evidence_says_so() -> None:
    module, probes = Recorded(batch_norm=True), batches()
    callback = edge(epochs=[2], probe_dataloader=probes)
    fit(module, callback)
    found, theta = latest(callback), module.thetas[-1]
    parts = [dense(module, [part], theta, by_own_statistics) for part in probes]
    quotients = torch.stack([g @ h @ g / (g @ g) for g, h in parts])
    assert found["batch_sharpness"].value == pytest.approx(float(quotients.mean()), rel=1e-4)
    top = torch.linalg.eigvalsh(torch.stack([h for _, h in parts]).mean(0))[-1]
    assert found["full_batch"].value == pytest.approx(0.1 * float(top), rel=1e-4)
    assert (found["full_batch"].evidence["mode"], found["full_batch"].evidence["batch_stats"]) == ("train", "batch")


def test_batches_have_the_size_of_training_whatever_the_probe_loader_gives() -> None:
    callback, given = edge(epochs=[2], probe_dataloader=batches(40)), batches(40)
    whole = [[torch.cat(parts) for parts in zip(*given, strict=True)]]
    other = edge(epochs=[2], probe_dataloader=whole, name="other")
    uneven = edge(epochs=[2], probe_dataloader=whole, name="uneven", batch_size=16)
    fit(Classifier(), callback, other, uneven)
    assert [r.value for r in callback.results] == pytest.approx([r.value for r in other.results], rel=1e-5)
    evidence = [(c.results[0].evidence["batch_size"], c.results[0].evidence["num_batches"]) for c in (other, uneven)]
    assert evidence == [(8, 5), (16, 2)]  # without the 8 that are left over


# -- what is not reported, and misuse ----------------------------------------------------------------------------------


def test_what_is_not_reported_has_a_reason() -> None:
    callback = edge(epochs=[0], probe_dataloader=batches())
    fit(Recorded(torch.optim.Adam), callback)
    reasons = callback.results[0].evidence["not_reported"]
    assert reasons["full_batch"] == "Adam has not taken a step: it has no second moments yet."
    assert reasons["update_prediction"] == "The parameters before the last step were not kept."
    assert {r.name for r in callback.results} == {"stability/batch_sharpness", "stability/gradient_noise_scale"}


def test_a_bare_module_has_batch_sharpness_for_batches_of_a_given_size() -> None:
    found = measure(Classifier(), batches(), [edge(batch_size=8)])
    assert set(found) == {
        f"stability/{n}{s}" for n in ("batch_sharpness", "gradient_noise_scale") for s in ("", "_stderr")
    }
    with pytest.raises(ValueError, match="Without a trainer the batch size of the training is not known"):
        measure(Classifier(), batches(), [edge()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "Expected batch_size to be at least 1 or None"),
        ({"tolerance": 1.0}, r"Expected 0 < tolerance < 1 and max_products ≥ 1, got 1.0 and 64"),
        ({"max_products": 0}, r"max_products ≥ 1, got 0.001 and 0"),
    ],
)
def test_misuse_raises_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EdgeOfStability(**arguments)
