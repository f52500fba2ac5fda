"""A sheet of leather and five defects, in the manner of MVTec AD's leather."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.synth.draw import (
    Floats,
    Points,
    blob,
    coverage,
    marked,
    noise,
    rotated,
    stands_out,
    tapered,
    wander,
)
from pipeline.data.synth.relief import (
    Colour,
    Flaw,
    Light,
    Surface,
    fractal,
    pebbles,
    photograph,
    sample_light,
    spoil,
)

CHECK_SIZE = 128  # pixels, for judging whether a defect is visible


@dataclass(frozen=True)
class Hide:
    """The leather itself."""

    colour: Colour
    cells: int  # pebbles of the grain across the picture
    grain: float  # height of the pebbles, image units
    creases: float  # height of natural wrinkles
    pores: float  # darkness of the pores
    mottle: float  # unevenness of the colour
    gloss: float


@dataclass(frozen=True)
class Scene:
    """Everything one picture shows."""

    hide: Hide
    light: Light
    seed: int
    flaws: tuple[Flaw, ...] = ()


Maker = Callable[[Scene, np.random.Generator], tuple[Flaw, ...]]


def render(
    kind: str, size: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One picture and its mask, as `Product` in dataset.py says; ``kind`` is "good" or a defect."""
    _, scene = scenes(kind, rng)
    return paint(scene, size), mask_of(scene, size)


def scenes(kind: str, rng: np.random.Generator) -> tuple[Scene, Scene]:
    """The flawless scene and the same scene with the defect; the same object twice for "good"."""
    scene_rng, defect_rng = rng.spawn(2)
    good = sample_scene(scene_rng)
    if kind == "good":
        return good, good
    scene = good
    for _ in range(rng.choice([1, 2], p=[0.8, 0.2])):
        scene = _with_another(scene, _MAKERS[kind], defect_rng)
    return good, scene


def _with_another(scene: Scene, make: Maker, rng: np.random.Generator) -> Scene:
    """The scene with one more visible defect."""
    before = paint(scene, CHECK_SIZE)
    while True:
        flaws = make(scene, rng)
        after = paint(replace(scene, flaws=(*scene.flaws, *flaws)), CHECK_SIZE)
        if stands_out(before, after, mask_of(replace(scene, flaws=flaws), CHECK_SIZE)):
            return replace(scene, flaws=(*scene.flaws, *flaws))


def mask_of(scene: Scene, size: int) -> NDArray[np.bool_]:
    """Mask (size, size) bool of the defects."""
    shapes = [shape for flaw in scene.flaws for shape in flaw.shapes]
    return marked(coverage(shapes, size))


def sample_scene(rng: np.random.Generator) -> Scene:
    """A flawless sheet: any shade from black and grey to brown, red, tan and cream."""
    hue = rng.choice([rng.normal(0.06, 0.025), rng.uniform(0, 1)], p=[0.8, 0.2]) % 1
    value = rng.uniform(0.16, 0.85)
    red, green, blue = colorsys.hsv_to_rgb(float(hue), rng.uniform(0.05, 0.6), value)
    cells = round(float(np.exp(rng.uniform(np.log(32), np.log(110)))))
    hide = Hide(
        colour=(255 * blue, 255 * green, 255 * red),
        cells=cells,
        grain=rng.uniform(0.05, 0.28) / cells,
        creases=rng.uniform(0, 1) ** 2 * 0.005,
        pores=rng.uniform(0, 0.35),
        mottle=rng.uniform(0.02, 0.12),
        gloss=rng.uniform(0.05, 0.6),
    )
    return Scene(hide, sample_light(rng), int(rng.integers(2**31)))


# ---------------------------------------------------------------- defects


def _somewhere(rng: np.random.Generator) -> Points:
    return rng.uniform(0.12, 0.88, 2)


def _faded(rng: np.random.Generator, colour: Colour, factor: float) -> Colour:
    """Colour made lighter or darker, with a slightly different hue."""
    b, g, r = np.clip(np.array(colour) * factor * rng.normal(1, 0.04, 3), 3, 250)
    return float(b), float(g), float(r)


def colour_stain(scene: Scene, rng: np.random.Generator) -> tuple[Flaw, ...]:
    """A spot or smear of dye: another hue, or lighter or darker than the leather."""
    if rng.random() < 0.65:
        red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.4, 0.95), 1.0)
        level = rng.uniform(60, 230)
        tint = (blue * level, green * level, red * level)
    else:
        tint = _faded(rng, scene.hide.colour, rng.choice([0.4, 1.7]))
    centre, radius = _somewhere(rng), rng.uniform(0.02, 0.1)
    if rng.random() < 0.3:
        path = wander(rng, centre, rng.uniform(2.5, 6) * radius, 0.8)
        shapes = tapered(path, radius * rng.uniform(0.3, 0.6), 0.35)
    else:
        shapes = [blob(rng, centre, radius, 0.2)]
    for _ in range(rng.integers(0, 3)):  # drops beside it
        beside = centre + rng.normal(0, 1.6 * radius, 2)
        shapes.append(blob(rng, beside, max(radius * rng.uniform(0.2, 0.5), 0.014), 0.15))
    opacity, blotch = rng.uniform(0.2, 0.95), rng.uniform(0.05, 0.4)
    soft = rng.uniform(0, 0.25) * radius
    return (Flaw(tuple(shapes), tint, opacity, blotch, soft=soft),)


