"""Drawing that all products share: antialiased shapes, noise, light on a surface, the camera.

Coordinate frame: image units, x to the right and y downwards, the picture is the unit square
``[0, 1]²`` whatever its size in pixels. Colours are BGR, 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Reals = NDArray[np.floating[Any]]
Points = NDArray[np.float64]  # (N, 2) x, y

CRUMB = 2e-4  # share of the picture below which a stray piece of a mask is dropped
LEAST_CHANGE = 4.0  # grey levels on average, of a defect that is barely visible


def bgr(b: float, g: float, r: float) -> Floats:
    return np.array((b, g, r), np.float32)


def turn(angle: float) -> Points:
    """Matrix turning row vectors clockwise on screen."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, s], [-s, c]])


def rotated(points: Points, angle: float, centre: Points) -> Points:
    """Points (N, 2) turned clockwise by ``angle`` about ``centre``."""
    return np.asarray((points - centre) @ turn(angle) + centre)


def coverage(polygons: Sequence[Points], size: int) -> Floats:
    """Share 0..1 of each pixel (size, size) that lies in the union of the polygons."""
    scale, shift = 2 * size, 4  # drawn at twice the size, with 4 bits of sub-pixel position
    canvas = np.zeros((scale, scale), np.uint8)
    for polygon in polygons:
        fixed = np.round((polygon * scale - 0.5) * 2**shift).astype(np.int32)
        cv2.fillPoly(canvas, [fixed], 255, cv2.LINE_8, shift)
    small = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32) / np.float32(255)


def fixed(points: Points, size: int) -> NDArray[np.int32]:
    """Pixels with 4 bits of fraction, as OpenCV's drawing functions take them."""
    return np.round(points * size * 16).astype(np.int32)


def arc_length(path: Points) -> NDArray[np.float64]:
    """(N,) distance from the start of a path (N, 2) to each of its points."""
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(steps)])


def resampled(path: Points, count: int) -> Points:
    """``count`` evenly spaced points along a path."""
    s = arc_length(path)
    at = np.linspace(0, s[-1], count)
    return np.stack([np.interp(at, s, path[:, 0]), np.interp(at, s, path[:, 1])], axis=1)


def rounded(path: Points, times: int = 3) -> Points:
    """The path with its corners cut (Chaikin), its ends kept."""
    for _ in range(times):
        a, b = path[:-1], path[1:]
        cut = np.stack([0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b], axis=1).reshape(-1, 2)
        path = np.concatenate([path[:1], cut, path[-1:]])
    return path


def normals(path: Points) -> Points:
    """(N, 2) unit normals along a path."""
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-12
    return np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)


def ribbon(path: Points, half_width: float | NDArray[np.float64]) -> list[Points]:
    """Quadrilaterals covering a band along a path; the half width may vary along it."""
    offset = normals(path) * np.broadcast_to(half_width, len(path))[:, None]
    left, right = path + offset, path - offset
    return list(np.stack([left[:-1], left[1:], right[1:], right[:-1]], axis=1))


def disc(centre: Points, radius: float) -> Points:
    """(24, 2) outline of a circle."""
    a = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return centre + radius * np.stack([np.cos(a), np.sin(a)], axis=1)


def wiggle(rng: np.random.Generator, count: int, amplitude: float) -> NDArray[np.float64]:
    """(count,) periodic ragged curve about 0."""
    knots = rng.normal(0, amplitude, 9)
    at = np.linspace(0, 9, count, endpoint=False)
    coarse = np.interp(at, np.arange(10), np.append(knots, knots[0]))
    return np.asarray(coarse + rng.normal(0, amplitude / 5, count))


def blend(image: Floats, colour: Floats, alpha: Floats) -> None:
    """Lays ``colour`` over ``image`` in place."""
    image += (colour - image) * alpha[..., None]


def noise(rng: np.random.Generator, size: int, across: int, down: int | None = None) -> Floats:
    """Smooth noise (size, size), about N(0, 1), with so many grains across (and down)."""
    grid = rng.standard_normal((down or across, across), dtype=np.float32)
    return np.asarray(cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC), np.float32)


def pixels(size: int) -> tuple[Floats, Floats]:
    """x, y of the pixel centres in image units, ready to broadcast: (1, size) and (size, 1)."""
    at = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return at[None, :], at[:, None]


def edge(distance: Reals, pixel: float) -> Floats:
    """1 where the signed distance is negative, 0 where positive, one pixel of slope between."""
    return np.asarray(np.clip(0.5 - distance / pixel, 0, 1), np.float32)


def marked(cover: Floats) -> NDArray[np.bool_]:
    """Mask (size, size) of the pixels at least half covered, without pieces too small to be meant.

    Of a defect that is thinner than a pixel everywhere, the pixels that it covers most.
    """
    mask = (cover > 0) & (cover >= min(0.5, 0.6 * float(cover.max())))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    areas = stats[:, cv2.CC_STAT_AREA]
    crumbs = areas < min(CRUMB * mask.size, areas[1:].max(initial=0))
    return np.asarray(mask & ~crumbs[labels])


def stands_out(
    before: NDArray[np.uint8], after: NDArray[np.uint8], mask: NDArray[np.bool_]
) -> bool:
    """Whether a defect covers something, and changes it enough to be seen in its texture."""
    if not mask.any():
        return False
    change = np.abs(after.astype(np.float32) - before)[mask].max(axis=1).mean()
    texture = before[mask].std(axis=0).max()
    return bool(change >= max(LEAST_CHANGE, 0.6 * texture))


def blob(rng: np.random.Generator, centre: Points, radius: float, ragged: float = 0.25) -> Points:
    """(48, 2) outline of an irregular, often elongated spot."""
    a = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    r = radius * np.clip(1 + wiggle(rng, 48, ragged), 0.35, 1.9)
    shape = np.stack([r * np.cos(a), r * np.sin(a) * rng.uniform(0.35, 1)], axis=1)
    return rotated(shape, rng.uniform(0, np.pi), np.zeros(2)) + centre


def wander(
    rng: np.random.Generator, middle: Points, length: float, bend: float, jag: float = 0.0
) -> Points:
    """(N, 2) line through ``middle``: ``bend`` turns it in radians, ``jag`` makes it ragged."""
    count = 14
    curve = np.cumsum(rng.normal(0, bend / 4, count))
    heading = rng.uniform(0, 2 * np.pi) + curve + rng.normal(0, jag, count)
    path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    path *= length / count
    path = path if jag else rounded(path, 2)
    return path - path[len(path) // 2] + middle


def tapered(path: Points, half_width: float, end: float = 0.2) -> list[Points]:
    """Quadrilaterals of a band that gets thinner towards both ends, down to ``end``."""
    along = np.linspace(0, np.pi, len(path))
    return ribbon(path, half_width * (end + (1 - end) * np.sin(along)))
