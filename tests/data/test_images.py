import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms

from lmc_lightning.data.images import Augmentation, ExampleBatches, ImageFiles, ImageTransform, LabelledExamples
from lmc_lightning.data.order import EpochOrder, NoiseSeeds
from tests.data.layouts import pixels

IDENTITY = ImageTransform((0.0,), (1 / 255,), 32, 32)
"""Leaves the grey levels as they are, but as floats."""


def images(size: int = 6, edge: int = 32) -> torch.Tensor:
    return torch.from_numpy(pixels(size, 3, edge, edge))


def write_image(path, width: int, height: int):
    Image.fromarray(pixels(height, width, 3)).save(path)
    return path


def test_normalisation_is_that_of_torchvision_bit_for_bit():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = torch.stack([reference(image.permute(1, 2, 0).numpy()) for image in images()])
    assert torch.equal(ImageTransform(mean, std, 32, 32)(images()), expected)


def test_resizing_keeps_a_ramp_of_grey_a_ramp():
    ramp = torch.arange(0, 160, 20, dtype=torch.uint8).expand(1, 1, 8, 8)
    enlarged = ImageTransform((0.0,), (1.0,), 32, 32)(ramp)[0, 0] * 255
    expected = (torch.arange(32) + 0.5) * 5 - 10
    torch.testing.assert_close(enlarged[:, 2:-2], expected[2:-2].expand(32, 28))


@pytest.mark.parametrize("edge", [24, 25, 27, 33, 35, 40])
def test_the_centre_is_cropped_or_padded_as_torchvision_does(edge):
    batch = ImageTransform((0.0,), (1.0,), 32, edge)(images())
    assert torch.equal(batch, transforms.CenterCrop(edge)(images()).float().div(255))


def test_a_smaller_image_is_padded_with_black():
    padded = ImageTransform((0.5,), (0.5,), 28, 32)(torch.full((2, 1, 28, 28), 255, dtype=torch.uint8))
    assert torch.equal(padded, F.pad(torch.ones(2, 1, 28, 28), (2, 2, 2, 2), value=-1.0))


@pytest.mark.parametrize("shape", [(50, 40), (40, 50), (40, 40), (61, 41)])
def test_files_are_resized_and_cropped_as_torchvision_does(tmp_path, shape):
    path = write_image(tmp_path / "a.png", *shape)
    reference = transforms.Compose([transforms.Resize(36), transforms.CenterCrop(32), transforms.PILToTensor()])
    assert torch.equal(ImageFiles((path,), 32, 36).decode(path), reference(Image.open(path)))


def test_files_are_decoded_in_the_order_asked_for(tmp_path):
    paths = tuple(write_image(tmp_path / f"{i}.png", 10 + i, 12) for i in range(5))
    files = ImageFiles(paths, 8, 9)
    expected = torch.stack([files.decode(paths[i]) for i in (3, 0, 3)])
    assert torch.equal(files[torch.tensor([3, 0, 3])], expected)
    assert files.read_all().shape == (5, 3, 8, 8)


def test_a_file_of_another_size_is_named(tmp_path):
    path = write_image(tmp_path / "wide.png", 10, 8)
    with pytest.raises(ValueError, match=r"wide\.png has 10x8 pixels, expected 8x8"):
        ImageFiles((path,), 8).read_all()


def test_images_and_labels_must_match():
    with pytest.raises(ValueError, match="one label per image, got 6 images and 5 labels"):
        LabelledExamples(images(6), torch.arange(5))


def test_a_deep_copy_shares_the_images():
    original = LabelledExamples(images(), torch.arange(6))
    assert copy.deepcopy({"train": original})["train"].images.data_ptr() == original.images.data_ptr()
    unpickled = pickle.loads(pickle.dumps(original))
    assert torch.equal(unpickled.images, original.images)


def test_a_set_on_its_device_is_not_copied():
    original = LabelledExamples(images(), torch.arange(6))
    assert original.to(torch.device("cpu")) is original


