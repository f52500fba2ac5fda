"""Label Studio: tasks.json with brush masks, to the pixel, and config.xml, the labelling interface.

https://labelstud.io/guide/export; https://labelstud.io/tags/brushlabels
Tasks refer to images as local files, relative to LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT, which has
to be the exported folder: https://labelstud.io/guide/storage#Local-storage

A brush mask is RGBA, packed into bits (https://github.com/thi-ng/umbrella, packages/rle-pack): 32
bits for the count of values, 5 for a value's bits less 1, 4 x 4 for the bits of four kinds of run
lengths, less 1 each; then run after run: 1 bit that says whether one value is repeated, 2 for the
kind of run length, the run length less 1, and the value, or all of the run's values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree

import numpy as np

from pipeline.data.coco import Instance, Item, instance_of
from pipeline.data.exchange.labels import Labels, find_file
from pipeline.data.files import read_json, write_json, write_text
from pipeline.data.masks import decode_rle
from pipeline.data.palette import CLASS_COLOURS
from pipeline.errors import UserError

TASKS = "tasks.json"
LOCAL_FILES = "/data/local-files/?d="
CONTROL, OBJECT = "label", "image"  # names in the labelling interface
LENGTH_BITS = (3, 4, 8, 16)
LONGEST = 2 ** max(LENGTH_BITS)


def write(folder: Path, labels: Labels) -> None:
    """Write tasks.json and config.xml. Predictions have scores; labels are finished annotations."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name=OBJECT, value="$image", zoom="true")
    brush = ElementTree.SubElement(view, "BrushLabels", name=CONTROL, toName=OBJECT)
    for i, name in enumerate(labels.classes):
        colour = CLASS_COLOURS.by_idx(i).as_hex()
        ElementTree.SubElement(brush, "Label", value=name, background=colour)
    ElementTree.indent(view)
    write_text(folder / "config.xml", ElementTree.tostring(view, encoding="unicode") + "\n")
    tasks = []
    for number, item in enumerate(labels.items, start=1):
        results = [_result(f"{number}-{i}", item, x) for i, x in enumerate(item.instances, start=1)]
        answer: dict[str, Any] = {"result": results}
        if labels.predicted:
            answer["model_version"] = "pipeline"
            answer["score"] = max((x.score or 0.0 for x in item.instances), default=0.0)
        url = LOCAL_FILES + quote(f"images/{item.file_name}")
        kind = "predictions" if labels.predicted else "annotations"
        tasks.append({"data": {OBJECT: url}, kind: [answer]})
    write_json(folder / TASKS, tasks)


def _result(identity: str, item: Item, found: Instance) -> dict[str, Any]:
    result = {
        "id": identity,
        "type": "brushlabels",
        "from_name": CONTROL,
        "to_name": OBJECT,
        "original_width": item.width,
        "original_height": item.height,
        "image_rotation": 0,
        "value": {
            "format": "rle",
            "rle": pack(decode_rle(found.rle)),
            "brushlabels": [found.cls],
        },
    }
    return result if found.score is None else {**result, "score": found.score}


def pack(mask: np.ndarray) -> list[int]:
    """The bytes of a brush mask: opaque white in a (height, width) bool mask, else transparent."""
    flat = mask.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=~flat[:1]))
    ends = [*starts[1:].tolist(), flat.size]
    bits = [f"{4 * flat.size:032b}", f"{7:05b}", *(f"{size - 1:04b}" for size in LENGTH_BITS)]
    for start, end in zip(starts.tolist(), ends, strict=True):
        value = "11111111" if flat[start] else "00000000"
        for length in _split(4 * (end - start)):
            kind = next(k for k, size in enumerate(LENGTH_BITS) if length <= 2**size)
            bits.append(f"1{kind:02b}{length - 1:0{LENGTH_BITS[kind]}b}{value}")
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def _split(length: int) -> Iterator[int]:
    """Parts of at most the longest run that can be written."""
    for start in range(0, length, LONGEST):
        yield min(LONGEST, length - start)


def unpack(packed: list[int], width: int, height: int) -> np.ndarray:
    """The (height, width) bool mask of what is not transparent. Raises `ValueError` if cut off."""
    content = bytes(packed)
    bits = f"{int.from_bytes(content, 'big'):0{8 * len(content)}b}"
    place = 0

    def read(count: int) -> str:
        nonlocal place
        place += count
        if place > len(bits):
            raise ValueError("expected a whole mask, found one that is cut off")
        return bits[place - count : place]

    count, value_bits = int(read(32), 2), int(read(5), 2) + 1
    if count != 4 * width * height or value_bits != 8:
        raise ValueError(
            f"expected 4 bytes for each of {width} x {height} pixels, found {count} of "
            f"{value_bits} bits"
        )
    length_bits = [int(read(4), 2) + 1 for _ in range(4)]
    runs = []
    while count > 0:
        repeated = read(1) == "1"
        length = int(read(length_bits[int(read(2), 2)]), 2) + 1
        values = int(read(8 if repeated else 8 * length), 2)
        runs.append(
            np.full(length, values, np.uint8)
            if repeated
            else np.frombuffer(values.to_bytes(length, "big"), np.uint8)
        )
        count -= length
    if count:
        raise ValueError(f"expected {width} x {height} pixels, found {-count} values more")
    return np.concatenate(runs).reshape(height, width, 4)[..., 3] > 0


def read(source: Path, known: Mapping[str, Item]) -> list[Item]:
    """The tasks that people have annotated, of a JSON export (not JSON-MIN).

    A task with no annotation, or only skipped ones, was not looked at, and is left out. Of several
    annotations of a task the one that was made or changed last counts.
    """
    path = find_file(source, TASKS, "*.json")
    tasks = read_json(path)
    if not isinstance(tasks, list):
        raise UserError(f"{path}: expected a list of Label Studio's tasks, found other JSON")
    items = []
    for number, task in enumerate(tasks, start=1):
        try:
            item = _item(path, task, known)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            found = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{path}: task {number}: expected an annotated image ({found})"
            ) from None
        if item is not None:
            items.append(item)
    return items


def _item(path: Path, task: Mapping[str, Any], known: Mapping[str, Item]) -> Item | None:
    annotations = task.get("annotations") or ()
    answers = [annotation for annotation in annotations if not annotation.get("was_cancelled")]
    if not answers:
        return None
    name = _file_name(task["data"], known)
    last = max(answers, key=lambda answer: answer.get("updated_at") or "")
    size: tuple[int, int] | None = None
    instances = []
    for result in last["result"]:
        value = result.get("value", {})
        if value.get("format") != "rle" or not value.get("brushlabels"):
            kind = result.get("type", "nothing")
            raise UserError(f"{path}: {name}: expected brush masks with a label, found {kind}")
        size = result["original_width"], result["original_height"]
        mask = unpack(value["rle"], *size)
        if mask.any():  # else it was rubbed out
            instances.append(instance_of(value["brushlabels"][0], mask))
    if size is None:  # nothing on it, so nothing says how large it is
        size = (known[name].width, known[name].height) if name in known else (0, 0)
    return Item(name, *size, tuple(instances))


def _file_name(data: Mapping[str, str], known: Mapping[str, Item]) -> str:
    """The name of a task's image. Label Studio puts eight digits and a dash before an upload's."""
    reference = urlsplit(data[OBJECT] if OBJECT in data else next(iter(data.values())))
    local = parse_qs(reference.query).get("d")
    name = Path(local[0] if local else unquote(reference.path)).name
    original = re.sub("^[0-9a-f]{8}-", "", name)
    return original if name not in known and original in known else name
