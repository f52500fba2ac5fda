"""Make a review video: truth and prediction of every image, with a verdict where both are known.

What is shown is settled first, image by image and without its pixels: verdicts, order, chapters.
Then pictures are read, drawn and encoded one after the other. The record beside the video has the
`moments` at which its images come.

Heat maps have a panel of their own, on one scale for all images: under boxes and masks they would
be hidden where it matters, and over them they would hide these.
"""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
from rich.console import Console
from rich.progress import track

from pipeline import record
from pipeline.config import OverlayConfig
from pipeline.data import heatmaps, masks, report, writers
from pipeline.data.coco import read_coco
from pipeline.data.dataset import GOOD, Dataset, Sample
from pipeline.data.draw import Card, ReviewDrawer
from pipeline.data.files import list_images, read_image, read_json
from pipeline.data.matching import match, verdict
from pipeline.data.predictions import PREDICTIONS, from_coco_results, read_images, read_results
from pipeline.data.video import ahead, count_frames, frames, probe
from pipeline.data.writers import Chapter
from pipeline.errors import UserError

SEVERITY = {"miss": 0, "wrong class": 0, "false alarm": 1, "hit": 2, "correct": 3}
RANKS = ("misses and wrong classes", "false alarms", "hits", "correct")
DEFAULT_THRESHOLD = 0.25
ERRORS = ("miss", "wrong class", "false alarm")
IMAGE_RATE = 10  # frames per second, about, for still images: seeking is smooth, the file small
BLINK = 0.5  # seconds of truth, and of prediction: under the three flashes a second of WCAG 2.3.1
WIDEST_PANEL = 2.0  # width / height; an image longer or taller than this gets bars

ANNOTATED = ("dataset", "COCO file")  # the sources that have truth

HEAT_MAP = "heat map"  # caption of its panel

Panel = tuple[sv.Detections, Sequence[str]]  # instances of an image, and a label for each


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


class Predictions:
    """What was predicted for each image, cut at a score. Raises `UserError` if it is nothing such.

    `path` is the output folder of `pipeline segment`, whose images are known by name, or a COCO
    results file, whose image ids are those of the source. Without a `threshold`, images of pooled
    folds have their own.
    """

    def __init__(self, path: Path, threshold: float | None) -> None:
        self.path = path
        self.classes: tuple[str, ...] | None = None  # None: a results file does not say
        self._images: dict[str, dict[str, Any]] | None = None
        file = path
        if not path.is_file():
            file = path / PREDICTIONS
            self.classes, images = read_images(path)
            if not images:
                raise UserError(f"--predictions: expected images in {path}, found none")
            self._images = {image["file_name"]: image for image in images}
        self._results = read_results(file)
        if self.classes is not None:
            self.check_ids(len(self.classes))
        self._threshold = threshold

    @property
    def sizes(self) -> list[tuple[int, int]]:
        assert self._images is not None
        return [(image["width"], image["height"]) for image in self._images.values()]

    def check_ids(self, count: int) -> None:
        """Raise `UserError` unless all category ids are those of `count` classes."""
        found = {e["category_id"] for entries in self._results.values() for e in entries}
        if unknown := found - set(range(1, count + 1)):
            file = self.path if self._images is None else self.path / PREDICTIONS
            raise UserError(
                f"{file}: expected category ids from 1 to {count}, "
                f"found {', '.join(map(str, sorted(unknown)))}"
            )

    def entries(self, name: str, image_id: int) -> list[dict[str, Any]]:
        """COCO results of an image, from the threshold on. Raises `UserError` if it was not seen.

        `image_id` is that of the source.
        """
        image: dict[str, Any] = {"id": image_id}
        if self._images is not None:
            if name not in self._images:
                raise UserError(
                    f"--predictions: expected the image {name} in {self.path}, found none"
                )
            image = self._images[name]
        threshold = self._threshold
        if threshold is None:
            threshold = image.get("threshold", DEFAULT_THRESHOLD)
        return [e for e in self._results.get(image["id"], []) if e["score"] >= threshold]

    def of(self, name: str, image_id: int, size: tuple[int, int]) -> sv.Detections:
        """Instances of an image of this (width, height). Raises `UserError` if it was another."""
        found = self.entries(name, image_id)
        image = self._images[name] if self._images is not None else {}
        sizes = [(image["width"], image["height"])] if image else []
        sizes += [tuple(e["segmentation"]["size"][::-1]) for e in found if e.get("segmentation")]
        for other in sizes:
            if other != size:
                raise UserError(f"--predictions: {name}: expected a size of {size}, found {other}")
        return from_coco_results(found)

    def is_unknown(self, name: str, image_id: int) -> bool:
        """Whether an image is anomalous and shows no known class, as far as that is known."""
        its = None if self._images is None else self._images[name].get("anomaly")
        if its is None or its["score"] < its["threshold"]:
            return False
        return not self.entries(name, image_id)

    @property
    def cut(self) -> str:
        """The score from which instances count, in words."""
        if self._threshold is not None:
            return f"{self._threshold:.3g}"
        images = [] if self._images is None else self._images.values()
        found = {i.get("threshold", DEFAULT_THRESHOLD) for i in images} or {DEFAULT_THRESHOLD}
        return f"{min(found):.3g}" if len(found) == 1 else f"{min(found):.3g}–{max(found):.3g}"


