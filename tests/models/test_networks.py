import subprocess
import sys

import pytest
import torch
from torch import nn

from lmc_lightning.models import (
    MLP,
    NETWORKS,
    VGG16,
    AlexNet,
    ConvNet,
    LeNet5,
    ReducedVGG,
    ResNet18,
    ResNet20,
    build_network,
)

INPUT_SHAPES = {
    "mlp": (1, 28, 28),
    "lenet5": (1, 28, 28),
    "reduced_vgg": (3, 32, 32),
    "vgg16": (3, 32, 32),
    "resnet18": (3, 32, 32),
    "resnet20": (3, 32, 32),
    "alexnet": (3, 224, 224),
    "convnet": (1, 28, 28),
}


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: MLP((4096,), batch_norm=True), 3_264_522),
        (lambda: MLP((512, 256, 128)), 567_434),
        (lambda: MLP((256, 128)), 235_146),
        (lambda: MLP((300, 100)), 266_610),
        (lambda: MLP((512, 256), in_features=3072), 1_707_274),
        (lambda: MLP((8, 4), in_features=2, out_features=1), 65),
        (lambda: MLP([32] * 5, in_features=2, out_features=1), 4_353),
        (lambda: MLP((), in_features=3, out_features=2), 8),
        (lambda: LeNet5(), 61_706),
        (lambda: LeNet5(in_channels=3, image_size=32), 62_006),
        (lambda: ReducedVGG(), 1_102_410),
        (lambda: ReducedVGG(hidden=()), 60_362),
        (lambda: VGG16(), 14_728_266),
        (lambda: ResNet18(), 11_173_962),
        (lambda: ResNet18(width=16), 701_466),
        (lambda: ResNet18(width=1), 2_991),
        (lambda: ResNet20(), 272_474),
        (lambda: AlexNet(num_classes=200), 57_823_752),
        (lambda: ConvNet(), 421_642),
        (lambda: ConvNet((32, 64), kernel_size=3, fc=(128,)), 421_642),
        (lambda: ConvNet((16, 32), kernel_size=5, fc=(128,)), 215_370),
        (lambda: ConvNet((32, 64, 128), fc=(512, 256), in_channels=3, image_size=32), 1_276_234),
    ],
)
def test_parameter_counts(build, expected):
    with torch.device("meta"):
        assert count(build()) == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_maps_its_images_to_logits(name):
    with torch.device("meta"):
        network = build_network(name, num_classes=7)
        images = torch.empty(2, *INPUT_SHAPES[name])
        assert network(images).shape == (2, 7)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"alexnet", "vgg16"}))
def test_second_derivatives_exist(name):
    torch.manual_seed(0)
    network = build_network(name).eval()
    loss = network(torch.randn(2, *INPUT_SHAPES[name])).square().mean()
    parameters = list(network.parameters())
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    product = torch.autograd.grad(sum(g.square().sum() for g in gradient), parameters)
    assert all(p.isfinite().all() for p in product)
    assert any(p.abs().max() > 0 for p in product)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_works_in_place(name):
    with torch.device("meta"):
        modules = list(build_network(name).modules())
    assert not any(getattr(module, "inplace", False) for module in modules)


def test_layer_names_are_readable():
    def layers(network):
        return [key.removesuffix(".weight") for key in dict(network.named_parameters()) if key.endswith(".weight")]

    with torch.device("meta"):
        assert layers(MLP((2, 3), batch_norm=True)) == ["fc1", "bn1", "fc2", "bn2", "fc3"]
        assert layers(LeNet5()) == [f"features.conv{i}" for i in (1, 2)] + [f"classifier.fc{i}" for i in (1, 2, 3)]
        assert layers(AlexNet())[:4] == ["features.conv1", "features.bn1", "features.conv2", "features.bn2"]
        assert layers(VGG16())[:2] == ["features.conv1_1", "features.bn1_1"]
        assert layers(ResNet20())[2] == "stages.layer1.0.conv1"


def test_mlp_is_the_formula():
    network = MLP((5,), in_features=6, out_features=2).double()
    images = torch.randn(3, 1, 2, 3, dtype=torch.float64)
    hidden = (images.reshape(3, 6) @ network.fc1.weight.T + network.fc1.bias).clamp(min=0)
    torch.testing.assert_close(network(images), hidden @ network.fc2.weight.T + network.fc2.bias)


def test_mlp_xavier_is_uniform_in_its_interval():
    torch.manual_seed(0)
    network = MLP((300,), init="xavier")
    bound = (6 / (784 + 300)) ** 0.5
    largest = network.fc1.weight.abs().max().item()
    assert bound * (1 - 1e-4) < largest <= bound
    assert network.fc1.bias.count_nonzero() == 0


def test_mlp_kaiming_has_variance_two_over_fan_in():
    torch.manual_seed(0)
    weight = MLP((300,), init="kaiming").fc1.weight
    variance = weight.var().item()
    stderr = variance * (2 / weight.numel()) ** 0.5
    assert abs(variance - 2 / 784) < 4 * stderr


def test_mlp_rejects_an_unknown_init():
    with pytest.raises(ValueError, match="init must be one of default, xavier, kaiming, got 'he'"):
        MLP(init="he")


def test_lenet_on_28_pixels_is_lenet_on_padded_images():
    torch.manual_seed(0)
    small, original = LeNet5(), LeNet5(image_size=32)
    original.load_state_dict(small.state_dict())
    images = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(small(images), original(nn.functional.pad(images, (2, 2, 2, 2))))


def test_lenet_rejects_other_sizes():
    with pytest.raises(ValueError, match="28 or 32 pixels, got image_size=64"):
        LeNet5(image_size=64)


def test_reduced_vgg_is_the_convnet_with_dropout():
    torch.manual_seed(0)
    vgg = ReducedVGG().eval()
    cnn = ConvNet((32, 64), fc=(256, 128), in_channels=3, image_size=32)
    cnn.load_state_dict(vgg.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vgg(images), cnn(images))
    assert not torch.equal(vgg.train()(images), cnn(images))


def test_residual_block_with_zero_branch_is_its_shortcut():
    block = ResNet20(width=4).stages.layer1[0].eval()
    nn.init.zeros_(block.bn2.weight)
    inputs = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(inputs), inputs)


def test_convnet_rejects_even_kernels():
    with pytest.raises(ValueError, match=r"kernel_size must be odd .* got 4"):
        ConvNet(kernel_size=4)


def test_convnet_rejects_too_many_stages():
    with pytest.raises(ValueError, match="5 poolings leave nothing of a 28×28 image"):
        ConvNet((2,) * 5)


def test_build_network_names_its_choices():
    with pytest.raises(ValueError, match=r"network must be one of mlp, lenet5, .*, got 'lenet'"):
        build_network("lenet")


def test_networks_import_without_lightning():
    code = "import sys, lmc_lightning.models; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_names_of_the_package_raise():
    import lmc_lightning.models

    with pytest.raises(AttributeError, match="no attribute 'LeNet6'"):
        _ = lmc_lightning.models.LeNet6
