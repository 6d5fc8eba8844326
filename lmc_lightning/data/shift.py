"""Training data that differ from the set they come from: wrong labels, noise for images, rare classes."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lmc_lightning.data.images import LabelledExamples
from lmc_lightning.data.order import derived_generator


@dataclass(frozen=True)
class DataShift:
    """What is done to the training examples; validation and test data stay as they are.

    Which examples are hit follows from ``seed`` and their place in the set alone, and grows with the shares: what is
    wrong at 10 % is wrong in the same way at 20 %. The subset itself is chosen by the data module's
    ``max_train_examples`` and ``subset_seed``; initialisation, order and shift have seeds of their own.

    Args:
        label_noise: share of the labels that are replaced by another class, each equally likely.
        poison: share of the labels that are replaced by the next class, c → c + 1 mod C, the same mistake each time.
        image_noise: share of the inputs that are replaced by Gaussian noise of the set's mean and standard deviation
            (arXiv 1611.03530), with their labels kept.
        imbalance: size of the most over that of the least frequent class, at least 1; class c keeps a share
            ``imbalance^(−c/(C−1))`` of its examples (arXiv 1901.05555).
        clean: that many examples, the first of the subset, are left alone: a small clean set with shifted data added.
        seed: of all of this.

    Raises:
        ValueError: a share outside [0, 1], shares of wrong labels that sum to more than 1, an imbalance below 1.
    """

    label_noise: float = 0.0
    poison: float = 0.0
    image_noise: float = 0.0
    imbalance: float = 1.0
    clean: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("label_noise", "poison", "image_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a share in [0, 1], got {getattr(self, name)}.")
        if self.label_noise + self.poison > 1:
            raise ValueError(
                f"`label_noise` and `poison` are shares of the same labels: {self} asks for more than all."
            )
        if self.imbalance < 1 or self.clean < 0:
            raise ValueError(
                f"`imbalance` is at least 1 and `clean` at least 0, got {self.imbalance} and {self.clean}."
            )

    def __str__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"DataShift({', '.join(f'{name}={value}' for name, value in changed.items())})"

    def apply(self, source: LabelledExamples, rows: Tensor, num_classes: int) -> tuple[LabelledExamples, Tensor]:
        """The shifted training set and its rows.

        Args:
            source: the official training set ``(N, …)``, which stays as it is.
            rows: the subset ``(n,)``, in the order in which it was chosen.
            num_classes: C.

        Raises:
            ValueError: labels that are no classes, or images that are read from files at every use.
        """
        clean, rest = rows[: self.clean], rows[self.clean :]
        rest = self._imbalanced(source.labels, rest, num_classes)
        images, labels = source.images, source.labels
        if self.image_noise:
            images = self._with_noise(images, rows, rest)
        if self.label_noise or self.poison:
            labels = self._mislabelled(labels, rest, num_classes)
        return LabelledExamples(images, labels), torch.cat([clean, rest])

    def _draw(self, size: int, stream: str) -> Tensor:
        """A number in [0, 1) for each example of the set, ``(N,)``."""
        return torch.rand(size, generator=derived_generator(self.seed, "shift", stream), dtype=torch.float64)

    def _imbalanced(self, labels: Tensor, rows: Tensor, num_classes: int) -> Tensor:
        if self.imbalance == 1:
            return rows
        _require_classes(labels)
        keep = torch.zeros(len(rows), dtype=torch.bool)
        for c in range(num_classes):
            members = (labels[rows] == c).nonzero().squeeze(1)
            keep[members[: math.ceil(len(members) * self.imbalance ** (-c / max(1, num_classes - 1)))]] = True
        return rows[keep]

    def _mislabelled(self, labels: Tensor, rows: Tensor, num_classes: int) -> Tensor:
        _require_classes(labels)
        chance = self._draw(len(labels), "labels")[rows]
        # One number per example for both: those below label_noise get another class, the highest ones the next class.
        offsets = 1 + (self._draw(len(labels), "classes")[rows] * (num_classes - 1)).long()
        shifted = torch.where(chance < self.label_noise, offsets, (chance >= 1 - self.poison).long())
        labels = labels.clone()
        labels[rows] = (labels[rows] + shifted.to(labels)) % num_classes
        return labels

    def _with_noise(self, images: object, rows: Tensor, hit: Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            raise ValueError("`image_noise` needs images in memory, these are read from files. Raise `memory_limit`.")
        chosen = hit[self._draw(len(images), "images")[hit] < self.image_noise].sort().values
        values = images[rows].float()
        mean, std = values.mean(), values.std()
        images = images.clone()
        for row in chosen.tolist():  # each from a stream of its own, so that the share does not change the noise
            generator = derived_generator(self.seed, "shift", "noise", row)
            noise = mean + std * torch.randn(images.shape[1:], generator=generator).to(mean)
            images[row] = noise if images.is_floating_point() else noise.round().clamp(0, 255).to(images.dtype)
        return images


def _require_classes(labels: Tensor) -> None:
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(f"Wrong labels and rare classes need integer labels (N,), got {labels.dtype} {labels.shape}.")
