"""`pipeline apply-review`: what a person said of predictions becomes a new version of the dataset.

Accepted predictions become labels, rejected ones hard negatives, and boxes drawn around missed
defects become labels whose masks SAM draws. `pipeline.data.review.decide` says when a prediction is
labelled already, what a conflict is, and how `--conflicts` resolves them; by default they are named
and nothing is written.

The new version is a dataset like one of `pipeline convert`, in the same formats and with the same
classes. The old one stays as it is; image files are hard-linked, or copied where that cannot be.

- Images keep their ids and file names, so that earlier predictions and reviews fit the new version.
  The class in a file name is the one it was converted with; what an image shows, its labels say.
- No image changes its split or fold. A label that is corrected in the test split is corrected
  there: figures measured before and after do not have the same truth then.
- `hard_negatives.json` has the rejected predictions of this review and of earlier ones as COCO
  results. `finetune-yolo` shows good images that have some more often; nothing else uses them.
- `manifest.json` lists every review that was applied, under `reviews`: what was said, what became
  of it, the conflicts and the notes.

With `--images`, the review is of a folder of images that are not in the dataset. They join its
training images, after the others, as `<class>__<folder>_<name>`. In folds, each one is tested once,
as all others are. Images of which nothing was said but a note stay out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import supervision as sv
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pipeline.config import ApplyReviewConfig, flag_of
from pipeline.data import dataset_folder, masks, mvtec
from pipeline.data.coco import Instance, Item
from pipeline.data.dataset import GOOD, HARD_NEGATIVES, Sample
from pipeline.data.dataset_folder import MANIFEST, Counts, check_apart, raise_any
from pipeline.data.files import read_image, sha256, write_json
from pipeline.data.matching import MATCH_IOU
from pipeline.data.review import (
    Defect,
    Known,
    Outcome,
    Review,
    ReviewedImage,
    decide,
    misfits,
    read_review,
)
from pipeline.data.splits import Split
from pipeline.data.version import read_version, shown_class, updated
from pipeline.errors import UserError
from pipeline.models.segmenter import Segmenter

COMMAND = "apply-review"
LABELS_CHANGED = ("added", "class changed", "removed")  # of `pipeline.data.review.Change`


@dataclass(frozen=True)
class Picture:
    """One image of the new version, before its labels are decided."""

    image_id: int
    file_name: str
    path: Path  # where it is now
    width: int
    height: int
    labels: tuple[Defect, ...] = ()
    hard_negatives: tuple[Defect, ...] = ()
    convert: str | None = None  # why it is written anew instead of linked


@dataclass(frozen=True)
class Source:
    """The version that is corrected, read."""

    pictures: list[Picture]
    classes: tuple[str, ...]
    split: Split
    folds: list[Split]
    manifest: dict[str, Any]


def run(config: ApplyReviewConfig) -> None:
    """Raises `UserError` for bad input, a review that does not fit, and unresolved conflicts."""
    # A broken image is reported by us; OpenCV's own lines about it name no file.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    config = _absolute(config)
    raise_any(dataset_folder.not_ours(config.out))
    read = {name: getattr(config, name) for name in ("review", "data", "images")}
    check_apart(
        config.out, {flag_of(ApplyReviewConfig, k): p for k, p in read.items() if p is not None}
    )
    review = read_review(config.review)
    source = _read(config.data)
    reviewed = _reviewed(config, review, source)
    outcomes = _decide(config, reviewed)
    outcomes, boxed = _draw_masks(config, reviewed, outcomes)
    if config.images is not None:
        source = _joined(config.images, source, [picture for picture, _ in reviewed], outcomes)

    items = [_item(picture, outcomes.get(picture.image_id)) for picture in source.pictures]
    class_of = {item.file_name: shown_class(item) for item in items}
    counts = dataset_folder.count(items, class_of, source.classes, source.split)
    applied = _account(config, review, source, outcomes, boxed)
    with dataset_folder.work_folder(config.out.parent) as work:
        built = Path(work) / "dataset"
        _write(built, config.out, source, items, outcomes)
        write_json(built / MANIFEST, _manifest(source, items, counts, applied))
        unchanged = dataset_folder.same(config.out, built)
        if not unchanged:
            raise_any(dataset_folder.in_the_way(config.out, config.force))
        dataset_folder.install(built, COMMAND, config, unchanged=unchanged)
    _report(config, source, items, counts, applied, unchanged)


def _absolute(config: ApplyReviewConfig) -> ApplyReviewConfig:
    paths = {name: getattr(config, name) for name in ("review", "data", "images", "out")}
    return config.model_copy(update={k: p.resolve() for k, p in paths.items() if p is not None})


# ---- Reading -----------------------------------------------------------------------------------


def _read(root: Path) -> Source:
    """The dataset that is corrected. Raises `UserError` for one that cannot be."""
    version = read_version(root)
    return Source(
        pictures=[_picture(sample, version.classes) for sample in version.samples],
        classes=version.classes,
        split=version.split,
        folds=version.folds,
        manifest=version.manifest,
    )


def _picture(sample: Sample, classes: Sequence[str]) -> Picture:
    labels = [
        Defect(classes[a["category_id"] - 1], tuple(a["bbox"]), a["segmentation"], "label")
        for a in sample.annotations
    ]
    negatives = [
        Defect(classes[n["category_id"] - 1], tuple(n["bbox"]), None, "rejected", n["score"])
        for n in sample.hard_negatives
    ]
    return Picture(
        sample.image_id,
        sample.path.name,
        sample.path,
        sample.width,
        sample.height,
        tuple(labels),
        tuple(negatives),
    )


def _reviewed(
    config: ApplyReviewConfig, review: Review, source: Source
) -> list[tuple[Picture, ReviewedImage]]:
    """Each picture that something was said of. Raises `UserError` where the review does not fit."""
    said = list(review.images)
    if config.images is None:
        pictures = {picture.file_name: picture for picture in source.pictures}
        known: Known = {name: (p.image_id, p.width, p.height) for name, p in pictures.items()}
    else:
        said = [image for image in said if image.predictions or image.missed]
        pictures = _new_pictures(config.images, [image.file_name for image in said], source)
        known = {name: (None, p.width, p.height) for name, p in pictures.items()}
    fitting = review.model_copy(update={"images": tuple(said)})
    raise_any(f"{config.review}: {text}" for text in misfits(fitting, source.classes, known))
    return [(pictures[image.file_name], image) for image in said]


def _new_pictures(folder: Path, names: Sequence[str], source: Source) -> dict[str, Picture]:
    """Images of a folder, by name, as far as they are there; their ids follow the dataset's.

    Raises `UserError` for those that cannot be used or are in the dataset.
    """
    if not folder.is_dir():
        raise UserError(f"--images: expected a folder of images, found none: {folder}")
    known = {image.get("sha256"): image.get("file") for image in source.manifest["images"]}
    pictures: dict[str, Picture] = {}
    problems = []
    paths = [folder / name for name in names]
    for image_id, path in enumerate(paths, start=len(source.pictures) + 1):
        if not path.is_file():
            continue
        try:
            found = mvtec.read(mvtec.Entry(path, None, GOOD, path.stem))
        except mvtec.BadFiles as bad:
            problems += [str(problem) for problem in bad.problems]
            continue
        if (same := known.get(sha256(path))) is not None:
            problems.append(f"{path}: expected an image that is not in the dataset, found {same}")
        pictures[path.name] = Picture(
            image_id, path.name, path, found.width, found.height, convert=found.convert
        )
    raise_any(problems)
    return pictures


# ---- Deciding ----------------------------------------------------------------------------------


def _decide(
    config: ApplyReviewConfig, reviewed: Sequence[tuple[Picture, ReviewedImage]]
) -> dict[int, Outcome]:
    """What becomes of each picture, by id. Raises `UserError` for conflicts that nobody decided."""
    take_review = config.conflicts == "take-review"
    outcomes = {
        picture.image_id: decide(
            picture.labels, picture.hard_negatives, said, take_review=take_review
        )
        for picture, said in reviewed
    }
    conflicts = [line for outcome in outcomes.values() for line in outcome.conflicts]
    if conflicts and config.conflicts == "report":
        raise UserError(
            *(f"{config.review}: {line}" for line in conflicts),
            f"--conflicts: expected keep-labels or take-review to decide {len(conflicts)} "
            "conflicts, found neither: nothing is written",
        )
    return outcomes


def _draw_masks(
    config: ApplyReviewConfig,
    reviewed: Sequence[tuple[Picture, ReviewedImage]],
    outcomes: Mapping[int, Outcome],
) -> tuple[dict[int, Outcome], list[str]]:
    """The outcomes with a mask of every label, and the labels whose box became the mask.

    Masks that are missing are SAM's. Where the box of SAM's mask does not match the given one (IoU
    `MATCH_IOU`), SAM outlined something else, and the box itself is the mask.
    """
    drawn = dict(outcomes)
    boxed: list[str] = []
    waiting = [p for p, _ in reviewed if any(d.rle is None for d in outcomes[p.image_id].labels)]
    if not waiting:
        return drawn, boxed
    segmenter = Segmenter.load(
        config.sam, zoom=None, flip=True, device=config.device, offline=config.offline
    )
    for picture in track(waiting, "drawing masks", console=Console(stderr=True), transient=True):
        labels = list(outcomes[picture.image_id].labels)
        rows = [i for i, label in enumerate(labels) if label.rle is None]
        boxes = np.array([_corners(labels[i], picture) for i in rows], np.float32)
        shown = sv.Detections(xyxy=boxes, class_id=np.zeros(len(rows), int))
        found = segmenter.segment(read_image(picture.path), shown)
        for i, box, mask in zip(rows, boxes, np.asarray(found.mask), strict=True):
            if not _matches(mask, box):
                boxed.append(f"{picture.file_name}: {labels[i]}")
                mask = _filled(box, mask.shape)
            labels[i] = replace(labels[i], rle=masks.encode_rle(mask))
        drawn[picture.image_id] = replace(outcomes[picture.image_id], labels=labels)
    return drawn, boxed


def _corners(label: Defect, picture: Picture) -> tuple[float, float, float, float]:
    """The label's box as x1, y1, x2, y2, inside of its image."""
    x, y, width, height = label.bbox
    return max(x, 0), max(y, 0), min(x + width, picture.width), min(y + height, picture.height)


