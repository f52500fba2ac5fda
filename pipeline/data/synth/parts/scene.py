"""What one picture of manufactured parts shows, and how it is painted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.synth.draw import Floats, Points, blend, coverage, marked
from pipeline.data.synth.parts.material import Material, surface_of
from pipeline.data.synth.relief import (
    Colour,
    Flaw,
    Light,
    Surface,
    photograph,
    rounded_off,
    spoil,
)


@dataclass(frozen=True)
class Item:
    """One thing, in image units."""

    outline: Points  # (N, 2) closed polygon
    holes: tuple[Points, ...] = ()  # where there is nothing of it
    marks: tuple[Points, ...] = ()  # recesses or print on it
    spine: Points | None = None  # centre line of a slender thing, from its root to its tip
    half_width: float = 0.0  # of a slender thing
    seat: Points | None = None  # outline of the hole a slender thing ends in
    damaged: bool = False

    @property
    def reach(self) -> float:
        """Half its smaller extent."""
        return float(np.ptp(self.outline, axis=0).min()) / 2


@dataclass(frozen=True)
class Group:
    """Things of one make, which do not overlap."""

    items: tuple[Item, ...]
    material: Material
    rise: float  # how far they stand out, image units
    bevel: float  # width of their rounded edge
    mark_tint: Colour = (0.0, 0.0, 0.0)
    mark_opacity: float = 0.0
    mark_rise: float = 0.0
    regular: bool = False  # laid out so that one missing is noticed

    def cover(self, size: int) -> Floats:
        """Share 0..1 of each pixel (size, size) that the things cover."""
        cover = coverage([item.outline for item in self.items], size)
        holes = [hole for item in self.items for hole in item.holes]
        return cover * (1 - coverage(holes, size)) if holes else cover


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong in a scene."""

    shapes: tuple[Points, ...]  # their union is the mask, as far as it is clipped
    layer: int  # index of the group it concerns, -1 for the ground, len(groups) for on top of all
    inside: bool  # whether it is clipped to that group
    flaws: tuple[Flaw, ...] = ()  # changes of the surface; what changed in the groups is there

    def clip(self, groups: tuple[Group, ...], size: int) -> Floats:
        """Where (size, size) it can be: within its group, and not beneath another one."""
        clip = np.ones((size, size), np.float32)
        if self.inside and 0 <= self.layer < len(groups):
            clip = groups[self.layer].cover(size)
        for group in groups[self.layer + 1 :]:
            clip = np.minimum(clip, 1 - group.cover(size))
        return clip


@dataclass(frozen=True)
class Scene:
    """Everything one picture shows; ``groups`` from the lowest to the highest."""

    ground: Material
    groups: tuple[Group, ...]
    light: Light
    seed: int
    damages: tuple[Damage, ...] = ()


def paint(scene: Scene, size: int) -> NDArray[np.uint8]:
    """The picture of a scene: (size, size, 3) uint8, BGR."""
    surface = surface_of(scene.ground, size, np.random.default_rng([scene.seed, 0]))
    for index, group in enumerate(scene.groups):
        _lay(surface, group, np.random.default_rng([scene.seed, 10 + index]))
    for number, damage in enumerate(scene.damages):
        clip = damage.clip(scene.groups, size)
        for index, flaw in enumerate(damage.flaws):
            spoil(surface, flaw, np.random.default_rng([scene.seed, 50 + number, index]), clip)
    return photograph(surface, scene.light, np.random.default_rng([scene.seed, 3]))


def _lay(surface: Surface, group: Group, rng: np.random.Generator) -> None:
    """Puts the things of a group on what is there."""
    size = surface.size
    cover = group.cover(size)
    made_of = surface_of(group.material, size, rng)
    surface.lay(made_of, cover, group.rise * rounded_off(cover, group.bevel))
    marks = [mark for item in group.items for mark in item.marks]
    if marks:
        marked = coverage(marks, size) * cover
        tint = np.array(group.mark_tint, np.float32)
        blend(surface.colour, tint, marked * np.float32(group.mark_opacity))
        surface.height += np.float32(group.mark_rise) * marked


def mask_of(good: Scene, scene: Scene, size: int) -> NDArray[np.bool_]:
    """Mask (size, size) bool of the damages that turned ``good`` into ``scene``."""
    covers = (
        np.minimum(coverage(d.shapes, size), d.clip(good.groups, size)) for d in scene.damages
    )
    return marked(reduce(np.maximum, covers, np.zeros((size, size), np.float32)))


def contains(item: Item, point: Points) -> bool:
    """Whether a point (2,) lies on a thing and not in its holes."""
    on, *in_holes = (
        cv2.pointPolygonTest(polygon.astype(np.float32), tuple(point.tolist()), False) >= 0
        for polygon in (item.outline, *item.holes)
    )
    return on and not any(in_holes)
