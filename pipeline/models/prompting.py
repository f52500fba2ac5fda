"""What SAM is shown and asked: the window around a box, the prompts, decoding.

Training and inference share it, so that a SAM is shown the same frame in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

from pipeline.models.sam import WHOLE_IMAGE

SMALLEST_WINDOW = 48  # pixels: around a tiny box, what the window shows must still make sense

Window = tuple[int, int, int, int]  # half-open pixel box (x1, y1, x2, y2) of an image


def window_around(box: Sequence[float] | np.ndarray, shape: tuple[int, int], zoom: float) -> Window:
    """The part of an image that is shown to SAM for one box.

    A square whose side is `zoom` (at least 1) times the box's longest side, moved inside the image
    and cut where the image is smaller. It holds all of the box that lies in the image. `shape` is
    (height, width); zoom 0 is the whole image.
    """
    height, width = shape
    if zoom == WHOLE_IMAGE:
        return 0, 0, width, height
    x1, y1 = math.floor(box[0]), math.floor(box[1])
    x2, y2 = math.ceil(box[2]), math.ceil(box[3])
    side = max(math.ceil(max(zoom, 1) * max(x2 - x1, y2 - y1)), SMALLEST_WINDOW)
    left, top = (x1 + x2 - side) // 2, (y1 + y2 - side) // 2
    left = min(max(left, 0), max(width - side, 0))
    top = min(max(top, 0), max(height - side, 0))
    return left, top, min(left + side, width), min(top + side, height)


def encoder_input(
    sam: Sam, image: np.ndarray, window: Window
) -> tuple[torch.Tensor, tuple[int, int]]:
    """The encoder's input for a window of a (height, width, 3) uint8 BGR image.

    Returns a (3, size, size) tensor and the (height, width) in it that is image, not padding.
    """
    x1, y1, x2, y2 = window
    rgb = cv2.cvtColor(image[y1:y2, x1:x2], cv2.COLOR_BGR2RGB)
    resized = ResizeLongestSide(sam.image_encoder.img_size).apply_image(rgb)
    tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))).float()
    return sam.preprocess(tensor.to(sam.device)), (resized.shape[0], resized.shape[1])


def to_input_frame(points: np.ndarray, window: Window, input_size: tuple[int, int]) -> np.ndarray:
    """Move (..., 2) x, y points from image pixels to pixels of the encoder's input."""
    x1, y1, x2, y2 = window
    scale = np.array([input_size[1] / (x2 - x1), input_size[0] / (y2 - y1)])
    return (points - np.array([x1, y1])) * scale


# ---- Decoding --------------------------------------------------------------------------------


def encode_prompts(sam: Sam, boxes: torch.Tensor, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse (n, tokens, dim) and dense (n, dim, h, w) prompt embeddings of boxes.

    `boxes` is (n, 4) in the input frame. `prompt` is `boxes`, `points` (their centres, as
    foreground) or `boxes+points`.
    """
    centres = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    labels = torch.ones(len(boxes), 1, dtype=torch.int, device=boxes.device)
    sparse, dense = sam.prompt_encoder(
        points=(centres, labels) if "points" in prompt else None,
        boxes=boxes if "boxes" in prompt else None,
        masks=None,
    )
    return sparse, dense


def decode(
    sam: Sam, embeddings: torch.Tensor, sparse: torch.Tensor, dense: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask logits (n, 1, H, W) at a quarter of the embedding's stride, and predicted IoUs (n, 1).

    `embeddings` is (n, dim, h, w), one for every prompt. The decoder itself repeats one image's
    embedding for all prompts; since it only adds it to the dense prompt, adding it here and giving
    the decoder zeros is the same.
    """
    return sam.mask_decoder(
        image_embeddings=torch.zeros_like(embeddings[:1]),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense + embeddings,
        multimask_output=False,
    )
