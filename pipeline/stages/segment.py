"""Boxes from a detector, a file or the truth; a pixel mask for each from SAM.

Output folder: predictions.json and images.json (see `pipeline.data.predictions`), masks/ with
--masks, review.csv (masks of low quality) with --review-below, scores.json and heatmaps/ (see
`pipeline.data.heatmaps`) with --anomaly, config.yaml, run.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np
import supervision as sv
from rich.progress import Progress

from pipeline import record
from pipeline.config import SegmentConfig
from pipeline.data import heatmaps, masks, predictions, quality
from pipeline.data.dataset import GOOD, Dataset, Sample
from pipeline.data.files import atomic_path, write_text
from pipeline.data.video import Frame, count_frames, frames
from pipeline.errors import UserError
from pipeline.models.classifier import resized
from pipeline.models.device import torch_device
from pipeline.models.segmenter import Segmenter

if TYPE_CHECKING:  # it needs timm, which is optional
    from pipeline.models.anomaly import Method

COMMAND = "segment"
FindBoxes = Callable[[Frame], sv.Detections]


def run(config: SegmentConfig) -> None:
    dataset = Dataset(config.source) if (config.source / "annotations").is_dir() else None
    find_boxes, classes = _box_source(config, dataset)
    segmenter = Segmenter.load(
        config.sam,
        zoom=config.zoom,
        flip=config.flip,
        device=config.device,
        offline=config.offline,
        cache=config.cache,
        cache_gb=config.cache_gb,
    )
    scorer = None if config.anomaly is None else _scorer(config.anomaly, config, dataset)
    pictures, count = _pictures(config, dataset)
    with record.result(COMMAND, config) as out:
        results: list[dict[str, Any]] = []
        images: list[dict[str, Any]] = []
        scored: list[dict[str, Any]] = []
        with Progress() as progress:
            bar = progress.add_task("segmenting", total=count)
            for frame in pictures:
                found = segmenter.segment(frame.image, find_boxes(frame), config.prompt)
                found = _tidy(_rescored(found, config), config)
                results += predictions.coco_results(frame.image_id, found)
                height, width = frame.image.shape[:2]
                image: dict[str, Any] = {
                    "id": frame.image_id, "file_name": frame.name, "width": width, "height": height,
                }  # fmt: skip
                if scorer is not None:
                    entry = scorer.score(frame, out)
                    scored.append({**image, **entry})
                    image["anomaly"] = {"score": entry["score"], "threshold": scorer.threshold}
                images.append(image)
                if config.masks:
                    # Only .png goes: the masks of a.jpg and a.png must not overwrite one another.
                    name = f"{frame.name.removesuffix('.png')}.png"
                    _write_mask(out / "masks" / name, found, (height, width))
                progress.advance(bar)
        if scorer is not None:
            heatmaps.write_scores(out, scored)
        predictions.write_predictions(out, results, images, classes)
        listed = None
        if config.review_below is not None:
            listed = quality.review_list(results, config.review_below)
            write_text(out / quality.REVIEW, quality.review_csv(listed, images, classes))
        record.write_record(out, COMMAND, config)
    if listed is not None:
        path = config.out / quality.REVIEW
        print(f"{len(listed)} masks under a quality of {config.review_below:g}: {path}")
    print(f"{len(results)} instances in {len(images)} images: {config.out}")


def _pictures(config: SegmentConfig, dataset: Dataset | None) -> tuple[Iterator[Frame], int | None]:
    """The dataset's splits, or whatever the source holds; and how many pictures, if known."""
    if dataset is None:
        return frames(config.source), count_frames(config.source)
    samples = _samples(config, dataset)
    return (Frame(s.image_id, s.path.name, s.image()) for s in samples), len(samples)


def _samples(config: SegmentConfig, dataset: Dataset) -> list[Sample]:
    return [s for split in config.splits for s in dataset.split(split, config.fold)]


@dataclass(frozen=True)
class Scorer:
    """An anomaly detector that looks at the same images."""

    method: Method
    threshold: float
    truth: Mapping[int, Mapping[str, str]]  # split and class by image id, as far as they are known

    def score(self, frame: Frame, out: Path) -> dict[str, Any]:
        """What scores.json has of an image beside its name and size; writes its heat map."""
        pixels = resized(frame.image, self.method.image_size)
        scores, heat_maps = self.method.score(pixels[None])
        return {
            **self.truth.get(frame.image_id, {"split": None, "class": None}),
            "score": float(scores[0]),
            "heat_map": heatmaps.write_heat_map(out, frame.name, heat_maps[0].numpy()),
        }


def _scorer(folder: Path, config: SegmentConfig, dataset: Dataset | None) -> Scorer:
    """The method of a run. Raises `UserError` if it may have learned images of these splits."""
    from pipeline.models import anomaly

    threshold = config.anomaly_threshold
    if threshold is None:
        threshold = heatmaps.read_threshold(folder)
    truth = {}
    if dataset is not None:
        heatmaps.check_dataset(folder, config.fold)
        names = (GOOD, *dataset.classes)
        truth = {
            sample.image_id: {"split": split, "class": names[sample.label + 1]}
            for split in config.splits
            for sample in dataset.split(split, config.fold)
        }
    return Scorer(anomaly.load(folder, torch_device(config.device)), threshold, truth)


