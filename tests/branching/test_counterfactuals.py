"""Forks at which one thing is done: overrides against runs by hand, perturbations of exact size, paired differences."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lmc_lightning.branching.__main__ import main
from lmc_lightning.branching.children.overrides import Change, Override
from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.callbacks.interpolation_barrier import InterpolationBarrier
from lmc_lightning.callbacks.perturbation import Perturbation
from lmc_lightning.core.glassbox import rng_state
from tests.branching import runs
from tests.branching.runs import fit, loader, net, plain, sha

pytestmark = [
    pytest.mark.filterwarnings("ignore:More than half of the captured .* examples have one label"),
    pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step"),  # SequentialLR's own call
]

SIZE, BATCH, EPOCHS, FORK = 24, 8, 4, 5
STEPS = EPOCHS * SIZE // BATCH


# -- overrides against a plain loop ------------------------------------------------------------------------------------


def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SIZE, 3, generator=generator, dtype=torch.float64)
    return inputs, inputs.sin().sum(1, keepdim=True)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


Schedule = Callable[[Any], Any]


class Regression(pl.LightningModule):
    def __init__(self, optimizer: Callable[..., Any], schedule: Schedule | None, interval: str) -> None:
        super().__init__()
        self.net, self.make, self.schedule, self.interval = mlp(), optimizer, schedule, interval
        self.penalty = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1]) + self.penalty * self.net[0].weight.square().sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        if self.schedule is None:
            return optimizer
        config = {"scheduler": self.schedule(optimizer), "interval": self.interval, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Any) -> Any:
    return torch.optim.Adam(parameters, lr=0.05)


def trunk_and_child(module: Regression, **arguments: Any) -> CheckpointBranching:
    data = torch.utils.data.TensorDataset(*points())
    train = torch.utils.data.DataLoader(data, batch_size=BATCH)
    val = torch.utils.data.DataLoader(data, batch_size=SIZE)
    branching = CheckpointBranching(steps=[FORK], **arguments)
    fit(module, (train, val), branching, max_epochs=EPOCHS)
    return branching


def rates(schedule: Schedule | None, per_step: bool, optimizer: Callable[..., Any]) -> list[float]:
    """The rate of each step by the schedule alone, of an optimizer that has nothing to do."""
    idle = optimizer([nn.Parameter(torch.zeros(1))])
    scheduler = None if schedule is None else schedule(idle)
    found = []
    for step in range(STEPS):
        found.append(idle.param_groups[0]["lr"])
        idle.step()
        if scheduler is not None and (per_step or (step + 1) % (SIZE // BATCH) == 0):
            scheduler.step()
    return found


def by_hand(optimizer: Callable[..., Any], rate_of: list[float]) -> dict[str, Tensor]:
    """A plain loop that sets the rate of every step."""
    model = mlp()
    steps = optimizer(model.parameters())
    inputs, targets = points()
    for step, rate in enumerate(rate_of):
        rows = slice(step * BATCH % SIZE, step * BATCH % SIZE + BATCH)
        steps.param_groups[0]["lr"] = rate
        steps.zero_grad()
        F.mse_loss(model(inputs[rows]), targets[rows]).backward()
        steps.step()
    return {f"net.{name}": value.detach() for name, value in model.named_parameters()}


def chained(optimizer: Any) -> Any:
    return ChainedScheduler([ExponentialLR(optimizer, 0.9), StepLR(optimizer, 3, 0.5)], optimizer)


def warm_up_then_cosine(optimizer: Any) -> Any:
    parts = [LambdaLR(optimizer, lambda s: (s + 1) / 4), CosineAnnealingLR(optimizer, 8, eta_min=0.01)]
    return SequentialLR(optimizer, parts, milestones=[4])


SCHEDULES: dict[str, tuple[Schedule | None, str]] = {
    "constant": (None, "epoch"),
    "StepLR per epoch": (lambda o: StepLR(o, 2, 0.3), "epoch"),
    "StepLR per step": (lambda o: StepLR(o, 4, 0.5), "step"),
    "cosine per step": (lambda o: CosineAnnealingLR(o, STEPS, eta_min=0.01), "step"),
    "closed form": (lambda o: LambdaLR(o, lambda s: 1 / (1 + s)), "step"),
    "OneCycle": (lambda o: OneCycleLR(o, 0.2, total_steps=STEPS + 1, cycle_momentum=False), "step"),
    "chained": (chained, "step"),
    "sequential": (warm_up_then_cosine, "step"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_rate_made_another_is_that_of_a_plain_loop_bit_for_bit(name: str) -> None:
    schedule, interval = SCHEDULES[name]
    optimizer = (sgd, adam)[list(SCHEDULES).index(name) % 2]
    rate = rates(schedule, interval == "step", optimizer)
    module = Regression(optimizer, schedule, interval)
    changes = {"*0.5": lambda lr: lr * 0.5, "+0.01": lambda lr: lr + 0.01, 0.02: lambda lr: 0.02}
    value, change = list(changes.items())[list(SCHEDULES).index(name) % 3]
    branching = trunk_and_child(module, override={"optimizer.lr": value})
    family = branching.family
    (child,) = family.children
    assert (child.status, child.noise_seed, child.exact_replay, child.shared["batches"]) == (
        "completed",
        None,
        None,
        True,
    )
    expected = by_hand(optimizer, [*rate[:FORK], *(change(lr) for lr in rate[FORK:])])
    assert {n: sha(v) for n, v in family.state(child, EPOCHS).items()} == {n: sha(v) for n, v in expected.items()}
    alone = by_hand(optimizer, rate)
    assert {n: sha(v) for n, v in family.state("trunk", EPOCHS).items()} == {n: sha(v) for n, v in alone.items()}
    assert child.effect == {"optimizer.0.lr": {"from": [rate[FORK]], "to": [change(rate[FORK])]}}


class Warming(Regression):
    """Sets the rate by hand within the step itself, as warm-ups do."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + self.trainer.global_step)


