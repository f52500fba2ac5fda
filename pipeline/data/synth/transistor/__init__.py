"""A transistor on stripboard and four defects, in the manner of MVTec AD's transistor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.data.synth.draw import marked
from pipeline.data.synth.transistor.defects import MAKERS
from pipeline.data.synth.transistor.masks import MASKERS
from pipeline.data.synth.transistor.paint import paint
from pipeline.data.synth.transistor.scene import Scene, sample_scene

DEFECTS: tuple[str, ...] = ("bent_lead", "cut_lead", "damaged_case", "misplaced")


def render(
    kind: str, size: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One picture and its mask.

    ``kind`` is "good" or one of DEFECTS. Returns the image (size, size, 3) uint8 in BGR order and
    the mask (size, size) bool, which is empty exactly for "good".
    """
    good, scene = scenes(kind, rng)
    return paint(scene, size), mask_of(kind, good, scene, size)


def scenes(kind: str, rng: np.random.Generator) -> tuple[Scene, Scene]:
    """The flawless scene and the same scene with the defect; the same object twice for "good"."""
    scene_rng, defect_rng = rng.spawn(2)
    good = sample_scene(scene_rng)
    if kind == "good":
        return good, good
    return good, MAKERS[kind](good, defect_rng)


def mask_of(kind: str, good: Scene, scene: Scene, size: int) -> NDArray[np.bool_]:
    """Mask (size, size) bool of the defect that turned ``good`` into ``scene``."""
    if kind == "good":
        return np.zeros((size, size), bool)
    return marked(MASKERS[kind](good, scene, size))
