"""What several tests of the landscape compare with."""

import pytest
from torch import Tensor

from tests import oracles
from tests.problems import ConvNet, cross_entropy, images, split


@pytest.fixture(scope="module")
def hessian() -> Tensor:
    module, batches = ConvNet(), split(images(), [64, 6])
    loss = oracles.mean_loss(module, batches, cross_entropy, [64.0, 6.0])
    return oracles.dense_hessian(loss, oracles.flat_parameters(module))
