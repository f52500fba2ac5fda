"""What a SAM is trained on: varied views of true defects, in the frame that inference uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import torch
from segment_anything.modeling import Sam

from pipeline.data.augment import vary_light
from pipeline.data.dataset import Sample
from pipeline.data.masks import box_of, decode_rle
from pipeline.models import prompting

WINDOW_JITTER = 0.15  # shift and scale of the window, part of the box's side
ROTATION = 4.0  # degrees either way
STRETCH = 0.08  # of width and of height, each by itself, logarithmic
SHIFT = 0.05  # of the picture, part of its size
EXACT_BOXES = 0.4  # part of the examples whose box is not moved


@dataclass(frozen=True)
class Instance:
    """One true defect: its image and its index among the image's true instances."""

    sample: Sample
    index: int

    @property
    def mask(self) -> np.ndarray:
        """(height, width) bool, decoded anew: masks of thousands of defects fill the memory."""
        return decode_rle(self.sample.annotations[self.index]["segmentation"])


@dataclass(frozen=True)
class Example:
    """What the network is shown of an instance, or of a place without one."""

    image: torch.Tensor  # (3, size, size): the encoder's input, normalised and padded
    box: np.ndarray  # (4,) in the frame of the encoder's input
    mask: np.ndarray  # (height, width) bool: the window in the picture's own resolution; or empty
    input_size: tuple[int, int]  # (height, width) of the window in the encoder's input


def instances(samples: Sequence[Sample]) -> list[Instance]:
    return [Instance(s, i) for s in samples for i in range(len(s.annotations))]


def make_example(
    sam: Sam, instance: Instance, zoom: float, free_pose: bool, rng: np.random.Generator
) -> Example:
    """Vary the picture of an instance, cut a window around it, and bring both into SAM's frame."""
    image, mask = _varied(_image(instance.sample), instance.mask, free_pose, rng)
    return _framed(sam, image, mask, np.array(box_of(mask), float), zoom, rng)


def make_decoy(
    sam: Sam,
    good: Sample,
    like: Instance,
    zoom: float,
    free_pose: bool,
    rng: np.random.Generator,
) -> Example:
    """The place of an instance in a picture without one, as a detector's false alarm would show it.

    SAM learns from it that a mask can be worth nothing. Raises `ValueError` for pictures of two
    sizes, whose places do not correspond.
    """
    image, mask = _image(good), like.mask
    if image.shape[:2] != mask.shape:
        raise ValueError(f"expected pictures of one size, found {good.path}, {like.sample.path}")
    image, mask = _varied(image, mask, free_pose, rng)
    return _framed(sam, image, np.zeros_like(mask), np.array(box_of(mask), float), zoom, rng)


def _framed(
    sam: Sam,
    image: np.ndarray,
    mask: np.ndarray,
    box: np.ndarray,
    zoom: float,
    rng: np.random.Generator,
) -> Example:
    """The part of a picture around a box, not quite in its middle, in changed light."""
    side = (box[2:] - box[:2]).max()
    centre = (box[:2] + box[2:]) / 2 + rng.uniform(-1, 1, 2) * WINDOW_JITTER * side
    around = np.hstack([centre - side / 2, centre + side / 2])
    scale = rng.uniform(1 - WINDOW_JITTER, 1 + 2 * WINDOW_JITTER)
    x1, y1, x2, y2 = prompting.window_around(around, mask.shape, zoom * scale)
    if mask.any() and not mask[y1:y2, x1:x2].any():  # all of it lay along the sides cut off
        x1, y1, x2, y2 = prompting.window_around(box, mask.shape, zoom)
    image, mask = image[y1:y2, x1:x2], mask[y1:y2, x1:x2]
    box = np.clip(box - [x1, y1, x1, y1], 0, [x2 - x1, y2 - y1] * 2)
    image = vary_light(np.ascontiguousarray(image), rng)
    window = 0, 0, x2 - x1, y2 - y1
    tensor, size = prompting.encoder_input(sam, image, window)
    box = prompting.to_input_frame(box.reshape(2, 2), window, size).ravel()
    return Example(tensor, box, np.ascontiguousarray(mask), size)


def jittered(box: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """A (4,) box, each side moved by up to `amount` of the box's size, or left as it is.

    A box that is exact most of the time is worth following; one that is off now and then must not
    be trusted blindly.
    """
    if rng.uniform() < EXACT_BOXES:
        return box
    size = np.tile(box[2:] - box[:2], 2)
    return box + amount * rng.uniform(-1, 1, 4) * size


@lru_cache(maxsize=64)  # decoding takes longer than everything else that makes an example
def _image(sample: Sample) -> np.ndarray:
    return sample.image()


def _varied(
    image: np.ndarray, mask: np.ndarray, free_pose: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The picture and its mask a bit turned, stretched, shifted, and mirrored left to right.

    Where the part lies at any angle, also one of the eight mirrorings and quarter turns.
    """
    if free_pose:
        transpose, flip = rng.integers(0, 2, 2)
        if transpose:
            image, mask = image.swapaxes(0, 1), mask.T
        if flip:
            image, mask = image[::-1], mask[::-1]
    height, width = mask.shape
    angle = np.deg2rad(ROTATION * rng.uniform(-1, 1))
    stretch = np.exp(STRETCH * rng.uniform(-1, 1, 2)) * [rng.choice([-1, 1]), 1]
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin], [sin, cos]]) * stretch
    centre = np.array([width - 1, height - 1]) / 2
    shift = SHIFT * rng.uniform(-1, 1, 2) * [width, height]
    affine = np.column_stack([matrix, centre + shift - matrix @ centre])
    turned, moved = (
        cv2.warpAffine(source, affine, (width, height), borderMode=cv2.BORDER_REPLICATE)
        for source in (np.ascontiguousarray(image), mask.astype(np.uint8) * 255)
    )
    seen = moved >= 128
    # A defect of few pixels may fall between those of the new picture, or leave it.
    return (turned, seen) if seen.any() else (image, mask)
