"""Small sets that are made, not read: two moons, a swiss roll, modular addition, a teacher's answers."""

import math
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmc_lightning.data.images import LabelledExamples
from lmc_lightning.data.order import derive_seed, derived_generator
from lmc_lightning.data.replayable import ReplayableDataModule
from lmc_lightning.data.sources import Splits


class SyntheticDataModule(ReplayableDataModule):
    """A set of float32 features ``(N, D)`` with labels ``(N,)`` or targets, made from ``data_seed``.

    Args:
        num_examples: of the training set, validation included.
        num_test: of the test set, drawn apart.
        data_seed: of the examples themselves; splits, subsets and order have seeds of their own.
        val_fraction: 0 by default: all are trained on, and the test set validates.
        **kwargs: of ``ReplayableDataModule``.
    """

    num_features: int

    def __init__(
        self,
        num_examples: int = 1000,
        *,
        num_test: int = 1000,
        data_seed: int = 0,
        val_fraction: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(val_fraction=val_fraction, **kwargs)
        self.num_examples, self.num_test, self.data_seed = num_examples, num_test, data_seed

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape of one example."""
        return (self.num_features,)

    def transform(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    @abstractmethod
    def draw(self, size: int, seed: int) -> LabelledExamples:
        """``size`` examples, a function of ``seed``."""

    def read_splits(self) -> Splits:
        """A training and a test set, independent of each other."""
        test = self.draw(self.num_test, derive_seed(self.data_seed, "test") % 2**32)
        return {"train": self.draw(self.num_examples, self.data_seed), "test": test}


class TwoMoonsDataModule(SyntheticDataModule):
    """scikit-learn's two interleaved half circles, 2 features, 2 classes.

    Args:
        num_examples: of the training set.
        noise: standard deviation of the points around their arcs.
        **kwargs: of ``SyntheticDataModule``; ``data_seed=42`` gives ``make_moons(random_state=42)`` to float32.
    """

    dataset_name = "two_moons"
    num_features, num_classes = 2, 2

    def __init__(self, num_examples: int = 200, *, noise: float = 0.2, **kwargs: Any) -> None:
        super().__init__(num_examples, **kwargs)
        self.noise = noise

    def draw(self, size: int, seed: int) -> LabelledExamples:
        """Points of both moons, shuffled."""
        from sklearn.datasets import make_moons  # scikit-learn is slow to import and needed here only

        points, labels = make_moons(size, noise=self.noise, random_state=seed)
        return LabelledExamples(torch.from_numpy(points.astype(np.float32)), torch.from_numpy(labels).long())


class SwissRollDataModule(SyntheticDataModule):
    """Two arms of one spiral in the plane, 2 features, 2 classes: radius t, angle 2π·turns·t + π·class, t ~ U(.1, 1).

    Args:
        num_examples: of the training set.
        turns: of each arm.
        noise: standard deviation of the points around their arms.
        **kwargs: of ``SyntheticDataModule``.
    """

    dataset_name = "swiss_roll"
    num_features, num_classes = 2, 2

    def __init__(self, num_examples: int = 400, *, turns: float = 1.5, noise: float = 0.02, **kwargs: Any) -> None:
        super().__init__(num_examples, **kwargs)
        self.turns, self.noise = turns, noise

    def draw(self, size: int, seed: int) -> LabelledExamples:
        """Points of both arms, in turn."""
        generator = derived_generator(seed, "swiss_roll")
        labels = torch.arange(size) % 2
        radius = 0.1 + 0.9 * torch.rand(size, generator=generator)
        angle = 2 * math.pi * self.turns * radius + math.pi * labels
        points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
        return LabelledExamples(points + self.noise * torch.randn(size, 2, generator=generator), labels)


class ModularAdditionDataModule(SyntheticDataModule):
    """a + b mod p for all p² pairs, both one-hot: 2p features, p classes (arXiv 2201.02177, 2301.02679).

    Trained long under squared error on one-hot targets (``ImageClassifier(loss="squared_error")``), a two-layer network
    fits the training pairs first and the others much later.

    Args:
        p: the modulus.
        train_fraction: share of the pairs that are trained on; the others are the test set.
        **kwargs: of ``SyntheticDataModule``; ``data_seed`` splits the pairs, the numbers of examples follow.
    """

    dataset_name = "modular_addition"

    def __init__(self, p: int = 97, *, train_fraction: float = 0.5, **kwargs: Any) -> None:
        if not 0 < train_fraction < 1:
            raise ValueError(f"`train_fraction` is a share of the pairs in (0, 1), got {train_fraction}.")
        num_train = round(train_fraction * p**2)
        super().__init__(num_train, num_test=p**2 - num_train, **kwargs)
        self.p, self.num_features, self.num_classes = p, 2 * p, p

    def draw(self, size: int, seed: int) -> LabelledExamples:
        """The first pairs of a permutation of all."""
        return self._pairs(torch.randperm(self.p**2, generator=derived_generator(seed, "pairs"))[:size])

    def read_splits(self) -> Splits:
        """The pairs to train on, and all others."""
        order = torch.randperm(self.p**2, generator=derived_generator(self.data_seed, "pairs"))
        chosen = {"train": order[: self.num_examples], "test": order[self.num_examples :]}
        return {split: self._pairs(index) for split, index in chosen.items()}

    def _pairs(self, index: Tensor) -> LabelledExamples:
        a, b = index // self.p, index % self.p
        features = torch.cat([F.one_hot(a, self.p), F.one_hot(b, self.p)], 1).float()
        return LabelledExamples(features, (a + b) % self.p)


class TeacherStudentDataModule(SyntheticDataModule):
    """What a random ReLU network of one hidden layer answers to Gaussian inputs.

    The teacher's weights are standard normal over the square root of the fan-in, its biases 0. With ``num_classes`` the
    labels are its largest outputs; with ``num_classes=0`` the targets are its ``num_outputs`` outputs, float32.

    Args:
        num_examples: of the training set.
        num_features: D.
        hidden: width of the teacher.
        num_classes: 0 for regression.
        num_outputs: of a regression.
        noise: standard deviation added to the targets of a regression.
        teacher_seed: of the teacher's weights.
        **kwargs: of ``SyntheticDataModule``.
    """

    dataset_name = "teacher_student"

    def __init__(
        self,
        num_examples: int = 1000,
        *,
        num_features: int = 10,
        hidden: int = 5,
        num_classes: int = 0,
        num_outputs: int = 1,
        noise: float = 0.0,
        teacher_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_examples, **kwargs)
        self.num_features, self.hidden, self.num_classes, self.noise = num_features, hidden, num_classes, noise
        self.num_outputs = num_classes or num_outputs
        self.teacher_seed = teacher_seed

    @property
    def teacher(self) -> nn.Sequential:
        """The network that answers, ``(B, D) -> (B, outputs)``."""
        sizes = [(self.num_features, self.hidden), (self.hidden, self.num_outputs)]
        # skip_init: the usual initialisation would draw from the global generator.
        first, last = (nn.utils.skip_init(nn.Linear, *size) for size in sizes)
        generator = derived_generator(self.teacher_seed, "teacher")
        with torch.no_grad():
            for layer in (first, last):
                layer.weight.normal_(generator=generator).div_(math.sqrt(layer.in_features))
                layer.bias.zero_()
        return nn.Sequential(first, nn.ReLU(), last)

    def draw(self, size: int, seed: int) -> LabelledExamples:
        """Gaussian inputs and the teacher's answers."""
        generator = derived_generator(seed, "inputs")
        inputs = torch.randn(size, self.num_features, generator=generator)
        with torch.no_grad():
            answers = self.teacher(inputs)
        if self.num_classes:
            return LabelledExamples(inputs, answers.argmax(1))
        return LabelledExamples(inputs, answers + self.noise * torch.randn(answers.shape, generator=generator))
