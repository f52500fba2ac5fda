"""A dataset of bright and dark spots, and `pipeline finetune-yolo` on it as far as the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mvtec_tree import write

from pipeline.config import ConvertConfig, FinetuneYoloConfig
from pipeline.models.yolo_trainer import PromptTrainer
from pipeline.stages import convert, finetune_yolo

CLASSES = ("bright_spot", "dark_spot")
SIDE = 64  # of what the network sees; the images are 64 x 48
SCRATCH = "yolov8n-worldv2.yaml"


def write_dataset(root: Path) -> Path:
    """Noise with a rectangle, bright in one class and dark in the other; and without."""
    rng = np.random.default_rng(0)
    for cls, level in (("good", None), ("bright_spot", 250), ("dark_spot", 5)):
        for i in range(8):
            picture = rng.integers(115, 125, (48, 64, 3), np.uint8)
            mask = np.zeros((48, 64), np.uint8)
            if level is not None:
                x, y, width, height = rng.integers((6, 6, 12, 10), (34, 26, 24, 16))
                for canvas, value in ((picture, level), (mask, 255)):
                    canvas[y : y + height, x : x + width] = value
                write(root / "spots" / "ground_truth" / cls / f"{i:03}_mask.png", mask)
            folder = "train/good" if level is None else f"test/{cls}"
            write(root / "spots" / folder / f"{i:03}.png", picture)
    return converted(root / "spots", root / "converted", (0.5, 0.25, 0.25))


def converted(source: Path, out: Path, fractions: tuple[float, float, float]) -> Path:
    given = {"source": source, "out": out, "fractions": fractions}
    convert.run(ConvertConfig.model_validate(given))
    return out


def options(dataset: Path, out: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "data": str(dataset),
        "out": str(out),
        "model": SCRATCH,
        "text": "learned",
        "epochs": 3,
        "batch": 4,
        "image_size": SIDE,
        "device": "cpu",
        "offline": True,
    }
    return given | changes


def config(dataset: Path, out: Path, **changes: Any) -> FinetuneYoloConfig:
    return FinetuneYoloConfig.model_validate(options(dataset, out, **changes))


class Stop(Exception):
    """Ends a run where training would begin."""


def begin(monkeypatch: pytest.MonkeyPatch, given: FinetuneYoloConfig) -> dict[str, Any]:
    """Go as far as the training, and return what it would be given."""
    handed: dict[str, Any] = {}

    def trainer(overrides: dict[str, Any]) -> None:
        handed.update(overrides)
        raise Stop

    with monkeypatch.context() as context, pytest.raises(Stop):
        context.setattr(finetune_yolo, "PromptTrainer", trainer)
        finetune_yolo.run(given)
    return handed


def shown(
    dataset: Path, out: Path, monkeypatch: pytest.MonkeyPatch, mode: str, **changes: Any
) -> Any:
    """The data set of the training, as the trainer builds it."""
    trainer = PromptTrainer(overrides=begin(monkeypatch, config(dataset, out, **changes)))
    return trainer.build_dataset("", mode, batch=4)