def cut(scene: Scene, rng: np.random.Generator) -> tuple[Flaw, ...]:
    """A slit that gapes a little, its lips raised; the fibres inside may be paler."""
    path = wander(rng, _somewhere(rng), rng.uniform(0.1, 0.45), rng.uniform(0, 0.5))
    half = rng.uniform(0.0022, 0.0075)
    factor = rng.choice([rng.uniform(0.15, 0.6), rng.uniform(1.3, 2.2)], p=[0.7, 0.3])
    gap = Flaw(
        tuple(tapered(path, half)),
        _faded(rng, scene.hide.colour, factor),
        rng.uniform(0.5, 1),
        rng.uniform(0, 0.3),
        rise=-rng.uniform(1, 2.5) * half,
        slope=half,
        smooth=1,
        gloss=0,
    )
    lips = Flaw(
        tuple(tapered(path, half + rng.uniform(0.001, 0.004))),
        rise=rng.uniform(0, 0.6) * half,
        slope=half,
    )
    return lips, gap


def fold(scene: Scene, rng: np.random.Generator) -> tuple[Flaw, ...]:
    """A ridge or a valley pressed in, with a worn line along its crest."""
    path = wander(rng, _somewhere(rng), rng.uniform(0.25, 1.1), rng.uniform(0, 0.5))
    half = rng.uniform(0.007, 0.022)
    rise = rng.choice([-1, 1]) * half * rng.uniform(0.15, 0.7)
    band = Flaw(tuple(tapered(path, half, 0.4)), rise=rise, slope=half)
    worn = Flaw(
        tuple(tapered(path, half * rng.uniform(0.12, 0.3), 0.3)),
        _faded(rng, scene.hide.colour, rng.choice([0.6, 1.4])),
        rng.uniform(0.1, 0.8),
        0.5,
        smooth=rng.uniform(0.2, 1),
    )
    return band, worn


def glue(scene: Scene, rng: np.random.Generator) -> tuple[Flaw, ...]:
    """A dried drop or string of glue: clear to milky, smoother and glossier than the grain."""
    centre, radius = _somewhere(rng), rng.uniform(0.025, 0.09)
    if rng.random() < 0.45:
        path = wander(rng, centre, rng.uniform(4, 10) * radius, 1.2)
        shapes = tapered(path, radius * rng.uniform(0.15, 0.4), 0.5)
    else:
        shapes = [blob(rng, centre, radius, 0.25)]
    milky = rng.uniform(120, 245)
    tint = (milky * rng.uniform(0.7, 1), milky * rng.uniform(0.9, 1), milky)
    return (
        Flaw(
            tuple(shapes),
            tint,
            rng.uniform(0.05, 0.6),
            rng.uniform(0.1, 0.5),
            rise=rng.uniform(0.001, 0.006),
            slope=rng.uniform(0.2, 0.8) * radius,
            smooth=rng.uniform(0.5, 1),
            gloss=rng.uniform(0.4, 1),
        ),
    )


def poke(scene: Scene, rng: np.random.Generator) -> tuple[Flaw, ...]:
    """One to three small pricks: a dimple, or a hole right through."""
    flaws: list[Flaw] = []
    centre = _somewhere(rng)
    for _ in range(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])):
        radius = rng.uniform(0.014, 0.03)
        around = blob(rng, centre, radius, 0.1)
        depth = radius * rng.uniform(0.2, 1)
        tint = _faded(rng, scene.hide.colour, rng.uniform(0.3, 0.9))
        flaws.append(Flaw((around,), tint, rng.uniform(0, 0.5), 0.2, -depth, radius, smooth=0.4))
        if rng.random() < 0.6:
            hole = rotated((around - centre) * rng.uniform(0.3, 0.7) + centre, 0.3, centre)
            dark = _faded(rng, scene.hide.colour, 0.15)
            flaws.append(Flaw((hole,), dark, 0.95, rise=-depth, slope=radius / 3, gloss=0))
        centre = np.clip(centre + rng.normal(0, 0.1, 2), 0.05, 0.95)
    return tuple(flaws)


_MAKERS: dict[str, Maker] = {
    "color": colour_stain,
    "cut": cut,
    "fold": fold,
    "glue": glue,
    "poke": poke,
}
DEFECTS = tuple(_MAKERS)


# ---------------------------------------------------------------- painting


def paint(scene: Scene, size: int) -> NDArray[np.uint8]:
    """The picture of a scene: (size, size, 3) uint8, BGR."""
    surface = _sheet(scene, size)
    everywhere = np.ones((size, size), np.float32)
    for index, flaw in enumerate(scene.flaws):
        spoil(surface, flaw, np.random.default_rng([scene.seed, 20 + index]), everywhere)
    return photograph(surface, scene.light, np.random.default_rng([scene.seed, 3]))


def _sheet(scene: Scene, size: int) -> Surface:
    hide, rng = scene.hide, np.random.default_rng([scene.seed, 0])
    cells = pebbles(rng, size, hide.cells)
    swell = fractal(rng, size, 4, 5)
    height = hide.grain * (cells + 0.35 * fractal(rng, size, 30, 3))
    height += hide.creases * _wrinkles(rng, size) + 0.002 * swell
    tone = 1 + hide.mottle * swell + 0.10 * (cells - 0.6)
    pores = np.clip(noise(rng, size, round(1.6 * hide.cells)) - 1.6, 0, 1)
    tone *= 1 - hide.pores * pores
    colour = tone[..., None] * np.array(hide.colour, np.float32)
    gloss = hide.gloss * (0.4 + 0.6 * cells)
    return Surface(colour.astype(np.float32), height.astype(np.float32), gloss.astype(np.float32))


def _wrinkles(rng: np.random.Generator, size: int) -> Floats:
    """Natural valleys (size, size), 0 to about -1, running more in one direction than across."""
    field = cv2.resize(noise(rng, 64, 5, 3) + 0.5 * noise(rng, 64, 12, 6), (size, size))
    return np.asarray(-np.exp(-((field / 0.08) ** 2)), np.float32)
