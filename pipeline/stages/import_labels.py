"""`pipeline import`: labels that people corrected become a new version of the dataset.

The new version has the same images, ids, classes, splits and folds. An image that the source holds
gets the labels it has there, also none; one that the source lacks keeps its own. What "holds" means
is said in pipeline/data/exchange/<format>.py. The old version stays as it is.

- Hard negatives of earlier reviews stay where they are on no new label.
- `manifest.json` lists every import under `imports`: what was read, and the corrected images.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
from rich.console import Console
from rich.table import Table

from pipeline import record
from pipeline.config import ImportConfig
from pipeline.data import dataset_folder, exchange
from pipeline.data.coco import Item
from pipeline.data.dataset import HARD_NEGATIVES
from pipeline.data.dataset_folder import MANIFEST, raise_any
from pipeline.data.files import write_json
from pipeline.data.matching import MATCH_IOU
from pipeline.data.version import Version, item_of, read_version, shown_class, updated
from pipeline.errors import UserError

COMMAND = "import"
FOLDERS = ("annotations", "data", "images", "labels")  # of formats: alone in a ZIP file, not around


def run(config: ImportConfig) -> None:
    """Write the new version. Raises `UserError` for labels that do not fit the dataset."""
    config = config.model_copy(
        update={name: getattr(config, name).resolve() for name in ("source", "data", "out")}
    )
    dataset_folder.check_apart(config.out, {"--data": config.data, "--source": config.source})
    raise_any(dataset_folder.not_ours(config.out))
    version = read_version(config.data)
    old = {s.path.name: item_of(s, version.classes) for s in version.samples}
    with _unpacked(config.source) as source:
        found = exchange.READERS[config.from_](source, old)
    raise_any(_problems(config, found, old, version.classes))
    new = {**old, **{item.file_name: item for item in found}}
    items = [new[name] for name in old]
    class_of = {item.file_name: shown_class(item) for item in items}
    counts = dataset_folder.count(items, class_of, version.classes, version.split)
    corrected = [name for name in old if _content(old[name]) != _content(new[name])]
    manifest = updated(version.manifest, items, version.split, counts)
    entry = {
        "format": config.from_,
        "source": config.source.name,
        "sha256": record.fingerprint(config.source),
        "applied_to": config.data.name,
        "images": len(found),
        "corrected": [f"images/{name}" for name in corrected],
    }
    manifest["imports"] = [*version.manifest.get("imports", []), entry]
    with dataset_folder.work_folder(config.out.parent) as work:
        built = Path(work) / "dataset"
        _write(built, config, version, items)
        write_json(built / MANIFEST, manifest)
        unchanged = dataset_folder.same(config.out, built)
        if not unchanged:
            raise_any(dataset_folder.in_the_way(config.out, config.force))
        dataset_folder.install(built, COMMAND, config, unchanged=unchanged)
    console = Console()
    console.print(_table(version.classes, old, new))
    console.print(dataset_folder.table_of(config.out.name, counts))
    kept = len(old) - len(found)
    print(f"{len(found)} images in {config.source.name}, {len(corrected)} of them corrected")
    if kept:
        print(f"{kept} images that it lacks keep their labels")
    if tests := set(corrected) & set(version.split["test"]):
        print(
            f"labels of {len(tests)} test images changed: figures from before and after do not "
            "have the same truth"
        )
    print(f"{config.out}{' (unchanged)' if unchanged else ''}")


@contextmanager
def _unpacked(source: Path) -> Iterator[Path]:
    """The source, or the content of a ZIP file, while the block runs."""
    if not source.is_file() or not zipfile.is_zipfile(source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="pipeline-import-") as folder:
        try:
            shutil.unpack_archive(source, folder, "zip")
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
            raise UserError(f"{source}: expected a ZIP file, found: {error}") from None
        content = list(Path(folder).iterdir())
        single = len(content) == 1 and content[0].is_dir() and content[0].name not in FOLDERS
        try:
            yield content[0] if single else Path(folder)
        except UserError as error:
            raise UserError(
                *(text.replace(folder, str(source)) for text in error.problems)
            ) from None


def _problems(
    config: ImportConfig, found: Sequence[Item], old: Mapping[str, Item], classes: Sequence[str]
) -> list[str]:
    """Where the labels do not fit the dataset, a line for each image or class."""
    if not found:
        return [f"{config.source}: expected labelled images, found none"]
    problems = []
    for name, times in Counter(item.file_name for item in found).items():
        if name not in old:
            problems.append(f"{config.source}: {name}: expected an image of {config.data}")
        elif times > 1:
            problems.append(f"{config.source}: {name}: expected it once, found it {times} times")
    for item in found:
        image = old.get(item.file_name)
        if image is not None and (image.width, image.height) != (item.width, item.height):
            problems.append(
                f"{config.source}: {item.file_name}: expected {image.width}x{image.height} pixels, "
                f"found {item.width}x{item.height}"
            )
    used = Counter(instance.cls for item in found for instance in item.instances)
    problems += [
        f"{config.source}: expected a class of {', '.join(classes)}, found '{cls}' on {times} masks"
        for cls, times in used.items()
        if cls not in classes
    ]
    return problems


def _content(item: Item) -> Counter[tuple[str, str]]:
    """What an image's labels are, whatever their order."""
    return Counter((instance.cls, instance.rle["counts"]) for instance in item.instances)


def _write(folder: Path, config: ImportConfig, version: Version, items: Sequence[Item]) -> None:
    """Write the new version into a new folder, but for its manifest."""
    (folder / "images").mkdir(parents=True)
    for sample in version.samples:
        place = folder / "images" / sample.path.name
        dataset_folder.place_image(sample.path, place, config.link, convert=False)
    dataset_folder.write_annotations(
        folder, config.out, items, version.classes, version.split, version.folds
    )
    negatives = [
        negative
        for sample, item in zip(version.samples, items, strict=True)
        for negative in sample.hard_negatives
        if not _is_labelled(negative, item, version.classes)
    ]
    if negatives:
        write_json(folder / HARD_NEGATIVES, negatives)


def _is_labelled(negative: Mapping[str, Any], item: Item, classes: Sequence[str]) -> bool:
    """Whether a label of its class is where a prediction was rejected."""
    cls = classes[negative["category_id"] - 1]
    boxes = [instance.box for instance in item.instances if instance.cls == cls]
    if not boxes:
        return False
    x, y, width, height = negative["bbox"]
    rejected = np.array([[x, y, x + width, y + height]], np.float32)
    return bool(sv.box_iou_batch(np.array(boxes, np.float32), rejected).max() >= MATCH_IOU)


def _table(classes: Sequence[str], old: Mapping[str, Item], new: Mapping[str, Item]) -> Table:
    """What became of the masks of each class: one that was redrawn is gone, and another is new."""
    before: Counter[str] = Counter()
    gone: Counter[str] = Counter()
    added: Counter[str] = Counter()
    for name, item in old.items():
        was, now = _content(item), _content(new[name])
        for (cls, _), times in was.items():
            before[cls] += times
        for (cls, _), times in (was - now).items():
            gone[cls] += times
        for (cls, _), times in (now - was).items():
            added[cls] += times
    table = Table(title="masks")
    for title in ("class", "before", "gone", "new", "after"):
        table.add_column(title, justify="left" if title == "class" else "right")
    for cls in classes:
        numbers = (before[cls], gone[cls], added[cls], before[cls] - gone[cls] + added[cls])
        table.add_row(cls, *(str(number) if number else "–" for number in numbers))
    return table
