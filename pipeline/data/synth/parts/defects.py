"""Nine kinds of damage to manufactured parts. Each changes a copy of a flawless scene."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pipeline.data.synth.draw import (
    Points,
    arc_length,
    blob,
    disc,
    resampled,
    ribbon,
    rotated,
    tapered,
    wander,
    wiggle,
)
from pipeline.data.synth.parts import families, things
from pipeline.data.synth.parts.families import Layers
from pipeline.data.synth.parts.material import hsv
from pipeline.data.synth.parts.scene import Damage, Group, Item, Scene, contains
from pipeline.data.synth.relief import Colour, Flaw

THINNEST = 0.0035  # half width of a mask: nobody outlines a hair's breadth
ORIGIN = np.zeros(2)
Rng = np.random.Generator


def _with(scene: Scene, damage: Damage) -> Scene:
    return replace(scene, damages=(*scene.damages, damage))


# ---------------------------------------------------------------- on a surface


def _target(scene: Scene, rng: Rng) -> tuple[int, Points, float]:
    """Layer, place on it and how far that thing extends: where a flaw of the surface may be."""
    if not scene.groups or rng.random() < 0.08:
        return -1, rng.uniform(0.1, 0.9, 2), 0.35
    layer = int(rng.integers(len(scene.groups)))
    items = scene.groups[layer].items
    while True:
        item = items[rng.integers(len(items))]
        low, high = item.outline.min(axis=0), item.outline.max(axis=0)
        point = rng.uniform(np.clip(low, 0, 0.95), np.clip(high, 0.05, 1))
        if contains(item, point):
            return layer, point, max(item.reach, 0.02)
        if rng.random() < 0.1:  # an item outside the picture, or hardly anything but a hole
            layer = int(rng.integers(-1, len(scene.groups)))
            if layer < 0:
                return layer, point, 0.35
            items = scene.groups[layer].items


def _colour_at(scene: Scene, layer: int) -> Colour:
    return scene.ground.colour if layer < 0 else scene.groups[layer].material.colour


def _shade(rng: Rng, colour: Colour, low: float, high: float) -> Colour:
    """The colour times a factor, towards grey where it gets lighter."""
    factor = rng.uniform(low, high)
    base = np.array(colour, float)
    if factor > 1:
        base = 0.5 * (base + base.mean()) + 25
    b, g, r = np.clip(base * factor, 2, 250)
    return float(b), float(g), float(r)


def scratch(scene: Scene, rng: Rng) -> Scene:
    """A line or a few along each other, bright or dark, hair-thin to a gouge."""
    layer, point, reach = _target(scene, rng)
    length = reach * rng.uniform(0.7, 2.4)
    path = wander(rng, point, length, rng.uniform(0, 0.7), rng.choice([0.0, 0.08]))
    tint = _shade(rng, _colour_at(scene, layer), *((0.3, 0.75) if rng.random() < 0.4 else (1.2, 2)))
    flaws, shapes = [], []
    for _ in range(rng.choice([1, 2, 4], p=[0.7, 0.2, 0.1])):
        half = float(np.exp(rng.uniform(np.log(0.0008), np.log(0.005))))
        line = rotated(path, rng.normal(0, 0.06), point) + rng.normal(0, 0.01, 2)
        depth = -half * rng.uniform(0.2, 1.2)
        flaws.append(
            Flaw(
                tuple(tapered(line, half)), tint, rng.uniform(0.25, 1), 0.4, depth, half, gloss=0.2
            )
        )
        shapes += tapered(line, max(half, THINNEST), 0.6)
    return _with(scene, Damage(tuple(shapes), layer, True, tuple(flaws)))


def dent(scene: Scene, rng: Rng) -> Scene:
    """A shallow hollow or bump, seen by its shading alone."""
    layer, point, reach = _target(scene, rng)
    radius = float(np.clip(reach * rng.uniform(0.2, 0.7), 0.016, 0.16))
    shape = blob(rng, point, radius, rng.choice([0.05, 0.2]))
    depth = rng.choice([-1, -1, 1]) * radius * rng.uniform(0.15, 0.6)
    tint = _shade(rng, _colour_at(scene, layer), 0.6, 1.0)
    flaw = Flaw((shape,), tint, rng.uniform(0, 0.3), rise=depth, slope=radius * rng.uniform(0.4, 1))
    return _with(scene, Damage((shape,), layer, True, (flaw,)))


def hole(scene: Scene, rng: Rng) -> Scene:
    """A drilled, punched or torn hole, through to the dark or to what lies beneath."""
    layer, point, reach = _target(scene, rng)
    radius = float(np.clip(reach * rng.uniform(0.1, 0.45), 0.014, 0.1))
    torn = rng.random() < 0.6
    shape = blob(rng, point, radius, 0.25) if torn else disc(point, radius)
    beneath = scene.ground.colour if layer >= 0 and rng.random() < 0.4 else (12.0, 12.0, 14.0)
    through = Flaw(
        (shape,), beneath, rng.uniform(0.8, 1), 0.1, -0.02, radius / 4, smooth=1, gloss=0
    )
    rim = (shape - point) * rng.uniform(1.05, 1.3) + point
    burr = Flaw((rim,), rise=radius * rng.uniform(0, 0.3), slope=radius / 4)
    return _with(scene, Damage((rim if torn else shape,), layer, True, (burr, through)))


def stain(scene: Scene, rng: Rng) -> Scene:
    """A spot, splash or dried ring of something liquid: rust, oil, ink, water."""
    layer, point, reach = _target(scene, rng)
    radius = float(np.clip(reach * rng.uniform(0.2, 0.8), 0.018, 0.16))
    shapes = [blob(rng, point, radius, rng.uniform(0.05, 0.3))]
    for _ in range(rng.choice([0, 0, 1, 3])):
        drop = radius * rng.uniform(0.25, 0.5)
        shapes.append(blob(rng, point + rng.normal(0, 1.5 * radius, 2), max(drop, 0.014), 0.1))
    rust = hsv(rng.normal(0.06, 0.02), rng.uniform(0.5, 0.9), rng.uniform(0.25, 0.6))
    own = _shade(rng, _colour_at(scene, layer), *((0.3, 0.8) if rng.random() < 0.7 else (1.1, 1.5)))
    tint = (rust, own, own, hsv(rng.random(), 0.6, rng.uniform(0.2, 0.9)))[rng.integers(4)]
    opacity = rng.uniform(0.2, 0.95)
    gloss = rng.uniform(0, 1) if rng.random() < 0.5 else None
    soft = radius * rng.uniform(0, 0.4)
    flaws = [Flaw(tuple(shapes), tint, opacity, rng.uniform(0, 0.5), soft=soft, gloss=gloss)]
    if rng.random() < 0.25:  # what has dried has a darker rim
        closed = np.concatenate([shapes[0], shapes[0][:1]])
        rim = tuple(ribbon(0.95 * (closed - point) + point, 0.05 * radius))
        flaws.append(Flaw(rim, _shade(rng, tint, 0.4, 0.8), rng.uniform(0.3, 0.9), 0.3))
    return _with(scene, Damage(tuple(shapes), layer, True, tuple(flaws)))


def crack(scene: Scene, rng: Rng) -> Scene:
    """A ragged dark line that branches."""
    layer, point, reach = _target(scene, rng)
    main = wander(rng, point, reach * rng.uniform(0.8, 2.2), 0.4, 0.4)
    half = float(np.exp(rng.uniform(np.log(0.001), np.log(0.005))))
    lines = [(main, half)]
    for _ in range(rng.integers(0, 4)):
        fork = main[rng.integers(2, len(main) - 2)]
        side = wander(rng, fork, reach * rng.uniform(0.3, 0.8), 0.4, 0.4)
        lines.append((side - side[0] + fork, 0.6 * half))
    tint = _shade(rng, _colour_at(scene, layer), 0.05, 0.5)
    drawn = [quad for line, h in lines for quad in tapered(line, h)]
    marked = [quad for line, h in lines for quad in tapered(line, max(h, THINNEST), 0.7)]
    flaw = Flaw(tuple(drawn), tint, rng.uniform(0.5, 1), 0.2, -2 * half, half, gloss=0)
    return _with(scene, Damage(tuple(marked), layer, True, (flaw,)))


def contamination(scene: Scene, rng: Rng) -> Scene:
    """A foreign body on top: a fibre, crumbs, a drop, a chip of metal."""
    _, point, _ = _target(scene, rng)
    tint = hsv(rng.random(), rng.uniform(0, 0.8), rng.uniform(0.05, 1))
    sort = rng.integers(3)
    gloss = rng.uniform(0, 1)
    if sort == 0:
        half = rng.uniform(0.0015, 0.005)
        fibre = wander(rng, point, rng.uniform(0.08, 0.4), rng.uniform(0.5, 2.5))
        shapes = tapered(fibre, half, 0.7)
        marked = tapered(fibre, max(half, THINNEST), 0.8)
        opacity, rise, slope = rng.uniform(0.6, 1), 2 * half, half
    else:
        count, radius = ((1, 0.06), (int(rng.integers(2, 6)), 0.035))[sort - 1]
        radius *= rng.uniform(0.5, 1.3)
        spread = rng.normal(0, 1.5 * radius, (count, 2)) * (sort - 1)
        ragged = rng.uniform(0.02, 0.35)
        shapes = [blob(rng, point + at, radius * rng.uniform(0.6, 1), ragged) for at in spread]
        marked = shapes
        opacity, slope = rng.uniform(0.35, 1), radius * rng.uniform(0.2, 1)
        rise = 0.4 * slope
    rough = rng.choice([0.0, 0.0015]) * rng.random()
    flaw = Flaw(tuple(shapes), tint, opacity, 0.15, rise, slope, rough, 0.7, gloss)
    return _with(scene, Damage(tuple(marked), len(scene.groups), False, (flaw,)))


# ---------------------------------------------------------------- to a thing


def _pick(scene: Scene, rng: Rng, wanted: Callable[[Group, Item], bool]) -> tuple[int, int] | None:
    """Group and item of a whole thing that is wanted and in the picture, if there is one."""
    fitting = [
        (g, i)
        for g, group in enumerate(scene.groups)
        for i, item in enumerate(group.items)
        if wanted(group, item) and not item.damaged and (np.abs(_middle(item) - 0.5) < 0.47).all()
    ]
    return fitting[rng.integers(len(fitting))] if fitting else None


def _middle(item: Item) -> Points:
    return np.asarray((item.outline.min(axis=0) + item.outline.max(axis=0)) / 2)


def _with_item(scene: Scene, g: int, i: int, item: Item | None) -> tuple[Group, ...]:
    """The scene's groups with one thing replaced, or gone."""
    items = list(scene.groups[g].items)
    items[i : i + 1] = [] if item is None else [item]
    group = replace(scene.groups[g], items=tuple(items))
    return (*scene.groups[:g], group, *scene.groups[g + 1 :])


