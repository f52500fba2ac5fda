"""Rendered leather: masks that mark what was drawn, from barely visible to obvious."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from pipeline.data.synth.leather import DEFECTS, mask_of, paint, scenes

SIZE = 192


def _difference(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey-level change the defect makes (SIZE, SIZE) and its mask."""
    good, scene = scenes(kind, np.random.default_rng(seed))
    before, after = paint(good, SIZE).astype(int), paint(scene, SIZE).astype(int)
    return np.abs(after - before).max(axis=2), mask_of(scene, SIZE)


@pytest.mark.parametrize("kind", DEFECTS)
@pytest.mark.parametrize("seed", range(3))
def test_mask_marks_what_changed(kind: str, seed: int) -> None:
    change, mask = _difference(kind, seed)
    assert change[mask].mean() > 3, "the defect cannot be seen"
    near = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    assert change[~near].mean() < 0.3, "something else changed too"
    assert (near & (change > 25)).sum() >= 0.9 * (change > 25).sum()


def test_contrast_varies_from_obvious_to_barely_visible() -> None:
    changes = []
    for seed in range(12):
        change, mask = _difference("color", seed)
        changes.append(change[mask].mean())
    assert min(changes) < 20 and max(changes) > 50


def test_places_and_directions_vary() -> None:
    centres = []
    for seed in range(12):
        scene = scenes("poke", np.random.default_rng(seed))[1]
        rows, columns = np.nonzero(mask_of(scene, SIZE))
        centres.append((rows.mean() / SIZE, columns.mean() / SIZE))
    assert (np.std(centres, axis=0) > 0.12).all()


@pytest.mark.parametrize("kind", DEFECTS)
def test_without_its_flaws_a_scene_is_the_good_one(kind: str) -> None:
    good, scene = scenes(kind, np.random.default_rng(2))
    assert scene.flaws
    assert np.array_equal(paint(replace(scene, flaws=()), 64), paint(good, 64))
