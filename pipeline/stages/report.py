"""Make a page to review results in, from what the other stages have written.

Output folder: index.html, which opens from disk and asks nothing of any network; images/, its
pictures and heat maps as JPEG, and review.mp4, a smaller copy of the review video (both inside
index.html with --single-file); config.yaml, run.json.

The page shows every image that has predictions, of all splits. Its figures are those of the
evaluation; what its threshold slider says is computed in the page, from scores and verdicts.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import supervision as sv

from pipeline import config as configs
from pipeline import record
from pipeline.config import ReportConfig, RunConfig, flag_of
from pipeline.data import heatmaps, metrics, plots, provenance, report, report_page, writers
from pipeline.data.dataset import GOOD, Dataset, Sample
from pipeline.data.files import read_json, sha256, write_text
from pipeline.data.masks import iou
from pipeline.data.matching import match, verdict
from pipeline.data.predictions import (
    PREDICTIONS,
    Anomaly,
    Predictions,
    from_coco_results,
    read_images,
    read_predictions,
)
from pipeline.data.video import probe
from pipeline.errors import UserError
from pipeline.plan import VIDEOS, plan

COMMAND = "report"
JPEG_QUALITY = 85
HEAT_SIDE = 256  # longest side of a heat map in pixels: it is smooth
IMAGES = "images"  # folder of the pictures
VIDEO = "review.mp4"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Inputs:
    """What the page is made of."""

    data: Path
    predictions: Path
    evaluation: Path
    video: Path | None


@dataclass(frozen=True)
class Picture:
    """Where an image's pictures are: paths from the page, or the pictures themselves as URLs."""

    image: str
    heat: str | None


@dataclass(frozen=True)
class Shown:
    """An image of the page."""

    sample: Sample
    part: str  # its split or, of all folds, its fold
    measured: bool  # whether the evaluation is of this part
    threshold: float  # score from which its boxes count


def run(config: ReportConfig) -> None:
    """Write the page. Raises `UserError` for input that does not fit together."""
    config = _of_run(config)
    inputs = _inputs(config)
    figures = _figures(inputs)
    dataset = Dataset(inputs.data)
    shown, predictions = _read(dataset, inputs.predictions, figures)
    heat_maps = _heat_maps(config.heat_maps, figures, [item.sample for item in shown])
    with record.result(COMMAND, config) as out:
        samples = [item.sample for item in shown]
        pictures = _write_pictures(out, config, samples, heat_maps)
        page = report_page.Page(
            title=config.title or report.run_name(config.out.resolve().parent, figures["fold"]),
            dataset=inputs.data.resolve().name,
            classes=dataset.classes,
            figures=figures,
            identity=sha256(inputs.predictions / PREDICTIONS),
            images=_entries(
                shown,
                predictions,
                pictures,
                _moments(inputs.video),
                _anomalies(config, inputs, predictions, heat_maps, figures),
            ),
            plots=_plots(dataset.classes, figures, [s for s in shown if s.measured], predictions),
            video=_write_video(out, inputs.video, single_file=config.single_file),
            counts=_counts(dataset, figures["fold"]),
            made=provenance.trace(inputs.evaluation, inputs.predictions, inputs.data),
        )
        write_text(out / "index.html", report_page.render(page))
        record.write_record(out, COMMAND, config)
    size = sum(path.stat().st_size for path in config.out.rglob("*") if path.is_file())
    print(f"report: {config.out / 'index.html'} ({len(shown)} images, {size / 1e6:.1f} MB)")


# ---- Input --------------------------------------------------------------------------------------


def _of_run(config: ReportConfig) -> ReportConfig:
    """With the inputs of the run that is named, if one is."""
    if config.run is None:
        return config
    beside = [flag_of(ReportConfig, name) for name in ReportConfig.of_run if getattr(config, name)]
    if beside:
        raise UserError(f"run: expected none of its inputs beside it, found {', '.join(beside)}")
    path = config.run / "config.yaml"
    if not path.is_file():
        raise UserError(
            "run: expected an output folder of `pipeline run`, "
            f"found no config.yaml in {config.run}"
        )
    options = configs.read_yaml(path)
    if "finetune_yolo" not in options:
        raise UserError(f"run: expected an output folder of `pipeline run`, found {config.run}")
    options = {**options, "out": config.run}  # where it is now
    planned = plan(configs.build(RunConfig, options, file=path))[-1][1]
    given = {name: getattr(config, name) for name in config.model_fields_set - {"run"}}
    return configs.build(ReportConfig, {**planned.model_dump(), **given})


