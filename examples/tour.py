# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of a loss landscape
#
# [![Open in Colab][badge]][colab]
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/lmc-lightning/lmc_lightning/blob/main/examples/tour.ipynb
#
# A network with $P$ weights is a point $\theta \in \mathbb{R}^P$, and its training loss $L(\theta)$ is a height
# above that point: a landscape in $P$ dimensions. We train ten small networks and look at it: how steep and how
# curved it is, what lies between two networks, and which way they took.
#
# You need to know what a gradient is, and how a network is trained. Everything runs on a CPU, in about two minutes.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("lmc_lightning") is None:  # on Colab, say
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "lmc-lightning[html]"], check=True)

# %%
# %matplotlib inline
import copy
import itertools
import logging
import os
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import HTML
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lmc_lightning import (
    CurveTraining,
    HessianSpectrum,
    Sharpness,
    Trajectory,
    WeightTrajectory,
    align,
    connect,
    convergence_statistics,
    interpolation_barrier,
    loss_surface,
    measure,
    pca_plane,
    read_trajectory,
)
from lmc_lightning.data import TwoMoonsDataModule
from lmc_lightning.landscape.statistics.bands import seed_standard_error
from lmc_lightning.landscape.statistics.correlations import correlations, group_means
from lmc_lightning.landscape.trajectory.components import PlaneLosses, tsne
from lmc_lightning.models import ImageClassifier
from lmc_lightning.plotting.barriers import plot_barrier_curves, plot_paths
from lmc_lightning.plotting.interactive import interactive_relief
from lmc_lightning.plotting.style import figure_of, style
from lmc_lightning.plotting.surfaces import plot_contours, plot_relief
from lmc_lightning.plotting.trajectory import plot_convergence, plot_trajectories, plot_tsne, plot_variance_shares

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")

# %% [markdown]
# The settings. Change them and run everything again: that is what they are here for.

# %%
FAST = os.environ.get("TOUR_FAST") == "1"  # a minute's check that every cell runs; its numbers mean nothing
NUM_NETWORKS = 5 if FAST else 10
EPOCHS = 4 if FAST else 100
VISITS = [0, 2, 4] if FAST else [0, 1, 5, 10, 20, 40, 60, 80, 100]  # epochs at which we measure
HIDDEN = [8, 4]
LEARNING_RATE = 0.1
NOISE = 0.2  # of the data
GRID = 7 if FAST else 41  # points along each side of a surface
CURVE_EPOCHS = 3 if FAST else 300

# %% [markdown]
# ## 1. The data, the network, the loss
#
# Two interleaved half moons, 200 points. A network of 2 inputs, 8 and 4 hidden ReLU units and 2 outputs should
# tell them apart. The loss is the mean cross-entropy over all points,
#
# $$L(\theta) = -\frac1N \sum_{n=1}^{N} \ln p_\theta(y_n \mid x_n).$$

# %%
data = TwoMoonsDataModule(num_examples=200, noise=NOISE, data_seed=42, batch_size=32)
data.setup()
train, test = data.probe_batches("train"), data.probe_batches("test")
((points, labels),) = train


def new_network(seed):
    layers = {"in_features": 2, "hidden_sizes": HIDDEN}
    return ImageClassifier(
        network="mlp", network_kwargs=layers, num_classes=2, optimizer="sgd", lr=LEARNING_RATE, init_seed=seed
    )


theta = parameters_to_vector(new_network(0).parameters())
print(f"A landscape in P = {len(theta)} dimensions.")

with style():
    _, ax = plt.subplots(figsize=(4.5, 3))
    ax.scatter(*points.T, c=labels, cmap="coolwarm", s=14)
    ax.set_title("Two moons")

# %% [markdown]
# ## 2. Train ten networks, and watch
#
# The networks differ in their initial weights only: all see the same batches in the same order.
# Three callbacks watch each of them. The networks and the trainer do not know of it, and train to the same
# weights, bit for bit, as without.
#
# * `HessianSpectrum`: curvature, at the epochs in `VISITS`;
# * `Sharpness`: how far the loss rises nearby;
# * `WeightTrajectory`: a copy of the weights every two epochs (14 steps).

# %%
folder = Path(tempfile.mkdtemp())


