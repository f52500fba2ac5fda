"""The methods that run.py compares: each makes a pixel mask from a box."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import supervision as sv
import torch

from pipeline.models.prompting import window_around
from pipeline.models.sam import LoadedSam
from pipeline.models.segmenter import Segmenter

ITERATIONS = 5  # of GrabCut

# From a (height, width, 3) uint8 BGR image and a box x1, y1, x2, y2 in its pixels to a
# (height, width) bool mask and, where the method has one, its own estimate of the mask's IoU.
Method = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float | None]]


def box_filled(image: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, None]:
    """Every pixel of the box: what a detector alone says about the mask."""
    mask = np.zeros(image.shape[:2], bool)
    x1, y1, x2, y2 = _whole_pixels(box, mask.shape)
    mask[y1:y2, x1:x2] = True
    return mask, None


def grabcut(zoom: float) -> Method:
    """GrabCut in a window around the box (`zoom` as in `window_around`; 0: the whole image).

    What is outside of the box is background for certain, what is inside is probably defect, as in
    Rother et al., GrabCut, SIGGRAPH 2004. Where the box leaves no background in the window there is
    nothing to tell the defect from, and the mask is the box.
    """

    def segment(image: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, None]:
        mask, _ = box_filled(image, box)
        left, top, right, bottom = window_around(box, mask.shape, zoom)
        inside = mask[top:bottom, left:right]  # a view: what is written here is in `mask`
        if not inside.any() or inside.all():
            return mask, None
        labels = np.where(inside, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
        colours = np.zeros((2, 1, 65))  # of background and foreground, as OpenCV wants them
        window = np.ascontiguousarray(image[top:bottom, left:right])
        cv2.setRNGSeed(0)  # its clusters begin at random
        cv2.grabCut(window, labels, None, *colours, ITERATIONS, cv2.GC_INIT_WITH_MASK)
        inside[:] = labels == cv2.GC_PR_FGD
        return mask, None

    return segment


def sam(loaded: LoadedSam, zoom: float, device: torch.device) -> Method:
    """A SAM that is shown the box, alone, in a window around it (0: in the whole image)."""
    segmenter = Segmenter(loaded, zoom, device, flip=True)

    def segment(image: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, float]:
        prompt = sv.Detections(xyxy=box[None].astype(np.float32), class_id=np.zeros(1, int))
        found = segmenter.segment(image, prompt)
        assert found.mask is not None
        return np.asarray(found.mask[0]), float(found.data["quality"][0])

    return segment


def _whole_pixels(box: np.ndarray, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The box with its sides at the nearest pixel borders, inside the image."""
    height, width = shape
    x1, y1, x2, y2 = np.clip(np.rint(box), 0, [width, height, width, height]).astype(int)
    return x1, y1, x2, y2
