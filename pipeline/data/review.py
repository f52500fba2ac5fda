"""A review on disk, and what it makes of an image's labels.

`review.json` is what the report page saves: what a person said of a run's predictions. It names an
image only if something was said of it.

    {"format": "pipeline-review", "version": 1, "dataset": NAME, "classes": [NAME, ...],
     "images": [{"image_id": 12, "file_name": "bent_lead__000.png", "width": 640, "height": 640,
                 "note": TEXT (may be missing),
                 "predictions": [{"bbox": [x, y, width, height], "class": NAME, "score": 0.83,
                                  "segmentation": COCO's compressed run lengths (may be missing),
                                  "verdict": "accept" or "reject",
                                  "changed_class": NAME (only of an accepted one)}, ...],
                 "missed": [{"bbox": [x, y, width, height], "class": NAME}, ...]}, ...]}

Boxes are half-open, in pixels of the image.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pycocotools import mask as coco_mask
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.config import EXPECTED
from pipeline.data.masks import is_rle
from pipeline.data.matching import MATCH_IOU
from pipeline.errors import UserError

Known = Mapping[str, tuple[int | None, int, int]]  # file name -> id (None: any), width, height
ROUNDING = 0.5  # pixels that a box may reach beyond its image


# ---- The file ----------------------------------------------------------------------------------


def _check_box(box: tuple[float, ...]) -> tuple[float, ...]:
    if min(box[2:]) <= 0:
        raise ValueError(f"expected a width and a height above 0, found {list(box)}")
    return box


BBox = Annotated[tuple[float, float, float, float], AfterValidator(_check_box)]


class _Entry(BaseModel):
    """What all parts of the file share: no unknown keys, no text for a number, no infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True
    )


class RunLengths(_Entry):
    """COCO's compressed run lengths."""

    size: tuple[int, int]  # height, width
    counts: str

    def rle(self) -> dict[str, Any]:
        """As `pipeline.data.masks` takes them."""
        return {"size": list(self.size), "counts": self.counts}


class Judged(_Entry):
    """A prediction, and what was said of it."""

    bbox: BBox
    cls: str = Field(alias="class")
    score: float = Field(ge=0, le=1)
    segmentation: RunLengths | None = None
    verdict: Literal["accept", "reject"]
    changed_class: str | None = None

    @model_validator(mode="after")
    def _check_change(self) -> Judged:
        if self.verdict == "reject" and self.changed_class is not None:
            raise ValueError(
                f"changed_class: expected none beside the verdict 'reject', found "
                f"'{self.changed_class}'"
            )
        return self


class Missed(_Entry):
    """A box drawn around a defect that was not predicted."""

    bbox: BBox
    cls: str = Field(alias="class")


class ReviewedImage(_Entry):
    """What was said of one image."""

    image_id: int = Field(gt=0)
    file_name: str
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    note: str = ""
    predictions: tuple[Judged, ...]
    missed: tuple[Missed, ...]

    @field_validator("file_name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if Path(name).name != name or len(name.splitlines()) != 1:
            raise ValueError(f"expected the name of a file without a folder, found {name!r}")
        return name

    @model_validator(mode="after")
    def _check_boxes(self) -> ReviewedImage:
        boxes = {f"predictions[{i}].bbox": p.bbox for i, p in enumerate(self.predictions)}
        boxes |= {f"missed[{i}].bbox": m.bbox for i, m in enumerate(self.missed)}
        for place, box in boxes.items():
            x, y, width, height = box
            beyond = max(-x, -y, x + width - self.width, y + height - self.height)
            if beyond > ROUNDING:
                raise ValueError(
                    f"{place}: expected a box inside of {self.width} x {self.height} pixels, "
                    f"found {list(box)}"
                )
            if place.startswith("missed") and min(width, height) < 1:
                raise ValueError(f"{place}: expected at least one pixel, found {list(box)}")
        return self


class Review(_Entry):
    """A whole review."""

    format: Literal["pipeline-review"]
    version: Literal[1]
    dataset: str
    classes: tuple[str, ...]
    images: tuple[ReviewedImage, ...]


def read_review(path: Path) -> Review:
    """A review. Raises `UserError` with one line for each problem of the file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: expected a review, found nothing there") from None
    except OSError as error:
        raise UserError(f"{path}: expected a review, found: {error.strerror}") from None
    try:
        review = Review.model_validate_json(content)
    except ValidationError as error:
        problems = [_line(content, problem) for problem in error.errors()]
        raise UserError(*(f"{path}: {problem}" for problem in problems)) from None
    if problems := _contradictions(review):
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    return review


def _line(content: bytes, problem: Any) -> str:
    """One of pydantic's problems as a line: where, what was expected, what was found."""
    kind, loc = problem["type"], problem["loc"]
    if kind == "json_invalid":
        return f"expected JSON, found {problem['ctx']['error']}"
    if not loc:
        return f"expected a review, found {reprlib.repr(problem['input'])}"
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)[1:]
    if loc[0] == "images" and len(loc) > 1:
        name = _name_of(content, loc[1])
        place = place.replace(f"[{loc[1]}]", f"[{loc[1]}]" + (f" ({name})" if name else ""), 1)
    if kind == "extra_forbidden":
        return f"{place}: unknown key"
    if kind == "missing" and isinstance(loc[-1], str):
        return f"{place}: required, not given"
    if kind == "value_error":
        says = str(problem["ctx"]["error"])
        # That of a whole entry names the key itself.
        return f"{place}: {says}" if says.startswith("expected") else f"{place}.{says}"
    expected = EXPECTED.get(kind) or problem["msg"].removeprefix("Input should be ")
    return f"{place}: expected {expected}, found {reprlib.repr(problem['input'])}"


