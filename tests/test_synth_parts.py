"""Rendered parts: masks of what is there and should not be, and of what should be and is not."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

from pipeline.data.synth.parts import DEFECTS, scenes
from pipeline.data.synth.parts.scene import Item, Scene, mask_of, paint

SIZE = 192


def _items(scene: Scene) -> set[int]:
    """The things of a scene: what is not replaced by a damage stays the same object."""
    return {id(item) for group in scene.groups for item in group.items}


def _changed(scene: Scene, other: Scene) -> list[Item]:
    """The things of ``scene`` that ``other`` does not have."""
    kept = _items(other)
    return [item for group in scene.groups for item in group.items if id(item) not in kept]


def _at(mask: np.ndarray, point: np.ndarray) -> bool:
    """Whether a point (2,) in image units, if it is in the picture, is in or beside the mask."""
    column, row = (point * SIZE).astype(int)
    if not (2 <= row < SIZE - 2 and 2 <= column < SIZE - 2):
        return True
    return bool(mask[row - 2 : row + 3, column - 2 : column + 3].any())


@pytest.mark.parametrize("kind", DEFECTS)
@pytest.mark.parametrize("seed", range(4))
def test_mask_marks_what_changed(kind: str, seed: int) -> None:
    good, scene = scenes(kind, np.random.default_rng(seed))
    mask = mask_of(good, scene, SIZE)
    change = np.abs(paint(scene, SIZE).astype(int) - paint(good, SIZE)).max(axis=2)
    assert change[mask].mean() > 3, "the defect cannot be seen"
    near = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    far_change = change[~near]
    assert far_change.mean() < 0.1 * change[mask].mean(), "something else changed too"
    assert (far_change > 40).mean() < 0.01  # the rest is its shadow


@pytest.mark.parametrize("seed", range(6))
def test_bent_mask_covers_where_it_is_and_where_it_should_be(seed: int) -> None:
    good, scene = scenes("bent", np.random.default_rng(seed))
    mask = mask_of(good, scene, SIZE)
    olds, news = _changed(good, scene), _changed(scene, good)
    assert len(olds) == len(news) > 0
    above = np.ones((SIZE, SIZE), np.float32)
    for group in good.groups[scene.damages[0].layer + 1 :]:
        above *= 1 - group.cover(SIZE)
    free = above > 0.5  # what lies under something else is not marked
    for old, new in zip(olds, news, strict=True):
        assert old.spine is not None and new.spine is not None
        off = np.linalg.norm(old.spine - new.spine, axis=1)
        for spine in (old.spine, new.spine):
            most = spine[off.argmax()]
            column, row = np.clip((most * SIZE).astype(int), 0, SIZE - 1)
            assert _at(mask, most) or not free[row, column]


@pytest.mark.parametrize("seed", range(6))
def test_missing_piece_mask_is_where_the_material_was(seed: int) -> None:
    good, scene = scenes("missing_piece", np.random.default_rng(seed))
    mask = mask_of(good, scene, SIZE)
    gone = np.zeros((SIZE, SIZE), bool)
    for before, after in zip(good.groups, scene.groups, strict=True):
        gone |= before.cover(SIZE) - after.cover(SIZE) > 0.5
    for group in good.groups[max(d.layer for d in scene.damages) + 1 :]:
        gone &= group.cover(SIZE) < 0.5
    assert gone.any()
    assert (gone & mask).sum() > 0.9 * gone.sum()


@pytest.mark.parametrize("seed", range(5))
def test_chip_mask_stays_within_the_outline_before_the_damage(seed: int) -> None:
    good, scene = scenes("chip", np.random.default_rng(seed))
    mask = mask_of(good, scene, SIZE)
    before = sum(group.cover(SIZE) for group in good.groups)
    assert (before[mask] >= 0.5).all()


def test_no_two_good_pictures_look_alike() -> None:
    small = []
    for seed in range(24):
        image = paint(scenes("good", np.random.default_rng(seed))[0], 64)
        small.append(cv2.resize(image, (12, 12), interpolation=cv2.INTER_AREA).astype(float))
    distances = [np.abs(a - b).mean() for a, b in itertools.combinations(small, 2)]
    assert min(distances) > 5 and np.median(distances) > 35


def test_some_pictures_show_several_defects() -> None:
    counts = [len(scenes("stain", np.random.default_rng(seed))[1].damages) for seed in range(14)]
    assert {1, 2} <= set(counts)
    assert 1 < np.mean(counts) < 2
