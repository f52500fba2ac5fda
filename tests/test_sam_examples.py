"""What a SAM is trained on: picture, mask and box stay in step, however they are varied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rectangles import draw, filled
from segment_anything.modeling import Sam

from pipeline.data.dataset import Sample
from pipeline.data.masks import box_of, encode_rle
from pipeline.models import sam_examples, sam_lite
from pipeline.models.sam import LoadedSam
from pipeline.models.sam_examples import Instance, jittered, make_decoy, make_example
from pipeline.models.segmenter import Segmenter

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def lite() -> Sam:
    torch.manual_seed(0)
    return sam_lite.build_sam_lite().eval()


def instance_of(mask: np.ndarray, image: np.ndarray, path: Path) -> Instance:
    cv2.imwrite(str(path), image)
    height, width = mask.shape
    x1, y1, x2, y2 = box_of(mask)
    annotation = {
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "category_id": 1,
        "segmentation": encode_rle(mask),
    }
    return Instance(Sample(1, path, width, height, (annotation,)), 0)


def rectangle(box: tuple[int, int, int, int], height: int, width: int, path: Path) -> Instance:
    """A true instance whose image has a rectangle."""
    return instance_of(filled(box, height, width), draw([("stain", box)], height, width), path)


class Still:
    """A random number generator that varies nothing, save for the symmetry it was given."""

    def __init__(self, transpose: int = 0, upside_down: int = 0, mirror: int = 0) -> None:
        self._pose, self._mirror = np.array([transpose, upside_down]), mirror

    def uniform(self, low: float, high: float, size: int | None = None) -> Any:
        one = 0.0 if low < 0 else 1.0  # a shift or an angle, or else a scale
        return one if size is None else np.full(size, one)

    def integers(self, *_: int) -> np.ndarray:
        return self._pose

    def choice(self, signs: list[int]) -> int:
        return signs[0 if self._mirror else 1]


@pytest.fixture
def same_light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sam_examples, "vary_light", lambda image, rng: image)


# ---- Examples --------------------------------------------------------------------------------


@pytest.mark.parametrize("zoom", [0, 1.5, 3])
@pytest.mark.parametrize("box", [(20, 30, 80, 50), (0, 0, 12, 60), (100, 60, 160, 90)])
def test_an_unvaried_example_is_what_inference_sees(
    lite: Sam, tmp_path: Path, same_light: None, zoom: float, box: tuple[int, int, int, int]
) -> None:
    true = rectangle(box, 90, 160, tmp_path / "a.png")
    example = make_example(lite, true, zoom, True, Still())  # type: ignore[arg-type]
    images: list[torch.Tensor] = []
    prompts: list[torch.Tensor] = []
    hooks = [
        lite.image_encoder.register_forward_hook(lambda _, args, __: images.append(args[0])),
        lite.prompt_encoder.register_forward_hook(
            lambda _, __, kwargs, ___: prompts.append(kwargs["boxes"]), with_kwargs=True
        ),
    ]
    segmenter = Segmenter(LoadedSam(lite, "sam-lite", zoom), None, torch.device("cpu"))
    segmenter.segment(true.sample.image(), true.sample.truth)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(example.image, images[0][0], rtol=0, atol=0)
    np.testing.assert_allclose(example.box, prompts[0][0].numpy(), atol=1e-4)


@pytest.mark.parametrize("transpose", [0, 1])
@pytest.mark.parametrize("upside_down", [0, 1])
@pytest.mark.parametrize("mirror", [0, 1])
@pytest.mark.parametrize("zoom", [0, 2])
def test_image_mask_and_box_stay_in_step(
    lite: Sam,
    tmp_path: Path,
    same_light: None,
    transpose: int,
    upside_down: int,
    mirror: int,
    zoom: float,
) -> None:
    """In all eight symmetries of a window that is not square: the bright part is the mask."""
    true = rectangle((70, 12, 118, 32), 80, 120, tmp_path / "a.png")
    symmetry = Still(transpose, upside_down, mirror)
    example = make_example(lite, true, zoom, True, symmetry)  # type: ignore[arg-type]
    upright = make_example(lite, true, zoom, True, Still())  # type: ignore[arg-type]
    expected = upright.mask.T if transpose else upright.mask
    expected = expected[:: -1 if upside_down else 1, :: -1 if mirror else 1]
    np.testing.assert_array_equal(example.mask, expected)
    height, width = example.mask.shape
    assert max(example.input_size) == 320
    scale = [example.input_size[1] / width, example.input_size[0] / height] * 2
    np.testing.assert_allclose(example.box, np.array(box_of(example.mask)) * scale, atol=1e-6)
    # The picture itself: bright where the mask is.
    rows, columns = example.input_size
    bright = example.image.numpy()[0, :rows, :columns] > 0
    mask = cv2.resize(example.mask.astype(np.float32), (columns, rows)) > 0.5
    assert (bright == mask).mean() > 0.98
    assert (example.image[:, rows:] == 0).all() and (example.image[:, :, columns:] == 0).all()


@pytest.mark.parametrize("free_pose", [False, True])
def test_varied_examples_stay_in_step(lite: Sam, tmp_path: Path, free_pose: bool) -> None:
    """The box is that of the mask, save where the window cuts it; and a seed says it all."""
    true = rectangle((40, 30, 88, 50), 80, 120, tmp_path / "a.png")
    windows = set()
    for seed in range(20):
        example = make_example(lite, true, 1.5, free_pose, np.random.default_rng(seed))
        height, width = example.mask.shape
        scale = [example.input_size[1] / width, example.input_size[0] / height] * 2
        np.testing.assert_allclose(example.box, np.array(box_of(example.mask)) * scale, atol=1e-6)
        assert example.mask.sum() > 0.8 * 48 * 20
        windows.add((height, width))
        again = make_example(lite, true, 1.5, free_pose, np.random.default_rng(seed))
        torch.testing.assert_close(again.image, example.image, rtol=0, atol=0)
        np.testing.assert_array_equal(again.mask, example.mask)
    assert len(windows) > 5


def test_a_defect_along_the_sides_of_its_box_stays_in_the_window(
    lite: Sam, tmp_path: Path, same_light: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thin L, a tight window that is off to the lower right would show nothing."""

    class OffToTheLowerRight(Still):
        def uniform(self, low: float, high: float, size: int | None = None) -> Any:
            return low if size is None else np.full(size, high)

    mask = filled((40, 40, 43, 160), 200, 200) | filled((40, 40, 160, 43), 200, 200)
    true = instance_of(mask, draw([], 200, 200), tmp_path / "a.png")
    monkeypatch.setattr(sam_examples, "_varied", lambda image, mask, *_: (image, mask))
    example = make_example(lite, true, 1, False, OffToTheLowerRight())  # type: ignore[arg-type]
    assert example.mask.sum() == mask.sum()
    np.testing.assert_allclose(example.box, [0, 0, 320, 320])