def train_network(seed):
    pl.seed_everything(seed, verbose=False)
    network = new_network(seed)
    common = {"epochs": VISITS, "num_examples": None}  # None: all 200 points
    callbacks = [
        HessianSpectrum(**common, density=False, num_probes=2, num_steps=8),
        Sharpness(**common),
        WeightTrajectory(epochs=[EPOCHS], record_every_n_train_steps=14, num_examples=None),
    ]
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=callbacks,
        default_root_dir=folder / str(seed),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(network, data)
    way = read_trajectory(folder / str(seed) / "lmc" / "trajectory", f"network {seed}")
    return network, [callback.to_pandas() for callback in callbacks[:2]], way


networks, tables, ways = zip(*(train_network(seed) for seed in range(NUM_NETWORKS)), strict=True)

# %% [markdown]
# Every number is a row of a table, with its unit and how it was found. The losses and errors of all networks at
# the end:

# %%
records = pd.concat(
    [table.assign(network=seed) for seed, both in enumerate(tables) for table in both], ignore_index=True
)
ends = {
    name: convergence_statistics(networks, batches, num_examples=None)
    for name, batches in (("train", train), ("test", test))
}
runs = pd.DataFrame(
    {
        f"{name}_{metric}": getattr(found, of)
        for name, found in ends.items()
        for metric, of in (("loss", "losses"), ("error", "errors"))
    }
)
runs.round(3)

# %%
figure_of(plot_convergence(ends["train"], title="Training losses in the end"))

# %% [markdown]
# They did not all become equally good. The landscape is the same for all; where one ends depends on where one starts.
#
# ## 3. Curvature
#
# Near θ the loss is its value, a slope and a bowl:
#
# $$L(\theta + \delta) \approx L(\theta) + g^\top \delta + \tfrac12\, \delta^\top H \delta, \qquad
#   g = \nabla L(\theta),\quad H = \nabla^2 L(\theta).$$
#
# The Hessian $H$ is a $P \times P$ matrix. Its largest eigenvalue $\lambda_{\max}$ is the curvature in the
# steepest direction, its trace $\operatorname{tr} H = \sum_i \lambda_i$ the sum over all directions. For a
# large network nobody can write $H$ down, and `HessianSpectrum` never does: it only multiplies vectors by it.
# Ours is small, so we can check.


# %%
def weights_of(theta, network):
    """The vector cut into the tensors of the network."""
    named = dict(network.named_parameters())
    pieces = theta.split([p.numel() for p in named.values()])
    return {name: piece.view_as(p) for piece, (name, p) in zip(pieces, named.items(), strict=True)}


def loss_at(theta):
    return F.cross_entropy(functional_call(networks[0], weights_of(theta, networks[0]), (points,)), labels)


theta = parameters_to_vector(networks[0].parameters()).detach()
H = hessian(loss_at, theta)
found = measure(networks[0], train, [HessianSpectrum(num_examples=None, chunk_size=20)])
print(f"λ_max   whole matrix {torch.linalg.eigvalsh(H)[-1]:.4f}   products only {found['hessian/lambda_max']:.4f}")
print(f"trace   whole matrix {H.trace():.4f}   products only {found['hessian/trace']:.4f}")
print(f"λ_max of other draws of 200 points would scatter by about {found['hessian/lambda_max_stderr_data']:.2f}")

# %% [markdown]
# Now over training: the mean over the networks, with its 95 % interval (Student's, from the networks), and each
# network as a thin line.


# %%
def plot_over_epochs(keys):
    error = "ci95" if NUM_NETWORKS >= 5 else "stderr"
    with style():
        _, axes = plt.subplots(1, len(keys), figsize=(4.2 * len(keys), 3.2), layout="constrained")
        for key, ax in zip(keys, axes, strict=True):
            rows = records[records["name"] == key]
            for _, own in rows.groupby("network"):
                ax.plot(own["epoch"], own["value"], color="#999999", linewidth=0.6)
            mean = group_means(rows, ["value"], ["epoch"], error=error)
            ax.plot(mean["epoch"], mean["mean"], color="#1f5fa8")
            ax.fill_between(mean["epoch"], mean["low"], mean["high"], color="#1f5fa8", alpha=0.25, linewidth=0)
            ax.set_title(key)
            ax.set_xlabel("epoch")


