"""Reviews: the file's checks, and what they make of an image's labels, as tables."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rectangles import Box, filled

from pipeline.data.masks import encode_rle
from pipeline.data.review import Defect, Outcome, ReviewedImage, decide, misfits, read_review
from pipeline.errors import UserError

HEIGHT, WIDTH = 60, 100


def rle(box: Box) -> dict[str, Any]:
    return encode_rle(filled(box, HEIGHT, WIDTH))


def xywh(box: Box) -> list[int]:
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]


# ---------------------------------------------------------------- labels of an image

# Rectangles of 20 x 10 pixels; the name's number is the shift in x. IoU with SPOT: 1, 2/3, 1/3, 0.
SPOT, SPOT4, SPOT10, FAR = (10, 10, 30, 20), (14, 10, 34, 20), (20, 10, 40, 20), (60, 30, 80, 40)
CLS = {"a": "scratch", "b": "stain"}
Said = tuple[
    Any, ...
]  # what was said: ("accept", class, box, score), ("reject", ...), ("draw", ...)


class Case(NamedTuple):
    """Labels and earlier hard negatives of an image, what was said, and what comes of it."""

    labels: list[tuple[str, Box]]
    said: list[Said]
    then: list[tuple[str, Box]]  # labels afterwards, where no one decides on conflicts
    review: list[tuple[str, Box]] | None = None  # labels afterwards where the review is taken
    negatives: tuple[list[tuple[str, Box]], ...] = ([], [])  # afterwards, in either case
    conflicts: tuple[str, ...] = ()
    earlier: tuple[tuple[str, Box], ...] = ()  # hard negatives


CASES = {
    "nothing": Case([("a", SPOT)], [], [("a", SPOT)]),
    "a new label": Case([("a", SPOT)], [("accept", "a", FAR)], [("a", SPOT), ("a", FAR)]),
    "labelled already": Case([("a", SPOT)], [("accept", "a", SPOT4)], [("a", SPOT)]),
    "too far off to be the same": Case(
        [("a", SPOT)], [("accept", "a", SPOT10)], [("a", SPOT), ("a", SPOT10)]
    ),
    "its class was changed to the label's": Case(
        [("a", SPOT)], [("accept", "b", SPOT, 0.9, "a")], [("a", SPOT)]
    ),
    "drawn": Case([], [("draw", "b", FAR)], [("b", FAR)]),
    "drawn around a label": Case([("b", FAR)], [("draw", "b", FAR)], [("b", FAR)]),
    "rejected": Case(
        [("a", SPOT)], [("reject", "a", FAR)], [("a", SPOT)],
        negatives=([("a", FAR)], [("a", FAR)]),
    ),
    "rejected: the label is of another class": Case(
        [("a", SPOT)], [("reject", "b", SPOT)], [("a", SPOT)],
        negatives=([("b", SPOT)], [("b", SPOT)]),
    ),
    "a label of another class": Case(
        [("a", SPOT)], [("accept", "b", SPOT4)], [("a", SPOT)], [("b", SPOT)],
        conflicts=("accepted stain at [14, 10, 20, 10] overlaps label scratch at "
                   "[10, 10, 20, 10]",),
    ),
    "drawn around a label of another class": Case(
        [("a", SPOT)], [("draw", "b", SPOT4)], [("a", SPOT)], [("b", SPOT)],
        conflicts=("drawn stain at [14, 10, 20, 10] overlaps label scratch at [10, 10, 20, 10]",),
    ),
    "a rejected label": Case(
        [("a", SPOT), ("a", FAR)], [("reject", "a", SPOT4)],
        [("a", SPOT), ("a", FAR)], [("a", FAR)],
        negatives=([], [("a", SPOT4)]),
        conflicts=("rejected scratch at [14, 10, 20, 10] overlaps label scratch at "
                   "[10, 10, 20, 10]",),
    ),
    "a label rejected twice": Case(
        [("a", SPOT)], [("reject", "a", SPOT4), ("reject", "a", SPOT)], [("a", SPOT)], [],
        negatives=([], [("a", SPOT4)]),
        conflicts=(
            "rejected scratch at [14, 10, 20, 10] overlaps label scratch at [10, 10, 20, 10]",
            "rejected scratch at [10, 10, 20, 10] overlaps label scratch at [10, 10, 20, 10]",
        ),
    ),
    "a duplicate of a label is rejected": Case(
        [("a", SPOT)], [("accept", "a", SPOT, 0.9), ("reject", "a", SPOT4, 0.5)], [("a", SPOT)]
    ),
    "a duplicate of a new label is rejected": Case(
        [], [("reject", "a", SPOT4, 0.5), ("accept", "a", SPOT, 0.9)], [("a", SPOT)]
    ),
    "rejected for its outline, and drawn anew": Case(
        [], [("reject", "a", SPOT4), ("draw", "a", SPOT)], [("a", SPOT)]
    ),
    "rejected for its class, and drawn anew": Case(
        [], [("reject", "b", SPOT4), ("draw", "a", SPOT)], [("a", SPOT)],
        negatives=([("b", SPOT4)], [("b", SPOT4)]),
    ),
    "two of a class, the higher score counts": Case(
        [], [("accept", "a", SPOT, 0.4), ("accept", "a", SPOT4, 0.8)], [], [("a", SPOT4)],
        conflicts=("accepted scratch at [10, 10, 20, 10] overlaps accepted scratch at "
                   "[14, 10, 20, 10]",),
    ),
    "two of two classes, the drawn one counts": Case(
        [], [("accept", "a", SPOT, 0.99), ("draw", "b", SPOT4)], [], [("b", SPOT4)],
        conflicts=("accepted scratch at [10, 10, 20, 10] overlaps drawn stain at "
                   "[14, 10, 20, 10]",),
    ),
    "two of one label": Case(
        [("a", SPOT)], [("accept", "a", SPOT), ("accept", "a", SPOT4)], [("a", SPOT)]
    ),
    "beside one that is labelled": Case(  # the second overlaps the first, not the label
        [("a", SPOT)], [("accept", "a", SPOT4), ("draw", "b", (20, 10, 40, 20))],
        [("a", SPOT)], [("a", SPOT)],
        conflicts=("drawn stain at [20, 10, 20, 10] overlaps accepted scratch at "
                   "[14, 10, 20, 10]",),
    ),
    "its label is accepted under two classes": Case(
        [("a", SPOT)], [("accept", "b", SPOT, 0.9), ("accept", "a", SPOT, 0.3)],
        [("a", SPOT)], [("a", SPOT)],
        conflicts=(
            "accepted stain at [10, 10, 20, 10] overlaps accepted scratch at [10, 10, 20, 10]",
            "accepted stain at [10, 10, 20, 10] overlaps label scratch at [10, 10, 20, 10]",
        ),
    ),
    "rejected under its class, accepted under another": Case(
        [("a", SPOT)], [("reject", "a", SPOT), ("accept", "b", SPOT4)],
        [("a", SPOT)], [("b", SPOT)],
        negatives=([], [("a", SPOT)]),
        conflicts=(
            "accepted stain at [14, 10, 20, 10] overlaps label scratch at [10, 10, 20, 10]",
            "rejected scratch at [10, 10, 20, 10] overlaps label scratch at [10, 10, 20, 10]",
        ),
    ),
    "earlier hard negatives stay, once": Case(
        [], [("reject", "a", SPOT4), ("reject", "b", FAR)], [],
        negatives=([("a", SPOT), ("b", FAR)],) * 2,
        earlier=(("a", SPOT),),
    ),
    "an earlier hard negative is a defect after all": Case(
        [], [("accept", "a", SPOT4)], [("a", SPOT4)], earlier=(("a", SPOT),)
    ),
    "of another class it stays": Case(
        [], [("accept", "b", SPOT4)], [("b", SPOT4)],
        negatives=([("a", SPOT)],) * 2, earlier=(("a", SPOT),),
    ),
    "an earlier one stays if nothing comes of the conflict": Case(
        [], [("accept", "a", SPOT, 0.4), ("accept", "a", SPOT4, 0.8)], [], [("a", SPOT4)],
        negatives=([("a", SPOT)], []), earlier=(("a", SPOT),),
        conflicts=("accepted scratch at [10, 10, 20, 10] overlaps accepted scratch at "
                   "[14, 10, 20, 10]",),
    ),
}  # fmt: skip


def prediction(verdict: str, cls: str, box: Box, score: float = 0.5, changed: str = "") -> Any:
    entry = {"bbox": xywh(box), "class": CLS[cls], "score": score, "segmentation": rle(box)}
    return entry | {"verdict": verdict} | ({"changed_class": CLS[changed]} if changed else {})


def image_of(said: list[Said], **changes: Any) -> dict[str, Any]:
    drawn = [{"bbox": xywh(box), "class": CLS[cls]} for verb, cls, box in
             (s[:3] for s in said) if verb == "draw"]  # fmt: skip
    judged = [prediction(*s) for s in said if s[0] != "draw"]
    size = {"image_id": 7, "file_name": "a__000.png", "width": WIDTH, "height": HEIGHT}
    return {**size, "predictions": judged, "missed": drawn, **changes}


def outcome(case: Case, take_review: bool) -> Outcome:
    labels = [Defect(CLS[c], tuple(xywh(box)), rle(box), "label") for c, box in case.labels]
    earlier = [Defect(CLS[c], tuple(xywh(b)), None, "rejected", 0.5) for c, b in case.earlier]
    said = ReviewedImage.model_validate_json(json.dumps(image_of(case.said)))
    return decide(labels, earlier, said, take_review=take_review)


def as_table(defects: list[Defect]) -> list[tuple[str, list[float]]]:
    return [(defect.cls, list(defect.bbox)) for defect in defects]


@pytest.mark.parametrize("take_review", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_a_review_makes_of_an_image(case: Case, take_review: bool) -> None:
    found = outcome(case, take_review)
    then = case.review if take_review and case.review is not None else case.then
    expected = [(CLS[c], xywh(box)) for c, box in then]
    assert as_table(found.labels) == expected
    assert as_table(found.hard_negatives) == [
        (CLS[c], xywh(box)) for c, box in case.negatives[take_review]
    ]
    assert found.conflicts == [f"image a__000.png (7): {line}" for line in case.conflicts]


def test_a_label_keeps_its_outline_when_its_class_changes() -> None:
    found = outcome(CASES["a label of another class"], take_review=True)
    assert found.labels[0].rle == rle(SPOT)
    assert [(c.what, c.was) for c in found.changes] == [("class changed", "scratch")]


def test_masks_decide_where_boxes_are_alike() -> None:
    """Two diagonals of one square have the same box and no pixel in common."""
    square = filled((10, 10, 30, 30), HEIGHT, WIDTH)
    upper, lower = square.copy(), square.copy()
    upper[:20], lower[20:] = False, False
    label = Defect("scratch", (10, 10, 20, 20), encode_rle(upper), "label")
    said = image_of([("accept", "a", (10, 10, 30, 30))])
    said["predictions"][0]["segmentation"] = encode_rle(lower)
    reviewed = ReviewedImage.model_validate_json(json.dumps(said))
    assert len(decide([label], [], reviewed, take_review=False).labels) == 2
    del said["predictions"][0]["segmentation"]  # then the boxes decide
    reviewed = ReviewedImage.model_validate_json(json.dumps(said))
    assert decide([label], [], reviewed, take_review=False).labels == [label]


def test_an_empty_mask_is_none() -> None:
    said = image_of([("accept", "a", SPOT)])
    said["predictions"][0]["segmentation"] = rle((0, 0, 0, 0))
    reviewed = ReviewedImage.model_validate_json(json.dumps(said))
    assert decide([], [], reviewed, take_review=False).labels[0].rle is None


BOXES = st.tuples(
    st.integers(0, 60), st.integers(0, 40), st.integers(5, 30), st.integers(5, 15)
).map(lambda v: (v[0], v[1], v[0] + v[2], v[1] + v[3]))
SAID = st.tuples(
    st.sampled_from(["accept", "reject", "draw"]), st.sampled_from("ab"), BOXES, st.floats(0, 1)
)


@given(
    labels=st.lists(st.tuples(st.sampled_from("ab"), BOXES), max_size=4),
    said=st.lists(SAID, max_size=6),
)
def test_without_a_decision_no_label_changes(
    labels: list[tuple[str, Box]], said: list[Said]
) -> None:
    found = outcome(Case(labels, said, []), take_review=False)
    assert as_table(found.labels)[: len(labels)] == [(CLS[c], xywh(b)) for c, b in labels]
    assert all(label.origin in ("accepted", "drawn") for label in found.labels[len(labels) :])
    assert sum(c.what != "withdrawn" for c in found.changes) == len(said)  # each is accounted for
    again = outcome(Case(labels, said, []), take_review=True)
    assert found.conflicts == again.conflicts
    if not found.conflicts:
        assert found == again


@given(st.lists(st.tuples(st.sampled_from("ab"), BOXES), max_size=4))
def test_accepting_every_label_changes_nothing(labels: list[tuple[str, Box]]) -> None:
    said = [("accept", cls, box) for cls, box in labels]
    found = outcome(Case(labels, said, []), take_review=False)
    assert as_table(found.labels) == [(CLS[c], xywh(b)) for c, b in labels]
    assert not found.conflicts and not found.hard_negatives


# ---------------------------------------------------------------- the file


def valid() -> dict[str, Any]:
    return {
        "format": "pipeline-review",
        "version": 1,
        "dataset": "parts",
        "classes": ["scratch", "stain"],
        "images": [
            image_of([("accept", "a", SPOT), ("reject", "b", FAR), ("draw", "b", FAR)]),
            image_of([("accept", "a", SPOT, 0.5, "b")], image_id=9, file_name="b.png", note="ü"),
        ],
    }


def test_a_valid_review_is_read(tmp_path: Path) -> None:
    path = tmp_path / "review.json"
    path.write_text(json.dumps(valid()))
    review = read_review(path)
    assert review.images[1].note == "ü" and review.images[1].predictions[0].changed_class == "stain"
    assert review.images[0].missed[0].bbox == (60, 30, 20, 10)


def put(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(review: Any) -> None:
        for key in keys[:-1]:
            review = review[key]
        review[keys[-1]] = value

    return change


def drop(*keys: Any) -> Callable[[Any], None]:
    def change(review: Any) -> None:
        for key in keys[:-1]:
            review = review[key]
        del review[keys[-1]]

    return change


FIRST = "images[0] (a__000.png)"
BOX = ("images", 0, "predictions", 0, "bbox")
MISSED = ("images", 0, "missed", 0, "bbox")
BAD: dict[str, tuple[Callable[[Any], None], str]] = {
    "another format": (put("format", value="x"), "format: expected 'pipeline-review', found 'x'"),
    "a later version": (put("version", value=2), "version: expected 1, found 2"),
    "no classes": (drop("classes"), "classes: required, not given"),
    "images by name": (put("images", value={}), "images: expected a list, found {}"),
    "an image that is none": (put("images", 0, value=3), "images[0]: expected"),
    "an unknown key": (put("images", 0, "x", value=1), f"{FIRST}.x: unknown key"),
    "an id as text": (
        put("images", 0, "image_id", value="7"),
        f"{FIRST}.image_id: expected a whole number, found '7'",
    ),
    "no id": (drop("images", 0, "image_id"), f"{FIRST}.image_id: required, not given"),
    "an id of 0": (put("images", 0, "image_id", value=0), f"{FIRST}.image_id: expected greater"),
    "a file elsewhere": (
        put("images", 0, "file_name", value="../a.png"),
        "images[0] (../a.png).file_name: expected the name of a file without a folder",
    ),
    "no verdict": (
        drop("images", 0, "predictions", 0, "verdict"),
        f"{FIRST}.predictions[0].verdict: required, not given",
    ),
    "another verdict": (
        put("images", 0, "predictions", 0, "verdict", value="maybe"),
        f"{FIRST}.predictions[0].verdict: expected 'accept' or 'reject', found 'maybe'",
    ),
    "a score above 1": (
        put("images", 0, "predictions", 0, "score", value=1.5),
        f"{FIRST}.predictions[0].score: expected less than or equal to 1, found 1.5",
    ),
    "a score that is none": (
        put("images", 0, "predictions", 0, "score", value=float("nan")),
        f"{FIRST}.predictions[0].score: expected",
    ),
    "three numbers": (
        put(*BOX, value=[1, 2, 3]),
        f"{FIRST}.predictions[0].bbox[3]: expected more values, found [1, 2, 3]",
    ),
    "five numbers": (put(*BOX, value=[1, 2, 3, 4, 5]), f"{FIRST}.predictions[0].bbox: expected"),
    "no width": (
        put(*BOX, value=[1, 2, 0, 4]),
        f"{FIRST}.predictions[0].bbox: expected a width and a height above 0, "
        "found [1.0, 2.0, 0.0, 4.0]",
    ),
    "text in a box": (
        put(*BOX, value=[1, 2, "3", 4]),
        f"{FIRST}.predictions[0].bbox[2]: expected a number, found '3'",
    ),
    "outside": (
        put(*MISSED, value=[90, 10, 11, 10]),
        f"{FIRST}.missed[0].bbox: expected a box inside of 100 x 60 pixels, "
        "found [90.0, 10.0, 11.0, 10.0]",
    ),
    "left of it": (put(*MISSED, value=[-1, 10, 11, 10]), f"{FIRST}.missed[0].bbox: expected a box"),
    "a prediction outside": (
        put(*BOX, value=[90, 10, 500, 10]),
        f"{FIRST}.predictions[0].bbox: expected a box inside",
    ),
    "a click": (
        put(*MISSED, value=[9, 10, 0.4, 10]),
        f"{FIRST}.missed[0].bbox: expected at least one pixel, found [9.0, 10.0, 0.4, 10.0]",
    ),
    "run lengths as a list": (
        put("images", 0, "predictions", 0, "segmentation", "counts", value=[1]),
        f"{FIRST}.predictions[0].segmentation.counts: expected text, found [1]",
    ),
    "a changed class of a rejected one": (
        put("images", 0, "predictions", 1, "changed_class", value="scratch"),
        f"{FIRST}.predictions[1].changed_class: expected none beside the verdict 'reject', "
        "found 'scratch'",
    ),
    "an unknown class": (
        put("images", 0, "predictions", 0, "class", value="dent"),
        f"{FIRST}.predictions[0].class: expected one of scratch, stain, found 'dent'",
    ),
    "an unknown class drawn": (
        put("images", 0, "missed", 0, "class", value="good"),
        f"{FIRST}.missed[0].class: expected one of scratch, stain, found 'good'",
    ),
    "changed to an unknown class": (
        put("images", 1, "predictions", 0, "changed_class", value="dent"),
        "images[1] (b.png).predictions[0].changed_class: expected one of scratch, stain",
    ),
    "an image twice": (
        put("images", 1, "image_id", value=7),
        "images[1] (b.png): expected each image once, found 7 again",
    ),
    "a name twice": (
        put("images", 1, "file_name", value="a__000.png"),
        "images[1] (a__000.png): expected each image once, found 'a__000.png' again",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "line"), BAD.values(), ids=BAD.keys())
def test_a_bad_review_is_one_clear_line(
    tmp_path: Path, spoil: Callable[[Any], None], line: str
) -> None:
    path, review = tmp_path / "review.json", valid()
    spoil(review)
    path.write_text(json.dumps(review))
    with pytest.raises(UserError) as caught:
        read_review(path)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{path}: {line}"), caught.value.problems


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    path, review = tmp_path / "review.json", valid()
    for name in ("another format", "an id as text", "a score above 1", "text in a box"):
        BAD[name][0](review)
    path.write_text(json.dumps(review))
    with pytest.raises(UserError) as caught:
        read_review(path)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"", "expected JSON"), (b"{", "expected JSON"), (b"\xff\xfe{}", "expected JSON"),
     (b"[]", "expected a review, found []"), (b"null", "expected a review, found None"),
     (b"[" * 100_000, "expected JSON")],
)  # fmt: skip
def test_what_is_no_review_is_named(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "review.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_review(path)
    assert [p.startswith(f"{path}: {found}") for p in caught.value.problems] == [True]


@pytest.mark.parametrize("path", ["nowhere.json", "."])
def test_a_missing_file_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match="expected a review, found"):
        read_review(tmp_path / path)


FITTING = {"a__000.png": (7, WIDTH, HEIGHT), "b.png": (9, WIDTH, HEIGHT)}
MISFITS: dict[str, tuple[Any, tuple[str, ...], dict[str, Any], list[str]]] = {
    "it fits": (None, ("scratch", "stain", "dent"), FITTING, []),
    "any id": (None, ("scratch", "stain"), {k: (None, *v[1:]) for k, v in FITTING.items()}, []),
    "other classes": (
        None, ("stain",), FITTING,
        ["classes: expected those of the dataset, stain, found 'scratch'"],
    ),
    "no such image": (
        None, ("scratch", "stain"), {"a__000.png": (7, WIDTH, HEIGHT)},
        ["images[1] (b.png): expected an image of that name, found none"],
    ),
    "another id": (
        None, ("scratch", "stain"), FITTING | {"b.png": (8, WIDTH, HEIGHT)},
        ["images[1] (b.png).image_id: expected 8, found 9"],
    ),
    "another size": (
        None, ("scratch", "stain"), FITTING | {"b.png": (9, HEIGHT, WIDTH)},
        ["images[1] (b.png): expected the size of the image, 60 x 100, found 100 x 60"],
    ),
    "run lengths of another size": (
        put("images", 0, "predictions", 0, "segmentation", "size", value=[100, 60]),
        ("scratch", "stain"), FITTING,
        [f"{FIRST}.predictions[0].segmentation: expected run lengths of a mask of 60 rows and "
         "100 columns, found {"],
    ),
    "garbled run lengths": (
        put("images", 0, "predictions", 0, "segmentation", "counts", value="garbage"),
        ("scratch", "stain"), FITTING,
        [f"{FIRST}.predictions[0].segmentation: expected run lengths of a mask of 60 rows and "
         "100 columns, found {"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS.values(), ids=MISFITS.keys())
def test_a_review_that_does_not_fit_is_named(tmp_path: Path, case: Any) -> None:
    spoil, classes, images, expected = case
    content = copy.deepcopy(valid())
    if spoil:
        spoil(content)
    (tmp_path / "review.json").write_text(json.dumps(content))
    found = misfits(read_review(tmp_path / "review.json"), classes, images)
    assert len(found) == len(expected)
    assert all(f.startswith(e) for f, e in zip(found, expected, strict=True)), found
