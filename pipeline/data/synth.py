"""Procedural data set in the layout of MVTec AD: a transistor on stripboard and four defects.

Nothing is copied from any photograph; ``synth_draw`` paints every pixel from geometry. A scene
is sampled first, a defect then changes a copy of it, and the mask is drawn from the geometry of
both. Masks follow MVTec's convention: they mark what is there and should not be, and what should
be there and is not.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from threading import current_thread, main_thread

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.synth_draw import (
    LEAD_SAMPLES,
    Board,
    Floats,
    Lead,
    Look,
    Part,
    Points,
    Scene,
    Wound,
    arc_length,
    case_coverage,
    case_shape,
    coverage,
    disc,
    lead_shape,
    paint,
    resampled,
    ribbon,
    rotated,
    rounded,
)

DEFECTS: tuple[str, ...] = ("bent_lead", "cut_lead", "damaged_case", "misplaced")

COPPER = (98.0, 116.0, 165.0)  # BGR of the bare strip in full light
LEAD_EXIT = 0.56  # where the outer leads leave the case, in half widths from its middle
CHECK_SIZE = 128  # pixels, for judging whether a defect is visible
CRUMB = 2e-4  # share of the picture below which a stray piece of a mask is dropped
_Job = tuple[Path, str, int, int, int]  # what `_write` takes

POOL_FROM = 64  # images from which starting worker processes pays


def render(
    kind: str, size: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One picture and its mask.

    ``kind`` is "good" or one of DEFECTS. Returns the image (size, size, 3) uint8 in BGR order and
    the mask (size, size) bool, which is empty exactly for "good".
    """
    good, scene = scenes(kind, rng)
    return paint(scene, size), mask_of(kind, good, scene, size)


def scenes(kind: str, rng: np.random.Generator) -> tuple[Scene, Scene]:
    """The flawless scene and the same scene with the defect; the same object twice for "good"."""
    scene_rng, defect_rng = rng.spawn(2)
    good = sample_scene(scene_rng)
    if kind == "good":
        return good, good
    return good, _DEFECT_MAKERS[kind](good, defect_rng)


def mask_of(kind: str, good: Scene, scene: Scene, size: int) -> NDArray[np.bool_]:
    """Mask (size, size) bool of the defect that turned ``good`` into ``scene``."""
    if kind == "good":
        return np.zeros((size, size), bool)
    mask = _MASKERS[kind](good, scene, size) >= 0.5
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    crumbs = stats[:, cv2.CC_STAT_AREA] < CRUMB * mask.size
    return np.asarray(mask & ~crumbs[labels])


# ---------------------------------------------------------------- a good scene


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
    path = resampled(rounded(way))
    length = float(arc_length(path)[-1])
    return Lead(path, rng.uniform(0.0175, 0.021), length * rng.uniform(0.5, 0.85))


# ---------------------------------------------------------------- defects


def _part(scene: Scene) -> Part:
    if scene.part is None:
        raise ValueError("the scene has no part to damage")
    return scene.part


def _some_leads(rng: np.random.Generator) -> list[int]:
    """Usually one lead, now and then two."""
    count = 2 if rng.random() < 0.12 else 1
    return sorted(int(i) for i in rng.choice(3, count, replace=False))


def _with_leads(scene: Scene, changed: dict[int, Lead]) -> Scene:
    part = _part(scene)
    leads = tuple(changed.get(i, lead) for i, lead in enumerate(part.leads))
    return replace(scene, part=replace(part, leads=leads))


def bend_lead(scene: Scene, rng: np.random.Generator) -> Scene:
    """One or two leads miss their holes: overshooting them, or swung aside."""
    part = _part(scene)
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
    return replace(lead, path=_joined(keep, tip), glow_to=start, in_hole=False)


def _swing(lead: Lead, board: Board, rng: np.random.Generator) -> Lead:
    """Everything below a bend swings aside, so far that the tip clearly leaves the hole."""
    s = arc_length(lead.path)
    while True:
        start = _index(lead.path, s[-1] * rng.uniform(0.15, 0.75))
        angle = rng.choice([-1, 1]) * rng.triangular(0.35, 0.6, 1.7)
        curl = rng.normal(0, 0.6)
        steps = np.diff(lead.path[start:], axis=0) * rng.uniform(0.8, 1.4)
        along = np.linspace(0, 1, len(steps))
        turn = angle * np.clip(along / 0.2, 0, 1) + curl * along
        steps = np.stack([rotated(d, t, np.zeros(2)) for d, t in zip(steps, turn, strict=True)])
        path = np.concatenate([lead.path[: start + 1], lead.path[start] + np.cumsum(steps, axis=0)])
        moved = np.linalg.norm(path[-1] - lead.path[-1])
        below_case = path[-1, 1] > lead.path[LEAD_SAMPLES // 7, 1]
        if moved > 2.2 * board.hole_radius and below_case:
            break
    return replace(lead, path=path, glow_to=float(s[start]), in_hole=False)


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
        lead = _part(scene).leads[i]
        length = arc_length(lead.path)[-1]
        end = _index(lead.path, rng.uniform(0.18, 0.7) * length)
        changed[i] = replace(lead, path=lead.path[:end], in_hole=False, cut=True)
    return _with_leads(scene, changed)


def damage_case(scene: Scene, rng: np.random.Generator) -> Scene:
    """One to three wounds of the case: the top broken off, a chip at an edge, or a crater."""
    wounds: list[Wound] = []
    mode = rng.choice(["break", "chip", "crater"], p=[0.3, 0.38, 0.32])
    if mode == "break":
        wounds += _break(rng)
    elif mode == "chip":
        wounds.append(_chip(rng))
    else:
        wounds.append(_crater(rng, rng.uniform(0.22, 0.65)))
    while len(wounds) < 3 and rng.random() < 0.25:
        wounds.append(_crater(rng, rng.uniform(0.09, 0.2)))
    return replace(scene, part=replace(_part(scene), wounds=tuple(wounds)))


def _strength(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.95, 1.5))