def _name_of(content: bytes, index: int) -> str | None:
    """The file name of an image in a file that is JSON but not a review, if it has one."""
    image = json.loads(content)["images"][index]
    name = image.get("file_name") if isinstance(image, dict) else None
    return name if isinstance(name, str) else None


def _contradictions(review: Review) -> list[str]:
    """What does not fit together in a review whose parts are as they should be."""
    problems, seen = [], set()
    for i, image in enumerate(review.images):
        place = f"images[{i}] ({image.file_name})"
        for key in (image.image_id, image.file_name):
            if key in seen:
                problems.append(f"{place}: expected each image once, found {key!r} again")
            seen.add(key)
        named = {f"predictions[{k}].class": p.cls for k, p in enumerate(image.predictions)}
        named |= {
            f"predictions[{k}].changed_class": p.changed_class
            for k, p in enumerate(image.predictions)
            if p.changed_class is not None
        }
        named |= {f"missed[{k}].class": m.cls for k, m in enumerate(image.missed)}
        problems += [
            f"{place}.{key}: expected one of {', '.join(review.classes)}, found '{name}'"
            for key, name in named.items()
            if name not in review.classes
        ]
    return problems


def misfits(review: Review, classes: Sequence[str], images: Known) -> list[str]:
    """Where a review does not fit these classes and images: one line for each problem."""
    problems = [
        f"classes: expected those of the dataset, {', '.join(classes)}, found '{name}'"
        for name in review.classes
        if name not in classes
    ]
    for i, said in enumerate(review.images):
        place = f"images[{i}] ({said.file_name})"
        if said.file_name not in images:
            problems.append(f"{place}: expected an image of that name, found none")
            continue
        image_id, width, height = images[said.file_name]
        if image_id not in (None, said.image_id):
            problems.append(f"{place}.image_id: expected {image_id}, found {said.image_id}")
        if (said.width, said.height) != (width, height):
            problems.append(
                f"{place}: expected the size of the image, {width} x {height}, found "
                f"{said.width} x {said.height}"
            )
            continue
        problems += [
            f"{place}.predictions[{k}].segmentation: expected run lengths of a mask of {height} "
            f"rows and {width} columns, found {reprlib.repr(prediction.segmentation.rle())}"
            for k, prediction in enumerate(said.predictions)
            if prediction.segmentation is not None
            and not is_rle(prediction.segmentation.rle(), (height, width))
        ]
    return problems


# ---- What it makes of the labels ---------------------------------------------------------------


@dataclass(frozen=True)
class Defect:
    """A defect of one image, or what was taken for one."""

    cls: str
    bbox: tuple[float, float, float, float]  # x, y, width, height: half-open pixels
    rle: dict[str, Any] | None  # None: nobody has drawn its mask yet
    origin: Literal["label", "accepted", "drawn", "rejected"]
    score: float | None = None  # of a prediction

    def __str__(self) -> str:
        box = ", ".join(f"{value:g}" for value in self.bbox)
        return f"{self.origin} {self.cls} at [{box}]"


@dataclass(frozen=True)
class Change:
    """What became of one thing that was said, or of a label because of it."""

    what: Literal[
        "added", "already labelled", "class changed", "removed", "hard negative", "withdrawn",
        "repeated", "left out",
    ]  # fmt: skip
    defect: Defect
    was: str | None = None  # the class before it was changed


@dataclass(frozen=True)
class Outcome:
    """What a review makes of one image."""

    labels: list[Defect]  # those that were there, in their order, then the new ones
    hard_negatives: list[Defect]
    changes: list[Change]
    conflicts: list[str]


def overlap(a: Defect, b: Defect) -> float:
    """IoU of the masks, or of the boxes where either has no mask."""
    if a.rle is not None and b.rle is not None:
        return float(coco_mask.iou([a.rle], [b.rle], [0])[0, 0])
    return float(coco_mask.iou([list(a.bbox)], [list(b.bbox)], [0])[0, 0])


