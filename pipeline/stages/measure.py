"""`pipeline measure`: the size, orientation and place of every predicted mask, as a table.

The CSV has one line per mask, in the order of the images and, in each, of the predictions; an image
without a mask has none. Its columns:

    image, image_id, class, score
    quality                     SAM's own estimate of the mask's IoU; empty if it is not known
    area                        count of pixels
    length, width, orientation  sides of the smallest rectangle around the mask, at any angle; angle
                                of the long one in [0, 180) degrees, counter-clockwise from the
                                x axis as seen in the image
    centroid_x, centroid_y      mean of the mask's pixels
    bbox_x, _y, _width, _height the mask's upright box

Lengths are in pixels, see `pipeline.data.measurements`. With --mm-per-px they come again in
millimetres: area_mm2, length_mm and so on. A mask without a pixel, which SAM may give for a box,
has the area 0 and nothing else.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pipeline import record
from pipeline.config import MeasureConfig
from pipeline.data.files import write_text
from pipeline.data.masks import decode_rle
from pipeline.data.measurements import LENGTHS, Measurement, in_millimetres, measure
from pipeline.data.predictions import PREDICTIONS, check_masks, read_images, read_results
from pipeline.errors import UserError

PIXEL_COLUMNS = (
    "image", "image_id", "class", "score", "quality", *(f.name for f in fields(Measurement)),
)  # fmt: skip
MM_COLUMNS = ("area_mm2", *(f"{name}_mm" for name in LENGTHS))
Row = dict[str, Any]


def run(config: MeasureConfig) -> None:
    """Write the table `config.out` and, beside it, its record. Raises `UserError` for bad input."""
    _check_out(config)
    classes, images = read_images(config.predictions)
    results = read_results(config.predictions / PREDICTIONS)
    check_masks(config.predictions, classes, images, results)
    kept = [
        (image, entry)
        for image in images
        for entry in results.get(image["id"], ())
        if entry["score"] >= config.threshold
    ]
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        rows = [
            _row(image, classes, entry, config.mm_per_px)
            for image, entry in progress.track(kept, description="measure")
        ]
    columns = PIXEL_COLUMNS if config.mm_per_px is None else PIXEL_COLUMNS + MM_COLUMNS
    record.record_path(config.out).unlink(missing_ok=True)
    write_text(config.out, _csv(columns, rows))
    record.write_record(config.out, "measure", config)
    Console().print(_summary(classes, rows, in_mm=config.mm_per_px is not None))
    if empty := sum(row["area"] == 0 for row in rows):
        print(f"empty masks: {empty} (area 0, and nothing else)")
    print(f"measurements: {config.out} ({len(rows)} masks in {len(images)} images)")


# Input


def _check_out(config: MeasureConfig) -> None:
    if config.out.suffix.lower() != ".csv":
        raise UserError(f"--out: expected a file ending in .csv, found {config.out}")
    record.check_out("measure", config)


# Measuring


def _row(
    image: Mapping[str, Any],
    classes: Sequence[str],
    entry: Mapping[str, Any],
    mm_per_px: float | None,
) -> Row:
    """One line of the table, by column; what is not known is left out."""
    row = {
        "image": image["file_name"],
        "image_id": image["id"],
        "class": classes[entry["category_id"] - 1],
        "score": entry["score"],
    }
    if entry.get("quality") is not None:
        row["quality"] = entry["quality"]
    return row | _measured(decode_rle(entry["segmentation"]), mm_per_px)


def _measured(mask: np.ndarray, mm_per_px: float | None) -> Row:
    if not mask.any():
        return {"area": 0} if mm_per_px is None else {"area": 0, "area_mm2": 0}
    measurement = measure(mask)
    in_mm = {} if mm_per_px is None else in_millimetres(measurement, mm_per_px)
    return asdict(measurement) | in_mm


# Output


def _csv(columns: Sequence[str], rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def _summary(classes: Sequence[str], rows: Sequence[Row], in_mm: bool) -> Table:
    """Count, median length and median area of each class; empty masks count without a size."""
    length, area, unit = ("length_mm", "area_mm2", "mm") if in_mm else ("length", "area", "px")
    table = Table()
    table.add_column("class", overflow="fold")
    for title in ("masks", f"median length, {unit}", f"median area, {unit}²"):
        table.add_column(title, justify="right")
    for name in classes:
        found = [row for row in rows if row["class"] == name]
        measured = [row for row in found if row["area"]]
        medians = [
            f"{statistics.median(row[key] for row in measured):.4g}" if measured else "–"
            for key in (length, area)
        ]
        table.add_row(name, str(len(found)), *medians)
    return table