def test_a_rate_set_by_hand_within_the_step_is_changed_too() -> None:
    branching = trunk_and_child(Warming(sgd, None, "step"), override={"optimizer.lr": "*0.5"})
    rate = [0.01 * (1 + step) * (0.5 if step >= FORK else 1) for step in range(STEPS)]
    state = branching.family.state(branching.family.children[0], EPOCHS)
    assert {n: sha(v) for n, v in state.items()} == {n: sha(v) for n, v in by_hand(sgd, rate).items()}


def test_a_plateau_goes_by_the_metric_of_the_child() -> None:
    def plateau(optimizer: Any) -> Any:
        return ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=10.0)  # at every epoch

    branching = trunk_and_child(Regression(sgd, plateau, "epoch"), override={"optimizer.lr": "*0.5"})
    rate = [0.1 * 0.1 ** (step // 3) * (0.5 if step >= FORK else 1) for step in range(STEPS)]
    for name, value in branching.family.state(branching.family.children[0], EPOCHS).items():
        torch.testing.assert_close(value, by_hand(sgd, rate)[name], rtol=1e-12, atol=1e-14)


def test_a_closure_is_evaluated_under_the_schedule_and_stepped_under_the_override() -> None:
    seen = []
    parameter = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    trainer = type("T", (), {"optimizers": [optimizer]})()
    Override({"optimizer.lr": "*0.5"}).apply(trainer, None, 0)

    def closure() -> Tensor:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss = parameter.square()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 1.0
    assert (parameter.item(), seen, optimizer.param_groups[0]["lr"]) == (0.5, [0.5], 0.5)


def test_an_attribute_of_the_module() -> None:
    branching = trunk_and_child(Regression(sgd, None, "epoch"), override={"module.penalty": 0.1})
    (child,) = branching.family.children
    assert child.name == "k1_step_000005_module.penalty_0.1_child_0"
    assert child.effect == {"module.penalty": {"from": 0.0, "to": 0.1}}
    weight = [branching.family.state(run, EPOCHS)["net.0.weight"].norm() for run in ("trunk", child)]
    assert weight[1] < 0.9 * weight[0]
    loss = branching.differences.query("quantity == 'train_loss'")
    assert float(loss["difference"].iloc[0]) > 0.01  # at once: it is the loss that was changed


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("BatchNorm, dropout, augmentation", {"perturb": {"size": 0}}),
        ("two optimizers", {"override": {"optimizer.lr": "*1.0"}}),
        ("accumulated", {"override": {"optimizer.lr": "+0"}}),
    ],
)
def test_nothing_done_is_the_trunk_bit_for_bit(name: str, what: dict[str, Any]) -> None:
    kind, arguments = {
        "BatchNorm, dropout, augmentation": (runs.StepDecay, {}),
        "two optimizers": (runs.TwoOptimizers, {}),
        "accumulated": (runs.Cosine, {"accumulate_grad_batches": 2}),
    }[name]
    branching = CheckpointBranching(epochs=[1], steps=[4], **what)
    data = loader(runs.Augmented()), loader(shuffle=False)
    fit(net(kind), data, branching, **arguments)
    family = branching.family
    assert branching.plan.noise == "same"
    for child in family.children:
        assert (child.status, child.reason) == ("completed", None)
        shared = sorted(set(child.epochs) & set(family.trunk.epochs))
        assert {e: child.state_digests[e] for e in shared} == {e: family.trunk.state_digests[e] for e in shared}
    differences = branching.differences
    assert set(differences["quantity"]) == {"train_loss", "val_loss"} - (
        {"train_loss"} if kind is runs.TwoOptimizers else set()
    )
    assert (differences["difference"] == 0).all()
    assert differences["paired"].all()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"override": {}}, "Expected override to change something"),
        ({"override": {"lr": 0.1}}, r'"optimizer\.<setting>".* got \'lr\''),
        ({"override": {"optimizer.": 0.1}}, r"got 'optimizer\.'"),
        ({"override": {"optimizer.lr": "*half"}}, r'a value, "\*x" or "\+x" with a number x, got \'\*half\''),
        ({"override": {"optimizer.lr": 1.0}, "perturb": {"size": 1.0}}, "one intervention, got perturb and override"),
        ({"perturb": {}}, "Expected perturb to give a size"),
        ({"perturb": {"size": 1.0, "norm": 2}}, "and of relative, direction, parameters, num_examples"),
        ({"perturb": {"size": float("nan")}}, "finite number, got nan"),
        ({"perturb": {"size": 1.0, "direction": "up"}}, "direction to be 'gaussian' or 'gradient', got 'up'"),
    ],
)
def test_misuse_raises_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointBranching(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"override": {"optimizer.alpha": 0.1}}, r"SGD has no 'alpha' \('optimizer.alpha' in override\): lr, momentum"),
        ({"override": {"optimizer.1.lr": 0.1}}, r"no optimizer '1' .*: there are 1"),
        ({"override": {"optimizer.lr": "big"}}, r"override\['optimizer.lr'\] is impossible: it is a number, and 'big'"),
        ({"override": {"optimizer.nesterov": "*2"}}, "False is no number; give the value"),
        ({"override": {"module.dropout": 0.1}}, r"Net has no attribute 'dropout'"),
        ({"override": {"module.net.9.p": 0.1}}, r"Sequential has no attribute '9'"),
        ({"override": {"module.net": 0.1}}, "no plain value but a Sequential"),
        ({"perturb": {"size": 1.0, "parameters": ["head.*"]}}, r"No trainable parameter matches \['head"),
    ],
)
def test_what_is_not_there_raises_before_the_first_step(arguments: dict[str, Any], message: str) -> None:
    module = net()
    before = sha(module.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(module, plain(), CheckpointBranching(epochs=[0], **arguments))
    assert sha(module.state_dict()) == before


def test_manual_steps_have_no_gradient_to_be_perturbed_along() -> None:
    with pytest.raises(ValueError, match=r'optimizes manually.*Use direction="gaussian"'):
        fit(net(runs.TwoOptimizers), plain(), CheckpointBranching(perturb={"size": 1.0, "direction": "gradient"}))


def test_names_of_changes() -> None:
    override = Override({"optimizer.lr": "*0.5", "optimizer.1.betas": (0.8, 0.99), "module.net.3.p": "+-0.1"})
    assert override.name == "lr_x0.5_1.betas_0.8_0.99_module.net.3.p_plus-0.1"
    assert json.loads(json.dumps(override.record())) == override.record()
    assert Change.of("", "+1")(torch.tensor(2.0)) == 3
    assert Change.of("", (0.8, 0.9))((0.9, 0.99)) == (0.8, 0.9)
    assert torch.equal(Change.of("", 2.0)(torch.tensor(1.0, dtype=torch.float64)), torch.tensor(2.0).double())


# -- perturbations -----------------------------------------------------------------------------------------------------


class Batches(pl.Callback):
    """The optimizer's state and the parameters at the first batch after a fork, of trunk and children."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, dict[str, Tensor]]] = []

    def __deepcopy__(self, memo: Any) -> "Batches":
        return self  # one list for all runs

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        state = sha([optimizer.state_dict()["state"] for optimizer in trainer.optimizers])
        values = {name: value.detach().clone() for name, value in pl_module.named_parameters()}
        self.seen.append((trainer.global_step, state, values))


def perturbed(**arguments: Any) -> tuple[CheckpointBranching, list[Any], list[tuple[int, str, dict[str, Tensor]]]]:
    """Nodes of children, and the first of what each saw after the trunk's own three steps of the fork at 3."""
    batches = Batches()
    branching = CheckpointBranching(steps=[3], **{"children": 3, **arguments})
    module = net().double()
    fit(module, (loader(runs.points(torch.float64)), None), batches, branching, max_epochs=2, precision="64-true")
    at_fork = [seen for seen in batches.seen if seen[0] == 3]
    return branching, branching.family.children, at_fork


def displacements(at_fork: list[tuple[int, str, dict[str, Tensor]]]) -> list[Tensor]:
    trunk = at_fork[0][2]
    return [torch.cat([(values[n] - trunk[n]).flatten() for n in trunk]) for _, _, values in at_fork[1:]]


@pytest.mark.parametrize(("direction", "relative"), [("gaussian", True), ("gradient", False)])
def test_a_perturbation_has_the_size_that_was_asked_for(direction: str, relative: bool) -> None:
    what = {"size": 0.25, "relative": relative, "direction": direction, "num_examples": 12}
    _, children, at_fork = perturbed(perturb=what)
    theta = torch.cat([value.flatten() for value in at_fork[0][2].values()]).norm()
    moves = displacements(at_fork)
    assert len(moves) == 3
    for child, move, seen in zip(children, moves, at_fork[1:], strict=True):
        expected = 0.25 * float(theta) if relative else 0.25
        assert float(move.norm()) == pytest.approx(expected, rel=1e-12)
        assert child.effect["norm"] == pytest.approx(expected, rel=1e-12)
        assert child.effect["theta_norm"] == pytest.approx(float(theta), rel=1e-14)
        assert seen[1] == at_fork[0][1]  # the optimizer's state is untouched
        assert child.shared == {"order": True, "batches": True}
        assert (child.status, child.exact_replay, child.noise_seed) == ("completed", None, None)
    assert len({child.intervention["seed"] for child in children}) == 3
    assert len({sha(move) for move in moves}) == 3
    again, other = (displacements(perturbed(perturb=what, seed=seed)[2]) for seed in (0, 1))
    assert [sha(move) for move in again] == [sha(move) for move in moves]
    assert {sha(move) for move in other}.isdisjoint(sha(move) for move in moves)


def test_gaussian_directions_are_uniform_on_the_sphere() -> None:
    """E v = 0 and E v vᵀ = I/P: of 2,000 draws in 4 dimensions, within 4 standard errors."""
    module = type("Linear", (nn.Linear,), {"automatic_optimization": True})(4, 1, bias=False, dtype=torch.float64)
    draws = []
    for seed in range(2000):
        nn.init.zeros_(module.weight)
        Perturbation(1.0).apply(None, module, seed)
        draws.append(module.weight.detach().reshape(-1).clone())
    v = torch.stack(draws)
    # Var v_i = 1/P; Var v_i² = 2(P − 1)/(P²(P + 2)); Var v_i v_j = 1/(P(P + 2)).
    assert (v.mean(0).abs() < 4 * (1 / 4 / 2000) ** 0.5).all()
    covariance = v.T @ v / 2000
    assert ((covariance.diagonal() - 0.25).abs() < 4 * (2 * 3 / (16 * 6) / 2000) ** 0.5).all()
    assert (covariance.triu(1).abs() < 4 * (1 / 24 / 2000) ** 0.5).all()


def test_a_gradient_is_that_of_the_recorded_batch() -> None:
    """Against autograd by hand on the batch that the seed draws: parallel, upwards; a negative size goes down."""
    what = {"size": 1e-3, "direction": "gradient", "num_examples": 40}  # all there are: the batch is known
    branching, children, at_fork = perturbed(perturb=what, children=1)
    module = net().double()
    module.load_state_dict(at_fork[0][2], strict=False)
    for layer in module.net:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    inputs, labels = runs.points(torch.float64).tensors
    loss = module.loss((inputs, labels))
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
    (move,) = displacements(at_fork)
    torch.testing.assert_close(move, 1e-3 * gradient / gradient.norm(), rtol=1e-9, atol=1e-15)
    effect = children[0].effect
    assert effect["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert effect["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-10)
    saved = Family.load(branching.family.folder).node(children[0].name)
    assert (saved.effect, saved.intervention) == (effect, children[0].intervention)
    (down,) = displacements(perturbed(perturb={**what, "size": -1e-3}, children=1)[2])
    torch.testing.assert_close(down, -move, rtol=1e-9, atol=1e-12)


def test_only_the_named_parameters_move() -> None:
    what = {"size": 0.1, "parameters": ["net.4.*"]}
    _, children, at_fork = perturbed(perturb=what, children=1)
    trunk, child = at_fork[0][2], at_fork[1][2]
    assert [name for name in trunk if not torch.equal(trunk[name], child[name])] == ["net.4.weight", "net.4.bias"]
    assert children[0].name == "k1_step_000003_gaussian_0.1_child_0"


def test_the_trunk_does_not_notice() -> None:
    alone, beside = net(), net()
    fit(alone, (loader(runs.Augmented()), loader(shuffle=False)))
    after = sha(rng_state())
    what = {"size": 0.1, "direction": "gradient"}
    branching = CheckpointBranching(epochs=[1], steps=[2], perturb=what)
    fit(beside, (loader(runs.Augmented()), loader(shuffle=False)), branching)
    assert (sha(beside.state_dict()), sha(rng_state())) == (sha(alone.state_dict()), after)
    assert [child.shared["batches"] for child in branching.family.children] == [True, True]


def test_elsewhere_does_the_same() -> None:
    def folder(when: Any) -> Path:
        branching = CheckpointBranching(
            steps=[3], perturb={"size": 0.1, "direction": "gradient"}, children=2, when=when
        )
        fit(net(), (loader(runs.Augmented()), None), branching, max_epochs=2)
        return Path(branching.family.folder)

    here = Family.load(folder("end")).children
    away = folder("never")
    assert main([str(away)]) == 0
    assert main([str(away / "snapshots" / "k1_step_000003"), "--noise", "same"]) == 0
    *there, plain_child = Family.load(away).children
    assert [c.state_digests for c in there] == [c.state_digests for c in here]
    assert [c.effect for c in there] == [c.effect for c in here]
    assert plain_child.exact_replay  # nothing was to be done to this one


# -- differences and barriers ------------------------------------------------------------------------------------------


class Rows(pl.loggers.logger.DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))