def _inputs(config: ReportConfig) -> Inputs:
    """Check what is given. Raises `UserError` with what is missing or is not there."""
    required = ("data", "predictions", "evaluation", "out")
    missing = [flag_of(ReportConfig, name) for name in required if getattr(config, name) is None]
    if missing:
        raise UserError(*(f"{flag}: required without a run, not given" for flag in missing))
    assert config.data and config.predictions and config.evaluation
    video = config.video
    if video is not None:
        if video.suffix.lower() not in VIDEOS:
            raise UserError(f"--video: expected a file ending in .mp4 or .webm, found {video}")
        if not video.is_file():
            if not record.record_path(video).is_file():
                raise UserError(f"--video: expected a video, found nothing at {video}")
            video = None  # there was nothing to show in it
        else:
            probe(video)
    return Inputs(config.data, config.predictions, config.evaluation, video)


def _figures(inputs: Inputs) -> dict[str, Any]:
    """The evaluation's metrics. Raises `UserError` if they are of other data or predictions."""
    path = inputs.evaluation / "metrics.json"
    found = read_json(path)
    expected = {"split", "fold", "threshold", "folds", "review", "image_decision", "missed"}
    if not isinstance(found, dict) or not expected <= found.keys():
        raise UserError(f"{path}: expected the figures of `pipeline evaluate`, found other JSON")
    made_of = record.read(inputs.evaluation).inputs
    for name in ("data", "predictions"):
        folder = getattr(inputs, name)
        if not folder.is_dir():
            raise UserError(f"--{name}: expected a folder, found none at {folder}")
        measured = record.fingerprint(folder) == made_of.get(name)
        if name == "predictions" and found["fold"] == "all":  # pooled by the evaluation itself
            pool = inputs.evaluation / "out_of_fold"
            measured = sha256(folder / PREDICTIONS) == sha256(pool / PREDICTIONS)
        if not measured:
            raise UserError(
                f"--{name}: expected what {inputs.evaluation} measured, found other: {folder}"
            )
    return found


def _read(
    dataset: Dataset, folder: Path, figures: Mapping[str, Any]
) -> tuple[list[Shown], Predictions]:
    """The images that have predictions, those that were measured first, and the predictions."""
    if figures["fold"] == "all":
        thresholds = [fold["threshold"]["value"] for fold in figures["folds"]]
        shown = [
            Shown(sample, f"fold {k}", True, thresholds[k])
            for k, samples in enumerate(dataset.folds())
            for sample in samples
        ]
        samples = [item.sample for item in shown]
        return shown, read_predictions(folder, dataset.classes, samples)
    known = {image["id"] for image in read_images(folder)[1]}
    split, fold, threshold = figures["split"], figures["fold"], figures["threshold"]["value"]
    shown = [Shown(sample, split, True, threshold) for sample in dataset.split(split, fold)]
    others = [
        Shown(sample, name, False, threshold)
        for name, samples in _splits(dataset, fold).items()
        if name != split
        for sample in samples
        if sample.image_id in known
    ]
    measured, rest = ([item.sample for item in part] for part in (shown, others))
    return shown + others, read_predictions(folder, dataset.classes, measured, rest)


def _heat_maps(
    folder: Path | None, figures: Mapping[str, Any], samples: Sequence[Sample]
) -> dict[int, heatmaps.Scored]:
    """The heat maps that there are, by image id. Raises `UserError` if they are of other images."""
    if folder is None:
        return {}
    folds = len(figures["folds"]) if figures["fold"] == "all" else 0
    found = heatmaps.read_by_id(folder, figures["fold"], folds)
    for sample in samples:
        if (its := found.get(sample.image_id)) is not None:
            its.check("--heat-maps", sample.path.name, sample.width, sample.height)
    if not any(sample.image_id in found for sample in samples):
        raise UserError(f"--heat-maps: expected those of the shown images in {folder}, found none")
    return found


def _splits(dataset: Dataset, fold: int | None) -> dict[str, list[Sample]]:
    """The splits that there are."""
    return {name: dataset.split(name, fold) for name in SPLITS if dataset.has_split(name, fold)}


def _moments(video: Path | None) -> dict[str, float]:
    """When each image comes in the video, in seconds by file name, if the video's record says."""
    if video is None or not record.record_path(video).is_file():
        return {}
    moments = read_json(record.record_path(video)).get("moments", [])
    return {moment["file_name"]: moment["seconds"] for moment in moments}


