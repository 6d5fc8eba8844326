"""Your own LightningModule and loader, unchanged, and the callbacks that watch it.

python examples/attach.py
python examples/attach.py --small  # one epoch
"""

import argparse

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lmc_lightning import HessianSpectrum, InterpolationBarrier, Sharpness, summarize


class Regression(pl.LightningModule):
    """A module as you may have it: nothing in it knows of the callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.net(batch["x"]).squeeze(1), batch["y"])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def as_dict(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {"x": torch.stack([x for x, _ in examples]), "y": torch.stack([y for _, y in examples])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()

    pl.seed_everything(0)
    x = torch.randn(1000, 8)
    y = torch.sin(x @ torch.randn(8)) + 0.1 * torch.randn(1000)
    loader = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True, collate_fn=as_dict)

    callbacks = [
        HessianSpectrum(every_n_train_steps=20, num_examples=500, num_eigenvalues=2, num_probes=2 if args.small else 8),
        Sharpness(every_n_train_steps=20, num_examples=500),
        InterpolationBarrier(reference="initial", num_examples=500),
    ]
    trainer = pl.Trainer(
        max_epochs=1 if args.small else 5,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(Regression(), loader)
    print(summarize(callbacks))


if __name__ == "__main__":
    main()