def _break(rng: np.random.Generator) -> list[Wound]:
    """The top is gone down to a slanting line, below which the fracture face shows."""
    u = np.linspace(-1.08, 1.08, 28)
    left, right = rng.permutation([rng.uniform(-1.0, -0.8), rng.uniform(-0.75, -0.3)])
    upper = np.interp(u, [-1, 1], [left, right]) + _wiggle(rng, 28, 0.035)
    depth = rng.uniform(0.12, 0.3) * np.sin(np.linspace(0.35, np.pi - 0.35, 28)) ** 0.7
    lower = upper + np.maximum(depth + _wiggle(rng, 28, 0.05), 0.04)
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


def _chip(rng: np.random.Generator) -> Wound:
    """A ragged bite out of the top edge or, less often, another edge."""
    count = 30
    u = np.linspace(-1, 1, count)
    half, depth, at = rng.uniform(0.35, 1.0), rng.uniform(0.25, 0.7), rng.uniform(-0.4, 0.4)
    bite = depth * np.clip(1 - np.abs(u) ** rng.uniform(0.6, 2.5), 0, 1) + _wiggle(rng, count, 0.09)
    edge = np.stack([at + half * u, -1.03 + np.maximum(bite, 0.03)], 1)
    shape = np.concatenate([edge, [[at + half, -1.03], [at - half, -1.03]]])
    if rng.random() < 0.35:  # another side: bottom, left or right
        shape = rotated(shape, rng.choice([np.pi / 2, np.pi, -np.pi / 2]), np.zeros(2))
    return Wound(np.clip(shape, -1.03, 1.03), "rough", _strength(rng))


def _crater(rng: np.random.Generator, radius: float) -> Wound:
    """A ragged pit in the face."""
    count = 48
    a = np.linspace(0, 2 * np.pi, count, endpoint=False)
    r = radius * np.clip(1 + _wiggle(rng, count, 0.34) + rng.normal(0, 0.02, count), 0.35, 1.8)
    shape = np.stack([r * np.cos(a), r * np.sin(a) * rng.uniform(0.2, 1)], 1)
    centre = rng.uniform(-0.65, 0.65, 2)
    shape = rotated(shape, rng.uniform(0, np.pi), np.zeros(2)) + centre
    return Wound(shape, "rough", _strength(rng))


def _wiggle(rng: np.random.Generator, count: int, amplitude: float) -> NDArray[np.float64]:
    """(count,) periodic ragged curve about 0."""
    knots = rng.normal(0, amplitude, 9)
    at = np.linspace(0, 9, count, endpoint=False)
    coarse = np.interp(at, np.arange(10), np.append(knots, knots[0]))
    return np.asarray(coarse + rng.normal(0, amplitude / 5, count))


def misplace(scene: Scene, rng: np.random.Generator) -> Scene:
    """The part is absent, shifted, rotated, upside down, sideways or lies on its round side."""
    if rng.random() < 0.18:
        return replace(scene, part=None)
    part = _part(scene)
    before = _silhouette(scene, CHECK_SIZE)
    while True:
        angle, shift = _pose_error(rng)
        moved = _moved(part, angle, shift)
        moved = replace(moved, flat_side_up=bool(abs(angle) > 0.3 and rng.random() < 0.3))
        after = _silhouette(replace(scene, part=moved), CHECK_SIZE)
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


_DEFECT_MAKERS: dict[str, Callable[[Scene, np.random.Generator], Scene]] = {
    "bent_lead": bend_lead,
    "cut_lead": cut_lead,
    "damaged_case": damage_case,
    "misplaced": misplace,
}


# ---------------------------------------------------------------- masks


def _silhouette(scene: Scene, size: int) -> Floats:
    """Coverage of the case and leads; all zero on an empty board."""
    if scene.part is None:
        return np.zeros((size, size), np.float32)
    metal = [p for lead in scene.part.leads for p in lead_shape(lead)]
    return coverage([case_shape(scene.part, scene.seed), *metal], size)


