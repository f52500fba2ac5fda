"""A surface under a lamp and a camera: what leather and parts are painted with.

A surface is made first, as a height field with a colour; flaws then change it; light and camera
make a picture of it at the end. So a dent is shaded, and casts a shadow, as everything else does.
Heights are in image units. The shading is that of Blinn (1977), "Models of light reflection for
computer synthesized pictures".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.synth.draw import Floats, Points, Reals, blend, coverage, noise, pixels

Colour = tuple[float, float, float]  # BGR, 0..255
SHADOW_STEPS = 4


@dataclass
class Surface:
    """What lies under the camera."""

    colour: Floats  # (size, size, 3) BGR in full light
    height: Floats  # (size, size)
    gloss: Floats  # (size, size), 0 for matt to 1 for a mirror

    @property
    def size(self) -> int:
        return len(self.height)

    def lay(self, other: Surface, cover: Floats, rise: Floats | float = 0.0) -> None:
        """Put ``other`` on top where ``cover`` (size, size) is 1, ``rise`` above height 0."""
        blend(self.colour, other.colour, cover)
        self.height += (other.height + rise - self.height) * cover
        self.gloss += (other.gloss - self.gloss) * cover


@dataclass(frozen=True)
class Flaw:
    """A local change of a surface: a stain, scratch, dent, hole, fibre, drop of glue..."""

    shapes: tuple[Points, ...]  # their union is what changes, image units
    tint: Colour | None = None  # what it is coloured with
    opacity: float = 1.0  # of the tint
    blotch: float = 0.0  # 0..1, unevenness of the tint
    rise: float = 0.0  # height of its middle above the surface; negative into it
    slope: float = 0.01  # distance from its border within which that height is reached
    rough: float = 0.0  # height of a broken texture
    smooth: float = 0.0  # 0..1, how far the surface's own relief is gone
    gloss: float | None = None
    soft: float = 0.0  # image units over which the tint fades out at the border

    def cover(self, size: int) -> Floats:
        """Share 0..1 of each pixel (size, size) that changes."""
        return coverage(self.shapes, size)


@dataclass(frozen=True)
class Light:
    """Lamp and camera."""

    azimuth: float  # radians, where the lamp stands, 0 is right and pi/2 below
    elevation: float  # radians above the surface
    ambient: float  # 0..1, share of the light that comes from everywhere
    shine: float  # strength of the reflections
    sharpness: float  # exponent of the reflections
    shadow: float  # 0..1 darkness of cast shadows
    gradient: float  # loss of light across the picture, from the lamp's side
    vignette: float  # 0..1 loss of light in the corners
    hot_spot: float  # extra light around `spot`
    spot: tuple[float, float]
    shade: float  # 0..1 darkness of the shadow of something out of sight
    shade_from: float  # how far the edge of that shadow is from the middle
    tint: Colour  # factors on the colour
    exposure: float
    blur: float  # sigma of the defocus in image units
    noise: float  # sigma in grey levels


def sample_light(rng: np.random.Generator) -> Light:
    """Any light, from flat and even to a hard lamp from the side."""
    warm = rng.normal(0, 0.04)
    x, y = rng.uniform(0.1, 0.9, 2)
    return Light(
        azimuth=rng.uniform(0, 2 * np.pi),
        elevation=rng.uniform(0.4, 1.25),
        ambient=rng.uniform(0.25, 0.65),
        shine=rng.uniform(0, 1) ** 2 * 1.2,
        sharpness=rng.uniform(6, 60),
        shadow=rng.uniform(0.1, 0.75),
        gradient=rng.uniform(0, 0.5),
        vignette=rng.uniform(0, 0.35),
        hot_spot=rng.uniform(0, 1) ** 2 * 0.4,
        spot=(float(x), float(y)),
        shade=rng.uniform(0.1, 0.6) if rng.random() < 0.25 else 0.0,
        shade_from=rng.uniform(-0.4, 0.4),
        tint=(1 - warm, 1.0, 1 + warm),
        exposure=rng.uniform(0.7, 1.15),
        blur=rng.uniform(0.0002, 0.0028),
        noise=rng.uniform(0.5, 4.5),
    )


def fractal(rng: np.random.Generator, size: int, across: int, octaves: int = 4) -> Floats:
    """Fractional Brownian motion (size, size), about N(0, 1), coarsest grains ``across``."""
    total = np.zeros((size, size), np.float32)
    norm = 0.0
    for octave in range(octaves):
        weight = 0.5**octave
        total += np.float32(weight) * noise(rng, size, across * 2**octave)
        norm += weight**2
    return total / np.float32(0.75 * math.sqrt(norm))  # cubic interpolation takes a quarter


def pebbles(rng: np.random.Generator, size: int, across: int) -> Floats:
    """Rounded cells (size, size), 0 in the creases between them to 1: cellular noise.

    Worley (1996), "A cellular texture basis function", with one jittered point in each cell.
    """
    grid = np.stack(np.meshgrid(np.arange(-1, across + 1), np.arange(-1, across + 1)), -1)
    points = (grid.reshape(-1, 2) + rng.uniform(0, 1, (grid.size // 2, 2))) / across
    canvas = np.full((size, size), 255, np.uint8)
    at = np.clip((points * size).astype(int), 0, size - 1)
    canvas[at[:, 1], at[:, 0]] = 0
    distance = cv2.distanceTransform(canvas, cv2.DIST_L2, 5) * (across / size)
    return np.asarray(1 - np.clip(distance / 0.75, 0, 1) ** 2, np.float32)


def rounded_off(cover: Floats, width: float) -> Floats:
    """0 at the border of a shape to 1 from ``width`` image units inside it, as a quarter circle."""
    size = len(cover)
    inside = (cover >= 0.5).astype(np.uint8)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, 5) / max(width * size, 1.0)
    depth = 1 - np.clip(distance, 0, 1)
    return np.asarray(np.sqrt(1 - depth**2), np.float32)


def spoil(surface: Surface, flaw: Flaw, rng: np.random.Generator, within: Floats) -> None:
    """Changes a surface in place as a flaw does, no farther than ``within`` (size, size)."""
    size = surface.size
    cover = np.minimum(flaw.cover(size), within)
    if flaw.smooth:
        level = cv2.GaussianBlur(surface.height, (0, 0), 0.02 * size)
        surface.height += (level - surface.height) * (cover * np.float32(flaw.smooth))
    if flaw.rise:
        surface.height += np.float32(flaw.rise) * rounded_off(cover, flaw.slope) * cover
    if flaw.rough:
        crumbs = noise(rng, size, 90) + 0.7 * noise(rng, size, 35) + 0.6 * fractal(rng, size, 12)
        surface.height += np.float32(flaw.rough) * crumbs * cover
    if flaw.tint is not None:
        blotches = fractal(rng, size, 7)
        alpha = cover
        if flaw.soft:
            alpha = cover * rounded_off(cover, flaw.soft)
        uneven = np.clip(1 + flaw.blotch * blotches, 0, 1.6) * np.float32(flaw.opacity)
        tint = np.array(flaw.tint, np.float32) * (1 + 0.08 * blotches)[..., None]
        blend(surface.colour, tint, np.clip(alpha * uneven, 0, 1))
    if flaw.gloss is not None:
        surface.gloss += (np.float32(flaw.gloss) - surface.gloss) * cover


def photograph(surface: Surface, light: Light, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture of a surface: (size, size, 3) uint8, BGR."""
    size = surface.size
    image = surface.colour * _diffuse_and_shadow(surface, light)[..., None]
    image += _mirrored(surface, light)[..., None]
    image *= _fall_off(light, size)[..., None] * np.array(light.tint, np.float32)
    if light.blur * size > 0.3:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), light.blur * size), np.float32)
    image += light.noise * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _slopes(surface: Surface) -> tuple[Floats, Floats]:
    """Rise per length to the right and downwards (size, size)."""
    scale = surface.size / 2
    dx = cv2.Sobel(surface.height, cv2.CV_32F, 1, 0, ksize=1) * scale
    dy = cv2.Sobel(surface.height, cv2.CV_32F, 0, 1, ksize=1) * scale
    return np.asarray(dx, np.float32), np.asarray(dy, np.float32)


