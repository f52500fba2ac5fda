"""Ultralytics' labels for segmentation: one polygon per instance, and data.yaml.

https://docs.ultralytics.com/datasets/segment/
Each line is a class index and the corners of a polygon as parts of the image's sides. Polygons and
their loss are those of pipeline/data/exchange/outline.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from pipeline.config import read_yaml
from pipeline.data.coco import Item, instance_of
from pipeline.data.exchange import outline
from pipeline.data.exchange.labels import Labels
from pipeline.data.files import write_text
from pipeline.data.masks import decode_rle
from pipeline.errors import UserError


def write(folder: Path, labels: Labels) -> None:
    """Write a label file for each image, the lists of the splits, and data.yaml.

    The format has no place for scores.
    """
    index = {name: i for i, name in enumerate(labels.classes)}
    for item in labels.items:
        lines = [
            f"{index[found.cls]} {_corners(decode_rle(found.rle))}\n" for found in item.instances
        ]
        write_text(folder / "labels" / f"{Path(item.file_name).stem}.txt", "".join(lines))
    for part, names in labels.splits.items():
        write_text(folder / f"{part}.txt", "".join(f"./images/{name}\n" for name in names))
    data = {
        "path": str(labels.root),  # Ultralytics would look for a relative path elsewhere
        **{part: f"{part}.txt" for part in labels.splits},
        "names": dict(enumerate(labels.classes)),
    }
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
    write_text(folder / "data.yaml", text)


def _corners(mask: np.ndarray) -> str:
    height, width = mask.shape
    corners = outline.polygon(mask) / (width, height)
    return " ".join(f"{value:.7f}" for value in corners.ravel())


def read(source: Path, known: Mapping[str, Item]) -> list[Item]:
    """The images that have a label file below `source`, of the classes in its data.yaml.

    An empty file stands for an image without defects. Label files say neither the suffix of an
    image nor its size: both are those of `known`.
    """
    if not source.is_dir():
        raise UserError(f"--source: expected a folder with data.yaml and labels/, found {source}")
    data = read_yaml(source / "data.yaml")
    names = data.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict):
        raise UserError(f"{source / 'data.yaml'}: expected names of classes, found {names!r}")
    by_stem = {Path(name).stem: item for name, item in known.items()}
    paths = sorted(path for path in source.rglob("*.txt") if "labels" in path.parts)
    if not paths:
        raise UserError(f"--source: expected label files in {source / 'labels'}, found none")
    return [_item(path, by_stem.get(path.stem), names) for path in paths]


def _item(path: Path, image: Item | None, names: Mapping[int, str]) -> Item:
    if image is None:
        return Item(path.stem, 0, 0, ())
    instances = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected a label file, found one that is no text") from None
    for number, line in enumerate(lines, start=1):
        values = line.split()
        if not values:
            continue
        where = f"{path}: line {number}"
        try:
            cls, corners = int(values[0]), np.array(values[1:], float)
        except ValueError:
            raise UserError(f"{where}: expected numbers, found {line[:60]!r}") from None
        if cls not in names:
            raise UserError(f"{where}: expected a class of data.yaml, found {cls}")
        if len(corners) < 6 or len(corners) % 2:
            raise UserError(
                f"{where}: expected a polygon of three corners or more, found {len(corners)} values"
            )
        if not (np.isfinite(corners).all() and corners.min() >= 0 and corners.max() <= 1):
            raise UserError(f"{where}: expected corners of 0 to 1, found {line[:60]!r}")
        scaled = corners.reshape(-1, 2) * (image.width, image.height)
        instances.append(
            instance_of(str(names[cls]), outline.filled(scaled, image.height, image.width))
        )
    return Item(image.file_name, image.width, image.height, tuple(instances))
