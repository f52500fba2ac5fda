"""Make a review video: truth and prediction of every image, with a verdict where both are known."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import supervision as sv
from rich.console import Console
from rich.progress import track

from pipeline import record
from pipeline.config import OverlayConfig
from pipeline.data import masks
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.draw import ReviewDrawer
from pipeline.data.matching import match, verdict
from pipeline.data.predictions import PREDICTIONS, from_coco_results, read_images, read_results
from pipeline.data.video import VideoWriter, count_frames, frames, probe
from pipeline.errors import UserError

SEVERITY = {"miss": 0, "wrong class": 0, "false alarm": 1, "hit": 2, "correct": 3}
DEFAULT_THRESHOLD = 0.25
ERRORS = ("miss", "wrong class", "false alarm")
IMAGE_RATE = 10  # frames per second, about, for still images: seeking is smooth, the file small
WIDEST_PANEL = 2.0  # width / height; an image longer or taller than this gets bars


@dataclass(frozen=True)
class Shot:
    """One image of the video to be, without its pixels."""

    name: str
    sample: Sample | None = None  # None: the source has no truth
    verdict: str | None = None  # None: truth or prediction is not known
    overlap: float = 0.0  # mean IoU of the true instances with what found them, 0 for a missed one
    score: float = 0.0  # the highest predicted


@dataclass(frozen=True)
class Reel:
    """What the video shows, and how fast. Pixels are read as `images` is consumed."""

    classes: tuple[str, ...]
    sizes: list[tuple[int, int]]  # (width, height) of the images
    length: int | None  # how many images there are, if that is known beforehand
    images: Iterable[tuple[Shot, np.ndarray]]
    fps: Fraction
    repeat: int  # frames per image


class Predictions:
    """The output folder of `pipeline segment`, cut at a score. Raises `UserError` if it is none.

    Without a `threshold`, images of pooled folds have their own.
    """

    def __init__(self, folder: Path, threshold: float | None) -> None:
        self.folder = folder
        self.classes, images = read_images(folder)
        if not images:
            raise UserError(f"--predictions: expected images in {folder}, found none")
        self._images = {image["file_name"]: image for image in images}
        self._results = read_results(folder / PREDICTIONS)
        found = {e["category_id"] for entries in self._results.values() for e in entries}
        if unknown := found - set(range(1, len(self.classes) + 1)):
            raise UserError(
                f"{folder / PREDICTIONS}: expected category ids from 1 to {len(self.classes)}, "
                f"found {', '.join(map(str, sorted(unknown)))}"
            )
        self._threshold = threshold

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(image["width"], image["height"]) for image in self._images.values()]

    def of(self, name: str, size: tuple[int, int]) -> sv.Detections:
        """Instances of an image of this (width, height). Raises `UserError` if it was not seen."""
        image = self._images.get(name)
        if image is None:
            raise UserError(
                f"--predictions: expected the image {name} in {self.folder}, found none"
            )
        found = image["width"], image["height"]
        if found != size:
            raise UserError(f"--predictions: {name}: expected a size of {size}, found {found}")
        threshold = self._threshold
        if threshold is None:
            threshold = image.get("threshold", DEFAULT_THRESHOLD)
        entries = self._results.get(image["id"], [])
        return from_coco_results([e for e in entries if e["score"] >= threshold])

    @property
    def cut(self) -> str:
        """The score from which instances count, in words."""
        if self._threshold is not None:
            return f"{self._threshold:.3g}"
        found = {i.get("threshold", DEFAULT_THRESHOLD) for i in self._images.values()}
        return f"{min(found):.3g}" if len(found) == 1 else f"{min(found):.3g}–{max(found):.3g}"


def run(config: OverlayConfig) -> None:
    """Write the video `config.out` and, beside it, its record. Raises `UserError` for bad input."""
    _check_out(config)
    is_dataset = (config.source / "annotations" / "instances.json").is_file()
    captions = _captions(config, has_truth=is_dataset)
    predictions = Predictions(config.predictions, config.threshold) if config.predictions else None
    if is_dataset:
        reel = _dataset_reel(config, predictions)
    else:
        assert predictions is not None  # or there would be nothing to caption
        reel = _plain_reel(config, predictions)

    record.record_path(config.out).unlink(missing_ok=True)
    if reel.length == 0:
        config.out.unlink(missing_ok=True)  # with --force, an older run's errors
        print("no errors: no video written")
    else:
        counts = _film(config, reel, captions, predictions)
        if verdicts := [f"{counts[word]} {word}" for word in SEVERITY if counts[word]]:
            print(", ".join(verdicts))
        print(f"video: {config.out} ({counts.total()} images)")
    record.write_record(config.out, "overlay", config)


def _film(
    config: OverlayConfig, reel: Reel, captions: tuple[str, ...], predictions: Predictions | None
) -> Counter[str | None]:
    """Draw and encode image by image. Returns how often each verdict was given."""
    note = (
        f"score from {predictions.cut} · q: mask quality, by SAM's own estimate"
        if predictions and "prediction" in captions
        else ""
    )
    drawer = ReviewDrawer(reel.classes, captions, _panel_size(reel.sizes, config.height), note)
    counts: Counter[str | None] = Counter()
    with VideoWriter.create(config.out, reel.fps) as video:
        images = track(
            reel.images, "overlay", reel.length, console=Console(stderr=True), transient=True
        )
        for shot, image in images:
            size = image.shape[1], image.shape[0]
            panels = []
            for caption in captions:
                if caption == "truth":
                    assert shot.sample is not None
                    instances = _truth(shot.sample)
                else:
                    assert predictions is not None
                    instances = predictions.of(shot.name, size)
                panels.append((instances, _labels(instances, reel.classes)))
            counts[shot.verdict] += 1
            aside = f"{counts.total()} / {reel.length}" if reel.length else f"{counts.total()}"
            if shot.overlap > 0:
                aside = f"IoU {shot.overlap:.2f}   {aside}"
            frame = drawer.draw(image, panels, shot.name, shot.verdict, aside)
            video.write(frame, reel.repeat)
    return counts


def _dataset_reel(config: OverlayConfig, predictions: Predictions | None) -> Reel:
    """A split, in the order asked for. Verdicts are given first, one image's masks at a time."""
    dataset = Dataset(config.source)
    if predictions and predictions.classes != dataset.classes:
        raise UserError(
            f"--predictions: expected the classes {', '.join(dataset.classes)}, "
            f"found {', '.join(predictions.classes)}"
        )
    samples = dataset.split(config.split, config.fold)
    if not samples:
        raise UserError(f"{config.source}: expected images in the split {config.split}, found none")
    shots = [_judge(sample, predictions) for sample in samples]
    if config.only == "errors":
        shots = [shot for shot in shots if shot.verdict in ERRORS]
    shots.sort(key=_by_error if config.order == "error" else _by_class)
    return Reel(
        dataset.classes,
        [(shot.sample.width, shot.sample.height) for shot in shots if shot.sample],
        len(shots),
        ((shot, shot.sample.image()) for shot in shots if shot.sample),
        *_pace(config.seconds_per_image),
    )


