"""Tables and the figure of a study of wide networks: curvature, flatness and barriers of each setting over its seeds.

lmc-lightning sweep examples/studies/wide_networks.yaml --variant small
python examples/studies/draw_wide_networks.py studies/wide_networks_small  # to studies/wide_networks_small/figures
"""

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lmc_lightning.experiments.collect import collect, runs
from lmc_lightning.landscape.flatness import RADII
from lmc_lightning.landscape.statistics import group_means
from lmc_lightning.plotting.style import style

SETTING = ["hidden_sizes", "optimizer", "lr"]
OF_RUNS = {
    "hessian/lambda_max": "λ_max",
    "hessian/trace": "trace",
    "hessian/effective_rank": "effective rank",
    "hessian/lambda_max/paper": "λ_max, 128 images",
    "sharpness/gradient_norm": "‖∇L‖",
    "sharpness/gradient_norm_rms/paper": "‖∇L‖, rms of chunks",
    "sharpness/random_max": "random max",
    "sharpness/noise_robustness": "noise robustness",
    "val_loss": "val loss",
    "val_acc": "val accuracy",
}
OF_PAIRS = {
    "barrier/val_loss": "loss barrier",
    "barrier/val_error": "error barrier",
    "barrier/val_error/barrier_over_min": "error barrier over min",
}
PROFILE = [f"sharpness/flatness_profile/r_{k}" for k in range(1, 6)]


def means(folder: Path) -> pd.DataFrame:
    """Mean and standard error of each number over the runs, or pairs, of each setting."""
    table = collect(folder)
    pairs = table[(table["kind"] == "pair") & table["name"].isin(list(OF_PAIRS))]
    wide = pairs.pivot_table(index=["task", *SETTING], columns="name", values="value").reset_index()
    parts = [group_means(runs(table), [*OF_RUNS, *PROFILE], SETTING), group_means(wide, [*OF_PAIRS], SETTING)]
    return pd.concat(parts, ignore_index=True)


def draw_study(folder: Path) -> str:
    """Write the figure; the table as text."""
    found = means(folder)
    found["setting"] = [f"{row.hidden_sizes} {row.optimizer} {row.lr:g}" for row in found.itertuples()]
    panels = ("hessian/lambda_max", "val_acc", "barrier/val_error")
    settings = [*dict.fromkeys(found["setting"])]
    with style():
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        *axes, profile = figure.subplots(1, 4)
        for ax, name in zip(axes, panels, strict=True):
            own = found[found["value"] == name].set_index("setting").loc[settings]
            ax.errorbar(range(len(settings)), own["mean"], yerr=own["mean"] - own["low"], fmt="o", capsize=3)
            ax.set_xticks(range(len(settings)), [s.replace(" ", "\n", 1) for s in settings], fontsize=8)
            ax.set_xlim(-0.5, len(settings) - 0.5)
            ax.set_title({**OF_RUNS, **OF_PAIRS}[name])
        for setting in settings:
            own = found[(found["setting"] == setting) & found["value"].isin(PROFILE)].set_index("value").loc[PROFILE]
            profile.errorbar(RADII, own["mean"], yerr=own["mean"] - own["low"], marker=".", capsize=2, label=setting)
        profile.set_xlabel("radius / ‖θ‖")
        profile.set_title("mean rise of the loss")
        profile.legend()
    (folder / "figures").mkdir(exist_ok=True)
    figure.savefig(folder / "figures" / "settings.png")
    names = {**OF_RUNS, **OF_PAIRS}
    shown = found[found["value"].isin(list(names))]
    shown = shown.assign(text=[f"{r.mean:.3g} ± {r.mean - r.low:.1g}" for r in shown.itertuples()])
    wide = shown.pivot(index="value", columns="setting", values="text").loc[[*names], settings].rename(index=names)
    lines = ["| | " + " | ".join(settings) + " |", "| --- " * (len(settings) + 1) + "|"]
    return "\n".join(
        [
            *lines,
            *(f"| {name} | " + " | ".join(row) + " |" for name, row in zip(wide.index, wide.to_numpy(), strict=True)),
        ]
    )


if __name__ == "__main__":
    print(draw_study(Path(sys.argv[1])))
