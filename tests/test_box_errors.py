"""The kinds of errors of boxes, on cases whose IoUs are worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from detections import detections
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.box_errors import KINDS, box_errors
from pipeline.data.matching import match

A = (0, 0, 10, 10, 0)  # of class 0
B = (50, 0, 60, 10, 1)  # of class 1


@pytest.mark.parametrize(
    ("truth", "predicted", "wrong", "lost"),
    [
        ([], [], [], []),
        ([A], [], [], ["missed"]),
        ([], [(0, 0, 10, 10, 0, 0.9)], ["background"], []),
        ([A], [(0, 0, 10, 10, 0, 0.9)], [None], [None]),
        # half-open boxes: the parts 10x5, 10x4 and 10x1 of 10x10 have an IoU of 0.5, 0.4 and 0.1
        ([A], [(0, 0, 10, 5, 0, 0.9)], [None], [None]),
        ([A], [(0, 0, 10, 4, 0, 0.9)], ["bad box"], ["bad box"]),
        ([A], [(0, 0, 10, 1, 0, 0.9)], ["bad box"], ["bad box"]),
        ([A], [(0, 0, 9, 1, 0, 0.9)], ["background"], ["missed"]),
        ([A], [(0, 0, 10, 5, 1, 0.9)], ["wrong class"], ["wrong class"]),
        ([A], [(0, 0, 10, 4, 1, 0.9)], ["both"], ["missed"]),  # which covers no miss
        ([A], [(0, 0, 9, 1, 1, 0.9)], ["background"], ["missed"]),
        # found by the higher score, so that the other one is too many
        ([A], [(0, 0, 10, 8, 0, 0.5), (0, 0, 10, 6, 0, 0.9)], ["duplicate", None], [None]),
        # a bad box of its own class comes before the wrong class of another
        ([A, (0, 0, 10, 4, 1)], [(0, 0, 10, 4, 0, 0.9)], ["bad box"], ["bad box", "missed"]),
        # a bad box around a defect that was found
        ([A], [(0, 0, 10, 10, 0, 0.9), (0, 0, 10, 3, 0, 0.8)], [None, "bad box"], [None]),
        # wrong class before duplicate, when a box fits two defects
        (
            [A, (0, 0, 10, 10, 1)],
            [(0, 0, 10, 10, 0, 0.9), (0, 0, 10, 10, 0, 0.8)],
            [None, "wrong class"],
            [None, "wrong class"],
        ),
        ([A, B], [(50, 0, 60, 10, 0, 0.9)], ["wrong class"], ["missed", "wrong class"]),
    ],
)
def test_each_error_has_its_kind(
    truth: list[Any], predicted: list[Any], wrong: list[Any], lost: list[Any]
) -> None:
    errors = box_errors(detections(*truth), detections(*predicted))
    assert (list(errors.predicted), list(errors.true)) == (wrong, lost)


def test_boxes_and_misses_are_counted_apart() -> None:
    errors = box_errors(detections(A, B), detections((0, 0, 10, 5, 1, 0.9)))
    counts = {kind: errors.count(kind) for kind in KINDS}
    expected = dict.fromkeys(KINDS, 0) | {"wrong class": 1, "missed": 1}
    assert counts == expected  # A is the wrong class's, and counts but once


coordinates = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 12))
boxes = st.lists(st.tuples(coordinates, st.integers(0, 1), st.integers(1, 9)), max_size=5)


@given(truth=boxes, predicted=boxes)
def test_every_box_and_defect_is_a_match_or_one_error(
    truth: list[Any], predicted: list[Any]
) -> None:
    true = detections(*((x, y, x + s, y + s, k) for (x, y, s), k, _ in truth))
    found = detections(*((x, y, x + s, y + s, k, n / 10) for (x, y, s), k, n in predicted))
    errors, pairs = box_errors(true, found), match(true, found)
    assert [p for p, kind in enumerate(errors.predicted) if kind is None] == sorted(
        p for _, p in pairs
    )
    assert [t for t, kind in enumerate(errors.true) if kind is None] == sorted(t for t, _ in pairs)
    assert len(errors.predicted) == len(found) and len(errors.true) == len(true)
