"""What classifiers say of images: the files that `pipeline evaluate` reads and people look at.

predictions.json      name, classes and, of the validation and test images, `images`: id, file_name,
                      width and height as COCO has them, and the probabilities of the classes
accuracy.json         accuracy and balanced accuracy of each split
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.data.dataset import Sample
from pipeline.data.decision import confusion_matrix, decision_scores
from pipeline.data.files import write_json
from pipeline.data.predictions import PREDICTIONS


@dataclass(frozen=True)
class Classified:
    """A split's images, and how probable a classifier finds each class."""

    samples: Sequence[Sample]
    labels: np.ndarray  # (n,) 0 is good, then the dataset's classes
    probabilities: np.ndarray  # (n, classes)
    seconds: float  # that predictions took, with reading the images


def write(
    out: Path, name: str, classes: Sequence[str], splits: Mapping[str, Classified]
) -> dict[str, dict[str, float]]:
    """Write both files, print the accuracies as a table, and return them by split.

    A split without images is left out.
    """
    table = Table("split", "images", "accuracy", "balanced accuracy", "always good", title=name)
    accuracies: dict[str, dict[str, float]] = {}
    images: list[dict[str, Any]] = []
    for part, split in splits.items():
        if not split.samples:
            continue
        decisions = split.probabilities.argmax(axis=1)
        scores = decision_scores(confusion_matrix(split.labels, decisions, len(classes)))
        accuracies[part] = {
            "images": len(split.samples),
            "accuracy": float(scores.accuracy),
            "balanced_accuracy": float(scores.balanced_accuracy),
            "always_good": float((split.labels == 0).mean()),
        }
        count, *values = accuracies[part].values()
        table.add_row(part, str(count), *(f"{value:.3f}" for value in values))
        if part != "train":
            images += map(_image, split.samples, split.probabilities)
    write_json(out / PREDICTIONS, {"name": name, "classes": list(classes), "images": images})
    write_json(out / "accuracy.json", accuracies)
    Console().print(table)
    return accuracies


def _image(sample: Sample, probabilities: np.ndarray) -> dict[str, Any]:
    """What predictions.json has of an image."""
    return {
        "id": sample.image_id,
        "file_name": sample.path.name,
        "width": sample.width,
        "height": sample.height,
        "probabilities": [round(p, 6) for p in probabilities.tolist()],
    }


def seconds_per_image(splits: Mapping[str, Classified]) -> float:
    """The seconds that a prediction took, of the images that are not for training."""
    unseen = [split for part, split in splits.items() if part != "train"]
    return sum(split.seconds for split in unseen) / sum(len(split.samples) for split in unseen)
