"""Masks of a transistor's defects, drawn from the geometry before and after.

They follow MVTec's convention: they mark what is there and should not be, and what should be there
and is not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.data.synth.draw import Floats, Points, arc_length, coverage, disc, ribbon
from pipeline.data.synth.transistor.scene import (
    Board,
    Lead,
    Scene,
    case_coverage,
    case_shape,
    lead_shape,
    part_of,
)

STRAIGHT = 0.7  # how far the marked place of a lead is from the lead's curve (0) to a line (1)


def silhouette(scene: Scene, size: int) -> Floats:
    """Coverage of the case and leads; all zero on an empty board."""
    if scene.part is None:
        return np.zeros((size, size), np.float32)
    metal = [p for lead in scene.part.leads for p in lead_shape(lead)]
    return coverage([case_shape(scene.part, scene.seed), *metal], size)


def _changed_leads(good: Scene, scene: Scene) -> list[tuple[int, Lead, Lead, int]]:
    """Index, good lead, defective lead and first differing point of each lead that changed."""
    found = []
    for i, (old, new) in enumerate(zip(part_of(good).leads, part_of(scene).leads, strict=True)):
        if old is not new:
            n = min(len(old.path), len(new.path))
            same = np.all(old.path[:n] == new.path[:n], axis=1)
            found.append((i, old, new, n if same.all() else int(same.argmin())))
    return found


def _place_of(lead: Lead, first: int, hole: Points, board: Board) -> list[Points]:
    """What is marked where a lead should be: from point ``first`` of it down to all of its hole.

    It widens evenly and is nearly straight, as people draw it.
    """
    rest = lead.path[max(first - 1, 0) :]
    straight = np.linspace(rest[0], hole, len(rest))
    wide = np.linspace(lead.half_width, board.hole_radius, len(rest))
    return [*ribbon(rest + STRAIGHT * (straight - rest), wide), disc(hole, board.hole_radius)]


def _mask_bent(good: Scene, scene: Scene, size: int) -> Floats:
    part, board = part_of(scene), scene.board
    shapes = []
    for i, old, new, first in _changed_leads(good, scene):
        shapes += lead_shape(new)[max(first - 1, 0) :]
        hole = board.hole(i - 1)
        crosses = np.linalg.norm(new.path - hole, axis=1).min() < board.hole_radius
        if not crosses:  # else the lead is where it should be, but for its tip
            shapes += _place_of(old, first, hole, board)
    return coverage(shapes, size) * (1 - case_coverage(part, scene.seed, size))


def _mask_cut(good: Scene, scene: Scene, size: int) -> Floats:
    """The missing ends, from the middle of the sheared faces on, and without other metal."""
    part, board = part_of(scene), scene.board
    good_leads = {i: old for i, old, _, _ in _changed_leads(good, scene)}
    missing, metal = [], []
    for i, lead in enumerate(part.leads):
        shape = lead_shape(lead)
        if i in good_leads:
            s = arc_length(lead.path)
            first = int(np.searchsorted(s, s[-1] - lead.face / 2))
            missing += _place_of(good_leads[i], first, board.hole(i - 1), board)
            shape = shape[: first - 1]
        metal += shape
    free = (coverage(metal, size) == 0) & (case_coverage(part, scene.seed, size) == 0)
    return np.asarray(coverage(missing, size) * free, np.float32)


def _mask_damage(good: Scene, scene: Scene, size: int) -> Floats:
    part = part_of(scene)
    wounds = coverage([part.to_image(w.outline) for w in part.wounds], size)
    return np.minimum(wounds, coverage([case_shape(part_of(good), scene.seed)], size))


def _mask_misplaced(good: Scene, scene: Scene, size: int) -> Floats:
    belongs = coverage([good.board.to_image(shape) for shape in _template()], size)
    return np.maximum(belongs, silhouette(scene, size))


def _template() -> list[Points]:
    """Where a part may lie, in pitches from hole (0, 0): case, shoulders, three lead tips."""
    case = np.array([(-1.2, -3.4), (1.2, -3.4), (1.2, -1.0), (-1.2, -1.0)])
    neck = np.array([(0.8, -1.0), (0.85, -0.8), (1.1, -0.6)])
    neck = np.concatenate([neck, neck[::-1] * (-1, 1)])
    leg = np.array([(-0.2, 0.0), (-0.24, -0.25), (-0.4, -0.5), (-0.55, -0.6)])
    leg = np.concatenate([leg, leg[::-1] * (-1, 1)])
    shapes = [case, neck]
    for column in (-1.0, 0.0, 1.0):
        tip = np.clip(leg + np.array([column, 0]), (-1.2, -1), (1.2, 1))
        shapes += [tip, disc(np.array([column, 0.0]), 0.205)]
    return shapes


MASKERS: dict[str, Callable[[Scene, Scene, int], Floats]] = {
    "bent_lead": _mask_bent,
    "cut_lead": _mask_cut,
    "damaged_case": _mask_damage,
    "misplaced": _mask_misplaced,
}
