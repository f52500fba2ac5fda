"""Kinds of pictures of manufactured parts: what lies there, how it is laid out, of what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pipeline.data.synth.draw import Points, resampled, rotated
from pipeline.data.synth.parts import things
from pipeline.data.synth.parts.material import (
    Material,
    any_material,
    dark_plastic,
    hsv,
    metal,
    painted,
    solder_mask,
)
from pipeline.data.synth.parts.scene import Group, Item, Scene
from pipeline.data.synth.relief import sample_light

MIDDLE = np.array([0.5, 0.5])
ROD_POINTS = 60  # along a slender thing
Layers = tuple[Material, tuple[Group, ...]]


def sheet(rng: np.random.Generator) -> Layers:
    """Nothing but a material."""
    return any_material(rng), ()


def lot(rng: np.random.Generator) -> Layers:
    """Equal things in rows, seldom in two colours."""
    make = things.SMALL[rng.integers(len(things.SMALL))]
    model = make(rng)
    columns, rows = (int(n) for n in rng.integers(1, 7, 2))
    cell = 1 / max(columns, rows)
    radius = cell * rng.uniform(0.3, 0.46)
    turn, tilt = rng.normal(0, 0.1), rng.choice([0.0, 0.03, 3.0])
    facing = rng.uniform(0, 2 * np.pi)
    items = []
    for row in range(rows):
        for column in range(columns):
            at = np.array([column - (columns - 1) / 2, row - (rows - 1) / 2]) * cell
            at = rotated(at[None] + rng.normal(0, 0.02 * cell, 2), turn, np.zeros(2))[0] + MIDDLE
            items.append(things.placed(model, at, radius, facing + rng.normal(0, tilt)))
    ground, of = _pair(rng)
    group = _group(rng, tuple(items), of, radius, regular=len(items) >= 4)
    return ground, _recoloured(rng, group)


def heap(rng: np.random.Generator) -> Layers:
    """Things of one to three makes, scattered without overlap."""
    ground = any_material(rng)
    groups: list[Group] = []
    taken: list[tuple[Points, float]] = []
    for _ in range(rng.integers(1, 4)):
        model = things.SMALL[rng.integers(len(things.SMALL))](rng)
        radius = rng.uniform(0.04, 0.13)
        items = []
        for _ in range(rng.integers(2, 14)):
            at = rng.uniform(0.02, 0.98, 2)
            if all(np.linalg.norm(at - p) > 1.45 * max(radius, r) + 0.6 * r for p, r in taken):
                taken.append((at, radius))
                items.append(things.placed(model, at, radius, rng.uniform(0, 2 * np.pi)))
        if items:
            groups.append(_group(rng, tuple(items), _material(rng), radius))
    return ground, tuple(groups)


def single(rng: np.random.Generator) -> Layers:
    """One large thing."""
    item = things.SMALL[rng.integers(len(things.SMALL))](rng)
    ground, of = _pair(rng)
    radius = rng.uniform(0.25, 0.44)
    at = MIDDLE + rng.normal(0, 0.04, 2)
    placed = things.placed(item, at, radius, rng.uniform(0, 2 * np.pi))
    return ground, (_group(rng, (placed,), of, radius),)


def package(rng: np.random.Generator) -> Layers:
    """A dark moulded case, usually with leads that end in holes of the board beneath it."""
    ground = solder_mask(rng) if rng.random() < 0.6 else any_material(rng)
    radius = rng.uniform(0.16, 0.34)
    model = things.case(rng)
    quarter = rng.integers(4) * np.pi / 2 + rng.normal(0, 0.04)
    case = things.placed(model, MIDDLE + rng.normal(0, 0.05, 2), radius, quarter)
    body = _group(rng, (case,), dark_plastic(rng), radius)
    if rng.random() < 0.25:
        return ground, (body,)
    tall = float(np.ptp(model.outline[:, 1])) / 2
    sides = rng.choice(np.array([[1, 0], [1, 1]]))  # leads at one end or at both
    count = int(rng.integers(2, 9))
    middle = case.outline.mean(axis=0)
    leads = []
    holes = []
    half = radius * min(rng.uniform(0.25, 0.6) / count, 0.09)
    length, step = rng.uniform(0.5, 1.1), rng.choice([0.0, rng.uniform(-0.15, 0.15)])
    in_holes = rng.random() < 0.6
    for side, present in zip((1, -1), sides, strict=True):
        for i in range(count if present else 0):
            u = (i - (count - 1) / 2) * 1.7 / count
            ends = np.array([(u, 0.8 * tall), (u, tall + length)]) * (1, side)
            start, end = rotated(ends * radius, quarter, np.zeros(2)) + middle
            spine = resampled(things.s_curve(start, end, step * 2 * u), ROD_POINTS)
            hole = things.ring(half * rng.uniform(1.6, 2.2), 28) + spine[-1]
            leads.append(things.rod(spine, half, hole if in_holes else None))
            holes.append(Item(hole))
    pins = _group(rng, tuple(leads), metal(rng), half, regular=True)
    if not in_holes:
        return ground, (pins, body)
    pit = replace(dark_plastic(rng), gloss=0.0)
    return ground, (Group(tuple(holes), pit, -0.01, 0.002), pins, body)


def comb(rng: np.random.Generator) -> Layers:
    """Parallel pins or prongs with free ends out of a bar."""
    ground, of = _pair(rng)
    count = int(rng.integers(3, 13))
    pitch = rng.uniform(0.5, 0.9) / count
    half = pitch * rng.uniform(0.12, 0.33)
    top, bottom = rng.uniform(0.12, 0.3), rng.uniform(0.6, 0.92)
    slant = rng.choice([0.0, rng.normal(0, 0.25)])
    angle = rng.integers(4) * np.pi / 2 + rng.normal(0, 0.08)
    pins = []
    for i in range(count):
        x = 0.5 + (i - (count - 1) / 2) * pitch
        ends = np.array([(x, top), (x + slant * (bottom - top), bottom)])
        spine = resampled(rotated(ends, angle, MIDDLE), ROD_POINTS)
        pins.append(things.rod(spine, half))
    wide = (count / 2 + rng.uniform(0, 0.6)) * pitch
    bar = things.box(wide, rng.uniform(0.05, 0.12), 0.01) + np.array([0.5, top])
    body = Item(rotated(bar, angle, MIDDLE))
    return ground, (
        _group(rng, tuple(pins), of, half, regular=True),
        _group(rng, (body,), _material(rng), 0.08),
    )


def bars(rng: np.random.Generator) -> Layers:
    """Parallel rods or wires from edge to edge, perhaps crossed by others: a grid."""
    ground, of = _pair(rng)
    angle = rng.uniform(0, np.pi)
    count = int(rng.integers(3, 12))
    groups = []
    for turn in (0.0, np.pi / 2)[: rng.integers(1, 3)]:
        pitch = 1.3 / count
        half = pitch * rng.uniform(0.08, 0.3)
        rods = []
        for i in range(count):
            x = 0.5 + (i - (count - 1) / 2) * pitch
            ends = rotated(np.array([(x, -0.25), (x, 1.25)]), angle + turn, MIDDLE)
            rods.append(things.rod(resampled(ends, 2 * ROD_POINTS), half))
        groups.append(_group(rng, tuple(rods), of, half))
    return ground, tuple(groups)


def tiles(rng: np.random.Generator) -> Layers:
    """Tiles or bricks that cover the picture, in one or two colours."""
    across, tall = int(rng.integers(2, 8)), rng.choice([1.0, 1.0, 0.5])
    gap, corner = rng.uniform(0.02, 0.09), rng.uniform(0.0, 0.25)
    bond = rng.choice([0.0, 0.5])  # how far each row is shifted
    angle = rng.choice([0.0, np.pi / 4, rng.normal(0, 0.1)])
    cell = 1 / across
    shape = things.box(0.5 - gap, 0.5 * tall - gap, corner * tall)
    items = []
    for row in range(-across, round(2 * across / tall)):
        for column in range(-across // 2 - 1, across + across // 2 + 2):
            at = np.array([column + bond * (row % 2), row * tall]) * cell
            at = rotated(at[None], angle, MIDDLE)[0]
            if (np.abs(at - 0.5) < 0.5 + cell).all():
                items.append(things.placed(Item(shape), at, cell, angle))
    ground, of = _pair(rng)
    return ground, _recoloured(rng, _group(rng, tuple(items), of, 0.4 * cell, regular=True))


def board(rng: np.random.Generator) -> Layers:
    """A circuit board: tracks, rows of ringed holes, components."""
    ground = solder_mask(rng)
    copper = replace(metal(rng), pattern="plain")
    tracks = []
    for _ in range(rng.integers(0, 14)):
        start, leg = rng.uniform(0, 1, 2), rng.uniform(0.1, 0.5)
        turn = rng.integers(8) * np.pi / 4
        way = np.array([(0, 0), (leg, 0), (1.4 * leg, rng.choice([-0.4, 0.0, 0.4]) * leg)])
        path = rotated(way, turn, np.zeros(2)) + start
        tracks.append(Item(things.stroke(path, rng.uniform(0.003, 0.009))))
    pitch = rng.uniform(0.09, 0.22)
    ring, hole = pitch * rng.uniform(0.25, 0.4), rng.uniform(0.4, 0.7)
    shift = rng.uniform(0, pitch, 2)
    count = int(1 / pitch) + 1
    pads = []
    for index in range(count**2):
        at = np.array(divmod(index, count)) * pitch + shift
        pads.append(Item(things.ring(ring, 28) + at, (things.ring(ring * hole, 28) + at,)))
    lighter = np.array(ground.colour) * 1.25
    traces = replace(ground, colour=tuple(np.minimum(lighter, 255).tolist()))
    groups = [Group(tuple(tracks), traces, 0.001, 0.003)] if tracks else []
    groups.append(Group(tuple(pads), copper, 0.002, 0.004, regular=True))
    if rng.random() < 0.6:
        chip = things.box(rng.uniform(0.06, 0.16), rng.uniform(0.04, 0.1), 0.008)
        turn = rng.integers(2) * np.pi / 2
        items = []
        for i in range(rng.integers(1, 5)):
            at = np.array([0.2 + 0.3 * (i % 3), 0.25 + 0.45 * (i // 3)]) + rng.normal(0, 0.01, 2)
            items.append(things.placed(Item(chip, marks=things.glyph(rng, 0.02)), at, 1, turn))
        groups.append(_group(rng, tuple(items), dark_plastic(rng), 0.06))
    return ground, tuple(groups)


def label(rng: np.random.Generator) -> Layers:
    """A plate with rows of printed or embossed characters."""
    ground, of = _pair(rng)
    width, height = rng.uniform(0.3, 0.48), rng.uniform(0.2, 0.46)
    size = rng.uniform(0.025, 0.07)
    letters = []
    for row in np.arange(-height + 2 * size, height - size, 3 * size):
        for column in np.arange(-width + 2 * size, width - size, 1.9 * size):
            if rng.random() < 0.85:
                at = np.array([column, row])
                letters += [stroke + at for stroke in things.glyph(rng, size)]
    item = Item(things.box(width, height, 0.04), marks=tuple(letters))
    plate = things.placed(item, MIDDLE, 1, rng.normal(0, 0.15))
    return ground, (_group(rng, (plate,), of, 0.15),)


def _material(rng: np.random.Generator) -> Material:
    return (any_material, metal, painted, dark_plastic)[rng.choice(4, p=[0.3, 0.3, 0.25, 0.15])](
        rng
    )


def _pair(rng: np.random.Generator) -> tuple[Material, Material]:
    """A ground and something on it, which can be told from each other."""
    while True:
        ground, of = any_material(rng), _material(rng)
        if np.abs(np.subtract(ground.colour, of.colour)).max() > 35:
            return ground, of


def _group(
    rng: np.random.Generator,
    items: tuple[Item, ...],
    of: Material,
    radius: float,
    regular: bool = False,
) -> Group:
    """Things of about this radius: flat or domed, with printed, sunk or raised marks."""
    bevel = radius * rng.choice([rng.uniform(0.03, 0.15), rng.uniform(0.5, 1)])
    rise = min(bevel, radius) * rng.uniform(0.3, 0.9) + rng.uniform(0, 0.01)
    bright = float(np.mean(of.colour))
    tint = hsv(rng.random(), rng.uniform(0, 0.6), rng.uniform(0, 0.35) if bright > 110 else 0.8)
    sunk = rng.random() < 0.6
    return Group(
        items,
        of,
        rise=float(min(rise, 0.05)),
        bevel=float(bevel),
        mark_tint=tint,
        mark_opacity=rng.uniform(0, 0.4) if sunk else rng.uniform(0.4, 1),
        mark_rise=float(rng.choice([-1, 1]) * radius * rng.uniform(0.02, 0.06)) if sunk else 0.0,
        regular=regular,
    )


def _recoloured(rng: np.random.Generator, group: Group) -> tuple[Group, ...]:
    """The group, or now and then two of alternating colour."""
    if len(group.items) < 8 or rng.random() < 0.6:
        return (group,)
    other = replace(group.material, colour=_material(rng).colour)
    return (
        replace(group, items=group.items[::2]),
        replace(group, items=group.items[1::2], material=other),
    )


FAMILIES: tuple[Callable[[np.random.Generator], Layers], ...] = (
    sheet,
    lot,
    heap,
    single,
    package,
    comb,
    bars,
    tiles,
    board,
    label,
)
SLENDER = (package, comb, bars)  # what can be bent
REPEATED = (lot, tiles, package, comb, board)  # of which one can be missing
SOLID = (
    package,
    package,
    package,
    single,
    single,
    lot,
    tiles,
)  # from which something can be chipped
ANY = (*FAMILIES, sheet, lot, package)


def sample_scene(
    rng: np.random.Generator, families: tuple[Callable[[np.random.Generator], Layers], ...]
) -> Scene:
    """A flawless scene of one of the families."""
    ground, groups = families[rng.integers(len(families))](rng)
    return Scene(ground, groups, sample_light(rng), int(rng.integers(2**31)))
