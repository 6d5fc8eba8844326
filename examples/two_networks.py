"""Two plain networks from different seeds, without a trainer: their sharpness, and the barrier between them.

python examples/two_networks.py
python examples/two_networks.py --small  # one epoch each
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning import HessianSpectrum, Sharpness, interpolation_barrier, measure
from lmc_lightning.data import build_datamodule
from lmc_lightning.models import build_network


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(module(images), labels)


def train(batches: list[tuple[Tensor, Tensor]], epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = build_network("mlp", hidden_sizes=[64], in_features=784)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for index in torch.randperm(len(batches)).tolist():
            optimizer.zero_grad()
            loss_fn(network, batches[index]).backward()
            optimizer.step()
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    epochs = 1 if parser.parse_args().small else 20

    digits = build_datamodule("digits")
    images, labels = (torch.cat(parts) for parts in zip(*digits.probe_batches("train"), strict=True))
    batches = list(zip(images.split(64), labels.split(64), strict=True))
    networks = [train(batches, epochs, seed) for seed in (0, 1)]

    for seed, network in enumerate(networks):
        found = measure(network, batches, [HessianSpectrum(num_probes=2), Sharpness()], loss_fn=loss_fn)
        print(f"seed {seed}: λ_max {found['hessian/lambda_max']:.3g}, worst case {found['sharpness/worst_case']:.3g}")
    found = interpolation_barrier(*networks, digits.probe_batches("val"), loss_fn=loss_fn)
    low, high = found.interval()
    print(f"loss barrier on validation data {found.barrier:.3g}, 95 % interval {low:.3g} to {high:.3g}")


if __name__ == "__main__":
    main()
