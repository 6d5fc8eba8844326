"""Films of surfaces: over the visits of a run, over data sets, or around one of them."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.colors import Normalize
from numpy.typing import NDArray
from PIL import Image

from lmc_lightning.landscape.surface.slices import Surface
from lmc_lightning.plotting.style import figure_of, pixels
from lmc_lightning.plotting.surfaces import common_scale, plot_contours, plot_profile, plot_relief

Frame = NDArray[np.uint8]


def animate(
    results: Surface | Mapping[str, Surface] | Mapping[int, Surface] | Sequence[Surface],
    path: str | Path,
    *,
    style: Literal["relief", "contours"] = "relief",
    metric: str = "loss",
    frames_per_second: float | None = None,
    turning_frames: int = 60,
) -> Path:
    """A film of surfaces, one after another in one scale of colours and heights; a single one turns around.

    Args:
        results: the surfaces of visits by step (``LossSurface.surfaces``), of data sets by name, or in a row; or one.
            Surfaces on a line are drawn as profiles of the loss.
        path: a ``.gif``, or where ``ffmpeg`` is installed an ``.mp4``.
        style: how surfaces on a plane are drawn.
        metric: ``"loss"`` or ``"error"``.
        frames_per_second: by default 2, and 15 of one that turns.
        turning_frames: of one that turns, of 6° each by default.

    Returns:
        The path.

    Raises:
        ValueError: no surface, or a file of another kind.
        RuntimeError: an ``.mp4`` without ``ffmpeg``.
    """
    path = Path(path)
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"Expected a path that ends in .gif or .mp4, got {path.name!r}.")
    if path.suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise RuntimeError("An .mp4 needs the program ffmpeg, which is not installed. Install it, or write a .gif.")
    if isinstance(results, Surface):
        frames, usual = _turning(results, metric, turning_frames), 15.0
    else:
        named = _named(results)
        if not named:
            raise ValueError("Expected at least one surface, got none. A callback has them after its first visit.")
        frames, usual = _in_turn(named, style, metric), 2.0
    path.parent.mkdir(parents=True, exist_ok=True)
    write = _write_gif if path.suffix == ".gif" else _write_mp4
    write(list(frames), path, frames_per_second or usual)
    return path


def _named(results: Mapping[str, Surface] | Mapping[int, Surface] | Sequence[Surface]) -> dict[str, Surface]:
    if isinstance(results, Mapping):
        return {f"step {name:,}" if isinstance(name, int) else name: found for name, found in results.items()}
    return {f"{number} of {len(results)}": found for number, found in enumerate(results, start=1)}


def _turning(surface: Surface, metric: str, num_frames: int) -> Iterator[Frame]:
    for number in range(num_frames):
        yield pixels(figure_of(plot_relief(surface, metric=metric, azimuth=-55 + 360 * number / num_frames)))


def _in_turn(surfaces: Mapping[str, Surface], style: str, metric: str) -> Iterator[Frame]:
    scale = common_scale(list(surfaces.values()), metric)
    for name, surface in surfaces.items():
        yield pixels(figure_of(_draw(surface, style, metric, scale, f"{metric.capitalize()} surface, {name}")))


def _draw(surface: Surface, style: str, metric: str, scale: Normalize, title: str):  # type: ignore[no-untyped-def]
    if surface.ys is None:
        return plot_profile(surface, scale=scale, title=title)
    plot = plot_relief if style == "relief" else plot_contours
    return plot(surface, metric=metric, scale=scale, title=title)


def _write_gif(frames: Sequence[Frame], path: Path, frames_per_second: float) -> None:
    # One palette for all, of frames from the whole film: with one each, colours would flicker. It covers all colours
    # rather than the common ones, so that small marks keep theirs.
    chosen = np.concatenate(frames[:: max(1, len(frames) // 4)])
    palette = Image.fromarray(chosen).quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=3)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    duration = round(1000 / frames_per_second)
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0, optimize=False)


def _write_mp4(frames: Sequence[Frame], path: Path, frames_per_second: float) -> None:
    height, width = frames[0].shape[:2]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{frames_per_second}", "-i", "-"]
    # Players want even sizes and this format of pixels.
    target = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
    command = ["ffmpeg", "-y", "-loglevel", "error", *source, *target]
    subprocess.run(command, input=b"".join(frame.tobytes() for frame in frames), check=True)
