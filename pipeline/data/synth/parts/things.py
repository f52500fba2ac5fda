"""Outlines of manufactured things, each about the origin with a radius of about 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pipeline.data.synth.draw import Points, ribbon, rotated, rounded
from pipeline.data.synth.parts.scene import Item

ORIGIN = np.zeros(2)


def ring(radius: float, count: int = 56) -> Points:
    """(count, 2) outline of a circle, or of a regular polygon where ``count`` is small."""
    a = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return radius * np.stack([np.cos(a), np.sin(a)], axis=1)


def box(width: float, height: float, corner: float) -> Points:
    """(4 * 9, 2) rectangle of half sizes ``width`` and ``height`` with rounded corners."""
    corner = min(corner, 0.999 * min(width, height))
    a = np.linspace(0, np.pi / 2, 9)
    arc = corner * np.stack([np.cos(a), np.sin(a)], axis=1)
    inner = np.array([width - corner, height - corner])
    sides = []
    for quarter, sign in enumerate([(1, 1), (-1, 1), (-1, -1), (1, -1)]):
        sides.append(rotated(arc, quarter * np.pi / 2, ORIGIN) + inner * sign)
    return np.concatenate(sides)


def cog(teeth: int, depth: float) -> Points:
    """Outline of a toothed wheel."""
    a = np.linspace(0, 2 * np.pi, teeth * 12, endpoint=False)
    r = 1 - depth / 2 + depth / 2 * np.tanh(4 * np.sin(teeth * a))
    return r[:, None] * np.stack([np.cos(a), np.sin(a)], axis=1)


def stroke(path: Points, half_width: float) -> Points:
    """Outline of a band of even width along a path."""
    quads = ribbon(path, half_width)
    left = [quads[0][0], *(q[1] for q in quads)]
    right = [quads[0][3], *(q[2] for q in quads)]
    return np.array(left + right[::-1])


def glyph(rng: np.random.Generator, radius: float) -> tuple[Points, ...]:
    """Strokes that read as a printed or embossed character, about the origin."""
    grid = rng.choice([-1.0, 0.0, 1.0], (int(rng.integers(2, 5)), 2, 2)) * (0.55, 1.0)
    width = rng.uniform(0.12, 0.2)
    lines = [s if np.ptp(s) > 0 else np.array([(-0.55, 0.0), (0.55, 0.0)]) for s in grid]
    return tuple(radius * stroke(line, width) for line in lines)


def washer(rng: np.random.Generator) -> Item:
    return Item(ring(1), holes=(ring(rng.uniform(0.3, 0.75)),))


def nut(rng: np.random.Generator) -> Item:
    outline = ring(1, int(rng.choice([4, 6, 6, 6, 8])))
    return Item(outline, (ring(rng.uniform(0.4, 0.6)),))


def screw(rng: np.random.Generator) -> Item:
    """The head of a screw from above: slot, cross, square or hexagon recess."""
    drive = rng.integers(4)
    half = rng.uniform(0.08, 0.16)
    marks: tuple[Points, ...]
    if drive == 0:
        marks = (box(0.8, half, 0.02),)
    elif drive == 1:
        marks = (box(0.6, half, 0.05), box(half, 0.6, 0.05))
    else:
        marks = (ring(rng.uniform(0.35, 0.55), (4, 6)[drive - 2]),)
    return Item(ring(1), marks=marks)


def tablet(rng: np.random.Generator) -> Item:
    """A pill: round, oval or a capsule; scored, embossed or plain."""
    long = rng.choice([1.0, rng.uniform(0.4, 0.8)])
    outline = ring(1) * (1, long) if rng.random() < 0.6 else box(1, long, long)
    kind = rng.integers(3)
    marks = ((), (box(0.03, 0.8 * long, 0.02),), glyph(rng, 0.4 * long))[kind]
    return Item(outline, marks=marks)


def wheel(rng: np.random.Generator) -> Item:
    outline = cog(int(rng.integers(7, 26)), rng.uniform(0.1, 0.3))
    spokes = int(rng.integers(3, 7))
    around = np.array([[0.48, 0.0]])
    openings = tuple(
        ring(0.13, 20) + rotated(around, 2 * np.pi * i / spokes, ORIGIN) for i in range(spokes)
    )
    hub = ring(rng.uniform(0.12, 0.28))
    return Item(outline, (hub, *openings) if rng.random() < 0.5 else (hub,))


def button(rng: np.random.Generator) -> Item:
    count = int(rng.choice([2, 4]))
    spread = ring(0.28, count)
    return Item(ring(1), tuple(ring(0.11, 20) + at for at in spread), (_annulus(0.66, 0.05),))


def plate(rng: np.random.Generator) -> Item:
    """A flat piece with rounded corners, holes and a printed or embossed line."""
    tall = rng.uniform(0.45, 1)
    at = np.array([(0.8, 0.75 * tall), (-0.8, 0.75 * tall), (-0.8, -0.75 * tall)])
    at = np.concatenate([at, [(0.8, -0.75 * tall)]])
    holes = tuple(ring(rng.uniform(0.05, 0.1), 24) + p for p in at[: rng.integers(0, 5)])
    marks: list[Points] = []
    letters = int(rng.integers(0, 6))
    for i in range(letters):
        where = np.array([0.24 * (i - (letters - 1) / 2), 0.0])
        marks += [mark + where for mark in glyph(rng, 0.1)]
    return Item(box(1, tall, rng.uniform(0.01, 0.3)), holes, tuple(marks))


def bracket(rng: np.random.Generator) -> Item:
    """An L, T or U of sheet metal."""
    t = rng.uniform(0.25, 0.45)
    stem = -1 + t, 1 - t
    angle = [(-1, -1), (-1 + t, -1), stem, (1, 1 - t), (1, 1), (-1, 1)]
    tee = [(-1, -1), (1, -1), (1, -1 + t), (t / 2, -1 + t), (t / 2, 1), (-t / 2, 1)]
    tee = [*tee, (-t / 2, -1 + t), (-1, -1 + t)]
    channel = [(-1, -1), (-1 + t, -1), stem, (1 - t, 1 - t), (1 - t, -1), (1, -1), (1, 1), (-1, 1)]
    outline, hole = ((angle, (-1, 1)), (tee, (-t / 2, -1)), (channel, (-1, 1)))[rng.integers(3)]
    corner = np.array(hole) + np.array([t / 2, -t / 2 * hole[1]])
    holes = (ring(0.25 * t, 24) + corner,) if rng.random() < 0.5 else ()
    return Item(np.array(outline, float), holes)


def biscuit(rng: np.random.Generator) -> Item:
    """A star, clover or scalloped round."""
    a = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    lobes, depth = int(rng.integers(3, 14)), rng.uniform(0.03, 0.25)
    r = 1 - depth + depth * np.cos(lobes * a)
    marks = tuple(ring(0.06, 16) + p for p in ring(0.45, int(rng.integers(3, 8))))
    outline = r[:, None] * np.stack([np.cos(a), np.sin(a)], axis=1)
    return Item(outline, marks=marks if rng.random() < 0.5 else ())


def cap(rng: np.random.Generator) -> Item:
    """A lid or bottle cap with raised rings."""
    radii = rng.uniform(0.3, 0.9, int(rng.integers(1, 4)))
    return Item(ring(1), marks=tuple(_annulus(r, rng.uniform(0.02, 0.06)) for r in radii))


def case(rng: np.random.Generator) -> Item:
    """A moulded box: mould ring, seams, embossed letters."""
    tall = rng.uniform(0.6, 1.1)
    marks: list[Points] = []
    if rng.random() < 0.6:
        marks.append(_annulus(rng.uniform(0.12, 0.4), 0.012) + rng.normal(0, 0.1, 2))
    if rng.random() < 0.5:
        marks.append(box(0.93, 0.01, 0.005) + np.array([0, rng.uniform(-0.9, -0.6) * tall]))
    if rng.random() < 0.5:
        for i in range(int(rng.integers(2, 6))):
            where = np.array([0.25 * i - 0.5, 0.4 * tall])
            marks += [mark + where for mark in glyph(rng, 0.09)]
    return Item(box(1, tall, rng.uniform(0.01, 0.12)), marks=tuple(marks))


def _annulus(radius: float, half_width: float) -> Points:
    """A ring as one polygon, cut open at its right."""
    a = np.linspace(0, 2 * np.pi, 60)
    circle = np.stack([np.cos(a), np.sin(a)], axis=1)
    return np.concatenate([(radius + half_width) * circle, (radius - half_width) * circle[::-1]])


SMALL: tuple[Callable[[np.random.Generator], Item], ...] = (
    washer,
    nut,
    screw,
    tablet,
    wheel,
    button,
    plate,
    bracket,
    biscuit,
    cap,
)


def placed(item: Item, centre: Points, radius: float, angle: float) -> Item:
    """The thing turned, enlarged to a radius and moved, in image units."""

    def move(shape: Points) -> Points:
        return rotated(shape * radius, angle, ORIGIN) + centre

    return replace(
        item,
        outline=move(item.outline),
        holes=tuple(map(move, item.holes)),
        marks=tuple(map(move, item.marks)),
    )


def rod(spine: Points, half_width: float, seat: Points | None = None) -> Item:
    """A slender thing along a path, from its root to its tip."""
    return Item(stroke(spine, half_width), spine=spine, half_width=half_width, seat=seat)


def s_curve(start: Points, end: Points, sideways: float) -> Points:
    """(N, 2) path from start to end whose middle part steps sideways, as formed leads do."""
    along = end - start
    across = np.array([-along[1], along[0]])
    way = [start, start + 0.25 * along, start + 0.5 * along + sideways * across]
    way += [start + 0.8 * along + sideways * across, end + sideways * across]
    return rounded(np.array(way), 2)
