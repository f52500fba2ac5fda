"""Which images a video shows, in which order, for how long, and with which verdicts.

All is settled without the images' pixels, which are read one after the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv

from pipeline.config import OverlayConfig
from pipeline.data import masks, stored
from pipeline.data.coco import read_coco
from pipeline.data.dataset import GOOD, Dataset, Sample
from pipeline.data.files import list_images, read_image
from pipeline.data.matching import match, verdict
from pipeline.data.overlay.predicted import Predictions
from pipeline.data.video import count_frames, frames, probe
from pipeline.data.writers import Chapter
from pipeline.errors import UserError

SEVERITY = {"miss": 0, "wrong class": 0, "false alarm": 1, "hit": 2, "correct": 3}
RANKS = ("misses and wrong classes", "false alarms", "hits", "correct")
ERRORS = ("miss", "wrong class", "false alarm")
ANNOTATED = ("dataset", "COCO file")  # the sources that have truth
IMAGE_RATE = 10  # frames per second, about, for still images: seeking is smooth, the file small


@dataclass(frozen=True)
class Shot:
    """One image of the video to be, without its pixels."""

    name: str
    image_id: int  # in the source
    path: Path | None = None  # None: a frame of a video
    sample: Sample | None = None  # None: the source has no truth
    label: int = -1  # class of the image: the true one, else that of the surest box; -1: good
    verdict: str | None = None  # None: truth or prediction is not known
    overlap: float = 0.0  # mean IoU of the true instances with what found them, 0 for a missed one
    score: float = 0.0  # the highest predicted


@dataclass(frozen=True)
class Reel:
    """What the video shows, and how fast."""

    classes: tuple[str, ...]
    sizes: list[tuple[int, int]]  # (width, height) of the images
    shots: list[Shot] | None  # None: they come from a video
    pictures: Iterable[tuple[Shot, np.ndarray, int]]  # with the frames that each stays
    length: int | None  # how many there are, if that is known beforehand
    fps: Fraction
    repeat: int  # frames per image, 0 for a video


def kind_of(source: Path) -> str:
    """'dataset', 'COCO file', 'folder' or 'video'. Raises `UserError` when nothing is there."""
    if not source.exists():
        raise UserError(
            "--source: expected a dataset, a COCO file, a folder of images or a video, "
            f"found nothing at {source}"
        )
    if source.is_dir():
        return "dataset" if (source / "annotations" / "instances.json").is_file() else "folder"
    return "COCO file" if source.suffix.lower() == ".json" else "video"


def annotated_reel(config: OverlayConfig, predictions: Predictions | None) -> Reel:
    """The images of a split or a COCO file, with verdicts, one image's masks at a time.

    Raises `UserError` where there are none, or predictions are of other classes or images.
    """
    if config.source.is_file():
        classes, samples = read_coco(config.source, config.images)
    else:
        dataset = Dataset(config.source)
        classes, samples = dataset.classes, dataset.split(config.split, config.fold)
        if predictions and config.fold != "all":
            stored.check_fold(predictions.path, config.fold)
    if predictions and predictions.classes is None:
        predictions.check_ids(len(classes))
    elif predictions and predictions.classes != classes:
        raise UserError(
            f"--predictions: expected the classes {', '.join(classes)}, "
            f"found {', '.join(predictions.classes or ())}"
        )
    if not samples:
        raise UserError(f"{config.source}: expected images in the split {config.split}, found none")
    keeps = _filter(config.only, classes)
    shots = [
        shot
        for sample in samples
        if keeps(shot := _judge(sample, predictions), _class_ids(shot, predictions))
    ]
    shots.sort(key=ORDERS[config.order or "class"])
    sizes = [(shot.sample.width, shot.sample.height) for shot in shots if shot.sample]
    return _image_reel(config, classes, sizes, shots)


def plain_reel(config: OverlayConfig, kind: str, predictions: Predictions) -> Reel:
    """The images of a folder, or the frames of a video in their order.

    Raises `UserError` where there are none, or predictions are of other images.
    """
    if predictions.classes is None:
        raise UserError(
            "--predictions: expected an output folder of `pipeline segment` for "
            f"{config.source}, found the file {predictions.path}"
        )
    keeps = _filter(config.only, predictions.classes)
    if kind == "folder":
        paths = list_images(config.source)
        if not paths:
            raise UserError(f"{config.source}: expected a folder of images, found none in it")
        shots = [_guess(path.name, i, path, predictions) for i, path in enumerate(paths, start=1)]
        shots = [shot for shot in shots if keeps(shot, _class_ids(shot, predictions))]
        shots.sort(key=ORDERS[config.order or "file"])
        return _image_reel(config, predictions.classes, predictions.sizes, shots)
    rate = probe(config.source).fps
    fps = rate if config.fps is None else Fraction(config.fps).limit_denominator(1001)

    def pictures() -> Iterator[tuple[Shot, np.ndarray, int]]:
        shown = 0  # frames of the source
        for frame in frames(config.source):
            shot = _guess(frame.name, frame.image_id, None, predictions)
            if keeps(shot, _class_ids(shot, predictions)):
                shown += 1
                repeat = math.ceil(shown * fps / rate) - math.ceil((shown - 1) * fps / rate)
                yield shot, frame.image, repeat

    length = None if config.only else count_frames(config.source)
    return Reel(predictions.classes, predictions.sizes, None, pictures(), length, fps, 0)


def _image_reel(
    config: OverlayConfig,
    classes: tuple[str, ...],
    sizes: list[tuple[int, int]],
    shots: list[Shot],
) -> Reel:
    fps, repeat = _pace(config)
    pictures = ((shot, read_image(shot.path), repeat) for shot in shots if shot.path)
    return Reel(classes, sizes, shots, pictures, len(shots), fps, repeat)


def _judge(sample: Sample, predictions: Predictions | None) -> Shot:
    shot = Shot(sample.path.name, sample.image_id, sample.path, sample, sample.label)
    if predictions is None:
        return shot
    truth = truth_of(sample)
    predicted = predictions.of(shot.name, shot.image_id, (sample.width, sample.height))
    overlaps = [_iou(truth, t, predicted, p) for t, p in match(truth, predicted)]
    return replace(
        shot,
        verdict=verdict(truth, predicted),
        overlap=sum(overlaps) / max(len(truth), 1),
        score=_best(predicted.confidence),
    )


def _guess(name: str, image_id: int, path: Path | None, predictions: Predictions) -> Shot:
    """An image without truth: it shows what its surest box says."""
    best = max(predictions.entries(name, image_id), key=lambda e: float(e["score"]), default=None)
    if best is None:
        return Shot(name, image_id, path)
    return Shot(name, image_id, path, label=best["category_id"] - 1, score=best["score"])


def truth_of(sample: Sample) -> sv.Detections:
    return replace(sample).truth  # of a copy: `truth` stays in the sample that it is asked of


def _iou(truth: sv.Detections, t: int, predicted: sv.Detections, p: int) -> float:
    """IoU of two instances: of their masks, or of their boxes where a mask is missing."""
    if truth.mask is None or predicted.mask is None:
        return float(sv.box_iou_batch(truth.xyxy[[t]], predicted.xyxy[[p]])[0, 0])
    return masks.iou(np.asarray(truth.mask[t]), np.asarray(predicted.mask[p]))


def _best(scores: np.ndarray | None) -> float:
    return 0.0 if scores is None else float(scores.max(initial=0.0))


def _class_ids(shot: Shot, predictions: Predictions | None) -> set[int]:
    """Category ids of what an image shows, in truth or prediction; empty for a good one."""
    found = list(shot.sample.annotations) if shot.sample else []
    found += predictions.entries(shot.name, shot.image_id) if predictions else []
    return {entry["category_id"] for entry in found}


def _filter(only: Sequence[str], classes: Sequence[str]) -> Callable[[Shot, set[int]], bool]:
    """Whether an image is shown, given its category ids. Raises `UserError` for other classes."""
    names = [item.removeprefix("class=") for item in only if item != "errors"]
    if unknown := [name for name in names if name not in (*classes, GOOD)]:
        known = ", ".join((*classes, GOOD))
        raise UserError(f"--only: expected one of the classes {known}, found {unknown[0]}")
    wanted = {classes.index(name) + 1 for name in names if name in classes}

    def keeps(shot: Shot, found: set[int]) -> bool:
        if "errors" in only and shot.verdict not in ERRORS:
            return False
        return not names or bool(found & wanted) or (not found and GOOD in names)

    return keeps


def _by_class(shot: Shot) -> tuple[bool, int, str]:
    """Defects in the order of the class list, then good images."""
    return shot.label < 0, shot.label, shot.name


def _by_score(shot: Shot) -> tuple[float, str]:
    return -shot.score, shot.name


def _worst_first(shot: Shot) -> tuple[int, float, str]:
    """Misses and wrong classes, false alarms by falling score, hits by rising IoU."""
    rank = SEVERITY[shot.verdict or "correct"]
    return rank, -shot.score if shot.verdict == "false alarm" else shot.overlap, shot.name


ORDERS: dict[str, Callable[[Shot], Any]] = {
    "file": lambda shot: shot.name,
    "class": _by_class,
    "score": _by_score,
    "worst": _worst_first,
}


def _pace(config: OverlayConfig) -> tuple[Fraction, int]:
    """Frames per second, and frames per image. Raises `UserError` if there would be none.

    Where the rate is not given, it is such that each image stays exactly as long as asked.
    """
    seconds, least = config.seconds_per_image, 2 if config.layout == "blink" else 1
    if config.fps is None:
        repeat = max(least, round(seconds * IMAGE_RATE))
        return Fraction(repeat / seconds).limit_denominator(1000), repeat
    fps = Fraction(config.fps).limit_denominator(1001)
    if seconds * fps < least:
        raise UserError(
            f"--fps: expected {least} or more frames per image, found {config.fps:g} x {seconds:g}"
        )
    return fps, round(seconds * fps)


def chapters(config: OverlayConfig, reel: Reel, card: int) -> list[Chapter]:
    """Chapters for the title card and each class; worst first, for each rank of verdicts.

    Without such an order, as by score, classes come again and again: then there are none.
    """
    if reel.shots is None:
        return []
    if config.order == "worst":
        names = [RANKS[SEVERITY[shot.verdict or "correct"]] for shot in reel.shots]
    else:
        names = [GOOD if shot.label < 0 else reel.classes[shot.label] for shot in reel.shots]
    runs = [(name, len(list(same))) for name, same in itertools.groupby(names)]
    if len(runs) > len(set(names)):
        return []
    title = [Chapter("title", card)] if card else []
    return title + [Chapter(name, reel.repeat * count) for name, count in runs]


def moments(config: OverlayConfig, reel: Reel) -> list[dict[str, Any]]:
    """When each image comes, in seconds; none for a video, whose frames have a time already.

    It is the middle of the image's first frame: a player that seeks there surely shows it.
    """
    first = card_frames(config, reel)
    return [
        {
            "image_id": shot.image_id,
            "file_name": shot.name,
            "seconds": round(float((first + i * reel.repeat + Fraction(1, 2)) / reel.fps), 4),
        }
        for i, shot in enumerate(reel.shots or ())
    ]


def card_frames(config: OverlayConfig, reel: Reel) -> int:
    return round(config.title_seconds * reel.fps)
