"""`pipeline evaluate`: boxes, masks and the image decision, measured on one split or on all folds.

Output folder: metrics.json, report.md, images.csv (each image's verdict), errors/index.html (each
miss and false alarm as a picture), pr_curves.png, confusion.png, quality.png (where there is a
`review`), config.yaml, run.json; of all folds also out_of_fold/, the predictions of every image by
the fold that tested it, in the files of `pipeline segment`. There, images.json has the fold and the
score threshold of each image. Of runs to compare: comparison.json, comparison.md (see
pipeline/data/comparison.py), config.yaml, run.json.

Of all folds, each image is measured at the threshold of its own fold, chosen on that fold's val
split. Average precision, recall at false alarms and the intervals are of all images and scores
together, though the scores are those of several models.

A class that no training image shows (`pipeline convert --unseen`) is measured like any other: a
detector that does not know it has an AP and a recall of 0 there, which count in the means.

With anomaly scores, of --anomaly or of the predictions themselves, an image on which no box counts
but whose anomaly score is at its threshold or above is 'anomalous, no known class': its decision in
images.csv is `unknown`. The section `unknown` says what that is worth. `detector_with_anomaly`
decides by both scores (pipeline/data/joint_decision.py), where the val split has predictions and
anomaly scores of good and of defective images. All other figures are of the boxes alone.

metrics.json. Null stands for a figure that the data do not define (the AP of a class without truth,
false alarms without good images); `mask` is null for predictions without masks; `truth_boxes` and
`published` are null where there are none, `review` and its parts for masks without a quality. `<c>`
is a defect class; `<m>` is `detector`, `detector_with_anomaly`, the name of a classifier, or
`majority` (always the split's most frequent class, which is named in `.class`).

    split, fold, images, classes       name, fold, `all` or null, count of images, defect classes
    instances, instances_per_class.<c> count of true instances
    unseen_classes                     defect classes that no training image shows
    threshold.value, .reason, .f1      score from which a box counts; its F1 on val if chosen there;
        the value is null where each fold has its own
    cost.miss, .false_alarm            what a defective image without a box, and a good one with any
        box, cost; null unless asked for
        .misses, .false_alarms         count of these images
        .total, .per_image             what they cost
    folds[].fold, .images, .instances, .threshold, .review, .anomaly_threshold (null without
        anomaly scores), .box.map50, .box.map50_95
        each fold by itself; null unless the fold is `all`
    box.map50, .map50_95, .ap50_per_class.<c>, .ap_per_class.<c>
    mask.<the same>, .mean_iou_matched, .dice_matched, .mean_iou_all, .dice_all (an unmatched
        instance counts 0), .iou_per_class.<c> (all instances), .pixel_iou_per_class.<c> (pooled)
    truth_boxes.mean_iou, .dice, .iou_per_class.<c>    masks that were prompted with the true boxes
    review.below, .reason              quality under which a mask is listed for review, and why;
        null where each fold has its own, see folds[].review
    review.<s>.masks, .listed, .bad (IoU with the truth under 0.5), .caught (bad and listed),
        .on_nothing (bad, for they touch no true instance of their class), .on_nothing_caught,
        .share_listed, .share_caught, .mean_absolute_error and .spearman of quality and IoU;
        <s>: `predictions` (masks from the score threshold on) or `truth_boxes`; the IoU is that
        with the best true instance of the mask's class
    good_images.count, .false_alarms, .with_false_alarms, .false_alarms_per_image
    recall_at_false_alarms             null without good images; else
        .recall of instances if only boxes above a score count, which is chosen on these images so
        that there is at most one false alarm per 100 good images
        .above_score (null: all boxes count), .false_alarms on good images above it
    errors.<kind>                      count of boxes; of true instances for `missed`; the kinds
        are wrong_class, bad_box, both, duplicate, background and missed, as in TIDE, see
        pipeline/data/box_errors.py
    missed[].image_id, .image, .class, .bbox           true instances without a matching box
    verdicts.<verdict>                 count of images, see pipeline/data/matching.py
    image_decision.<m>.accuracy, .balanced_accuracy, .macro_f1, .recall_per_class.<good or c>,
        .confusion (rows: true class, columns: decision; good first)
    unknown                            null without anomaly scores; else (pipeline/data/unknown.py)
        .threshold.value, .reason      anomaly score from which an image is anomalous; the value is
            null where each fold has its own, see folds[].anomaly_threshold
        .images, .images_per_class.<good or c>  count of images that are anomalous, no known class
        .<s>.false_alarm_rate, .recall, .recall_per_class.<c>  part of the good images, of the
            defective ones, and of those of a class that are called defective, whatever the class
            that is named; <s>: `detector` (any box from its threshold on), `anomaly` (a score from
            its threshold on), `both` (either), and `detector_lowered` (any box above another score,
            such that its false-alarm rate is that of `both`)
        .detector_lowered.above_score  that score; null: images without any box are called
            defective as well, or each fold has its own
        .detector_lowered.share_at_score  part that counts of the images with just that score, or
            of those without a box, see there; null where each fold has its own
        .gain.recall, .recall_per_class.<c>  `both` less `detector_lowered`
    intervals.<dotted key>             [low, high], 95 %; only of figures that are defined
    resamples, published
"""