def test_crops_are_windows_of_the_padded_image():
    augmentation = Augmentation(padding=4, flip=True)
    offsets, flips = augmentation.draw(6, seed=0, epoch=0)
    crops = augmentation(images(), offsets, flips)
    padded = F.pad(images(), (4, 4, 4, 4))
    for i, (down, right) in enumerate(offsets.tolist()):
        window = padded[i, :, down : down + 32, right : right + 32]
        assert torch.equal(crops[i], window.flip(-1) if flips[i] else window)


def test_the_centre_window_unflipped_is_the_image_and_two_flips_are_none():
    augmentation = Augmentation(padding=4, flip=True)
    centre, flips = torch.full((6, 2), 4), torch.ones(6, dtype=torch.bool)
    assert torch.equal(augmentation(images(), centre, ~flips), images())
    flipped = augmentation(images(), centre, flips)
    assert not torch.equal(flipped, images())
    assert torch.equal(augmentation(flipped, centre, flips), images())


def test_draws_are_a_function_of_seed_and_epoch_and_cover_their_range():
    augmentation = Augmentation(padding=2, flip=True)
    offsets, flips = augmentation.draw(2000, seed=1, epoch=3)
    again = augmentation.draw(2000, seed=1, epoch=3)
    assert torch.equal(offsets, again[0])
    assert torch.equal(flips, again[1])
    assert not torch.equal(offsets, augmentation.draw(2000, seed=1, epoch=4)[0])
    assert not torch.equal(offsets, augmentation.draw(2000, seed=2, epoch=3)[0])
    counts = torch.zeros(5, 5).index_put_(tuple(offsets.T), torch.ones(2000), accumulate=True)
    # 25 equally likely offsets, 80 of each expected; 24 degrees of freedom: 51.2 is the 99.9 % quantile of chi squared
    assert ((counts - 80) ** 2 / 80).sum() < 51.2
    assert abs(flips.sum().item() - 1000) < 3.3 * (2000 * 0.25) ** 0.5
    assert not Augmentation(padding=2, flip=False).draw(2000, 1, 3)[1].any()


def test_batches_hold_the_chosen_rows():
    dataset = ExampleBatches(LabelledExamples(images(), torch.arange(6) + 10), torch.tensor([5, 1, 3]), IDENTITY)
    batch, labels = dataset.__getitems__([2, 0])
    assert len(dataset) == 3
    assert labels.tolist() == [13, 15]
    torch.testing.assert_close(batch, images()[[3, 5]].float(), rtol=1e-6, atol=0)
    image, label = dataset[1]
    assert label == 11
    assert torch.equal(image, dataset.__getitems__([1])[0][0])


def test_an_example_is_augmented_alike_in_any_batch_and_any_order():
    order = EpochOrder(6, NoiseSeeds(augmentation_seed=3))
    source = LabelledExamples(images(), torch.arange(6))
    dataset = ExampleBatches(source, torch.arange(6), IDENTITY, Augmentation(4, flip=True), order)
    whole = dataset.__getitems__(range(6))[0]
    assert torch.equal(whole[[4, 1]], dataset.__getitems__([4, 1])[0])
    order.set_epoch(1)
    assert not torch.equal(whole, dataset.__getitems__(range(6))[0])
    order.set_epoch(0)
    order.seeds.order_seed = 99
    assert torch.equal(whole, dataset.__getitems__(range(6))[0])
    order.seeds.augmentation_seed = 4
    assert not torch.equal(whole, dataset.__getitems__(range(6))[0])


def test_image_files_serve_batches_like_tensors(tmp_path):
    paths = tuple(write_image(tmp_path / f"{i}.png", 12, 12) for i in range(4))
    files = ImageFiles(paths, 8, 9)
    rows, transform = torch.tensor([3, 1]), ImageTransform((0.5,), (0.5,), 8, 8)
    lazy = ExampleBatches(LabelledExamples(files, torch.arange(4)), rows, transform)
    eager = ExampleBatches(LabelledExamples(files.read_all(), torch.arange(4)), rows, transform)
    assert torch.equal(lazy.__getitems__([1, 0])[0], eager.__getitems__([1, 0])[0])
    assert np.array_equal(lazy.__getitems__([1, 0])[1], [1, 3])