def _counts(dataset: Dataset, fold: Any) -> report.Table:
    """Images and defects of each class and split."""
    if fold == "all":
        parts = {f"fold {k}": samples for k, samples in enumerate(dataset.folds())}
    else:
        parts = _splits(dataset, fold)
    rows = []
    for label, name in enumerate((GOOD, *dataset.classes), start=-1):
        cells = []
        for samples in parts.values():
            of_class = [sample for sample in samples if sample.label == label]
            defects = sum(len(sample.annotations) for sample in of_class)
            cells.append(f"{len(of_class)} ({defects})" if defects else str(len(of_class)))
        rows.append([name, *cells])
    return report.Table("Images (defects)", ["class", *parts], rows)


# ---- What the page shows ------------------------------------------------------------------------


def _entries(
    shown: Sequence[Shown],
    predictions: Predictions,
    pictures: Sequence[Picture],
    moments: Mapping[str, float],
    anomalies: Mapping[int, Anomaly],
) -> list[dict[str, Any]]:
    """Each image as the page has it. Boxes, scores and run lengths stay as they are on disk."""
    return [
        {
            "id": item.sample.image_id,
            "name": item.sample.path.name,
            "width": item.sample.width,
            "height": item.sample.height,
            "label": item.sample.label,
            "part": item.part,
            "measured": item.measured,
            "threshold": item.threshold,
            "picture": picture.image,
            "heat": picture.heat,
            "moment": moments.get(item.sample.path.name),
            "anomaly": asdict(anomalies[item.sample.image_id])
            if item.sample.image_id in anomalies
            else None,
            **_instances(item.sample, predictions.results.get(item.sample.image_id, [])),
        }
        for item, picture in zip(shown, pictures, strict=True)
    ]


def _anomalies(
    config: ReportConfig,
    inputs: Inputs,
    predictions: Predictions,
    heat_maps: Mapping[int, heatmaps.Scored],
    figures: Mapping[str, Any],
) -> Mapping[int, Anomaly]:
    """What is known by image id: of the predictions, or of the run that was evaluated with them."""
    evaluated = record.read(inputs.evaluation).inputs.get("anomaly")
    if predictions.anomaly or config.heat_maps is None or evaluated is None:
        return predictions.anomaly
    if record.fingerprint(config.heat_maps) != evaluated:
        return {}
    threshold = figures["unknown"]["threshold"]["value"]
    return {image_id: Anomaly(its.score, threshold) for image_id, its in heat_maps.items()}


