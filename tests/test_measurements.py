"""Sizes and angles of shapes that are known by hand, by formula or by trying every angle."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.data.masks import box_of
from pipeline.data.measurements import Measurement, in_millimetres, measure

MASK = arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=12)).filter(np.any)


def ascii_mask(*rows: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in rows])


def sides(mask: np.ndarray) -> tuple[float, float, float]:
    found = measure(mask)
    return found.length, found.width, found.orientation


def corners(mask: np.ndarray) -> np.ndarray:
    """(4 n, 2) x, y of the corners of all pixels."""
    y, x = np.nonzero(mask)
    return (
        np.array([(x + i, y + j) for i in (0, 1) for j in (0, 1)]).transpose(0, 2, 1).reshape(-1, 2)
    )


def extents(points: np.ndarray, degrees: float) -> tuple[float, float]:
    """How far points reach along a direction, counter-clockwise as seen, and across it."""
    angle = math.radians(degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    x, up = points[:, 0], -points[:, 1]
    return float(np.ptp(x * cosine + up * sine)), float(np.ptp(up * cosine - x * sine))


def painted(
    size: int, centre: tuple[float, float], degrees: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of every pixel's centre, how far it is from `centre` along a direction and across it."""
    y, x = np.mgrid[:size, :size] + 0.5
    x, up = x - centre[0], centre[1] - y
    angle = math.radians(degrees)
    return x * math.cos(angle) + up * math.sin(angle), up * math.cos(angle) - x * math.sin(angle)


def apart(a: float, b: float) -> float:
    """Degrees between two directions without a sense."""
    return abs((a - b + 90) % 180 - 90)


# By hand


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 8), (9, 2), (5, 5)])
def test_an_upright_rectangle_is_measured_exactly(shape: tuple[int, int]) -> None:
    height, width = shape
    mask = np.zeros((20, 30), bool)
    mask[4 : 4 + height, 11 : 11 + width] = True
    assert measure(mask) == Measurement(
        area=height * width,
        length=max(shape),
        width=min(shape),
        orientation=90 if height > width else 0,
        centroid_x=11 + width / 2,
        centroid_y=4 + height / 2,
        bbox_x=11,
        bbox_y=4,
        bbox_width=width,
        bbox_height=height,
    )


ROOT = math.sqrt(2)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["...#", "..#.", ".#..", "#..."], (4 * ROOT, ROOT, 45)),  # rises to the right
        (["#...", ".#..", "..#.", "...#"], (4 * ROOT, ROOT, 135)),
        ([".#.", "###", ".#."], (2 * ROOT, 2 * ROOT, 45)),  # equal sides: in [0, 90)
        (["#....", "#....", "#....", "#....", "#####"], (5, 5, 0)),  # an L
        (["#..", "#..", "#..", "#..", "###"], (5, 3, 90)),
        (["#.", ".#"], (2 * ROOT, ROOT, 135)),  # as large as the 2 x 2 box: the longer one
        (["#.......#"], (9, 1, 0)),  # two components
        (["###", "...", "...", "...", "###"], (5, 3, 90)),
        (["###", "#.#", "###"], (3, 3, 0)),  # a hole is no part of the area, nor of the centroid
    ],
)
def test_shapes_by_hand(rows: list[str], expected: tuple[float, float, float]) -> None:
    assert sides(ascii_mask(*rows)) == pytest.approx(expected, rel=1e-12)


def test_centroid_and_area_are_of_the_pixels_not_of_the_rectangle() -> None:
    found = measure(ascii_mask("#..", "...", "##."))
    assert (found.area, found.centroid_x, found.centroid_y) == (3, 0.5 + 1 / 3, 0.5 + 4 / 3)


def test_an_empty_mask_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        measure(np.zeros((3, 3), bool))


def test_millimetres() -> None:
    found = in_millimetres(measure(ascii_mask("....", ".###", ".###")), 0.5)
    assert found == {
        "area_mm2": 1.5, "length_mm": 1.5, "width_mm": 1, "centroid_x_mm": 1.25,
        "centroid_y_mm": 1, "bbox_x_mm": 0.5, "bbox_y_mm": 0.5, "bbox_width_mm": 1.5,
        "bbox_height_mm": 1,
    }  # fmt: skip


# Shapes drawn large: pixels whose centres lie inside


