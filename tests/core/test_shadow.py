import copy
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lmc_lightning.core.objective import Objective
from lmc_lightning.core.shadow import Shadow, copy_module, preserved_state
from lmc_lightning.core.structure import digest


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


class Talkative(nn.Module):
    """Leaves traces wherever a step can: attributes, containers, buffers, generators."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.steps = 0
        self.outputs: list[Tensor] = []
        self.history: dict[str, Any] = {"nested": [{"losses": []}]}
        self.seen: set[int] = set()
        self.recent: deque[int] = deque(maxlen=3)
        self.by_name: defaultdict[str, list[int]] = defaultdict(list)
        self.array = np.zeros(2)
        self.noise = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.count += 1
        self.mask = ~self.mask
        hidden = self.norm(self.layer(x)) + torch.randn(3, generator=self.noise)
        self.outputs.append(hidden)
        self.history["nested"][0]["losses"].append(self.steps)
        self.seen.add(self.steps)
        self.recent.append(self.steps)
        self.by_name["step"].append(self.steps)
        self.array += 1
        self.late = hidden
        return hidden


def trace(module: Talkative) -> dict[str, Any]:
    return {
        "state": digest(module.state_dict()),
        "python": copy.deepcopy([module.steps, module.history, module.seen, list(module.recent), dict(module.by_name)]),
        "array": module.array.tolist(),
        "outputs": len(module.outputs),
        "late": hasattr(module, "late"),
        "noise": module.noise.get_state().tolist(),
        "versions": [t._version for t in [*module.parameters(), *module.buffers()]],
    }


def squared(module: nn.Module, batch: Any) -> Tensor:
    return module(batch[0]).square().mean()


def test_running_the_shadow_leaves_no_trace_in_the_module() -> None:
    module = Talkative()
    before = trace(module)
    fresh = Shadow(module).at(parameters(module), mode="train")
    fresh(torch.randn(4, 3)).sum()
    assert trace(module) == before
    assert fresh.steps == 1


def test_every_copy_starts_from_the_same_state() -> None:
    module = Talkative()
    shadow = Shadow(module)
    x = torch.randn(4, 3)
    first, second = shadow.at(parameters(module)), shadow.at(parameters(module))
    assert torch.equal(first(x), second(x))
    assert trace(first) == trace(second)


def test_the_pristine_copy_holds_the_modules_own_parameters() -> None:
    module = Talkative()
    held = Shadow(module).module
    for own, other in zip(module.parameters(), held.parameters(), strict=True):
        assert own is other
    for own, other in zip(module.buffers(), held.buffers(), strict=True):
        assert own is not other


def test_an_objective_leaves_no_trace_even_through_hooks_that_close_over_the_module() -> None:
    module = Talkative()
    acts: list[Tensor] = module.outputs

    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        acts.append(output)
        module.steps += 1
        module.added = 1
        module.history["nested"][0]["losses"].append(0)
        module.history["new"] = 1
        module.seen.add(-1)
        module.recent.append(-1)
        module.by_name["hook"].append(-1)
        module.count.add_(1)
        module.mask = torch.zeros(3, dtype=torch.bool)
        module.norm.running_mean = module.norm.running_mean + 1

    module.layer.register_forward_hook(hook)
    before, buffers = trace(module), dict(module.named_buffers())
    objective = Objective(module, [(torch.randn(4, 3),)], squared, mode="train")
    objective.grad(objective.theta())
    objective.hvp(objective.theta())(objective.theta())
    after = trace(module)
    assert after.pop("versions")[:4] == before.pop("versions")[:4]
    assert after == before
    assert all(buffer is buffers[n] for n, buffer in module.named_buffers())
    assert not hasattr(module, "added")


def test_state_is_preserved_after_an_exception() -> None:
    module = Talkative()
    before = trace(module)

    def fail() -> None:
        module.steps = 99
        module.outputs.append(torch.ones(1))
        module.norm.running_mean.add_(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), preserved_state(module):
        fail()
    before.pop("versions")
    after = trace(module)
    after.pop("versions")
    assert after == before


def test_only_buffers_that_changed_are_written_back() -> None:
    module = nn.BatchNorm1d(2)
    with preserved_state(module):
        module(torch.randn(3, 2))  # the kernel does not count these writes in the version
    assert module.running_mean.tolist() == [0, 0]
    assert module.num_batches_tracked.item() == 0
    versions = [b._version for b in module.buffers()]
    with preserved_state(module):
        module.eval()(torch.randn(3, 2))
    assert [b._version for b in module.buffers()] == versions


class Stubborn(nn.Module):
    """Holds what deepcopy refuses."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.lock = threading.Lock()
        self.file = (folder / "log.txt").open("w")
        self.numbers: Iterator[int] = (i for i in range(3))
        self.hidden = self.layer.weight * 2
        self.nested = {"deep": [threading.RLock(), {"graph": self.layer.bias + 1}]}
        self.scorer = partial(torch.add, other=1)

    def forward(self, x: Tensor) -> Tensor:
        with self.lock, self.nested["deep"][0]:
            return self.layer(x)


