"""A scripted person: hides most labels of a dataset, and reviews predictions knowing the truth.

    python benchmarks/review_loop/reviewer.py hide COMPLETE OUT
    python benchmarks/review_loop/reviewer.py review COMPLETE WEAKENED PREDICTIONS OUT

OUT is a dataset folder, or a review in the format of the report page.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from pipeline.data import dataset_folder
from pipeline.data.coco import Instance, Item
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.files import atomic_folder, write_json
from pipeline.data.masks import decode_rle, iou
from pipeline.data.matching import MATCH_IOU
from pipeline.data.predictions import PREDICTIONS, read_results
from pipeline.errors import UserError

KEPT = 1  # labelled training images of each class
HAND = 0.05  # how far the sides of a drawn box are off, in box sizes (standard deviation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    hiding, reviewing = commands.add_parser("hide"), commands.add_parser("review")
    for command, names in (
        (hiding, ("complete", "out")),
        (reviewing, ("complete", "weakened", "predictions", "out")),
    ):
        for name in names:
            command.add_argument(name, type=Path)
        command.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    with common.problems_as_lines("benchmarks/review_loop/reviewer.py"):
        (hide_labels if given.pop("command") == "hide" else review)(**given)


def hide_labels(complete: Path, out: Path, seed: int) -> None:
    """A copy of a dataset that has labels on `KEPT` training images of each class alone."""
    if out.exists():
        raise UserError(f"{out}: expected nothing there, found a dataset or other files")
    dataset = Dataset(complete)
    train = dataset.split("train")
    labels = np.array([sample.label for sample in train])
    rng = np.random.default_rng(seed)
    kept = np.concatenate(
        [rng.permutation(np.flatnonzero(labels == c))[:KEPT] for c in range(len(dataset.classes))]
    )
    hidden = {train[i].image_id for i in np.flatnonzero(labels >= 0) if i not in kept}
    items = [
        _item(sample, dataset.classes, sample.image_id in hidden) for sample in dataset.images()
    ]
    split = {part: [s.path.name for s in dataset.split(part)] for part in ("train", "val", "test")}
    with atomic_folder(out) as place:
        (place / "images").mkdir()
        for sample in dataset.images():
            target = place / "images" / sample.path.name
            dataset_folder.place_image(sample.path, target, "hardlink", convert=False)
        dataset_folder.write_annotations(place, out.resolve(), items, dataset.classes, split, [])
        shutil.copy(complete / dataset_folder.MANIFEST, place)


def _item(sample: Sample, classes: Sequence[str], hidden: bool) -> Item:
    instances = []
    for annotation in () if hidden else sample.annotations:
        x, y, width, height = annotation["bbox"]
        cls = classes[annotation["category_id"] - 1]
        box = (x, y, x + width, y + height)
        instances.append(Instance(cls, box, annotation["area"], annotation["segmentation"]))
    return Item(sample.path.name, sample.width, sample.height, tuple(instances))


def review(complete: Path, weakened: Path, predictions: Path, out: Path, seed: int) -> None:
    """Write what a careful reviewer says of predictions on a weakened dataset's training images.

    A prediction is right if its mask overlaps a true one by an IoU of `MATCH_IOU`, the best-scored
    of several; one of another class gets the true class. The rest is rejected, and a box is drawn,
    not quite exactly, around every defect that is left.
    """
    rng = np.random.default_rng(seed)
    dataset = Dataset(complete)
    results = read_results(predictions / PREDICTIONS)
    images = []
    for sample in dataset.split("train"):
        entries = sorted(results.get(sample.image_id, []), key=lambda entry: -entry["score"])
        truth = {i: decode_rle(a["segmentation"]) for i, a in enumerate(sample.annotations)}
        judged = [_judge(entry, sample.annotations, truth, dataset.classes) for entry in entries]
        missed = [
            {
                "bbox": _drawn(sample.annotations[i]["bbox"], sample, rng),
                "class": dataset.classes[sample.annotations[i]["category_id"] - 1],
            }
            for i in truth  # those that no prediction took
        ]
        if judged or missed:
            size = {"width": sample.width, "height": sample.height}
            name = {"image_id": sample.image_id, "file_name": sample.path.name}
            images.append({**name, **size, "predictions": judged, "missed": missed})
    head = {"format": "pipeline-review", "version": 1, "dataset": weakened.name}
    write_json(out, {**head, "classes": list(dataset.classes), "images": images})


def _judge(
    entry: dict[str, Any],
    annotations: Sequence[dict[str, Any]],
    truth: dict[int, np.ndarray],
    classes: Sequence[str],
) -> dict[str, Any]:
    """One prediction with its verdict; a true mask that it found is taken out of `truth`."""
    mask = decode_rle(entry["segmentation"])
    best = max(truth, key=lambda i: iou(mask, truth[i]), default=None)
    said = {
        "bbox": entry["bbox"],
        "class": classes[entry["category_id"] - 1],
        "score": entry["score"],
        "segmentation": entry["segmentation"],
    }
    if best is None or iou(mask, truth[best]) < MATCH_IOU:
        return {**said, "verdict": "reject"}
    del truth[best]
    cls = classes[annotations[best]["category_id"] - 1]
    return {**said, "verdict": "accept"} | ({"changed_class": cls} if cls != said["class"] else {})


def _drawn(bbox: Sequence[float], sample: Sample, rng: np.random.Generator) -> list[float]:
    """The box as a hand draws it: its sides are off a little."""
    x, y, width, height = bbox
    sides = np.array([x, y, x + width, y + height], float)
    sides += rng.normal(0, HAND, 4) * [width, height, width, height]
    sides = np.clip(sides, 0, [sample.width, sample.height] * 2)
    x1, y1, x2, y2 = np.round(sides, 1).tolist()
    return [x1, y1, max(x2 - x1, 1.0), max(y2 - y1, 1.0)]


if __name__ == "__main__":
    main()
