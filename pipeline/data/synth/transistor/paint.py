"""Painting a transistor scene. Every texture has a generator of its own, seeded by the scene and
the layer: changing one thing leaves the look of all others alone.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.synth.draw import (
    Floats,
    Points,
    Reals,
    arc_length,
    bgr,
    blend,
    coverage,
    disc,
    edge,
    fixed,
    noise,
    normals,
    pixels,
    rounded,
)
from pipeline.data.synth.transistor.scene import (
    CRIMP,
    Lead,
    Look,
    Part,
    Scene,
    Wound,
    case_coverage,
    lead_shape,
)

SLOT = bgr(28, 34, 48)  # bare, shaded board between the copper strips
HOLE = bgr(21, 20, 24)  # nearly black, what is below the board
RIM = bgr(88, 128, 200)  # copper burr around a hole, catching the light
CASE = bgr(15, 14, 17)  # black moulding compound
CASE_GLOSS = bgr(28, 32, 33)  # added where the rounded case mirrors the lamp
CASE_BLUE = bgr(30, 21, 17)  # added in the bluish lamp reflection below the middle
CASE_LIP = bgr(13, 16, 21)  # added on the bevel along the top edge
CASE_SEAM = bgr(9, 11, 19)  # added on the mould seams at the sides
FRACTURE = bgr(64, 69, 70)  # broken moulding compound, dull grey
LEAD_FRAME = bgr(70, 92, 138)  # copper tongue inside the case, seen once the top is off
TIN = bgr(196, 202, 204)  # tinned lead in full light
COPPER_GLOW = bgr(0.33, 0.42, 0.65)  # factor on TIN where a lead mirrors the board


def paint(scene: Scene, size: int) -> NDArray[np.uint8]:
    """The picture of a scene: (size, size, 3) uint8, BGR."""
    image = _board(scene, size)
    part = scene.part
    if part is not None:
        case = case_coverage(part, scene.seed, size)
        metal = coverage([p for lead in part.leads for p in lead_shape(lead)], size)
        image *= _shadow(scene.look, case, metal)[..., None]
        for index, lead in enumerate(part.leads):
            _paint_lead(image, lead, scene.look, np.random.default_rng([scene.seed, 10 + index]))
        window = _window(case)
        blend(image[window], _case(scene, part, size, window), case[window])
        for index, wound in enumerate(part.wounds):
            rng = np.random.default_rng([scene.seed, 20 + index])
            _paint_wound(image, part, wound, case, rng)
    return _camera(image, scene, size)


def _board(scene: Scene, size: int) -> Floats:
    """The bare stripboard (size, size, 3)."""
    board, look = scene.board, scene.look
    rng = np.random.default_rng([scene.seed, 0])
    x, y = pixels(size)
    c, s = math.cos(board.angle), math.sin(board.angle)
    dx, dy = x - board.x, y - board.y
    p = (c * dx + s * dy) / board.pitch  # columns from hole (0, 0)
    q = (c * dy - s * dx) / board.pitch  # rows
    pixel = 1 / size

    # Blotches, vertical brushing and grain of the copper.
    tone = 1 + 0.03 * noise(rng, size, 5) + 0.018 * noise(rng, size, 14)
    tone += 0.008 * noise(rng, size, 130, 10) + 0.02 * noise(rng, size, 240)
    image = tone[..., None] * np.array(look.copper, np.float32)
    _scratches(image, rng, size)

    ragged = 0.0006 * noise(rng, size, 24, 45) + 0.0004 * noise(rng, size, 24, 160)
    to_slot = np.abs(p - np.floor(p) - 0.5) * board.pitch - board.slot_width / 2
    to_slot += ragged
    image *= (1 - 0.22 * np.exp(-np.maximum(to_slot, 0) / 0.006))[..., None]
    dirt = 1 + 0.12 * noise(rng, size, 30)[..., None]
    blend(image, SLOT * dirt, edge(to_slot, pixel))

    hx, hy = p - np.round(p), q - np.round(q)
    from_hole = np.hypot(hx, hy)
    to_hole = from_hole * board.pitch - board.hole_radius
    to_hole += 0.0003 * noise(rng, size, 60)
    facing = hx * math.cos(look.light) + hy * math.sin(look.light)
    facing /= np.maximum(from_hole, 1e-3)
    glint = np.exp(-((to_hole / 0.0034) ** 2))
    glint *= np.clip(0.1 + 0.8 * facing + 0.3 * noise(rng, size, 50), 0, 1)
    image *= (1 - 0.25 * np.exp(-np.maximum(to_hole, 0) / 0.005))[..., None]
    depth = 1 + 2.5 * facing * from_hole + 0.2 * noise(rng, size, 70)
    inside = HOLE * depth[..., None]
    blend(image, inside, edge(to_hole, pixel))
    blend(image, RIM, glint)
    return image


def _scratches(image: Floats, rng: np.random.Generator, size: int) -> None:
    """Specks, hair scratches and smudges on the copper, in place."""
    marks = np.zeros((size, size), np.float32)
    for _ in range(int(rng.integers(3, 12))):
        at = rng.uniform(0, 1, 2)
        radius = rng.uniform(0.001, 0.004)
        blob = disc(at, radius) + rng.normal(0, radius / 2, (24, 2))
        marks -= _speck(blob, size) * np.float32(rng.uniform(-0.1, 0.5))
    for _ in range(int(rng.integers(2, 8))):
        start = rng.uniform(0, 1, 2)
        steps = np.cumsum(rng.normal(0, 0.012, (6, 2)) + rng.normal(0, 0.012, 2), axis=0)
        line = fixed(start + rounded(steps, 2), size)
        layer = np.zeros((size, size), np.uint8)
        cv2.polylines(layer, [line], False, 255, 1, cv2.LINE_AA, 4)
        marks += layer.astype(np.float32) * np.float32(rng.uniform(-0.25, 0.2) / 255)
    image *= (1 + marks)[..., None]


def _shadow(look: Look, case: Floats, metal: Floats) -> Floats:
    """Factor (size, size) that the part's shadow puts on the board."""
    size = len(case)
    away = -np.array([np.cos(look.light), np.sin(look.light)])

    def cast(cover: Floats, reach: float, softness: float) -> Floats:
        small = cv2.resize(cover, (160, 160), interpolation=cv2.INTER_AREA)
        move = np.array([[1, 0, away[0] * reach * 160], [0, 1, away[1] * reach * 160]])
        small = cv2.warpAffine(small, move, (160, 160))
        small = cv2.GaussianBlur(small, (0, 0), softness * 160)
        return np.asarray(cv2.resize(small, (size, size)), np.float32)

    dark = np.maximum(cast(case, 0.012, 0.022), 0.8 * cast(metal, 0.012, 0.008))
    return np.asarray(1 - look.shadow * dark, np.float32)


