"""`pipeline convert`, and what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from pipeline import cli

PARTS = ("train", "val", "test")


def convert(source: Path, out: Path, *flags: str) -> Path:
    """Run the command; returns `out`. A failure is `SystemExit`."""
    cli.main(["convert", "--source", str(source), "--out", str(out), *flags])
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def instances(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """COCO annotations by image stem, in file order."""
    coco = read(folder / "annotations" / "instances.json")
    stems = {image["id"]: Path(image["file_name"]).stem for image in coco["images"]}
    result: dict[str, list[dict[str, Any]]] = {stem: [] for stem in stems.values()}
    for annotation in coco["annotations"]:
        result[stems[annotation["image_id"]]].append(annotation)
    return result


def union(annotations: list[dict[str, Any]]) -> np.ndarray:
    return coco_mask.decode([a["segmentation"] for a in annotations]).any(axis=2)


def contents(folder: Path, *, record: bool = True) -> dict[str, bytes]:
    """Every file's bytes; without `record`, less what names the run."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (record or path.name not in ("config.yaml", "run.json"))
    }