def missing_piece(scene: Scene, rng: Rng) -> Scene | None:
    """One of many is not there, or a piece of a large one has broken off.

    The mask covers where the material should be, up to the outline that it would have had.
    """
    many = any(group.regular for group in scene.groups)
    if not many or (rng.random() < 0.4 and _has_solid(scene)):
        return _broken(scene, rng, rng.uniform(0.25, 0.9), thin=False)
    picked = _pick(scene, rng, lambda group, _: group.regular)
    if picked is None:
        return None
    g, i = picked
    item = scene.groups[g].items[i]
    shapes = [item.outline] if item.seat is None else [item.outline, item.seat]
    groups = _with_item(scene, g, i, None)
    return _with(replace(scene, groups=groups), Damage(tuple(shapes), g, item.seat is None))


def chip(scene: Scene, rng: Rng) -> Scene | None:
    """An edge or corner is broken: rough, often hardly lighter than dark plastic."""
    return _broken(scene, rng, rng.uniform(0.2, 1.0), thin=True)


def _is_solid(_: Group, item: Item) -> bool:
    return item.spine is None and item.reach > 0.07


def _has_solid(scene: Scene) -> bool:
    return any(_is_solid(group, item) for group in scene.groups for item in group.items)


def _broken(scene: Scene, rng: Rng, part: float, thin: bool) -> Scene | None:
    """A bite out of the border of a thing and the rough face that it has laid bare.

    ``part`` is the radius of the bite in radii of the thing. ``thin``: nearly all of it is face,
    only a strip along the border is gone; else nearly all is gone.
    """
    picked = _pick(scene, rng, _is_solid)
    if picked is None:
        return None
    g, i = picked
    item, of = scene.groups[g].items[i], scene.groups[g].material
    centre = _middle(item)
    outline = item.outline  # its points crowd at the corners
    if rng.random() < 0.6:
        outline = resampled(np.concatenate([outline, outline[:1]]), 200)
    border = outline[rng.integers(len(outline))]
    radius = part * item.reach
    a = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    r = radius * np.clip(1 + wiggle(rng, 48, 0.2), 0.3, 1.9)
    inwards = np.arctan2(*(centre - border)[::-1])
    flat = rng.uniform(0.35, 1)
    face = (
        rotated(np.stack([flat * r * np.cos(a), r * np.sin(a)], axis=1), inwards, ORIGIN) + border
    )
    depth = rng.uniform(0, 0.12) if thin else rng.uniform(0.75, 1)
    shrink = np.array([depth, rng.uniform(0.7, 1) if thin else depth])
    bite = rotated(face - border, -inwards, ORIGIN) * shrink
    bite = rotated(bite + np.stack([wiggle(rng, 48, 0.012 * radius), 0 * a], 1), inwards, ORIGIN)
    gone = bite + border
    holes = (*item.holes, gone) if depth > 0.03 else item.holes
    grey = float(np.mean(of.colour)) * rng.uniform(0.7, 1.2) + rng.uniform(12, 70)
    tint = (grey * rng.uniform(0.9, 1), grey * rng.uniform(0.95, 1.02), grey)
    rough = rng.uniform(0.0003, 0.002)
    opacity, blotch = rng.uniform(0.35, 1), rng.uniform(0.1, 0.6)
    sunk = -scene.groups[g].rise * rng.uniform(0.1, 0.6)
    flaw = Flaw((face,), tint, opacity, blotch, sunk, 0.3 * radius, rough, 1, rng.uniform(0, 0.3))
    groups = _with_item(scene, g, i, replace(item, holes=holes, damaged=True))
    damage = Damage((face, gone), g, True, (flaw,))
    return _with(replace(scene, groups=groups), damage)


