"""Masks, boxes and labels, against pycocotools' run lengths, scipy's components and plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from pipeline.data import masks
from pipeline.data.coco import yolo_label

ANY_MASK = arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=14))
MASK = ANY_MASK.filter(np.any)
EIGHT = np.ones((3, 3))


def pixel_box(label: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """The inverse of `yolo_label`, rounded to whole pixels."""
    x, y, w, h = label
    x1, y1 = round((x - w / 2) * width), round((y - h / 2) * height)
    return x1, y1, x1 + round(w * width), y1 + round(h * height)


def ascii_mask(*rows: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in rows])


@given(ANY_MASK)
def test_rle_round_trip(mask: np.ndarray) -> None:
    rle = masks.encode_rle(mask)
    assert isinstance(rle["counts"], str) and rle["size"] == list(mask.shape)
    back = masks.decode_rle(rle)
    assert back.dtype == bool and np.array_equal(back, mask)


def test_rle_is_column_major_as_coco_has_it() -> None:
    # uncompressed runs, from the top of the first column: 1 off, 2 on, 3 off
    rle = masks.encode_rle(ascii_mask("..", "#.", "#."))
    assert rle == {"size": [3, 2], "counts": "123"}  # each small run is one character, '0' + run


@given(MASK)
def test_box_is_exact(mask: np.ndarray) -> None:
    x1, y1, x2, y2 = masks.box_of(mask)
    assert 0 <= x1 < x2 <= mask.shape[1] and 0 <= y1 < y2 <= mask.shape[0]
    inside = np.zeros_like(mask)
    inside[y1:y2, x1:x2] = True
    assert not mask[~inside].any(), "a pixel lies outside"
    assert mask[y1].any() and mask[y2 - 1].any(), "a row is empty"
    assert mask[:, x1].any() and mask[:, x2 - 1].any(), "a column is empty"


def test_box_of_one_pixel_and_of_nothing() -> None:
    assert masks.box_of(ascii_mask("...", "..#")) == (2, 1, 3, 2)
    with pytest.raises(ValueError, match="empty"):
        masks.box_of(np.zeros((3, 3), bool))


@given(ANY_MASK, st.integers(0, 30))
def test_components_partition_the_mask(mask: np.ndarray, min_area: int) -> None:
    parts, joined = masks.components(mask, min_area)
    assert np.array_equal(
        sum((part.astype(int) for part in parts), np.zeros(mask.shape, int)), mask
    )
    assert len(parts) + joined == ndimage.label(mask, EIGHT)[1]
    assert all(part.sum() >= min_area for part in parts) or len(parts) == 1


@given(ANY_MASK)
def test_components_are_scipys(mask: np.ndarray) -> None:
    parts, joined = masks.components(mask)
    labels, count = ndimage.label(mask, EIGHT)
    assert joined == 0
    ours = {part.tobytes() for part in parts}
    assert ours == {(labels == label).tobytes() for label in range(1, count + 1)}


@given(ANY_MASK)
def test_components_come_in_reading_order(mask: np.ndarray) -> None:
    corners = [masks.box_of(part)[1::-1] for part in masks.components(mask)[0]]
    assert corners == sorted(corners)


@pytest.mark.parametrize(
    ("rows", "min_area", "areas", "joined"),
    [
        (["......"], 5, [], 0),
        (["#....."], 5, [1], 0),  # alone: kept though small
        (["##.#..", "##...."], 2, [5], 1),
        (["##...##", "##.#.##", "##...##"], 2, [7, 6], 1),  # a tie goes to one of them, whole
        (["###.#..###", "###....###"], 2, [7, 6], 1),  # the nearer one
        (["#.#.#.#"], 9, [4], 3),  # all small: they end as one
        (["#.#....##"], 2, [2, 2], 1),  # two specks that join are big enough for themselves
        (["#..", ".#.", "..#"], 0, [3], 0),  # diagonal neighbours are connected
        (["###", "#.#", "###"], 0, [8], 0),  # a hole stays one
        (["#####", "#...#", "#.#.#", "#...#", "#####"], 2, [17], 1),  # an island in a hole
        (["#####", "#...#", "#.#.#", "#...#", "#####"], 0, [16, 1], 0),
    ],
)
def test_components_by_hand(rows: list[str], min_area: int, areas: list[int], joined: int) -> None:
    parts, found = masks.components(ascii_mask(*rows), min_area)
    assert [int(part.sum()) for part in parts] == areas
    assert found == joined


@given(st.data())
def test_box_and_yolo_label_round_trip(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, 20_000)), data.draw(st.integers(1, 20_000))
    x1 = data.draw(st.integers(0, width - 1))
    y1 = data.draw(st.integers(0, height - 1))
    box = (x1, y1, data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height)))
    label = yolo_label(box, width, height)
    assert all(0 <= value <= 1 for value in label)
    assert pixel_box(label, width, height) == box
    written = [float(f"{value:.9f}") for value in label]  # as in a label file
    assert pixel_box(written, width, height) == box


def test_yolo_label_by_hand() -> None:
    assert yolo_label((10, 20, 30, 60), 100, 200) == (0.2, 0.2, 0.2, 0.2)
    assert yolo_label((0, 0, 1, 1), 4, 2) == (0.125, 0.25, 0.25, 0.5)


@given(st.data())
def test_iou_and_dice(data: st.DataObject) -> None:
    a = data.draw(ANY_MASK)
    b = data.draw(arrays.arrays(bool, a.shape))
    both = either = 0
    for p, q in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
        both += p and q
        either += p or q
    assert masks.iou(a, b) == pytest.approx(both / either if either else 0)
    assert masks.dice(a, b) == pytest.approx(2 * both / (both + either) if either else 0)
    assert masks.iou(a, b) == masks.iou(b, a) and masks.dice(a, b) == masks.dice(b, a)