def _matches(mask: np.ndarray, box: np.ndarray) -> bool:
    if not mask.any():
        return False
    tight = np.array([masks.box_of(mask)], np.float32)
    return bool(sv.box_iou_batch(tight, box[None])[0, 0] >= MATCH_IOU)


def _filled(box: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A (height, width) mask of every pixel that the box touches."""
    mask = np.zeros(shape, bool)
    (x1, y1), (x2, y2) = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
    mask[y1:y2, x1:x2] = True
    return mask


def _joined(
    folder: Path, source: Source, new: Sequence[Picture], outcomes: Mapping[int, Outcome]
) -> Source:
    """The source with new pictures. Raises `UserError` where the name of one is taken."""
    taken = {Path(picture.file_name).stem for picture in source.pictures}
    joined: list[Picture] = []
    problems = []
    for picture in new:
        cls = shown_class(_item(picture, outcomes[picture.image_id]))
        stem = f"{cls}__{folder.name}_{picture.path.stem}"
        if stem in taken:
            problems.append(f"{picture.path}: expected a name of its own, found {stem} taken")
        taken.add(stem)
        suffix = ".png" if picture.convert else picture.path.suffix
        joined.append(replace(picture, file_name=stem + suffix))
    raise_any(problems)
    names = [picture.file_name for picture in joined]
    dealt = sorted(names)  # by class, so that each is spread over the folds
    tested = [dealt[k :: len(source.folds)] for k in range(len(source.folds))]
    return replace(
        source,
        pictures=[*source.pictures, *joined],
        split=_with(source.split, names, []),
        folds=[_with(fold, names, test) for fold, test in zip(source.folds, tested, strict=True)],
    )


def _with(split: Split, names: Sequence[str], tested: Sequence[str]) -> Split:
    """The split with more images, of which some are tested and the others train."""
    train = [*split["train"], *(name for name in names if name not in tested)]
    test = [*split["test"], *(name for name in names if name in tested)]
    return {**split, "train": train, "test": test}


# ---- Writing -----------------------------------------------------------------------------------


def _item(picture: Picture, outcome: Outcome | None) -> Item:
    labels = picture.labels if outcome is None else outcome.labels
    instances = tuple(map(_instance, labels))
    return Item(picture.file_name, picture.width, picture.height, instances)


def _instance(label: Defect) -> Instance:
    assert label.rle is not None
    mask = masks.decode_rle(label.rle)
    return Instance(label.cls, masks.box_of(mask), int(np.count_nonzero(mask)), label.rle)


def _write(
    folder: Path,
    root: Path,
    source: Source,
    items: Sequence[Item],
    outcomes: Mapping[int, Outcome],
) -> None:
    """Write the new version, which will lie at `root`, into a new folder; but for its manifest."""
    (folder / "images").mkdir(parents=True)
    for picture in source.pictures:
        dataset_folder.place_image(
            picture.path,
            folder / "images" / picture.file_name,
            "hardlink",
            convert=picture.convert is not None,
        )
    dataset_folder.write_annotations(
        folder, root, items, source.classes, source.split, source.folds
    )
    negatives = [
        {
            "image_id": picture.image_id,
            "category_id": source.classes.index(negative.cls) + 1,
            "bbox": list(negative.bbox),
            "score": negative.score,
        }
        for picture in source.pictures
        for negative in _hard_negatives(picture, outcomes)
    ]
    if negatives:
        write_json(folder / HARD_NEGATIVES, negatives)


def _hard_negatives(picture: Picture, outcomes: Mapping[int, Outcome]) -> Sequence[Defect]:
    outcome = outcomes.get(picture.image_id)
    return picture.hard_negatives if outcome is None else outcome.hard_negatives


def _account(
    config: ApplyReviewConfig,
    review: Review,
    source: Source,
    outcomes: Mapping[int, Outcome],
    boxed: list[str],
) -> dict[str, Any]:
    """What was said and what became of it, for the manifest."""
    pictures = {picture.image_id: picture for picture in source.pictures}
    part_of = {name: part for part, names in source.split.items() for name in names}
    changes = []
    for image_id, outcome in outcomes.items():
        name = pictures[image_id].file_name
        for change in outcome.changes:
            entry = {
                "image_id": image_id,
                "file": f"images/{name}",
                "split": part_of[name],
                "change": change.what,
                "origin": change.defect.origin,
                "class": change.defect.cls,
                "bbox": list(change.defect.bbox),
            }
            if change.was is not None:
                entry["was"] = change.was
            if change.defect.score is not None:
                entry["score"] = change.defect.score
            changes.append(entry)
    new = [] if config.images is None else list(outcomes)
    return {
        "review": config.review.name,
        "sha256": sha256(config.review),
        "dataset": review.dataset,
        "applied_to": config.data.name,
        "images": len(review.images),
        "new_images": [f"images/{pictures[image_id].file_name}" for image_id in new],
        "summary": dict(Counter(change["change"] for change in changes)),
        "conflicts": [line for outcome in outcomes.values() for line in outcome.conflicts],
        "resolution": config.conflicts,
        "boxes_as_masks": boxed,
        "changes": changes,
        "notes": [
            {"file": image.file_name, "note": image.note} for image in review.images if image.note
        ],
    }


def _manifest(
    source: Source,
    items: Sequence[Item],
    counts: Counts,
    applied: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of the old version, brought up to date."""
    known = {image.get("file") for image in source.manifest["images"]}
    files = {f"images/{picture.file_name}": picture for picture in source.pictures}
    new = [_origin(picture, file) for file, picture in files.items() if file not in known]
    manifest = {**source.manifest, "images": [*source.manifest["images"], *new]}
    reviews = [*source.manifest.get("reviews", []), applied]
    return {**updated(manifest, items, source.split, counts), "reviews": reviews}


def _origin(picture: Picture, file: str) -> dict[str, Any]:
    """What the manifest says of an image that no manifest named yet."""
    origin = {"file": file, "class": "", "split": "", "source": f"{picture.path.parent.name}/"}
    origin["source"] += picture.path.name
    origin["sha256"] = sha256(picture.path)
    if picture.convert is not None:
        origin["converted"] = f"to 8-bit PNG: {picture.convert}"
    return origin


# ---- What is printed ---------------------------------------------------------------------------


def _report(
    config: ApplyReviewConfig,
    source: Source,
    items: Sequence[Item],
    counts: Counts,
    applied: Mapping[str, Any],
    unchanged: bool,
) -> None:
    console = Console()
    console.print(_table(source, items, applied["changes"]))
    console.print(dataset_folder.table_of(config.out.name, counts))
    for line in applied["conflicts"]:
        print(f"{config.conflicts}: {line}")
    for line in applied["boxes_as_masks"]:
        print(f"the box is the mask, since SAM outlined something else: {line}")
    corrected = {
        change["file"]
        for change in applied["changes"]
        if change["split"] == "test" and change["change"] in LABELS_CHANGED
    }
    if corrected:
        print(
            f"test images whose labels changed: {len(corrected)}; figures from before and after "
            "do not have the same truth"
        )
    print(f"{config.out}{' (unchanged)' if unchanged else ''}")


def _table(source: Source, items: Sequence[Item], changes: Sequence[Mapping[str, Any]]) -> Table:
    """What became of the labels of each class, and which hard negatives came."""
    before = Counter(label.cls for picture in source.pictures for label in picture.labels)
    after = Counter(instance.cls for item in items for instance in item.instances)

    def counted(*what: str, origin: str | None = None, key: str = "class") -> Counter[str]:
        return Counter(
            change[key]
            for change in changes
            if change["change"] in what and origin in (None, change["origin"])
        )

    columns = {
        "before": before,
        "accepted": counted("added", origin="accepted"),
        "drawn": counted("added", origin="drawn"),
        "class\ntaken": counted("class changed"),
        "class\nleft": counted("class changed", key="was"),
        "removed": counted("removed"),
        "after": after,
        "already\nlabelled": counted("already labelled"),
        "hard\nnegative": counted("hard negative"),
        "no longer\nnegative": counted("withdrawn"),
        "without\neffect": counted("repeated", "left out"),
    }
    shown = {k: v for k, v in columns.items() if v or k in ("before", "after")}
    table = Table(title="labels")
    table.add_column("class")
    for title in shown:
        table.add_column(title, justify="right")
    for cls in source.classes:
        table.add_row(cls, *(str(numbers[cls] or "–") for numbers in shown.values()))
    table.add_section()
    table.add_row("all", *(str(numbers.total() or "–") for numbers in shown.values()))
    return table