def _paint_lead(image: Floats, lead: Lead, look: Look, rng: np.random.Generator) -> None:
    """Paints a lead in place: mottled tin, darker edges, copper glow and a dark end in a hole."""
    size = len(image)
    cover = coverage(lead_shape(lead), size)
    rows, cols = np.nonzero(cover)
    textures = [rng.standard_normal(shape) for shape in ((18, 2), (26, 6), (140, 7))]
    phase = rng.uniform(0, 6)
    if not len(rows):
        return
    path = lead.path
    point = (np.stack([cols, rows], axis=1) + 0.5) / size
    square = (point**2).sum(1)[:, None] - 2 * point @ path.T + (path**2).sum(1)[None, :]
    nearest = square.argmin(1)
    normal = normals(path)[nearest]
    along = np.stack([normal[:, 1], -normal[:, 0]], axis=1)
    away = point - path[nearest]
    s = arc_length(path)[nearest] + (away * along).sum(1)
    t = (away * normal).sum(1) / lead.half_width

    facets, streaks, grain = (_lookup(g, s / 0.5, t) for g in textures)
    tilt = np.sin(2 * np.arctan2(along[:, 1], along[:, 0]) + phase)
    light = 0.60 + 0.27 * np.tanh(2 * facets) + 0.15 * streaks + 0.08 * grain + 0.12 * tilt
    crimp = (s - CRIMP) / 0.012
    light += 0.4 * np.exp(-((crimp - 0.5) ** 2)) - 0.2 * np.exp(-((crimp + 1.2) ** 2) * 3)
    light += 0.30 * np.exp(-(((t - 0.62) / 0.13) ** 2))  # the edge towards the lamp
    light *= 1 - 0.6 * np.clip(np.abs(t) - 0.72, 0, 0.25) / 0.25
    length = arc_length(path)[-1]
    if lead.face:  # it looks down, away from the light; its upper edge shines
        from_edge = s - (length - lead.face)
        light += 0.3 * np.exp(-((from_edge / 0.002) ** 2))
        light *= 1 - 0.75 * np.clip(from_edge / 0.002, 0, 1)
    light *= 1 - (1 - lead.bent) * np.clip((s - lead.glow_to) / 0.02, 0, 1)
    light = np.clip(light, 0.14, 1.25) * look.shine
    glow = np.clip((s - lead.glow_from) / 0.06, 0, 1) * np.clip((lead.glow_to - s) / 0.02, 0, 1)
    colour = light[:, None] * TIN * (1 - glow[:, None] * (1 - COPPER_GLOW))
    if lead.in_hole:
        colour *= np.clip((length - s) / 0.05, 0.3, 1)[:, None]
    alpha = cover[rows, cols][:, None]
    image[rows, cols] += (colour.astype(np.float32) - image[rows, cols]) * alpha


