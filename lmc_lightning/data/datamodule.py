"""The LightningDataModule that all image sets share."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lmc_lightning.data.download import download
from lmc_lightning.data.images import Augmentation, ImageTransform
from lmc_lightning.data.replayable import ReplayableDataModule
from lmc_lightning.data.sources import Splits


class VisionDataModule(ReplayableDataModule):
    """A set of labelled images, held as uint8 and turned into float batches on the device, without worker processes.

    Batches are ``(images, labels)``: float32 ``(B, C, H, W)``, normalised, and int64 ``(B,)``.

    Args:
        data_dir: the folder that holds the set, or that it is downloaded into.
        image_size: edge of the images that the network sees [pixels]; None: as resized.
        resize: edge that images are resized to before the centre is cropped, or padded with black, to ``image_size``
            [pixels]; None: ``image_size``, and where that is None too, their own size.
        augment: random crops of the image zero-padded by an eighth of its edge, and, where a mirrored image keeps its
            class, random horizontal flips; before resizing.
        mean: per channel, of images in [0, 1]; None: the constants that are usual for the set.
        std: per channel; None: the constants that are usual for the set.
        download: fetch the set if it is missing.
        **kwargs: of ``ReplayableDataModule``: batch size, splits, seeds, subsets and shifts of the training data.
    """

    native_dims: tuple[int, int, int]
    default_mean: ClassVar[tuple[float, ...]]
    default_std: ClassVar[tuple[float, ...]]
    flip: ClassVar[bool] = False
    transform: ImageTransform

    def __init__(
        self,
        data_dir: str | Path = "data",
        *,
        image_size: int | None = None,
        resize: int | None = None,
        augment: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.data_dir = Path(data_dir).expanduser()
        self.augment = augment
        self.download = download
        self.transform = self._make_transform(image_size, resize, mean, std)

    def _make_transform(
        self, image_size: int | None, resize: int | None, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> ImageTransform:
        resize = resize or image_size or self.native_dims[-1]
        statistics = tuple(mean or self.default_mean), tuple(std or self.default_std)
        if any(len(values) not in (1, self.native_dims[0]) for values in statistics):
            raise ValueError(f"`mean` and `std` need one value per channel ({self.native_dims[0]}), got {statistics}.")
        return ImageTransform(*statistics, resize=resize, image_size=image_size or resize)

    @abstractmethod
    def locate(self) -> Path:
        """The folder of the set.

        Raises:
            FileNotFoundError: it is in none of the folders looked in; the message names them and the remedy.
        """

    @abstractmethod
    def read(self, folder: Path) -> Splits:
        """The official splits ``train`` and ``test``, uint8."""

    def read_splits(self) -> Splits:
        """The official splits, from the folder that has them."""
        return self.read(self.locate())

    def augmentation(self) -> Augmentation | None:
        """Random crops and flips, where asked for."""
        return Augmentation(self.native_dims[-1] // 8, self.flip) if self.augment else None

    @property
    def dims(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the network sees."""
        return self.native_dims[0], self.transform.image_size, self.transform.image_size

    def prepare_data(self) -> None:
        """Fetch the set if it is missing and ``download`` is set."""
        if not self.download:
            return
        try:
            self.locate()
        except FileNotFoundError:
            download(self.dataset_name, self.data_dir)
