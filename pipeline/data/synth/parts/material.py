"""What things are made of: colour, pattern and relief of a material."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from pipeline.data.synth.draw import Floats, Reals, noise, pixels
from pipeline.data.synth.relief import Colour, Surface, fractal, pebbles

Pattern = Literal[
    "plain", "cloud", "brushed", "wood", "weave", "speckle", "ribs", "pebble", "dots", "lines"
]
PATTERNS: tuple[Pattern, ...] = (
    "plain",
    "cloud",
    "brushed",
    "wood",
    "weave",
    "speckle",
    "ribs",
    "pebble",
    "dots",
    "lines",
)


@dataclass(frozen=True)
class Material:
    colour: Colour
    pattern: Pattern
    scale: float  # repeats of the pattern across the picture
    angle: float  # radians, direction of the pattern
    contrast: float  # of the pattern's colour, 0..1
    bump: float  # height of the pattern, image units
    grain: float  # unevenness of the colour from place to place
    gloss: float  # 0..1


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """BGR 0..255 of hue, saturation and value in 0..1."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return 255 * blue, 255 * green, 255 * red


def any_material(rng: np.random.Generator) -> Material:
    """Something a thing may be made of or lie on."""
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    coarse = float(np.exp(rng.uniform(np.log(6), np.log(45))))
    metallic = rng.random() < 0.3
    colour = (
        hsv(rng.normal(0.1, 0.03), rng.choice([0.05, 0.35]), rng.uniform(0.4, 0.85))
        if metallic
        else hsv(rng.random(), rng.uniform(0, 0.75) ** 1.5, rng.uniform(0.1, 0.92))
    )
    return Material(
        colour=colour,
        pattern=pattern,
        scale=coarse,
        angle=rng.uniform(0, np.pi),
        contrast=rng.uniform(0.03, 0.35),
        bump=rng.uniform(0, 0.12) / coarse,
        grain=rng.uniform(0.01, 0.08),
        gloss=rng.uniform(0.4, 1) if metallic else rng.uniform(0, 0.7),
    )


def metal(rng: np.random.Generator) -> Material:
    """Steel, tin, brass or copper: smooth, brushed or cast."""
    hue, saturation = ((0.6, 0.04), (0.12, 0.42), (0.06, 0.5))[rng.choice(3, p=[0.65, 0.2, 0.15])]
    pattern: Pattern = ("plain", "brushed", "cloud")[rng.integers(3)]
    return Material(
        colour=hsv(hue, saturation * rng.uniform(0.6, 1.2), rng.uniform(0.45, 0.9)),
        pattern=pattern,
        scale=rng.uniform(8, 30),
        angle=rng.uniform(0, np.pi),
        contrast=rng.uniform(0.03, 0.2),
        bump=rng.uniform(0, 0.0008),
        grain=rng.uniform(0.01, 0.06),
        gloss=rng.uniform(0.5, 1),
    )


def dark_plastic(rng: np.random.Generator) -> Material:
    """Moulding compound, nearly black."""
    return Material(
        colour=hsv(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.05, 0.2)),
        pattern="speckle" if rng.random() < 0.4 else "plain",
        scale=rng.uniform(20, 60),
        angle=0.0,
        contrast=rng.uniform(0.02, 0.25),
        bump=rng.uniform(0, 0.0006),
        grain=rng.uniform(0.02, 0.15),
        gloss=rng.uniform(0.1, 0.8),
    )


def painted(rng: np.random.Generator) -> Material:
    """Plastic, enamel, tablet, ceramic: one smooth colour, often bright."""
    return Material(
        colour=hsv(rng.random(), rng.uniform(0, 0.8), rng.uniform(0.45, 0.98)),
        pattern="plain" if rng.random() < 0.7 else "speckle",
        scale=rng.uniform(20, 60),
        angle=0.0,
        contrast=rng.uniform(0.02, 0.12),
        bump=rng.uniform(0, 0.0005),
        grain=rng.uniform(0.005, 0.04),
        gloss=rng.uniform(0.1, 0.9),
    )


