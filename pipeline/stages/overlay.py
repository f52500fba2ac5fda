"""Make a review video: truth and prediction of every image, with a verdict where both are known.

What is shown is settled first, image by image and without its pixels: verdicts, order, chapters.
Then pictures are read, drawn and encoded one after the other. The record beside the video has the
`moments` at which its images come.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from pipeline import record
from pipeline.config import OverlayConfig
from pipeline.data import report, writers
from pipeline.data.dataset import Dataset
from pipeline.data.draw import Card, ReviewDrawer
from pipeline.data.files import read_json
from pipeline.data.overlay import panels
from pipeline.data.overlay import reel as reels
from pipeline.data.overlay.panels import HeatMaps
from pipeline.data.overlay.predicted import Predictions
from pipeline.data.overlay.reel import ANNOTATED, SEVERITY, Reel
from pipeline.data.video import ahead
from pipeline.errors import UserError


def run(config: OverlayConfig) -> None:
    """Write the video `config.out` and, beside it, its record. Raises `UserError` for bad input."""
    _check_out(config)
    kind = reels.kind_of(config.source)
    _check_known(config, kind)
    figures = _figures(config.evaluation)
    predictions = Predictions(config.predictions, config.threshold) if config.predictions else None
    heat = _heat_maps(config) if config.heat_maps else None
    if kind in ANNOTATED:
        reel = reels.annotated_reel(config, predictions)
    else:
        assert predictions is not None  # or there would be nothing to show
        reel = reels.plain_reel(config, kind, predictions)
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
    record.write_record(config.out, "overlay", config, moments=reels.moments(config, reel))


def _heat_maps(config: OverlayConfig) -> HeatMaps:
    assert config.heat_maps is not None
    folds = Dataset(config.source).fold_count() if config.fold == "all" else 0
    return HeatMaps(config.heat_maps, config.fold, folds)


# ---- Drawing and encoding -----------------------------------------------------------------------


def _film(
    config: OverlayConfig,
    reel: Reel,
    predictions: Predictions | None,
    heat: HeatMaps | None,
    figures: list[Any],
) -> Counter[str | None]:
    """Draw and encode image by image. Returns how often each verdict was given."""
    views = panels.views(config, predictions is not None)
    notes = []
    if predictions and any("prediction" in view for view in views):
        notes.append(f"score from {predictions.cut} · q: mask quality, by SAM's own estimate")
    if heat is not None:
        notes.append("heat map: the brighter, the less like a good image")
    note = " · ".join(notes)
    size = panels.size(reel.sizes, config.height)
    drawers = [ReviewDrawer(reel.classes, view, size, note) for view in views]
    card = reels.card_frames(config, reel)
    counts: Counter[str | None] = Counter()
    with writers.create(config.out, reel.fps, reels.chapters(config, reel, card)) as video:
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
            captioned = panels.by_caption(shot, image, reel.classes, predictions)
            shown = [captioned[caption][0] for caption in dict.fromkeys(itertools.chain(*views))]
            details = np.vstack([instances.xyxy for instances in shown]) if config.inset else None
            drawn: dict[int, np.ndarray] = {}
            for view, part in panels.parts(config, len(views), reel, time, stays):
                if view not in drawn:
                    chosen = [captioned[caption] for caption in views[view]]
                    beside = {} if hot is None else {len(chosen) - 1: hot}
                    drawn[view] = drawers[view].draw(
                        image, chosen, shot.name, shot.verdict, aside, details, beside
                    )
                video.write(drawn[view], part)
            time += stays
    return counts


def _card(
    config: OverlayConfig,
    reel: Reel,
    predictions: Predictions | None,
    figures: Sequence[tuple[str, str]],
) -> Card:
    about = config.source.resolve().name
    if reels.kind_of(config.source) == "dataset":
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


def _figures(evaluation: Path | None) -> list[tuple[str, str]]:
    """Names and values for the title card, of an evaluation's metrics.json."""
    if evaluation is None:
        return []
    path = evaluation / "metrics.json"
    metrics = read_json(path)
    if not isinstance(metrics, dict):
        raise UserError(f"{path}: expected the figures of an evaluation, found other JSON")
    return [(figure.name, figure.value) for figure in report.key_figures(metrics)]


# ---- Checks -------------------------------------------------------------------------------------


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
    record.check_out("overlay", config)


def _remove(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)