plot_over_epochs(["hessian/lambda_max", "hessian/trace"])

# %% [markdown]
# The valley gets narrower as the networks learn. Gradient descent with learning rate η is stable in a bowl while
# $\lambda_{\max} < 2/\eta$. Here that is 20, and all stay below.
#
# ## 4. Sharpness
#
# Curvature is what happens *at* a point. Sharpness asks how far the loss rises a small but finite step away:
#
# * `worst_case`: the largest rise within a ball of radius ρ = 0.05, found by walking uphill; to second order at most
#   $\rho \lVert g \rVert + \rho^2 \lambda_{\max}/2$;
# * `average`: the mean rise under Gaussian noise of standard deviation σ, to second order
#   $\sigma^2 \operatorname{tr} H / 2$;
# * `adaptive`: the largest rise when each weight may change by a share of itself.

# %%
plot_over_epochs(["sharpness/worst_case", "sharpness/average", "sharpness/adaptive"])

# %% [markdown]
# Which one is "the" sharpness? Multiply the first layer by $c$ and divide the second by $c$: with ReLU units
# the network computes *the same function*, as good as before.

# %%
c = 3.0
rescaled = copy.deepcopy(networks[0])
first, second, *_ = (layer for layer in rescaled.modules() if isinstance(layer, torch.nn.Linear))
with torch.no_grad():
    first.weight *= c
    first.bias *= c
    second.weight /= c

probes = [HessianSpectrum(num_examples=None), Sharpness(num_examples=None)]
shown = ["hessian/lambda_max", "hessian/trace", "sharpness/worst_case", "sharpness/adaptive"]
pd.DataFrame(
    {name: measure(n, train, probes) for name, n in (("as trained", networks[0]), ("rescaled", rescaled))}
).loc[shown].round(3)

# %% [markdown]
# $\lambda_{\max}$, the trace and the worst case changed, though nothing did that matters for predictions. The
# adaptive sharpness stayed. Compare curvatures between networks with care.
#
# ## 5. Look around: slices
#
# We cannot see 70 dimensions, but two: $f(a, b) = L(\theta + a\,d_1 + b\,d_2)$. Random directions $d$ are
# usual, each filter as long as that of the network, so that weights of different sizes count alike.

# %%
around = loss_surface(networks[0], train, num_points=GRID)
figure_of(plot_contours(around, title="Around network 0, random directions"))

# %% [markdown]
# A random direction is hardly ever the steepest one. The two top eigenvectors of the Hessian are:

# %%
steepest = loss_surface(networks[0], train, directions="hessian", num_points=GRID, span=1.5)
figure_of(plot_relief(steepest, title="Around network 0, top eigenvectors"))

# %% [markdown]
# Turn it with the mouse:

# %%
HTML(
    interactive_relief(steepest, title="Around network 0, top eigenvectors").to_html(
        full_html=False, include_plotlyjs="cdn"
    )
)

# %% [markdown]
# Both pictures are true, and both show two of 70 directions. How curved are the slices at their centres? Along the
# eigenvectors, of length 1, it is their eigenvalues, but for the step of the grid. The random directions are as long as
# the weights, so that per unit of length their curvature is even smaller than these numbers.

# %%
for name, found_there in (("random directions", around), ("top eigenvectors", steepest)):
    print(f"{name:>17}: {found_there.curvature(0):.3f} and {found_there.curvature(1):.3f}")

# %% [markdown]
# ## 6. Between two minima
#
# Take the networks with the lowest loss, A and B, and walk in a straight line, $\theta(t) = (1-t)\,\theta_A +
# t\,\theta_B$. The **barrier** is how high the loss rises above the chord between the two ends,
#
# $$\max_t\; L(\theta(t)) - \big[(1-t)\,L(\theta_A) + t\,L(\theta_B)\big].$$

# %%
best, second_best, third = np.argsort(runs["train_loss"])[:3]
A, B, C = networks[best], networks[second_best], networks[third]
line = interpolation_barrier(A, B, train, num_examples=None)
figure_of(plot_barrier_curves([(f"{best} to {second_best}", line)], title="The line between the two best networks"))