def _diffuse_and_shadow(surface: Surface, light: Light) -> Floats:
    """Factor (size, size) on the colour: about 1 on a level place in full light."""
    dx, dy = _slopes(surface)
    ca, sa = math.cos(light.azimuth), math.sin(light.azimuth)
    ce, se = math.cos(light.elevation), math.sin(light.elevation)
    facing: Reals = (se - ce * (ca * dx + sa * dy)) / np.sqrt(1 + dx * dx + dy * dy)
    direct = np.clip(facing / se, 0, 1.8) * (1 - light.shadow * _cast(surface, light))
    return np.asarray(light.ambient + (1 - light.ambient) * direct, np.float32)


def _cast(surface: Surface, light: Light) -> Floats:
    """How far (size, size) each place lies in the shadow of what is between it and the lamp."""
    size = surface.size
    height = surface.height
    reach = float(height.max() - height.min()) / math.tan(light.elevation)
    dark = np.zeros_like(height)
    for step in range(1, SHADOW_STEPS + 1):
        away = reach * step / SHADOW_STEPS
        x = away * size * math.cos(light.azimuth)
        y = away * size * math.sin(light.azimuth)
        move = np.array([[1, 0, -x], [0, 1, -y]])
        towards = cv2.warpAffine(height, move, (size, size), borderMode=cv2.BORDER_REPLICATE)
        above = towards - height - np.float32(0.8 * away * math.tan(light.elevation))
        np.maximum(dark, above, out=dark)
    dark = np.clip(dark / max(0.25 * reach * math.tan(light.elevation), 1e-4), 0, 1)
    return np.asarray(cv2.GaussianBlur(dark, (0, 0), 0.004 * size), np.float32)


def _mirrored(surface: Surface, light: Light) -> Floats:
    """Grey levels (size, size) of the lamp's reflection, for a camera straight above."""
    if not light.shine:
        return np.zeros_like(surface.height)
    dx, dy = _slopes(surface)
    half = np.array(
        [
            math.cos(light.elevation) * math.cos(light.azimuth),
            math.cos(light.elevation) * math.sin(light.azimuth),
            math.sin(light.elevation) + 1,
        ]
    )
    half /= np.linalg.norm(half)
    facing = (half[2] - half[0] * dx - half[1] * dy) / np.sqrt(1 + dx * dx + dy * dy)
    spread = np.exp(np.float32(light.sharpness) * (np.minimum(facing, 1) - 1))
    return np.asarray(130 * light.shine * surface.gloss * spread, np.float32)


def _fall_off(light: Light, size: int) -> Floats:
    """Exposure (size, size) of each place."""
    x, y = pixels(size)
    side = (x - 0.5) * math.cos(light.azimuth) + (y - 0.5) * math.sin(light.azimuth)
    corner = ((x - 0.5) ** 2 + (y - 0.5) ** 2) * 2
    spot = (x - light.spot[0]) ** 2 + (y - light.spot[1]) ** 2
    even = 1 + light.gradient * side - light.vignette * corner
    shaded = 1 - light.shade * np.clip(0.5 + (light.shade_from - side) / 0.04, 0, 1)
    lit = (even + light.hot_spot * np.exp(-spot * 12)) * shaded
    return np.asarray(light.exposure * lit, np.float32)