from __future__ import annotations

import csv
import dataclasses
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from pipeline import record
from pipeline.config import EvaluateConfig, of_fold
from pipeline.data import (
    comparison,
    costs,
    error_page,
    evaluation,
    heatmaps,
    joint_decision,
    loggers,
    metrics,
    plots,
    quality,
    report,
    runs,
    unknown,
)
from pipeline.data.dataset import GOOD, Dataset, Sample, learned_classes
from pipeline.data.decision import read_probabilities
from pipeline.data.evaluation import DEFAULT_THRESHOLD, Measured, Review
from pipeline.data.files import write_json, write_text
from pipeline.data.masks import dice, iou
from pipeline.data.matching import match
from pipeline.data.predictions import (
    Anomaly,
    Predictions,
    read_predictions,
    write_predictions,
)
from pipeline.data.unknown import Unknown
from pipeline.errors import UserError

OWN_DECISIONS = ("detector", "detector_with_anomaly", "majority")
UNKNOWN = "unknown"  # the decision on an image that is anomalous, no known class
DEFAULT_REVIEW_BELOW = 0.7
EVALUATED = ("metrics.json", "report.md", "images.csv")
COMPARED = ("comparison.json", "comparison.md")
CSV_COLUMNS = (
    "image_id", "file_name", "class", "decision", "verdict", "defects", "found", "boxes", "iou",
)  # fmt: skip

# MVTec transistor: 250 training and 63 test images, whose lists are not published.
PUBLISHED_CLASSES = {"bent_lead", "cut_lead", "damaged_case", "misplaced"}
PUBLISHED: dict[str, Any] = {
    "source": "the study this project was made for",
    "note": "published; other split",
    "rows": [
        {"name": "ResNet18", "train": 0.876, "val": 0.873, "test": 0.873},
        {"name": "ResNet18, rotation", "train": 0.884, "val": 0.873, "test": 0.873},
        {"name": "ResNet34, layer4 and fc", "train": 0.924, "val": 0.889, "test": 0.889},
        {"name": "ResNet50, AdamW", "train": 0.912, "val": 0.889, "test": 0.905},
        {"name": "ResNet50, rotation, AdamW", "train": 0.904, "val": 0.857, "test": 0.905},
    ],
}


@dataclass(frozen=True)
class Part:
    """The images that one model is measured on, what it says of them, and its threshold."""

    fold: int | None
    samples: Sequence[Sample]
    predictions: Predictions
    oracle: Predictions | None  # masks from true boxes
    true_boxes: Sequence[np.ndarray]  # (2, n) IoU and Dice of these masks, image by image
    classifiers: dict[str, np.ndarray]  # (images,) decisions by name
    threshold: dict[str, Any]
    review: dict[str, Any]  # the quality under which a mask is listed, and why
    anomaly: list[Anomaly] | None  # image by image; None: not known
    joint: np.ndarray | None  # (images,) decisions with the anomaly scores; None: not known
    unseen: Sequence[str]  # classes that no training image shows


