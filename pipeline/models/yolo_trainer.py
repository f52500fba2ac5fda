"""Ultralytics' training loop, fed with our datasets and prompts.

A module of its own because Ultralytics imports the trainer by name in every process when it trains
on several GPUs.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.dataset import Dataset, Sample
from pipeline.models.ultralytics_settings import isolate

isolate()

from ultralytics.data.augment import Albumentations  # noqa: E402
from ultralytics.data.dataset import YOLODataset  # noqa: E402
from ultralytics.models.yolo.detect import DetectionTrainer  # noqa: E402
from ultralytics.nn.tasks import WorldModel  # noqa: E402


class PromptTrainer(DetectionTrainer):
    """Trains a `PromptedWorldModel` as it comes from its checkpoint.

    Ultralytics' own WorldTrainer asks CLIP for the class names in every run; here the prompts are
    part of the model.
    """

    def get_model(
        self, cfg: Any = None, weights: WorldModel | None = None, verbose: bool = True
    ) -> Any:
        assert weights is not None, "training starts from the checkpoint that the stage wrote"
        return weights

    def save_model(self) -> None:
        """Write checkpoints under other names first: a kill must not leave half of one."""
        final = {"last": self.last, "best": self.best}
        for name, path in final.items():
            setattr(self, name, path.with_name(f".{path.name}"))
        super().save_model()
        for name, path in final.items():
            written = getattr(self, name)
            if written.exists():
                written.replace(path)
            setattr(self, name, path)

    def build_dataset(
        self, img_path: str, mode: str = "train", batch: int | None = None
    ) -> YOLODataset:
        samples = Dataset(Path(self.data["path"])).split(*self.data["splits"][mode])
        return CocoTruthDataset(
            samples=samples,
            img_path=img_path,
            imgsz=self.args.imgsz,
            batch_size=batch,
            augment=mode == "train",
            hyp=copy(self.args),
            rect=False,
            cache="ram",
            stride=32,
            prefix=f"{mode}: ",
            task="detect",
            data=self.data,
        )


class CocoTruthDataset(YOLODataset):
    """Boxes from the dataset's COCO truth. Writes no cache, so the dataset may be read-only."""

    def __init__(self, *, samples: list[Sample], **options: Any) -> None:
        self._samples = samples
        super().__init__(**options)

    def build_transforms(self, hyp: Any = None) -> Any:
        transforms = super().build_transforms(hyp)
        for transform in transforms.transforms:
            if isinstance(transform, Albumentations) and transform.transform is not None:
                transform.transform.set_random_seed(hyp.seed)  # it has a generator of its own
        return transforms

    def get_img_files(self, img_path: Any) -> list[str]:
        return [str(sample.path) for sample in self._samples]

    def get_labels(self) -> list[dict[str, Any]]:
        return [_label(sample) for sample in self._samples]


def _label(sample: Sample) -> dict[str, Any]:
    """Ultralytics' label of one image: class (n, 1); centre, width and height as parts of the image."""
    boxes = np.array([a["bbox"] for a in sample.annotations], np.float32).reshape(-1, 4)
    boxes[:, :2] += boxes[:, 2:] / 2
    classes = np.array([a["category_id"] - 1 for a in sample.annotations], np.float32)
    return {
        "im_file": str(sample.path),
        "shape": (sample.height, sample.width),
        "cls": classes.reshape(-1, 1),
        "bboxes": boxes / np.array([sample.width, sample.height] * 2, np.float32),
        "segments": [],
        "keypoints": None,
        "normalized": True,
        "bbox_format": "xywh",
    }
