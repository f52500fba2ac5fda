"""What annotation tools make of our exports. Runs in their environment, see annotation_tools.txt.

    python annotation_tools.py read FORMAT FOLDER
    python annotation_tools.py correct FORMAT FOLDER OUT IMAGE
    python annotation_tools.py count DATASET

`read` prints all masks that the tool's own library finds, as JSON. `correct` has that library write
to OUT what a person might have made of them: every mask mirrored, and none left on IMAGE. `count`
prints what datumaro finds in a dataset of ours: by split and image, class, box and area of each
mask. It ends with 77 where the library is not installed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from pycocotools import mask as coco_mask

Found = dict[str, dict[str, Any]]  # file name -> size (height, width), instances
Instance = tuple[str, np.ndarray, float | None]  # class, mask, score


def read_datumaro(folder: Path, name: str = "datumaro") -> Found:
    import datumaro

    dataset = datumaro.Dataset.import_from(str(folder), name)
    classes = [label.name for label in dataset.categories()[datumaro.AnnotationType.label]]
    found: Found = {}
    for item in dataset:
        masks = [a for a in item.annotations if a.type == datumaro.AnnotationType.mask]
        found[Path(item.media.path).name] = {
            "path": item.media.path,
            "size": item.media.size,
            "instances": [(classes[a.label], a.image > 0, score_in(a.attributes)) for a in masks],
        }
    return found


def score_in(attributes: dict[str, Any]) -> float | None:
    return float(attributes["score"]) if "score" in attributes else None


def write_datumaro(found: Found, classes: list[str], out: Path, name: str = "datumaro") -> None:
    import datumaro
    from datumaro.components.annotation import Mask
    from datumaro.components.media import Image

    items = [
        datumaro.DatasetItem(
            id=Path(file).stem,
            media=Image.from_file(path=image["path"], size=image["size"]),
            annotations=[
                Mask(mask, label=classes.index(cls), id=i, group=i)
                for i, (cls, mask, _) in enumerate(image["instances"], start=1)
            ],
        )
        for file, image in found.items()
    ]
    options = {"segmentation_mode": "mask"} if name == "coco_instances" else {}
    dataset = datumaro.Dataset.from_iterable(items, categories=classes)
    dataset.export(str(out), name, save_media=False, **options)


def read_cvat(folder: Path) -> Found:
    """datumaro reads the file as well; CVAT's own library, the masks."""
    from cvat_sdk.masks import decode_mask

    found: Found = {}
    for image in ElementTree.parse(folder / "annotations.xml").iter("image"):
        height, width = int(image.attrib["height"]), int(image.attrib["width"])
        instances = []
        for mask in image.iter("mask"):
            left, top, columns, rows = (
                int(mask.attrib[k]) for k in ("left", "top", "width", "height")
            )
            points = [int(n) for n in mask.attrib["rle"].split(",")]
            points += [left, top, left + columns - 1, top + rows - 1]
            decoded = decode_mask(points, image_width=width, image_height=height)
            attributes = {a.attrib["name"]: a.text for a in mask.iter("attribute")}
            instances.append((mask.attrib["label"], decoded, score_in(attributes)))
        found[image.attrib["name"]] = {"size": (height, width), "instances": instances}
    other = read_datumaro(folder, "cvat")
    assert as_json(other, scores=False) == as_json(found, scores=False)
    return found


def write_cvat(found: Found, classes: list[str], out: Path) -> None:
    from cvat_sdk.masks import encode_mask

    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    for i, (name, content) in enumerate(found.items()):
        height, width = content["size"]
        shape = {"width": str(width), "height": str(height)}
        image = ElementTree.SubElement(root, "image", id=str(i), name=f"images/{name}", **shape)
        for cls, mask, _ in content["instances"]:
            *runs, left, top, right, bottom = (int(value) for value in encode_mask(mask))
            ElementTree.SubElement(
                image,
                "mask",
                label=cls,
                source="manual",
                occluded="0",
                rle=", ".join(map(str, runs)),
                left=str(left),
                top=str(top),
                width=str(right - left + 1),
                height=str(bottom - top + 1),
                z_order="0",
            )
    out.mkdir()
    ElementTree.ElementTree(root).write(out / "annotations.xml", encoding="utf-8")


def read_label_studio(folder: Path) -> Found:
    from label_studio_sdk.converter import brush
    from label_studio_sdk.label_interface import LabelInterface
    from PIL import Image

    interface = LabelInterface((folder / "config.xml").read_text())
    interface.validate()
    found: Found = {}
    for task in json.loads((folder / "tasks.json").read_text()):
        assert interface.validate_task({"data": task["data"]})
        annotations, predictions = task.get("annotations", []), task.get("predictions", [])
        assert all(map(interface.validate_annotation, annotations))
        assert all(map(interface.validate_prediction, predictions))
        (answer,) = annotations or predictions
        image = folder / task["data"]["image"].removeprefix("/data/local-files/?d=")
        with Image.open(image) as opened:
            size = opened.size[::-1]
        instances = []
        for result in answer["result"]:
            assert (result["original_height"], result["original_width"]) == size
            layers = brush.decode_from_annotation(
                "label", [{**result, **result["value"], "type": result["type"]}]
            )
            (layer,) = layers.values()
            (cls,) = result["value"]["brushlabels"]
            instances.append((cls, layer > 0, result.get("score")))
        found[image.name] = {"size": size, "instances": instances}
    return found