class HeatMaps:
    """The heat maps of the images. Raises `UserError` if there are none.

    `folds` is the number of folds of a video of all of them, whose `path` has `{fold}` in it.
    """

    def __init__(self, path: Path, folds: int | None) -> None:
        self._path = path
        self._found = heatmaps.read_by_id(path, folds)
        self._limits = heatmaps.scale(list(self._found.values()))

    def of(self, shot: Shot) -> heatmaps.Scored:
        """That of an image. Raises `UserError` if there is none, or of another image."""
        found = self._found.get(shot.image_id)
        if found is None:
            raise UserError(
                f"--heat-maps: expected that of {shot.name} in {self._path}, found none"
            )
        size = found.width, found.height  # of an image without truth it shows when it is read
        if shot.sample is not None:
            size = shot.sample.width, shot.sample.height
        found.check("--heat-maps", shot.name, *size)
        return found

    def over(self, shot: Shot, image: np.ndarray) -> np.ndarray:
        """The image under its heat map. Raises `UserError` if that is of another image."""
        scored = self.of(shot)
        scored.check("--heat-maps", shot.name, image.shape[1], image.shape[0])
        return heatmaps.blended(image, scored, self._limits)


def run(config: OverlayConfig) -> None:
    """Write the video `config.out` and, beside it, its record. Raises `UserError` for bad input."""
    _check_out(config)
    kind = _kind(config.source)
    _check_known(config, kind)
    figures = _figures(config.evaluation)
    predictions = Predictions(config.predictions, config.threshold) if config.predictions else None
    heat = _heat_maps(config) if config.heat_maps else None
    if kind in ANNOTATED:
        reel = _annotated_reel(config, predictions)
    else:
        assert predictions is not None  # or there would be nothing to show
        reel = _plain_reel(config, kind, predictions)
    if heat is not None:
        for shot in reel.shots or ():
            heat.of(shot)

    record.record_path(config.out).unlink(missing_ok=True)
    if reel.length == 0:
        _remove(config.out)  # with --force, an older run's errors
        print(f"no {'errors' if 'errors' in config.only else 'images'}: no video written")
    else:
        counts = _film(config, reel, predictions, heat, figures)
        if verdicts := [f"{counts[word]} {word}" for word in SEVERITY if counts[word]]:
            print(", ".join(verdicts))
        print(f"video: {config.out} ({counts.total()} images)")
    record.write_record(config.out, "overlay", config, moments=_moments(config, reel))


# ---- What is shown ------------------------------------------------------------------------------


def _annotated_reel(config: OverlayConfig, predictions: Predictions | None) -> Reel:
    """The images of a split or a COCO file, with verdicts, one image's masks at a time."""
    if config.source.is_file():
        classes, samples = read_coco(config.source, config.images)
    else:
        dataset = Dataset(config.source)
        classes, samples = dataset.classes, dataset.split(config.split, config.fold)
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


def _plain_reel(config: OverlayConfig, kind: str, predictions: Predictions) -> Reel:
    """A folder, or the frames of a video in their order."""
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
    truth = _truth(sample)
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


def _truth(sample: Sample) -> sv.Detections:
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


def _chapters(config: OverlayConfig, reel: Reel, card: int) -> list[Chapter]:
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


