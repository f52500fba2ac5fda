"""Measures of boxes and masks against the truth, and bootstrap intervals.

Average precision is pycocotools' (COCO: 101 recall points, IoU 0.50 to 0.95), for all areas and at
most 100 predictions per image and class. A measure that the truth does not define, such as the AP
of a class without truth, is NaN.

Bootstrap: images are drawn with replacement, and a resample is a row of counts, how often each
image was drawn. The interval is the percentile interval (Efron & Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import ArrayLike
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.data.box_errors import BoxErrors, box_errors
from pipeline.data.dataset import Sample
from pipeline.data.masks import dice, iou
from pipeline.data.matching import Verdict, match, verdict

# Average precision


def coco_evaluation(
    samples: Sequence[Sample],
    results: Mapping[int, Sequence[Mapping[str, Any]]],
    classes: int,
    kind: Literal["bbox", "segm"],
) -> COCOeval:
    """pycocotools' evaluation, accumulated. `results` are COCO results by image id.

    Images are numbered by their place in `samples`, annotations from 1: pycocotools takes a matched
    id of 0 for no match.
    """
    images = [{"id": i, "height": s.height, "width": s.width} for i, s in enumerate(samples)]
    categories = [{"id": k} for k in range(1, classes + 1)]

    def coco(entries: list[list[dict[str, Any]]]) -> COCO:
        annotations = [{**e, "image_id": i} for i, of_image in enumerate(entries) for e in of_image]
        index = COCO()
        index.dataset = {
            "images": images,
            "categories": categories,
            "annotations": [{**a, "id": number} for number, a in enumerate(annotations, start=1)],
        }
        index.createIndex()
        return index

    truth = [[{**a, "iscrowd": 0} for a in sample.annotations] for sample in samples]
    predicted = [
        [{**e, "area": e["bbox"][2] * e["bbox"][3]} for e in results.get(sample.image_id, ())]
        for sample in samples
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco(truth), coco(predicted), kind)
        evaluation.params.areaRng = [[0, float("inf")]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def average_precisions(evaluation: COCOeval) -> np.ndarray:
    """AP by (IoU threshold, class); NaN for a class without truth."""
    precision = evaluation.eval["precision"][:, :, :, 0, 0]  # threshold, recall, class
    return np.where(precision[:, 0] < 0, np.nan, precision.mean(axis=1))


def resampled_average_precisions(evaluation: COCOeval, counts: np.ndarray) -> np.ndarray:
    """AP by (resample, IoU threshold, class) for resamples of the images; NaN without truth.

    Images are matched once, in `coco_evaluation`; a resample accumulates the drawn images' matches.
    """
    images, classes = len(evaluation.params.imgIds), len(evaluation.params.catIds)
    resample = copy.copy(evaluation)  # shallow: the evaluation itself keeps its images
    result = np.empty((len(counts), len(evaluation.params.iouThrs), classes))
    with contextlib.redirect_stdout(io.StringIO()):
        for r, row in enumerate(counts):
            drawn = np.repeat(np.arange(images), row)
            resample.evalImgs = [
                evaluation.evalImgs[k * images + i] for k in range(classes) for i in drawn
            ]
            resample.accumulate()
            result[r] = average_precisions(resample)
    return result


def mean_average_precisions(ap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """mAP50 and mAP50-95 of (..., IoU threshold, class): the mean over classes with truth."""
    return nanmean(ap[..., 0, :]), nanmean(nanmean(ap))


def nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN, without a warning, where nothing is."""
    defined = np.count_nonzero(~np.isnan(values), axis=-1)
    return np.where(defined, np.nansum(values, axis=-1) / np.maximum(defined, 1), np.nan)


# One image at a score threshold


@dataclass(frozen=True)
class ImageResult:
    """What predictions, cut at the threshold, make of one image with n true instances."""

    verdict: Verdict
    decision: int  # class index of the highest-scoring box, -1 (good) without boxes
    boxes: int
    matched: np.ndarray  # (n,) bool
    iou: np.ndarray  # (n,) of the masks of the matched pairs; 0 for an unmatched instance
    dice: np.ndarray  # (n,) likewise
    pixels: np.ndarray  # (classes, 2): intersection and union of the masks of each class
    errors: BoxErrors


def measure_image(truth: sv.Detections, predicted: sv.Detections, classes: int) -> ImageResult:
    """Compare an image's predictions with its truth; without predicted masks IoU and Dice are 0."""
    matched = np.zeros(len(truth), bool)
    overlap, coefficient = np.zeros(len(truth)), np.zeros(len(truth))
    for t, p in match(truth, predicted):
        matched[t] = True
        if truth.mask is not None and predicted.mask is not None:
            overlap[t] = iou(truth.mask[t], predicted.mask[p])
            coefficient[t] = dice(truth.mask[t], predicted.mask[p])
    pixels = np.array([_pixels(truth, predicted, k) for k in range(classes)]).reshape(classes, 2)
    return ImageResult(
        verdict(truth, predicted),
        decide(predicted),
        len(predicted),
        matched,
        overlap,
        coefficient,
        pixels,
        box_errors(truth, predicted),
    )


def decide(predicted: sv.Detections) -> int:
    """The image's class by its boxes: that of the highest score, or -1 (good) without boxes."""
    if not len(predicted):
        return -1
    assert predicted.class_id is not None and predicted.confidence is not None
    return int(predicted.class_id[np.argmax(predicted.confidence)])


