"""The four defects of a transistor: each changes a copy of a flawless scene."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pipeline.data.synth.draw import Points, arc_length, resampled, rotated, wiggle
from pipeline.data.synth.transistor.masks import silhouette
from pipeline.data.synth.transistor.scene import (
    LEAD_SAMPLES,
    Board,
    Lead,
    Part,
    Scene,
    Wound,
    part_of,
)

CHECK_SIZE = 128  # pixels, for judging whether a defect is visible
CUT_FACE = 0.006, 0.026  # arc length of a sheared face, image units
DIM = 0.5  # part of the bent leads that turn away from the lamp


def _some_leads(rng: np.random.Generator) -> list[int]:
    """Usually one lead, now and then two."""
    count = 2 if rng.random() < 0.12 else 1
    return sorted(int(i) for i in rng.choice(3, count, replace=False))


def _with_leads(scene: Scene, changed: dict[int, Lead]) -> Scene:
    part = part_of(scene)
    leads = tuple(changed.get(i, lead) for i, lead in enumerate(part.leads))
    return replace(scene, part=replace(part, leads=leads))


def bend_lead(scene: Scene, rng: np.random.Generator) -> Scene:
    """One or two leads miss their holes: overshooting them, or swung aside."""
    part = part_of(scene)
    small = rng.random() < 0.35
    change = _overshoot if small else _swing
    return _with_leads(
        scene, {i: change(part.leads[i], scene.board, rng) for i in _some_leads(rng)}
    )


def _overshoot(lead: Lead, board: Board, rng: np.random.Generator) -> Lead:
    """The tip runs across the hole instead of into it."""
    start = arc_length(lead.path)[-1] - 1.3 * board.hole_radius
    keep = lead.path[: _index(lead.path, start)]
    down = np.array([[0.0, rng.uniform(2.0, 3.6) * board.hole_radius]])
    tip = keep[-1] + rotated(down, rng.normal(0, 0.3), np.zeros(2))
    return replace(lead, path=_joined(keep, tip), glow_to=start, in_hole=False, bent=_light(rng))


def _swing(lead: Lead, board: Board, rng: np.random.Generator) -> Lead:
    """Everything below a bend swings aside, so far that the tip clearly leaves the hole.

    What would have been hidden in the hole may show, too.
    """
    s = arc_length(lead.path)
    while True:
        start = _index(lead.path, s[-1] * rng.uniform(0.15, 0.85))
        angle = rng.choice([-1, 1]) * rng.triangular(0.35, 0.6, 1.7)
        curl = rng.normal(0, 0.6)
        hidden = rng.uniform(0.0, 4.0) * board.hole_radius
        longer = rng.uniform(0.8, 1.2) + hidden / (s[-1] - s[start])
        steps = np.diff(lead.path[start:], axis=0) * longer
        along = np.linspace(0, 1, len(steps))
        turn = angle * np.clip(along / 0.2, 0, 1) + curl * along
        steps = np.stack([rotated(d, t, np.zeros(2)) for d, t in zip(steps, turn, strict=True)])
        path = np.concatenate([lead.path[: start + 1], lead.path[start] + np.cumsum(steps, axis=0)])
        moved = np.linalg.norm(path[-1] - lead.path[-1])
        below_case = path[-1, 1] > lead.path[LEAD_SAMPLES // 7, 1]
        if moved > 2.2 * board.hole_radius and below_case:
            break
    return replace(lead, path=path, glow_to=float(s[start]), in_hole=False, bent=_light(rng))


def _light(rng: np.random.Generator) -> float:
    """How much of the light falls on what is bent."""
    return float(rng.uniform(0.25, 0.9)) if rng.random() < DIM else 1.0


def _index(path: Points, s: float) -> int:
    """Index of the first point at arc length ``s`` or beyond."""
    return int(np.searchsorted(arc_length(path), s))


def _joined(keep: Points, rest: Points) -> Points:
    """A kept stretch and a new one; the points of the kept one stay exactly where they are."""
    count = max(12, round(arc_length(rest)[-1] / (arc_length(keep)[-1] / len(keep))))
    return np.concatenate([keep, resampled(np.concatenate([keep[-1:], rest]), count)[1:]])


def cut_lead(scene: Scene, rng: np.random.Generator) -> Scene:
    """One or two leads are cut off short."""
    changed = {}
    for i in _some_leads(rng):
        lead = part_of(scene).leads[i]
        length = arc_length(lead.path)[-1]
        end = _index(lead.path, rng.uniform(0.18, 0.7) * length)
        face = rng.uniform(*CUT_FACE)
        changed[i] = replace(lead, path=lead.path[:end], in_hole=False, face=face)
    return _with_leads(scene, changed)


def damage_case(scene: Scene, rng: np.random.Generator) -> Scene:
    """One to three wounds of the case: the top broken off, an edge chipped, the face scraped."""
    mode = rng.choice(["break", "chip", "crater"], p=[0.22, 0.43, 0.35])
    if mode == "break":
        wounds = _break(rng)
    elif mode == "chip":
        wounds = _chip(rng)
    else:
        wounds = [_crater(rng, rng.uniform(0.2, 0.55))]
    while len(wounds) < 4 and rng.random() < 0.25:
        wounds.append(_crater(rng, rng.uniform(0.09, 0.2)))
    return replace(scene, part=replace(part_of(scene), wounds=tuple(wounds)))


def _strength(rng: np.random.Generator) -> float:
    """From hardly lighter than the plastic around it to clearly grey."""
    return float(rng.triangular(0.45, 0.9, 1.7))


def _break(rng: np.random.Generator) -> list[Wound]:
    """The top is gone down to a slanting line, below which the fracture face shows."""
    u = np.linspace(-1.08, 1.08, 28)
    left, right = rng.permutation([rng.uniform(-1.0, -0.8), rng.uniform(-0.75, -0.3)])
    upper = np.interp(u, [-1, 1], [left, right]) + wiggle(rng, 28, 0.035)
    depth = rng.uniform(0.12, 0.3) * np.sin(np.linspace(0.35, np.pi - 0.35, 28)) ** 0.7
    lower = upper + np.maximum(depth + wiggle(rng, 28, 0.05), 0.04)
    top = np.array([[1.08, -1.1], [-1.08, -1.1]])
    gone = np.concatenate([np.stack([u, upper], 1), top])
    face = np.concatenate([np.stack([u, lower], 1), np.stack([u, upper], 1)[::-1]])
    wounds = [Wound(gone, "missing"), Wound(face, "rough", _strength(rng))]
    if rng.random() < 0.4:  # the copper lead frame sticks out of the fracture
        at, half, tall = rng.uniform(-0.5, 0.4), rng.uniform(0.15, 0.5), rng.uniform(0.06, 0.16)
        base = float(np.interp(at, u, upper)) + 0.04
        x, y = at + half * np.array([-1, 1, 1, -1]), base - tall * np.array([0, 0, 1, 1])
        tongue = np.stack([x, y], 1)
        wounds.append(Wound(rotated(tongue, rng.normal(0, 0.1), tongue[0]), "copper", 1.0))
    return wounds


def _chip(rng: np.random.Generator) -> list[Wound]:
    """A ragged bite out of the top edge or, less often, another edge.

    Mostly the edge itself is worn away beside it, so that a thin strip up to the straight outline
    is missing.
    """
    count = 40
    u = np.linspace(-1, 1, count)
    half, depth = rng.uniform(0.2, 1.0), rng.uniform(0.2, 0.95)
    at = rng.uniform(-0.9, 0.9)  # at an end of the edge it is a corner
    lean = rng.normal(0, 0.25)  # the bite reaches sideways, as the plastic flakes off
    bite = depth * np.clip(1 - np.abs(u) ** rng.uniform(0.5, 2.5), 0, 1)
    bite = np.maximum(bite * np.clip(1 + wiggle(rng, count, 0.2), 0.4, 1.5), 0.02)
    edge = np.stack([at + half * u + lean * bite, -1.03 + bite], 1)
    shape = np.concatenate([edge, [[at + half, -1.03], [at - half, -1.03]]])
    worn = rng.uniform(0.3, 1.2)  # half width of the strip
    strip = rng.uniform(0.02, 0.09) * np.clip(1 + wiggle(rng, count, 0.5), 0.1, 2)
    strip *= np.clip(3 * (1 - np.abs(u)), 0, 1)
    gone = np.stack([np.clip(at + worn * u, -1.03, 1.03), -1.03 + 0.03 + strip], 1)
    gone = np.concatenate([gone, gone[[-1, 0]] * (1, 0) - (0, 1.1)])
    if rng.random() < 0.25:  # another side: bottom, left or right
        turn = rng.choice([np.pi / 2, np.pi, -np.pi / 2])
        shape, gone = rotated(shape, turn, np.zeros(2)), rotated(gone, turn, np.zeros(2))
    face = Wound(np.clip(shape, -1.03, 1.03), "rough", _strength(rng))
    return [face] if rng.random() < 0.2 else [Wound(gone, "missing"), face]


def _crater(rng: np.random.Generator, radius: float) -> Wound:
    """A ragged pit in the face."""
    count = 48
    a = np.linspace(0, 2 * np.pi, count, endpoint=False)
    r = radius * np.clip(1 + wiggle(rng, count, 0.34) + rng.normal(0, 0.02, count), 0.35, 1.8)
    shape = np.stack([r * np.cos(a), r * np.sin(a) * rng.uniform(0.2, 1)], 1)
    centre = rng.uniform(-0.65, 0.65, 2)
    shape = rotated(shape, rng.uniform(0, np.pi), np.zeros(2)) + centre
    return Wound(shape, "rough", _strength(rng))


def misplace(scene: Scene, rng: np.random.Generator) -> Scene:
    """The part is absent, shifted, rotated, upside down, sideways or lies on its round side."""
    if rng.random() < 0.18:
        return replace(scene, part=None)
    part = part_of(scene)
    before = silhouette(scene, CHECK_SIZE)
    while True:
        angle, shift = _pose_error(rng)
        moved = _moved(part, angle, shift)
        moved = replace(moved, flat_side_up=bool(abs(angle) > 0.3 and rng.random() < 0.3))
        after = silhouette(replace(scene, part=moved), CHECK_SIZE)
        overlap = np.minimum(before, after).sum() / np.maximum(before, after).sum()
        if overlap < 0.72 and after.sum() > 0.85 * before.sum():  # clearly off, yet in the picture
            return replace(scene, part=moved)


def _pose_error(rng: np.random.Generator) -> tuple[float, Points]:
    """Clockwise turn and shift, from a handful of typical mishaps."""
    mishap = rng.choice(["shifted", "tilted", "sideways", "upside down", "any"])
    turn = {
        "shifted": rng.normal(0, 0.04),
        "tilted": rng.choice([-1, 1]) * rng.uniform(0.2, 0.6),
        "sideways": rng.choice([-1, 1]) * np.pi / 2 + rng.normal(0, 0.15),
        "upside down": np.pi + rng.normal(0, 0.1),
        "any": rng.uniform(-np.pi, np.pi),
    }[str(mishap)]
    shift = rng.normal(0, 0.09, 2) - (0.0, 0.02)
    if mishap == "shifted":
        shift *= rng.uniform(0.1, 0.17) / np.linalg.norm(shift)
    return float(turn), shift


def _moved(part: Part, angle: float, shift: Points) -> Part:
    """The part turned about its middle and shifted, its lead tips now lying on the board."""
    centre = np.array([part.x, part.y + 0.15])  # of case and leads together
    x, y = rotated(np.array([[part.x, part.y]]), angle, centre)[0] + shift
    leads = tuple(
        replace(lead, path=rotated(lead.path, angle, centre) + shift, in_hole=False, glow_to=0.0)
        for lead in part.leads
    )
    return replace(part, x=float(x), y=float(y), angle=part.angle + angle, leads=leads)


MAKERS: dict[str, Callable[[Scene, np.random.Generator], Scene]] = {
    "bent_lead": bend_lead,
    "cut_lead": cut_lead,
    "damaged_case": damage_case,
    "misplaced": misplace,
}
