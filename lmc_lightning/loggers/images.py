"""Figures as small PNG files."""

import io

import numpy as np
from PIL import Image

PALETTES, EXACT = (64, 128, 256), 16
"""Sizes of palettes, and how many of the most frequent colours, which are those of areas, are in them as they are."""

MEAN_ERROR, LARGEST_ERROR = 1.0, 64
"""Of a palette that nobody can tell from the picture [of 255 levels]; most have 0.1 to 0.8, and 13 to 49."""

MANY = 20_000
"""Colours of a photograph, which a palette would spoil; figures have up to 10,000."""


def png(picture: np.ndarray) -> bytes:
    """A picture ``(height, width, 3)`` uint8 as PNG, in few colours where these are enough: 4 times smaller.

    Photographs keep all their colours, and so do the rarest marks of a figure.
    """
    buffer = io.BytesIO()
    _reduced(picture).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _reduced(picture: np.ndarray) -> Image.Image:
    packed = picture.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    codes, places, counts = np.unique(packed, return_inverse=True, return_counts=True)
    colors = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
    for size in PALETTES if len(colors) <= MANY else ():
        palette, indices = _palette(colors, counts, size)
        errors = np.abs(palette[indices] - colors)
        if errors.max() <= LARGEST_ERROR and np.average(errors.mean(axis=1), weights=counts) <= MEAN_ERROR:
            pixels = indices.astype(np.uint8)[places.reshape(-1)]
            image = Image.frombytes("P", picture.shape[1::-1], pixels.tobytes())
            image.putpalette(palette.astype(np.uint8).tobytes())
            return image
    return Image.fromarray(picture)


def _palette(colors: np.ndarray, counts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """At most ``size`` colours that stand for all ``(U, 3)``, and which of them does for each.

    The most frequent ones, and such as leave none of the others far from all: the usual methods, which go by the number
    of pixels, either merge neighbouring areas or lose a small mark in another colour.
    """
    frequent = np.argsort(-counts, kind="stable")[: size if len(colors) <= size else EXACT]
    palette = colors[frequent]
    if len(frequent) < len(colors):
        once = Image.fromarray(np.delete(colors, frequent, axis=0)[None].astype(np.uint8))
        others = once.quantize(size - len(frequent), method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette = np.concatenate([palette, np.array(others.getpalette()).reshape(-1, 3)[: size - len(frequent)]])
    indices = ((colors[:, None] - palette) ** 2).sum(axis=2).argmin(axis=1)
    weights = np.bincount(indices, counts, len(palette)).clip(1)
    sums = [np.bincount(indices, counts * channel, len(palette)) for channel in colors.T]
    return np.round(np.stack(sums, axis=1) / weights[:, None]).astype(np.int64), indices
