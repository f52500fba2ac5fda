"""Averaging over the mirror image; what else a Segmenter does is in test_sam.py and
test_sam_windows.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import supervision as sv
import torch
from segment_anything.modeling import Sam

from pipeline.models import sam_lite
from pipeline.models.sam import LoadedSam
from pipeline.models.segmenter import Segmenter

HEIGHT, WIDTH = 90, 140  # even, as the boxes: a window's middle is then that of its mirror image
BOXES = np.array([[10, 20, 50, 40], [60, 5, 118, 90], [34.5, 60, 39.2, 71]], np.float32)


@pytest.fixture(scope="module")
def lite() -> Sam:
    torch.manual_seed(1)
    return sam_lite.build_sam_lite()


def shown() -> sv.Detections:
    masks = np.zeros((len(BOXES), HEIGHT, WIDTH), bool)
    masks[0, 25:40, 12:30] = masks[1, 50:60, 70:110] = masks[2, 62:70, 35:39] = True
    points = [np.array([[20, 30, 1]]), np.empty((0, 3)), np.array([[36, 65, 1], [39, 70, 0]])]
    return sv.Detections(xyxy=BOXES, mask=masks, class_id=np.zeros(3, int), data={"points": points})


def mirrored(detections: sv.Detections) -> sv.Detections:
    boxes = detections.xyxy.copy()
    boxes[:, 0], boxes[:, 2] = WIDTH - detections.xyxy[:, 2], WIDTH - detections.xyxy[:, 0]
    points = [np.array([[WIDTH - x, y, label] for x, y, label in p]).reshape(-1, 3)
              for p in detections.data["points"]]  # fmt: skip
    masks = np.asarray(detections.mask)[:, :, ::-1]
    return sv.Detections(
        xyxy=boxes, mask=masks, class_id=detections.class_id, data={"points": points}
    )


@pytest.mark.parametrize("prompt", ["boxes", "boxes+points", "boxes+masks"])
@pytest.mark.parametrize("zoom", [0, 1.3])
def test_the_mirror_image_gives_the_mirrored_masks(lite: Sam, prompt: str, zoom: float) -> None:
    segmenter = Segmenter(LoadedSam(lite, "sam-lite", zoom), None, torch.device("cpu"), flip=True)
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    found = segmenter.segment(image, shown(), prompt)
    again = segmenter.segment(np.ascontiguousarray(image[:, ::-1]), mirrored(shown()), prompt)
    np.testing.assert_array_equal(np.asarray(again.mask)[:, :, ::-1], np.asarray(found.mask))
    np.testing.assert_allclose(again.data["quality"], found.data["quality"], atol=1e-6)


def test_both_images_count(lite: Sam) -> None:
    """The quality is the mean of the two; random weights tell left from right."""
    loaded, cpu = LoadedSam(lite, "sam-lite", 1.3), torch.device("cpu")
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    plain = Segmenter(loaded, None, cpu)
    one = plain.segment(image, shown()).data["quality"]
    other = plain.segment(np.ascontiguousarray(image[:, ::-1]), mirrored(shown())).data["quality"]
    both = Segmenter(loaded, None, cpu, flip=True).segment(image, shown()).data["quality"]
    assert not np.allclose(one, other)
    np.testing.assert_allclose(both, (one + other) / 2, atol=1e-5)