def _pixels(truth: sv.Detections, predicted: sv.Detections, class_id: int) -> tuple[int, int]:
    """Pixels in the intersection and in the union of both sides' masks of a class."""
    true, found = (_union(side, class_id) for side in (truth, predicted))
    if true is None or found is None:
        only = true if found is None else found
        return 0, 0 if only is None else int(np.count_nonzero(only))
    return int(np.count_nonzero(true & found)), int(np.count_nonzero(true | found))


def _union(detections: sv.Detections, class_id: int) -> np.ndarray | None:
    if detections.mask is None or detections.class_id is None:
        return None
    of_class = detections.class_id == class_id
    return np.asarray(detections.mask)[of_class].any(axis=0) if of_class.any() else None


# Recall at a rate of false alarms


@dataclass(frozen=True)
class Finds:
    """Scores of what was found, whatever the threshold, on the images of a split."""

    instance_images: np.ndarray  # (true instances,) place of the instance's image
    instance_scores: np.ndarray  # (true instances,) score of the box that found it, or -inf
    alarm_images: np.ndarray  # (boxes on good images,) place of the image
    alarm_scores: np.ndarray  # (boxes on good images,)


def find(truths: Sequence[sv.Detections], predictions: Sequence[sv.Detections]) -> Finds:
    """The scores of every image's finds and false alarms; predictions are not cut at a score."""
    instances: list[tuple[int, float]] = []
    alarms: list[tuple[int, float]] = []
    for i, (truth, predicted) in enumerate(zip(truths, predictions, strict=True)):
        if not len(predicted):
            instances += [(i, -np.inf)] * len(truth)
            continue
        assert predicted.confidence is not None
        if not len(truth):
            alarms += [(i, score) for score in predicted.confidence]
        found = {t: predicted.confidence[p] for t, p in match(truth, predicted)}
        instances += [(i, found.get(t, -np.inf)) for t in range(len(truth))]
    of_instances, instance_scores = np.array(instances, float).reshape(-1, 2).T
    of_alarms, alarm_scores = np.array(alarms, float).reshape(-1, 2).T
    return Finds(of_instances.astype(int), instance_scores, of_alarms.astype(int), alarm_scores)


def recall_at_false_alarms(
    finds: Finds, good: np.ndarray, rate: float, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Recall of instances with at most `rate` false alarms per good image, and its score.

    `good` (images,) says which images are good, `counts` (resamples, images) how often each one is
    drawn; both results are (resamples,). Only boxes above the score count; it is that of the first
    false alarm too many, or -inf where there is none. Recall is NaN without true instances, and
    both are NaN without good images.
    """
    allowed = np.floor(counts @ good * rate + 1e-9)
    above = score_above(finds.alarm_scores, counts[:, finds.alarm_images], allowed)
    above = np.where(counts @ good > 0, above, np.nan)
    drawn = counts[:, finds.instance_images]
    hits = (drawn * (finds.instance_scores > above[:, None])).sum(axis=1)
    truths = drawn.sum(axis=1)
    recall = np.divide(hits, truths, out=np.full(len(counts), np.nan), where=truths > 0)
    return np.where(np.isnan(above), np.nan, recall), above


def score_above(scores: np.ndarray, counts: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """(resamples,) the score above which there are at most `allowed` (resamples,) false alarms.

    `scores` (n,) are those of the false alarms, `counts` (resamples, n) how often each is drawn.
    It is the score of the first one too many, or -inf where there is none.
    """
    order = np.argsort(-scores, kind="stable")
    alarms = np.cumsum(counts[:, order], axis=1)
    first_too_many = np.count_nonzero(alarms <= allowed[:, None], axis=1)
    return np.asarray(np.append(scores[order], -np.inf)[first_too_many])


# Threshold and bootstrap


def best_threshold(scores: np.ndarray, hit: np.ndarray, truths: int) -> tuple[float, float] | None:
    """The score threshold with the best F1 of instances, and that F1; None if nothing was hit.

    `scores` and `hit` are (n,), for the predictions of all images, good ones included; `hit` says
    which were matched. F1 = 2 TP / (predictions + truths) is constant between neighbouring scores:
    of the intervals with the best F1 the widest is taken (of equally wide ones, the higher), and
    its midpoint is the threshold.
    """
    if not hit.any():
        return None
    order = np.argsort(-scores)
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of each run of equal scores
    uppers = scores[order][last]
    lowers = np.append(uppers[1:], 0.0)
    f1 = 2 * np.cumsum(hit[order])[last] / (last + 1 + truths)
    best = f1 == f1.max()
    starts = np.flatnonzero(best & ~np.append(False, best[:-1]))
    ends = np.flatnonzero(best & ~np.append(best[1:], False))
    widest = np.argmax(uppers[starts] - lowers[ends])
    threshold = (uppers[starts[widest]] + lowers[ends[widest]]) / 2
    return float(threshold), float(f1.max())


def draw_resamples(images: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples, images) counts: how often each image is drawn, with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples)


def ratio(counts: np.ndarray, numerators: ArrayLike, denominators: ArrayLike) -> np.ndarray:
    """(resamples,) ratio of two sums over images, such as a mean over instances; NaN for x / 0."""
    over = counts @ np.asarray(denominators, float)
    total = counts @ np.asarray(numerators, float)
    return np.divide(total, over, out=np.full(len(counts), np.nan), where=over > 0)


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of a resampled figure; resamples in which it is NaN are left out."""
    defined = values[~np.isnan(values)]
    if not defined.size:
        return float("nan"), float("nan")
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)
