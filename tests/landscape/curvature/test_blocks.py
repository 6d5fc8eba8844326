import pytest
import torch
from torch import Tensor

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature.blocks import BlockSpectrum, block_spectra, tensor_blocks
from tests import problems
from tests.problems import ConvNet, cross_entropy, generator, images, split


def conv_net(chunk_size: int = 35) -> Objective:
    return Objective(ConvNet(), split(images(), [64, 6]), cross_entropy, chunk_size=chunk_size)


def measured(objective: Objective, blocks: dict[str, tuple[int, ...]], num_steps: int) -> list[BlockSpectrum]:
    with objective.hvp(objective.theta()) as product:
        found = block_spectra(product, blocks, num_steps=num_steps, tolerance=1e-3, generator=generator(0))
        return list(found)


def block_of(matrix: Tensor, objective: Objective, tensors: tuple[int, ...]) -> Tensor:
    places = torch.arange(objective.num_params).split(objective.layout.sizes)
    chosen = torch.cat([places[number] for number in tensors])
    return matrix[chosen][:, chosen]


def test_a_module_owns_the_tensors_directly_in_it() -> None:
    names = ["scale", "body.0.weight", "body.1.weight", "body.1.bias", "body.0.bias", "head.weight"]
    assert tensor_blocks(names, "module") == {"root": (0,), "body.0": (1, 4), "body.1": (2, 3), "head": (5,)}
    assert tensor_blocks(names, "tensor") == {name: (number,) for number, name in enumerate(names)}


@pytest.mark.parametrize("kind", ["module", "tensor"])
def test_blocks_are_those_of_the_dense_hessian(hessian: Tensor, kind: str) -> None:
    objective = conv_net()
    blocks = tensor_blocks(objective.layout.names, kind)  # type: ignore[arg-type]
    for found in measured(objective, blocks, num_steps=60):
        dense = block_of(hessian, objective, blocks[found.name])
        exact = torch.linalg.eigvalsh(dense)
        assert found.num_params == len(dense)
        assert found.converged
        assert found.lambda_max == pytest.approx(float(exact[-1]), rel=1e-8, abs=1e-12)
        assert found.lambda_min == pytest.approx(float(exact[0]), rel=1e-6, abs=1e-8)
        assert float(found.weights.sum()) == pytest.approx(1, rel=1e-12)


def test_the_density_of_a_block_has_the_moments_of_its_probe(hessian: Tensor) -> None:
    """Exactly up to degree 2m − 1, as vᵀA^q v/‖v‖² with the signs v that the generator gives."""
    objective = conv_net()
    (found,) = measured(objective, {"head": (3, 4)}, num_steps=4)
    signs = torch.randint(0, 2, (found.num_params,), generator=generator(0), dtype=torch.int8).double() * 2 - 1
    dense = block_of(hessian, objective, (3, 4))
    for power in range(8):
        expected = signs @ torch.linalg.matrix_power(dense, power) @ signs / len(signs)
        assert float(found.weights @ found.nodes**power) == pytest.approx(float(expected), rel=1e-9)


def test_too_few_products_are_flagged_with_the_true_residual(hessian: Tensor) -> None:
    objective = conv_net()
    (found,) = measured(objective, {"conv": (0,)}, num_steps=2)
    assert not found.converged
    exact = torch.linalg.eigvalsh(block_of(hessian, objective, (0,)))
    assert (exact - found.lambda_max).abs().min() <= found.residual


def test_a_matrix_factorisation_has_the_known_blocks() -> None:
    """For ½‖UV − M‖² they are I ⊗ VVᵀ and UᵀU ⊗ I: every eigenvalue repeated, so few products are enough."""
    problem = problems.matrix_factorisation(rows=3, rank=2, columns=4)
    objective = problem.objective()
    u, v = problem.module["u"].detach(), problem.module["v"].detach()
    blocks = tensor_blocks(objective.layout.names, "tensor")
    with objective.hvp(objective.theta()) as product:
        found = list(block_spectra(product, blocks, num_steps=10, tolerance=1e-3, generator=generator(0)))
        assert product.num_products == 4
    for block, gram in zip(found, (v @ v.T, u.T @ u), strict=True):
        assert block.nodes.tolist() == pytest.approx(torch.linalg.eigvalsh(gram).flip(0).tolist(), rel=1e-10)


def test_unused_parameters_have_a_block_of_zeros() -> None:
    objective = conv_net()
    unused = tensor_blocks(objective.layout.names, "module")["unused"]
    (found,) = measured(objective, {"unused": unused}, num_steps=5)
    assert (found.lambda_max, found.lambda_min, found.residual, found.converged) == (0, 0, 0, True)


def test_stopping_ends_with_the_blocks_that_are_done() -> None:
    objective = conv_net()
    blocks = tensor_blocks(objective.layout.names, "tensor")
    with objective.hvp(objective.theta()) as product:
        found = block_spectra(
            product, blocks, num_steps=2, tolerance=1e-3, generator=generator(0), should_stop=lambda: True
        )
        assert len(list(found)) == 1