def _case(scene: Scene, part: Part, size: int, window: tuple[slice, slice]) -> Floats:
    """Surface of the case in a window of the picture (rows, columns, 3)."""
    rng = np.random.default_rng([scene.seed, 2])
    gloss = scene.look.gloss
    x, y = pixels(size)
    c, s = math.cos(part.angle), math.sin(part.angle)
    x, y = x[:, window[1]], y[window[0]]
    dx, dy = x - part.x, y - part.y
    u = (c * dx + s * dy) / (part.width / 2)
    v = (c * dy - s * dx) / (part.height / 2)

    def band(at: float, wide: float) -> Floats:
        return np.exp(-(((u - at) / wide) ** 2))

    grain = 1 + 0.04 * noise(rng, size, 220)[window] + 0.04 * noise(rng, size, 60)[window]
    flat = part.flat_side_up
    right = rng.uniform(0.58, 0.72)
    streaks = rng.uniform(0.1, 0.35, 4), rng.uniform(-0.75, 0.3, 4), rng.uniform(0.04, 0.1, 4)
    if flat:
        shine: Reals = 0.25 + 0.2 * v
    else:
        shine = band(right, 0.17) * rng.uniform(0.7, 1.1)
        for strength, at, wide in zip(*streaks, strict=True):
            shine = shine + band(at, wide) * np.float32(strength)
    image = CASE + (gloss * shine)[..., None] * CASE_GLOSS
    blue = band(rng.uniform(-0.1, 0.1), 0.17) * np.exp(-(((v - 0.62) / 0.3) ** 2))
    if not flat:
        image += (gloss * blue)[..., None] * CASE_BLUE
    image *= grain[..., None]

    # Moulded circle with a mark, or embossed letters on the flat side.
    relief = np.zeros((size, size), np.uint8)
    thin = max(1, round(size / 400))
    if flat:
        _emboss(relief, part, rng, thin)
    else:
        centre = rng.uniform((-0.04, -0.08), (0.08, 0.04))
        ring = part.to_image(disc(np.zeros(2), 0.31) + centre)
        mark = np.array([[-0.05, -0.13], [0.0, -0.17], [0.0, 0.17]]) + centre
        cv2.polylines(relief, [fixed(ring, size)], True, 255, thin, cv2.LINE_AA, 4)
        cv2.polylines(relief, [fixed(part.to_image(mark), size)], False, 200, thin, cv2.LINE_AA, 4)
    patchy = np.clip(0.55 + 0.4 * noise(rng, size, 24)[window], 0.1, 1.3)
    image += (relief[window] * (patchy * (30 / 255)))[..., None]

    # Bevel and seam: a dull lip at the top, a dark line under it, brownish sides.
    lip = edge(v + np.float32(0.86 if flat else 0.955), 0.012)
    lip *= np.clip(0.6 + 0.5 * noise(rng, size, 70)[window], 0.1, 1.6)
    image += lip[..., None] * CASE_LIP
    sides = np.clip((np.abs(u) - 0.955) / 0.02, 0, 1)
    sides *= np.clip(0.5 + 0.5 * noise(rng, size, 40)[window], 0, 1.3)
    image += sides[..., None] * CASE_SEAM
    groove = np.exp(-(((np.abs(u) - 0.935) / 0.012) ** 2))
    image *= (1 - 0.5 * groove)[..., None]
    dust = noise(rng, size, 200)[window] > 3.3
    image[dust] += 35
    return np.asarray(image, np.float32)


def _emboss(relief: NDArray[np.uint8], part: Part, rng: np.random.Generator, thin: int) -> None:
    """Strokes that read as worn lettering on the flat side."""
    size = len(relief)
    for row in (-0.35, 0.0, 0.35):
        for column in np.arange(-0.5, 0.55, 0.25):
            strokes = rng.uniform(-0.09, 0.09, (3, 2)) + np.array([column, row])
            line = fixed(part.to_image(strokes), size)
            cv2.polylines(relief, [line], False, 110, thin, cv2.LINE_AA, 4)