def solder_mask(rng: np.random.Generator) -> Material:
    """The bare face of a circuit board."""
    hue = rng.choice([0.38, 0.6, 0.0, 0.08, 0.12]) + rng.normal(0, 0.02)
    return Material(
        colour=hsv(hue, rng.uniform(0.3, 0.85), rng.uniform(0.15, 0.65)),
        pattern="weave" if rng.random() < 0.4 else "plain",
        scale=rng.uniform(30, 60),
        angle=rng.normal(0, 0.02),
        contrast=rng.uniform(0.02, 0.1),
        bump=0.0,
        grain=rng.uniform(0.01, 0.05),
        gloss=rng.uniform(0.1, 0.7),
    )


def surface_of(material: Material, size: int, rng: np.random.Generator) -> Surface:
    """A level sheet of the material, as large as the picture."""
    pattern = _pattern(material, size, rng)
    tone = 1 + material.contrast * pattern + material.grain * fractal(rng, size, 3, 5)
    tone += 0.4 * material.grain * noise(rng, size, min(size, 200))
    colour = np.clip(tone, 0.2, 1.8)[..., None] * np.array(material.colour, np.float32)
    height = np.float32(material.bump) * pattern
    gloss = np.full((size, size), material.gloss, np.float32)
    return Surface(colour.astype(np.float32), height.astype(np.float32), gloss)


def _pattern(material: Material, size: int, rng: np.random.Generator) -> Floats:
    """The pattern (size, size), about -1 to 1."""
    scale = material.scale
    if material.pattern == "plain":
        return np.zeros((size, size), np.float32)
    if material.pattern == "cloud":
        return np.clip(0.6 * fractal(rng, size, round(scale / 3) + 2, 5), -2, 2)
    if material.pattern == "speckle":
        fine = noise(rng, size, round(4 * scale))
        return np.asarray((fine > 0.8).astype(np.float32) - 0.6 * (fine < -1.1), np.float32)
    if material.pattern == "pebble":
        return np.asarray(2 * pebbles(rng, size, round(scale) + 8) - 1, np.float32)
    if material.pattern == "brushed":
        streaks = 0.5 * noise(rng, size, 6, min(size, 220)) + 0.5 * noise(rng, size, 3, 60)
        return _turned(streaks, material)
    x, y = pixels(size)
    c, s = math.cos(material.angle), math.sin(material.angle)
    u, v = (c * x + s * y) * scale, (c * y - s * x) * scale
    if material.pattern == "wood":
        rings = v / 2 + 0.8 * _turned(noise(rng, size, 3, 8), material)
        fibres = _turned(noise(rng, size, 8, min(size, 160)), material)
        return np.asarray(0.6 * np.sin(2 * np.pi * rings) + 0.4 * fibres, np.float32)
    wave_u, wave_v = np.sin(2 * np.pi * u), np.sin(2 * np.pi * v)
    if material.pattern == "ribs":
        return np.asarray(wave_v + 0 * x, np.float32)
    if material.pattern == "lines":
        return np.asarray(np.maximum(_line(u / 3), _line(v / 3)) + 0 * x, np.float32)
    if material.pattern == "dots":
        return np.asarray(np.clip(3 * (wave_u * wave_v - 0.5), -0.5, 1), np.float32)
    over = np.sign(np.sin(np.pi * u) * np.sin(np.pi * v))  # weave: which thread lies on top
    threads = np.where(over > 0, np.abs(np.sin(np.pi * u)), np.abs(np.sin(np.pi * v)))
    return np.asarray(1.6 * threads - 0.9, np.float32)


def _line(u: Reals) -> Floats:
    """1 on thin lines at the whole numbers, 0 between them."""
    return np.asarray(np.clip(1 - np.abs(u - np.round(u)) / 0.05, 0, 1), np.float32)


def _turned(field: Floats, material: Material) -> Floats:
    """A texture that runs along x turned into the material's direction."""
    size = len(field)
    middle = (size / 2, size / 2)
    turn = cv2.getRotationMatrix2D(middle, -math.degrees(material.angle), 1.0)
    mirrored = cv2.warpAffine(field, turn, (size, size), borderMode=cv2.BORDER_REFLECT)
    return np.asarray(mirrored, np.float32)