@pytest.mark.parametrize("degrees", [0, 1, 17.5, 30, 45, 60, 89, 90, 91, 120, 135, 150, 179])
def test_a_turned_rectangle(degrees: float) -> None:
    along, across = painted(400, (200.25, 190.75), degrees)
    found = measure((np.abs(along) <= 150) & (np.abs(across) <= 40))
    assert (found.length, found.width) == pytest.approx((300, 80), abs=1.5)
    assert apart(found.orientation, degrees) < 0.5
    assert 0 <= found.orientation < 180
    assert found.area == pytest.approx(300 * 80, rel=0.01)
    assert (found.centroid_x, found.centroid_y) == pytest.approx((200.25, 190.75), abs=0.3)


@pytest.mark.parametrize("degrees", [0, 25, 90, 110, 160])
def test_an_ellipse(degrees: float) -> None:
    along, across = painted(400, (200, 200), degrees)
    found = measure((along / 160) ** 2 + (across / 50) ** 2 <= 1)
    assert (found.length, found.width) == pytest.approx((320, 100), abs=2)
    assert apart(found.orientation, degrees) < 3  # it is tilted by the lattice of the pixels
    assert found.area == pytest.approx(math.pi * 160 * 50, rel=0.005)
    assert (found.centroid_x, found.centroid_y) == pytest.approx((200, 200), abs=0.1)


@pytest.mark.parametrize("radius", [20.5, 75, 150])
def test_a_disc(radius: float) -> None:
    along, across = painted(320, (160, 160), 0)
    found = measure(np.hypot(along, across) <= radius)
    assert (found.length, found.width) == pytest.approx((2 * radius, 2 * radius), abs=2)
    assert found.area == pytest.approx(math.pi * radius**2, rel=0.02)
    assert (found.centroid_x, found.centroid_y) == pytest.approx((160, 160))


# Any mask


@given(MASK)
def test_the_rectangle_holds_all_pixels_and_none_is_smaller(mask: np.ndarray) -> None:
    found, points = measure(mask), corners(mask)
    assert extents(points, found.orientation) == pytest.approx((found.length, found.width))
    assert found.length >= found.width and 0 <= found.orientation < 180
    for degrees in np.linspace(0, 90, 181):
        assert math.prod(extents(points, degrees)) >= found.length * found.width * (1 - 1e-9)


@given(MASK, st.integers(0, 5), st.integers(0, 5), st.integers(0, 2), st.integers(0, 2))
def test_moving_a_mask_moves_its_place_alone(
    mask: np.ndarray, dx: int, dy: int, right: int, below: int
) -> None:
    still, moved = measure(mask), measure(np.pad(mask, ((dy, below), (dx, right))))
    assert (moved.area, moved.length, moved.width, moved.orientation) == (
        still.area, still.length, still.width, still.orientation,
    )  # fmt: skip
    assert moved.centroid_x == pytest.approx(still.centroid_x + dx)
    assert moved.centroid_y == pytest.approx(still.centroid_y + dy)
    assert (moved.bbox_x, moved.bbox_y) == (still.bbox_x + dx, still.bbox_y + dy)


@given(MASK)
def test_a_quarter_turn_keeps_the_sides_and_turns_the_long_one(mask: np.ndarray) -> None:
    still, turned = measure(mask), measure(np.rot90(mask))
    assert (turned.area, turned.length, turned.width) == (still.area, still.length, still.width)
    assert turned.centroid_x == pytest.approx(still.centroid_y)
    assert turned.centroid_y == pytest.approx(mask.shape[1] - still.centroid_x)
    # A symmetric shape has several such rectangles; turned, any of them may be the first.
    back = extents(corners(mask), turned.orientation - 90)
    assert back == pytest.approx((still.length, still.width))


def test_np_rot90_turns_the_orientation_by_90_degrees() -> None:
    mask = ascii_mask("##....", ".####.", "....##")
    before, after = measure(mask).orientation, measure(np.rot90(mask)).orientation
    assert 90 < before < 180 and after == pytest.approx(before - 90)


@given(MASK, st.integers(2, 4))
def test_pixels_k_times_as_fine_give_k_times_the_lengths(mask: np.ndarray, k: int) -> None:
    coarse, fine = measure(mask), measure(np.kron(mask, np.ones((k, k), bool)))
    assert fine.area == coarse.area * k * k
    assert fine.orientation == coarse.orientation
    assert in_millimetres(fine, 1 / k) == pytest.approx(in_millimetres(coarse, 1))


@given(MASK)
def test_the_box_is_that_of_the_mask(mask: np.ndarray) -> None:
    found = measure(mask)
    x, y = found.bbox_x, found.bbox_y
    assert (x, y, x + found.bbox_width, y + found.bbox_height) == box_of(mask)