def write_label_studio(found: Found, classes: list[str], out: Path) -> None:
    from label_studio_sdk.converter import brush
    from PIL import Image

    out.mkdir()
    tasks = []
    for i, (name, image) in enumerate(found.items(), start=1):
        results = []
        for cls, mask, _ in image["instances"]:
            Image.fromarray(mask.astype(np.uint8) * 255).save(out / "mask.png")
            made = brush.image2annotation(str(out / "mask.png"), cls, "label", "image")
            results += made["result"]
        answer = {"id": i, "completed_by": 1, "was_cancelled": False, "result": results}
        reference = f"/data/upload/1/{i:08x}-{name}"
        tasks.append({"id": i, "data": {"image": reference}, "annotations": [answer]})
    (out / "project-1.json").write_text(json.dumps(tasks))


def read_fiftyone(folder: Path) -> Found:
    from fiftyone.utils.coco import COCODetectionDatasetImporter

    found: Found = {}
    importer = COCODetectionDatasetImporter(str(folder), label_types="segmentations")
    with importer:
        for path, metadata, label in importer:
            height, width = metadata["height"], metadata["width"]
            instances = []
            for detection in label.detections if label else ():
                x, y, w, h = detection.bounding_box
                left, top = round(x * width), round(y * height)
                right, bottom = round((x + w) * width), round((y + h) * height)
                mask = np.zeros((height, width), bool)
                mask[top:bottom, left:right] = detection.mask
                instances.append((detection.label, mask, detection.confidence))
            found[Path(path).name] = {"size": (height, width), "instances": instances}
    return found


def write_fiftyone(found: Found, classes: list[str], out: Path) -> None:
    import fiftyone.core.labels as labels
    import fiftyone.core.metadata as sizes
    from fiftyone.utils.coco import COCODetectionDatasetExporter

    exporter = COCODetectionDatasetExporter(str(out), classes=classes, export_media=False)
    with exporter:
        for name, image in found.items():
            height, width = image["size"]
            detections = []
            for cls, mask, _ in image["instances"]:
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
                box = [left / width, top / height, (right - left) / width, (bottom - top) / height]
                crop = mask[top:bottom, left:right]
                # Of a crowd it writes run lengths, of others polygons.
                detection = labels.Detection(label=cls, bounding_box=box, mask=crop, iscrowd=1)
                detections.append(detection)
            size = sizes.ImageMetadata(width=width, height=height, num_channels=3)
            exporter.export_sample(name, labels.Detections(detections=detections), metadata=size)


def as_json(found: Found, scores: bool = True) -> dict[str, Any]:
    """Masks as COCO's run lengths, in the order of the file."""

    def entry(cls: str, mask: np.ndarray, score: float | None) -> list[Any]:
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        return [cls, rle["counts"].decode(), score if scores else None]

    return {
        name: {
            "size": [int(side) for side in image["size"]],
            "instances": [entry(*instance) for instance in image["instances"]],
        }
        for name, image in found.items()
    }


READ = {
    "cvat": read_cvat,
    "label-studio": read_label_studio,
    "fiftyone": read_fiftyone,
    "coco": lambda folder: read_datumaro(folder, "coco"),
    "datumaro": read_datumaro,
}
WRITE = {
    "cvat": write_cvat,
    "label-studio": write_label_studio,
    "fiftyone": write_fiftyone,
    "coco": lambda found, classes, out: write_datumaro(found, classes, out, "coco_instances"),
    "datumaro": write_datumaro,
}


def count(folder: Path) -> dict[str, dict[str, Any]]:
    import datumaro

    splits: dict[str, dict[str, Any]] = {}
    for item in datumaro.Dataset.import_from(str(folder), "coco_instances"):
        masks = [a for a in item.annotations if a.type == datumaro.AnnotationType.mask]
        found = [(a.label, [int(v) for v in a.get_bbox()], int(a.get_area())) for a in masks]
        splits.setdefault(item.subset, {})[item.id] = found
    return splits


def main(action: str, kind: str, folder: str = "", *more: str) -> None:
    if action == "count":
        print(json.dumps(count(Path(kind))))
        return
    found = READ[kind](Path(folder))
    if action == "read":
        print(json.dumps(as_json(found)))
        return
    out, emptied = more
    corrected = {
        name: {
            **image,
            "instances": [
                (cls, np.fliplr(mask), score)
                for cls, mask, score in image["instances"]
                if name != emptied
            ],
        }
        for name, image in found.items()
    }
    classes = sorted({cls for image in found.values() for cls, _, _ in image["instances"]})
    shutil.rmtree(out, ignore_errors=True)
    WRITE[kind](corrected, classes, Path(out))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        sys.exit(77)
