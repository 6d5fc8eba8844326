"""Cases with a known answer on which other packages are wrong, and what this one says: a table that anyone can run.

python -m benchmarks.correctness

A small tanh network on scikit-learn's digits, whose Hessian is built as a dense float64 matrix; seconds in all.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from io import StringIO
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.works import Batch
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.random_vectors import rademacher
from lmc_lightning.landscape.curvature.spectrum import spectrum
from lmc_lightning.landscape.paths.line import endpoint_of, linear_path
from lmc_lightning.landscape.paths.profiles import profiles_along
from lmc_lightning.landscape.paths.states import StateEvaluator
from lmc_lightning.landscape.surface.directions import given_directions, random_directions
from lmc_lightning.landscape.surface.slices import centred_grid, surface
from lmc_lightning.linalg.trace import trace_to_precision

Answer = float | str


@dataclass(frozen=True)
class Case:
    """A question with a known answer, and who answers what."""

    peer: str
    question: str
    truth: Answer
    theirs: Callable[[], Answer]
    ours: Callable[[], Answer]
    tolerance: float = 1e-3
    """Of a number, relative."""

    def is_right(self, answer: Answer) -> bool:
        """Whether an answer is the truth."""
        if isinstance(answer, str) or isinstance(self.truth, str):
            return answer == self.truth
        return abs(answer - self.truth) <= self.tolerance * max(abs(self.truth), 1e-12)


def cases() -> Iterator[Case]:
    """All of them, also those of packages that are not installed."""
    for of in (_pyhessian, _eigenthings, _curvlinops, _landscaper, _loss_landscapes, _rebasin):
        yield from of()


def answer(ask: Callable[[], Answer]) -> Answer:
    """What is answered, or the name of the exception."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # the peers draw from it
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return ask()
    except Exception as error:
        return f"raises {type(error).__name__}"


@cache
def data() -> Batch:
    """70 digits."""
    digits = load_digits()
    return torch.from_numpy(digits.data[:70] / 16).float(), torch.from_numpy(digits.target[:70]).long()


def network() -> nn.Module:
    """64 → 8 → 10 with tanh, trained a little."""
    return copy.deepcopy(_trained())


@cache
def _trained() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(module(data()[0]), data()[1]).backward()
        optimizer.step()
    return module


@cache
def dense(scale: float = 1.0) -> Tensor:
    """The Hessian of the mean loss, ``(P, P)`` float64."""
    module = network().double()
    shapes = {name: p.shape for name, p in module.named_parameters()}
    theta = torch.cat([p.detach().flatten() for p in module.parameters()])

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return scale * F.cross_entropy(functional_call(module, named, (data()[0].double(),)), data()[1])

    return hessian(loss, theta)


def top(count: int = 1, scale: float = 1.0) -> list[float]:
    """The largest eigenvalues."""
    values: list[float] = torch.linalg.eigvalsh(dense(scale)).flip(0)[:count].tolist()
    return values


def our_spectrum(scale: float = 1.0, sizes: tuple[int, ...] = (70,), **options: Any) -> Any:
    """Our result on the data in batches of the given sizes."""
    batches = list(zip(data()[0].split(sizes), data()[1].split(sizes), strict=True))
    objective = Objective(network(), batches, lambda m, b: scale * F.cross_entropy(m(b[0]), b[1]))
    generator = torch.Generator().manual_seed(0)
    return spectrum(objective, objective.theta(), generator=generator, **{"num_probes": 0, **options})


class Scaled(nn.Module):
    """Cross-entropy times a constant."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.reduction = scale, "mean"

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss."""
        return self.scale * F.cross_entropy(outputs, labels)


