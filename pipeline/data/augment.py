"""Photometric augmentation, through albumentations: the only module that imports it."""

from __future__ import annotations

import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or its import looks for a newer version online

import albumentations as A
import numpy as np


def photometric() -> list[A.BasicTransform]:
    """Changes of light, colour, focus and noise that leave boxes and masks where they are."""
    return [
        A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),
        A.HueSaturationValue(hue_shift_limit=5, sat_shift_limit=20, val_shift_limit=10, p=0.3),
        A.RandomGamma(gamma_limit=(80, 120), p=0.2),
        A.OneOf([A.GaussianBlur(blur_limit=(3, 5)), A.Sharpen(alpha=(0.1, 0.3))], p=0.2),
        A.GaussNoise(std_range=(0.01, 0.03), p=0.2),
    ]


_PHOTOMETRIC = A.Compose(photometric())


def vary_light(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A photometric variation of a (height, width, 3) uint8 image; `rng` alone decides which."""
    seed(_PHOTOMETRIC, rng)
    return np.asarray(_PHOTOMETRIC(image=image)["image"])


def seed(composed: A.Compose, rng: np.random.Generator) -> None:
    """Seed each transform by itself: `Compose` would give all of them the same random numbers."""
    for transform in composed.transforms:
        transform.set_random_seed(int(rng.integers(2**31)))
