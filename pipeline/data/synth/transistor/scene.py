"""What one picture of a transistor on stripboard shows, and how a flawless one is sampled.

The *face* frame of a part runs from -1 to 1 across the case (u) and from -1 at its top edge to 1 at
the edge the leads leave (v). A ``Scene`` says completely what is in the picture, so painting it
twice gives the same bytes, and a defect is nothing but a changed copy of a scene.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pipeline.data.synth.draw import (
    Floats,
    Points,
    arc_length,
    coverage,
    resampled,
    ribbon,
    rounded,
    turn,
)

COPPER = (98.0, 116.0, 165.0)  # BGR of the bare strip in full light
LEAD_EXIT = 0.56  # where the outer leads leave the case, in half widths from its middle
CRIMP = 0.125  # arc length, image units, at which a lead was crimped
LEAD_SAMPLES = 72  # points along a resampled lead


@dataclass(frozen=True)
class Board:
    """Stripboard: hole (0, 0) is the one the middle lead belongs in, the rest is a square grid."""

    x: float
    y: float
    angle: float  # radians, clockwise
    pitch: float
    hole_radius: float
    slot_width: float

    def to_image(self, grid: Points) -> Points:
        """(N, 2) points in pitches from hole (0, 0), columns and rows, -> image units."""
        return grid * self.pitch @ turn(self.angle) + (self.x, self.y)

    def hole(self, column: float, row: float = 0.0) -> Points:
        """(2,) centre of a hole in image units."""
        return np.asarray(self.to_image(np.array([[column, row]], float))[0])


@dataclass(frozen=True)
class Lead:
    """One tinned lead: its centre line from inside the case to the tip, image units."""

    path: Points  # (N, 2)
    half_width: float
    glow_from: float  # arc length at which it starts to mirror the copper
    glow_to: float = math.inf  # arc length at which it stops doing so
    in_hole: bool = True  # the tip goes down into a hole and darkens
    bent: float = 1.0  # part of the light that falls on it from `glow_to` on
    face: float = 0.0  # arc length of the sheared face it ends in, if it was cut


@dataclass(frozen=True)
class Wound:
    """Damage to the case, an outline in the face frame."""

    outline: Points  # (N, 2) u, v
    surface: Literal["missing", "rough", "copper"]  # board shows, broken plastic, lead frame
    strength: float = 1.0  # brightness of the surface


@dataclass(frozen=True)
class Part:
    """The transistor: pose of its case, its leads and whatever is wrong with the case."""

    x: float
    y: float
    angle: float  # radians, clockwise
    width: float
    height: float
    leads: tuple[Lead, ...]
    wounds: tuple[Wound, ...] = ()
    flat_side_up: bool = False

    def to_image(self, face: Points) -> Points:
        """(N, 2) points u, v of the face frame -> image units."""
        half = np.array([self.width, self.height]) / 2
        return face * half @ turn(self.angle) + (self.x, self.y)


@dataclass(frozen=True)
class Look:
    """Light, materials and camera."""

    copper: tuple[float, float, float]
    light: float  # radians, where the lamp stands, 0 is right and pi/2 below
    shadow: float  # 0..1 darkness of cast shadows
    gloss: float  # factor on the reflections of the case
    shine: float  # factor on the reflections of the leads
    vignette: float  # 0..1 loss of light in the corners
    hot_spot: float  # 0..1 extra light in the middle
    exposure: float
    blur: float  # sigma in image units
    noise: float  # sigma in grey levels


@dataclass(frozen=True)
class Scene:
    """Everything one picture shows; ``part`` is None on an empty board."""

    board: Board
    part: Part | None
    look: Look
    seed: int


def sample_scene(rng: np.random.Generator) -> Scene:
    """A flawless part on its board, with random pose, light and camera."""
    board = Board(
        x=rng.uniform(0.47, 0.53),
        y=rng.uniform(0.83, 0.89),
        angle=rng.normal(0, 0.008),
        pitch=rng.uniform(0.212, 0.228),
        hole_radius=rng.uniform(0.041, 0.047),
        slot_width=rng.uniform(0.036, 0.046),
    )
    width = rng.uniform(0.385, 0.42)
    height = width * rng.uniform(0.98, 1.03)
    gap = rng.uniform(0.22, 0.36)  # from the case to the holes
    part = Part(
        x=board.x + rng.normal(0, 0.012),
        y=board.y - gap - height / 2,
        angle=rng.normal(0, 0.025),
        width=width,
        height=height,
        leads=(),
    )
    leads = tuple(_lead(part, board, column, rng) for column in (-1, 0, 1))
    look = Look(
        copper=_tinted(rng),
        light=rng.normal(-0.2, 0.6),
        shadow=rng.uniform(0.4, 0.65),
        gloss=rng.uniform(0.6, 1.4),
        shine=rng.uniform(0.75, 1.1),
        vignette=rng.uniform(0.05, 0.25),
        hot_spot=rng.uniform(0.0, 0.3),
        exposure=rng.uniform(0.83, 1.1),
        blur=rng.uniform(0.0006, 0.0022),
        noise=rng.uniform(0.8, 3.0),
    )
    return Scene(board, replace(part, leads=leads), look, int(rng.integers(2**31)))


def _tinted(rng: np.random.Generator) -> tuple[float, float, float]:
    """Copper with a slightly different hue in every picture."""
    b, g, r = np.array(COPPER) * rng.normal(1, (0.02, 0.011, 0.01))
    return float(b), float(g), float(r)


def _lead(part: Part, board: Board, column: int, rng: np.random.Generator) -> Lead:
    """A good lead: straight in the middle, bent outwards in an S on either side."""
    hole = board.hole(column) + rng.normal(0, 0.004, 2) + (0, 0.2 * board.hole_radius)
    start = part.to_image(np.array([[column * LEAD_EXIT, 0.9]]))[0]
    leave = part.to_image(np.array([[column * LEAD_EXIT, 1.0]]))[0]
    fall = hole[1] - leave[1]
    reach = hole[0] - leave[0]
    first, second = rng.uniform(0.18, 0.28), rng.uniform(0.5, 0.6)
    way = np.array(
        [
            start,
            leave,
            leave + np.array([0.02 * reach, first * fall]),
            leave + np.array([0.95 * reach, second * fall]),
            hole - (0, 0.25 * fall),
            hole,
        ]
    )
    way[2:5] += rng.normal(0, 0.004, (3, 2))
    path = resampled(rounded(way), LEAD_SAMPLES)
    length = float(arc_length(path)[-1])
    return Lead(path, rng.uniform(0.0175, 0.021), length * rng.uniform(0.5, 0.85))


def lead_shape(lead: Lead) -> list[Points]:
    """Polygons of a lead: flattened ridge where it was crimped, thinner towards the tip."""
    s = arc_length(lead.path)
    crimp = 0.18 * np.exp(-(((s - CRIMP) / 0.014) ** 2))
    taper = 1 - 0.22 * np.clip((s - 0.08) / 0.2, 0, 1)
    return ribbon(lead.path, lead.half_width * (taper + crimp))


def case_shape(part: Part, seed: int) -> Points:
    """Outline of the whole case, image units, with the slight raggedness of its mould seams."""
    corners = [(-0.985, -1), (0.985, -1), (1, -0.97), (1, 0.97), (0.985, 1), (-0.985, 1)]
    corners += [(-1, 0.97), (-1, -0.97), (-0.985, -1)]
    outline = resampled(np.array(corners, float), 160)
    jitter = np.random.default_rng([seed, 1]).normal(0, 0.0025, outline.shape)
    return part.to_image(outline + jitter)


def case_coverage(part: Part, seed: int, size: int) -> Floats:
    """Share of each pixel covered by what is left of the case."""
    whole = coverage([case_shape(part, seed)], size)
    gone = [part.to_image(w.outline) for w in part.wounds if w.surface == "missing"]
    return whole * (1 - coverage(gone, size)) if gone else whole


def part_of(scene: Scene) -> Part:
    if scene.part is None:
        raise ValueError("the scene has no part to damage")
    return scene.part
