"""`pipeline evaluate`: boxes, masks and the image decision, measured on one split or on all folds.

Output folder: metrics.json (see docs/metrics.md), report.md, images.csv (each image's verdict),
errors/index.html (each miss and false alarm as a picture), pr_curves.png, confusion.png,
quality.png (where there is a `review`), config.yaml, run.json; of all folds also out_of_fold/, the
predictions of every image by the fold that tested it, in the files of `pipeline segment`. There,
images.json has the fold and the score threshold of each image. Of runs to compare: comparison.json,
comparison.md (see pipeline/data/comparison.py), config.yaml, run.json.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from pipeline import record
from pipeline.config import EvaluateConfig, of_fold
from pipeline.data import comparison, error_page, loggers, plots, report, runs
from pipeline.data.dataset import GOOD, Dataset, Sample
from pipeline.data.evaluation import figures, thresholds
from pipeline.data.evaluation.intervals import intervals
from pipeline.data.evaluation.measured import Measured, measure
from pipeline.data.evaluation.part import Part, read_part
from pipeline.data.files import write_json, write_text
from pipeline.data.predictions import write_predictions
from pipeline.errors import UserError

COMMAND = "evaluate"
UNKNOWN = "unknown"  # the decision on an image that is anomalous, no known class
COMPARISON = "comparison.md"
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


def run(config: EvaluateConfig) -> None:
    """Measure predictions on a split. Raises `UserError` for input that does not fit together."""
    loggers.require(config)
    dataset = Dataset(config.data)
    if config.runs:
        _compare(config, dataset)
        return
    if config.predictions is None:
        raise UserError("--predictions: required without runs to compare, not given")
    classes = dataset.classes
    parts = [read_part(config, dataset, fold, its) for fold, its in _samples(config, dataset)]
    with record.result(COMMAND, config) as out:
        values = _evaluate(config, classes, parts, out)
        record.write_record(out, COMMAND, config)
    report.show(values)
    print(f"report: {config.out / 'report.md'}")


def _evaluate(
    config: EvaluateConfig, classes: Sequence[str], parts: Sequence[Part], out: Path
) -> dict[str, Any]:
    """Write all files; returns the content of metrics.json."""
    measured = measure(classes, parts)
    chosen = [part.threshold for part in parts]
    shows_published = config.published and set(classes) == PUBLISHED_CLASSES
    values: dict[str, Any] = {
        "split": config.split,
        "fold": config.fold,
        "unseen_classes": [name for name in classes if any(name in part.unseen for part in parts)],
        "threshold": thresholds.together(config.threshold, config.cost, chosen),
        "cost": None if config.cost is None else figures.of_costs(config.cost, parts),
        "folds": figures.of_folds(classes, parts) if config.fold == "all" else None,
        **figures.of_images(measured),
        "resamples": config.resamples,
        "intervals": intervals(measured, config.resamples, config.seed),
        "published": PUBLISHED if shows_published else None,
    }
    write_json(out / "metrics.json", values)
    write_text(out / "report.md", report.markdown(values))
    write_text(out / "images.csv", _images_csv(measured))
    _plot(out, measured, values)
    _write_errors(out / "errors", parts, measured)
    if config.fold == "all":
        _write_out_of_fold(out / "out_of_fold", classes, parts)
    with loggers.opened(config) as log:
        log.metrics(loggers.flat(values))
        log.pictures(out)
    return values


def _compare(config: EvaluateConfig, dataset: Dataset) -> None:
    """Measure runs of any kind on the same images, and make one table of them."""
    parts = [
        comparison.Part(fold, samples, dataset.split_if_any("val", fold))
        for fold, samples in _samples(config, dataset)
    ]
    answers = [_read_run(path, dataset.classes, parts) for path in config.runs]
    with record.result(COMMAND, config) as out:
        values = _write_comparison(config, dataset.classes, parts, answers, out)
        record.write_record(out, COMMAND, config)
    comparison.show(values)
    print(f"comparison: {config.out / COMPARISON}")


def _write_comparison(
    config: EvaluateConfig,
    classes: Sequence[str],
    parts: Sequence[comparison.Part],
    answers: Sequence[Sequence[runs.Answers]],
    out: Path,
) -> dict[str, Any]:
    """Write all files; returns the content of comparison.json."""
    read = list(zip(config.runs, answers, strict=True))
    rows = [
        comparison.row(path, its, parts, classes, config.resamples, config.seed)
        for path, its in track(read, description="measure")
    ]
    labels = [sample.label for part in parts for sample in part.samples]
    values: dict[str, Any] = {
        "split": config.split,
        "fold": config.fold,
        "images": len(labels),
        "defective": sum(label >= 0 for label in labels),
        "resamples": config.resamples,
        "rows": comparison.rows(rows),
    }
    write_json(out / "comparison.json", values)
    write_text(out / COMPARISON, comparison.markdown(values))
    with loggers.opened(config) as log:
        log.metrics(loggers.flat({its["label"]: its for its in values["rows"]}))
    return values


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
    if measured.review is not None:
        review = measured.review
        figure = plots.quality(review.judged, measured.classes, review.below)
        plots.save_png(figure, out / "quality.png")


def _write_errors(folder: Path, parts: Sequence[Part], measured: Measured) -> None:
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
    error_page.write(folder, measured.classes, shots)


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
