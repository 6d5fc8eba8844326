"""Alignment as users meet it: of modules, in the offline barrier, and beside the barriers of a run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lmc_lightning import Aligned, CheckpointBranching, InterpolationBarrier, align, align_all, interpolation_barrier
from lmc_lightning.core.glassbox import rng_state
from lmc_lightning.core.structure import digest
from lmc_lightning.landscape.paths.barrier import DEFINITIONS
from lmc_lightning.models import MLP
from tests.branching.runs import sha
from tests.callbacks.runs import Classifier, cross_entropy, fit, loader, train_loader
from tests.problems import generator


def renamed(module: Classifier, order: list[int]) -> Classifier:
    """The same function with the channels of its first layer in another order."""
    other = copy.deepcopy(module)
    state = module.state_dict()
    for name, tensor in state.items():
        if "net.0." in name or "net.1.running" in name or (name.startswith("net.1.") and tensor.ndim):
            state[name] = tensor[order]
        elif name.startswith(f"net.{len(module.net) - 3}.weight"):
            state[name] = tensor[:, order]
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("method", ["weights", "activations"])
def test_a_renamed_network_is_aligned_exactly(batch_norm: bool, method: Any) -> None:
    module = Classifier(batch_norm)
    other = renamed(module, [1, 0])
    with torch.no_grad():
        (x, _), *_ = loader()
        assert torch.allclose(module.eval()(x), other.eval()(x))
    aligned = align(module, other, loader(), method=method)
    assert all(torch.equal(a, aligned.module.state_dict()[n]) for n, a in module.state_dict().items())
    assert aligned.matching.moved > 0
    options: dict[str, Any] = {"num_points": 5}
    assert interpolation_barrier(module, other, loader(), **options).values.std() > 1e-3
    found = interpolation_barrier(module, other, loader(), align=method, **options)
    assert found.barrier == 0
    assert found.values.std() < 1e-7


def test_neither_module_nor_any_random_stream_is_changed() -> None:
    module, other, data = Classifier(True).train(), renamed(Classifier(True), [1, 0]), train_loader()
    before = [digest(dict(m.state_dict())) for m in (module, other)], sha(rng_state()), data.generator.get_state()
    align(module, other, data)
    assert ([digest(dict(m.state_dict())) for m in (module, other)], sha(rng_state())) == before[:2]
    assert torch.equal(data.generator.get_state(), before[2])
    assert all(m.training for m in module.modules())


def test_a_plain_module_needs_no_loss() -> None:
    module, other = Classifier(), renamed(Classifier(), [1, 0])
    for options in ({}, {"loss_fn": cross_entropy}, {"method": "activations"}):
        found = align(module.net, other.net, loader(), **options)
        assert all(torch.equal(p, q) for p, q in zip(found.module.parameters(), module.net.parameters(), strict=True))


def test_many_modules_are_aligned_to_one_reference() -> None:
    module = Classifier()
    found = align_all(module, [renamed(module, [1, 0]), module], loader())
    assert [f.matching.moved > 0 for f in found] == [True, False]
    assert found[0].matching.groups is found[1].matching.groups
    for aligned in found:
        assert all(torch.equal(a, aligned.module.state_dict()[n]) for n, a in module.state_dict().items())


def test_a_result_says_in_one_line_what_was_done() -> None:
    found = align(Classifier(), renamed(Classifier(), [1, 0]), loader())
    assert isinstance(found, Aligned)
    assert repr(found).startswith("Aligned(Classifier: 2 groups of 6 channels, 33% of them moved; weights objective ")


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="method"):
        align(Classifier(), Classifier(), loader(), method="names")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Only networks of one architecture"):
        align(Classifier(), Classifier(batch_norm=True), loader())
    with pytest.raises(ValueError, match="align"):
        interpolation_barrier(Classifier(), Classifier(), loader(), align="names")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="align"):
        InterpolationBarrier(reference="initial", align="names")  # type: ignore[arg-type]


# -- beside the barriers of a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["weights", "activations"])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> InterpolationBarrier:
    """Two epochs and a child of the start that differs in noise."""
    barrier = InterpolationBarrier(
        num_points=3,
        epochs=[2],
        align=request.param,
        definitions=("barrier", "instability"),
        pairs=("trunk",),
        on_error="raise",
    )
    root: Path = tmp_path_factory.mktemp(request.param)
    fit(Classifier(True), CheckpointBranching(epochs=[0]), barrier, max_epochs=2, default_root_dir=root)
    return barrier


def test_aligned_barriers_are_recorded_beside_the_others(run: InterpolationBarrier) -> None:
    names = {r.name for r in run.results if r.step == 6}
    pair = {f"barrier/train_{metric}/k1_000" for metric in ("loss", "error")}
    assert names == {f"{key}{of}{d}" for key in pair for of in ("", "/aligned") for d in ("", "/instability")}
    assert {key for key, step in run.barriers if step == 6} == {f"{key}{of}" for key in pair for of in ("", "/aligned")}


def test_the_evidence_says_how_the_alignment_was_found(run: InterpolationBarrier) -> None:
    for record in run.results:
        assert ("align" in record.evidence) == ("aligned" in record.name)
        if "aligned" in record.name:
            assert record.evidence["align"] == run.align
            assert record.evidence["align_channels"] == 6
            assert record.evidence["align_objective"] >= record.evidence["align_identity_objective"]
            assert record.evidence["align_dropped"] == {}


def test_aligned_rows_of_the_table_are_told_apart(run: InterpolationBarrier) -> None:
    table = run.to_table()
    assert set(table["align"].dropna()) == {run.align}
    counts = table[table["step"] == 6].groupby(table["align"].isna()).size()
    assert counts[True] == counts[False] == 2 * len(DEFINITIONS)


def test_at_the_branch_step_nothing_moves(run: InterpolationBarrier) -> None:
    at_branch = [r for r in run.results if r.step == 0 and "aligned" in r.name]
    assert at_branch
    assert all(r.evidence["align_moved"] == 0 for r in at_branch)
    assert all(r.value == 0 for r in at_branch)


# -- trained networks --------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=generator(0))
    return torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]


def trained(width: int, seed: int, images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    net = MLP((width,), in_features=64)
    optimizer, draws = torch.optim.Adam(net.parameters(), lr=2e-3), generator(seed)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (64,), generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_the_barrier_between_trained_networks_shrinks_and_nearly_vanishes_in_a_wide_one(method: Any) -> None:
    images, labels = digits()
    data, found = [(images, labels)], {}
    for width in (16, 256):
        nets = [trained(width, seed, images, labels, steps=150) for seed in (1, 2)]
        options: dict[str, Any] = {"loss_fn": cross_entropy, "num_points": 11, "num_examples": 512}
        found[width] = [interpolation_barrier(*nets, data, align=how, **options).barrier for how in (None, method)]
    assert found[16][1] < 0.7 * found[16][0]
    assert found[256][1] < 0.1 * found[256][0]
