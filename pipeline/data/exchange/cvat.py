"""CVAT for images 1.1: annotations.xml with run lengths of each mask, to the pixel.

https://docs.cvat.ai/docs/manual/advanced/formats/format-cvat/
A mask's `rle` counts the pixels of its box (`left`, `top`, `width`, `height`) row by row, first the
ones outside of the mask. labels.json is what CVAT's raw label constructor takes for a new task.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from pycocotools import mask as coco_mask

from pipeline.data.coco import Instance, Item, instance_of
from pipeline.data.exchange.labels import Labels, find_file
from pipeline.data.files import write_json, write_text
from pipeline.data.masks import decode_rle
from pipeline.errors import UserError

XML = "annotations.xml"
SHAPES = ("mask", "polygon", "box", "ellipse", "polyline", "points", "cuboid", "skeleton", "tag")


def write(folder: Path, labels: Labels) -> None:
    """Write annotations.xml and labels.json. A prediction's score is an attribute of its mask."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    meta = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    specifications = ElementTree.SubElement(meta, "labels")
    for name in labels.classes:
        label = ElementTree.SubElement(specifications, "label")
        ElementTree.SubElement(label, "name").text = name
        attributes = ElementTree.SubElement(label, "attributes")
        if labels.predicted:
            attribute = ElementTree.SubElement(attributes, "attribute")
            for key, value in {"name": "score", "mutable": "False", "input_type": "text"}.items():
                ElementTree.SubElement(attribute, key).text = value
            ElementTree.SubElement(attribute, "default_value")
            ElementTree.SubElement(attribute, "values")
    for number, item in enumerate(labels.items):
        image = ElementTree.SubElement(
            root,
            "image",
            id=str(number),
            name=item.file_name,
            width=str(item.width),
            height=str(item.height),
        )
        for found in item.instances:
            image.append(_mask(found, "auto" if labels.predicted else "manual"))
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    write_text(folder / XML, f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n')
    score = {"name": "score", "mutable": False, "input_type": "text", "values": [""]}
    write_json(
        folder / "labels.json",
        [
            {"name": name, "attributes": [score] if labels.predicted else []}
            for name in labels.classes
        ],
    )


def _mask(found: Instance, source: str) -> ElementTree.Element:
    x1, y1, x2, y2 = found.box
    crop = decode_rle(found.rle)[y1:y2, x1:x2]
    element = ElementTree.Element(
        "mask",
        label=found.cls,
        source=source,
        occluded="0",
        rle=", ".join(map(str, _run_lengths(crop))),
        left=str(x1),
        top=str(y1),
        width=str(x2 - x1),
        height=str(y2 - y1),
        z_order="0",
    )
    if found.score is not None:
        ElementTree.SubElement(element, "attribute", name="score").text = f"{found.score:g}"
    return element


def _run_lengths(mask: np.ndarray) -> list[int]:
    """How many pixels are outside, inside, outside, ... of a mask, row by row."""
    flat = np.concatenate([[False], mask.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff([0, *changes, mask.size]).tolist()


def read(source: Path, known: Mapping[str, Item]) -> list[Item]:
    """The images of annotations.xml: each is one that was looked at, also without a shape.

    Masks and polygons are read; any other shape has no mask, and is an error.
    """
    path = find_file(source, XML, "*.xml")
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, UnicodeDecodeError, LookupError) as error:
        raise UserError(f"{path}: expected CVAT's XML, found: {error}") from None
    if root.tag != "annotations":
        raise UserError(f"{path}: expected <annotations>, found <{root.tag}>")
    if root.find("track") is not None:
        raise UserError(
            f"{path}: expected 'CVAT for images', found tracks, as 'for video' has them"
        )
    return [_item(path, image) for image in root.iter("image")]


def _item(path: Path, image: ElementTree.Element) -> Item:
    where = f"{path}: image {image.get('name')}"
    try:
        width, height = int(image.attrib["width"]), int(image.attrib["height"])
        name = Path(image.attrib["name"]).name
        shapes = [shape for shape in image if shape.tag in SHAPES]
        masks = [(shape.attrib["label"], _decoded(shape, width, height)) for shape in shapes]
    except KeyError as error:
        raise UserError(f"{where}: expected the attribute {error}, found none") from None
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where}: {error}") from None
    return Item(name, width, height, tuple(instance_of(cls, m) for cls, m in masks if m.any()))


def _decoded(shape: ElementTree.Element, width: int, height: int) -> np.ndarray:
    """The mask (height, width) of a shape. Raises `ValueError` or `KeyError` where it has none."""
    if shape.tag == "polygon":
        corners = [float(v) for v in shape.attrib["points"].replace(";", ",").split(",")]
        if len(corners) < 6 or len(corners) % 2 or not np.isfinite(corners).all():
            raise ValueError(f"expected a polygon's points, found {shape.attrib['points']!r}")
        return decode_rle(coco_mask.merge(coco_mask.frPyObjects([corners], height, width)))
    if shape.tag != "mask":
        raise ValueError(f"expected masks or polygons, found a {shape.tag}")
    left, top, columns, rows = (int(shape.attrib[k]) for k in ("left", "top", "width", "height"))
    if not (0 <= left < left + columns <= width and 0 <= top < top + rows <= height):
        raise ValueError(
            f"expected a mask inside of {width} x {height} pixels, found one of "
            f"{columns} x {rows} at {left}, {top}"
        )
    runs = [int(run) for run in shape.attrib["rle"].split(",")]
    if min(runs) < 0 or sum(runs) != rows * columns:
        raise ValueError(f"expected run lengths of {rows * columns} pixels, found {sum(runs)}")
    mask = np.zeros((height, width), bool)
    inside = np.arange(len(runs)) % 2 == 1
    mask[top : top + rows, left : left + columns] = np.repeat(inside, runs).reshape(rows, columns)
    return mask
