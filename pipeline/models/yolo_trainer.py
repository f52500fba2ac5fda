"""Ultralytics' training loop, fed with our datasets and prompts.

A module of its own because Ultralytics imports the trainer by name in every process when it trains
on several GPUs.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data import augment
from pipeline.data.coco import yolo_label
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.files import write_text
from pipeline.models.ultralytics_settings import isolate, quiet

isolate()

from ultralytics.data.augment import Albumentations
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import RANK
from ultralytics.utils.plotting import plot_results


class PromptTrainer(DetectionTrainer):
    """Trains a `PromptedWorldModel` as it comes from its checkpoint.

    Ultralytics' own WorldTrainer asks CLIP for the class names in every run; here the prompts are
    part of the model.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        threads = torch.get_num_threads()
        with quiet():
            super().__init__(*args, **options)
        torch.set_num_threads(threads)  # Ultralytics leaves one core idle, half of a small machine
        if self.ddp:  # this process only starts the others, and would first empty the run folder
            self.resume = True

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        assert weights is not None, "training starts from the checkpoint that the stage wrote"
        return weights.requires_grad_()  # a finished checkpoint comes frozen

    def _setup_train(self) -> None:
        with quiet():
            super()._setup_train()

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Go on after the checkpoint's epoch, forgetting one that was logged but not saved."""
        super().resume_training(ckpt)
        if self.resume and RANK in {-1, 0}:
            rows = self.csv.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(self.csv, "".join(rows[: 1 + self.start_epoch]))

    def save_model(self) -> bool:
        """Write checkpoints under other names first: a kill must not leave half of one."""
        final = {"best": self.best, "last": self.last}  # last is last: it says how far the run is
        for name, path in final.items():
            setattr(self, name, path.with_name(f".{path.name}"))
        saved: bool = super().save_model()
        for name, path in final.items():
            written = getattr(self, name)
            if written.exists():
                written.replace(path)
            setattr(self, name, path)
        return saved

    def final_eval(self) -> None:
        """Measure the best checkpoint. (Ultralytics also rewrites it here: the stage does that.)"""
        self.validator.args.plots = self.args.plots
        self.metrics = self.validator(model=self.best)

    def build_dataset(
        self, img_path: str, mode: str = "train", batch: int | None = None
    ) -> YOLODataset:
        samples = Dataset(Path(self.data["path"])).split(*self.data["splits"][mode])
        options = copy(self.args)
        options.deterministic = False  # or it warns of the cache, whose order is in truth fixed
        return CocoTruthDataset(
            samples=samples,
            img_path=img_path,
            imgsz=self.args.imgsz,
            batch_size=batch,
            augment=mode == "train",
            hyp=options,
            rect=False,
            cache="ram",
            stride=32,
            prefix=f"{mode}: ",
            task="detect",
            data=self.data,
        )


def plot_curves(results: Path) -> None:
    """Plot `results.csv` as `results.png` beside it."""
    plot_results(results)


class CocoTruthDataset(YOLODataset):
    """Boxes from the dataset's COCO truth. Writes no cache, so the dataset may be read-only."""

    def __init__(self, *, samples: list[Sample], **options: Any) -> None:
        self._samples = samples
        super().__init__(**options)

    def build_transforms(self, hyp: Any = None) -> Any:
        with quiet():
            transforms = super().build_transforms(hyp)
        for transform in transforms.transforms:
            if isinstance(transform, Albumentations) and transform.transform is not None:
                augment.seed(transform.transform, np.random.default_rng(hyp.seed))
        return transforms

    def get_img_files(self, img_path: Any) -> list[str]:
        return [str(sample.path) for sample in self._samples]

    def get_labels(self) -> list[dict[str, Any]]:
        return [_label(sample) for sample in self._samples]


def _label(sample: Sample) -> dict[str, Any]:
    """Ultralytics' label of one image: class (n, 1); centre and size (n, 4), parts of the image."""
    boxes = [
        yolo_label((x, y, x + width, y + height), sample.width, sample.height)
        for x, y, width, height in (annotation["bbox"] for annotation in sample.annotations)
    ]
    classes = np.array([a["category_id"] - 1 for a in sample.annotations], np.float32)
    return {
        "im_file": str(sample.path),
        "shape": (sample.height, sample.width),
        "cls": classes.reshape(-1, 1),
        "bboxes": np.array(boxes, np.float32).reshape(-1, 4),
        "segments": [],
        "keypoints": None,
        "normalized": True,
        "bbox_format": "xywh",
    }
