from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lmc_lightning.callbacks.bridge.guards import check_choice, check_module, check_trainer
from tests.zoo.harness import QUIET
from tests.zoo.optimization import Gan
from tests.zoo.outputs import FetchesItsBatches, Plain


class OurFSDP(FSDPStrategy):
    """A project's own strategy on top of Lightning's."""


DeepSpeedStrategy = type("DeepSpeedStrategy", (), {})  # needs a package that is not there


@pytest.mark.parametrize("strategy", [FSDPStrategy, OurFSDP, ModelParallelStrategy, DeepSpeedStrategy])
def test_sharded_parameters_are_refused_with_the_way_by_a_checkpoint(strategy: type[Any]) -> None:
    trainer = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(RuntimeError, match=r"Strategy shards the parameters.*consolidated checkpoint.*measure\("):
        check_trainer(trainer)


def test_a_plain_trainer_is_fine() -> None:
    check_trainer(Trainer(logger=False, **QUIET))


def test_manual_optimization_needs_a_loss() -> None:
    with pytest.raises(RuntimeError, match=r"Gan optimizes manually.*loss_fn=lambda module, batch: .*parameters=\["):
        check_module(Gan(), loss_fn=None, captures=True)
    check_module(Gan(), loss_fn=lambda module, batch: batch.sum(), captures=True)


def test_a_step_that_fetches_its_batches_needs_a_loader() -> None:
    with pytest.raises(RuntimeError, match=r"dataloader_iter, so none can be captured\. Pass probe_dataloader="):
        check_module(FetchesItsBatches(), loss_fn=None, captures=True)
    check_module(FetchesItsBatches(), loss_fn=None, captures=False)


def test_any_other_module_is_fine() -> None:
    check_module(Plain(), loss_fn=None, captures=True)


def test_a_choice_is_named_with_what_may_be_chosen() -> None:
    check_choice("mode", "train", ("eval", "train"))
    with pytest.raises(ValueError, match="Expected mode to be 'eval' or 'train', got 'test'"):
        check_choice("mode", "test", ("eval", "train"))
