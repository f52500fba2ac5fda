"""Defects pasted on good images: what changes, and that the labels say exactly that."""

from __future__ import annotations

from collections import Counter

import cv2
import numpy as np
import pytest
from rectangles import filled

from pipeline.data.masks import box_of, components
from pipeline.data.paste import MARGIN, Cutting, cut, paste

SIDE = 160
MARKER = np.array([40, 250, 40], np.uint8)  # BGR, of the defects; nothing else is as green
PART = (40, 20, 120, 140)  # x1, y1, x2, y2 of a dark part on a bright ground


def part(dx: int = 0, dy: int = 0, seed: int = 0) -> np.ndarray:
    """(160, 160, 3): a good part with two holes, moved."""
    image = np.random.default_rng(seed).normal(180, 3, (SIDE, SIDE, 3))
    x1, y1, x2, y2 = PART
    image[y1 + dy : y2 + dy, x1 + dx : x2 + dx] -= 120
    for y in (50, 110):
        cv2.circle(image, (80 + dx, y + dy), 8, (200, 120, 120), -1)
    return np.clip(image, 0, 255).astype(np.uint8)


def marked(*boxes: tuple[int, int, int, int], dx: int = 0, dy: int = 0) -> list[Cutting]:
    """The cuttings of a part with rectangles of the marker's colour, of class 0, 1, ..."""
    masks = np.stack([filled(box, SIDE, SIDE) for box in boxes])
    image = part(dx, dy, seed=1)
    image[masks.any(axis=0)] = MARKER
    return cut(image, masks, np.arange(len(boxes)))


def is_marker(image: np.ndarray, tolerance: int = 60) -> np.ndarray:
    return np.asarray(np.abs(image.astype(int) - MARKER).max(axis=2) < tolerance)


FAR_APART = ((48, 70, 60, 80), (100, 90, 112, 104))
CLOSE = ((60, 70, 70, 80), (74, 70, 84, 80))
AT_BORDER = ((120, 60, 160, 90),)


@pytest.mark.parametrize("free_pose", [False, True])
@pytest.mark.parametrize("boxes", [FAR_APART, CLOSE, AT_BORDER], ids=["apart", "close", "border"])
def test_labels_are_what_is_seen(
    boxes: tuple[tuple[int, int, int, int], ...], free_pose: bool
) -> None:
    cuttings, pasted = marked(*boxes), 0
    for seed in range(25):
        image, found = paste(part(), cuttings, np.random.default_rng(seed), free_pose=free_pose)
        if not len(found):
            continue
        assert found.mask is not None and found.class_id is not None
        seen, labelled = is_marker(image), found.mask.any(axis=0)
        ring = cv2.dilate(labelled.astype(np.uint8), np.ones((3, 3))) > 0
        inside = cv2.erode(labelled.astype(np.uint8), np.ones((3, 3)), borderValue=1) > 0
        assert seen[inside].all() and not seen[~ring].any()
        for box, mask in zip(found.xyxy, found.mask, strict=True):
            assert tuple(box) == box_of(mask)
        pasted += len(found)
    if free_pose and boxes == AT_BORDER:
        assert pasted == 0, "where it goes on beyond the border, nobody knows"
    else:
        assert pasted >= 20


def test_nothing_else_changes() -> None:
    """Beyond the margin and its soft edge, every pixel is the good image's own."""
    good, cuttings = part(), marked(*FAR_APART)
    for seed in range(20):
        before = good.copy()
        image, found = paste(good, cuttings, np.random.default_rng(seed))
        assert np.array_equal(good, before), "the image that was given stays as it is"
        changed = (image != good).any(axis=2)
        assert found.mask is not None
        away = cv2.distanceTransform(
            (~found.mask.any(axis=0)).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
        )
        assert changed.any() and away[changed].max() < (0.055 + 0.01) * SIDE + 1


def test_surrounding_is_laid_on_the_same_things() -> None:
    """The part lies elsewhere than where it was cut: the defect moves along with it."""
    cuttings = marked((96, 126, 110, 136))  # in a corner of the part
    for dx, dy in ((8, 0), (-6, 7), (0, -9)):
        good = part(dx, dy)
        for seed in range(8):
            _, found = paste(good, cuttings, np.random.default_rng(seed))
            x1, y1, x2, y2 = found.xyxy[0]
            x = (x1 + x2) / 2 - 80 - dx
            assert abs(abs(x) - 23) < 4, "in the corner, or in the one that mirrors it"
            assert abs((y1 + y2) / 2 - 131 - dy) < 4


