"""Other libraries load what we write, and agree with the tree as it was drawn.

datumaro does so in test_exchange.py's way, in an environment of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_exchange import run, tool

from pipeline.data.files import read_image
from pipeline.models.ultralytics_settings import isolate
from tests.mvtec_tree import DEFECTS, GOOD, write_tree

isolate()  # before Ultralytics is imported, which the tests do

CLASSES = ["crack", "misplaced"]
# Of each image by its stem: class, box and count of pixels of each defect, sorted.
Found = dict[str, list[tuple[int, tuple[int, ...], int]]]
EXPECTED: Found = {
    defect.stem: sorted(
        (CLASSES.index(defect.cls), box, area)
        for box, area in zip(defect.boxes, defect.areas, strict=True)
    )
    for defect in DEFECTS
} | {f"good__{Path(name).parts[0]}_{Path(name).stem}": [] for name in GOOD}
BOXES = {  # the same, where a format has boxes alone
    stem: [(cls, box, (box[2] - box[0]) * (box[3] - box[1])) for cls, box, _ in defects]
    for stem, defects in EXPECTED.items()
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, `data`, and its export as `polygons`."""
    root = tmp_path_factory.mktemp("ecosystem")
    write_tree(root / "mvtec")
    run("convert", "--source", root / "mvtec", "--out", root / "data")
    run("export", "--data", root / "data", "--to", "yolo-seg", "--out", root / "polygons")
    return root


def found_by_supervision(dataset: sv.DetectionDataset) -> Found:
    assert dataset.classes == CLASSES
    return {
        Path(path).stem: sorted(
            (int(cls), tuple(int(v) for v in np.round(box, 2)), round(float(area)))
            for cls, box, area in zip(found.class_id, found.xyxy, found.area, strict=True)
        )
        for path, found in dataset.annotations.items()
    }


def test_supervision(folder: Path) -> None:
    data, polygons = folder / "data", folder / "polygons"
    coco = sv.DetectionDataset.from_coco(
        str(data / "images"), str(data / "annotations" / "instances.json"), force_masks=True
    )
    assert found_by_supervision(coco) == EXPECTED
    boxes = sv.DetectionDataset.from_yolo(
        str(data / "images"), str(data / "labels"), str(data / "data.yaml")
    )
    assert found_by_supervision(boxes) == BOXES
    masks = sv.DetectionDataset.from_yolo(
        str(polygons / "images"), str(polygons / "labels"), str(polygons / "data.yaml")
    )
    # It rounds corners where Ultralytics cuts them, so its masks reach further to the lower right.
    for stem, defects in found_by_supervision(masks).items():
        assert [cls for cls, _, _ in defects] == [cls for cls, _, _ in EXPECTED[stem]]
        for (_, box, area), (_, expected, least) in zip(defects, EXPECTED[stem], strict=True):
            assert np.abs(np.subtract(box, expected)).max() <= 1 and area >= least


def test_ultralytics_val(folder: Path, tmp_path: Path) -> None:
    """What `yolo val` measures against, as it is at the end of its run on untrained networks.

    In a process of its own: trainings that come after it in the same one have other weights.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        boxes = pool.submit(validated, folder / "data", "yolov8n", tmp_path).result()
        masks = pool.submit(validated, folder / "polygons", "yolov8n-seg", tmp_path).result()
    assert boxes == {stem: BOXES[stem] for stem in boxes}
    joined = {"crack__004": 4, "misplaced__000": 19}  # pixels between two parts
    assert masks == {
        stem: [
            (cls, box, area + (joined.get(stem, 0) if i == 0 else 0))
            for i, (cls, box, area) in enumerate(EXPECTED[stem])
        ]
        for stem in masks
    }
    assert len(masks) == len(boxes) == 17


def validated(data: Path, kind: str, out: Path) -> Found:
    """What Ultralytics' validation of all three splits has read, and counted."""
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel, SegmentationModel

    network = SegmentationModel if kind.endswith("-seg") else DetectionModel
    found: Found = {}
    for part in ("train", "val", "test"):
        model = YOLO(f"{kind}.yaml")
        model.model = network(f"{kind}.yaml", nc=len(CLASSES), verbose=False)
        validators: list[Any] = []
        model.add_callback("on_val_end", validators.append)
        model.val(
            data=str(data / "data.yaml"), split=part, imgsz=64, batch=4, device="cpu",
            plots=False, workers=0, save_dir=str(out),
        )  # fmt: skip
        (validator,) = validators
        assert list(validator.data["names"].values()) == CLASSES
        labels = validator.dataloader.dataset.labels
        here = {Path(label["im_file"]).stem: defects_of(label) for label in labels}
        counts = Counter(cls for defects in here.values() for cls, _, _ in defects)
        assert dict(enumerate(validator.metrics.nt_per_class)) == dict(counts)
        found |= here
    return found


def defects_of(label: dict[str, Any]) -> list[tuple[int, tuple[int, ...], int]]:
    """Class, box and pixels of each instance of Ultralytics' label of an image."""
    from ultralytics.data.utils import polygon2mask

    height, width = read_image(Path(label["im_file"])).shape[:2]
    defects = []
    for i, (x, y, w, h) in enumerate(label["bboxes"] * (width, height, width, height)):
        corners = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        assert np.abs(corners - corners.round()).max() < 0.02
        box = tuple(int(corner) for corner in corners.round())
        area = (box[2] - box[0]) * (box[3] - box[1])
        if label["segments"]:
            polygon = label["segments"][i] * (width, height)
            area = int(polygon2mask((height, width), [polygon.reshape(-1)]).sum())
        defects.append((int(label["cls"][i, 0]), box, area))
    return sorted(defects)


def test_datumaro(folder: Path) -> None:
    """The dataset folder as it is: each split is a subset."""
    splits = json.loads(tool("count", folder / "data"))
    boxes: dict[str, list[Any]] = {}
    for part in ("train", "val", "test"):
        listed = (folder / "data" / f"{part}.txt").read_text().splitlines()
        assert sorted(splits[part]) == sorted(Path(name).stem for name in listed)
        boxes |= splits[part]
    assert {
        stem: sorted((cls, (x, y, x + w, y + h), area) for cls, (x, y, w, h), area in defects)
        for stem, defects in boxes.items()
    } == EXPECTED


def test_pycocotools(folder: Path) -> None:
    coco = COCO(str(folder / "data" / "annotations" / "instances.json"))
    found: Found = {Path(image["file_name"]).stem: [] for image in coco.imgs.values()}
    for a in coco.anns.values():
        x, y, width, height = a["bbox"]
        assert a["area"] == coco.annToMask(a).sum()
        assert a["bbox"] == coco_mask.toBbox(a["segmentation"]).tolist()
        stem = Path(coco.imgs[a["image_id"]]["file_name"]).stem
        found[stem].append((a["category_id"] - 1, (x, y, x + width, y + height), a["area"]))
    assert {stem: sorted(defects) for stem, defects in found.items()} == EXPECTED
    truth = [{**a, "score": 1.0} for a in coco.anns.values()]
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(coco, coco.loadRes(truth), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == 1