def _pyhessian() -> Iterator[Case]:
    def operator(scale: float = 1.0) -> Any:
        from pyhessian import hessian

        return hessian(network(), Scaled(scale), data=data(), cuda=False)

    def trace() -> Answer:
        runs = []
        for seed in range(20):
            torch.manual_seed(seed)
            runs.append(float(np.mean(operator().trace())))
        return max(runs, key=lambda value: abs(value - truth))

    def mode() -> Answer:
        from pyhessian import hessian

        module = network().train()
        hessian(module, nn.CrossEntropyLoss(), data=data(), cuda=False)
        return "train" if module.training else "eval"

    def our_mode() -> Answer:
        module = network().train()
        objective = Objective(module, [data()], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
        objective.hvp(objective.theta())(objective.theta())
        return "train" if module.training else "eval"

    truth = float(dense().trace())
    worst = "trace, asked for to 0.1 % (ours: to 5 %), the worst of 20 seeds, right within 10 %"
    yield Case("PyHessian", worst, truth, trace, lambda: our_trace(truth), tolerance=0.1)
    tiny = top(scale=1e-8)[0]
    yield Case(
        "PyHessian",
        "λ_max of the loss times 1e-8",
        tiny,
        lambda: float(operator(1e-8).eigenvalues()[0][0]),
        lambda: float(our_spectrum(1e-8).lambda_max),
        tolerance=1e-2,
    )
    yield Case(
        "PyHessian",
        "density: is there one?",
        "yes",
        lambda: "yes" if operator().density(iter=10) else "no",
        lambda: "yes" if our_spectrum(num_probes=2, num_steps=10).quadrature is not None else "no",
    )
    yield Case("PyHessian", "mode of a module in training, afterwards", "train", mode, our_mode)


def our_trace(truth: float) -> Answer:
    """The worst of 20 seeds."""
    runs = []
    for seed in range(20):
        objective = Objective(network(), [data()], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
        generator = torch.Generator().manual_seed(seed)
        with objective.hvp(objective.theta()) as product:
            draw = partial(rademacher, objective.num_params, generator)
            runs.append(trace_to_precision(product, draw, tolerance=0.05).value)
    return max(runs, key=lambda value: abs(value - truth))


def _eigenthings() -> Iterator[Case]:
    def operator(sizes: tuple[int, ...]) -> Any:
        batches = list(zip(data()[0].split(sizes), data()[1].split(sizes), strict=True))
        return peers.eigenthings(network(), batches)[0]

    def largest() -> Answer:
        from hessian_eigenthings import lanczos

        return float(lanczos(operator((64, 6)), k=10, seed=0).eigenvalues.max())

    def converged() -> Answer:
        from hessian_eigenthings import lanczos

        return f"{int(lanczos(operator((70,)), k=5, seed=0).converged.sum())} of 5"

    def ours_converged() -> Answer:
        return f"{int(our_spectrum(num_negative=0).eigenpairs.converged.sum())} of 5"

    yield Case(
        "hessian-eigenthings",
        "λ_max of 70 examples given as 64 + 6",
        top()[0],
        largest,
        lambda: float(our_spectrum(sizes=(64, 6)).lambda_max),
    )
    yield Case(
        "hessian-eigenthings", "top five at the defaults: how many converge?", "5 of 5", converged, ours_converged
    )


def _curvlinops() -> Iterator[Case]:
    def copies(nodes: Tensor) -> float:
        return float((nodes > top()[0] * (1 - 1e-3)).sum())

    def theirs() -> Answer:
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        return copies(fast_lanczos(peers.curvlinops(network(), [data()])[0], 80)[0])

    def ours() -> Answer:
        quadrature = our_spectrum(num_eigenvalues=0, num_negative=0, num_probes=1, num_steps=80).quadrature
        return copies(quadrature.nodes[quadrature.weights > 0])

    def closure() -> Answer:
        from curvlinops import HessianLinearOperator

        module = network()
        loss = lambda outputs, labels: F.cross_entropy(outputs, labels)  # noqa: E731
        HessianLinearOperator(module, loss, list(module.parameters()), [data()])
        return "measured"

    question = "copies of the simple λ_max among 80 Lanczos nodes of the density"
    yield Case("curvlinops", question, 1.0, theirs, ours)
    yield Case(
        "curvlinops",
        "a loss that is a plain function",
        "measured",
        closure,
        lambda: "measured" if our_spectrum().lambda_max else "nothing",
    )


def _landscaper() -> Iterator[Case]:
    def cosine() -> Answer:
        from landscaper.utils import generate_random_orthogonal_directions

        first, second = (peers.as_vector(d) for d in generate_random_orthogonal_directions(network(), 2))
        return float(F.cosine_similarity(first, second, dim=0).abs())

    def our_cosine() -> Answer:
        objective = _mean_loss(network())
        found = random_directions(objective.theta(), objective.layout, torch.Generator().manual_seed(0))
        return float(F.cosine_similarity(*found.vectors, dim=0).abs().round(decimals=5))

    def landscape(seed: int = 0) -> tuple[Any, Any]:
        from landscaper.compute import compute_loss_landscape

        module = network()
        np.random.seed(seed)  # noqa: NPY002
        unit = [torch.ones_like(p) for p in module.parameters()]
        score = lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]).item()  # noqa: E731
        return compute_loss_landscape(module, data(), [unit], score, steps=5, distance=0.5, dim=1, device="cpu")

    def left_end() -> Answer:
        return float(landscape()[0][0])

    def our_left_end() -> Answer:
        objective = _mean_loss(network())
        ones = torch.ones_like(objective.theta())
        direction = given_directions(objective.theta().norm() * ones / ones.norm())
        return float(surface(objective, direction, centred_grid(0.5, 5)).losses[0])

    def repeated() -> Answer:
        return "same" if np.array_equal(landscape(0)[0], landscape(1)[0]) else "different"

    def our_repeated() -> Answer:
        return "same" if our_left_end() == our_left_end() else "different"

    yield Case("landscaper", "cosine of two 'orthogonal' random directions", 0.0, cosine, our_cosine)
    theta = peers.as_vector(list(network().parameters()))
    at_label = _loss_at(theta - 0.5 * theta.norm() / len(theta) ** 0.5)
    question = "loss at coordinate −0.5 (in ‖θ‖) of 5 grid points"
    yield Case("landscaper", question, at_label, left_end, our_left_end)
    yield Case("landscaper", "the same surface computed twice", "same", repeated, our_repeated)