# %% [markdown]
# Two good networks, and a mountain between them. The plane through the three best shows it from above:

# %%
plane = loss_surface(A, train, through=[B, C], num_points=GRID)
figure_of(plot_contours(plane, title="The plane through the three best networks"))

# %%
HTML(interactive_relief(plane, title="The three best networks").to_html(full_html=False, include_plotlyjs="cdn"))

# %% [markdown]
# ## 7. The same network in another order
#
# Swap two hidden units together with their weights: θ changes, the function does not. So each network has $8!
# \cdot 4! \approx 970{,}000$ copies in the landscape. Perhaps B only lies behind a mountain because its units
# are in another order? `align` finds the order in which B is closest to A.

# %%
aligned = align(A, B, train, num_examples=None)
print(aligned.matching)
distance = [
    (parameters_to_vector(n.parameters()) - parameters_to_vector(A.parameters())).norm().item()
    for n in (B, aligned.module)
]
print(f"distance from A: {distance[0]:.2f} before, {distance[1]:.2f} after")

# %% [markdown]
# ## 8. Around the mountain
#
# A straight line is one path of many. Bend it, $\gamma(t) = (1-t)^2\,\theta_A + 2t(1-t)\,w + t^2\,\theta_B$,
# and train the point $w$ so that the mean loss along the curve is low:

# %%
training = CurveTraining(num_epochs=CURVE_EPOCHS, lr=0.1, weight_decay=0.0)
to_b, to_aligned = (connect(A, end, train, training, batch_size=100, num_examples=None) for end in (B, aligned.module))
paths = {
    "straight line": to_b.on_line,
    "line, B aligned": to_aligned.on_line,
    "curve": to_b.on_curve,
    "curve, B aligned": to_aligned.on_curve,
}
paths = {name: path["train"]["loss"] for name, path in paths.items()}
figure_of(plot_paths(paths, title="Four ways from A to B"))

# %% [markdown]
# The two networks do not sit in two holes with a wall between them: a low path goes around, which the straight line
# misses. It even runs *below* its ends, because after 100 epochs the networks have not come to rest. And in the right
# order of its units, B is nearly on A's side of the mountain already.
#
# ## 9. The ways of all networks
#
# The copies of the weights from section 2, of all networks, on one plane: the one that holds most of their
# variance (PCA). Under it the *true* loss on this plane.

# %%
pca = pca_plane(ways)
centre = copy.deepcopy(networks[0])
vector_to_parameters(pca.centre, centre.parameters())
span = 1.15 * max(float(c.abs().max()) for c in pca.coordinates)
losses = loss_surface(centre, train, directions=pca.directions, num_points=GRID, span=span)
on_plane = PlaneLosses(losses.xs, losses.ys, losses.losses.T)
figure_of(plot_trajectories(pca, losses=on_plane, title=f"Ways of {NUM_NETWORKS} networks"))

# %% [markdown]
# Read the caption: it says how much of the variance the plane holds, and how far the networks are from it. The
# grey levels are the loss *on the plane*, not below the networks beside it.
#
# A single way is nearly a straight line: its first component alone holds most of its variance. Do not be impressed too
# soon: of a random walk in many dimensions it holds $6/\pi^2 \approx 61\,\%$.

# %%
figure_of(plot_variance_shares(pca_plane(ways[best]), title=f"Variance of the way of network {best}"))

# %% [markdown]
# ## 10. Neighbourhoods: weights and predictions
#
# t-SNE keeps neighbours together and gives up distances. Once on the weights, once on what they predict for the
# 200 points:

# %%
figure_of(plot_tsne(ways, tsne(ways), title="Weights of all networks, by t-SNE"))


# %%
def predictions(way, network):
    outputs = [functional_call(network, weights_of(theta, network), (points,)) for theta in way.points]
    return torch.stack(outputs).softmax(-1)[..., 1].detach()


answers = [predictions(way, network) for way, network in zip(ways, networks, strict=True)]
steps = torch.corrcoef(torch.stack([answer.diff(dim=0).flatten() for answer in answers]))
between = steps[tuple(torch.triu_indices(NUM_NETWORKS, NUM_NETWORKS, 1))]
print(f"correlation of the changes of predictions of two networks: {between.mean():.2f} on average")

