"""Pixel masks for the boxes of an image."""

from __future__ import annotations

import numpy as np
import supervision as sv
import torch

from pipeline.models import prompting
from pipeline.models.sam import LoadedSam

DECODED_AT_ONCE = 8  # boxes: each needs its logits at the window's full resolution in memory


class Segmenter:
    """Turns boxes of an image into pixel masks."""

    def __init__(self, loaded: LoadedSam, zoom: float | None, device: torch.device) -> None:
        self.zoom = loaded.zoom if zoom is None else zoom
        self._sam = loaded.model.eval().to(device)

    @torch.inference_mode()
    def segment(
        self, image: np.ndarray, detections: sv.Detections, prompt: str = "boxes"
    ) -> sv.Detections:
        """The same detections with masks (n, height, width) and SAM's IoU estimate as `quality`.

        `image` is (height, width, 3) uint8 BGR. Every window is encoded once for all its boxes;
        without boxes nothing is encoded.
        """
        masks = np.zeros((len(detections), *image.shape[:2]), bool)
        quality = np.zeros(len(detections), np.float32)
        windows = [
            prompting.window_around(box, image.shape[:2], self.zoom) for box in detections.xyxy
        ]
        for window in dict.fromkeys(windows):
            rows = [i for i, other in enumerate(windows) if other == window]
            x1, y1, x2, y2 = window
            masks[rows, y1:y2, x1:x2], quality[rows] = self._segment_window(
                image, window, detections.xyxy[rows], prompt
            )
        return sv.Detections(
            xyxy=detections.xyxy,
            class_id=detections.class_id,
            confidence=detections.confidence,
            mask=masks if len(detections) else None,
            data={**detections.data, "quality": quality},
        )

    def _segment_window(
        self, image: np.ndarray, window: prompting.Window, boxes: np.ndarray, prompt: str
    ) -> tuple[np.ndarray, np.ndarray]:
        sam = self._sam
        tensor, input_size = prompting.encoder_input(sam, image, window)
        embedding = sam.image_encoder(tensor[None])
        corners = prompting.to_input_frame(boxes.reshape(-1, 2, 2), window, input_size).reshape(
            -1, 4
        )
        prompts = torch.from_numpy(corners).float().to(tensor.device)
        x1, y1, x2, y2 = window
        masks, quality = [], []
        for some in prompts.split(DECODED_AT_ONCE):
            sparse, dense = prompting.encode_prompts(sam, some, prompt)
            logits, iou = prompting.decode(
                sam, embedding.expand(len(some), -1, -1, -1), sparse, dense
            )
            logits = sam.postprocess_masks(logits, input_size, (y2 - y1, x2 - x1))
            masks.append((logits[:, 0] > sam.mask_threshold).cpu().numpy())
            quality.append(iou[:, 0].clamp(0, 1).cpu().numpy())
        return np.concatenate(masks), np.concatenate(quality)
