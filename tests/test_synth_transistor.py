"""The rendered transistor: masks that mark what was drawn, and MVTec's conventions."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pipeline.data.synth.draw import coverage, disc
from pipeline.data.synth.transistor import DEFECTS, mask_of, paint, scenes
from pipeline.data.synth.transistor.scene import Scene, case_coverage, lead_shape

SIZE = 160


def _difference(kind: str, seed: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Grey-level change the defect makes (size, size) and its mask."""
    good, scene = scenes(kind, np.random.default_rng(seed))
    before, after = paint(good, size).astype(int), paint(scene, size).astype(int)
    return np.abs(after - before).max(axis=2), mask_of(kind, good, scene, size)


@pytest.mark.parametrize("kind", ("bent_lead", "cut_lead", "damaged_case"))
@pytest.mark.parametrize("seed", range(8))
def test_mask_marks_what_changed(kind: str, seed: int) -> None:
    change, mask = _difference(kind, seed)
    assert change[mask].mean() > 12, "the defect can hardly be seen"
    near = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert change[~near].mean() < 0.2, "something else changed too"
    assert (change[~near] > 40).mean() < 0.001
    drawn = change > 20
    assert drawn.any()
    # The rest is its shadow; of a cut lead also half of its end, and the curve that is missing.
    assert (drawn & near).sum() > (0.8 if kind == "cut_lead" else 0.94) * drawn.sum()


@pytest.mark.parametrize("seed", range(6))
def test_misplaced_mask_covers_the_part_before_and_after(seed: int) -> None:
    change, mask = _difference("misplaced", seed)
    assert mask.mean() > 0.25
    strong = change > 60
    assert strong.mean() > 0.04, "the part has hardly moved"
    assert (strong & mask).sum() > 0.8 * strong.sum()


def test_misplaced_includes_an_absent_part() -> None:
    absent = [scenes("misplaced", np.random.default_rng(s))[1].part is None for s in range(40)]
    assert 0 < sum(absent) < 20


@pytest.mark.parametrize("seed", range(8))
def test_cut_lead_mask_reaches_from_the_cut_to_the_hole(seed: int) -> None:
    good, scene = scenes("cut_lead", np.random.default_rng(seed))
    mask = mask_of("cut_lead", good, scene, SIZE)
    assert scene.part is not None and good.part is not None
    cut = [i for i, lead in enumerate(scene.part.leads) if lead.face]
    assert cut
    for i, lead in enumerate(scene.part.leads):
        metal = coverage(lead_shape(lead), SIZE) > 0
        if i in cut:  # half of the sheared face is marked
            face = lead.face * 2 * lead.half_width * SIZE**2
            assert (mask & metal).sum() < 0.9 * face + 2 * lead.half_width * SIZE
            assert metal.sum() < 0.8 * (coverage(lead_shape(good.part.leads[i]), SIZE) > 0).sum()
            hole = coverage([disc(scene.board.hole(i - 1), scene.board.hole_radius)], SIZE)
            assert mask[hole > 0.5].mean() > 0.98
        else:
            assert not (mask & metal).any()


def test_defects_vary() -> None:
    def changed(seed: int) -> tuple[int, ...]:
        good, scene = scenes("bent_lead", np.random.default_rng(seed))
        assert good.part is not None and scene.part is not None
        pairs = zip(good.part.leads, scene.part.leads, strict=True)
        return tuple(i for i, (a, b) in enumerate(pairs) if a is not b)

    assert {(0,), (1,), (2,)} < {changed(seed) for seed in range(60)}  # and pairs of leads


def _case(scene: Scene) -> np.ndarray:
    """Where (SIZE, SIZE) the case is."""
    assert scene.part is not None
    return case_coverage(scene.part, scene.seed, SIZE) > 0.5


def test_damage_mask_reaches_to_where_the_edge_would_be() -> None:
    worn = 0
    for seed in range(30):
        good, scene = scenes("damaged_case", np.random.default_rng(seed))
        gone = _case(good) & ~_case(scene)
        mask = mask_of("damaged_case", good, scene, SIZE)
        assert (gone & mask).sum() >= 0.95 * gone.sum()
        assert (mask & _case(good)).sum() > 0.9 * mask.sum()
        worn += gone.sum() > 15
    assert 10 < worn < 30, "part of the outline is missing in most of them, not in all"


def test_damage_is_dull_grey_on_nearly_black() -> None:
    """As in MVTec's photographs: half of the damage is within 20 or so grey levels of the case."""
    levels = []
    for seed in range(20):
        good, scene = scenes("damaged_case", np.random.default_rng(seed))
        mask = mask_of("damaged_case", good, scene, SIZE) & _case(scene)
        levels.append(np.median(paint(scene, SIZE).max(axis=2)[mask]))
    assert 25 < np.median(levels) < 60
    assert max(levels) < 100


@pytest.mark.parametrize("kind", DEFECTS)
def test_good_and_defective_scene_are_the_same_elsewhere(kind: str) -> None:
    good, scene = scenes(kind, np.random.default_rng(1))
    assert scene.board == good.board and scene.look == good.look and scene.seed == good.seed
