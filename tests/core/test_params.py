import pytest
import torch
from torch import nn

from lmc_lightning.core.params import parameter_layout


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


class ComplexWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(2, 3, dtype=torch.complex64))
        self.gain = nn.Parameter(torch.randn(4))


def named(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters())


@pytest.mark.parametrize(
    "module",
    [nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(4, 3)), nn.LSTM(3, 4, 2), Tied(), ComplexWeight()],
    ids=["convolution", "lstm", "tied", "complex"],
)
def test_unflatten_inverts_flatten_bit_for_bit(module: nn.Module) -> None:
    layout = parameter_layout(module)
    restored = layout.unflatten(layout.flatten(named(module)))
    assert restored.keys() == named(module).keys()
    for name, tensor in named(module).items():
        assert restored[name].dtype == tensor.dtype
        assert torch.equal(restored[name], tensor)


def test_flatten_inverts_unflatten() -> None:
    layout = parameter_layout(ComplexWeight())
    theta = torch.randn(layout.num_params)
    assert torch.equal(layout.flatten(layout.unflatten(theta)), theta)


def test_flat_vector_is_a_detached_copy() -> None:
    module = nn.Linear(2, 2)
    theta = parameter_layout(module).flatten(named(module))
    theta.zero_()
    assert not theta.requires_grad
    assert module.weight.abs().sum() > 0


def test_tied_parameters_count_once() -> None:
    assert parameter_layout(Tied()).num_params == 15


def test_complex_entries_are_two_real_numbers() -> None:
    layout = parameter_layout(ComplexWeight())
    assert layout.sizes == [12, 4]
    assert layout.flatten(named(ComplexWeight())).dtype == torch.float32


def test_frozen_parameters_are_not_part_of_theta() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module[0].requires_grad_(False)
    assert parameter_layout(module).names == ("1.weight", "1.bias")


def test_mixed_dtypes_share_the_wider_one_and_come_back() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float64))
    layout = parameter_layout(module)
    theta = layout.flatten(named(module))
    assert theta.dtype == torch.float64
    restored = layout.unflatten(theta)
    assert restored["0.weight"].dtype == torch.float32
    assert all(torch.equal(restored[n], p) for n, p in module.named_parameters())


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["0.*"], ("0.weight", "0.bias")),
        (["*.weight"], ("0.weight", "1.weight")),
        (["1.bias", "0.bias"], ("0.bias", "1.bias")),
        (None, ("0.weight", "0.bias", "1.weight", "1.bias")),
    ],
)
def test_patterns_select_by_name_in_the_order_of_the_module(patterns: list[str] | None, names: tuple[str, ...]) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    assert parameter_layout(module, patterns).names == names


def test_views_are_differentiable() -> None:
    module = nn.Linear(2, 1)
    layout = parameter_layout(module)
    leaf = layout.flatten(named(module)).requires_grad_()
    (gradient,) = torch.autograd.grad(layout.unflatten(leaf)["weight"].sum(), leaf)
    assert gradient.tolist() == [1, 1, 0]


def test_wrong_length_names_both_lengths() -> None:
    with pytest.raises(ValueError, match=r"Expected θ of shape \(3,\), got \(4,\)"):
        parameter_layout(nn.Linear(2, 1)).unflatten(torch.zeros(4))


def test_nothing_trainable_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no parameter with requires_grad=True"):
        parameter_layout(nn.Linear(2, 1).requires_grad_(False))


def test_pattern_without_match_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"matches \['conv\*'\]. The first names are: weight, bias"):
        parameter_layout(nn.Linear(2, 1), ["conv*"])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_parameter_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"weight has no shape yet. Run one batch"):
        parameter_layout(nn.LazyLinear(2))


def test_complex_entries_may_begin_at_an_odd_place_of_theta_and_of_a_vector() -> None:
    module = nn.ParameterDict({"first": nn.Parameter(torch.zeros(3)), "second": nn.Parameter(torch.zeros(2) + 1j)})
    layout = parameter_layout(module)
    theta = layout.flatten(dict(module.named_parameters())).double().requires_grad_()
    tensors = layout.unflatten(theta)
    gradient = torch.autograd.grad((tensors["second"] ** 3).real.sum(), theta, create_graph=True)[0]
    rows = torch.eye(layout.num_params, dtype=theta.dtype)
    hessian = torch.stack([torch.autograd.grad(gradient, theta, row, retain_graph=True)[0] for row in rows])
    # Re (a + ib)³ = a³ − 3ab² has the second derivatives 6a, −6b, −6a; here a = 0, b = 1.
    block = torch.tensor([[0.0, -6.0], [-6.0, 0.0]], dtype=theta.dtype)
    assert torch.equal(hessian, torch.block_diag(torch.zeros(3, 3, dtype=theta.dtype), block, block))


def test_tensors_may_be_changed_in_place_by_a_step() -> None:
    module = nn.Linear(2, 2)
    layout = parameter_layout(module)
    theta = layout.flatten(dict(module.named_parameters())).requires_grad_()
    tensors = layout.unflatten(theta)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.clamp_(-0.1, 0.1)
    assert torch.equal(theta.detach(), torch.cat([t.detach().reshape(-1) for t in tensors.values()]))