def _paint_wound(
    image: Floats, part: Part, wound: Wound, case: Floats, rng: np.random.Generator
) -> None:
    """Paints the surface a wound lays bare, in place: broken plastic or the copper lead frame."""
    size = len(image)
    cover = coverage([part.to_image(wound.outline)], size)
    if wound.surface == "copper":
        tone = wound.strength * (1 + 0.12 * noise(rng, size, 40, 160))
        blend(image, tone[..., None] * LEAD_FRAME, cover)
    elif wound.surface == "rough":
        _paint_rough(image, part, wound, cover * case, rng)


def _paint_rough(
    image: Floats, part: Part, wound: Wound, cover: Floats, rng: np.random.Generator
) -> None:
    """Paints broken plastic in place: dull, patchy, with torn fibres and a partly lit rim."""
    size = len(image)
    height = noise(rng, size, 18) + 0.5 * noise(rng, size, 50, 35) + 0.2 * noise(rng, size, 110)
    slope = (size / 100) * (np.roll(height, (1, 1), (0, 1)) - height)  # lit from a corner
    patchy = np.clip(0.6 + 0.5 * noise(rng, size, 22), 0.12, 1.3)
    tone = 0.5 + 0.16 * height + 0.22 * np.tanh(slope) + 0.1 * noise(rng, size, 280)
    tone += 0.5 * (noise(rng, size, 150) > 2.0)  # crumbs
    tone = np.clip(tone, 0.1, 1.4) * patchy
    rim = cover - cv2.GaussianBlur(cover, (0, 0), 0.005 * size)
    tone += np.clip(
        rim * 1.5 * noise(rng, size, 16), 0, 1
    )  # sharp edges catch light here and there
    tone += _fibres(part, wound, size, rng) * np.clip(0.4 + noise(rng, size, 60), 0, 1)
    scraped = cover * np.clip(0.85 + 0.4 * noise(rng, size, 14), 0.3, 1)  # less in some places
    blend(image, CASE + (tone * wound.strength)[..., None] * FRACTURE, scraped)


def _fibres(part: Part, wound: Wound, size: int, rng: np.random.Generator) -> Floats:
    """Thin torn lines (size, size), 0..1, that run in about one direction across a wound."""
    layer = np.zeros((size, size), np.uint8)
    low, high = wound.outline.min(axis=0), wound.outline.max(axis=0)
    heading = rng.uniform(0, np.pi)
    for _ in range(int(rng.integers(4, 26))):
        turn = heading + rng.normal(0, 0.35, 4)
        steps = rng.uniform(0.01, 0.06) * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        line = fixed(part.to_image(rng.uniform(low, high) + np.cumsum(steps, axis=0)), size)
        cv2.polylines(layer, [line], False, int(rng.integers(60, 230)), 1, cv2.LINE_AA, 4)
    return np.asarray(layer, np.float32) / np.float32(255)


def _camera(image: Floats, scene: Scene, size: int) -> NDArray[np.uint8]:
    """Vignetting, defocus, exposure and sensor noise; back to 8 bits."""
    look = scene.look
    x, y = pixels(size)
    radius = ((x - 0.5) ** 2 + (y - 0.5) ** 2) * 2
    fall_off = 1 - look.vignette * radius + look.hot_spot * np.exp(-radius * 30)
    image *= (look.exposure * fall_off)[..., None]
    if look.blur * size > 0.3:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), look.blur * size), np.float32)
    rng = np.random.default_rng([scene.seed, 3])
    image += look.noise * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _speck(outline: Points, size: int) -> Floats:
    """As ``coverage`` of one small polygon, quicker and less exact."""
    canvas = np.zeros((size, size), np.uint8)
    cv2.fillPoly(canvas, [fixed(outline, size)], 255, cv2.LINE_AA, 4)
    return np.asarray(canvas, np.float32) / np.float32(255)


def _lookup(grid: NDArray[np.float64], s: NDArray[np.float64], t: NDArray[np.float64]) -> Floats:
    """Linear interpolation in a texture, s in 0..1 down and t in -1..1 across."""
    down = (np.clip(s, 0, 1) * (grid.shape[0] - 1)).astype(np.float32)
    across = (np.clip((t + 1) / 2, 0, 1) * (grid.shape[1] - 1)).astype(np.float32)
    texture = grid.astype(np.float32)
    rows = 8192  # remap takes at most 32767 rows
    parts = [
        cv2.remap(texture, across[i : i + rows, None], down[i : i + rows, None], cv2.INTER_LINEAR)
        for i in range(0, len(s), rows)
    ]
    return np.asarray(np.concatenate(parts)[:, 0], np.float32)


def _window(cover: Floats) -> tuple[slice, slice]:
    """Rows and columns in which anything is covered."""
    x, y, width, height = cv2.boundingRect((cover > 0).astype(np.uint8))
    return slice(y, y + height), slice(x, x + width)
