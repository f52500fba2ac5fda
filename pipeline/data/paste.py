"""Defects cut out of training images and pasted on good ones.

Ten images of a defect are few. A detector sees more of them where each is also shown on other
parts: Dwibedi et al., Cut, Paste and Learn, ICCV 2017; Ghiasi et al., Simple Copy-Paste is a Strong
Data Augmentation Method for Instance Segmentation, CVPR 2021.

Here parts lie alike, so a defect goes to about the place it came from, with a margin of what is
around it: the mask of a cut lead holds board, and what makes it a defect is the lead beside it.
Where exactly is decided by that surrounding, which has to lie on the same things on the good image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import supervision as sv

from pipeline.data.masks import box_of

# Lengths are parts of the image's longer side.
MARGIN = 0.03  # around the mask, pasted as well
FEATHER = 0.025  # around that, from opaque to transparent
CONTEXT = 0.05  # around that, only compared
REACH = 0.08  # how far the surrounding may pull a defect from where it was
SWAY = 0.01  # how far turning and scaling may move the outermost pixel, where parts lie alike
ALIKE = 0.05  # part of all places, best first, where a defect fits if parts lie anyhow
COMPARED = 8000  # about as many pixels of the surrounding are compared
TRIES = 4  # of cuttings of a class, until one fits
# A surrounding that differs from the place by more than the larger of these fits nowhere there.
GREY_LEVELS = 20.0
CONTRAST = 0.75  # part of its own contrast


@dataclass(frozen=True, eq=False)
class Cutting:
    """Defects of one image that lie too close together to be parted, and their surrounding.

    Where it reaches the border of its image, the outermost pixels are repeated beyond it.
    """

    frame: tuple[int, int]  # height and width of the image it is from
    corner: tuple[float, float]  # x, y of its top left pixel in that image
    picture: np.ndarray  # (height, width, 3) uint8 BGR
    alpha: np.ndarray  # (height, width) uint8: 255 on the masks and their margin, falling to 0
    ring: np.ndarray  # (height, width) uint8: 255 around the masks, where pictures are compared
    masks: np.ndarray  # (n, height, width) bool
    classes: np.ndarray  # (n,) class index from 0
    borders: tuple[bool, ...]  # whether a mask reaches the top, bottom, left, right of the image


def cut(picture: np.ndarray, masks: np.ndarray, classes: np.ndarray) -> list[Cutting]:
    """The defects of a (height, width, 3) uint8 BGR image: (n, height, width) masks, (n,) classes.

    Defects whose margins overlap are one cutting, so that no margin holds a part of another defect,
    which would have no label. An empty mask is left out.
    """
    reach = (MARGIN + FEATHER) * max(picture.shape[:2])
    groups: list[tuple[list[int], np.ndarray]] = []
    for i in np.flatnonzero(masks.any(axis=(1, 2))):
        members, region = [int(i)], _distance_to(masks[i]) < reach
        for group in [group for group in groups if (group[1] & region).any()]:
            groups.remove(group)
            members, region = group[0] + members, group[1] | region
        groups.append((members, region))
    return [_cut_one(picture, masks[members], classes[members]) for members, _ in groups]


def _cut_one(picture: np.ndarray, masks: np.ndarray, classes: np.ndarray) -> Cutting:
    height, width = picture.shape[:2]
    side = max(height, width)
    union = np.asarray(masks.any(axis=0))
    distance = _distance_to(union)
    near = distance < (MARGIN + FEATHER + CONTEXT) * side
    x1, y1, x2, y2 = box_of(near)
    at_border = (y1 == 0, y2 == height, x1 == 0, x2 == width)
    top, bottom, left, right = (round(2 * REACH * side) if touches else 0 for touches in at_border)

    def window(plane: np.ndarray) -> np.ndarray:
        inner = np.ascontiguousarray(plane[y1:y2, x1:x2])
        return cv2.copyMakeBorder(inner, top, bottom, left, right, cv2.BORDER_REPLICATE)

    alpha = 1 + (MARGIN * side - distance) / (FEATHER * side)
    return Cutting(
        frame=(height, width),
        corner=(x1 - left, y1 - top),
        picture=window(picture),
        alpha=window((255 * np.clip(alpha, 0, 1)).astype(np.uint8)),
        ring=window((near & ~union).astype(np.uint8) * 255),
        masks=np.stack([window(mask.astype(np.uint8)) > 0 for mask in masks]),
        classes=classes,
        borders=_borders(masks),
    )


def paste(
    good: np.ndarray,
    cuttings: Sequence[Cutting],
    rng: np.random.Generator,
    *,
    free_pose: bool = False,
) -> tuple[np.ndarray, sv.Detections]:
    """A copy of a good (height, width, 3) uint8 BGR image with one to three cuttings pasted on it.

    Each class is as likely as any other. A cutting from an image of the same size goes to about its
    own place, or in half the cases to the mirror image of it, slightly turned and scaled. With
    `free_pose`, any cutting goes to any place that looks like its surrounding, at any angle. Pasted
    regions do not overlap, and the border of the image cuts off no mask that it did not cut off
    before. Where nothing fits, nothing is pasted.

    Returns the image and what was pasted: half-open pixel boxes, class indices from 0, and (n,
    height, width) masks. `rng` alone decides.
    """
    picture, taken = good.copy(), np.zeros(good.shape[:2], bool)
    masks: list[np.ndarray] = []
    classes: list[int] = []
    usable = [c for c in cuttings if (not any(c.borders) if free_pose else c.frame == taken.shape)]
    known = sorted({int(cls) for c in usable for cls in c.classes})
    for cls in rng.choice(known, min(int(rng.geometric(0.75)), 3)) if known else ():
        of_class = [c for c in usable if cls in c.classes]
        for _ in range(TRIES):
            cutting = _turn(of_class[rng.integers(len(of_class))], rng, free_pose)
            place = _find(good, cutting, rng, free_pose)
            if place is None:
                continue
            here, there = place
            full = np.zeros((len(cutting.masks), *taken.shape), bool)
            full[:, *here] = cutting.masks[:, *there]
            whole = full.any(axis=(1, 2)).all() and _borders(full) == cutting.borders
            alpha = cutting.alpha[there]
            if not whole or (taken[here] & (alpha > 0)).any():
                continue
            lit = _match_light(cutting.picture[there], good[here], cutting.ring[there])
            opaque = alpha.astype(np.float32) / 255
            picture[here] = cv2.blendLinear(picture[here], lit, 1 - opaque, opaque)
            taken[here] |= alpha > 0
            masks.extend(full)
            classes.extend(cutting.classes.tolist())
            break
    if not masks:
        return picture, sv.Detections.empty()
    boxes = np.array([box_of(mask) for mask in masks], np.float32)
    return picture, sv.Detections(xyxy=boxes, mask=np.stack(masks), class_id=np.array(classes, int))


def _turn(cutting: Cutting, rng: np.random.Generator, free_pose: bool) -> Cutting:
    """The cutting in another pose: maybe mirrored together with its place, turned and scaled."""
    mirrored = rng.random() < 0.5
    height, width = cutting.alpha.shape
    sway = SWAY * max(cutting.frame) / (np.hypot(height, width) / 2)
    angle = 180 * rng.uniform(-1, 1) if free_pose else np.degrees(sway) * rng.uniform(-1, 1)
    scale = 1 + sway * rng.uniform(-1, 1)
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, scale)
    new_width, new_height = (
        int(np.ceil(side)) for side in np.abs(turn[:, :2]) @ np.array([width, height])
    )
    turn[:, 2] += (new_width - width) / 2, (new_height - height) / 2
    if mirrored:
        turn = turn @ np.array([[-1, 0, width - 1], [0, 1, 0], [0, 0, 1]], float)
    x, y = cutting.corner
    left = cutting.frame[1] - x - width if mirrored else x
    top_border, bottom, left_border, right = cutting.borders

    def warp(plane: np.ndarray, border: int = cv2.BORDER_CONSTANT) -> np.ndarray:
        return cv2.warpAffine(plane, turn, (new_width, new_height), borderMode=border)

    alpha, ring = cv2.split(warp(cv2.merge([cutting.alpha, cutting.ring])))
    return Cutting(
        frame=cutting.frame,
        corner=(left + (width - new_width) / 2, y + (height - new_height) / 2),
        picture=warp(cutting.picture, cv2.BORDER_REPLICATE),
        alpha=alpha,
        ring=ring,
        masks=np.stack([warp(mask.astype(np.uint8) * 255) >= 128 for mask in cutting.masks]),
        classes=cutting.classes,
        borders=(top_border, bottom, *((right, left_border) if mirrored else (left_border, right))),
    )


Window = tuple[slice, slice]  # rows and columns


def _find(
    good: np.ndarray, cutting: Cutting, rng: np.random.Generator, free_pose: bool
) -> tuple[Window, Window] | None:
    """Where the good image looks most like the surrounding of the defect, near its own place.

    In a free pose it is one of the places anywhere that look most like it. Returns the rows and
    columns of the image, and those of the cutting that come to lie there; None if it fits nowhere.
    """
    height, width = cutting.alpha.shape
    step = max(1, round((height * width / COMPARED) ** 0.5))
    template, scene = (_grey(_shrink(image, step)) for image in (cutting.picture, good))
    weight = _shrink(cutting.ring, step).astype(np.float32) / 255
    if free_pose:
        left = top = 0
        window = scene
        if any(a > b for a, b in zip(template.shape, scene.shape, strict=True)):
            return None
    else:
        reach = max(1, round(REACH * max(good.shape[:2]) / step))
        left, top = (round(corner / step) - reach for corner in cutting.corner)
        rows = np.arange(top, top + template.shape[0] + 2 * reach + 1)
        columns = np.arange(left, left + template.shape[1] + 2 * reach + 1)
        window = scene[  # the outermost pixels are repeated beyond the border
            np.clip(rows, 0, scene.shape[0] - 1)[:, None], np.clip(columns, 0, scene.shape[1] - 1)
        ]
    unlike = cv2.matchTemplate(window, template, cv2.TM_SQDIFF, mask=weight).ravel()
    if free_pose:
        best = rng.choice(np.flatnonzero(unlike <= np.quantile(unlike, ALIKE)))
    else:
        best = np.argmin(unlike)
    row, column = divmod(int(best), window.shape[1] - template.shape[1] + 1)
    if not free_pose:
        around = weight > 0.5
        found = window[row : row + template.shape[0], column : column + template.shape[1]]
        difference = (found - template)[around].std() if around.any() else 0
        if difference > max(GREY_LEVELS, CONTRAST * template[around].std()):
            return None
    x, y = (left + column) * step, (top + row) * step
    inside_y = slice(max(y, 0), min(y + height, good.shape[0]))
    inside_x = slice(max(x, 0), min(x + width, good.shape[1]))
    return (inside_y, inside_x), (
        slice(inside_y.start - y, inside_y.stop - y),
        slice(inside_x.start - x, inside_x.stop - x),
    )


def _match_light(picture: np.ndarray, scene: np.ndarray, ring: np.ndarray) -> np.ndarray:
    """The picture with the scene's mean and contrast of each channel, as they are on the ring."""
    mean, contrast = cv2.meanStdDev(picture, mask=ring)
    wanted_mean, wanted_contrast = cv2.meanStdDev(scene, mask=ring)
    gain = np.clip((wanted_contrast + 1) / (contrast + 1), 0.8, 1.25)
    levels = (np.arange(256) - mean) * gain + wanted_mean  # (channels, 256)
    table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(picture, np.ascontiguousarray(table.T)[None]))


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.float32)


def _shrink(image: np.ndarray, step: int) -> np.ndarray:
    """Means of squares of `step` pixels, without what is left over at the right and bottom."""
    height, width = (side // step for side in image.shape[:2])
    inner = image[: height * step, : width * step]
    return cv2.resize(inner, (width, height), interpolation=cv2.INTER_AREA)


def _distance_to(mask: np.ndarray) -> np.ndarray:
    """Euclidean distance of every pixel to a mask with pixels."""
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def _borders(masks: np.ndarray) -> tuple[bool, ...]:
    """Whether masks (n, height, width) reach the top, bottom, left and right of their image."""
    edges = (masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1])
    return tuple(bool(edge.any()) for edge in edges)
