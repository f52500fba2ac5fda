"""A SAM with random weights, and a picture with boxes, points and masks to show it."""

from __future__ import annotations

import numpy as np
import supervision as sv
import torch
from PIL import Image
from rectangles import filled
from segment_anything.modeling import Sam

from pipeline.models import prompting, sam_lite

CPU = torch.device("cpu")
BOXES = np.array([[10, 20, 50, 40], [60, 5, 118, 90], [0, 0, 130, 100], [33.5, 60, 40, 71]], float)
PROMPTS = ["boxes", "points", "boxes+points", "masks", "boxes+masks"]
# Of each box: a mask somewhat smaller than it, and as many points as make batches of 2, 1 and 1.
MASKS = np.stack(
    [filled((x1 + 3, y1, x2 - 2, y2 - 5), 100, 130) for x1, y1, x2, y2 in BOXES.astype(int)]
)
POINTS = [
    np.array([[30.0, 30, 1]]),
    np.array([[80.5, 50, 1]]),
    np.array([[20.0, 20, 1], [100, 80, 0]]),
    np.array([[36.0, 65, 1], [39, 62, 0], [2, 3, 1]]),  # the last one lies far outside the box
]


def random_lite() -> Sam:
    """sam-lite with random weights, whose masks are neither empty nor full, nor their IoUs."""
    torch.manual_seed(0)
    sam = sam_lite.build_sam_lite().eval()
    with torch.inference_mode():
        tensor, size = prompting.encoder_input(sam, picture(), (0, 0, 130, 100))
        boxes = torch.from_numpy(BOXES * size[1] / 130).float()
        embeddings = sam.image_encoder(tensor[None]).expand(len(BOXES), -1, -1, -1)
        logits, iou = prompting.decode(
            sam, embeddings, *prompting.encode_prompts(sam, boxes, "boxes")
        )
        sam.mask_decoder.iou_prediction_head.layers[-1].bias += 0.5 - iou.mean()
    sam.mask_threshold = float(logits.median())
    return sam


def picture(height: int = 100, width: int = 130) -> np.ndarray:
    """Smooth random colours, BGR."""
    noise = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def detections(boxes: np.ndarray) -> sv.Detections:
    return sv.Detections(
        xyxy=boxes.astype(np.float32).reshape(-1, 4),
        class_id=np.arange(len(boxes)),
        confidence=np.linspace(1, 0.5, len(boxes), dtype=np.float32),
    )
