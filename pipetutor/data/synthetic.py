"""The embedded data set: ten drawn shapes, in CIFAR-10's own on-disk format.

Each class has a form and a hue of its own; shade, place, size, background and noise vary from image to
image. It needs no network, so that every run of the workbook can be repeated anywhere. Only whole-number
arithmetic decides a pixel: the files are the same bytes on every machine, and their md5 sums are fixed.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["TRAIN", "write"]

TRAIN, TEST = 2_000, 500
SEED = 1138
FINE = 4  # each pixel is the mean of FINE x FINE points, which smooths the edges

Grid = NDArray[np.int64]
# A shape says which points (x right, y down, from its centre) it covers at radius r.
SHAPES: dict[str, tuple[tuple[int, int, int], Callable[[Grid, Grid, int], NDArray[np.bool_]]]] = {
    "disc": ((220, 60, 50), lambda x, y, r: x * x + y * y <= r * r),
    "square": ((60, 180, 75), lambda x, y, r: np.maximum(abs(x), abs(y)) * 8 <= r * 7),
    "triangle": ((60, 100, 220), lambda x, y, r: (y <= r * 3 // 4) & (abs(x) * 2 <= y + r)),
    "diamond": ((240, 210, 50), lambda x, y, r: abs(x) + abs(y) <= r),
    "ring": ((160, 70, 200), lambda x, y, r: (x * x + y * y <= r * r) & (4 * (x * x + y * y) >= r * r)),
    "plus": (
        (70, 210, 220),
        lambda x, y, r: (np.minimum(abs(x), abs(y)) * 4 <= r) & (np.maximum(abs(x), abs(y)) <= r),
    ),
    "cross": (
        (240, 140, 40),
        lambda x, y, r: (np.minimum(abs(x - y), abs(x + y)) * 3 <= r) & (np.maximum(abs(x), abs(y)) <= r),
    ),
    "bars": (
        (230, 90, 180),
        lambda x, y, r: (np.maximum(abs(x), abs(y)) <= r) & ((y + r) * 5 // (2 * r + 1) % 2 == 0),
    ),
    "crescent": (
        (150, 160, 60),
        lambda x, y, r: (x * x + y * y <= r * r) & ((2 * x - r) ** 2 + 4 * y * y >= 3 * r * r),
    ),
    "hourglass": ((120, 80, 60), lambda x, y, r: (abs(x) <= abs(y)) & (abs(y) <= r)),
}
CLASSES = tuple(SHAPES)


def draw(label: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one image.

    Args:
        label: the class, 0 to 9.
        rng: source of everything that varies within a class.

    Returns:
        uint8 pixels of shape (32, 32, 3), in RGB.
    """
    hue, covers = SHAPES[CLASSES[label]]
    side = 32 * FINE
    radius = int(rng.integers(7 * FINE, 13 * FINE))
    room = side // 2 - radius
    centre_x, centre_y = side // 2 + rng.integers(-room, room + 1, size=2)
    y, x = np.mgrid[:side, :side]
    inside = covers(x - centre_x, y - centre_y, radius)
    coverage = inside.reshape(32, FINE, 32, FINE).sum(axis=(1, 3))[..., None]

    shade = int(rng.integers(45, 116))  # per cent of the hue
    colour = np.array(hue) * shade // 100 + rng.integers(-20, 21, size=3)
    # The background slopes from one muted colour to another, so that brightness alone tells nothing.
    corners = rng.integers(30, 200) + rng.integers(-35, 36, size=(2, 3))
    slope = np.arange(32).reshape((32, 1, 1) if rng.integers(2) else (1, 32, 1))
    background = (corners[0] * (31 - slope) + corners[1] * slope) // 31
    points = FINE * FINE
    image = (colour * coverage + background * (points - coverage)) // points
    image = image + rng.integers(-18, 19, size=(32, 32, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def _batch(count: int, title: str, rng: np.random.Generator) -> dict[str, object]:
    labels = rng.permutation(np.arange(count) % len(CLASSES)).tolist()
    images = np.stack([draw(label, rng) for label in labels])
    return {
        "batch_label": title,
        "labels": labels,
        "data": images.transpose(0, 3, 1, 2).reshape(count, -1),
        "filenames": [f"{CLASSES[label]}_{index:04d}.png" for index, label in enumerate(labels)],
    }


def write(folder: Path) -> None:
    """Draw the whole data set into ``folder``: one train batch, one test batch and the class names.

    Args:
        folder: an existing directory; 7.7 MB are written.
    """
    rng = np.random.Generator(np.random.PCG64(SEED))
    contents: dict[str, object] = {
        "data_batch_1": _batch(TRAIN, "synthetic training batch 1 of 1", rng),
        "test_batch": _batch(TEST, "synthetic testing batch 1 of 1", rng),
        "batches.meta": {"label_names": list(CLASSES), "num_vis": 32 * 32 * 3},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