def _changed_leads(good: Scene, scene: Scene) -> list[tuple[int, Lead, Lead, int]]:
    """Index, good lead, defective lead and first differing point of each lead that changed."""
    found = []
    for i, (old, new) in enumerate(zip(_part(good).leads, _part(scene).leads, strict=True)):
        if old is not new:
            n = min(len(old.path), len(new.path))
            same = np.all(old.path[:n] == new.path[:n], axis=1)
            found.append((i, old, new, n if same.all() else int(same.argmin())))
    return found


def _place_of(lead: Lead, first: int, hole: Points, board: Board) -> list[Points]:
    """Teardrop from point ``first`` of a good lead down to and including its hole."""
    rest = lead.path[max(first - 1, 0) :]
    wide = np.linspace(1.1 * lead.half_width, 1.05 * board.hole_radius, len(rest))
    return [*ribbon(rest, wide), disc(hole, 1.08 * board.hole_radius)]


def _mask_bent(good: Scene, scene: Scene, size: int) -> Floats:
    part, board = _part(scene), scene.board
    shapes = []
    for i, old, new, first in _changed_leads(good, scene):
        shapes += lead_shape(new)[max(first - 1, 0) :]
        hole = board.hole(i - 1)
        at_hole = np.linalg.norm(old.path[first] - hole) < 1.8 * board.hole_radius
        if not at_hole:  # else the lead is where it should be, but for its tip
            shapes += _place_of(old, first, hole, board)
    return coverage(shapes, size) * (1 - case_coverage(part, scene.seed, size))


def _mask_cut(good: Scene, scene: Scene, size: int) -> Floats:
    part, board = _part(scene), scene.board
    missing = []
    for i, old, _, first in _changed_leads(good, scene):
        missing += _place_of(old, first, board.hole(i - 1), board)
    metal = coverage([p for lead in part.leads for p in lead_shape(lead)], size)
    free = (metal == 0) & (case_coverage(part, scene.seed, size) == 0)
    return np.asarray(coverage(missing, size) * free, np.float32)


def _mask_damage(good: Scene, scene: Scene, size: int) -> Floats:
    part = _part(scene)
    wounds = coverage([part.to_image(w.outline) for w in part.wounds], size)
    return np.minimum(wounds, coverage([case_shape(_part(good), scene.seed)], size))


def _mask_misplaced(good: Scene, scene: Scene, size: int) -> Floats:
    belongs = coverage([good.board.to_image(shape) for shape in _template()], size)
    return np.maximum(belongs, _silhouette(scene, size))


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


_MASKERS: dict[str, Callable[[Scene, Scene, int], Floats]] = {
    "bent_lead": _mask_bent,
    "cut_lead": _mask_cut,
    "damaged_case": _mask_damage,
    "misplaced": _mask_misplaced,
}


# ---------------------------------------------------------------- data set


def _nothing() -> None:
    """Default progress callback."""


def render_dataset(
    out: Path,
    *,
    train_good: int,
    test_good: int,
    per_defect: int,
    size: int,
    seed: int,
    on_image: Callable[[], None] = _nothing,
) -> None:
    """Writes a data set in MVTec layout to ``out``, which must not exist yet.

    Each image depends on the seed, its folder and its number alone, so a larger set begins with
    the images of a smaller one. ``on_image`` is called once for every image written. The folder
    appears under its name only when it is complete.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(out)
    counts = {"train/good": train_good, "test/good": test_good}
    counts |= {f"test/{defect}": per_defect for defect in DEFECTS}
    out.parent.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for folder in counts:
            (root / folder).mkdir(parents=True)
        for defect in DEFECTS:
            (root / "ground_truth" / defect).mkdir(parents=True)
        jobs = [(root, f, i, size, seed) for f, n in counts.items() for i in range(n)]
        if len(jobs) < POOL_FROM:
            for job in jobs:
                _write(*job)
                on_image()
        else:
            _write_in_processes(jobs, on_image)
        root.chmod(0o755)  # mkdtemp makes it private
        root.rename(out)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise


def _write_in_processes(jobs: list[_Job], on_image: Callable[[], None]) -> None:
    """Runs `_write` for every job on all cores. Interrupted, it stops at once."""
    others = set(active_children())
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), cv2.setNumThreads, (1,)) as pool:
        try:
            with _interrupts_ignored():  # processes inherit that: only this one answers Ctrl-C
                done = pool.map(_write, *zip(*jobs, strict=True), chunksize=8)
            for _ in done:
                on_image()
        except BaseException:  # or the pool would render all that is left
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - others:
                process.terminate()
            raise


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if current_thread() is not main_thread():  # which alone may change what signals do
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write(root: Path, folder: str, index: int, size: int, seed: int) -> None:
    """Renders one image of the set and writes it, with its mask if it shows a defect."""
    kind = folder.split("/")[1]
    rng = np.random.default_rng([seed, zlib.crc32(folder.encode()), index])
    image, mask = render(kind, size, rng)
    _save(root / folder / f"{index:03d}.png", image)
    if kind != "good":
        truth = root / "ground_truth" / kind / f"{index:03d}_mask.png"
        _save(truth, mask.astype(np.uint8) * np.uint8(255))


def _save(path: Path, image: NDArray[np.uint8]) -> None:
    if not cv2.imwrite(str(path), image):
        raise OSError(f"cannot write {path}")
