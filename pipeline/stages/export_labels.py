"""`pipeline export`: labels, or predictions to be corrected, for annotation tools and libraries.

Output folder: the images, the files of pipeline/data/exchange/<format>.py, config.yaml, run.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from pipeline import record
from pipeline.config import ExportConfig
from pipeline.data import exchange
from pipeline.data.coco import Item, instance_of
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.dataset_folder import check_apart, place_image, raise_any
from pipeline.data.exchange import outline
from pipeline.data.exchange.labels import Labels
from pipeline.data.files import atomic_folder
from pipeline.data.masks import decode_rle
from pipeline.data.predictions import (
    IMAGES,
    PREDICTIONS,
    check_masks,
    mismatches,
    read_images,
    read_results,
)
from pipeline.data.version import item_of, names_in
from pipeline.errors import UserError

COMMAND = "export"
NEXT = {
    "cvat": "in CVAT make a task of images/, with labels.json under Raw; then Upload annotations, "
    "'CVAT 1.1', annotations.xml",
    "label-studio": "start Label Studio with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and "
    "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={out}; make a project with config.xml as labelling "
    "interface, add a local storage of {out}/images, import tasks.json",
    "fiftyone": "fiftyone.Dataset.from_dir('{out}', fiftyone.types.COCODetectionDataset, "
    "label_types='segmentations')",
    "coco": "annotations/instances_default.json beside images/",
    "yolo-seg": "yolo segment val data={out}/data.yaml",
    "datumaro": "datumaro.Dataset.import_from('{out}', 'datumaro')",
}


def run(config: ExportConfig) -> None:
    """Write the labels, or the predictions, in another format. Raises `UserError` for bad input."""
    dataset = Dataset(config.data)
    _check_out(config)
    samples = dataset.images()
    if config.predictions is None:
        items, without = [item_of(sample, dataset.classes) for sample in samples], 0
    else:
        samples, items, without = _predicted(config, config.predictions, dataset, samples)
    names = {item.file_name for item in items}
    splits = {
        part: [name for name in members if name in names]
        for part, members in names_in(dataset).items()
    }
    out = config.out.resolve()
    labels = Labels(out, dataset.classes, items, splits, config.predictions is not None)
    with atomic_folder(out) as work:
        images = work / exchange.IMAGE_FOLDERS.get(config.to, "images")
        images.mkdir(parents=True)
        for sample in samples:
            place_image(sample.path, images / sample.path.name, config.link, convert=False)
        exchange.WRITERS[config.to](work, labels)
        if config.to == "yolo-seg":
            _print_loss(items, exchange.READERS[config.to](work, {i.file_name: i for i in items}))
        record.write_record(work, COMMAND, config)
    masks = sum(len(item.instances) for item in items)
    if without:
        print(f"{without} predictions without a pixel left out")
    print(f"{config.out}: {len(items)} images, {masks} masks")
    Console().print(f"next: {NEXT[config.to].format(out=out)}", soft_wrap=True, highlight=False)


def _check_out(config: ExportConfig) -> None:
    """Raises `UserError` for an output that may not be replaced: it would be as a whole."""
    read = {"--data": config.data, "--predictions": config.predictions}
    check_apart(config.out, {name: path for name, path in read.items() if path is not None})
    record.check_out(COMMAND, config)


def _predicted(
    config: ExportConfig, folder: Path, dataset: Dataset, samples: Sequence[Sample]
) -> tuple[list[Sample], list[Item], int]:
    """The images that were looked at, with what was found, and how many masks were empty."""
    classes, images = read_images(folder)
    if classes != dataset.classes:
        raise UserError(
            f"{folder}: expected the classes {list(dataset.classes)}, found {list(classes)}"
        )
    results = read_results(folder / PREDICTIONS)
    known = {image["id"]: image for image in images}
    looked_at = [sample for sample in samples if sample.image_id in known]
    strange = known.keys() - {sample.image_id for sample in samples}
    raise_any(
        [
            *mismatches(folder / IMAGES, images, looked_at),
            *(
                f"{folder}: expected images of {config.data}, found {known[i]['file_name']}"
                for i in sorted(strange)
            ),
        ]
    )
    check_masks(folder, classes, images, results)
    items, without = [], 0
    for sample in looked_at:
        kept = [e for e in results.get(sample.image_id, ()) if e["score"] >= config.threshold]
        masks = [decode_rle(entry["segmentation"]) for entry in kept]
        instances = tuple(
            instance_of(classes[entry["category_id"] - 1], mask, entry["score"])
            for entry, mask in zip(kept, masks, strict=True)
            if mask.any()
        )
        without += len(kept) - len(instances)
        items.append(Item(sample.path.name, sample.width, sample.height, instances))
    return looked_at, items, without


def _print_loss(before: Sequence[Item], after: Sequence[Item]) -> None:
    """Print what masks have lost as polygons, by reading back what was written."""
    read = {item.file_name: item for item in after}
    losses: list[tuple[outline.Loss, str]] = []
    for item in before:
        pairs = zip(item.instances, read[item.file_name].instances, strict=True)
        losses += [
            (outline.loss(decode_rle(old.rle), decode_rle(new.rle)), item.file_name)
            for old, new in pairs
        ]
    if not losses:
        return
    all_losses = [loss for loss, _ in losses]
    worst, name = min(losses, key=lambda pair: pair[0].iou)
    exact = sum(loss.iou == 1 for loss in all_losses)
    total = {
        key: sum(getattr(loss, key) for loss in all_losses)
        for key in ("missing", "added", "holes", "holes_kept")
    }
    print(
        f"polygons: {exact} of {len(losses)} masks to the pixel, mean IoU "
        f"{np.mean([loss.iou for loss in all_losses]):.4f}, worst {worst.iou:.4f}"
        + (f" ({name})" if worst.iou < 1 else "")
        + f"; {total['missing']} pixels lost, {total['added']} added, "
        f"{total['holes_kept']} of {total['holes']} holes kept"
    )
