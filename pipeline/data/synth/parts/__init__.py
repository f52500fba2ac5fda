"""Assorted manufactured things with nine kinds of damage: a broad set to pretrain on.

Hundreds of different looks, none of them of a particular product: what a detector and a promptable
segmenter learn from it should be about damage.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.data.synth.draw import stands_out
from pipeline.data.synth.parts.defects import MAKERS, Maker
from pipeline.data.synth.parts.families import ANY, sample_scene
from pipeline.data.synth.parts.scene import Scene, mask_of, paint

DEFECTS = tuple(MAKERS)
CHECK_SIZE = 128  # pixels, for judging whether a defect is visible
LEAST_AREA = 1e-3  # of a defect, as a share of the picture
MOST_AREA = 0.5
TRIES = 6  # in one scene, before another one is taken


def render(
    kind: str, size: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One picture and its mask, as `Product` in dataset.py says; ``kind`` is "good" or a defect."""
    good, scene = scenes(kind, rng)
    return paint(scene, size), mask_of(good, scene, size)


def scenes(kind: str, rng: np.random.Generator) -> tuple[Scene, Scene]:
    """The flawless scene and the same scene with the defect; the same object twice for "good"."""
    if kind == "good":
        good = sample_scene(rng, ANY)
        return good, good
    make, families = MAKERS[kind]
    while True:
        good = scene = sample_scene(rng, families)
        for _ in range(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])):
            scene = _damaged(good, scene, make, rng)
        if scene is not good:
            return good, scene


def _damaged(good: Scene, scene: Scene, make: Maker, rng: np.random.Generator) -> Scene:
    """The scene with one more visible defect, or as it is where that does not succeed."""
    before = paint(scene, CHECK_SIZE)
    for _ in range(TRIES):
        changed = make(scene, rng)
        if changed is None:  # it cannot happen to anything here
            break
        mask = mask_of(good, replace(changed, damages=changed.damages[-1:]), CHECK_SIZE)
        after = paint(changed, CHECK_SIZE)
        if LEAST_AREA < mask.mean() < MOST_AREA and stands_out(before, after, mask):
            return changed
    return scene