def _loss_at(theta: Tensor) -> float:
    module = network()
    for p, part in zip(module.parameters(), peers.as_list(theta, module), strict=True):
        p.data = part.clone()
    return float(F.cross_entropy(module(data()[0]), data()[1]).detach())


def _mean_loss(module: nn.Module) -> Objective:
    return Objective(module, [data()], lambda m, b: F.cross_entropy(m(b[0]), b[1]))


def _other() -> nn.Module:
    module = network()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(-1)
    return module


def _our_path(module: nn.Module) -> Any:
    objective = _mean_loss(module)
    end = endpoint_of(objective, dict(_other().named_parameters()))
    line = linear_path(endpoint_of(objective), end)
    return profiles_along(StateEvaluator({"": objective}), line, [0, 0.5, 1])[""]


def _third() -> nn.Module:
    module = network()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.5).add_(0.1)
    return module


def _loss_landscapes() -> Iterator[Case]:
    def line(module: nn.Module) -> Any:
        from loss_landscapes import linear_interpolation
        from loss_landscapes.metrics import Loss

        return linear_interpolation(module, _other(), Loss(F.cross_entropy, *data()), steps=2)

    def first() -> Answer:
        return float(line(network())[0])

    def on_plane() -> Answer:
        from loss_landscapes import planar_interpolation
        from loss_landscapes.metrics import Loss

        loss = Loss(F.cross_entropy, *data())
        return float(planar_interpolation(network(), _other(), _third(), loss, steps=4)[2, 1])

    def our_plane() -> Answer:
        objective = _mean_loss(network())
        ends = [peers.as_vector(list(module.parameters())) for module in (_other(), _third())]
        directions = given_directions(torch.stack([end - objective.theta() for end in ends], dim=1))
        quarters = torch.arange(4, dtype=torch.float64) / 4
        return float(surface(objective, directions, quarters, quarters).losses[2, 1])

    def start(path: Callable[[nn.Module], Any]) -> Answer:
        module = network()
        path(module)
        same = all(torch.equal(p, q) for p, q in zip(module.parameters(), network().parameters(), strict=True))
        return "as before" if same else "overwritten"

    def trainable(path: Callable[[nn.Module], Any]) -> Answer:
        module = network()
        path(module)
        return "yes" if all(p.requires_grad for p in module.parameters()) else "no"

    own = float(F.cross_entropy(network()(data()[0]), data()[1]).detach())
    peer = "loss-landscapes"
    yield Case(peer, "loss at the start of the path", own, first, lambda: float(_our_path(network()).losses[0]))
    corner, one, two = (peers.as_vector(list(m.parameters())) for m in (network(), _other(), _third()))
    at_label = _loss_at(corner + (one - corner) * 2 / 4 + (two - corner) * 1 / 4)
    yield Case(peer, "plane: loss at [2, 1] of 4 × 4 points from one corner", at_label, on_plane, our_plane)
    yield Case(peer, "start network afterwards", "as before", lambda: start(line), lambda: start(_our_path))
    yield Case(
        peer, "are its parameters trainable afterwards?", "yes", lambda: trainable(line), lambda: trainable(_our_path)
    )


class Positioned(nn.Module):
    """A layer and a parameter that is called neither weight nor bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.positions = nn.Linear(64, 10), nn.Parameter(torch.ones(64))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.layer(images + self.positions)
        return logits


def _rebasin() -> Iterator[Case]:
    def ends() -> tuple[Positioned, Positioned]:
        torch.manual_seed(0)
        first, last = Positioned(), Positioned()
        last.positions.data.mul_(3)
        return first, last

    def theirs() -> Answer:
        from rebasin.interpolation import LerpSimple

        found: list[float] = []
        LerpSimple(ends(), lambda m, device: found.append(float(m.positions.detach().mean())) or 0.0).interpolate(
            steps=1
        )
        return found[0]

    def ours() -> Answer:
        first, last = ends()
        objective = Objective(first, [data()], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
        path = linear_path(endpoint_of(objective), endpoint_of(objective, dict(last.named_parameters())))
        return float(objective.module_at(path(1 / 3)[0]).positions.mean())  # type: ignore[operator, union-attr]

    question = "a parameter called 'positions', 1 to 3, at a third of the way"
    yield Case("rebasin", question, 5 / 3, theirs, ours)


def main() -> None:
    """Print the table."""
    print("| package | question | truth | it says | we say |")
    print("|---|---|---:|---:|---:|")
    for case in (case for case in cases() if peers.installed(case.peer)):
        theirs, ours = answer(case.theirs), answer(case.ours)
        cells = [_text(a) + ("" if case.is_right(a) else " ✗") for a in (theirs, ours)]
        print(f"| {case.peer} | {case.question} | {_text(case.truth)} | {' | '.join(cells)} |")


def _text(value: Answer) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


if __name__ == "__main__":
    main()
