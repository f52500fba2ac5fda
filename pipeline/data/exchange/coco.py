"""COCO instances with run lengths, in the folders that CVAT, datumaro and FiftyOne look for.

https://cocodataset.org/#format-data. Predictions have a `score` as well, as COCO results do.

What a file says is read to the pixel, but not every tool writes it so: datumaro and CVAT's brush
write run lengths, FiftyOne polygons that are up to two pixels off.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.coco import Item, instances_json, read_instances
from pipeline.data.exchange.labels import Labels, find_file
from pipeline.data.files import write_json

FILE = "annotations/instances_default.json"
FIFTYONE_FILE = "labels.json"


def write(folder: Path, labels: Labels) -> None:
    """Write annotations/instances_default.json."""
    write_json(folder / FILE, _instances(labels))


def write_fiftyone(folder: Path, labels: Labels) -> None:
    """Write labels.json, with the images in data/: FiftyOne's COCODetectionDataset.

    https://docs.voxel51.com/user_guide/import_datasets.html
    """
    write_json(folder / FIFTYONE_FILE, _instances(labels))


def _instances(labels: Labels) -> dict[str, Any]:
    return instances_json(labels.items, labels.classes)


def read(source: Path, known: Mapping[str, Item]) -> list[Item]:
    """The images of a COCO instances file: each is one that was looked at, also without a mask.

    Masks may be polygons or run lengths of any kind; without one, an annotation is an error.
    """
    patterns = ("annotations/instances*.json", "annotations/*.json", FIFTYONE_FILE, "*.json")
    return read_instances(find_file(source, *patterns))