def _moments(config: OverlayConfig, reel: Reel) -> list[dict[str, Any]]:
    """When each image comes, in seconds; none for a video, whose frames have a time already.

    It is the middle of the image's first frame: a player that seeks there surely shows it.
    """
    first = _card_frames(config, reel)
    return [
        {
            "image_id": shot.image_id,
            "file_name": shot.name,
            "seconds": round(float((first + i * reel.repeat + Fraction(1, 2)) / reel.fps), 4),
        }
        for i, shot in enumerate(reel.shots or ())
    ]


def _card_frames(config: OverlayConfig, reel: Reel) -> int:
    return round(config.title_seconds * reel.fps)


# ---- Drawing and encoding -----------------------------------------------------------------------


def _film(
    config: OverlayConfig,
    reel: Reel,
    predictions: Predictions | None,
    heat: HeatMaps | None,
    figures: list[Any],
) -> Counter[str | None]:
    """Draw and encode image by image. Returns how often each verdict was given."""
    views = _views(config, predictions is not None)
    notes = []
    if predictions and any("prediction" in view for view in views):
        notes.append(f"score from {predictions.cut} · q: mask quality, by SAM's own estimate")
    if heat is not None:
        notes.append("heat map: the brighter, the less like a good image")
    note = " · ".join(notes)
    size = _panel_size(reel.sizes, config.height)
    drawers = [ReviewDrawer(reel.classes, view, size, note) for view in views]
    card = _card_frames(config, reel)
    counts: Counter[str | None] = Counter()
    with writers.create(config.out, reel.fps, _chapters(config, reel, card)) as video:
        if card:
            video.write(drawers[0].card(_card(config, reel, predictions, figures)), card)
        pictures = track(
            ahead(reel.pictures),
            "overlay",
            reel.length,
            console=Console(stderr=True),
            transient=True,
        )
        time = 0  # frames, of pictures
        for shot, image, stays in pictures:
            counts[shot.verdict] += 1
            aside = f"{counts.total()} / {reel.length}" if reel.length else f"{counts.total()}"
            if shot.overlap > 0:
                aside = f"IoU {shot.overlap:.2f}   {aside}"
            if predictions and predictions.is_unknown(shot.name, shot.image_id):
                aside = f"anomalous, no known class   {aside}"
            hot = None if heat is None else heat.over(shot, image)
            panels = _panels(shot, image, reel.classes, predictions)
            shown = [panels[caption][0] for caption in dict.fromkeys(itertools.chain(*views))]
            details = np.vstack([instances.xyxy for instances in shown]) if config.inset else None
            drawn: dict[int, np.ndarray] = {}
            for view, part in _parts(config, len(views), reel, time, stays):
                if view not in drawn:
                    chosen = [panels[caption] for caption in views[view]]
                    beside = {} if hot is None else {len(chosen) - 1: hot}
                    drawn[view] = drawers[view].draw(
                        image, chosen, shot.name, shot.verdict, aside, details, beside
                    )
                video.write(drawn[view], part)
            time += stays
    return counts


def _views(config: OverlayConfig, has_predictions: bool) -> list[tuple[str, ...]]:
    """The captions of the panels that are seen together; views take turns.

    A heat map is beside whatever else is seen.
    """
    heat = (HEAT_MAP,) if config.heat_maps else ()
    known = ("truth",) * (_kind(config.source) in ANNOTATED) + ("prediction",) * has_predictions
    if config.layout == "side-by-side":
        return [known + heat]
    if config.layout == "blink":
        turns = known if len(known) == 2 else ("image", *known)
        return [(caption, *heat) for caption in turns]
    return [(config.layout, *heat)]


