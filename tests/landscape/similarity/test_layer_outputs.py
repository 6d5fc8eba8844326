"""Outputs of layers: which, at which state, on which inputs, and without a trace."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.similarity.cka import Representation, similarity
from lmc_lightning.landscape.similarity.layer_outputs import layer_names, mixed_up, representations
from tests.problems import cross_entropy, normal, split

N = 30


def network() -> nn.Sequential:
    body = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    net = nn.Sequential(body, nn.Flatten(), nn.Linear(27, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for index, parameter in enumerate(net.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=50 + index))
    return net


def data(sizes: tuple[int, ...] = (N,)) -> list[Any]:
    return split((normal(N, 1, 4, 4, seed=1), torch.arange(N) % 3), sizes)


def objective(net: nn.Module, sizes: tuple[int, ...] = (N,), **options: Any) -> Objective:
    return Objective(net, data(sizes), cross_entropy, **options)


def matrices(of: dict[str, Representation]) -> dict[str, Tensor]:
    return {name: r.matrix for name, r in of.items()}


def test_leaves_with_parameters_are_the_layers() -> None:
    net = network()
    assert layer_names(net) == ["0.0", "0.1", "2", "4"]
    assert layer_names(net, ["0.?", "logits"]) == ["0.0", "0.1", "0.2", "logits"]
    with pytest.raises(ValueError, match=r"No submodule matches 'conv\*'. The first names are: 0, 0.0, 0.1"):
        layer_names(net, ["conv*"])


def test_layers_give_what_the_network_computes() -> None:
    net = network()
    (x, _) = data()[0]
    found = representations(objective(net), layers=["0.0", "0.1", "2", "logits"])
    with torch.no_grad():
        net.eval()
        conv = net[0][0](x)
        norm = net[0][1](conv)  # the ReLU behind it works in place
        hidden = net[2](norm.relu().flatten(1))
        expected = {"0.0": conv, "0.1": norm, "2": hidden, "logits": net[4](hidden.tanh())}
    for name, features in expected.items():
        torch.testing.assert_close(found[name].matrix, Representation.of(features).matrix)
    assert [r.width for r in found.values()] == [27, 27, 4, 3]


def test_batches_chunks_and_memory_do_not_matter() -> None:
    net = network()
    whole = matrices(representations(objective(net)))
    for sizes, options in {(7, 23): {}, (10, 10, 10): {"chunk_size": 4}, (30,): {"memory_budget": 1}}.items():
        parts = matrices(representations(objective(net, sizes, **options)))
        assert parts.keys() == whole.keys()
        for name, matrix in parts.items():
            torch.testing.assert_close(matrix, whole[name], rtol=1e-12, atol=1e-12)


def test_another_state_has_its_own_parameters_and_statistics() -> None:
    net, other = network(), network()
    with torch.no_grad():
        other[2].weight.add_(0.3 * normal(4, 27, seed=9))
        other[0][1].running_mean.add_(0.5)
    own = objective(net)
    there = representations(own, objective(other).theta(), dict(other.named_buffers()))
    for name, matrix in matrices(representations(objective(other))).items():
        torch.testing.assert_close(there[name].matrix, matrix)
    found = similarity(representations(own), there).same_layers()
    assert found["0.0"][:2] == pytest.approx((1.0, 1.0))
    assert found["0.1"][:2] == pytest.approx((1.0, 1.0))  # shifted only
    assert found["2"][0] < 0.99


def test_the_module_keeps_no_hooks_and_no_changes() -> None:
    net = network().train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    representations(objective(net))
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    assert all(m.training for m in net.modules())


class Functional(nn.Module):
    """Uses the weights of a layer that never runs, and one that runs on something else than the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(16, 3).double()
        self.constant = nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        shift = self.constant(torch.ones(5, 2, dtype=x.dtype)).mean()
        return F.linear(x.flatten(1), self.weights.weight) + shift


def test_layers_that_do_not_run_on_the_examples_are_left_out_or_refused() -> None:
    net = Functional()
    assert [*representations(objective(net), layers=["logits"])] == ["logits"]
    with pytest.raises(ValueError, match="'weights': no rows of features for the examples"):
        representations(objective(net), layers=["weights", "logits"])
    with pytest.raises(ValueError, match="'constant': no rows of features"):
        representations(objective(net), layers=["constant", "logits"])


def test_softmax_gives_the_probabilities_of_a_loss_over_classes() -> None:
    net = network()
    found = representations(objective(net), layers=["logits", "softmax"])
    with torch.no_grad():
        p = net.eval()(data()[0][0]).softmax(1)
    assert [*found] == ["logits", "softmax"]
    torch.testing.assert_close(found["softmax"].matrix, Representation.of(p).matrix)
    regression = Objective(net, [(data()[0][0], torch.zeros(N, 3).double())], lambda m, b: F.mse_loss(m(b[0]), b[1]))
    with pytest.raises(ValueError, match="'softmax': no rows of features"):
        representations(regression, layers=["logits", "softmax"])


def test_logits_stand_in_where_no_layer_runs() -> None:
    net = Functional()
    net.constant = nn.Identity()
    assert [*representations(objective(net))] == ["logits"]


def test_mixtures_are_of_two_examples_and_the_same_however_they_are_batched() -> None:
    (whole,) = mixed_up(data(), seed=3)
    parts = mixed_up(data((7, 23)), seed=3)
    assert [len(x) for x, _ in parts] == [7, 23]
    assert torch.equal(torch.cat([x for x, _ in parts]), whole[0])
    assert torch.equal(whole[1], data()[0][1])
    assert not torch.equal(mixed_up(data(), seed=4)[0][0], whole[0])
    original = data()[0][0].reshape(N, -1)
    for index, mixed in enumerate(whole[0].reshape(N, -1)):
        ways = original - original[index]  # the mixture lies on the way to one of the others
        shares = ways @ (mixed - original[index]) / ways.square().sum(1).clamp(min=1e-9)
        misses = (original[index] + shares[:, None] * ways - mixed).norm(dim=1)
        best = int(misses.argmin())
        assert misses[best] < 1e-12
        assert best != index
        assert 0 < shares[best] < 1


def test_weights_of_mixtures_follow_beta_16_16() -> None:
    """Mean ½ and variance 1/(4·33), read off scalar inputs 0 and 1."""
    n = 20_000
    (mixed,) = mixed_up([torch.arange(n, dtype=torch.float64)[:, None] % 2])
    between = mixed[(mixed > 0) & (mixed < 1)]
    assert float(between.mean()) == pytest.approx(0.5, abs=4 * (1 / 132 / len(between)) ** 0.5)
    assert float(between.var()) == pytest.approx(1 / 132, rel=0.06)


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs='mixup' cannot mix these batches\. They hold no floating tensor"):
        mixed_up([torch.arange(4)])