thinned = [Trajectory(answer[::5], way.steps[::5], way.name) for answer, way in zip(answers, ways, strict=True)]
figure_of(plot_tsne(thinned, tsne(thinned), title="Predictions of all networks, by t-SNE"))

# %% [markdown]
# In their weights the networks are strangers to each other: each stays in a neighbourhood of its own. In what they
# predict they begin together and go on together. They even swing to and fro together, as they see the same batches in
# the same order. Many points θ are one function, or nearly.
#
# ## 11. What may be said from ten networks
#
# **Barriers of all pairs.** 45 pairs, but only ten networks: pairs that share a network are not independent.
# The standard error below leaves out one network at a time.

# %%
pairs = list(itertools.combinations(range(NUM_NETWORKS), 2))
barriers = pd.DataFrame(
    {
        name: [
            interpolation_barrier(networks[a], networks[b], train, num_examples=None, align=how).barrier
            for a, b in pairs
        ]
        for name, how in (("straight line", None), ("B aligned", "weights"))
    }
)
barriers["difference"] = barriers["B aligned"] - barriers["straight line"]
for name, values in barriers.items():
    stderr, nodes = seed_standard_error(pairs, values.tolist())
    print(f"{name:>14}: mean {values.mean():6.3f} ± {stderr:.3f} ({nodes} networks)")

# %% [markdown]
# Most of the barrier was a matter of the order of the units; not all of it.
#
# **Does sharpness go with the test loss?** Spearman's rank correlation over the networks with a bootstrap
# interval that resamples the networks, a permutation p-value, and Holm's correction because we ask several
# questions at once.

# %%
last = records[records["epoch"] == EPOCHS].pivot_table(index="network", columns="name", values="value")
measures = ["hessian/lambda_max", "hessian/trace", "sharpness/worst_case", "sharpness/adaptive"]
everything = runs.join(last[measures])
correlations(everything, measures, ["test_loss"], methods=["spearman"]).drop(
    columns=["num_cells", "scope", "method"]
).round(3)

# %% [markdown]
# Look at the width of the intervals before you look at the coefficients. All but one contain 0, and after Holm's
# correction no p-value is small: ten networks settle little. If anything, *sharper* networks have the lower test loss
# here, for they are the ones that got farther in their training.
#
# ## What to try
#
# 1. Set `HIDDEN = [64]`. How many numbers is θ now? What happens to the barriers, and what to those after alignment?
# 2. Set `LEARNING_RATE = 1.0`. Where does $\lambda_{\max}$ go, and where is $2/\eta$ now?
# 3. Draw the error instead of the loss: `plot_contours(plane, metric="error")`. Which barrier is higher?
# 4. Measure A and B on the *test* points: `interpolation_barrier(A, B, test)`.
# 5. Let all networks start from one initialisation, `new_network(0)`, on batches of another order,
#    `TwoMoonsDataModule(..., noise_seed=seed)`. Are there barriers left? From which epoch on?
#    `CheckpointBranching` does this for you.
# 6. Use your own `LightningModule`: the callbacks and functions take any.
#
# The same study with all its settings in one file: `lmc-lightning sweep examples/studies/many_initialisations.yaml`.
#
# ## Where this comes from
#
# Li et al., *Visualizing the loss landscape of neural nets*, [1712.09913](https://arxiv.org/abs/1712.09913) ·
# Foret et al., *Sharpness-aware minimization*, [2010.01412](https://arxiv.org/abs/2010.01412) ·
# Dinh et al., *Sharp minima can generalize*, [1703.04933](https://arxiv.org/abs/1703.04933) ·
# Garipov et al., *Loss surfaces, mode connectivity*, [1802.10026](https://arxiv.org/abs/1802.10026) ·
# Entezari et al., *The role of permutation invariance*, [2110.06296](https://arxiv.org/abs/2110.06296) ·
# Ainsworth et al., *Git re-basin*, [2209.04836](https://arxiv.org/abs/2209.04836) ·
# Antognini and Sohl-Dickstein, *PCA of high dimensional random walks*, [1806.08805](https://arxiv.org/abs/1806.08805)
