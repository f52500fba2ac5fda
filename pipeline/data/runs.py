"""What a run says of images, read so that runs of any kind can be measured by the same code.

A run is the output folder of one of `COMMANDS`; its run.json says of which. Every kind scores
images: the higher, the less an image is like a good one.

    command              score of an image             score of a pixel             also
    detect-anomaly       its own                       its own heat map
    finetune-classifier, 1 - P(good)                                                names classes
    finetune-head
    segment              highest score of its boxes,   highest score of the masks   names classes
                         0 without boxes               that hold it, else 0         and localises
    segment --anomaly    how probably it is defective, by both, see pipeline/data/joint_decision.py;
                         all else as without
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import record
from pipeline.config import read_yaml
from pipeline.data import costs, heatmaps, joint_decision, stored
from pipeline.data.dataset import Sample
from pipeline.data.decision import read_probabilities
from pipeline.data.evaluation.thresholds import DEFAULT_THRESHOLD, best_threshold
from pipeline.data.metrics import decide
from pipeline.data.predictions import Predictions, mismatches, read_images, read_predictions
from pipeline.data.provenance import Step, trace
from pipeline.data.stored import Stored
from pipeline.errors import UserError


@dataclass(frozen=True)
class Pixels:
    """Scores of pixels."""

    low: float  # no score is lower
    high: float  # no score is higher
    of: Callable[[Sample], np.ndarray]  # (height, width) float


@dataclass(frozen=True)
class Answers:
    """What a run says of the images that are measured and of those that thresholds come from."""

    method: str
    needs: str  # the truth it learns from: labels, boxes, masks, or none but good images
    scores: Mapping[int, float]  # by image id
    pixels: Pixels | None
    decisions: np.ndarray | None  # (measured images,) good is 0, the classes follow
    predictions: Predictions | None
    threshold: float | None  # score from which a box counts
    training_seconds: float | None
    seconds_per_image: float | None


class _Options(Stored):
    """What is read of the config.yaml of `pipeline segment`."""

    boxes: str
    sam: str


def read(
    folder: Path,
    fold: int | None,
    classes: Sequence[str],
    samples: Sequence[Sample],
    val: Sequence[Sample],
) -> Answers:
    """What a run says of `samples` and, as far as it has seen them, of `val`.

    Raises `UserError` for a folder that is not a run's, or whose run is of another fold or of other
    images.
    """
    made = folder / "run.json"
    if not made.is_file():
        raise UserError(
            f"{folder}: expected a finished run of {', '.join(COMMANDS)}, found no run.json there"
        )
    command = record.read(folder).command
    if command not in COMMANDS:
        raise UserError(f"{made}: expected a run of {', '.join(COMMANDS)}, found {command!r}")
    stored.check_fold(folder, fold)
    return COMMANDS[command](folder, classes, samples, val)


def _read_anomaly(
    folder: Path, classes: Sequence[str], samples: Sequence[Sample], val: Sequence[Sample]
) -> Answers:
    made = heatmaps.read_metrics(folder)
    if made.protocol != "dataset":
        raise UserError(
            f"{folder}: expected a run on a dataset folder, found one on an MVTec category, whose "
            "own protocol has other splits"
        )
    path = folder / heatmaps.SCORES
    scored = {its.image_id: its for its in heatmaps.read_scores(folder)}
    images = [
        {"id": s.image_id, "file_name": s.file_name, "width": s.width, "height": s.height}
        for s in scored.values()
    ]
    _check(path, images, [*samples, *(s for s in val if s.image_id in scored)])
    return Answers(
        method=made.method,
        needs="good images",
        scores={image_id: its.score for image_id, its in scored.items()},
        pixels=Pixels(
            min(its.low for its in scored.values()),
            max(its.high for its in scored.values()),
            lambda sample: scored[sample.image_id].heat_map(),
        ),
        decisions=None,
        predictions=None,
        threshold=None,
        training_seconds=made.seconds.training,
        seconds_per_image=made.seconds.inference_per_image,
    )


def _read_classifier(
    folder: Path, classes: Sequence[str], samples: Sequence[Sample], val: Sequence[Sample]
) -> Answers:
    found = read_probabilities(folder, classes, samples)
    made = record.read(folder)
    return Answers(
        method=found.name,
        needs="labels",
        scores={image_id: 1 - float(of[0]) for image_id, of in found.of_image.items()},
        pixels=None,
        decisions=found.decisions(samples),
        predictions=None,
        threshold=None,
        training_seconds=made.seconds,
        seconds_per_image=made.seconds_per_image,
    )


def _read_detector(
    folder: Path, classes: Sequence[str], samples: Sequence[Sample], val: Sequence[Sample]
) -> Answers:
    if _options(folder).boxes == "truth":
        raise UserError(f"{folder}: expected masks of a detector's boxes, found those of true ones")
    found = read_predictions(folder, classes, samples, val)
    seen = val if found.images.issuperset(sample.image_id for sample in val) else ()
    best = best_threshold(seen, found)
    threshold = best[0] if best else DEFAULT_THRESHOLD
    known = [*samples, *seen]
    scores = np.maximum(costs.image_scores(known, found.results), 0)
    decisions = [decide(found.of(s, threshold, masks=False)) + 1 for s in samples]
    joint = None
    if found.anomaly.keys() >= {sample.image_id for sample in samples}:
        joint = joint_decision.judge(samples, seen, found, found.anomaly)
    if joint is not None:
        scores = np.concatenate([joint.probabilities, joint.on_val])
        decisions = list(joint.decisions)
    masked = all("segmentation" in e for s in known for e in found.results.get(s.image_id, ()))
    trainings = _trainings(folder)
    seconds = record.read(folder).seconds
    return Answers(
        method="YOLO-World + SAM" + (" + anomaly" if joint is not None else ""),
        needs="masks" if any(map(_learns_masks, trainings)) else "boxes",
        scores={s.image_id: float(score) for s, score in zip(known, scores, strict=True)},
        pixels=Pixels(0, 1, lambda sample: _best_score(found, sample)) if masked else None,
        decisions=np.array(decisions, int),
        predictions=found,
        threshold=threshold,
        training_seconds=_sum([None if t is None else t.seconds for t in trainings]),
        seconds_per_image=None if seconds is None else seconds / len(read_images(folder)[1]),
    )


COMMANDS: Mapping[str, Callable[..., Answers]] = {
    "detect-anomaly": _read_anomaly,
    "finetune-classifier": _read_classifier,
    "finetune-head": _read_classifier,
    "segment": _read_detector,
}


def _check(path: Path, images: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> None:
    """Raise `UserError` with the first image that a run has not seen, or has seen as another."""
    if problems := mismatches(path, images, samples):
        raise UserError(stored.first_of(problems))


def _best_score(predictions: Predictions, sample: Sample) -> np.ndarray:
    """(height, width) the best score of the masks that hold a pixel, 0 where there are none."""
    found = predictions.of(sample)
    heat = np.zeros((sample.height, sample.width), np.float32)
    if found.mask is not None and found.confidence is not None:
        for mask, score in zip(np.asarray(found.mask), found.confidence, strict=True):
            heat[mask] = np.maximum(heat[mask], score)
    return heat


def _trainings(folder: Path) -> list[Step | None]:
    """The trainings of the detector and of the segmenter of a run of `segment`.

    None for one whose record cannot be found; weights of the registry need none.
    """
    steps = {Path(step.folder): step for step in trace(folder).steps}
    options = _options(folder)
    found: list[Step | None] = []
    for path in (Path(options.boxes).resolve(), Path(options.sam).resolve()):
        if path.is_file():  # a checkpoint in a run's folder, or in one below it
            step = steps.get(path.parent, steps.get(path.parent.parent))
            boxes_of_run = step is not None and step.command == "segment"
            found += _trainings(path.parent) if boxes_of_run else [step]
        elif path.suffix:  # no name of the registry, so a file that is gone
            found.append(None)
    return found


def _options(folder: Path) -> _Options:
    path = folder / "config.yaml"
    return stored.check(path, read_yaml(path), _Options, "the options of `pipeline segment`")


def _learns_masks(training: Step | None) -> bool:
    """Pasting defects needs their masks too."""
    if training is None or training.command != "finetune-yolo":
        return training is not None
    return bool(training.options.get("paste") and training.options.get("augment"))


def _sum(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None
