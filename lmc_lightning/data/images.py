"""Labelled images held as uint8, and their way into a float batch: augment, resize, normalise."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lmc_lightning.data.order import EpochOrder, derived_generator


@dataclass(frozen=True)
class ImageFiles:
    """Image files that are decoded when they are indexed, for sets that do not fit in memory.

    Args:
        paths: the files.
        edge: height and width after decoding [pixels].
        resize: the shorter side becomes this before the centre is cropped to ``edge``; None: files have that size.
    """

    paths: tuple[Path, ...]
    edge: int
    resize: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The chosen images, uint8 ``(B, 3, edge, edge)``."""
        images = torch.empty(len(indices), 3, self.edge, self.edge, dtype=torch.uint8)
        paths = [self.paths[i] for i in indices.tolist()]
        for row, image in enumerate(self._decode_all(paths)):
            images[row] = image
        return images

    def _decode_all(self, paths: Sequence[Path]) -> Iterator[Tensor]:
        # Pillow lets go of the interpreter lock while it decodes and resizes, so threads do what worker processes
        # would. Files of the final size are small: there threads cost twice the time that decoding takes.
        if self.resize is None:
            yield from map(self.decode, paths)
        else:
            with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
                yield from pool.map(self.decode, paths)

    def decode(self, path: Path) -> Tensor:
        """One image, uint8 ``(3, edge, edge)``."""
        with Image.open(path) as file:
            image = file.convert("RGB")
        if self.resize is not None:
            image = _resize_and_crop(image, self.resize, self.edge)
        if image.size != (self.edge, self.edge):
            raise ValueError(f"{path} has {image.size[0]}x{image.size[1]} pixels, expected {self.edge}x{self.edge}.")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def read_all(self) -> Tensor:
        """All images, uint8 ``(N, 3, edge, edge)``."""
        return self[torch.arange(len(self))]


def _resize_and_crop(image: Image.Image, resize: int, edge: int) -> Image.Image:
    # rounds as torchvision's Resize and CenterCrop do
    width, height = image.size
    shorter = min(width, height)
    width, height = (resize * width) // shorter, (resize * height) // shorter
    left, top = round((width - edge) / 2), round((height - edge) / 2)
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + edge, top + edge))


class LabelledExamples:
    """Images uint8 ``(N, C, H, W)`` or features ``(N, D)``, and labels ``(N,)`` or targets, never edited.

    Deep copies share them.
    """

    def __init__(self, images: Tensor | ImageFiles, labels: Tensor) -> None:
        if len(images) != len(labels):
            raise ValueError(f"Expected one label per image, got {len(images)} images and {len(labels)} labels.")
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of the given rows, on the device of the labels."""
        labels = self.labels[rows.to(self.labels.device)]
        if isinstance(self.images, Tensor):
            return self.images[rows.to(self.images.device)], labels
        return self.images[rows].to(labels.device), labels

    def __deepcopy__(self, memo: dict[int, Any]) -> "LabelledExamples":
        return self

    def to(self, device: torch.device) -> "LabelledExamples":
        """The same set on another device; image files stay files."""
        if self.labels.device == device:
            return self
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        return LabelledExamples(images, self.labels.to(device))


@dataclass(frozen=True)
class ImageTransform:
    """Resize, centre crop and normalise a batch on its own device, without randomness.

    ``(x / 255 - mean) / std`` in float32, bit for bit what torchvision's ``ToTensor`` and ``Normalize`` give.

    Args:
        mean: per channel, of images in [0, 1].
        std: per channel.
        resize: edge after bilinear, antialiased resizing [pixels].
        image_size: edge after cropping the centre, or padding with black [pixels].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int
    image_size: int

    def __call__(self, images: Tensor) -> Tensor:
        """Uint8 ``(B, C, H, W)`` to float32 ``(B, C, image_size, image_size)``."""
        batch = images.to(torch.float32)
        if batch.shape[-1] != self.resize:
            edges = (self.resize, self.resize)
            batch = F.interpolate(batch, size=edges, mode="bilinear", align_corners=False, antialias=True)
        if self.resize != self.image_size:
            # `pad` with negative widths crops; rounds as torchvision's CenterCrop does
            wider = self.image_size - self.resize
            before = wider // 2 if wider > 0 else -round(-wider / 2)
            after = wider - before
            batch = F.pad(batch, (before, after, before, after))
        mean, std = (batch.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return batch.div_(255).sub_(mean).div_(std)


@dataclass(frozen=True)
class Augmentation:
    """Random crops of the zero-padded image at its own size, and random horizontal flips.

    An example's draw is a function of (seed, epoch, example), so it does not depend on the order, the batch size, the
    number of processes or the device.

    Args:
        padding: black border on every side [pixels].
        flip: also flip half of the images.
    """

    padding: int
    flip: bool

    def draw(self, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Offsets ``(size, 2)`` of the crops (down, right) and flips ``(size,)`` of all examples in one epoch."""
        generator = derived_generator(seed, "augmentation", epoch)
        offsets = torch.randint(0, 2 * self.padding + 1, (size, 2), generator=generator)
        flips = torch.rand(size, generator=generator) < 0.5
        return offsets, flips & self.flip

    def __call__(self, images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        """The crops of uint8 ``(B, C, H, W)`` at ``offsets`` ``(B, 2)``, mirrored where ``flips`` ``(B,)``."""
        height, width = images.shape[-2:]
        down, right = offsets.to(images.device).unbind(1)
        windows = F.pad(images, [self.padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
        crops = windows[torch.arange(len(images), device=images.device), :, down, right]
        return torch.where(flips.to(images.device).view(-1, 1, 1, 1), crops.flip(-1), crops)


class ExampleBatches(Dataset[tuple[Tensor, Tensor]]):
    """A split of a set as a map-style dataset that fetches a whole batch in a few tensor operations.

    Args:
        source: the set.
        rows: the split's examples in the set ``(n,)``.
        transform: evaluation transform.
        augmentation: None: no augmentation.
        order: where the augmentation learns seed and epoch.
    """

    def __init__(
        self,
        source: LabelledExamples,
        rows: Tensor,
        transform: Callable[[Tensor], Tensor],
        augmentation: Augmentation | None = None,
        order: EpochOrder | None = None,
    ) -> None:
        self.source = source
        self.rows = rows
        self.transform = transform
        self.augmentation = augmentation
        self.order = order
        self._drawn_for: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Float images ``(B, C, H, W)`` and labels ``(B,)``; the hook by which a ``DataLoader`` fetches a batch."""
        chosen = torch.as_tensor(indices)
        images, labels = self.source[self.rows[chosen]]
        if self.augmentation is not None and self.order is not None:
            offsets, flips = self._draws(self.augmentation, self.order)
            images = self.augmentation(images, offsets[chosen], flips[chosen])
        return self.transform(images), labels

    def augmentation_digest(self) -> str:
        """The sha256 of the draws of all examples in the present epoch, none without augmentation."""
        draws = self._draws(self.augmentation, self.order) if self.augmentation and self.order else ()
        return hashlib.sha256(b"".join(draw.numpy().tobytes() for draw in draws)).hexdigest()

    def _draws(self, augmentation: Augmentation, order: EpochOrder) -> tuple[Tensor, Tensor]:
        seeds, epoch = order.current
        if self._drawn_for != (seeds.augmentation, epoch):
            self._table = augmentation.draw(len(self), seeds.augmentation, epoch)
            self._drawn_for = (seeds.augmentation, epoch)
        return self._table


def keep_batch(batch: Any) -> Any:
    """The batch as fetched: the ``collate_fn`` of loaders over ``ExampleBatches``."""
    return batch
