"""What was predicted for the images of a video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import supervision as sv

from pipeline.data.evaluation.thresholds import DEFAULT_THRESHOLD
from pipeline.data.predictions import PREDICTIONS, from_coco_results, read_images, read_results
from pipeline.errors import UserError


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
