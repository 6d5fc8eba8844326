import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lmc_lightning.models import ImageClassifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

SMALL = {"network": "mlp", "network_kwargs": {"hidden_sizes": [4], "in_features": 6}, "num_classes": 3}


def loader(num_examples=20, batch_size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_examples, 1, 2, 3, generator=generator)
    targets = torch.randint(3, (num_examples,), generator=generator)
    return DataLoader(TensorDataset(images, targets), batch_size=batch_size)


def trainer(tmp_path, **kwargs):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**{**defaults, **kwargs})


class RateHistory(pl.Callback):
    """Learning rate that each optimizer step used."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def rates(tmp_path, lr=1.0, max_epochs=None, max_steps=-1, **kwargs):
    history = RateHistory()
    module = ImageClassifier(**SMALL, optimizer="sgd", lr=lr, **kwargs)
    fit = trainer(tmp_path, max_epochs=max_epochs, max_steps=max_steps, callbacks=[history])
    fit.fit(module, loader())
    return history.rates


def test_epoch_metrics_are_means_over_all_examples(tmp_path):
    module = ImageClassifier(**SMALL)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, loader(), loader())
    images, targets = loader().dataset.tensors
    with torch.no_grad():
        logits = module(images)
    loss = F.cross_entropy(logits, targets).item()
    accuracy = (logits.argmax(1) == targets).float().mean().item()
    assert run.callback_metrics["val_loss"].item() == pytest.approx(loss, rel=1e-6)
    assert run.callback_metrics["val_acc"].item() == pytest.approx(accuracy, rel=1e-6)
    tested = run.test(module, loader(), verbose=False)[0]
    assert tested == {"test_loss": pytest.approx(loss, rel=1e-6), "test_acc": pytest.approx(accuracy, rel=1e-6)}


def test_train_loss_is_the_loss_of_the_last_batch(tmp_path):
    module = ImageClassifier(**SMALL, lr=0.0)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, loader())
    images, targets = list(loader())[-1]
    expected = F.cross_entropy(module(images), targets).item()
    assert run.callback_metrics["train_loss"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("network", ["lenet5", "convnet"])
def test_two_steps_on_images(tmp_path, network):
    data = TensorDataset(torch.randn(8, 1, 28, 28), torch.arange(8))
    run = trainer(tmp_path, max_steps=2)
    run.fit(ImageClassifier(network), DataLoader(data, batch_size=4))
    assert run.global_step == 2


@pytest.mark.parametrize(
    ("name", "cls", "kwargs"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 5e-4}),
        ("adam", torch.optim.Adam, {"betas": (0.8, 0.99)}),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.01}),
    ],
)
def test_optimizers_take_their_arguments(name, cls, kwargs):
    optimizer = ImageClassifier(**SMALL, optimizer=name, lr=0.3, optimizer_kwargs=kwargs).configure_optimizers()
    assert type(optimizer) is cls
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in ("lr", *kwargs)} == {"lr": 0.3, **kwargs}


def test_cosine_falls_over_the_epochs_of_the_trainer(tmp_path):
    got = rates(tmp_path, scheduler="cosine", scheduler_kwargs={"eta_min": 0.2}, max_epochs=4)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4) for _ in range(3)]
    assert got == pytest.approx(expected, rel=1e-12)


def test_cosine_falls_over_the_steps_where_only_they_are_limited(tmp_path):
    got = rates(tmp_path, scheduler="cosine", max_steps=5)
    assert got == pytest.approx([(1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)], rel=1e-12)


def test_cosine_over_given_epochs(tmp_path):
    got = rates(tmp_path, scheduler="cosine", scheduler_kwargs={"T_max": 2}, max_steps=6)
    assert got == pytest.approx([1.0] * 3 + [0.5] * 3, rel=1e-12)


def test_step_multiplies_at_its_milestones(tmp_path):
    got = rates(tmp_path, scheduler="step", scheduler_kwargs={"milestones": [1, 3], "gamma": 0.5}, max_epochs=4)
    assert got == [1.0] * 3 + [0.5] * 6 + [0.25] * 3


@pytest.mark.parametrize("length", [{"max_epochs": 4}, {"max_steps": 4}])
def test_step_falls_at_half_and_three_quarters_by_default(tmp_path, length):
    got = rates(tmp_path, scheduler="step", **length)
    repeats = len(got) // 4
    assert got == pytest.approx([r for r in (1.0, 1.0, 0.1, 0.01) for _ in range(repeats)], rel=1e-12)


@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_steps": 6}])
def test_one_cycle_ends_with_the_training(tmp_path, length):
    got = rates(tmp_path, scheduler="one_cycle", scheduler_kwargs={"pct_start": 0.5}, **length)
    assert len(got) == 6
    assert got[0] == pytest.approx(1 / 25, rel=1e-12)
    assert max(got) == pytest.approx(1.0, rel=1e-12)
    assert got[-1] == pytest.approx(1 / 25 / 1e4, rel=1e-9)


def test_one_cycle_keeps_the_momentum(tmp_path):
    module = ImageClassifier(**SMALL, optimizer="sgd", scheduler="one_cycle")
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, loader())
    assert run.optimizers[0].param_groups[0]["momentum"] == 0


@pytest.mark.parametrize("scheduler", ["none", "cosine", "step", "one_cycle"])
def test_checkpoints_load_alone_under_weights_only(tmp_path, scheduler):
    module = ImageClassifier(**SMALL, scheduler=scheduler, init_seed=5)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "two.ckpt")
    torch.load(tmp_path / "two.ckpt", weights_only=True)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "two.ckpt", weights_only=True)
    assert loaded.hparams == module.hparams
    for key, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    def fit(max_epochs, ckpt_path=None):
        module = ImageClassifier(**SMALL, scheduler="cosine", scheduler_kwargs={"T_max": 3})
        run = trainer(tmp_path, max_epochs=max_epochs)
        run.fit(module, loader(), ckpt_path=ckpt_path)
        return run, nn.utils.parameters_to_vector(module.parameters())

    whole = fit(2)[1]
    fit(1)[0].save_checkpoint(tmp_path / "one.ckpt")
    assert torch.equal(fit(2, tmp_path / "one.ckpt")[1], whole)


class Linear(ImageClassifier):
    def build_network(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(**self.hparams["network_kwargs"]))


class TwoLayers(ImageClassifier):
    def __init__(self, hidden=4, **kwargs):
        super().__init__(**kwargs)

    def build_network(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(6, self.hparams["hidden"]), nn.Linear(self.hparams["hidden"], 3))


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [(Linear, {"network_kwargs": {"in_features": 6, "out_features": 3}}), (TwoLayers, {"hidden": 5})],
)
def test_own_networks_train_and_load(tmp_path, cls, kwargs):
    module = cls(**kwargs, num_classes=3)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "own.ckpt")
    loaded = cls.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    images = torch.ones(2, 1, 2, 3)
    assert torch.equal(loaded(images), module(images))


def test_own_networks_have_their_seed_too():
    first, again, other = (TwoLayers(init_seed=seed).network[1].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_construction_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    ImageClassifier()
    assert torch.equal(torch.get_rng_state(), before)


def test_same_seed_same_weights_whatever_the_global_seed():
    vectors = []
    for global_seed, init_seed in ((0, 7), (1, 7), (1, 8)):
        torch.manual_seed(global_seed)
        vectors.append(nn.utils.parameters_to_vector(ImageClassifier(init_seed=init_seed).parameters()))
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])


def test_construction_follows_the_default_device():
    with torch.device("meta"):
        module = ImageClassifier("alexnet", num_classes=200)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"network": "lenet"}, "network must be one of mlp, .*, got 'lenet'"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, adamw, got 'lion'"),
        ({"scheduler": "linear"}, "scheduler must be one of none, cosine, step, one_cycle, plateau, got 'linear'"),
    ],
)
def test_unknown_names_raise_and_list_the_choices(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": np.float64(0.1)}, "lr must be a plain number.*got float64.*convert it"),
        ({"network_kwargs": {"hidden_sizes": [np.int64(3)]}}, r"network_kwargs\['hidden_sizes'\]\[0\] must.*int64"),
    ],
)
def test_values_that_checkpoints_cannot_hold_raise(kwargs, message):
    with pytest.raises(TypeError, match=message):
        ImageClassifier("mlp", **kwargs)


def test_schedules_need_an_end(tmp_path):
    module = ImageClassifier(**SMALL, scheduler="one_cycle")
    with pytest.raises(ValueError, match=r"scheduler='one_cycle' needs the length .* set Trainer\(max_steps=...\)"):
        trainer(tmp_path, max_epochs=-1).fit(module, loader())


def test_squared_error_of_one_hot_classes_and_of_real_targets(tmp_path):
    module = ImageClassifier(**SMALL, loss="squared_error")
    images, targets = loader().dataset.tensors
    with torch.no_grad():
        logits = module(images)
        expected = ((logits - F.one_hot(targets, 3)) ** 2).mean()
        torch.testing.assert_close(module.loss(logits, targets), expected)
        torch.testing.assert_close(module.loss(logits, 2 * logits), (logits**2).mean())
    real = DataLoader(TensorDataset(images, torch.randn(len(images), 3)), batch_size=8)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, real, real)
    assert "val_loss" in run.callback_metrics
    assert "val_acc" not in run.callback_metrics


def test_plateau_waits_for_patience_epochs_without_progress(tmp_path):
    """A learning rate of 0 never makes progress: the rate is multiplied after the first epoch and `patience` more."""

    class Still(ImageClassifier):
        def configure_optimizers(self):
            found = super().configure_optimizers()
            self.seen = []
            return found

        def on_train_epoch_start(self):
            self.seen.append(self.optimizers().param_groups[0]["lr"])

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer_closure()

    for kwargs in ({}, {"monitor": "train_loss_epoch"}):
        module = Still(
            **SMALL,
            optimizer="sgd",
            lr=1.0,
            scheduler="plateau",
            scheduler_kwargs={"patience": 1, "factor": 0.5, **kwargs},
        )
        run = trainer(tmp_path, max_epochs=6)
        run.fit(module, loader(), loader())
        assert module.seen == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_the_training_loss_of_an_epoch_is_the_mean_over_its_examples(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module := ImageClassifier(**SMALL, lr=0.0), loader())
    images, targets = loader().dataset.tensors
    expected = F.cross_entropy(module(images), targets).item()
    assert run.callback_metrics["train_loss_epoch"].item() == pytest.approx(expected, rel=1e-6)