def run(config: EvaluateConfig) -> None:
    """Measure predictions on a split. Raises `UserError` for input that does not fit together."""
    loggers.require(config)
    dataset = Dataset(config.data)
    if config.runs:
        _compare(config, dataset)
        return
    if config.predictions is None:
        raise UserError("--predictions: required without runs to compare, not given")
    parts = [_read(config, dataset, fold, part) for fold, part in _samples(config, dataset)]
    record.claim(config.out, config.force)
    record.write_config(config.out, "evaluate", config)
    _remove(config.out, *COMPARED)

    measured = _measure(config, dataset.classes, parts)
    shows_published = config.published and set(dataset.classes) == PUBLISHED_CLASSES
    values: dict[str, Any] = {
        "split": config.split,
        "fold": config.fold,
        "unseen_classes": [c for c in dataset.classes if any(c in part.unseen for part in parts)],
        "threshold": _threshold(config, parts),
        "cost": None if config.cost is None else _cost(config.cost, parts),
        "folds": _folds(dataset.classes, parts) if config.fold == "all" else None,
        **evaluation.figures(measured),
        "resamples": config.resamples,
        "intervals": evaluation.intervals(measured, config.resamples, config.seed),
        "published": PUBLISHED if shows_published else None,
    }
    values["image_decision"]["majority"]["class"] = (GOOD, *dataset.classes)[
        measured.decisions["majority"][0]
    ]
    write_json(config.out / "metrics.json", values)
    write_text(config.out / "report.md", report.markdown(values))
    write_text(config.out / "images.csv", _images_csv(measured))
    _plot(config.out, measured, values)
    _write_errors(config.out / "errors", dataset.classes, parts, measured)
    shutil.rmtree(config.out / "out_of_fold", ignore_errors=True)  # of an earlier run
    if config.fold == "all":
        _write_out_of_fold(config.out / "out_of_fold", dataset.classes, parts)
    with loggers.opened(config) as log:
        log.metrics(loggers.flat(values))
        log.pictures(config.out)
    record.write_record(config.out, "evaluate", config)
    report.show(values)
    print(f"report: {config.out / 'report.md'}")


def _compare(config: EvaluateConfig, dataset: Dataset) -> None:
    """Measure runs of any kind on the same images, and make one table of them."""
    parts = [
        comparison.Part(fold, samples, dataset.split_if_any("val", fold))
        for fold, samples in _samples(config, dataset)
    ]
    answers = [_read_run(path, dataset.classes, parts) for path in config.runs]
    record.claim(config.out, config.force)
    record.write_config(config.out, "evaluate", config)
    _remove(config.out, *EVALUATED)
    measured = zip(config.runs, answers, strict=True)
    rows = [
        comparison.row(path, its, parts, dataset.classes, config.resamples, config.seed)
        for path, its in track(list(measured), description="measure")
    ]
    labels = [sample.label for part in parts for sample in part.samples]
    values: dict[str, Any] = {
        "split": config.split,
        "fold": config.fold,
        "images": len(labels),
        "defective": sum(label >= 0 for label in labels),
        "resamples": config.resamples,
        "rows": comparison.labelled(rows),
    }
    figures, tables = (config.out / name for name in COMPARED)
    write_json(figures, values)
    write_text(tables, comparison.markdown(values))
    with loggers.opened(config) as log:
        log.metrics(loggers.flat({its["label"]: its for its in values["rows"]}))
    record.write_record(config.out, "evaluate", config)
    comparison.show(values)
    print(f"comparison: {tables}")


def _remove(out: Path, *names: str) -> None:
    """Remove files of an earlier run, of the other kind."""
    for name in names:
        (out / name).unlink(missing_ok=True)


# Input


def _samples(config: EvaluateConfig, dataset: Dataset) -> list[tuple[int | None, list[Sample]]]:
    """The images that are measured, by fold. Raises `UserError` where there are none."""
    found: list[tuple[int | None, list[Sample]]]
    if config.fold == "all":
        found = list(enumerate(dataset.folds()))
    else:
        found = [(config.fold, dataset.split(config.split, config.fold))]
    for fold, samples in found:
        if not samples:
            where = "" if fold is None else f" of fold {fold}"
            raise UserError(
                f"{config.data}: expected images in the {config.split} split{where}, found none"
            )
    return found


def _read_run(
    path: Path, classes: Sequence[str], parts: Sequence[comparison.Part]
) -> list[runs.Answers]:
    """What a run to compare says of each part's images."""
    answers = [
        runs.read(
            path if p.fold is None else of_fold(path, p.fold), p.fold, classes, p.samples, p.val
        )
        for p in parts
    ]
    methods = sorted({its.method for its in answers})
    if len(methods) > 1:
        raise UserError(f"{path}: expected one method in all folds, found {', '.join(methods)}")
    return answers


