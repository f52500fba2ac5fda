"""datumaro's own format: annotations/default.json with COCO's run lengths, to the pixel.

https://open-edge-platform.github.io/datumaro/stable/docs/data-formats/formats/datumaro.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from pipeline.data.coco import Item, instance_of, run_lengths
from pipeline.data.exchange.labels import Labels, find_file
from pipeline.data.files import read_json, write_json
from pipeline.data.masks import decode_rle
from pipeline.errors import UserError

SUBSET = "default"
IMAGE = 2  # datumaro's number of this type of media


def write(folder: Path, labels: Labels) -> None:
    """Write annotations/default.json. A prediction's score is an attribute of its mask."""
    index = {name: i for i, name in enumerate(labels.classes)}
    items = []
    for frame, item in enumerate(labels.items):
        annotations = [
            {
                "id": number,
                "type": "mask",
                "attributes": {} if found.score is None else {"score": found.score},
                "group": number + 1,  # 0 would be: of no group
                "label_id": index[found.cls],
                "rle": {"counts": found.rle["counts"], "size": found.rle["size"]},
                "z_order": 0,
            }
            for number, found in enumerate(item.instances)
        ]
        items.append(
            {
                "id": Path(item.file_name).stem,
                "annotations": annotations,
                "attr": {"frame": frame},
                "image": {"path": item.file_name, "size": [item.height, item.width]},
            }
        )
    names = [{"name": name, "parent": "", "attributes": []} for name in labels.classes]
    write_json(
        folder / "annotations" / f"{SUBSET}.json",
        {
            "dm_format_version": "1.0",
            "media_type": IMAGE,
            "infos": {},
            "categories": {"label": {"labels": names, "attributes": []}},
            "items": items,
        },
    )


def read(source: Path, known: Mapping[str, Item]) -> list[Item]:
    """The items of one subset, or of all in a folder: each was looked at, also without a mask.

    Masks and polygons are read; other kinds of annotations have no mask, and are an error.
    """
    paths = sorted(source.glob("annotations/*.json")) or [find_file(source, "*.json")]
    return [item for path in paths for item in _read_subset(path, known)]


def _read_subset(path: Path, known: Mapping[str, Item]) -> list[Item]:
    content = read_json(path)
    if not isinstance(content, dict) or not {"categories", "items"} <= content.keys():
        raise UserError(f"{path}: expected datumaro's categories and items, found other JSON")
    try:
        names = [label["name"] for label in content["categories"]["label"]["labels"]]
        return [_item(path, entry, names, known) for entry in content["items"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        found = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path}: expected datumaro's items, found other entries ({found})"
        ) from None


def _item(
    path: Path, entry: Mapping[str, Any], names: list[str], known: Mapping[str, Item]
) -> Item:
    height, width = entry["image"]["size"]
    if entry["image"].get("path"):
        name = Path(entry["image"]["path"]).name
    else:  # an image that datumaro did not read from a file; then its id is the name's stem
        name = next((file for file in known if Path(file).stem == entry["id"]), entry["id"])
    instances = []
    for annotation in entry["annotations"]:
        kind = annotation["type"]
        if kind == "mask":
            shape: Any = annotation["rle"]
        elif kind == "polygon":
            shape = [annotation["points"]]
        else:
            raise UserError(f"{path}: {name}: expected masks or polygons, found a {kind}")
        rle = run_lengths(shape, height, width)
        if coco_mask.area(rle):
            instances.append(instance_of(names[annotation["label_id"]], decode_rle(rle)))
    return Item(name, width, height, tuple(instances))