def test_what_cannot_be_copied_is_shared(tmp_path: Path) -> None:
    module = Stubborn(tmp_path)
    copied = copy_module(module, {})
    assert copied.lock is module.lock
    assert copied.file is module.file
    assert copied.numbers is module.numbers
    assert copied.nested is not module.nested
    assert copied.nested["deep"][0] is module.nested["deep"][0]
    assert not copied.hidden.requires_grad
    assert torch.equal(copied.nested["deep"][1]["graph"], module.layer.bias + 1)
    x = torch.randn(3, 2)
    assert torch.equal(copied(x), module(x))
    module.file.close()


def test_data_optimizers_and_what_belongs_to_the_trainer_are_shared_not_copied() -> None:
    class Trainer:
        def __deepcopy__(self, memo: dict[int, Any]) -> "Trainer":
            raise AssertionError("copied")

    class CustomTrainer(Trainer):
        pass

    module = nn.Linear(2, 2)
    data = TensorDataset(torch.zeros(3, 2))
    shared = {
        "data": data,
        "loader": DataLoader(data),
        "optimizer": torch.optim.SGD(module.parameters(), lr=0.1),
        "trainer": CustomTrainer(),
    }
    for name, value in shared.items():
        setattr(module, name, value)
    copied = Shadow(module).at(parameters(module))
    assert all(getattr(copied, name) is value for name, value in shared.items())


