"""What each of two processes does in the tests of distributed runs."""

import random
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lmc_lightning import CheckpointBranching, HessianSpectrum, InterpolationBarrier, MeasurementCallback, Sharpness
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.core.collective import Collective, ProcessGroup
from lmc_lightning.core.glassbox import seed_everything
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.batchnorm import running_statistics
from lmc_lightning.recording import Measurement, Quantity
from tests.zoo.fingerprint import sha256

NUM_BATCHES = 10
BATCH_SIZES = (22, 8)
"""Of each process: 220 and 80 examples."""


def examples(num: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num, 6, generator=generator)
    return inputs, (inputs @ torch.tensor([1.0, -1, 2, 0, 0, 1]) > 0).long() + (inputs[:, 3] > 0.5).long()


class Net(pl.LightningModule):
    """A small classifier with batches of another size on each process."""

    def __init__(self, *, batch_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("logged", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self) -> Any:
        size = BATCH_SIZES[self.global_rank]
        data = TensorDataset(*examples(NUM_BATCHES * size, seed=self.global_rank))
        return DataLoader(data, batch_size=size, shuffle=True)


class NetWithValidation(Net):
    def val_dataloader(self) -> Any:
        size = BATCH_SIZES[self.global_rank]
        return DataLoader(TensorDataset(*examples(3 * size, seed=5 + self.global_rank)), batch_size=size)


class Data(pl.LightningDataModule):
    """Data with a probe set of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.data = TensorDataset(*examples(120, seed=3))

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=10, shuffle=True)

    def probe_batches(self, split: str, num_examples: int, seed: int) -> list[Any]:
        return [list(examples(num_examples, seed=9))]


def callbacks(*, density: bool = False, **common: Any) -> list[MeasurementCallback]:
    """One of each kind, small, with every number that can be compared."""
    spectrum = HessianSpectrum(
        num_eigenvalues=1, num_negative=0, num_probes=2, num_steps=4, max_products=60, density=density, **common
    )
    return [spectrum, Sharpness(num_samples=2, **common)]


def make_trainer(ours: list[Any], **options: Any) -> pl.Trainer:
    root = Path(options.pop("root", "root"))
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "logger": CSVLogger(root, version=0),
        "strategy": DDPStrategy(timeout=timedelta(seconds=30), process_group_backend="gloo"),
        "default_root_dir": root,
        "enable_checkpointing": False,
    }
    return pl.Trainer(
        accelerator="cpu",
        devices=2,
        callbacks=ours,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        **{**defaults, **options},
    )


def fit(
    rank: int, module: Any, ours: list[Any], datamodule: Any = None, ckpt_path: str | None = None, **options: Any
) -> pl.Trainer:
    """A run on both processes from the weights that the parent can make too."""
    trainer = make_trainer(ours, **options)
    seed_everything(11 + rank)
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return trainer


def seeded(kind: type[Net] = Net, **options: Any) -> Net:
    """The module that all processes start from."""
    torch.manual_seed(7)
    return kind(**options)


def fingerprint(trainer: Any, module: Any) -> str:
    streams = [random.getstate(), np.random.get_state()[1:], torch.get_rng_state()]  # noqa: NPY002
    optimizers = [o.state_dict() for o in trainer.optimizers]
    return sha256([module.state_dict(), optimizers, streams, dict(trainer.callback_metrics), list(vars(module))])


def plain(ours: list[MeasurementCallback]) -> list[dict[str, Any]]:
    """All records, without what depends on the machine, on a process's own share or on where a fit began."""
    table = [vars(record) for callback in ours for record in callback.results]
    own = ("seconds", "peak_bytes", "num_chunks", "num_cached", "memory_budget", "self_check")
    return [{**row, "evidence": {k: v for k, v in row["evidence"].items() if k not in own}} for row in table]


# -- what the processes do -------------------------------------------------------------------------------------------


def attached(rank: int) -> dict[str, Any]:
    """A run without and one with our callbacks, with everything random in them."""
    prints = []
    for ours in (
        [],
        [*callbacks(num_examples=400, density=True), InterpolationBarrier(reference="initial", num_points=3)],
    ):
        module = seeded(NetWithValidation, batch_norm=True, dropout=0.2)
        root = "with" if ours else "without"
        trainer = fit(rank, module, ours, root=root)
        prints.append(fingerprint(trainer, module))
    return {"fingerprints": prints, "records": plain(ours), "failures": [r for c in ours for r in c.failures]}


SOURCES = {"captured": 300, "datamodule": 75, "probe_dataloader": 75}
"""Where probe sets come from, and how many examples the processes then have together."""


def unions(rank: int, precisions: dict[str, str]) -> dict[str, Any]:
    return {source: union(rank, source, precision) for source, precision in precisions.items()}


def union(rank: int, source: str, precision: str) -> dict[str, Any]:
    """Measures the start and the end of a run on a probe set that the processes share."""
    module, datamodule, common = seeded(), None, {"num_examples": 440}
    if source == "datamodule":
        datamodule, common = Data(), {"num_examples": 75}
    elif source == "probe_dataloader":
        loader = DataLoader(TensorDataset(*examples(100, seed=4)), batch_size=32)
        common = {"num_examples": 75, "probe_dataloader": loader}
    ours = callbacks(epochs=[0, 1], **common)
    fit(rank, module, ours, datamodule, precision=precision, max_epochs=1, root=source)
    return {"records": plain(ours), "end": module.state_dict()}


def batch_norm(rank: int) -> dict[str, Any]:
    """A barrier whose BatchNorm statistics are recomputed from both processes' examples."""
    module = seeded(NetWithValidation, batch_norm=True)
    ours = InterpolationBarrier(
        reference="initial", num_points=5, num_examples=440, epochs=[2], metrics={"logged": "min"}
    )
    fit(rank, module, [ours], precision="64-true")
    curves = {key: result.values for (key, _), result in ours.barriers.items()}
    return {"curves": curves, "failures": ours.failures, "end": module.state_dict()}


class Detour(nn.Module):
    """Has a layer that only flagged batches reach, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.flagged, self.never = (nn.BatchNorm1d(6) for _ in range(3))

    def forward(self, inputs: Tensor, flag: Tensor) -> Tensor:
        hidden = self.always(inputs)
        return (self.flagged(2 * hidden + 1) if flag else hidden).square().mean()


def detour_statistics(processes: tuple[int, ...], collective: Collective) -> dict[str, Tensor]:
    """Statistics of the batches of some processes, of which only process 0 has flagged ones."""
    batches = [(examples(BATCH_SIZES[p], seed=p + b)[0], torch.tensor(p == 0)) for p in processes for b in range(2)]
    options: dict[str, Any] = {"mode": "train", "keep_batches": True, "dtype": torch.float64, "collective": collective}
    objective = Objective(Detour(), batches, lambda module, batch: module(*batch), **options)
    return running_statistics(objective, objective.theta())


def detour(rank: int) -> dict[str, Tensor]:
    """BatchNorm layers that not every process runs."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    return detour_statistics((rank,), ProcessGroup(torch.device("cpu")))


def synchronized_products(processes: tuple[int, ...], norm: nn.Module, collective: Collective) -> dict[str, Tensor]:
    """Loss, gradient and a Hessian product with statistics of each batch; process 1 has one batch more."""
    module = nn.Sequential(nn.Linear(6, 3), norm, nn.Linear(3, 1))
    for index, parameter in enumerate(module.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    batches = [examples(BATCH_SIZES[p], seed=p + b)[0] for p in processes for b in range(2 + p)]
    options: dict[str, Any] = {"mode": "train", "dtype": torch.float64, "collective": collective}
    objective = Objective(module, batches, lambda m, batch: m(batch).square().mean(), **options, keep_batches=True)
    theta = objective.theta()
    product = objective.hvp(theta)(torch.ones_like(theta))
    return {"loss": objective.loss(theta), "gradient": objective.grad(theta), "product": product}


def synchronized(rank: int) -> dict[str, Tensor]:
    """SyncBatchNorm, which would ask the other process in every forward pass."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    return synchronized_products((rank,), nn.SyncBatchNorm(3), ProcessGroup(torch.device("cpu")))


def uneven_capture(rank: int) -> dict[str, Any]:
    """A probe set that process 0 has after 3 batches and process 1 after 7, with visits due meanwhile."""
    module = seeded()
    ours = Sharpness(num_samples=2, num_examples=100, steps=[0, 2, 5, 9])
    probes = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            probes.append([r.step for r in ours.results if r.name == "sharpness/gradient_norm"])

    fit(rank, module, [ours, Watch()], max_epochs=1)
    return {"records": plain([ours]), "seen": probes}


class Unlucky(MeasurementCallback):
    """Fails on process 1, at each step in another place."""

    kind = "unlucky"

    def __init__(self, rank: int, **common: Any) -> None:
        super().__init__(num_examples=8, **common)
        self.rank = rank
        self.loss_fn = self._loss
        self.place = ""

    def _loss(self, module: Any, batch: Any) -> Tensor:
        self._perhaps("loss")
        return F.cross_entropy(module.net(batch[0]), batch[1])

    def _perhaps(self, place: str) -> None:
        if self.rank == 1 and self.place == place:
            raise ValueError(f"no luck with the {place}")

    def examine(self, *args: Any, step: int = 0, **options: Any) -> Measurement:
        self.place = {2: "preparation", 4: "loss", 6: "middle", 8: "end"}.get(step, "")
        self._perhaps("preparation")
        return super().examine(*args, step=step, **options)

    def measure(self, visit: Visit) -> Measurement:
        loss = visit.objective.evaluate(visit.theta).loss
        self._perhaps("middle")
        norm = float(visit.objective.grad(visit.theta).norm())
        self._perhaps("end")
        return Measurement((Quantity("unlucky/loss", loss), Quantity("unlucky/norm", norm)))


def failing(rank: int) -> dict[str, Any]:
    """A measurement that fails on process 1 only, beside one that does not."""
    prints, unlucky, lucky = (
        [],
        Unlucky(rank, every_n_train_steps=2),
        Sharpness(num_samples=2, num_examples=8, every_n_train_steps=2),
    )
    for ours in ([], [unlucky, lucky]):
        module = seeded(dropout=0.2)
        trainer = fit(rank, module, ours, max_epochs=1)
        prints.append(fingerprint(trainer, module))
    return {"fingerprints": prints, "unlucky": plain([unlucky]), "lucky": plain([lucky])}


def refused(rank: int) -> dict[str, str]:
    """What ends a run on both processes, and how."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    def sharding() -> Any:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)

    runs: dict[str, tuple[Any, dict[str, Any]]] = {
        "raise": (Unlucky(rank, steps=[4], on_error="raise"), {}),
        "loader": (Sharpness(probe_dataloader=Broken(rank)), {}),
        "branching": (CheckpointBranching(epochs=[0]), {"strategy": sharding()}),
        "sharded": (Sharpness(), {"strategy": sharding()}),
    }
    return {name: outcome(rank, callback, options) for name, (callback, options) in runs.items()}


class Gathering(Net):
    """Contrasts its examples with those of the other process."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        everywhere = self.all_gather(self.net(batch[0]).mean(0), sync_grads=True)
        return super().training_step(batch, batch_idx) + everywhere.square().mean()


def gathering(rank: int) -> list[str]:
    """A step that would wait for the other process, which may have fewer chunks."""
    ours = Sharpness(num_samples=2, num_examples=440, epochs=[1])
    fit(rank, seeded(Gathering), [ours], max_epochs=1)
    return [r.evidence["reason"] for r in ours.failures]


def monitored(rank: int) -> dict[str, Any]:
    """Early stopping by a number that the callback exposes."""
    ours = Sharpness(num_samples=2, num_examples=100, epochs=[1, 3], expose=True)
    stop = EarlyStopping("sharpness/gradient_norm", patience=2, min_delta=100.0, check_on_train_epoch_end=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*sync_dist.*")
        trainer = fit(rank, seeded(), [ours, stop], max_epochs=9)
    value = float(trainer.callback_metrics["sharpness/gradient_norm"])
    return {"value": value, "records": plain([ours]), "epochs": trainer.current_epoch}


def resumed(rank: int) -> dict[str, Any]:
    """A run in one piece, and one that is resumed after its first epoch, on captured examples."""
    tables = {}
    for root, ends in (("whole", [2]), ("pieces", [1, 2])):
        for end in ends:
            ours = callbacks(num_examples=100)
            checkpoint = ModelCheckpoint(f"{root}/checkpoints", save_last=True)
            path = f"{root}/checkpoints/last.ckpt" if end > ends[0] else None
            options = {"root": root, "max_epochs": end, "enable_checkpointing": True}
            fit(rank, seeded(Ordered), [*ours, checkpoint], ckpt_path=path, **options)
            tables[root] = plain(ours)
    return tables


class Ordered(Net):
    """Needs no random stream, which Lightning does not restore."""

    def train_dataloader(self) -> Any:
        size = BATCH_SIZES[self.global_rank]
        return DataLoader(TensorDataset(*examples(NUM_BATCHES * size, seed=self.global_rank)), batch_size=size)


class Broken:
    """A loader that fails on process 1."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Any:
        if self.rank == 1:
            raise OSError("no such file")
        return iter([list(examples(8, seed=0))])


def outcome(rank: int, callback: Any, options: dict[str, Any]) -> str:
    try:
        fit(rank, seeded(), [callback], max_epochs=1, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "completed"


class ShardedNet(Net):
    """Its parameters are spread over the processes, as by FSDP2."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]


def sharded(rank: int) -> str:
    """A run with sharded parameters, which no objective takes without a word."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    module = seeded(ShardedNet)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    fit(rank, module, [], strategy=strategy, max_epochs=1)
    try:
        Objective(module, [examples(8, seed=0)], lambda m, batch: F.cross_entropy(m.net(batch[0]), batch[1]))
    except ValueError as error:
        return str(error)
    return "measured"
