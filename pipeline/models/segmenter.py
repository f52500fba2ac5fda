"""Pixel masks for the boxes of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import supervision as sv
import torch

from pipeline.models import prompting
from pipeline.models.device import torch_device
from pipeline.models.embedding_cache import CachedEncoder
from pipeline.models.sam import LoadedSam, load_sam

DECODED_AT_ONCE = 8  # boxes: each needs its logits at the window's full resolution in memory


class _View(NamedTuple):
    """A window of an image, or of its mirror image, as SAM sees it."""

    window: prompting.Window
    shown: sv.Detections  # the prompts, in pixels of the image
    input_size: tuple[int, int]  # (height, width) of the window in the encoder's input
    embedding: torch.Tensor  # (1, dim, h, w)


class Segmenter:
    """Turns boxes of an image into pixel masks."""

    def __init__(
        self,
        loaded: LoadedSam,
        zoom: float | None,
        device: torch.device,
        flip: bool = False,
    ) -> None:
        """With `flip`, what SAM says of the mirror image is averaged in."""
        self.zoom = loaded.zoom if zoom is None else zoom
        self._flip = flip
        self._sam = loaded.model.eval().to(device)
        self._calibration = loaded.calibration

    @classmethod
    def load(
        cls,
        source: str,
        *,
        zoom: float | None,
        flip: bool,
        device: str,
        offline: bool,
        cache: Path | None = None,
        cache_gb: float = 0.0,
    ) -> Segmenter:
        """One of a SAM by its name in the weights registry, or from a checkpoint.

        The options are those of `SegmentConfig`. Raises `UserError` when there is no such SAM.
        """
        chosen = torch_device(device)
        loaded = load_sam(source, offline=offline)
        if cache is not None:
            encoder = loaded.model.image_encoder
            loaded.model.image_encoder = CachedEncoder(encoder, cache, cache_gb)
        return cls(loaded, zoom, chosen, flip)

    @torch.inference_mode()
    def segment(
        self, image: np.ndarray, detections: sv.Detections, prompt: str = "boxes"
    ) -> sv.Detections:
        """The same detections with masks (n, height, width) and their calibrated `quality`.

        `image` is (height, width, 3) uint8 BGR. Every window is encoded once for all its boxes;
        without boxes nothing is encoded. With `masks` in the prompt (see `encode_prompts`), the
        detections' own masks are shown. With `points`, `data["points"]` is: for each box (k, 3) x,
        y and label in image pixels; where there are none, its centre. A window holds its box and
        the points.
        """
        masks = np.zeros((len(detections), *image.shape[:2]), bool)
        quality = np.zeros(len(detections), np.float32)
        shown = _shown(detections, prompt)
        windows = [
            prompting.window_around(_around(box, points), image.shape[:2], self.zoom)
            for box, points in zip(shown.xyxy, shown.data["points"], strict=True)
        ]
        for window in dict.fromkeys(windows):
            rows = [i for i, other in enumerate(windows) if other == window]
            x1, y1, x2, y2 = window
            masks[rows, y1:y2, x1:x2], quality[rows] = self._segment_window(
                image, window, _some(shown, rows), prompt
            )
        return sv.Detections(
            xyxy=detections.xyxy,
            class_id=detections.class_id,
            confidence=detections.confidence,
            mask=masks if len(detections) else None,
            data={**detections.data, "quality": quality},
        )

    def _segment_window(
        self, image: np.ndarray, window: prompting.Window, shown: sv.Detections, prompt: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks (n, height, width) of the window, and their quality (n,)."""
        views = [self._encode(image, window, shown)]
        if self._flip:
            views.append(self._encode(*_mirrored(image, window, shown)))
        x1, y1, x2, y2 = window
        masks = np.empty((len(shown), y2 - y1, x2 - x1), bool)
        quality = np.empty(len(shown), np.float32)
        for rows in _batches([len(points) for points in shown.data["points"]]):
            logits, predicted = self._decode(views[0], rows, prompt)
            for view in views[1:]:
                mirrored, again = self._decode(view, rows, prompt)
                logits, predicted = (logits + mirrored.flip(-1)) / 2, (predicted + again) / 2
            masks[rows] = (logits > self._sam.mask_threshold).cpu().numpy()
            quality[rows] = self._calibration.apply(predicted.clamp(0, 1).cpu().numpy())
        return masks, quality

    def _encode(self, image: np.ndarray, window: prompting.Window, shown: sv.Detections) -> _View:
        tensor, input_size = prompting.encoder_input(self._sam, image, window)
        return _View(window, shown, input_size, self._sam.image_encoder(tensor[None]))

    def _decode(
        self, view: _View, rows: list[int], prompt: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, height, width) in the window's resolution, and predicted IoUs (n,)."""
        shown = _some(view.shown, rows)
        sparse, dense = self._encode_prompts(shown, view.window, view.input_size, prompt)
        embeddings = view.embedding.expand(len(rows), -1, -1, -1)
        logits, iou = prompting.decode(self._sam, embeddings, sparse, dense)
        x1, y1, x2, y2 = view.window
        logits = self._sam.postprocess_masks(logits, view.input_size, (y2 - y1, x2 - x1))
        return logits[:, 0], iou[:, 0]

    def _encode_prompts(
        self,
        shown: sv.Detections,
        window: prompting.Window,
        input_size: tuple[int, int],
        prompt: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sparse and dense embeddings of what is shown, which has as many points for each box."""
        corners = prompting.to_input_frame(shown.xyxy.reshape(-1, 2, 2), window, input_size)
        boxes = self._tensor(corners.reshape(-1, 4))
        points = masks = None
        own = np.stack(list(shown.data["points"])).astype(float)
        if own.size:
            own[..., :2] = prompting.to_input_frame(own[..., :2], window, input_size)
            points = self._tensor(own)
        if shown.mask is not None:
            whole = np.asarray(shown.mask)
            masks = prompting.mask_logits(self._sam, whole, window, input_size)
        return prompting.encode_prompts(self._sam, boxes, prompt, points, masks)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).float().to(self._sam.device)


def _shown(detections: sv.Detections, prompt: str) -> sv.Detections:
    """What a prompt takes from detections: their boxes, points (empty: none given), masks."""
    none = [np.empty((0, 3))] * len(detections)
    return sv.Detections(
        xyxy=detections.xyxy,
        mask=detections.mask if "masks" in prompt else None,
        data={"points": detections.data.get("points", none) if "points" in prompt else none},
    )


def _mirrored(
    image: np.ndarray, window: prompting.Window, shown: sv.Detections
) -> tuple[np.ndarray, prompting.Window, sv.Detections]:
    """The three of them with left and right exchanged."""
    width = image.shape[1]
    x1, y1, x2, y2 = window
    boxes = shown.xyxy[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [width, 0, width, 0]
    points = [np.asarray(own, float) * [-1, 1, 1] + [width, 0, 0] for own in shown.data["points"]]
    masks = None if shown.mask is None else np.asarray(shown.mask, bool)[..., ::-1]
    mirrored = sv.Detections(xyxy=boxes, mask=masks, data={"points": points})
    return np.ascontiguousarray(image[:, ::-1]), (width - x2, y1, width - x1, y2), mirrored


def _some(detections: sv.Detections, rows: list[int]) -> sv.Detections:
    return cast(sv.Detections, detections[rows])  # its type also allows for keys of the data


def _around(box: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The box (4,), grown so that it holds the pixels of the points (k, 3)."""
    low, high = points[:, :2], points[:, :2] + 1
    return np.hstack([np.vstack([box[:2], low]).min(0), np.vstack([box[2:], high]).max(0)])


def _batches(points: Sequence[int]) -> Iterator[list[int]]:
    """Rows that are decoded together: those with as many points, as SAM wants it."""
    for count in sorted(set(points)):
        rows = [i for i, own in enumerate(points) if own == count]
        for start in range(0, len(rows), DECODED_AT_ONCE):
            yield rows[start : start + DECODED_AT_ONCE]
