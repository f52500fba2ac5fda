"""What fine-tuning leaves of an open vocabulary: prompts that were not trained, before and after.

YOLO-World finds whatever a prompt names. Fine-tuning on the prompts of a few classes may move the
others: they find less, something else, or the classes that were trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.box
import supervision as sv
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pipeline.data.dataset import Sample
from pipeline.data.metrics import average_precisions, coco_evaluation
from pipeline.data.predictions import coco_results
from pipeline.models.yolo_world import Detector, WorldModel, set_prompts

REPORT = "open_vocabulary.json"
MIN_SCORE = 0.1  # from which a box counts, as in the demo of YOLO-World's authors
MAX_BOXES = 100  # per image and prompt


def compare(
    before: WorldModel,
    after: WorldModel,
    embeddings: Mapping[str, torch.Tensor],
    samples: Sequence[Sample],
    image_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """The content of `open_vocabulary.json`, for prompts and their embeddings (512,).

    Of each prompt: how many boxes each model finds from a score of `MIN_SCORE`, their highest and
    mean score, and how well they agree (see `agreement`). Both models are taken over.
    """
    prompts = {}
    for prompt in track(embeddings, "asking for what was not trained", transient=True):
        old, new = (
            _detect(model, prompt, embeddings[prompt], samples, image_size, device)
            for model in (before, after)
        )
        prompts[prompt] = {
            "before": _summary(old),
            "after": _summary(new),
            **agreement(samples, old, new),
        }
    return {"min_score": MIN_SCORE, "images": len(samples), "prompts": prompts}


def agreement(
    samples: Sequence[Sample], before: Sequence[sv.Detections], after: Sequence[sv.Detections]
) -> dict[str, float | None]:
    """How well the boxes after agree with those before, image by image: 1 is the same boxes.

    `mean_best_iou`: mean, over the boxes before, of the IoU with the box after that covers it best.
    `ap50`: COCO's average precision at an IoU of 0.5 with the boxes before as truth; unlike the
    other it also falls with boxes that are new. Both are None if there were no boxes before.
    """
    if not any(len(boxes) for boxes in before):
        return {"mean_best_iou": None, "ap50": None}
    best = [
        sv.box_iou_batch(old.xyxy, new.xyxy).max(axis=1) if len(new) else np.zeros(len(old))
        for old, new in zip(before, after, strict=True)
    ]
    truth = [
        dataclasses.replace(sample, annotations=_annotations(old))
        for sample, old in zip(samples, before, strict=True)
    ]
    results = {
        sample.image_id: coco_results(sample.image_id, new)
        for sample, new in zip(samples, after, strict=True)
    }
    ap50 = average_precisions(coco_evaluation(truth, results, 1, "bbox"))[0, 0]
    return {
        "mean_best_iou": round(float(np.concatenate(best).mean()), 4),
        "ap50": round(float(ap50), 4),
    }


def show(report: Mapping[str, Any]) -> None:
    """Print the content of `open_vocabulary.json` as a table."""
    table = Table(
        title=f"open vocabulary: prompts that were not trained, on {report['images']} val images",
        caption=f"boxes from a score of {report['min_score']:g}; IoU and AP50 of the boxes after "
        "with those before as truth, 1: as before, 0: lost",
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("prompt", overflow="fold")
    for name in ("boxes before", "after", "top score before", "after", "mean best IoU", "AP50"):
        table.add_column(name, justify="right")
    for prompt, found in report["prompts"].items():
        counts = (str(found[side]["boxes"]) for side in ("before", "after"))
        figures = [found[side]["top_score"] for side in ("before", "after")]
        figures += [found["mean_best_iou"], found["ap50"]]
        table.add_row(prompt, *counts, *("-" if f is None else f"{f:.2f}" for f in figures))
    Console(highlight=False, markup=False).print(table)


def _detect(
    model: WorldModel,
    prompt: str,
    embedding: torch.Tensor,
    samples: Sequence[Sample],
    image_size: int,
    device: torch.device,
) -> list[sv.Detections]:
    """Each image's boxes for one prompt.

    It is asked alone, because prompts compete: for boxes, and for the neck's attention.
    """
    detector = Detector(set_prompts(model, [prompt], embedding[None]), image_size, device)
    return [detector.detect(sample.image(), MIN_SCORE, MAX_BOXES) for sample in samples]


def _summary(found: Sequence[sv.Detections]) -> dict[str, Any]:
    """Number and scores of all images' boxes; no score without a box."""
    scores = np.concatenate([np.asarray(boxes.confidence) for boxes in found])
    return {
        "boxes": len(scores),
        "top_score": round(float(scores.max()), 4) if len(scores) else None,
        "mean_score": round(float(scores.mean()), 4) if len(scores) else None,
    }


def _annotations(boxes: sv.Detections) -> tuple[dict[str, Any], ...]:
    """Boxes of one image as COCO truth."""
    return tuple(
        {"category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        for x1, y1, x2, y2 in boxes.xyxy.tolist()
    )
