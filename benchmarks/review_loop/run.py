"""Does a review make the next detector better? The whole loop on rendered transistors.

    python benchmarks/review_loop/run.py

A detector is weakened on purpose: most of its training images have lost their labels, so that it is
trained to see nothing there. It is run on those images; a scripted reviewer, who knows the hidden
truth, judges what it says; `pipeline apply-review` makes a new version of the dataset, and a
detector is trained on it as the first one was. Both are measured on the same test images, whose
labels are complete, beside one that was trained on the complete labels.

results.json and results.md go beside this file. An interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from pipeline.config import (
    ApplyReviewConfig,
    ConvertConfig,
    EvaluateConfig,
    FinetuneYoloConfig,
    SegmentConfig,
    StageConfig,
    SynthConfig,
)
from pipeline.data import dataset_folder, predictions
from pipeline.data.coco import Instance, Item
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.files import atomic_folder, read_json, write_json, write_text
from pipeline.data.masks import decode_rle, iou
from pipeline.data.matching import MATCH_IOU

HERE = Path(__file__).parent
SIZE = 320  # pixels, of the rendered images and of what the detector sees
KEPT = 1  # labelled training images of each class
EPOCHS = 12
REVIEWED_FROM = 0.1  # score of the predictions that are shown to the reviewer
HAND = 0.05  # how far the sides of a drawn box are off, in box sizes (standard deviation)
COMMAND = "python benchmarks/review_loop/run.py"
DETECTORS = {
    "weakened": "trained on the dataset that lacks most labels",
    "after the review": "trained on the new version",
    "complete labels": "trained on what the first dataset had before its labels were hidden",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-review-loop"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    with common.problems_as_lines("benchmarks/review_loop/run.py"):
        runs = [loop(arguments.out / f"seed{seed}", seed) for seed in arguments.seeds]
    result = {
        **common.made_by(COMMAND),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        "settings": {
            "size": SIZE,
            "labelled_images_per_class": KEPT,
            "epochs": EPOCHS,
            "reviewed_from_score": REVIEWED_FROM,
            "hand": HAND,
        },
        "detectors": DETECTORS,
        "seeds": dict(zip(map(str, arguments.seeds), runs, strict=True)),
    }
    write_json(HERE / "results.json", result)
    write_text(HERE / "results.md", _table(result))
    print((HERE / "results.md").read_text(encoding="utf-8"))


def loop(out: Path, seed: int) -> dict[str, Any]:
    """The loop once: the figures of each detector, and what the review said."""
    mvtec, complete, weak, better = (out / n for n in ("mvtec", "complete", "weak", "reviewed"))
    _run("synth", SynthConfig(
        out=mvtec, train_good=40, test_good=20, per_defect=24, size=SIZE, seed=seed
    ))  # fmt: skip
    _run("convert", ConvertConfig(
        source=mvtec, out=complete, fractions=(0.5, 0.1, 0.4), seed=seed
    ))  # fmt: skip
    hide_labels(complete, weak, seed)
    _run("finetune-yolo", _training(weak, out / "weak-detector", seed))
    _run("segment", SegmentConfig(
        source=weak, splits=("train",), boxes=str(out / "weak-detector" / "detector.pt"),
        min_score=REVIEWED_FROM, out=out / "to-review",
    ))  # fmt: skip
    said = review(complete, weak, out / "to-review", seed)
    write_json(out / "review.json", said)
    _run("apply-review", ApplyReviewConfig(review=out / "review.json", data=weak, out=better))
    _run("finetune-yolo", _training(better, out / "better-detector", seed))
    _run("finetune-yolo", _training(complete, out / "complete-detector", seed))
    detectors = dict(zip(DETECTORS, ("weak", "better", "complete"), strict=True))
    return {
        "labels": {
            name: sum(len(s.annotations) for s in Dataset(data).split("train"))
            for name, data in zip(DETECTORS, (weak, better, complete), strict=True)
        },
        "review": read_json(better / "manifest.json")["reviews"][-1]["summary"],
        "test": {name: measure(complete, out, f"{d}-detector") for name, d in detectors.items()},
    }


def _training(data: Path, out: Path, seed: int) -> FinetuneYoloConfig:
    """The same for all detectors, but for the labels."""
    return FinetuneYoloConfig(
        data=data, out=out, model="yolo-world-n", epochs=EPOCHS, image_size=SIZE, seed=seed,
        text="learned", unseen_prompts=(), offline=True,
    )  # fmt: skip


def measure(data: Path, out: Path, detector: str) -> dict[str, Any]:
    """A detector's figures on the test images of the complete dataset."""
    found, measured = out / f"{detector}-predictions", out / f"{detector}-evaluation"
    _run("segment", SegmentConfig(
        source=data, boxes=str(out / detector / "detector.pt"), out=found
    ))  # fmt: skip
    _run("evaluate", EvaluateConfig(data=data, predictions=found, out=measured, published=False))
    metrics = read_json(measured / "metrics.json")
    return {
        "box_map50": metrics["box"]["map50"],
        "box_map50_interval": metrics["intervals"]["box.map50"],
        "mask_map50": metrics["mask"]["map50"],
        "false_alarms_per_good_image": metrics["good_images"]["false_alarms_per_image"],
        "training_seconds": common.timing_of(out / detector)["seconds"],
    }


def _run(command: str, options: StageConfig) -> None:
    common.run_stage(
        (common.pipeline(command), options), int(os.environ.get("OMP_NUM_THREADS") or 0) or 2
    )


# ---- What a person would do --------------------------------------------------------------------


def hide_labels(complete: Path, out: Path, seed: int) -> None:
    """A copy of a dataset that has labels on `KEPT` training images of each class alone."""
    if (out / dataset_folder.MANIFEST).is_file():
        return
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


def review(complete: Path, weak: Path, found: Path, seed: int) -> dict[str, Any]:
    """What a careful reviewer says of the predictions, in the format of the report page.

    A prediction is right if its mask overlaps a true one by an IoU of `MATCH_IOU`, the best-scored
    of several; one of another class gets the true class. The rest is rejected, and a box is drawn,
    not quite exactly, around every defect that is left.
    """
    rng = np.random.default_rng(seed)
    dataset = Dataset(complete)
    results = predictions.read_results(found / predictions.PREDICTIONS)
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
    return {
        "format": "pipeline-review",
        "version": 1,
        "dataset": weak.name,
        "classes": list(dataset.classes),
        "images": images,
    }


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


# ---- Results -----------------------------------------------------------------------------------


def _table(result: dict[str, Any]) -> str:
    lines = [
        "| seed | detector | labels in training | box mAP50 | 95 % interval | mask mAP50 | "
        "false alarms per good image |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for seed, run in result["seeds"].items():
        for name, test in run["test"].items():
            low, high = test["box_map50_interval"]
            lines.append(
                f"| {seed} | {name} | {run['labels'][name]} | {test['box_map50']:.2f} | "
                f"{low:.2f} to {high:.2f} | {test['mask_map50']:.2f} | "
                f"{test['false_alarms_per_good_image']:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