def _plain_reel(config: OverlayConfig, predictions: Predictions) -> Reel:
    """A folder or a video, in its own order; a video keeps its frame rate."""
    fps, repeat = _pace(config.seconds_per_image)
    if config.source.is_file():
        fps, repeat = probe(config.source).fps, 1
    return Reel(
        predictions.classes,
        predictions.sizes,
        count_frames(config.source),
        ((Shot(frame.name), frame.image) for frame in frames(config.source)),
        fps,
        repeat,
    )


def _judge(sample: Sample, predictions: Predictions | None) -> Shot:
    if predictions is None:
        return Shot(sample.path.name, sample)
    truth = _truth(sample)
    predicted = predictions.of(sample.path.name, (sample.width, sample.height))
    assert predicted.confidence is not None
    overlaps = [_iou(truth, t, predicted, p) for t, p in match(truth, predicted)]
    return Shot(
        sample.path.name,
        sample,
        verdict(truth, predicted),
        sum(overlaps) / max(len(truth), 1),
        max((float(score) for score in predicted.confidence), default=0.0),
    )


def _truth(sample: Sample) -> sv.Detections:
    return replace(sample).truth  # of a copy: `truth` stays in the sample that it is asked of


def _iou(truth: sv.Detections, t: int, predicted: sv.Detections, p: int) -> float:
    """IoU of two instances: of their masks, or of their boxes where a mask is missing."""
    if truth.mask is None or predicted.mask is None:
        return float(sv.box_iou_batch(truth.xyxy[[t]], predicted.xyxy[[p]])[0, 0])
    return masks.iou(np.asarray(truth.mask[t]), np.asarray(predicted.mask[p]))


