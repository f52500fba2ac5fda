"""Learn from good images alone; score all others, with heat maps.

Output folder: model.safetensors (what was learned, see `pipeline.models.anomaly`), scores.json and
heatmaps/ (see `pipeline.data.heatmaps`), metrics.json, config.yaml, run.json; and of a method that
trains a network, results.csv and curves.png, the loss of each epoch.

metrics.json. Null stands for a figure that the data do not define, such as those at a threshold
where there is no val split with defects to choose it on.

    method, fold
    protocol                           `mvtec` (train/good, test) or `dataset` (its splits)
    good_images, images, defective     learned; measured, all of the test split
    image.auroc, .average_precision
    image.threshold                    score with the best F1 on val
    image.recall, .false_alarm_rate    parts of the defective and of the good images from it on
    pixel.auroc, .pro                  see pipeline/data/anomaly.py
    pixel.threshold                    value with the best IoU on val, all pixels pooled
    pixel.iou                          IoU of all pixels from it on, pooled
    seconds.training, .inference, .inference_per_image
        wall clock, with reading the images and, for inference, writing the heat maps
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from pipeline import record
from pipeline.config import DetectAnomalyConfig
from pipeline.data import anomaly as figures
from pipeline.data import heatmaps, one_class
from pipeline.data.files import read_image, write_json
from pipeline.data.one_class import OneClass, Picture
from pipeline.models import anomaly, training
from pipeline.models.anomaly_method import BATCH, Method
from pipeline.models.classifier import resized
from pipeline.models.device import torch_device

COMMAND = "detect-anomaly"


def run(config: DetectAnomalyConfig) -> None:
    """Raises `UserError` for a source that is neither a category nor a dataset."""
    device = torch_device(config.device)
    source = one_class.read(config.source, config.fold)
    method = anomaly.create(config).to(device)
    with record.result(COMMAND, config) as out:
        values = _fit_and_score(method, source, config, out)
        record.write_record(out, COMMAND, config)
    _show(values)
    print(f"scores and heat maps of {len(source.pictures)} images: {config.out}")


def _fit_and_score(
    method: Method, source: OneClass, config: DetectAnomalyConfig, out: Path
) -> dict[str, Any]:
    """Write all files; returns the content of metrics.json."""
    started = time.monotonic()
    with Progress() as progress:
        bar = progress.add_task("reading", total=len(source.good))
        images = torch.cat(list(_images(source.good, config.image_size, progress, bar)))
        bar = progress.add_task("", total=1)
        method.fit(
            images, lambda done, words: progress.update(bar, completed=done, description=words)
        )
    anomaly.save(method, out)
    if method.losses:
        training.write_results(out / "results.csv", method.losses)
        training.plot_curves(out / "curves.png", method.losses, [["loss"]])
    fitted = time.monotonic()
    _score(method, source, out)
    seconds = {"training": fitted - started, "inference": time.monotonic() - fitted}

    values = {
        "method": config.method,
        "protocol": source.protocol,
        "fold": config.fold,
        "good_images": len(source.good),
        **_measure(source, heatmaps.read_scores(out)),
        "seconds": {
            **{key: round(value, 1) for key, value in seconds.items()},
            "inference_per_image": round(seconds["inference"] / len(source.pictures), 3),
        },
    }
    write_json(out / heatmaps.METRICS, values)
    return values


def _images(
    paths: Sequence[Path], size: int, progress: Progress, bar: TaskID
) -> Iterator[torch.Tensor]:
    """The images (n, 3, size, size), batch by batch; the bar shows how many have been used."""
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        yield torch.stack([resized(read_image(path), size) for path in batch])
        progress.advance(bar, len(batch))


def _score(method: Method, source: OneClass, out: Path) -> None:
    """Write the scores and heat maps of all pictures."""
    entries: list[dict[str, Any]] = []
    pictures = iter(source.pictures)
    paths = [picture.sample.path for picture in source.pictures]
    with Progress() as progress:
        bar = progress.add_task("scoring", total=len(paths))
        for images in _images(paths, method.image_size, progress, bar):
            for score, values in zip(*method.score(images), strict=True):
                picture = next(pictures)
                heat_map = heatmaps.write_heat_map(out, picture.name, values.numpy())
                entries.append(_entry(source, picture, float(score), heat_map))
    heatmaps.write_scores(out, entries)


def _entry(
    source: OneClass, picture: Picture, score: float, heat_map: dict[str, Any]
) -> dict[str, Any]:
    sample = picture.sample
    return {
        "id": sample.image_id,
        "file_name": picture.name,
        "width": sample.width,
        "height": sample.height,
        "split": picture.split,
        "class": source.class_of(sample),
        "score": score,
        "heat_map": heat_map,
    }


# Figures


def _measure(source: OneClass, scored: Sequence[heatmaps.Scored]) -> dict[str, Any]:
    """The figures of the test split, with thresholds from the val split."""
    low, high = min(s.low for s in scored), max(s.high for s in scored)
    pixels = {split: figures.PixelScores(low, high) for split in ("val", "test")}
    for picture, its in zip(source.pictures, scored, strict=True):
        pixels[picture.split].add(its.heat_map(), picture.sample.defect())
    scores = {split: np.array([s.score for s in scored if s.split == split]) for split in pixels}
    defective = {
        split: np.array([p.sample.label >= 0 for p in source.pictures if p.split == split], bool)
        for split in pixels
    }
    return {
        "images": len(scores["test"]),
        "defective": int(defective["test"].sum()),
        "image": figures.image_figures(scores, defective),
        "pixel": figures.pixel_figures(pixels),
    }


def _show(values: dict[str, Any]) -> None:
    table = Table(title=f"{values['method']}, {values['images']} test images")
    shown = {
        "image AUROC": values["image"]["auroc"],
        "AP": values["image"]["average_precision"],
        "pixel AUROC": values["pixel"]["auroc"],
        "PRO": values["pixel"]["pro"],
        "pixel IoU": values["pixel"]["iou"],
    }
    for title in (*shown, "training, s", "per image, s"):
        table.add_column(title, justify="right")
    seconds = values["seconds"]
    table.add_row(
        *("–" if value is None else f"{value:.3f}" for value in shown.values()),
        f"{seconds['training']:.0f}",
        f"{seconds['inference_per_image']:.2f}",
    )
    Console().print(table)
