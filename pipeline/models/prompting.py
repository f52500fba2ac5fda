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
from torch.nn import functional as F

from pipeline.models.sam import WHOLE_IMAGE
from pipeline.models.sam_lite import LiteDecoder

SMALLEST_WINDOW = 48  # pixels: around a tiny box, what the window shows must still make sense
# Of the pixels in a mask that is shown to SAM, which knows logits of its own from training; those
# outside have the negative. SAM 2 makes logits of binary masks with the same number
# (`_use_mask_as_output` in its sam2_base.py; Ravi et al., arXiv 2408.00714).
MASK_LOGIT = 10.0

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


def mask_logits(
    sam: Sam, masks: np.ndarray, window: Window, input_size: tuple[int, int]
) -> torch.Tensor:
    """SAM's mask prompts from binary masks: what it would have decoded, had it found them.

    `masks` is (n, height, width) bool, of the whole image. Returns (n, 1, 4h, 4w) logits for an
    embedding of (h, w), in the frame of the encoder's input: a cell has `MASK_LOGIT` if the mask
    covers all of it, the negative if none of it, as in the padding, and in between by the part that
    is covered.
    """
    x1, y1, x2, y2 = window
    shown = torch.from_numpy(masks[:, None, y1:y2, x1:x2]).float().to(sam.device)
    frame = F.interpolate(shown, input_size, mode="bilinear", antialias=True)
    size = sam.image_encoder.img_size
    frame = F.pad(frame, (0, size - input_size[1], 0, size - input_size[0]))
    covered = F.interpolate(frame, sam.prompt_encoder.mask_input_size, mode="area")
    return MASK_LOGIT * (2 * covered - 1)


# ---- Decoding --------------------------------------------------------------------------------


def encode_prompts(
    sam: Sam,
    boxes: torch.Tensor,
    prompt: str,
    points: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse (n, tokens, dim) and dense (n, dim, h, w) embeddings of the prompts for n masks.

    `prompt` says what is shown: one of `boxes`, `points` and `masks`, or several, joined by `+`.
    All are in the frame of the encoder's input: `boxes` is (n, 4). `points` is (n, k, 3): x, y and
    SAM's label, 1 for foreground and 0 for background; without any, the centre of each box is shown
    as foreground. `masks` is (n, 1, 4h, 4w) logits: those that `decode` gave earlier, or those of
    `mask_logits`.
    """
    if points is None:
        centres = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        points = torch.cat([centres, torch.ones_like(centres[..., :1])], dim=-1)
    assert masks is not None or "masks" not in prompt
    sparse, dense = sam.prompt_encoder(
        points=(points[..., :2], points[..., 2]) if "points" in prompt else None,
        boxes=boxes if "boxes" in prompt else None,
        masks=masks if "masks" in prompt else None,
    )
    return sparse, dense


def decode(
    sam: Sam, embeddings: torch.Tensor, sparse: torch.Tensor, dense: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask logits (n, 1, H, W) at a quarter of the embedding's stride, and predicted IoUs (n, 1).

    `embeddings` is (n, dim, h, w), one for every prompt. Segment-anything's decoder repeats one
    image's embedding for all prompts; since it only adds it to the dense prompt, adding it here and
    giving the decoder zeros is the same.
    """
    position = sam.prompt_encoder.get_dense_pe()
    if isinstance(sam.mask_decoder, LiteDecoder):
        logits, iou = sam.mask_decoder(embeddings, position, sparse, dense, multimask_output=False)
        return logits, iou
    return sam.mask_decoder(
        image_embeddings=torch.zeros_like(embeddings[:1]),
        image_pe=position,
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense + embeddings,
        multimask_output=False,
    )