def _by_class(shot: Shot) -> tuple[bool, int, str]:
    """Defects in the order of the class list, then good images."""
    label = shot.sample.label if shot.sample else -1
    return label < 0, label, shot.name


def _by_error(shot: Shot) -> tuple[int, float, str]:
    """Worst first: misses and wrong classes, false alarms by falling score, hits by rising IoU."""
    rank = SEVERITY[shot.verdict or "correct"]
    return rank, -shot.score if shot.verdict == "false alarm" else shot.overlap, shot.name


def _labels(instances: sv.Detections, classes: tuple[str, ...]) -> list[str]:
    """'class', for predictions 'class score', and 'q' with the mask's quality if it is known."""
    labels = []
    for i in range(len(instances)):
        assert instances.class_id is not None
        label = classes[instances.class_id[i]]
        if instances.confidence is not None:
            label += f" {instances.confidence[i]:.2f}"
        if "quality" in instances.data and np.isfinite(instances.data["quality"][i]):
            label += f" q {instances.data['quality'][i]:.2f}"
        labels.append(label)
    return labels


def _pace(seconds: float) -> tuple[Fraction, int]:
    """Frames per second, and frames per image so that each stays exactly as long as asked."""
    repeat = max(1, round(seconds * IMAGE_RATE))
    return Fraction(repeat / seconds).limit_denominator(1000), repeat


def _panel_size(sizes: list[tuple[int, int]], height: int) -> tuple[int, int]:
    """(width, height) of a panel with the images' median aspect."""
    aspect = statistics.median(w / h for w, h in sizes)
    return round(height * min(max(aspect, 1 / WIDEST_PANEL), WIDEST_PANEL)), height


def _captions(config: OverlayConfig, has_truth: bool) -> tuple[str, ...]:
    """The panels to show. Raises `UserError` for what source and predictions cannot give."""
    has_predictions = config.predictions is not None
    problems = []
    if not config.source.exists():
        problems.append(f"--source: expected a folder or a video, found nothing at {config.source}")
    elif config.show == "truth" and not has_truth:
        problems.append(f"--show: expected a dataset for 'truth', found none in {config.source}")
    elif not has_predictions and (config.show == "prediction" or not has_truth):
        problems.append(
            "--predictions: expected an output folder of `pipeline segment`, found none"
        )
    elif not (has_truth and has_predictions):
        what = "expected a dataset and predictions for verdicts, found only one of them"
        problems += [f"--order: {what}"] if config.order == "error" else []
        problems += [f"--only: {what}"] if config.only == "errors" else []
    if problems:
        raise UserError(*problems)
    if config.show != "both":
        return (config.show,)
    return ("truth",) * has_truth + ("prediction",) * has_predictions


def _check_out(config: OverlayConfig) -> None:
    if config.out.suffix.lower() != ".mp4":
        raise UserError(f"--out: expected a file ending in .mp4, found {config.out}")
    record.claim_file(config.out, config.force)
