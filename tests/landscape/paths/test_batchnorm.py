from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.batchnorm import has_batch_norm, running_statistics


def squares(module: nn.Module, batch: Tensor) -> Tensor:
    return module(batch).square().mean()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 2


def train_objective(module: nn.Module, batches: Sequence[Tensor]) -> Objective:
    return Objective(module.double(), batches, squares, mode="train", chunk_size=len(batches[0]))


def recomputed(module: nn.Module, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    objective = train_objective(module, batches)
    return running_statistics(objective, objective.theta())


def channel_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel over everything else."""
    rows = values.transpose(0, 1).flatten(1)
    return rows.mean(1), rows.var(1)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.BatchNorm1d(3), True),
        (nn.BatchNorm2d(3, affine=False), True),
        (nn.BatchNorm3d(3, momentum=None), True),
        (nn.SyncBatchNorm(3), True),
        (nn.BatchNorm1d(3, track_running_stats=False), False),
        (nn.InstanceNorm2d(3, track_running_stats=True), False),
        (nn.LayerNorm(3), False),
    ],
)
def test_has_batch_norm_means_running_statistics_of_batches(layer: nn.Module, expected: bool) -> None:
    assert has_batch_norm(nn.Sequential(nn.Identity(), layer)) is expected
    assert has_batch_norm(layer) is expected


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (12, 3)),
        (nn.BatchNorm1d(3, momentum=None), (12, 3, 5)),
        (nn.BatchNorm2d(3, affine=False), (12, 3, 4, 5)),
        (nn.BatchNorm3d(3, momentum=0.01), (12, 3, 2, 4, 5)),
        (nn.SyncBatchNorm(3), (12, 3, 4, 5)),
    ],
)
@pytest.mark.parametrize("sizes", [[12], [5, 5, 2]])
def test_the_first_layers_statistics_are_those_of_all_data_however_they_are_cut(
    layer: nn.Module, shape: tuple[int, ...], sizes: list[int]
) -> None:
    values = draw(*shape)
    module = nn.Sequential(layer, nn.Flatten(), nn.Linear(values[0].numel(), 1))
    buffers = recomputed(module, values.split(sizes))
    mean, variance = channel_moments(values)
    torch.testing.assert_close(buffers["0.running_mean"], mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(buffers["0.running_var"], variance, rtol=1e-13, atol=1e-13)


def test_a_large_mean_does_not_swallow_the_variance() -> None:
    values = (draw(64, 2) + 1e3).float().double()
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).float()
    objective = Objective(module, values.float().split(16), squares, mode="train", chunk_size=16)
    buffers = running_statistics(objective, objective.theta())
    assert buffers["0.running_var"].dtype == torch.float32
    torch.testing.assert_close(buffers["0.running_var"].double(), values.var(0), rtol=1e-4, atol=0)


def test_deeper_layers_see_activations_normalised_by_the_batch() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3), nn.BatchNorm1d(3)
    ).double()
    batches = draw(20, 4).split([8, 8, 4])
    buffers = recomputed(module, batches)

    first, second = module[0], module[4]
    totals = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        hidden = batch @ first.weight.T + first.bias
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
        outputs = (hidden.tanh() @ second.weight.T + second.bias).detach()
        totals[0].add_(outputs.sum(0))
        totals[1].add_(outputs.square().sum(0))
    mean = totals[0] / 20
    torch.testing.assert_close(buffers["5.running_mean"], mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(buffers["5.running_var"], (totals[1] / 20 - mean**2) * 20 / 19, rtol=1e-11, atol=0)


def test_one_full_batch_gives_eval_mode_the_normalisation_of_train_mode() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)).double()
    images = draw(30, 2, 5, 5)
    objective = train_objective(module, [images])
    theta = objective.theta() * 1.5
    buffers = running_statistics(objective, theta)
    num_values = 30 * 9
    buffers["1.running_var"] *= (num_values - 1) / num_values  # training divides by N
    evaluated = Objective(module, [images], squares)
    assert evaluated.evaluate(theta, buffers=buffers).loss == pytest.approx(objective.evaluate(theta).loss, rel=1e-13)


def test_integer_and_foreign_buffers_are_returned_as_given() -> None:
    module = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3), nn.Flatten())
    module.append(nn.Linear(12, 1)).double()
    objective = train_objective(module, [draw(6, 3, 4)])
    given = objective.buffers | {"0.running_mean": torch.arange(3.0).double(), "1.num_batches_tracked": torch.tensor(7)}
    buffers = running_statistics(objective, objective.theta(), given)
    assert buffers.keys() == objective.buffers.keys()
    assert torch.equal(buffers["0.running_mean"], given["0.running_mean"])
    assert torch.equal(buffers["0.running_var"], given["0.running_var"])
    assert buffers["1.num_batches_tracked"].dtype == torch.int64
    assert buffers["1.num_batches_tracked"] == 7


def test_old_statistics_do_not_enter_even_if_they_are_not_numbers() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    batches = [draw(9, 3)]
    objective = train_objective(module, batches)
    spoiled = {
        "0.running_mean": torch.full((3,), torch.nan).double(),
        "0.running_var": torch.full((3,), torch.inf).double(),
    }
    buffers = running_statistics(objective, objective.theta(), spoiled)
    torch.testing.assert_close(buffers["0.running_mean"], batches[0].mean(0))
    torch.testing.assert_close(buffers["0.running_var"], batches[0].var(0))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.unused = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, values: Tensor) -> Tensor:
        return self.norm(values) * self.scale + self.norm(input=5 * values + 1)


def test_a_layer_used_twice_pools_both_uses_and_an_unused_one_keeps_its_statistics() -> None:
    values = draw(10, 3)
    buffers = recomputed(Twice(), [values])
    both = torch.cat([values, 5 * values + 1])
    torch.testing.assert_close(buffers["norm.running_mean"], both.mean(0))
    torch.testing.assert_close(buffers["norm.running_var"], both.var(0))
    assert buffers["unused.running_var"].tolist() == [1, 1, 1]


def test_frozen_layers_keep_their_statistics_but_a_module_in_eval_mode_has_none_frozen() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    module[0].eval()
    values = draw(10, 3)
    frozen = recomputed(module, [values])
    assert frozen["0.running_mean"].tolist() == [0, 0, 0]
    torch.testing.assert_close(frozen["1.running_mean"], values.mean(0) / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(recomputed(module.eval(), [values])["0.running_mean"], values.mean(0))


def test_statistics_are_those_at_the_given_theta() -> None:
    module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
    values = draw(10, 3)
    objective = train_objective(module, [values])
    theta = torch.arange(objective.num_params, dtype=torch.float64)
    buffers = running_statistics(objective, theta)
    torch.testing.assert_close(buffers["1.running_mean"], (values @ theta[:6].view(2, 3).T).mean(0))
    assert not any(b.requires_grad for b in buffers.values())


def test_a_step_may_differentiate_by_its_inputs() -> None:
    def penalised(module: nn.Module, batch: Tensor) -> Tensor:
        inputs = batch.requires_grad_()
        loss = module(inputs).square().mean()
        (gradient,) = torch.autograd.grad(loss, inputs)
        return F.mse_loss(gradient, torch.zeros_like(gradient))

    values = draw(10, 3)
    objective = Objective(
        nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double(), [values], penalised, mode="train", chunk_size=10
    )
    buffers = running_statistics(objective, objective.theta())
    torch.testing.assert_close(buffers["0.running_mean"], values.mean(0))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_synchronised_layers_wait_for_no_other_process(request: pytest.FixtureRequest) -> None:
    values = draw(10, 3)
    objective = train_objective(nn.Sequential(nn.SyncBatchNorm(3), nn.Linear(3, 1)), [values])
    request.getfixturevalue("process_group")  # in a group, the layer's own forward refuses a CPU
    buffers = running_statistics(objective, objective.theta())
    torch.testing.assert_close(buffers["0.running_mean"], values.mean(0))


def test_statistics_come_from_train_mode() -> None:
    objective = Objective(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double(), [draw(4, 3)], squares)
    with pytest.raises(ValueError, match="mode='train'"):
        running_statistics(objective, objective.theta())