def test_light_follows_the_good_image() -> None:
    mask = filled((74, 76, 86, 88), SIDE, SIDE)
    bright, dark = part(seed=1), (part() * 0.8).astype(np.uint8)
    cuttings = cut(bright, mask[None], np.array([0]))
    image, found = paste(dark, cuttings, np.random.default_rng(3))
    assert len(found) == 1 and found.mask is not None
    level = {name: float(i[found.mask[0]].mean()) for name, i in (("new", image), ("old", dark))}
    assert abs(level["new"] - level["old"]) < 4 < abs(bright[mask].mean() - level["old"])


def test_pasted_defects_never_overlap() -> None:
    cuttings = marked(*FAR_APART) + marked((70, 60, 90, 85))
    counts: Counter[int] = Counter()
    for seed in range(150):
        _, found = paste(part(), cuttings, np.random.default_rng(seed))
        assert found.mask is not None
        assert found.mask.sum(axis=0).max() == 1
        counts[len(found)] += 1
    assert counts[1] > 60 and counts[2] > 5


def test_defects_close_together_are_one_cutting() -> None:
    """Or the margin of one would show the other one without a label."""
    assert [c.classes.tolist() for c in marked(*FAR_APART)] == [[0], [1]]
    [both] = marked(*CLOSE)
    assert sorted(both.classes.tolist()) == [0, 1]
    assert (both.alpha[both.masks.any(axis=0)] == 255).all()
    _, found = paste(part(), [both], np.random.default_rng(0))
    assert found.class_id is not None and found.mask is not None
    assert sorted(found.class_id.tolist()) == [0, 1]
    assert all(len(components(mask)[0]) == 1 for mask in found.mask)


def test_margin_is_opaque() -> None:
    [cutting] = marked((70, 70, 90, 90))
    wide = cv2.dilate(
        cutting.masks[0].astype(np.uint8), np.ones((3, 3)), iterations=int(MARGIN * SIDE / 1.5)
    )
    assert (cutting.alpha[wide > 0] == 255).all()
    assert np.count_nonzero((cutting.alpha > 0) & (cutting.alpha < 255)) > 0


def test_defect_at_the_border_stays_there() -> None:
    """Never cut off elsewhere, never floating free; mirrored, it is at the other border."""
    sides = set()
    for seed in range(30):
        _, found = paste(part(), marked(*AT_BORDER), np.random.default_rng(seed))
        for x1, y1, x2, y2 in found.xyxy:
            assert (x1 == 0) != (x2 == SIDE)
            assert 0 < y1 < y2 < SIDE
            sides.add("left" if x1 == 0 else "right")
    assert sides == {"left", "right"}


def test_every_class_is_as_likely() -> None:
    rare, frequent = marked(FAR_APART[0]), marked(*FAR_APART)[1:] * 9
    counts: Counter[int] = Counter()
    for seed in range(120):
        _, found = paste(part(), rare + frequent, np.random.default_rng(seed))
        assert found.class_id is not None
        counts[int(found.class_id[0])] += 1
    assert 40 < counts[0] < 80


def test_generator_alone_decides() -> None:
    cuttings = marked(*FAR_APART)
    images = [paste(part(), cuttings, np.random.default_rng(s))[0] for s in (0, 0, 1)]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


@pytest.mark.parametrize("shape", [(SIDE, SIDE, 3), (90, 200, 3)])
def test_without_anything_that_fits_the_image_stays(shape: tuple[int, int, int]) -> None:
    good = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    cuttings = [] if shape[0] == SIDE else marked(*FAR_APART)  # of images of another size
    image, found = paste(good, cuttings, np.random.default_rng(0))
    assert np.array_equal(image, good) and len(found) == 0
    assert image is not good


def test_unlike_surroundings_take_no_defect() -> None:
    """A picture of something else: no defect belongs there."""
    upside_down = 255 - part()
    for seed in range(10):
        image, found = paste(upside_down, marked((96, 126, 110, 136)), np.random.default_rng(seed))
        assert len(found) == 0 and np.array_equal(image, upside_down)


def test_empty_masks_are_left_out() -> None:
    masks = np.stack([np.zeros((SIDE, SIDE), bool), filled(FAR_APART[0], SIDE, SIDE)])
    assert [c.classes.tolist() for c in cut(part(), masks, np.array([0, 1]))] == [[1]]