def _read(
    config: EvaluateConfig, dataset: Dataset, fold: int | None, samples: list[Sample]
) -> Part:
    """Read what was predicted for these images, check it, and choose the thresholds."""
    assert config.predictions is not None

    def folder(path: Path) -> Path:
        return of_fold(path, fold) if config.fold == "all" and fold is not None else path

    classes = dataset.classes
    val = dataset.split_if_any("val", fold)
    predictions = read_predictions(folder(config.predictions), classes, samples, val)
    oracle, true_boxes = None, []
    if config.truth_boxes is not None:
        oracle = read_predictions(folder(config.truth_boxes), classes, samples)
        true_boxes = [_measure_truth_boxes(oracle, sample) for sample in samples]
    classifiers = _read_classifiers([folder(c) for c in config.classifiers], classes, samples)
    if not predictions.images.issuperset(sample.image_id for sample in val):
        val = []
    threshold = _choose_threshold(config, val, predictions)
    review = _choose_review(config, val, predictions, threshold["value"])
    anomalies = None if config.anomaly is None else folder(config.anomaly)
    known = _read_anomaly(config, anomalies, predictions, samples)
    return Part(
        fold,
        samples,
        predictions,
        oracle,
        true_boxes,
        classifiers,
        threshold,
        review,
        None if known is None else [known[sample.image_id] for sample in samples],
        None if known is None else _joint_decisions(samples, val, predictions, known),
        _unseen(dataset, fold),
    )


def _unseen(dataset: Dataset, fold: int | None) -> list[str]:
    """The classes that no training image shows, where there are training images with defects."""
    learned = learned_classes(dataset.split_if_any("train", fold), dataset.classes)
    return [name for name in dataset.classes if learned and name not in learned]


def _read_anomaly(
    config: EvaluateConfig,
    folder: Path | None,
    predictions: Predictions,
    samples: Sequence[Sample],
) -> dict[int, Anomaly] | None:
    """Anomaly scores and thresholds by image id, of --anomaly or of the predictions.

    All `samples` have one; those of other images are not checked.
    """
    given = config.anomaly_threshold
    if folder is None:
        where, found = config.predictions, dict(predictions.anomaly)
        if given is not None:
            found = {key: Anomaly(its.score, given) for key, its in found.items()}
    else:
        where, scored = folder / heatmaps.SCORES, heatmaps.read_by_id(folder)
        threshold = heatmaps.read_threshold(folder) if given is None else given
        for sample in samples:
            if (its := scored.get(sample.image_id)) is not None:
                its.check("--anomaly", sample.path.name, sample.width, sample.height)
        found = {key: Anomaly(its.score, threshold) for key, its in scored.items()}
    missing = sum(sample.image_id not in found for sample in samples)
    if folder is None and missing == len(samples):
        if given is not None:
            raise UserError(
                "--anomaly-threshold: expected anomaly scores (--anomaly, or of the predictions), "
                f"found none in {where}"
            )
        return None
    if missing:
        raise UserError(
            f"{where}: expected anomaly scores of all {len(samples)} images of the split, found "
            f"those of {len(samples) - missing}"
        )
    return found


