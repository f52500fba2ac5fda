"""The windows that a SAM sees boxes in, and how its masks are put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rectangles import filled
from sam_cases import BOXES, CPU, MASKS, POINTS, PROMPTS, detections, picture, random_lite
from segment_anything.modeling import Sam

from pipeline.data.masks import iou
from pipeline.models import prompting
from pipeline.models.prompting import Window, window_around
from pipeline.models.sam import LoadedSam
from pipeline.models.segmenter import DECODED_AT_ONCE, Segmenter


@pytest.fixture(scope="module")
def lite() -> Sam:
    return random_lite()


@pytest.fixture
def encoded(lite: Sam) -> Iterator[list[torch.Tensor]]:
    """The encoder's inputs, one for each call."""
    calls: list[torch.Tensor] = []
    hook = lite.image_encoder.register_forward_hook(lambda _, args, __: calls.append(args[0]))
    yield calls
    hook.remove()


# ---- Windows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "shape", "zoom", "expected"),
    [
        pytest.param((100, 100, 120, 110), (400, 600), 3, (80, 75, 140, 135), id="centre"),
        pytest.param((100, 100, 104, 104), (400, 600), 1.5, (78, 78, 126, 126), id="least side"),
        pytest.param((100, 100, 105, 104), (400, 600), 1.5, (78, 78, 126, 126), id="odd side"),
        pytest.param((50, 50, 50, 50), (400, 600), 1.5, (26, 26, 74, 74), id="empty box"),
        pytest.param((0, 0, 40, 40), (400, 600), 2, (0, 0, 80, 80), id="top left"),
        pytest.param((560, 360, 600, 400), (400, 600), 2, (520, 320, 600, 400), id="bottom right"),
        pytest.param((10, 10, 200, 90), (100, 240), 2, (0, 0, 240, 100), id="over the image"),
        pytest.param((100, 0, 200, 60), (60, 600), 1.5, (75, 0, 225, 60), id="over the height"),
        pytest.param((1, 2, 3, 4), (20, 30), 1.5, (0, 0, 30, 20), id="tiny image"),
        pytest.param((-20, 10, 20, 30), (100, 100), 1.5, (0, 0, 60, 60), id="partly outside"),
        pytest.param((700, 500, 720, 520), (400, 600), 1.5, (552, 352, 600, 400), id="outside"),
        pytest.param((10.5, 10.5, 110.5, 60.5), (400, 600), 1, (10, 0, 111, 101), id="fractions"),
        pytest.param((100, 100, 200, 200), (400, 600), 0.5, (100, 100, 200, 200), id="under 1"),
        pytest.param((100, 100, 120, 110), (400, 600), 0, (0, 0, 600, 400), id="whole image"),
    ],
)
def test_window_around(
    box: tuple[float, ...], shape: tuple[int, int], zoom: float, expected: Window
) -> None:
    assert window_around(box, shape, zoom) == expected


@st.composite
def box_in_image(draw: Callable[..., Any]) -> tuple[tuple[int, int], list[float]]:
    height, width = draw(st.integers(1, 3000)), draw(st.integers(1, 3000))
    part = st.floats(0, 1)
    x, y = sorted([draw(part), draw(part)]), sorted([draw(part), draw(part)])
    return (height, width), [x[0] * width, y[0] * height, x[1] * width, y[1] * height]


@given(box_in_image(), st.one_of(st.just(0.0), st.floats(1, 10)))
def test_a_window_lies_in_the_image_and_holds_the_box(
    case: tuple[tuple[int, int], list[float]], zoom: float
) -> None:
    (height, width), box = case
    window = window_around(np.array(box), (height, width), zoom)
    x1, y1, x2, y2 = window
    assert all(type(side) is int for side in window)
    assert 0 <= x1 < x2 <= width
    assert 0 <= y1 < y2 <= height
    assert x1 <= box[0] and y1 <= box[1] and box[2] <= x2 and box[3] <= y2
    if zoom:
        assert x2 - x1 >= min(width, prompting.SMALLEST_WINDOW, 48)
        longest = max(box[2] - box[0], box[3] - box[1])
        assert max(x2 - x1, y2 - y1) <= max(zoom * (longest + 2) + 1, 48)


@pytest.mark.parametrize(
    ("window", "size"), [((0, 0, 130, 100), (197, 256)), ((20, 30, 40, 90), (256, 85))]
)
def test_to_input_frame_maps_corners_to_corners(window: Window, size: tuple[int, int]) -> None:
    corners = np.array(window, float).reshape(2, 2)
    moved = prompting.to_input_frame(corners, window, size)
    np.testing.assert_allclose(moved, [[0, 0], [size[1], size[0]]], atol=1e-9)
    centre = prompting.to_input_frame(corners.mean(axis=0), window, size)
    np.testing.assert_allclose(centre, [size[1] / 2, size[0] / 2], atol=1e-9)


