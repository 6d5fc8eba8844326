"""The same numbers without a trainer: from a module or a checkpoint, and for a pair of modules."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lmc_lightning import Barrier, HessianSpectrum, InterpolationBarrier, Sharpness, interpolation_barrier, measure
from lmc_lightning.callbacks.offline.measure import interpolation_barriers
from lmc_lightning.core.glassbox import rng_state
from lmc_lightning.core.structure import digest
from tests.branching.runs import sha
from tests.callbacks.runs import Classifier, batches, conv_net, cross_entropy, examples, fit, loader, train_loader
from tests.problems import Problem, Vector, double_well, normal, quadratic, with_spectrum


def both(**common: Any) -> list[Any]:
    common = {"num_examples": 16, **common}
    return [
        HessianSpectrum(num_eigenvalues=1, num_probes=2, num_steps=3, max_products=8, **common),
        Sharpness(num_samples=2, **common),
    ]


def logged(callbacks: list[Any]) -> dict[str, float]:
    """All values and standard errors in the records."""
    found = {}
    for r in [r for c in callbacks for r in c.results]:
        errors = {"_stderr": r.stderr, "_stderr_data": r.evidence.get("stderr_data")}
        found |= {r.name: r.value} | {f"{r.name}{suffix}": e for suffix, e in errors.items() if e is not None}
    return found


def state_of(module: nn.Module) -> tuple[Any, ...]:
    return digest(dict(module.state_dict())), [m.training for m in module.modules()], sha(rng_state())


# -- measure -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:hessian. at step 6 did not converge:UserWarning")
@pytest.mark.parametrize("data", [loader, train_loader], ids=["in order", "shuffled"])
def test_it_equals_the_callbacks_bit_for_bit_on_the_same_loader(data: Any) -> None:
    module, probes = Classifier(batch_norm=True), data()
    callbacks = both(probe_dataloader=probes, epochs=[2], on_error="raise")
    fit(module, *callbacks)
    # The threshold of stability is that of an optimizer, which a module alone does not have.
    assert measure(module, probes, both()) == {k: v for k, v in logged(callbacks).items() if "stability" not in k}


def test_the_module_and_every_random_stream_are_left_as_they_were() -> None:
    module = Classifier(batch_norm=True).train()
    module.net[1].eval()
    data = train_loader()
    before = state_of(module), data.generator.get_state()
    measure(module, data, both())
    assert state_of(module) == before[0]
    assert torch.equal(data.generator.get_state(), before[1])
    assert all(p.grad is None for p in module.parameters())


def test_train_mode_means_batch_statistics_whatever_mode_the_module_comes_in() -> None:
    found = [measure(Classifier(batch_norm=True).train(flag), batches(), both(mode="train")) for flag in (True, False)]
    assert found[0] == found[1]
    assert found[0] != measure(Classifier(batch_norm=True), batches(), both())


def test_twice_gives_the_same_bits() -> None:
    module = Classifier()
    assert measure(module, train_loader(), both()) == measure(module, train_loader(), both())


def test_a_plain_module_needs_and_takes_a_loss() -> None:
    module = Classifier()
    with pytest.raises(ValueError, match=r"Sequential has no training_step.*Pass loss_fn, e.g. loss_fn=lambda"):
        measure(module.net, batches(), both())
    with_step = {key.replace("/net.", "/"): value for key, value in measure(module, batches(), both()).items()}
    assert measure(module.net, batches(), both(), loss_fn=cross_entropy) == with_step


def test_the_loss_of_measure_takes_the_place_of_the_step_everywhere() -> None:
    problem = quadratic(with_spectrum([3.0, 1.0, -0.5]), slope=torch.ones(3, dtype=torch.float64))
    found = measure(problem.module, problem.batches, [HessianSpectrum(num_probes=0)], loss_fn=problem.loss_fn)
    assert found["hessian/lambda_max"] == pytest.approx(3.0, rel=1e-10)
    module = Classifier()
    once, twice = (
        measure(module, batches(), [Sharpness()], loss_fn=f) for f in (None, lambda m, b: 2 * cross_entropy(m, b))
    )
    assert twice["sharpness/gradient_norm"] == pytest.approx(2 * once["sharpness/gradient_norm"], rel=1e-6)


def test_the_loss_of_the_callback_is_taken_too() -> None:
    module = Classifier()
    callback = Sharpness(loss_fn=cross_entropy, num_examples=16, num_samples=2)
    assert measure(module.net, batches(), [callback]) == measure(module, batches(), both()[1:])


def test_every_callback_reads_the_loader_from_its_start() -> None:
    def stream() -> Iterator[Any]:
        yield from loader()

    module = Classifier()
    assert measure(module, stream(), both()) == measure(module, list(loader()), both())


def test_one_instance_serves_several_modules() -> None:
    callback = HessianSpectrum(num_probes=0)
    modules = [Classifier(), Classifier(batch_norm=True)]
    assert [measure(m, batches(), [callback]) for m in modules] == [
        measure(m, batches(), [HessianSpectrum(num_probes=0)]) for m in modules
    ]


def test_two_callbacks_that_log_under_one_name_are_refused() -> None:
    pair = [Sharpness(rho=0.1), Sharpness(rho=0.2)]
    with pytest.raises(ValueError, match=r"Two callbacks give 'sharpness/worst_case'. Give one of them a name="):
        measure(Classifier(), batches(), pair)
    found = measure(Classifier(), batches(), [Sharpness(rho=0.1), Sharpness(rho=0.2, name="wide")])
    assert found["sharpness/worst_case/wide"] > found["sharpness/worst_case"]


def test_barriers_need_two_states() -> None:
    with pytest.raises(ValueError, match=r"InterpolationBarrier compares two states.*interpolation_barrier\(module_a"):
        measure(Classifier(), batches(), [InterpolationBarrier(reference="initial")])


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Classifier, Path, Path]:
    """A trained module, its Lightning checkpoint and its plain state dict."""
    module = Classifier(batch_norm=True)
    saver = ModelCheckpoint(tmp_path, filename="last", save_weights_only=False)
    fit(module, saver, enable_checkpointing=True)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    return module, Path(saver.best_model_path), tmp_path / "weights.pt"


def test_a_checkpoint_is_measured_in_place_of_the_modules_own_weights(trained: tuple[Classifier, Path, Path]) -> None:
    module, *files = trained
    fresh, data = Classifier(batch_norm=True), batches()
    before = state_of(fresh)
    expected = measure(module, data, both())
    assert [measure(fresh, data, both(), checkpoint=file) for file in files] == [expected, expected]
    assert state_of(fresh) == before
    # The module of a run that is over still holds its trainer.
    assert measure(module, data, both(), checkpoint=str(files[0])) == expected


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    trained: tuple[Classifier, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"(?s)last\.ckpt does not hold the weights of Classifier:.*Unexpected key"):
        measure(Classifier(), batches(), both(), checkpoint=trained[1])
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt does not hold the weights of Classifier: it is a list"):
        measure(Classifier(), batches(), both(), checkpoint=tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match=r"missing\.ckpt"):
        measure(Classifier(), batches(), both(), checkpoint=tmp_path / "missing.ckpt")


# -- interpolation_barrier ---------------------------------------------------------------------------------------------


def well(theta: float) -> Problem:
    return double_well(theta)


def test_the_barrier_of_the_double_well_is_one() -> None:
    a, b = well(-1.0), well(1.0)
    found = interpolation_barrier(a.module, b.module, a.batches, loss_fn=a.loss_fn)
    assert isinstance(found, Barrier)
    assert (found.barrier, found.instability, found.peak_t, found.midpoint) == (1.0, 1.0, 0.5, 1.0)
    expected = ((2 * found.ts - 1) ** 2 - 1) ** 2
    assert torch.allclose(found.losses, expected, rtol=1e-14, atol=1e-15)
    assert (len(found.ts), float(found.ts[0]), float(found.ts[-1])) == (25, 0.0, 1.0)


def test_the_record_is_frozen() -> None:
    a, b = well(-1.0), well(1.0)
    found = interpolation_barrier(a.module, b.module, a.batches, loss_fn=a.loss_fn, num_points=3)
    with pytest.raises(dataclasses.FrozenInstanceError, match="barrier"):
        found.barrier = 0.0  # type: ignore[misc]


def test_exchanging_the_modules_mirrors_the_curve() -> None:
    a, b = well(-1.2), well(0.9)
    there = interpolation_barrier(a.module, b.module, a.batches, loss_fn=a.loss_fn)
    back = interpolation_barrier(b.module, a.module, a.batches, loss_fn=a.loss_fn)
    assert torch.allclose(there.losses, back.losses.flip(0), rtol=1e-13, atol=0)
    assert there.barrier == pytest.approx(back.barrier, rel=1e-13)
    assert there.peak_t == pytest.approx(1 - back.peak_t)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("metric", ["loss", "error"])
def test_equal_modules_have_no_barrier_at_all(batch_norm: bool, metric: str) -> None:
    module = Classifier(batch_norm)
    found = interpolation_barrier(module, copy.deepcopy(module), batches(), metric=metric, num_points=5)
    assert found.barrier == found.instability == found.dip == 0.0
    assert set(found.gaps.tolist()) == {0.0}
    assert len(set(found.values.tolist())) == 1


def pair(batch_norm: bool = True) -> list[Classifier]:
    """Two modules of different weights and running statistics."""
    modules = [Classifier(batch_norm) for _ in range(2)]
    with torch.no_grad():
        for index, module in enumerate(modules):
            for k, parameter in enumerate(module.parameters()):
                parameter.add_(normal(*parameter.shape, seed=10 * index + k), alpha=0.5)
            if batch_norm:
                module.net[1].running_mean.fill_(index)
                module.net[1].running_var.fill_(1 + index)
    return modules


def test_batch_norm_statistics_are_recomputed_by_default() -> None:
    a, b = pair()
    found = {p: interpolation_barrier(a, b, batches(), batch_stats=p, num_points=3) for p in (None, "interpolate")}
    assert found[None].batch_stats == "recompute"
    # From a single batch, the recomputed statistics are those of that batch.
    whole = [next(iter(torch.utils.data.DataLoader(examples(), batch_size=24)))]
    single = interpolation_barrier(a, b, whole, num_points=3)
    for value, theta in zip(single.losses.tolist(), middle(a, b), strict=True):
        module = copy.deepcopy(a)
        nn.utils.vector_to_parameters(theta, module.parameters())
        module.net[1].momentum = 1.0
        module.train()
        module(whole[0][0])
        assert value == pytest.approx(loss_of(module, whole[0]), rel=1e-5)
    # The ends' own statistics are those that the modules came with.
    own = [loss_of(copy.deepcopy(m), whole[0]) for m in (a, b)]
    assert list(single.own_ends) == pytest.approx(own, rel=1e-5)
    assert found["interpolate"].losses[[0, 2]].tolist() == pytest.approx(own, rel=1e-5)
    assert found["interpolate"].losses[1] != found[None].losses[1]


@torch.no_grad()
def loss_of(module: nn.Module, *batches: Any) -> float:
    return sum(float(cross_entropy(module.eval(), batch)) for batch in batches) / len(batches)


def middle(a: nn.Module, b: nn.Module) -> list[torch.Tensor]:
    ends = [nn.utils.parameters_to_vector(m.parameters()).detach() for m in (a, b)]
    return [ends[0], (ends[0] + ends[1]) / 2, ends[1]]


def test_statistics_come_from_training_examples_where_these_are_given() -> None:
    a, b = pair()
    found = interpolation_barrier(a, b, list(loader(seed=40)), train_dataloader=batches(), num_points=3)
    assert found.losses[0] != interpolation_barrier(a, b, list(loader(seed=40)), num_points=3).losses[0]
    a.net[1].running_mean.fill_(9)  # recomputed anyway
    again = interpolation_barrier(a, b, list(loader(seed=40)), train_dataloader=batches(), num_points=3)
    assert torch.equal(found.losses, again.losses)


def test_the_modules_and_every_random_stream_are_left_alone() -> None:
    a, b = (m.train() for m in pair())
    before = state_of(a), state_of(b)
    interpolation_barrier(a, b, train_loader(), num_points=3)
    assert (state_of(a), state_of(b)) == before


def test_only_chosen_parameters_move() -> None:
    a, b = pair(batch_norm=False)
    found = interpolation_barrier(a, b, batches(), parameters=["net.6.*"], num_points=3)
    moved = copy.deepcopy(a)
    moved.net[6].load_state_dict(b.net[6].state_dict())
    expected = [loss_of(m, *batches()) for m in (a, moved)]
    assert found.losses[[0, 2]].tolist() == pytest.approx(expected, rel=1e-5)


class Frozen(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


def test_modules_that_differ_where_nothing_moves_are_refused() -> None:
    a, b = Frozen(), Frozen()
    assert interpolation_barrier(a, b, batches(), num_points=3).barrier == 0.0
    nn.init.zeros_(b.net[0].weight)
    with pytest.raises(ValueError, match=r"'net.0.weight' is frozen and differs.*requires_grad_\(\)"):
        interpolation_barrier(a, b, batches(), num_points=3)


def test_modules_of_different_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"module_a and module_b differ in 'net.1.bias', 'net.1.weight'"):
        interpolation_barrier(Classifier(), Classifier(batch_norm=True), batches())
    tall, wide = (Vector(torch.zeros(shape)) for shape in ((2, 3), (3, 2)))
    with pytest.raises(ValueError, match=r"module_a and module_b differ in 'theta' \(\[2, 3\] and \[3, 2\]\)"):
        interpolation_barrier(tall, wide, [torch.zeros(1)], loss_fn=lambda m, b: m.theta.sum())


def test_a_plain_module_needs_a_loss_and_an_error_a_classification() -> None:
    with pytest.raises(ValueError, match="Sequential has no training_step"):
        interpolation_barrier(conv_net(), conv_net(), batches())
    a, b = well(-1.0), well(1.0)
    with pytest.raises(ValueError, match="not 'error'"):
        interpolation_barrier(a.module, b.module, a.batches, loss_fn=a.loss_fn, metric="error")


def test_a_lightning_module_and_its_plain_network_have_the_same_barrier() -> None:
    a, b = pair(batch_norm=False)
    whole = interpolation_barrier(a, b, batches(), num_points=5)
    plain = interpolation_barrier(a.net, b.net, batches(), loss_fn=cross_entropy, num_points=5)
    assert torch.equal(whole.losses, plain.losses)
    assert isinstance(a, pl.LightningModule)
    assert whole.barrier == plain.barrier


@pytest.mark.parametrize("align", [None, "weights"])
def test_several_splits_and_metrics_have_one_path_and_the_same_bits(align: Any) -> None:
    a, b = Classifier(batch_norm=True), Classifier(batch_norm=True)
    data = {"train": batches(), "val": batches()[:2]}
    options: dict[str, Any] = {"num_points": 5, "train_dataloader": batches(), "align": align}
    found = interpolation_barriers(a, b, data, **options)
    for split, metrics in found.items():
        assert [*metrics] == ["loss", "error"]
        for metric, barrier in metrics.items():
            alone = interpolation_barrier(a, b, data[split], metric=metric, **options)
            assert torch.equal(barrier.values, alone.values)
            assert (barrier.split, barrier.barrier) == (split, alone.barrier)


# -- losses of which nobody sees single examples -----------------------------------------------------------------------


def by_hand(module: nn.Module, batch: Any) -> torch.Tensor:
    """Cross-entropy out of sight of the loss tap."""
    x, y = batch
    outputs = module(x)
    return (outputs.logsumexp(1) - outputs.gather(1, y[:, None])[:, 0]).mean()


def test_errors_of_a_barrier_are_over_chunks_of_32_where_single_examples_are_not_seen() -> None:
    torch.manual_seed(3)
    ends, data = (conv_net(), conv_net()), [examples(256).tensors]
    seen, unseen = (interpolation_barrier(*ends, data, loss_fn=loss, num_points=5) for loss in (cross_entropy, by_hand))
    assert (seen.unit, seen.num_samples) == ("example", 256)
    assert (unseen.unit, unseen.num_samples) == ("chunk", 8)
    torch.testing.assert_close(unseen.values, seen.values, rtol=1e-5, atol=0)
    assert unseen.stderr_data["barrier"] == pytest.approx(seen.stderr_data["barrier"], rel=0.9)