def decide(
    labels: Sequence[Defect],
    hard_negatives: Sequence[Defect],
    said: ReviewedImage,
    *,
    take_review: bool,
) -> Outcome:
    """What a review makes of an image with these labels and hard negatives of earlier reviews.

    Two defects are the same where their masks overlap by an IoU of `MATCH_IOU` or more (their
    boxes, where one is a drawn box). Then:

    - An accepted or drawn defect that is a label of its class is already labelled, and the label
      stays as it is. One that is no label becomes one.
    - A rejected one becomes a hard negative, unless an accepted or drawn one of its class is the
      same (then it was rejected as a duplicate, or for its outline), or it is one already.
    - A hard negative that is accepted or drawn later is withdrawn.

    Conflicts are: an accepted or drawn defect that is a label of another class; a rejected one that
    is a label of its class; two accepted or drawn ones that are the same. Nothing that is in a
    conflict has an effect, unless `take_review`: then a label takes the class of the accepted one
    and keeps its outline; a rejected label is removed; and of two that are the same, the one that
    is labelled already counts, else the drawn one, else that of the higher score.
    """
    claims, rejected = _claims(said), _rejections(said)
    confirmed = [_find(claim, labels, claim.cls) for claim in claims]  # which label each one is
    rivals = _rivals(claims, confirmed)
    conflicts = [(claims[loser], claims[winner]) for loser, winner in rivals]
    left_out = {i for pair in rivals for i in (pair[:1] if take_review else pair)}
    after: dict[int, Defect] = dict(enumerate(labels))  # without those that are removed
    settled = {label for label in confirmed if label is not None}
    found, new = [], []  # what was accepted or drawn, and has an effect; what of it is no label
    changes: list[Change] = []

    for i, claim in enumerate(claims):
        label = _find(claim, labels)
        if confirmed[i] is not None:
            changes.append(Change("already labelled", claim))
            found.append(claim)
            continue
        if label is not None:
            conflicts.append((claim, labels[label]))
        if i in left_out or (label is not None and (label in settled or not take_review)):
            changes.append(Change("left out", claim))
            continue
        found.append(claim)
        if label is None:
            new.append(claim)
            changes.append(Change("added", claim))
        else:
            settled.add(label)
            after[label] = replace(labels[label], cls=claim.cls)
            changes.append(Change("class changed", after[label], was=labels[label].cls))

    negatives = [old for old in hard_negatives if _find(old, found, old.cls) is None]
    changes += [Change("withdrawn", old) for old in hard_negatives if old not in negatives]
    for rejection in rejected:
        label = _find(rejection, labels, rejection.cls)
        if _find(rejection, claims, rejection.cls) is not None or (
            label is not None and label in confirmed
        ):
            changes.append(Change("repeated", rejection))
            continue
        if label is not None:
            conflicts.append((rejection, labels[label]))
            if not take_review:
                changes.append(Change("left out", rejection))
                continue
            if label not in settled and label in after:
                changes.append(Change("removed", after.pop(label)))
        if _find(rejection, negatives, rejection.cls) is not None:
            changes.append(Change("repeated", rejection))
            continue
        changes.append(Change("hard negative", rejection))
        negatives.append(rejection)

    lines = [f"image {said.file_name} ({said.image_id}): {a} overlaps {b}" for a, b in conflicts]
    return Outcome([*after.values(), *new], negatives, changes, lines)


def _claims(said: ReviewedImage) -> list[Defect]:
    """What was accepted or drawn, in the order of the review."""
    accepted = [p for p in said.predictions if p.verdict == "accept"]
    return [
        *(_predicted(p, p.changed_class or p.cls, "accepted") for p in accepted),
        *(Defect(missed.cls, missed.bbox, None, "drawn") for missed in said.missed),
    ]


def _rejections(said: ReviewedImage) -> list[Defect]:
    return [_predicted(p, p.cls, "rejected") for p in said.predictions if p.verdict == "reject"]


def _predicted(prediction: Judged, cls: str, origin: Literal["accepted", "rejected"]) -> Defect:
    rle = None if prediction.segmentation is None else prediction.segmentation.rle()
    if rle is not None and not coco_mask.area(rle):  # it lost all its pixels to another one
        rle = None
    return Defect(cls, prediction.bbox, rle, origin, prediction.score)


def _find(defect: Defect, among: Sequence[Defect], cls: str | None = None) -> int | None:
    """Which of these, of this class if one is given, is the same; the best if several are."""
    overlaps = [overlap(defect, other) if cls in (None, other.cls) else 0.0 for other in among]
    best = max(range(len(among)), key=overlaps.__getitem__, default=None)
    return None if best is None or overlaps[best] < MATCH_IOU else best


def _rivals(claims: Sequence[Defect], confirmed: Sequence[int | None]) -> list[tuple[int, int]]:
    """Pairs of accepted or drawn defects that are the same: the one that yields, the other.

    Two that are both labelled already are no rivals: they ask for nothing.
    """

    def rank(i: int) -> tuple[bool, bool, float]:
        return confirmed[i] is None, claims[i].origin != "drawn", -(claims[i].score or 0.0)

    pairs: list[tuple[int, int]] = []
    standing: list[int] = []
    for i in sorted(range(len(claims)), key=rank):
        stronger = [
            j
            for j in standing
            if (confirmed[i] is None or confirmed[j] is None)
            and overlap(claims[i], claims[j]) >= MATCH_IOU
        ]
        pairs += [(i, j) for j in stronger]
        if not stronger:
            standing.append(i)
    return pairs
