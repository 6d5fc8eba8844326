"""Similarity of a run with its start, its last visit, a checkpoint and its children, and of two modules."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lmc_lightning import CheckpointBranching, RepresentationSimilarity, measure, representation_similarity
from tests.callbacks.runs import Classifier, TensorBoardLogger, batches, cross_entropy, documented, fit, is_picture

LAYERS = ["net.0", "net.4", "net.6"]


def similar(**options: Any) -> RepresentationSimilarity:
    return RepresentationSimilarity(**{"on_error": "raise", "probe_dataloader": batches(), **options})


def values(callback: Any, key: str) -> dict[int, float]:
    return {r.step: r.value for r in callback.results if r.name == f"similarity/{key}"}


def test_the_start_is_compared_with_every_visit_as_offline(tmp_path: Path) -> None:
    module, ours = Classifier(), similar(reference="initial")
    start = copy.deepcopy(module)
    fit(module, ours, default_root_dir=tmp_path)
    assert values(ours, "cka/initial")[0] == pytest.approx(1.0)
    assert [*values(ours, "cka/initial/net.4")] == [0, 3, 6]
    found = representation_similarity(start, module, batches())
    assert found.layers_a == tuple(LAYERS)
    for layer, (debiased, biased, stderr) in found.same_layers().items():
        (record,) = [r for r in ours.results if r.step == 6 and r.name == f"similarity/cka/initial/{layer}"]
        assert record.value == pytest.approx(debiased, rel=1e-12)
        assert record.evidence["biased"] == pytest.approx(biased, rel=1e-12)
        assert record.stderr == pytest.approx(stderr, rel=1e-9)
        assert debiased < 1 - 1e-6
    mean = sum(value.debiased for value in found.same_layers().values()) / 3
    assert values(ours, "cka/initial")[6] == pytest.approx(mean)
    with np.load(next(tmp_path.rglob("arrays/similarity_map_initial_000006.npz"))) as stored:
        np.testing.assert_allclose(stored["debiased"], found.debiased.numpy())
        assert stored["layers_a"].tolist() == LAYERS


def test_the_last_visit_and_a_checkpoint_are_references(tmp_path: Path) -> None:
    module = Classifier()
    torch.save(module.state_dict(), tmp_path / "begin.ckpt")
    previous, stored = similar(reference="previous"), similar(reference=str(tmp_path / "begin.ckpt"), name="b")
    initial = similar(reference="initial", name="c")
    fit(module, previous, stored, initial, default_root_dir=tmp_path)
    assert [*values(previous, "cka/previous")] == [3, 6]
    assert values(stored, "cka/b/begin") == values(initial, "cka/c/initial")
    assert values(previous, "cka/previous")[3] == values(initial, "cka/c/initial")[3]


def test_children_are_compared_with_the_trunk_and_each_other(tmp_path: Path) -> None:
    logger, module = TensorBoardLogger(), Classifier()
    branching = CheckpointBranching(epochs=(1,), children=2)
    ours = similar(pairs=("trunk", "siblings"), epochs=[1, 2])
    fit(module, branching, ours, logger=logger, default_root_dir=tmp_path)
    assert values(ours, "cka/k1_001/child_0")[3] == pytest.approx(1.0)  # at the branch point
    assert [*values(ours, "cka/k1_001/siblings_0_1")] == [6]  # at the branch point they are one network
    children = []
    for name in ("k1_001_child_0", "k1_001_child_1"):
        children.append(copy.deepcopy(module))
        children[-1].load_state_dict(branching.family.state(name, 2))
    found = representation_similarity(*children, batches())
    for layer, (debiased, *_) in found.same_layers().items():
        assert values(ours, f"cka/k1_001/siblings_0_1/{layer}")[6] == pytest.approx(debiased, rel=1e-12)
    (record,) = [r for r in ours.results if r.step == 6 and r.name == "similarity/cka/k1_001/siblings_0_1"]
    assert record.evidence["later_epoch"] == 2
    assert record.evidence["run"] == "k1_001_child_1"
    assert {key for _, key in logger.figures} >= {"similarity_map/k1_001/child_0", "similarity_map/k1_001/siblings_0_1"}
    before = list(ours.results)
    ours.measure_family(branching.family, branching._trunk.trainer, module)  # type: ignore[union-attr]
    assert ours.results == before


def test_mixtures_are_other_inputs_and_the_same_ones_offline() -> None:
    module, ours = Classifier(), similar(reference="initial", inputs="mixup", epochs=[2])
    start = copy.deepcopy(module)
    fit(module, ours)
    mixed, plain = (representation_similarity(start, module, batches(), inputs=i) for i in ("mixup", "data"))
    for layer, (debiased, *_) in mixed.same_layers().items():
        assert values(ours, f"cka/initial/{layer}")[6] == pytest.approx(debiased, rel=1e-12)
    assert not torch.allclose(mixed.debiased, plain.debiased, rtol=1e-3)


def test_networks_of_other_architecture_and_plain_modules_are_compared_offline() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3))
    found = representation_similarity(
        Classifier().net, net, batches(), layers=["0", "logits"], layers_b=["1", "2"], loss_fn=cross_entropy
    )
    assert (found.layers_a, found.layers_b) == (("0", "logits"), ("1", "2"))
    assert found.num_examples == 24
    with pytest.raises(ValueError, match="Sequential has no training_step"):
        representation_similarity(net, net, batches())


def test_every_logged_key_and_picture_has_a_line_in_the_docstring(tmp_path: Path) -> None:
    logger, ours = TensorBoardLogger(), similar(reference="initial")
    fit(Classifier(), ours, logger=logger, default_root_dir=tmp_path)
    rows = documented(RepresentationSimilarity)
    patterns = [re.escape(k).replace(r"\{reference\}", "initial").replace(r"\{layer\}", r"net\.\d") for k in rows]
    for key in logger.by_step("similarity")[6]:
        assert any(re.fullmatch(p, key) for p in patterns), key
    pictures = [k.removesuffix("/…") for k, text in rows.items() if is_picture(text)]
    assert {key for _, key in logger.figures} == {f"{p}/initial" for p in pictures}


def test_misuse_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="RepresentationSimilarity has nothing to compare with"):
        fit(Classifier(), similar())
    with pytest.raises(ValueError, match="Beside CheckpointBranching, RepresentationSimilarity compares children"):
        fit(Classifier(), similar(reference="initial"), CheckpointBranching())
    with pytest.raises(ValueError, match="Expected inputs to be 'data' or 'mixup'"):
        similar(inputs="noise")
    with pytest.raises(ValueError, match=r"Call representation_similarity\(module_a, module_b, dataloader\)"):
        measure(Classifier(), batches(), [similar(reference="initial")])