def test_encoder_input_is_the_window_resized_normalised_and_padded(lite: Sam) -> None:
    image, window = picture(), (30, 10, 110, 60)  # 80 x 50 pixels
    tensor, size = prompting.encoder_input(lite, image, window)
    rgb = Image.fromarray(np.ascontiguousarray(image[10:60, 30:110, ::-1]))
    resized = np.asarray(rgb.resize((320, 200), Image.Resampling.BILINEAR), np.float32)
    expected = np.zeros((320, 320, 3), np.float32)
    expected[:200] = (resized - 127) / 128  # the preprocessing of EfficientNet-Lite
    assert size == (200, 320)
    np.testing.assert_allclose(tensor.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def fill_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the decoder segment exactly what lies in each box."""

    def encode_prompts(sam: Sam, boxes: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
        return boxes, boxes

    def decode(sam: Sam, embeddings: torch.Tensor, boxes: torch.Tensor, _: Any) -> Any:
        cells = (torch.arange(640) + 0.5) / 2
        x1, y1, x2, y2 = boxes.T[..., None]
        across = (cells >= x1) & (cells < x2)
        down = (cells >= y1) & (cells < y2)
        inside = down[:, :, None] & across[:, None, :]
        return inside[:, None].float() - 0.5, torch.full((len(boxes), 1), 1.5)

    monkeypatch.setattr(prompting, "encode_prompts", encode_prompts)
    monkeypatch.setattr(prompting, "decode", decode)


@pytest.mark.parametrize("zoom", [0, 1, 1.5, 4])
@pytest.mark.parametrize(("height", "width"), [(150, 240), (240, 150), (40, 300)])
def test_masks_are_put_back_where_the_box_is(
    lite: Sam, monkeypatch: pytest.MonkeyPatch, zoom: float, height: int, width: int
) -> None:
    fill_boxes(monkeypatch)
    monkeypatch.setattr(lite, "mask_threshold", 0.0)
    boxes = [
        (0, 0, 60, 30),
        (width - 50, height - 40, width, height),
        (width // 2, height // 2 - 15, width // 2 + 33, height // 2 + 15),
    ]
    loaded = LoadedSam(lite, "sam-lite", zoom)
    found = Segmenter(loaded, None, CPU).segment(
        np.zeros((height, width, 3), np.uint8), detections(np.array(boxes))
    )
    assert found.mask is not None
    assert found.mask.shape == (3, height, width) and found.mask.dtype == bool
    for mask, box in zip(np.asarray(found.mask), boxes, strict=True):
        assert iou(mask, filled(box, height, width)) > 0.9  # a cell's width along the edges
    # An IoU is at most 1; a quality has four decimals.
    np.testing.assert_allclose(found.data["quality"], [1, 1, 1], atol=1.1e-4)


@pytest.mark.parametrize(
    ("box", "visible"),
    [
        pytest.param((-30, -10, 40, 50), (0, 0, 40, 50), id="partly outside"),
        pytest.param((60, 40, 60, 40), (60, 40, 60, 40), id="empty"),
        pytest.param((500, 500, 560, 560), (0, 0, 0, 0), id="outside"),
        pytest.param((70.2, 20.4, 109.7, 60.3), (70, 20, 110, 60), id="fractions"),
    ],
)
def test_awkward_boxes(
    lite: Sam,
    monkeypatch: pytest.MonkeyPatch,
    box: tuple[float, ...],
    visible: tuple[int, int, int, int],
) -> None:
    segmenter = Segmenter(LoadedSam(lite, "sam-lite", 1.5), None, CPU)
    image, boxes = picture(120, 160), detections(np.array([box]))
    assert np.isfinite(segmenter.segment(image, boxes).data["quality"]).all()
    fill_boxes(monkeypatch)
    monkeypatch.setattr(lite, "mask_threshold", 0.0)
    found = segmenter.segment(image, boxes)
    truth = filled(visible, 120, 160)
    assert found.mask is not None
    if truth.any():
        assert iou(np.asarray(found.mask[0]), truth) > 0.9
    else:
        assert not np.asarray(found.mask).any()


# ---- Encoding once ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "zoom", "calls"),
    [
        pytest.param(BOXES, 0, 1, id="whole image"),
        pytest.param(np.empty((0, 4)), 0, 0, id="no boxes, whole image"),
        pytest.param(np.empty((0, 4)), 1.5, 0, id="no boxes, windows"),
        pytest.param(BOXES[:2], 1.5, 2, id="a window each"),
        pytest.param(np.array([[50, 50, 52, 54], [49, 50, 53, 54]]), 1.5, 1, id="shared window"),
    ],
)
def test_each_window_is_encoded_once(
    lite: Sam, encoded: list[torch.Tensor], boxes: np.ndarray, zoom: float, calls: int
) -> None:
    found = Segmenter(LoadedSam(lite, "sam-lite", 4), zoom, CPU).segment(
        picture(), detections(boxes)
    )
    assert len(encoded) == calls
    assert len(found) == len(found.data["quality"]) == len(boxes)
    assert (found.mask is None) == (len(boxes) == 0)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("zoom", [0, 1.5])
def test_detections_stay_in_order_with_all_that_they_carry(
    lite: Sam, prompt: str, zoom: float
) -> None:
    """More boxes than are decoded at once, in few windows: as if each had come alone."""
    boxes = np.tile(BOXES, (5, 1))[: 2 * DECODED_AT_ONCE + 1]
    given_ = detections(boxes)
    points = [POINTS[3], np.empty((0, 3)), POINTS[2], POINTS[0]]  # in no order of their number
    given_.mask = np.tile(MASKS, (5, 1, 1))[: len(boxes)]
    given_.data["points"] = (points * 5)[: len(boxes)]
    given_.data["name"] = np.array([f"box {i}" for i in range(len(boxes))])
    segmenter = Segmenter(LoadedSam(lite, "sam-lite", zoom), None, CPU)
    found = segmenter.segment(picture(), given_, prompt)
    assert found.mask is not None
    np.testing.assert_array_equal(found.xyxy, given_.xyxy)
    np.testing.assert_array_equal(found.class_id, given_.class_id)
    np.testing.assert_array_equal(found.confidence, given_.confidence)
    np.testing.assert_array_equal(found.data["name"], given_.data["name"])
    for i in range(len(BOXES)):
        alone = segmenter.segment(picture(), given_[i : i + 1], prompt)
        assert alone.mask is not None
        assert iou(np.asarray(found.mask[i]), np.asarray(alone.mask[0])) > 0.999
        assert found.data["quality"][i] == pytest.approx(alone.data["quality"][0], abs=1e-5)
