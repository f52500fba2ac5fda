"""Ultralytics' training loop, fed with our datasets and prompts.

A module of its own because Ultralytics imports the trainer by name in every process when it trains
on several GPUs.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import distributed

from pipeline.data import augment
from pipeline.data.coco import yolo_label
from pipeline.data.dataset import Dataset, Sample, of_classes
from pipeline.data.files import write_text
from pipeline.data.loggers import Log
from pipeline.data.masks import decode_rle
from pipeline.data.paste import cut, paste
from pipeline.models.ultralytics_settings import isolate, quiet
from pipeline.models.yolo_world import text_layers

HARD = 3  # good images with hard negatives are shown as many times as often as the other good ones

isolate()

from ultralytics.data.augment import Albumentations
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import RANK
from ultralytics.utils.plotting import plot_results


class PromptTrainer(DetectionTrainer):
    """Trains a `PromptedWorldModel` as it comes from its checkpoint.

    Ultralytics' own WorldTrainer asks CLIP for the class names in every run; here the prompts are
    part of the model. The data file names our dataset's `splits` and, as `names`, those of its
    classes that are learned; it may also have `paste`, `free_pose`, `defective`, `shots` and
    `freeze_text`, which are those of `FinetuneYoloConfig`. Without them all is as Ultralytics does
    it.
    """

    balance: BalancedSampler | None = None  # of the training images
    log = Log()  # which gets the metrics of every epoch

    def __init__(self, *args: Any, **options: Any) -> None:
        threads = torch.get_num_threads()
        with quiet():
            super().__init__(*args, **options)
        torch.set_num_threads(threads)  # Ultralytics leaves one core idle, half of a small machine
        if self.ddp:  # this process only starts the others, and would first empty the run folder
            self.resume = True

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        assert weights is not None, "training starts from the checkpoint that the stage wrote"
        if self.data.get("freeze_text"):
            self.args.freeze = text_layers(weights)
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
        if self.balance is not None:
            self.balance.epoch = self.start_epoch

    def _close_dataloader_mosaic(self) -> None:
        """Go on without mosaic. What workers had prepared of this epoch is thrown away."""
        super()._close_dataloader_mosaic()
        if self.balance is not None:
            self.balance.epoch = self.epoch

    def train(self) -> None:
        super().train()
        if self.ddp:  # it was another process that trained, and knows no log of ours
            with self.csv.open(encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    values = {name.strip(): float(value) for name, value in row.items()}
                    self.log.metrics(values, int(values["epoch"]))

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        super().save_metrics(metrics)
        self.log.metrics(metrics, self.epoch + 1)

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
        """Measure the last epoch. (Ultralytics takes the best, and rewrites checkpoints here.)"""
        self.validator.args.plots = self.args.plots
        self.metrics = self.validator(model=self.last)

    def get_dataloader(
        self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train"
    ) -> Any:
        loader = super().get_dataloader(dataset_path, batch_size, rank, mode)
        samples = self._samples(mode)
        labels = [sample.label for sample in samples]
        share = self.data.get("defective")
        if mode == "train" and share and min(labels) < 0 <= max(labels):
            self.balance = BalancedSampler(
                labels, share, self.args.seed, [bool(s.hard_negatives) for s in samples]
            )
            # A loader's sampler cannot be exchanged, and Ultralytics takes none: so exchange it
            # where batches are made. The one that was there has the same length.
            loader.batch_sampler.sampler.sampler = self.balance
        return loader

    def _samples(self, mode: str) -> list[Sample]:
        dataset = Dataset(Path(self.data["path"]))
        samples = dataset.split(*self.data["splits"][mode])
        samples = of_classes(samples, dataset.classes, list(self.data["names"].values()))
        shots = self.data.get("shots") if mode == "train" else None
        return samples if shots is None else few_shot(samples, shots, self.args.seed)

    def build_dataset(
        self, img_path: str, mode: str = "train", batch: int | None = None
    ) -> YOLODataset:
        samples = self._samples(mode)
        options = copy(self.args)
        options.deterministic = False  # or it warns of the cache, whose order is in truth fixed
        return CocoTruthDataset(
            samples=samples,
            paste=self.data.get("paste", 0.0) if mode == "train" else 0.0,
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


def few_shot(samples: Sequence[Sample], shots: int, seed: int) -> list[Sample]:
    """At most `shots` defective images of each class and all good ones, in their order.

    Fewer shots of the same seed are a part of more.
    """
    labels = np.array([sample.label for sample in samples])
    kept = labels < 0
    for label in np.unique(labels[~kept]):
        images = np.flatnonzero(labels == label)
        kept[np.random.default_rng([seed, label]).permutation(images)[:shots]] = True
    return [sample for sample, keep in zip(samples, kept, strict=True) if keep]


class BalancedSampler(torch.utils.data.Sampler[int]):
    """Which images the epochs show: as many as there are, but a given part of them defective.

    Over the epochs every class of defects appears as often as any other, every image of a class as
    often as any other of it, and every good image as often as any other: each is shown once, in
    random order, before one is shown again. A good image with hard negatives, where a detector saw
    a defect and a person saw none, has `HARD` turns where other good images have one. (Mining of
    hard negatives: Felzenszwalb et al., Object Detection with Discriminatively Trained Part-Based
    Models, PAMI 2010.)
    In distributed training every process has its part of the epoch.
    """

    def __init__(
        self,
        labels: Sequence[int],
        defective: float,
        seed: int,
        hard: Sequence[bool] | None = None,
    ) -> None:
        """`labels`: class index of each image, -1 for good; `defective`: part of an epoch.

        `hard`: whether an image has hard negatives (default: none has).
        """
        images = np.array(labels)
        self.epoch = 0  # the next one; workers fetch ahead, so we count by ourselves
        self._seed = seed
        self._classes = [
            np.flatnonzero(images == label) for label in np.unique(images[images >= 0])
        ]
        turns = np.where(np.zeros(len(images), bool) if hard is None else hard, HARD, 1)
        self._good = np.repeat(np.arange(len(images)), np.where(images < 0, turns, 0))
        self._defective = round(defective * len(images))
        self._total = len(images)
        parallel = distributed.is_available() and distributed.is_initialized()
        self._rank = distributed.get_rank() if parallel else 0
        self._processes = distributed.get_world_size() if parallel else 1

    def __len__(self) -> int:
        return -(-self._total // self._processes)

    def __iter__(self) -> Iterator[int]:
        order = self._order(self.epoch)
        self.epoch += 1
        whole = np.resize(order, len(self) * self._processes)  # the first ones fill it up
        return iter(whole[self._rank :: self._processes].tolist())

    def _order(self, epoch: int) -> np.ndarray:
        """The images of an epoch, shuffled."""
        begin, end, n = epoch * self._defective, (epoch + 1) * self._defective, len(self._classes)
        shown = [  # places of the defective ones, counted over all epochs, go to classes in turn
            self._turns(images, -(-(begin - i) // n), -(-(end - i) // n))
            for i, images in enumerate(self._classes)
        ]
        good = self._total - self._defective
        shown.append(self._turns(self._good, epoch * good, (epoch + 1) * good))
        return np.random.default_rng([self._seed, epoch]).permutation(np.concatenate(shown))

    def _turns(self, images: np.ndarray, begin: int, end: int) -> np.ndarray:
        """Entries `begin` to `end` of the list repeated for ever, each time in another order."""
        first = begin // len(images)
        rounds = [
            np.random.default_rng([self._seed, turn, int(images[0])]).permutation(images)
            for turn in range(first, -(-end // len(images)))
        ]
        skipped = first * len(images)
        return np.concatenate([images[:0], *rounds])[begin - skipped : end - skipped]


class CocoTruthDataset(YOLODataset):
    """Boxes from the dataset's COCO truth. Writes no cache, so the dataset may be read-only.

    `paste` is the part of the good images that get defects of other images, each time others.
    """

    def __init__(self, *, samples: list[Sample], paste: float, **options: Any) -> None:
        self._samples = samples
        self._paste = paste
        super().__init__(**options)
        self._cuttings = [
            cutting
            for i, sample in enumerate(samples if paste else [])
            if sample.annotations
            for cutting in cut(
                self.load_image(i)[0],
                _masks(sample, self.load_image(i)[2]),
                np.array([a["category_id"] - 1 for a in sample.annotations]),
            )
        ]

    def update_labels_info(self, label: dict[str, Any]) -> dict[str, Any]:
        """Maybe paste defects on a good image.

        Like Ultralytics' augmentations, by the random state that is seeded for each process.
        """
        if self._cuttings and not len(label["cls"]) and np.random.random() < self._paste:
            rng = np.random.default_rng(np.random.randint(2**32, dtype=np.uint32))
            label["img"], pasted = paste(
                label["img"], self._cuttings, rng, free_pose=self.data.get("free_pose", False)
            )
            if pasted.class_id is not None and len(pasted):
                height, width = label["img"].shape[:2]
                boxes = [yolo_label(tuple(box), width, height) for box in pasted.xyxy.tolist()]
                label["bboxes"] = np.array(boxes, np.float32)
                label["cls"] = pasted.class_id.astype(np.float32).reshape(-1, 1)
        return super().update_labels_info(label)

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


def _masks(sample: Sample, shape: tuple[int, int]) -> np.ndarray:
    """The true masks (n, height, width) bool at the size that the network sees."""
    masks = [decode_rle(a["segmentation"]).astype(np.uint8) * 255 for a in sample.annotations]
    return np.stack(
        [cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_AREA) >= 128 for mask in masks]
    )


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
