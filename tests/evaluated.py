"""A dataset and what was predicted on it, written by hand, and `pipeline evaluate` on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from pipeline.config import EvaluateConfig
from pipeline.data.files import write_json
from pipeline.stages.evaluate import run

CLASSES = ("bent_lead", "cut_lead", "damaged_case", "misplaced")
SIDE = 64  # of the images
BOX = (10, 10, 20, 10)
HALF = (20, 10, 20, 10)  # 10 columns of 30 in common with BOX: IoU 1/3
THRESHOLD = 5.0  # of anomaly scores

Box = tuple[int, int, int, int]  # x, y, width, height


def rle(box: Box) -> dict[str, Any]:
    """Run lengths of a filled box."""
    x, y, width, height = box
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    found = coco_mask.encode(mask)
    return {"size": [SIDE, SIDE], "counts": found["counts"].decode()}


@dataclass
class World:
    """A dataset and the outputs of other stages, written by hand."""

    root: Path
    classes: Sequence[str] = CLASSES
    first_id: int = 1  # of the annotations
    splits: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, split: str, *truth: tuple[int, Box]) -> int:
        """Add an image with (category, box) instances, and return its id."""
        image_id = len(self.images) + 1
        cls = self.classes[truth[0][0] - 1] if truth else "good"
        image = {"id": image_id, "name": f"{cls}__{image_id:03}.png", "truth": truth}
        self.splits.setdefault(split, []).append(image)
        return image_id

    def add_again(self, split: str, image_id: int) -> None:
        """Put an image into another split as well: folds share them."""
        (image,) = (image for image in self.images if image["id"] == image_id)
        self.splits.setdefault(split, []).append(image)

    @property
    def images(self) -> list[dict[str, Any]]:
        every = [image for images in self.splits.values() for image in images]
        return list({image["id"]: image for image in every}.values())

    def write(self) -> Path:
        data = self.root / "data"
        everything = self.images
        for stem, images in {"instances": everything, **self.splits}.items():
            name = stem if stem == "instances" else f"instances_{stem}"
            write_json(data / "annotations" / f"{name}.json", self._coco(images))
        for image in everything:
            (data / "images").mkdir(exist_ok=True)
            cv2.imwrite(str(data / "images" / image["name"]), np.zeros((SIDE, SIDE, 3), np.uint8))
        return data

    def predict(
        self,
        folder: str,
        *entries: tuple[int, int, Box, float],
        masks: bool = True,
        quality: Sequence[float | None] = (),
    ) -> Path:
        """Write (image, category, box, score) as the output of `pipeline segment`."""
        results = [
            {"image_id": image, "category_id": category, "bbox": list(box), "score": score}
            | ({"segmentation": rle(box)} if masks else {})
            for image, category, box, score in entries
        ]
        for result, value in zip(results, quality, strict=False):
            result["quality"] = value
        write_json(self.root / folder / "predictions.json", results)
        coco = {**self._coco(self.images), "annotations": []}
        write_json(self.root / folder / "images.json", coco)
        return self.root / folder

    def truth_boxes(
        self, masks: bool = True, quality: Sequence[float] = (), folder: str = "truth_boxes"
    ) -> Path:
        entries = [
            (image["id"], category, box, 1.0)
            for image in self.images
            for category, box in image["truth"]
        ]
        return self.predict(folder, *entries, masks=masks, quality=quality)

    def classify(self, folder: str, name: str, decisions: dict[int, str]) -> Path:
        """Write certain decisions, with the classes in an order other than the dataset's."""
        names = [*reversed(self.classes), "good"]
        images = [
            {**image, "probabilities": [float(n == decisions[image["id"]]) for n in names]}
            for image in self._coco(self.images)["images"]
            if image["id"] in decisions
        ]
        content = {"name": name, "classes": names, "images": images}
        write_json(self.root / folder / "predictions.json", content)
        return self.root / folder

    def _coco(self, images: Sequence[dict[str, Any]]) -> dict[str, Any]:
        annotations: list[dict[str, Any]] = []
        for image in images:
            for category, box in image["truth"]:
                annotations.append(
                    {
                        "id": self.first_id + len(annotations),
                        "image_id": image["id"],
                        "category_id": category,
                        "bbox": list(box),
                        "area": box[2] * box[3],
                        "segmentation": rle(box),
                        "iscrowd": 0,
                    }
                )
        return {
            "images": [
                {"id": i["id"], "file_name": i["name"], "width": SIDE, "height": SIDE}
                for i in images
            ],
            "annotations": annotations,
            "categories": [{"id": k, "name": n} for k, n in enumerate(self.classes, start=1)],
        }


def evaluate(data: Path, predictions: Path, **options: Any) -> dict[str, Any]:
    out = data.parent / "out"
    options = {"resamples": 0, "threshold": 0.5, "force": True, **options}
    run(EvaluateConfig(data=data, predictions=predictions, out=out, **options))
    return json.loads((out / "metrics.json").read_text())


def one_of_each(root: Path) -> World:
    """Test split: images 1 to 4 with one defect of each class, 5 and 6 good."""
    world = World(root)
    for category in range(1, 5):
        world.add("test", (category, BOX))
    world.add("test")
    world.add("test")
    return world


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def in_folds(root: Path) -> World:
    """Two folds. Images 1 and 3 are tested in the first, 2 and 4 in the second; 3 and 4 are good.

    What one tests is the other's val split.
    """
    world = World(root, classes=("scratch",))
    for image in (((1, BOX),), ((1, BOX),), (), ()):
        number = len(world.images)
        image_id = world.add(f"fold{number % 2}_test", *image)
        world.add_again(f"fold{1 - number % 2}_val", image_id)
    return world


def predict_folds(world: World) -> Path:
    """The first fold's model scores high, the second's low; each also on the other's images."""
    world.predict(
        "found/fold0",
        (1, 1, BOX, 0.9),
        (3, 1, BOX, 0.7),
        (2, 1, BOX, 0.8),  # its val split: the best threshold is (0.8 + 0.6) / 2
        (4, 1, BOX, 0.6),
    )
    world.predict(
        "found/fold1",
        (2, 1, BOX, 0.4),
        (4, 1, BOX, 0.1),
        (1, 1, BOX, 0.3),  # its val split: (0.3 + 0.2) / 2
        (3, 1, BOX, 0.2),
    )
    return world.root / "found" / "fold{fold}"


def score(world: World, folder: str, scores: dict[int, float], **metrics: Any) -> Path:
    """The part of `pipeline detect-anomaly`'s output that is read here."""
    heat_map = {"file": "heatmaps/none.png", "low": 0.0, "high": 1.0}
    names = {image["id"]: image["name"] for image in world.images}
    entries = [
        {"id": i, "file_name": names[i], "width": SIDE, "height": SIDE, "score": value}
        | {"split": "test", "class": "any", "heat_map": heat_map}
        for i, value in scores.items()
    ]
    write_json(world.root / folder / "scores.json", {"images": entries})
    about: dict[str, Any] = {"method": "cosine", "protocol": "dataset", "fold": None}
    about |= {"image": {"threshold": THRESHOLD}}
    about |= {"seconds": {"training": 1, "inference_per_image": 0.1}, **metrics}
    write_json(world.root / folder / "metrics.json", about)
    return world.root / folder