def test_differences_are_those_of_the_curves_that_were_logged() -> None:
    class Logged(pl.Callback):
        losses: dict[str, dict[int, float]] = {}  # noqa: RUF012

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.mine = Logged.losses[f"run{len(Logged.losses)}"] = {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            self.mine[trainer.global_step] = float(outputs["loss"])

    logger = Rows()
    branching = CheckpointBranching(epochs=[1], override={"optimizer.lr": "*3"})
    barrier = InterpolationBarrier(epochs=[1, 2, 3], num_points=3, num_examples=8, on_error="raise")
    data = loader(runs.Augmented()), loader(shuffle=False)
    fit(net(), data, Logged(), branching, barrier, logger=logger, log_every_n_steps=1)
    table = branching.differences
    assert set(table["run"]) == {"k1_001_lr_x3_child_0"}
    losses = table[table["quantity"] == "train_loss"].set_index("step")
    trunk, child = Logged.losses.values()
    assert losses["trunk"].to_dict() == {s: v for s, v in trunk.items() if s > 5}
    assert losses["child"].to_dict() == child
    assert list(losses.index) == list(range(6, 16))
    assert losses["difference"].iloc[0] == 0.0 != losses["difference"].iloc[1]
    key = "difference/train_loss/k1_001/lr_x3"
    assert {step: row[key] for step, row in logger.rows if key in row} == losses["difference"].to_dict()
    assert [step for step, row in logger.rows if "difference/val_loss/k1_001/lr_x3" in row] == [10, 15]
    written = pd.read_csv(branching.family.folder / "differences.csv")
    np.testing.assert_array_equal(written["difference"], table["difference"])
    figures = sorted(path.name for path in (branching.family.folder.parent / "figures").glob("difference_*"))
    assert figures == [f"difference_curves_{q}_lr_x3_000015.png" for q in ("train_loss", "val_loss")]
    assert {r.name for r in barrier.results} == {
        f"barrier/{s}_{m}/k1_001/lr_x3" for s in ("train", "val") for m in ("loss", "error")
    }
    assert set(barrier.to_table()["intervention"]) == {"lr_x3"}
    assert [r.value for r in barrier.results if r.step == 5] == [0.0] * 4
    again = len(logger.rows)
    branching.run_children()
    assert not any(key in row for _, row in logger.rows[again:])


@pytest.mark.slow
def test_counterfactuals_beside_the_usual_children_have_keys_of_their_own() -> None:
    barrier = InterpolationBarrier(epochs=[2], num_points=3, num_examples=8, splits=("train",), on_error="raise")
    several = [
        CheckpointBranching(epochs=[1]),
        CheckpointBranching(epochs=[1], override={"optimizer.lr": "*2"}, noise="fresh"),
        CheckpointBranching(epochs=[1], perturb={"size": 0.1}, children=2),
    ]
    fit(net(), plain(), *several, barrier, max_epochs=2)
    labels = ["k1_001", "k1_001/gaussian_0.1/child_0", "k1_001/gaussian_0.1/child_1", "k1_001/lr_x2"]
    for step in (5, 10):
        found = sorted(r.name for r in barrier.results if r.step == step and "loss" in r.name)
        assert found == [f"barrier/train_loss/{label}" for label in labels]
    assert [set(b.differences["paired"]) for b in several] == [set(), {False}, {True}]
    names = [child.name for branching in several for child in branching.family.children]
    assert len(set(names)) == len(names) == 4
    displaced = [r.value for r in barrier.results if r.step == 5 and "gaussian" in r.name]
    assert len(displaced) == 4


def test_two_families_whose_children_would_share_keys_are_refused() -> None:
    twice = [CheckpointBranching(epochs=[1], perturb={"size": 0.1}, seed=seed) for seed in (0, 1)]
    barrier = InterpolationBarrier(epochs=[2], num_points=3, num_examples=8)
    with pytest.raises(ValueError, match=r"children called k1_001_gaussian_0\.1_child_0, whose barriers would share"):
        fit(net(), plain(), *twice, barrier)


def test_curves_go_on_in_a_resumed_trunk(tmp_path: Path) -> None:
    what = {"steps": [3], "override": {"optimizer.lr": "*2"}, "when": "never"}
    whole = CheckpointBranching(**what)
    fit(net(), plain(), whole, max_epochs=3, default_root_dir=tmp_path / "whole")
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "checkpoints", "last", every_n_epochs=1)
    first, second = CheckpointBranching(**what), CheckpointBranching(**what)
    arguments = {"default_root_dir": tmp_path / "parts"}
    fit(net(), plain(), first, saver, enable_checkpointing=True, max_epochs=1, **arguments)
    fit(net(), plain(), second, max_epochs=3, ckpt_path=saver.best_model_path, **arguments)
    from lmc_lightning.branching.traces.curves import TRAIN_LOSS, read_curves

    curves = [read_curves(b.family.curves_path(b.family.trunk))[TRAIN_LOSS] for b in (whole, second)]
    assert list(curves[0]) == list(curves[1]) == list(range(1, 16))
    assert list(curves[0].values())[:5] == list(curves[1].values())[:5]


def test_a_child_at_the_end_says_that_nothing_was_done() -> None:
    branching = CheckpointBranching(epochs=[2], perturb={"size": 0.1})
    fit(net(), plain(), branching, max_epochs=2)
    (child,) = branching.family.children
    assert (child.status, child.reason) == ("completed", "nothing was done to it: the trunk ended there")