def test_a_decoy_is_the_place_of_a_defect_in_a_good_picture(lite: Sam, tmp_path: Path) -> None:
    true = rectangle((40, 30, 88, 50), 80, 120, tmp_path / "a.png")
    cv2.imwrite(str(tmp_path / "good.png"), draw([], 80, 120, seed=1))
    good = Sample(2, tmp_path / "good.png", 120, 80, ())
    for seed in range(5):
        decoy = make_decoy(lite, good, true, 1.5, False, np.random.default_rng(seed))
        example = make_example(lite, true, 1.5, False, np.random.default_rng(seed))
        assert not decoy.mask.any() and decoy.mask.shape == example.mask.shape
        np.testing.assert_array_equal(decoy.box, example.box)
        assert example.image.amax() > 0.3 > decoy.image.amax()  # nothing bright to be seen
    cv2.imwrite(str(tmp_path / "other.png"), draw([], 120, 80))
    other = Sample(3, tmp_path / "other.png", 80, 120, ())
    with pytest.raises(ValueError, match="expected pictures of one size"):
        make_decoy(lite, other, true, 1.5, False, np.random.default_rng(0))


# ---- Variations ------------------------------------------------------------------------------


def ellipse(x: float, y: float, a: float, b: float, height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.asarray(((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 < 1)


def painted(mask: np.ndarray) -> np.ndarray:
    """A black picture, white where the mask is."""
    return np.dstack([mask.astype(np.uint8) * 255] * 3)


@given(SEEDS, st.booleans(), st.floats(40, 80), st.floats(35, 45), st.floats(3, 18))
def test_mask_and_picture_move_together(
    seed: int, free_pose: bool, x: float, y: float, size: float
) -> None:
    mask = ellipse(x, y, size, size * 0.7, 80, 120)
    rng = np.random.default_rng(seed)
    image, moved = sam_examples._varied(painted(mask), mask, free_pose, rng)
    assert image.shape == (*moved.shape, 3) and image.dtype == np.uint8 and moved.dtype == bool
    assert ((image[..., 0] >= 128) != moved).sum() <= 2  # pixels right at the threshold
    # Stretched by at most 8 % each way, and a pixel's rounding all around.
    area, outline = np.pi * size**2 * 0.7, 2 * np.pi * size
    assert np.exp(-0.16) * area - outline < moved.sum() < np.exp(0.16) * area + outline


def poses(free_pose: bool) -> set[tuple[bool, bool, bool]]:
    """The poses of a picture's upper left corner in many variations.

    Whether the sides were exchanged, whether it is at the bottom, and whether on the right.
    """
    mask = ellipse(25, 20, 8, 6, 80, 120)
    found = set()
    for seed in range(80):
        _, moved = sam_examples._varied(painted(mask), mask, free_pose, np.random.default_rng(seed))
        height, width = moved.shape
        rows, columns = np.nonzero(moved)
        found.add((height > width, rows.mean() > height / 2, columns.mean() > width / 2))
    return found


def test_a_part_that_lies_still_is_only_mirrored_left_to_right() -> None:
    assert poses(free_pose=False) == {(False, False, False), (False, False, True)}


def test_a_part_at_any_angle_is_seen_in_all_eight_symmetries() -> None:
    assert len(poses(free_pose=True)) == 8


def test_variations_differ() -> None:
    mask = ellipse(60, 40, 18, 12, 80, 120)
    turned = [
        sam_examples._varied(painted(mask), mask, False, np.random.default_rng(seed))[1]
        for seed in range(40)
    ]
    centres = np.array([np.argwhere(mask).mean(0) for mask in turned])
    assert len({mask.tobytes() for mask in turned}) == 40
    assert (np.ptp(centres, axis=0) > [5, 8]).all()  # of shifts by 4 and by 6 either way
    angles = [cv2.minAreaRect(np.argwhere(mask)[:, ::-1].astype(np.float32))[2] for mask in turned]
    assert np.ptp(np.array(angles) % 90) > 3


@given(SEEDS, st.booleans(), st.integers(1, 58), st.integers(1, 38))
def test_a_defect_of_one_pixel_never_vanishes(seed: int, free_pose: bool, x: int, y: int) -> None:
    mask = filled((x, y, x + 1, y + 1), 40, 60)
    rng = np.random.default_rng(seed)
    image, moved = sam_examples._varied(painted(mask), mask, free_pose, rng)
    assert 1 <= moved.sum() <= 4
    assert (image[moved] >= 128).all()


# ---- Boxes -----------------------------------------------------------------------------------


@given(
    SEEDS,
    st.tuples(*[st.floats(-500, 500)] * 2),
    st.tuples(*[st.floats(0.1, 500)] * 2),
    st.floats(0, 0.49),
)
def test_a_jittered_box_is_near_and_still_a_box(
    seed: int, corner: tuple[float, float], size: tuple[float, float], amount: float
) -> None:
    box = np.array([*corner, corner[0] + size[0], corner[1] + size[1]])
    moved = jittered(box, amount, np.random.default_rng(seed))
    assert (np.abs(moved - box) <= amount * np.array([*size, *size]) + 1e-9).all()
    assert (moved[2:] > moved[:2]).all()


def test_two_of_five_boxes_are_exact_and_the_others_move_on_all_sides() -> None:
    box, rng = np.array([10.0, 20, 60, 40]), np.random.default_rng(0)
    moved = np.array([jittered(box, 0.1, rng) for _ in range(2000)])
    exact = (moved == box).all(axis=1)
    assert exact.mean() == pytest.approx(0.4, abs=0.03)
    shifts = (moved - box)[~exact] / [50, 20, 50, 20]
    assert (shifts != 0).all()
    np.testing.assert_allclose(shifts.mean(axis=0), 0, atol=0.01)
    np.testing.assert_allclose(shifts.std(axis=0), 0.1 / np.sqrt(3), atol=0.005)  # uniform
    np.testing.assert_allclose(np.corrcoef(shifts.T), np.eye(4), atol=0.1)  # each by itself