class Aliased(nn.Module):
    """The same tensor under several names, in lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.alias = [self.first.weight]
        self.table = OrderedDict(bias=self.first.bias)
        self.view = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.view(x)) @ self.alias[0] + self.table["bias"]


def test_every_alias_becomes_the_given_tensor() -> None:
    module = Aliased()
    given = {n: torch.randn_like(p, requires_grad=True) for n, p in module.named_parameters()}
    fresh = Shadow(module).at(given)
    assert fresh.first.weight is fresh.second.weight is fresh.alias[0] is given["first.weight"]
    assert fresh.table["bias"] is given["first.bias"]
    assert fresh.view is fresh.first


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_recurrent_layers_compute_with_the_given_weights(kind: Callable[..., nn.Module], dtype: Any) -> None:
    module, other = kind(3, 4, num_layers=2, bidirectional=True), kind(3, 4, num_layers=2, bidirectional=True)
    if dtype:
        other = other.to(dtype)
    shadow = Shadow(module, dtype=dtype)
    x = torch.randn(5, 2, 3, dtype=dtype)
    assert torch.equal(shadow.at(parameters(other))(x)[0], other.eval()(x)[0])


def test_parameters_that_are_not_given_are_private_clones() -> None:
    module = nn.Linear(2, 2)
    fresh = Shadow(module).at({"weight": torch.zeros(2, 2)})
    fresh.bias.add_(1)
    assert torch.equal(fresh.bias, module.bias + 1)


def test_buffers_can_be_given() -> None:
    module = nn.BatchNorm1d(2)
    fresh = Shadow(module).at(parameters(module), buffers={"running_mean": torch.tensor([3.0, 4.0])})
    assert fresh.running_mean.tolist() == [3, 4]
    assert module.running_mean.tolist() == [0, 0]


def test_modes() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.BatchNorm1d(2).eval()).train()
    module[2].eval()
    shadow = Shadow(module)
    flags = {mode: [m.training for m in shadow.at(parameters(module), mode=mode)] for mode in ("eval", "train")}
    assert flags == {"eval": [False, False, False], "train": [True, False, False]}
    assert [m.training for m in module] == [True, True, False]


class FrozenBackbone(nn.Sequential):
    """Keeps its first layer in eval mode, as fine-tuned modules do."""

    def train(self, mode: bool = True) -> "FrozenBackbone":
        super().train(mode)
        self[0].eval()
        return self


@pytest.mark.parametrize("cls", [nn.Sequential, FrozenBackbone])
def test_train_mode_of_a_module_all_in_eval_mode_is_what_its_train_method_makes(cls: type[nn.Sequential]) -> None:
    module = cls(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.BatchNorm1d(2)).eval()
    fresh = Shadow(module).at(parameters(module), mode="train")
    assert [m.training for m in fresh] == [cls is nn.Sequential, False, True]
    assert not any(m.training for m in module.modules())


def test_synchronized_batch_norm_takes_the_statistics_of_its_own_process() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    module = nn.SyncBatchNorm(3).double().train()
    fresh = Shadow(module).at(parameters(module), mode="train")
    with mock.patch("torch.distributed.is_initialized", return_value=True):  # where it would ask the others
        found = fresh(x)
    torch.testing.assert_close(found, nn.BatchNorm1d(3).double()(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(module.running_mean, torch.zeros(3, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning")
def test_train_mode_has_no_dropout_inside_layers_either() -> None:
    attention, lstm = nn.MultiheadAttention(4, 2, dropout=0.5), nn.LSTM(4, 4, num_layers=2, dropout=0.5)
    module = nn.ModuleList([attention, lstm])
    fresh = Shadow(module).at(parameters(module), mode="train")
    x = torch.randn(3, 2, 4)
    assert torch.equal(fresh[0](x, x, x)[0], attention.eval()(x, x, x)[0])
    assert torch.equal(fresh[1](x)[0], lstm.eval()(x)[0])
    assert (attention.dropout, lstm.dropout) == (0.5, 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_modules_are_computed_in_float32(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(dtype)
    held = Shadow(module).module
    assert {t.dtype for t in held.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert {p.dtype for p in module.parameters()} == {dtype}


def test_conversion_keeps_ties_and_complex_parts_and_leaves_the_module_alone() -> None:
    module = Aliased()
    module.phase = nn.Parameter(torch.randn(2, dtype=torch.complex64))
    held = Shadow(module, dtype=torch.float64).module
    assert held.first.weight is held.second.weight is held.alias[0]
    assert held.first.weight.dtype == torch.float64
    assert torch.equal(held.phase, module.phase.to(torch.complex128))
    assert module.first.weight.dtype == torch.float32


def test_replacements_reach_nested_modules_of_the_same_kind_only() -> None:
    class Logging(nn.Module):
        def __init__(self, child: nn.Module) -> None:
            super().__init__()
            self.child = child

        def log(self, value: float) -> str:
            return "real"

    inner = Logging(nn.Linear(1, 1))
    module = Logging(inner)
    held = Shadow(module, replacements={"log": lambda value: "silent"}).module
    assert (held.log(0.0), held.child.log(0.0)) == ("silent", "silent")
    assert not hasattr(held.child.child, "log")
    assert (module.log(0.0), inner.log(0.0)) == ("real", "real")


def test_sparse_embeddings_become_dense_in_the_copy_only() -> None:
    module = nn.Embedding(4, 2, sparse=True)
    assert not Shadow(module).module.sparse
    assert module.sparse


class Extractor(nn.Module):
    """A loss of what hooks have put where they can see it: on the module, outside of it, by a method, by a partial."""

    def __init__(self, outside: dict[str, Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.kept: dict[str, Tensor] = {}
        self.read = lambda: outside["output"]

        def keep(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            self.kept["output"] = output
            outside["output"] = output

        self.layer.register_forward_hook(keep)
        self.layer.register_forward_hook(self.keep_square)
        self.layer.register_forward_hook(partial(keep_mean, self.kept))

    def keep_square(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self.square = output.square()

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return self.kept["output"].sum() + self.read().sum() + self.square.sum() + self.kept["mean"]


def keep_mean(kept: dict[str, Tensor], layer: nn.Module, inputs: Any, output: Tensor) -> None:
    kept["mean"] = output.mean()


def test_functions_that_close_over_the_module_close_over_its_copy() -> None:
    outside: dict[str, Any] = {}
    module = Extractor(outside)
    shadow = Shadow(module)
    weights = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    for _ in range(2):
        loss = shadow.at(weights)(torch.ones(2, 3))
        gradients = torch.autograd.grad(loss, list(weights.values()))
        module.zero_grad()
        other = copy.deepcopy(module.layer)
        other._forward_hooks.clear()
        output = other(torch.ones(2, 3))
        (2 * output.sum() + output.square().sum() + output.mean()).backward()
        assert all(torch.allclose(g, p.grad) for g, p in zip(gradients, other.parameters(), strict=True))
    assert outside == module.kept == {}
    assert not hasattr(module, "square")


def test_a_function_with_an_unbound_variable_is_copied() -> None:
    module = nn.Linear(1, 1)

    def late() -> float:
        return value

    module.late = late
    copied = copy_module(module, {})
    value = 1.0
    with pytest.raises(NameError, match="value"):
        copied.late()
    assert module.late() == 1.0


def test_hooks_that_change_gradients_are_not_part_of_the_loss() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].register_full_backward_hook(lambda layer, before, after: (3 * before[0],))
    module[1].register_full_backward_pre_hook(lambda layer, after: (5 * after[0],))
    weights = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    gradient = torch.autograd.grad(Shadow(module).at(weights)(torch.ones(1, 2)).sum(), weights["0.bias"])[0]
    assert torch.allclose(gradient, module[1].weight.sum(0))
    assert module[1]._backward_hooks


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_submodules_compute_with_the_given_tensors() -> None:
    module = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 1), nn.Tanh())))
    weights = {n: torch.zeros_like(p).requires_grad_() for n, p in module.named_parameters()}
    output = Shadow(module).at(weights)(torch.ones(1, 2))
    assert output.item() == 0
    assert torch.equal(torch.autograd.grad(output, weights["0.0.weight"])[0], torch.ones(1, 2))
    assert module(torch.ones(1, 2)).item() != 0


class CompilesItsForward(nn.Module):
    """A method that is replaced by its compiled form."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.forward = torch.compile(self.forward, backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_compiled_method_of_the_copy_is_that_of_the_copy() -> None:
    module = CompilesItsForward()
    weights = {n: torch.zeros_like(p).requires_grad_() for n, p in module.named_parameters()}
    output = Shadow(module).at(weights)(torch.ones(1, 2))
    assert output.item() == 0
    assert torch.equal(torch.autograd.grad(output, weights["layer.weight"])[0], torch.ones(1, 2))


def test_replacements_are_private_to_each_copy() -> None:
    module = nn.Linear(1, 1)
    module.notes = None
    shadow = Shadow(module, replacements={"notes": []})
    first, second = shadow.at({}), shadow.at({})
    first.notes.append(1)
    assert (module.notes, second.notes, shadow.module.notes) == (None, [], [])