def _joint_decisions(
    samples: Sequence[Sample],
    val: Sequence[Sample],
    predictions: Predictions,
    anomaly: Mapping[int, Anomaly],
) -> np.ndarray | None:
    """(images,) decisions by box and anomaly scores; None where the val split cannot teach it."""
    defective = np.array([sample.label >= 0 for sample in val])
    known = all(sample.image_id in anomaly for sample in val)
    if not known or defective.all() or not defective.any():
        return None

    def scores(images: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        boxes = costs.image_scores(images, predictions.results)
        return boxes, np.array([anomaly[sample.image_id].score for sample in images])

    best = [metrics.decide(predictions.of(sample, masks=False)) + 1 for sample in samples]
    model = joint_decision.fit(*scores(val), defective)
    return joint_decision.decide(model, *scores(samples), np.array(best))


def _read_classifiers(
    folders: Sequence[Path], classes: Sequence[str], samples: Sequence[Sample]
) -> dict[str, np.ndarray]:
    """Each classifier's decisions by name: (images,) with good as 0 and the classes after it."""
    decisions: dict[str, np.ndarray] = {}
    for folder in folders:
        found = read_probabilities(folder, classes, samples)
        name = found.name
        if name in (*decisions, *OWN_DECISIONS):
            name = f"{name} ({folder.name})"
        decisions[name] = found.decisions(samples)
    return decisions


def _choose_threshold(
    config: EvaluateConfig, val: Sequence[Sample], predictions: Predictions
) -> dict[str, Any]:
    """The score from which a box counts, why, and its F1 where it was chosen on the val split."""
    if config.threshold is not None:
        return {"value": config.threshold, "reason": "as given", "f1": None}
    if not val:
        return _default_threshold("there are no predictions for a val split")
    if config.cost is not None:
        return _cheapest_threshold(config.cost, val, predictions)
    best = evaluation.best_threshold(val, predictions)
    if best is None:
        return _default_threshold("no defect of the val split is found at any score")
    value, f1 = best
    reason = f"the best F1 of instances at IoU 0.5 on the val split ({f1:.3f})"
    return {"value": value, "reason": reason, "f1": round(f1, 6)}


def _cheapest_threshold(
    cost: costs.Costs, val: Sequence[Sample], predictions: Predictions
) -> dict[str, Any]:
    defective = np.array([sample.label >= 0 for sample in val])
    for kind, present in (("defective", defective.any()), ("good", not defective.all())):
        if not present:
            return _default_threshold(f"the val split has no {kind} images to weigh costs on")
    scores = costs.image_scores(val, predictions.results)
    value, least = costs.cheapest_threshold(scores, defective, cost)
    reason = f"the cheapest on the val split, {least:g} for {len(val)} images {_prices(cost)}"
    return {"value": value, "reason": reason, "f1": None}


def _prices(cost: costs.Costs) -> str:
    return f"at {cost['miss']:g} for a miss and {cost['false-alarm']:g} for a false alarm"


def _default_threshold(why: str) -> dict[str, Any]:
    return {"value": DEFAULT_THRESHOLD, "reason": f"the default, for {why}", "f1": None}


def _choose_review(
    config: EvaluateConfig, val: Sequence[Sample], predictions: Predictions, threshold: float
) -> dict[str, Any]:
    """The quality under which a mask is for review, and why."""
    if config.review_below is not None:
        return {"below": config.review_below, "reason": "as given"}
    on_val = predictions.judge(val, [threshold] * len(val))
    below = None if on_val is None else quality.review_threshold(on_val)
    if below is None:
        why = "no mask of a val split is badly drawn"
        return {"below": DEFAULT_REVIEW_BELOW, "reason": f"the default, for {why}"}
    return {"below": below, "reason": "what lists every badly drawn mask of the val split"}


# Measuring


def _measure(config: EvaluateConfig, classes: Sequence[str], parts: Sequence[Part]) -> Measured:
    """All images of all parts together, each one at the threshold of its part."""
    samples = [sample for part in parts for sample in part.samples]
    thresholds = [part.threshold["value"] for part in parts for _ in part.samples]
    predictions = _pooled([(part.samples, part.predictions) for part in parts])
    images = [
        metrics.measure_image(s.truth, predictions.of(s, threshold), len(classes))
        for s, threshold in zip(samples, thresholds, strict=True)
    ]
    entries = [e for s in samples for e in predictions.results.get(s.image_id, ())]
    boxes = metrics.coco_evaluation(samples, predictions.results, len(classes), "bbox")
    masks = None
    if all("segmentation" in entry for entry in entries):
        masks = metrics.coco_evaluation(samples, predictions.results, len(classes), "segm")
    finds = metrics.find(
        [s.truth for s in samples], [predictions.of(s, masks=False) for s in samples]
    )
    labels = np.array([sample.label + 1 for sample in samples])
    joint = [part.joint for part in parts if part.joint is not None]
    with_anomaly = (
        {"detector_with_anomaly": np.concatenate(joint)} if len(joint) == len(parts) else {}
    )
    decisions = {
        "detector": np.array([image.decision + 1 for image in images]),
        **with_anomaly,
        **_joined([part.classifiers for part in parts]),
        "majority": np.full(len(samples), np.argmax(np.bincount(labels))),
    }
    true_boxes = None
    if all(part.oracle is not None for part in parts):
        true_boxes = [overlaps for part in parts for overlaps in part.true_boxes]
    return Measured(
        classes,
        samples,
        images,
        boxes,
        masks,
        finds,
        true_boxes,
        decisions,
        _review(parts, samples, thresholds, predictions),
        _unknown(config, parts, labels, np.array(thresholds)),
    )


def _unknown(
    config: EvaluateConfig, parts: Sequence[Part], labels: np.ndarray, thresholds: np.ndarray
) -> Unknown | None:
    """What detector and anomaly detector say of all images; None where the latter has not looked.

    Of all folds, either all have anomaly scores, or they count as none.
    """
    known = [anomaly for part in parts for anomaly in part.anomaly or ()]
    if len(known) < len(labels):
        return None
    reason = "the best F1 of images on the val split of the anomaly detector's run"
    if config.anomaly_threshold is not None:
        reason = "as given"
    elif config.anomaly is None:
        reason = "that of the predictions"
    scores = [costs.image_scores(part.samples, part.predictions.results) for part in parts]
    return Unknown(
        labels=labels,
        part=np.repeat(np.arange(len(parts)), [len(part.samples) for part in parts]),
        box_score=np.concatenate(scores),
        box_threshold=thresholds,
        anomaly_score=np.array([its.score for its in known]),
        anomaly_threshold=np.array([its.threshold for its in known]),
        reason=reason,
    )


def _pooled(parts: Sequence[tuple[Sequence[Sample], Predictions]]) -> Predictions:
    """The predictions of each part's own images."""
    results = {
        sample.image_id: predictions.results.get(sample.image_id, [])
        for samples, predictions in parts
        for sample in samples
    }
    return Predictions(frozenset(results), results)


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The classifiers' decisions of all parts, by the names they have in the first."""
    rows = zip(*(part.values() for part in parts), strict=True)
    return dict(zip(parts[0], map(np.concatenate, rows), strict=True))


def _review(
    parts: Sequence[Part],
    samples: Sequence[Sample],
    thresholds: Sequence[float],
    predictions: Predictions,
) -> Review | None:
    """The masks against their quality, and the quality under which one is for review."""
    found = predictions.judge(samples, thresholds)
    oracles = [(part.samples, part.oracle) for part in parts if part.oracle is not None]
    from_truth = _pooled(oracles).judge(samples, [0.0] * len(samples)) if oracles else None
    if found is None and from_truth is None:
        return None
    of_image = np.array([part.review["below"] for part in parts for _ in part.samples])
    below, reason = parts[0].review.values()
    if any(part.review != parts[0].review for part in parts):
        below, reason = None, "what lists every badly drawn mask of each fold's val split"
    return Review(below, of_image, reason, found, from_truth)


def _threshold(config: EvaluateConfig, parts: Sequence[Part]) -> dict[str, Any]:
    """The score threshold as metrics.json has it; of all folds, its value is in `folds`."""
    if len(parts) == 1 or config.threshold is not None:
        return parts[0].threshold
    reason = "the best F1 of instances at IoU 0.5 on each fold's val split"
    if config.cost is not None:
        reason = f"the cheapest on each fold's val split {_prices(config.cost)}"
    return {"value": None, "reason": reason, "f1": None}


def _cost(cost: costs.Costs, parts: Sequence[Part]) -> dict[str, Any]:
    """What the wrong decisions on the measured images cost."""
    wrong = [
        costs.wrong_decisions(
            costs.image_scores(part.samples, part.predictions.results),
            np.array([sample.label >= 0 for sample in part.samples]),
            part.threshold["value"],
        )
        for part in parts
    ]
    misses, false_alarms = (sum(counts) for counts in zip(*wrong, strict=True))
    total = costs.total(cost, misses, false_alarms)
    return {
        "miss": cost["miss"],
        "false_alarm": cost["false-alarm"],
        "misses": misses,
        "false_alarms": false_alarms,
        "total": round(total, 6),
        "per_image": round(total / sum(len(part.samples) for part in parts), 6),
    }


def _folds(classes: Sequence[str], parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The figures of each fold by itself."""
    folds = []
    for part in parts:
        results = part.predictions.results
        boxes = metrics.coco_evaluation(part.samples, results, len(classes), "bbox")
        folds.append(
            {
                "fold": part.fold,
                "images": len(part.samples),
                "instances": sum(len(sample.annotations) for sample in part.samples),
                "threshold": part.threshold,
                "review": part.review,
                "anomaly_threshold": None
                if part.anomaly is None
                else unknown.single(np.array([its.threshold for its in part.anomaly])),
                "box": evaluation.mean_ap(boxes),
            }
        )
    return folds


def _measure_truth_boxes(oracle: Predictions, sample: Sample) -> np.ndarray:
    """(2, n) IoU and Dice of the masks prompted with an image's n true boxes.

    Raises `UserError` when a true box has no mask.
    """
    truth, predicted = sample.truth, oracle.of(sample)
    pairs = sorted(match(truth, predicted))
    if len(pairs) < len(truth) or (pairs and predicted.mask is None):
        raise UserError(
            f"--truth-boxes: expected a mask for each of {len(truth)} true boxes of "
            f"{sample.path.name}, found {len(pairs) if predicted.mask is not None else 0}"
        )
    if truth.mask is None or predicted.mask is None:
        return np.zeros((2, 0))
    masks = [(truth.mask[t], predicted.mask[p]) for t, p in pairs]
    return np.array([[measure(a, b) for a, b in masks] for measure in (iou, dice)])


# Output


def _plot(out: Path, measured: Measured, values: dict[str, Any]) -> None:
    evaluations = {"boxes": measured.boxes}
    if measured.masks is not None:
        evaluations["masks"] = measured.masks
    threshold = values["threshold"]["value"]
    curves = plots.pr_curves(evaluations, measured.classes, threshold)
    plots.save_png(curves, out / "pr_curves.png")
    confusions = {
        name: np.array(scores["confusion"])
        for name, scores in values["image_decision"].items()
        if name != "majority"
    }
    matrices = plots.confusions(confusions, (GOOD, *measured.classes))
    plots.save_png(matrices, out / "confusion.png")
    (out / "quality.png").unlink(missing_ok=True)  # of an earlier run
    if measured.review is not None:
        review = measured.review
        figure = plots.quality(review.judged, measured.classes, review.below)
        plots.save_png(figure, out / "quality.png")


def _write_errors(
    folder: Path, classes: Sequence[str], parts: Sequence[Part], measured: Measured
) -> None:
    unknown = np.zeros(len(measured.images), bool)
    if measured.unknown is not None:
        unknown = measured.unknown.without_class
    shots = [
        error_page.Shot(
            sample,
            part.predictions.of(sample, masks=False),
            part.predictions.of(sample, part.threshold["value"], masks=False),
            image.errors,
            bool(anomalous),
        )
        for (part, sample), image, anomalous in zip(
            [(part, sample) for part in parts for sample in part.samples],
            measured.images,
            unknown,
            strict=True,
        )
    ]
    error_page.write(folder, classes, shots)


def _write_out_of_fold(folder: Path, classes: Sequence[str], parts: Sequence[Part]) -> None:
    results: list[dict[str, Any]] = []
    images = []
    for part in parts:
        for i, sample in enumerate(part.samples):
            results += part.predictions.results.get(sample.image_id, [])
            image: dict[str, Any] = {
                "id": sample.image_id,
                "file_name": sample.path.name,
                "width": sample.width,
                "height": sample.height,
                "fold": part.fold,
                "threshold": part.threshold["value"],
            }
            if part.anomaly is not None:
                image["anomaly"] = dataclasses.asdict(part.anomaly[i])
            images.append(image)
    write_predictions(folder, results, images, classes)


def _images_csv(measured: Measured) -> str:
    """One line per image; `iou` is the mean over its true instances."""
    names = (GOOD, *measured.classes)
    decisions = [names[image.decision + 1] for image in measured.images]
    if measured.unknown is not None:
        for i in np.flatnonzero(measured.unknown.without_class):
            decisions[i] = UNKNOWN
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for sample, image, decision in zip(measured.samples, measured.images, decisions, strict=True):
        defects = len(image.matched)
        writer.writerow(
            (
                sample.image_id,
                sample.path.name,
                names[sample.label + 1],
                decision,
                image.verdict,
                defects,
                int(image.matched.sum()),
                image.boxes,
                f"{image.iou.mean():.4f}" if measured.masks is not None and defects else "",
            )
        )
    return text.getvalue()
