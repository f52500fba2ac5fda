"""Masks, boxes and labels, against pycocotools' run lengths, scipy's components and plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rectangles import filled
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


@pytest.mark.parametrize(
    ("rle", "holds"),
    [
        ({"size": [3, 2], "counts": "123"}, True),
        ({"size": [3, 2], "counts": "6"}, True),  # an empty mask
        ({"size": [3, 2], "counts": "06"}, True),  # a full one
        ({"size": [2, 3], "counts": "123"}, False),
        ({"size": [3, 2], "counts": "12"}, False),  # three of six pixels
        ({"size": [3, 2], "counts": ""}, False),
        ({"size": [3, 2], "counts": "1239"}, False),  # more than there are
        ({"size": [3, 2], "counts": "zz"}, False),
        ({"size": [3, 2], "counts": "é"}, False),
        ({"size": [3, 2], "counts": [1, 2, 3]}, False),
        ({"size": [3, 2]}, False),
        ({"size": 3, "counts": "123"}, False),
        ([[0, 0, 1, 0, 1, 1]], False),  # a polygon
        (None, False),
    ],
)
def test_is_rle(rle: object, holds: bool) -> None:
    assert masks.is_rle(rle, (3, 2)) is holds


@given(ANY_MASK)
def test_our_own_run_lengths_are_some(mask: np.ndarray) -> None:
    assert masks.is_rle(masks.encode_rle(mask), mask.shape)
    assert not masks.is_rle(masks.encode_rle(mask), (mask.shape[0] + 1, mask.shape[1]))


def test_fitted_boxes_by_hand() -> None:
    """Of a mask in the box, of half a box, of less than half, and of nothing."""
    boxes = np.array([(2.3, 2.6, 9.8, 9.9), (0, 0, 10, 10), (0, 0, 10, 10), (1, 1, 4, 4)])
    inside = [(3, 3, 9, 10), (0, 0, 5, 10), (0, 0, 5, 9), None]
    drawn = [np.zeros((12, 12), bool) if box is None else filled(box, 12, 12) for box in inside]
    fitted = masks.fitted_boxes(np.stack(drawn), boxes)
    expected = [(3, 3, 9, 10), (0, 0, 5, 10), (0, 0, 10, 10), (1, 1, 4, 4)]
    np.testing.assert_array_equal(fitted, np.array(expected, np.float32))


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


def parts_of(mask: np.ndarray, structure: np.ndarray | None) -> list[np.ndarray]:
    labels, count = ndimage.label(mask, structure)
    return [labels == label for label in range(1, count + 1)]


def holes_of(mask: np.ndarray) -> list[np.ndarray]:
    return parts_of(ndimage.binary_fill_holes(mask) & ~mask, None)


@given(ANY_MASK, st.integers(0, 30))
def test_clean_leaves_no_small_island_or_hole_and_all_else(mask: np.ndarray, below: int) -> None:
    before, cleaned = mask.copy(), masks.clean(mask, below)
    assert np.array_equal(mask, before) and cleaned.dtype == bool
    islands = parts_of(cleaned, EIGHT)
    assert len(islands) == 1 or all(island.sum() >= below for island in islands)
    assert all(hole.sum() >= below for hole in holes_of(cleaned))
    for island in parts_of(mask, EIGHT):  # goes as a whole, or stays as a whole
        assert cleaned[island].all() or (island.sum() < below and not (cleaned & island).all())
    for hole in parts_of(cleaned & ~mask, None):
        assert hole.sum() < below
        assert ndimage.binary_fill_holes(mask)[hole].all()
    assert mask.any() == cleaned.any()
    assert np.array_equal(masks.clean(cleaned, below), cleaned)


@given(MASK)
def test_clean_keeps_the_largest_island(mask: np.ndarray) -> None:
    largest = max(int(island.sum()) for island in parts_of(mask, EIGHT))
    (kept,) = parts_of(masks.clean(mask, mask.size + 1) & mask, EIGHT)[:1]
    assert kept.sum() == largest


@pytest.mark.parametrize("below", [0, 1])
@given(mask=ANY_MASK)
def test_clean_of_nothing_small(mask: np.ndarray, below: int) -> None:
    assert np.array_equal(masks.clean(mask, below), mask)


@pytest.mark.parametrize(
    ("rows", "below", "expected"),
    [
        (["##..#", "##..."], 2, ["##...", "##..."]),
        (["##..#", "##...", "...##"], 2, ["##...", "##...", "...##"]),
        (["##...", "..#..", "...#."], 4, ["##...", "..#..", "...#."]),  # 8-connected: one island
        (["#....", "....."], 9, ["#....", "....."]),  # the only one stays
        (["###", "#.#", "###"], 2, ["###", "###", "###"]),
        (["###", "#.#", "###"], 1, ["###", "#.#", "###"]),
        (["##.", "#.#", "###"], 2, ["##.", "###", "###"]),  # background is 4-connected
        (["#.#", "#.#", "###"], 9, ["#.#", "#.#", "###"]),  # open at the border: no hole
        (["#####", "#...#", "#.#.#", "#...#", "#####"], 9, ["#####", "#...#", "#...#", "#...#",
         "#####"]),
        (["#####", "#...#", "#.#.#", "#...#", "#####"], 10, ["#####"] * 5),
    ],
)  # fmt: skip
def test_clean_by_hand(rows: list[str], below: int, expected: list[str]) -> None:
    cleaned = masks.clean(ascii_mask(*rows), below)
    assert np.array_equal(cleaned, ascii_mask(*expected))


@given(st.data())
def test_resolve_overlaps(data: st.DataObject) -> None:
    """Each pixel, by a plain loop: to the highest score of its class, of equal ones the first."""
    count = data.draw(st.integers(0, 5))
    shape = (count, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
    instances = data.draw(arrays.arrays(bool, shape))
    classes = data.draw(arrays.arrays(np.int64, count, elements=st.integers(0, 2)))
    scores = data.draw(
        arrays.arrays(np.float32, count, elements=st.sampled_from([0.25, 0.5, 0.75]))
    )
    before, resolved = instances.copy(), masks.resolve_overlaps(instances, classes, scores)
    assert np.array_equal(instances, before)
    expected = np.zeros_like(instances)
    for class_id in set(classes.tolist()):
        rows = np.flatnonzero(classes == class_id).tolist()
        assert resolved[rows].sum(axis=0).max() <= 1, "not disjoint"
        assert np.array_equal(resolved[rows].any(axis=0), instances[rows].any(axis=0)), "union"
        for y, x in np.ndindex(*shape[1:]):
            claims = [i for i in rows if instances[i, y, x]]
            if claims:
                expected[max(claims, key=lambda i: (scores[i], -i)), y, x] = True
    assert np.array_equal(resolved, expected)


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


FULL = np.ones((3, 8), bool)
LEFT = filled((0, 0, 4, 3), 3, 8)
BLOCK = filled((1, 1, 10, 10), 11, 11)
HOLED = BLOCK & ~filled((5, 5, 6, 6), 11, 11)


@pytest.mark.parametrize(
    ("a", "b", "tolerance", "expected"),
    [
        (BLOCK, np.zeros_like(BLOCK), 9, 0),
        (np.zeros_like(BLOCK), np.zeros_like(BLOCK), 9, 0),
        (ascii_mask("#...."), ascii_mask("...#."), 2, 0),  # 3 apart
        (ascii_mask("#...."), ascii_mask("...#."), 3, 1),
        (ascii_mask("#..", "...", "..#"), ascii_mask("...", ".#.", "..."), 1, 0),  # root 2 apart
        (ascii_mask("#..", "...", "..#"), ascii_mask("...", ".#.", "..."), 1.5, 1),
        # the hole's 4 boundary pixels are 3 from the outline, whose 32 pixels are in both
        (BLOCK, HOLED, 2, 2 * (32 / 36) / (1 + 32 / 36)),
        (BLOCK, HOLED, 3, 1),
        # the image's border is a boundary: of 18 pixels, 9 are in both and 2 are beside one;
        # the other mask's tenth pixel is beside one too
        (FULL, LEFT, 0, 2 * (9 / 18) * (9 / 10) / (9 / 18 + 9 / 10)),
        (FULL, LEFT, 1, 2 * (11 / 18) / (1 + 11 / 18)),
    ],
)
def test_boundary_f1_by_hand(
    a: np.ndarray, b: np.ndarray, tolerance: float, expected: float
) -> None:
    assert masks.boundary_f1(a, b, tolerance) == pytest.approx(expected)


@given(st.data(), st.integers(0, 4))
def test_boundary_f1_is_that_of_scipys_erosion_and_distance(
    data: st.DataObject, tolerance: int
) -> None:
    a = data.draw(MASK)
    b = data.draw(arrays.arrays(bool, a.shape).filter(np.any))
    edge_a, edge_b = (mask & ~ndimage.binary_erosion(mask) for mask in (a, b))
    near_a = ndimage.distance_transform_edt(~edge_a) <= tolerance
    near_b = ndimage.distance_transform_edt(~edge_b) <= tolerance
    precision, recall = near_b[edge_a].mean(), near_a[edge_b].mean()
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert masks.boundary_f1(a, b, tolerance) == pytest.approx(expected)
    assert masks.boundary_f1(b, a, tolerance) == pytest.approx(expected)
    assert masks.boundary_f1(a, b, tolerance + 1) >= expected - 1e-12
    assert masks.boundary_f1(a, a, tolerance) == 1


def test_boundary_f1_forgives_a_shift_within_the_tolerance() -> None:
    """And no more: of a large square only the sides along the shift still match."""
    square = filled((20, 20, 60, 60), 90, 90)
    assert masks.boundary_f1(square, filled((22, 20, 62, 60), 90, 90)) == 1
    far = masks.boundary_f1(square, filled((23, 20, 63, 60), 90, 90))
    assert 0.4 < far < 0.6