def _instances(sample: Sample, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Truth, predictions by falling score, and the image's verdict at any threshold.

    A true instance has the score of the box that finds it: pairs are made by falling score, so it
    is found from this threshold down, and by the same box. `verdicts` are [score, verdict]: each
    one holds from its score down to the next; the first, of score null, from above all scores.
    """
    results = sorted(results, key=lambda entry: -entry["score"])
    truth = replace(sample).truth  # of a copy: masks of all images would fill the memory
    predicted = from_coco_results(results)
    entries = [_plain(entry) for entry in results]
    true = [{**_plain(annotation), "score": None} for annotation in sample.annotations]
    for t, p in match(truth, predicted):
        true[t]["score"] = results[p]["score"]
        if truth.mask is not None and predicted.mask is not None:
            entries[p]["iou"] = round(iou(truth.mask[t], predicted.mask[p]), 4)
    return {"truth": true, "predictions": entries, "verdicts": _verdicts(truth, predicted, results)}


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs of a COCO annotation or result."""
    kept = ("bbox", "score", "quality", "segmentation")
    return {"class": entry["category_id"] - 1, **{k: entry[k] for k in kept if k in entry}}


def _verdicts(
    truth: sv.Detections, predicted: sv.Detections, results: Sequence[Mapping[str, Any]]
) -> list[list[Any]]:
    truth = sv.Detections(truth.xyxy, class_id=truth.class_id)  # masks have no say in a verdict
    verdicts: list[list[Any]] = [[None, verdict(truth, sv.Detections.empty())]]
    scores = [entry["score"] for entry in results]
    for count in (i + 1 for i in range(len(scores)) if scores[i] not in scores[i + 1 :]):
        assert predicted.class_id is not None and predicted.confidence is not None
        first = sv.Detections(
            predicted.xyxy[:count],
            class_id=predicted.class_id[:count],
            confidence=predicted.confidence[:count],
        )
        if (found := verdict(truth, first)) != verdicts[-1][1]:
            verdicts.append([scores[count - 1], found])
    return verdicts


def _plots(
    classes: Sequence[str],
    figures: Mapping[str, Any],
    measured: Sequence[Shown],
    predictions: Predictions,
) -> list[report_page.Plot]:
    """The plots that the predictions have something for."""
    samples = [item.sample for item in measured]
    results = {s.image_id: predictions.results.get(s.image_id, []) for s in samples}
    has_masks = all("segmentation" in e for entries in results.values() for e in entries)
    kinds: dict[str, Literal["bbox", "segm"]] = {"boxes": "bbox"}
    if has_masks:
        kinds["masks"] = "segm"
    found = []
    for name, kind in kinds.items():
        evaluated = metrics.coco_evaluation(samples, results, len(classes), kind)
        curves = plots.pr_curves({name: evaluated}, classes, figures["threshold"]["value"])
        found.append(report_page.Plot(f"Precision and recall, {name}", plots.svg(curves, name)))
    if has_masks:
        ious = plots.mask_ious(_found_ious(measured, predictions, len(classes)), classes)
        found.append(report_page.Plot("Mask IoU of found defects", plots.svg(ious, "ious")))
    judged = predictions.judge(samples, [item.threshold for item in measured])
    if judged is not None and figures["review"] is not None:
        below = figures["review"]["below"]
        calibration = plots.quality({"predictions": judged}, classes, below)
        title = "Calibration of mask quality"
        found.append(report_page.Plot(title, plots.svg(calibration, "quality")))
    return found


def _found_ious(
    measured: Sequence[Shown], predictions: Predictions, classes: int
) -> list[list[float | None]]:
    """For each class, the IoU of each true instance's mask; None: missed at the threshold."""
    ious: list[list[float | None]] = [[] for _ in range(classes)]
    for item in measured:
        truth = replace(item.sample).truth
        predicted = predictions.of(item.sample, item.threshold)
        pairs = dict(match(truth, predicted))
        for t, annotation in enumerate(item.sample.annotations):
            overlap = None
            if t in pairs and truth.mask is not None and predicted.mask is not None:
                overlap = iou(truth.mask[t], predicted.mask[pairs[t]])
            ious[annotation["category_id"] - 1].append(overlap)
    return ious


# ---- Pictures and video -------------------------------------------------------------------------


def _write_pictures(
    out: Path,
    config: ReportConfig,
    samples: Sequence[Sample],
    heat_maps: Mapping[int, heatmaps.Scored],
) -> list[Picture]:
    """Write the pictures, or put them into their addresses."""
    limits = heatmaps.scale([heat_maps[s.image_id] for s in samples if s.image_id in heat_maps])

    def heat(sample: Sample) -> bytes:
        return _jpeg(heatmaps.coloured(heat_maps[sample.image_id], limits), HEAT_SIDE)

    def both(sample: Sample, place: Callable[[str, bytes], str]) -> Picture:
        name, is_known = f"{sample.image_id}.jpg", sample.image_id in heat_maps
        hot = place(f"heat-{name}", heat(sample)) if is_known else None
        return Picture(place(name, _jpeg(sample.image(), config.side)), hot)

    if config.single_file:
        return [both(sample, lambda _, jpeg: _data_url("image/jpeg", jpeg)) for sample in samples]
    (out / IMAGES).mkdir()

    def write(name: str, jpeg: bytes) -> str:
        (out / IMAGES / name).write_bytes(jpeg)
        return f"{IMAGES}/{name}"

    return [both(sample, write) for sample in samples]


def _jpeg(image: np.ndarray, side: int) -> bytes:
    """An image, reduced to a longest side."""
    scale = side / max(image.shape[:2])
    if scale < 1:
        size = [max(1, round(length * scale)) for length in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return bytes(np.asarray(encoded).tobytes())


def _write_video(out: Path, video: Path | None, *, single_file: bool) -> str | None:
    """Where the page finds the video, as for pictures; None if there is none."""
    if video is None:
        return None
    if not single_file:
        writers.recompress(video, out / VIDEO)
        return VIDEO
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as folder:
        writers.recompress(video, Path(folder) / VIDEO)
        return _data_url("video/mp4", (Path(folder) / VIDEO).read_bytes())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
