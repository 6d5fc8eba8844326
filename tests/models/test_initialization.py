import random

import numpy as np
import pytest
import torch
from torch import nn

from lmc_lightning.models import LeNet5, seeded_init


def weights(seed):
    with seeded_init(seed):
        return nn.utils.parameters_to_vector(LeNet5().parameters())


def test_the_seed_decides_the_weights():
    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_the_weights_are_those_of_a_freshly_seeded_process():
    torch.manual_seed(3)
    assert torch.equal(weights(3), nn.utils.parameters_to_vector(LeNet5().parameters()))


def global_states():
    # The legacy call is the only way to read numpy's global generator.
    name, words, *position = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), (name, words.tolist(), position)


def test_global_generators_are_untouched():
    before = global_states()
    weights(3)
    assert global_states() == before


def test_global_generator_is_restored_after_an_exception():
    def fail():
        with seeded_init(0):
            torch.rand(3)
            raise RuntimeError("no network")

    before = global_states()
    with pytest.raises(RuntimeError, match="no network"):
        fail()
    assert global_states() == before


def test_weights_are_drawn_on_the_cpu_under_any_default_device():
    with torch.device("meta"):
        assert weights(3).device.type == "cpu"