def _parts(
    config: OverlayConfig, views: int, reel: Reel, time: int, stays: int
) -> list[tuple[int, int]]:
    """Which view a picture has for how many frames, from frame `time` on for `stays` frames."""
    if stays == 0:
        return []
    if views == 1:
        return [(0, stays)]
    if reel.shots is None:  # a video goes on while its views take turns
        return [(int(time / reel.fps / BLINK) % views, stays)]
    turns = views * max(1, min(round(stays / reel.fps / BLINK), stays) // views)
    if not config.out.suffix:  # numbered pictures: one of each
        turns = views
    ends = [round(turn * stays / turns) for turn in range(turns + 1)]
    return [(turn % views, ends[turn + 1] - ends[turn]) for turn in range(turns)]


def _panels(
    shot: Shot, image: np.ndarray, classes: tuple[str, ...], predictions: Predictions | None
) -> dict[str, Panel]:
    """What a panel of each caption shows."""
    instances = {"image": sv.Detections.empty(), HEAT_MAP: sv.Detections.empty()}
    if shot.sample is not None:
        instances["truth"] = _truth(shot.sample)
    if predictions is not None:
        size = image.shape[1], image.shape[0]
        instances["prediction"] = predictions.of(shot.name, shot.image_id, size)
    return {caption: (found, _labels(found, classes)) for caption, found in instances.items()}


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


def _card(
    config: OverlayConfig,
    reel: Reel,
    predictions: Predictions | None,
    figures: Sequence[tuple[str, str]],
) -> Card:
    about = config.source.resolve().name
    if _kind(config.source) == "dataset":
        about += f", {config.split} split"
        if config.fold is not None:
            about += " of all folds" if config.fold == "all" else f" of fold {config.fold}"
    if reel.length is not None:
        about += f": {reel.length} images"
    if config.only:
        about += f" (only {', '.join(config.only)})"
    lines = [about] + ([f"score from {predictions.cut}"] if predictions else [])
    labels = Counter(shot.label for shot in reel.shots or ())
    verdicts = Counter(shot.verdict for shot in reel.shots or ())
    return Card(
        config.title or report.run_name(config.out.resolve().parent, config.fold),
        lines,
        figures,
        {k: f"{name}: {labels[k]}" for k, name in enumerate(reel.classes) if reel.shots},
        {word: verdicts[word] for word in SEVERITY if verdicts[word]},
    )


def _heat_maps(config: OverlayConfig) -> HeatMaps:
    assert config.heat_maps is not None
    folds = Dataset(config.source).fold_count() if config.fold == "all" else None
    return HeatMaps(config.heat_maps, folds)


def _figures(evaluation: Path | None) -> list[tuple[str, str]]:
    """Names and values for the title card, of an evaluation's metrics.json."""
    if evaluation is None:
        return []
    path = evaluation / "metrics.json"
    metrics = read_json(path)
    if not isinstance(metrics, dict):
        raise UserError(f"{path}: expected the figures of an evaluation, found other JSON")
    return [(figure.name, figure.value) for figure in report.key_figures(metrics)]


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


def _panel_size(sizes: list[tuple[int, int]], height: int) -> tuple[int, int]:
    """(width, height) of a panel with the images' median aspect."""
    aspect = statistics.median(w / h for w, h in sizes)
    return round(height * min(max(aspect, 1 / WIDEST_PANEL), WIDEST_PANEL)), height


# ---- Checks -------------------------------------------------------------------------------------


def _kind(source: Path) -> str:
    """'dataset', 'COCO file', 'folder' or 'video'. Raises `UserError` when nothing is there."""
    if not source.exists():
        raise UserError(
            "--source: expected a dataset, a COCO file, a folder of images or a video, "
            f"found nothing at {source}"
        )
    if source.is_dir():
        return "dataset" if (source / "annotations" / "instances.json").is_file() else "folder"
    return "COCO file" if source.suffix.lower() == ".json" else "video"


def _check_known(config: OverlayConfig, kind: str) -> None:
    """Raise `UserError` for what source and predictions cannot give."""
    has_truth, has_predictions = kind in ANNOTATED, config.predictions is not None
    problems = []
    if config.layout == "truth" and not has_truth:
        problems.append(
            f"--layout: expected a dataset or a COCO file for 'truth', found the {kind} "
            f"{config.source}"
        )
    if not has_predictions and (config.layout == "prediction" or not has_truth):
        problems.append(
            "--predictions: expected an output folder of `pipeline segment`, found none"
        )
    if not (has_truth and has_predictions):
        what = "expected truth and predictions for verdicts, found only one of them"
        problems += [f"--order: {what}"] if config.order == "worst" else []
        problems += [f"--only: {what}"] if "errors" in config.only else []
    if config.order == "score" and (kind == "video" or not has_predictions):
        found = (
            f"a video, which keeps its own order: {config.source}" if has_predictions else "none"
        )
        problems.append(f"--order: expected predictions of images for 'score', found {found}")
    if problems:
        raise UserError(*problems)


def _check_out(config: OverlayConfig) -> None:
    suffix = config.out.suffix.lower()
    if suffix not in writers.SUFFIXES:
        raise UserError(
            "--out: expected a file ending in .mp4, .webm or .gif, or a folder without a dot in "
            f"its name, found {config.out}"
        )
    if suffix:
        record.claim_file(config.out, config.force)
    else:
        record.check_folder(config.out, config.force)


def _remove(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)
