"""TensorBoard with settings under which every figure of a run can be seen."""

import json
import shutil
import sys
from pathlib import Path
from urllib.parse import quote

SAMPLES = "images=200,text=200,mesh=20"
"""Steps that TensorBoard keeps of each plugin; its default of 10 images drops most visits."""

PINNED = (
    "hessian/lambda_max",
    "hessian/trace",
    "hessian/stability",
    "sharpness/worst_case",
    "barrier/val_error/k1_000",
    "barrier/val_error/k1_002",
)
"""Shown on top where a run has them."""


def tensorboard_command(logdir: Path | str, *more: str) -> list[str]:
    """The command that shows a folder of runs."""
    beside = Path(sys.executable).parent / "tensorboard"
    program = str(beside) if beside.is_file() else shutil.which("tensorboard") or "tensorboard"
    return [program, "--logdir", str(logdir), "--samples_per_plugin", SAMPLES, *more]


def deep_link(port: int = 6006) -> str:
    """The page with our tags on top, unsmoothed: by default TensorBoard smooths a few points beyond recognition."""
    pins = json.dumps([{"plugin": "scalars", "tag": tag} for tag in PINNED])
    return f"http://localhost:{port}/?smoothing=0&pinnedCards={quote(pins)}#timeseries"