def _box_source(
    config: SegmentConfig, dataset: Dataset | None
) -> tuple[FindBoxes, tuple[str, ...]]:
    """Where boxes come from: a function of the frame, and the classes its boxes refer to."""
    if config.boxes == "truth":
        if dataset is None:
            raise UserError(f"--boxes truth: expected a dataset, found {config.source}")
        truth = {
            sample.image_id: [{**a, "score": 1.0} for a in sample.annotations]
            for sample in _samples(config, dataset)
        }
        return _boxes_of(truth, config), dataset.classes
    if config.boxes.endswith(".json"):
        return _boxes_of_file(Path(config.boxes), dataset, config)
    return _detected_boxes(config, dataset)


def _boxes_of(entries: Mapping[int, Sequence[dict[str, Any]]], config: SegmentConfig) -> FindBoxes:
    """The boxes of COCO results by image id, as a detector would give them: the best, in order."""

    def find(frame: Frame) -> sv.Detections:
        found = [e for e in entries.get(frame.image_id, ()) if e["score"] >= config.min_score]
        found = sorted(found, key=lambda entry: -entry["score"])[: config.max_boxes]
        if "masks" not in config.prompt:  # they take time and memory to decode
            found = [{**e, "segmentation": None} for e in found]
        detections = predictions.from_coco_results(found)
        if "points" in config.prompt:
            detections.data["points"] = [np.reshape(e.get("points", ()), (-1, 3)) for e in found]
        return detections

    return find


def _boxes_of_file(
    path: Path, dataset: Dataset | None, config: SegmentConfig
) -> tuple[FindBoxes, tuple[str, ...]]:
    """Boxes of a COCO results file; its classes are the dataset's, or those of its images.json."""
    entries = predictions.read_results(path, config.prompt)
    classes = dataset.classes if dataset else predictions.read_images(path.parent)[0]
    largest = max((e["category_id"] for group in entries.values() for e in group), default=1)
    if largest > len(classes):
        raise UserError(f"{path}: expected category ids up to {len(classes)}, found {largest}")
    find = _boxes_of(entries, config)

    def check(image_id: int, shape: tuple[int, int]) -> None:
        predictions.check_prompts(path, entries.get(image_id, ()), config.prompt, shape)

    def find_checked(frame: Frame) -> sv.Detections:
        check(frame.image_id, frame.image.shape[:2])
        return find(frame)

    for sample in _samples(config, dataset) if dataset else ():  # before anything is written
        check(sample.image_id, (sample.height, sample.width))
    return find_checked, classes


def _detected_boxes(
    config: SegmentConfig, dataset: Dataset | None
) -> tuple[FindBoxes, tuple[str, ...]]:
    """Boxes of a detector; where there is a dataset, with that dataset's class indices."""
    from pipeline.models import yolo_world

    model = yolo_world.load_model(config.boxes, offline=config.offline)
    detector = yolo_world.Detector(
        model,
        config.image_size,
        torch_device(config.device),
        scales=config.scales,
        flip=config.flip,
    )
    classes = dataset.classes if dataset else detector.classes
    unknown = [name for name in detector.classes if name not in classes]
    if unknown:
        raise UserError(
            f"--boxes: expected a detector of {', '.join(classes)}, found one of "
            f"{', '.join(detector.classes)}"
        )
    index = np.array([classes.index(name) for name in detector.classes])

    def find(frame: Frame) -> sv.Detections:
        found = detector.detect(frame.image, config.min_score, config.max_boxes)
        found.class_id = index[found.class_id]
        return found

    return find, classes


def _rescored(found: sv.Detections, config: SegmentConfig) -> sv.Detections:
    """What a detector has found, by falling product of its score and the mask's predicted IoU.

    As in Mask Scoring R-CNN (Huang et al., CVPR 2019, arXiv 1903.00241). Boxes of a file keep their
    scores: they may have been through this before.
    """
    if not config.rescore or config.boxes == "truth" or config.boxes.endswith(".json"):
        return found
    found.confidence = np.asarray(found.confidence) * found.data["quality"]
    order = np.argsort(-found.confidence, kind="stable")
    return cast(sv.Detections, found[order])  # its type also allows for keys of the data


def _tidy(found: sv.Detections, config: SegmentConfig) -> sv.Detections:
    """Change masks and boxes as `clean_below`, `overlaps` and `fit_boxes` ask, in that order."""
    if found.mask is None:
        return found
    if config.clean_below:
        found.mask = np.stack([masks.clean(mask, config.clean_below) for mask in found.mask])
    if config.overlaps == "resolve":
        found.mask = masks.resolve_overlaps(
            np.asarray(found.mask), np.asarray(found.class_id), np.asarray(found.confidence)
        )
    if config.fit_boxes and config.boxes != "truth":
        found.xyxy = masks.fitted_boxes(np.asarray(found.mask), found.xyxy)
    return found


def _write_mask(path: Path, found: sv.Detections, shape: tuple[int, int]) -> None:
    """A PNG whose pixels are category ids, 0 where there is no defect.

    The highest score wins; of equal ones, the earliest.
    """
    labels = np.zeros(shape, np.uint8)
    instances, classes = np.asarray(found.mask), np.asarray(found.class_id)
    for i in np.argsort(-np.asarray(found.confidence), kind="stable")[::-1]:
        labels[instances[i]] = classes[i] + 1
    with atomic_path(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", labels)[1].tobytes())