def bent(scene: Scene, rng: Rng) -> Scene | None:
    """A slender thing leaves its course, at its tip, from its middle, or in a bulge.

    The mask covers what is bent, and where it should have been.
    """
    picked = _pick(scene, rng, lambda _, item: item.spine is not None)
    if picked is None:
        return None
    g, i = picked
    item = scene.groups[g].items[i]
    assert item.spine is not None  # it was picked for that
    old, half = item.spine, item.half_width
    s = arc_length(old)
    through = bool((np.abs(old[[0, -1]] - 0.5) > 0.5).any(axis=1).all())
    if through:  # both ends are out of the picture: a bulge
        size = s[-1] * rng.uniform(0.08, 0.25)
        at = s[len(s) // 2] + s[-1] * rng.uniform(-0.15, 0.15)
        swell = np.exp(-(((s - at) / (size / 2)) ** 2) * 2)
        across = np.array([-(old[-1] - old[0])[1], (old[-1] - old[0])[0]]) / s[-1]
        off = rng.choice([-1, 1]) * max(half * rng.uniform(1.5, 7), 0.012)
        new = old + (off * swell)[:, None] * across
        moved = np.flatnonzero(np.abs(off) * swell > 0.3 * half)
        first, last = moved[0], moved[-1] + 1
    else:
        first = int(len(old) * rng.choice([rng.uniform(0.25, 0.6), rng.uniform(0.6, 0.85)]))
        last = len(old)
        turn = rng.choice([-1, 1]) * rng.triangular(0.15, 0.5, 1.6)
        steps = np.diff(old[first:], axis=0) * rng.uniform(0.8, 1.1)
        ease = np.clip(np.linspace(0, 1, len(steps)) / 0.25, 0, 1)
        angles = turn * ease + rng.normal(0, 0.3) * ease**2
        swung = [rotated(d, t, ORIGIN) for d, t in zip(steps, angles, strict=True)]
        new = np.concatenate([old[: first + 1], old[first] + np.cumsum(swung, axis=0)])
    shapes = [*ribbon(old[first:last], half), *ribbon(new[first:last], half)]
    if item.seat is not None:
        shapes.append(item.seat)
    groups = _with_item(scene, g, i, replace(things.rod(new, half, item.seat), damaged=True))
    return _with(replace(scene, groups=groups), Damage(tuple(shapes), g, False))


Maker = Callable[[Scene, Rng], Scene | None]  # None where it cannot happen
Families = tuple[Callable[[Rng], Layers], ...]
MAKERS: dict[str, tuple[Maker, Families]] = {  # and to what it can happen
    "scratch": (scratch, families.ANY),
    "dent": (dent, families.ANY),
    "hole": (hole, families.ANY),
    "stain": (stain, families.ANY),
    "crack": (crack, families.ANY),
    "missing_piece": (missing_piece, families.REPEATED),
    "bent": (bent, families.SLENDER),
    "contamination": (contamination, families.ANY),
    "chip": (chip, families.SOLID),
}
