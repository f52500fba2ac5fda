"""Labels in the formats of annotation tools and other libraries, there and back.

A format is a module with two functions:

    write(folder, labels)     writes everything but the images, which lie in `folder / images`, or
                              wherever `IMAGE_FOLDERS` says
    read(source, known)       the images that a file (or a folder) holds, with their instances;
                              `known` are the dataset's images by file name

A reader raises `UserError` for what is not of its format, and for shapes that are no masks. Whether
images, sizes and classes are those of a dataset is for the caller to check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.data.coco import Item
from pipeline.data.exchange import coco, cvat, datumaro, label_studio, yolo_seg
from pipeline.data.exchange.labels import Labels

WRITERS: dict[str, Callable[[Path, Labels], None]] = {
    "cvat": cvat.write,
    "label-studio": label_studio.write,
    "fiftyone": coco.write_fiftyone,
    "coco": coco.write,
    "yolo-seg": yolo_seg.write,
    "datumaro": datumaro.write,
}
READERS: dict[str, Callable[[Path, Mapping[str, Item]], list[Item]]] = {
    "cvat": cvat.read,
    "label-studio": label_studio.read,
    "fiftyone": coco.read,
    "coco": coco.read,
    "yolo-seg": yolo_seg.read,
    "datumaro": datumaro.read,
}
IMAGE_FOLDERS = {"fiftyone": "data", "datumaro": f"images/{datumaro.SUBSET}"}
