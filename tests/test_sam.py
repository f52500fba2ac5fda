"""The SAMs: parity with segment-anything's own predictor, windows, checkpoints."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rectangles import filled
from safetensors.torch import save_file
from scipy.special import expit, logit
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from pipeline.data.masks import iou
from pipeline.data.quality import Calibration
from pipeline.errors import UserError
from pipeline.models import imagenet, prompting, sam_lite, weights
from pipeline.models import sam as sams
from pipeline.models.prompting import Window, window_around
from pipeline.models.sam import LoadedSam, load_sam, save_sam
from pipeline.models.segmenter import DECODED_AT_ONCE, Segmenter

CPU = torch.device("cpu")
BOXES = np.array([[10, 20, 50, 40], [60, 5, 118, 90], [0, 0, 130, 100], [33.5, 60, 40, 71]], float)
PROMPTS = ["boxes", "points", "boxes+points", "masks", "boxes+masks"]
# Of each box: a mask somewhat smaller than it, and as many points as make batches of 2, 1 and 1.
MASKS = np.stack(
    [filled((x1 + 3, y1, x2 - 2, y2 - 5), 100, 130) for x1, y1, x2, y2 in BOXES.astype(int)]
)
POINTS = [
    np.array([[30.0, 30, 1]]),
    np.array([[80.5, 50, 1]]),
    np.array([[20.0, 20, 1], [100, 80, 0]]),
    np.array([[36.0, 65, 1], [39, 62, 0], [2, 3, 1]]),  # the last one lies far outside the box
]
PUBLISHED_BYTES = {
    "sam-vit-b": 375_042_383,
    "sam-vit-l": 1_249_524_607,
    "sam-vit-h": 2_564_550_879,
    "mobile-sam": 40_728_226,
}


@pytest.fixture(scope="module")
def lite() -> Sam:
    """sam-lite with random weights, whose masks are neither empty nor full, nor their IoUs."""
    torch.manual_seed(0)
    sam = sam_lite.build_sam_lite().eval()
    with torch.inference_mode():
        tensor, size = prompting.encoder_input(sam, picture(), (0, 0, 130, 100))
        boxes = torch.from_numpy(BOXES * size[1] / 130).float()
        embeddings = sam.image_encoder(tensor[None]).expand(len(BOXES), -1, -1, -1)
        logits, iou = prompting.decode(
            sam, embeddings, *prompting.encode_prompts(sam, boxes, "boxes")
        )
        sam.mask_decoder.iou_prediction_head.layers[-1].bias += 0.5 - iou.mean()
    sam.mask_threshold = float(logits.median())
    return sam


def picture(height: int = 100, width: int = 130) -> np.ndarray:
    """Smooth random colours, BGR."""
    noise = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def detections(boxes: np.ndarray) -> sv.Detections:
    return sv.Detections(
        xyxy=boxes.astype(np.float32).reshape(-1, 4),
        class_id=np.arange(len(boxes)),
        confidence=np.linspace(1, 0.5, len(boxes), dtype=np.float32),
    )


@pytest.fixture
def encoded(lite: Sam) -> Iterator[list[torch.Tensor]]:
    """The encoder's inputs, one for each call."""
    calls: list[torch.Tensor] = []
    hook = lite.image_encoder.register_forward_hook(lambda _, args, __: calls.append(args[0]))
    yield calls
    hook.remove()


@pytest.fixture
def decoded(lite: Sam) -> Iterator[list[torch.Tensor]]:
    """The decoder's logits, one tensor for each call."""
    calls: list[torch.Tensor] = []
    hook = lite.mask_decoder.register_forward_hook(lambda _, __, out: calls.append(out[0]))
    yield calls
    hook.remove()


# ---- Parity with segment-anything ------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("view", ["wide", "tall", "windows"])
def test_parity_with_the_official_predictor(
    lite: Sam, decoded: list[torch.Tensor], view: str, prompt: str
) -> None:
    """All boxes together equal SamPredictor, which takes one box at a time, to 1e-4 in logits."""
    image, shown = picture(), detections(BOXES)
    shown.mask, shown.data["points"] = MASKS, POINTS
    if view == "tall":
        image = np.ascontiguousarray(image.swapaxes(0, 1))
        shown.xyxy, shown.mask = shown.xyxy[:, [1, 0, 3, 2]], MASKS.swapaxes(1, 2)
        shown.data["points"] = [points[:, [1, 0, 2]] for points in POINTS]
    height, width = image.shape[:2]
    windows = [(0, 0, width, height)] * len(BOXES)
    if view == "windows":
        last = (0, 0, 102, 100) if "points" in prompt else (12, 41, 60, 89)
        windows = [(0, 0, 60, 60), (2, 0, 130, 100), (0, 0, 130, 100), last]
    loaded = LoadedSam(lite, "sam-lite", 1.5 if view == "windows" else 0)
    found = Segmenter(loaded, None, CPU).segment(image, shown, prompt)
    logits = torch.cat(decoded)
    found_masks = np.asarray(found.mask)
    assert found_masks.any() and not found_masks.all()
    assert len(logits) == len(BOXES)
    predictor = SamPredictor(lite)
    for i, window in enumerate(windows):
        x1, y1, x2, y2 = window
        predictor.set_image(image[y1:y2, x1:x2, ::-1])
        points, mask = shown.data["points"][i], shown.mask[i : i + 1]
        masks, quality, low_resolution = predictor.predict(
            point_coords=points[:, :2] - [x1, y1] if "points" in prompt else None,
            point_labels=points[:, 2] if "points" in prompt else None,
            box=shown.xyxy[i] - [x1, y1, x1, y1] if "boxes" in prompt else None,
            mask_input=prompting.mask_logits(lite, mask, window, predictor.input_size)[0].numpy()
            if "masks" in prompt
            else None,
            multimask_output=False,
            return_logits=True,
        )
        np.testing.assert_allclose(logits[i].numpy(), low_resolution, atol=1e-4)
        sure = np.abs(masks[0] - lite.mask_threshold) > 1e-4
        inside = found_masks[i, y1:y2, x1:x2]
        np.testing.assert_array_equal(inside[sure], (masks[0] > lite.mask_threshold)[sure])
        assert sure.mean() > 0.99
        assert found_masks[i].sum() == inside.sum()
        assert found.data["quality"][i] == pytest.approx(np.clip(quality[0], 0, 1), abs=1e-4)


@pytest.mark.parametrize("prompt", ["points", "boxes+points"])
def test_without_points_the_centre_is_shown(lite: Sam, prompt: str) -> None:
    """Also of those boxes that have none among others that do."""
    bare, mixed, full = detections(BOXES), detections(BOXES), detections(BOXES)
    centres = [np.array([[*(box[:2] + box[2:]) / 2, 1]]) for box in BOXES]
    full.data["points"] = centres
    mixed.data["points"] = [centres[0], np.empty((0, 3)), *centres[2:]]
    segmenter = Segmenter(LoadedSam(lite, "sam-lite", 1.5), None, CPU)
    expected = segmenter.segment(picture(), full, prompt).data["quality"]
    for given_ in (bare, mixed):
        quality = segmenter.segment(picture(), given_, prompt).data["quality"]
        np.testing.assert_allclose(quality, expected, atol=1e-5)


def test_a_prompt_of_boxes_shows_neither_points_nor_masks(lite: Sam) -> None:
    plain, more = detections(BOXES), detections(BOXES)
    more.mask, more.data["points"] = MASKS, POINTS
    segmenter = Segmenter(LoadedSam(lite, "sam-lite", 1.5), None, CPU)
    expected, found = (segmenter.segment(picture(), given_) for given_ in (plain, more))
    np.testing.assert_array_equal(np.asarray(found.mask), np.asarray(expected.mask))


def test_logits_of_a_first_decode_are_the_next_ones_prompt(lite: Sam) -> None:
    """As the official predictor does it; and gradients reach all that took part."""
    whole = (0, 0, 130, 100)
    tensor, size = prompting.encoder_input(lite, picture(), whole)
    corners = prompting.to_input_frame(BOXES.reshape(-1, 2, 2), whole, size)
    boxes = torch.from_numpy(corners.reshape(-1, 4)).float()
    with torch.no_grad():
        embeddings = lite.image_encoder(tensor[None]).expand(len(BOXES), -1, -1, -1)
    first, _ = prompting.decode(lite, embeddings, *prompting.encode_prompts(lite, boxes, "boxes"))
    prompts = prompting.encode_prompts(lite, boxes, "boxes+masks", masks=first)
    second, _ = prompting.decode(lite, embeddings, *prompts)
    predictor = SamPredictor(lite)
    predictor.set_image(picture()[..., ::-1])
    for i, box in enumerate(BOXES):
        _, _, logits = predictor.predict(box=box, multimask_output=False)
        _, _, logits = predictor.predict(box=box, mask_input=logits, multimask_output=False)
        np.testing.assert_allclose(second[i].detach().numpy(), logits, atol=1e-4)
    assert not torch.allclose(first, second, atol=1e-2)
    took_part = [
        first,
        lite.prompt_encoder.mask_downscaling[0].weight,
        lite.mask_decoder.mask_tokens.weight,
    ]
    for gradient in torch.autograd.grad(second.square().mean(), took_part):
        assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_mask_logits_by_hand(lite: Sam) -> None:
    """A window as large as the input, whose cells are two by two pixels; below it is padding."""
    mask = np.random.default_rng(0).random((1, 150, 350)) < 0.5
    logits = prompting.mask_logits(lite, mask, (20, 10, 340, 138), (128, 320))
    covered = mask[0, 10:138, 20:340].reshape(64, 2, 160, 2).mean(axis=(1, 3))
    expected = np.full((160, 160), -10.0)
    expected[:64] = 20 * covered - 10
    np.testing.assert_allclose(logits[0, 0].numpy(), expected, atol=1e-5)
    assert logits.shape == (1, 1, 160, 160)


@pytest.mark.parametrize("window", [(0, 0, 130, 100), (12, 41, 60, 89), (90, 0, 130, 100)])
def test_mask_logits_are_what_the_decoder_would_have_given(lite: Sam, window: Window) -> None:
    """Brought back to the window as the decoder's logits are, they are the mask."""
    x1, y1, x2, y2 = window
    _, size = prompting.encoder_input(lite, picture(), window)
    box = (x1 + 5, y1 + 8, x2 - 12, y2 - 20)
    masks = np.stack([filled(box, 100, 130), np.zeros((100, 130), bool)])
    logits = prompting.mask_logits(lite, masks, window, size)
    back = lite.postprocess_masks(logits, size, (y2 - y1, x2 - x1))[:, 0].numpy() > 0
    assert iou(back[0], masks[0, y1:y2, x1:x2]) > 0.97
    assert (logits[1] == -prompting.MASK_LOGIT).all()


def segment_anythings_own() -> Sam:
    """A small SAM of its prompt encoder and mask decoder; there is nothing to encode."""
    prompts = PromptEncoder(32, (40, 40), (320, 320), 16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=32, num_heads=4, mlp_dim=64)
    decoder = MaskDecoder(transformer_dim=32, transformer=transformer, iou_head_hidden_dim=32)
    return Sam(nn.Identity(), prompts, decoder).eval()


@pytest.mark.parametrize("own", [False, True], ids=["sam-lite", "segment-anything"])
def test_decoding_many_images_equals_the_decoder_called_for_each(lite: Sam, own: bool) -> None:
    torch.manual_seed(1)
    sam, channels = (segment_anythings_own(), 32) if own else (lite, 384)
    embeddings = torch.randn(3, channels, 40, 40)
    boxes = torch.tensor([[10.0, 20, 60, 90], [0, 0, 255, 255], [200, 5, 210, 30]])
    with torch.inference_mode():
        sparse, dense = prompting.encode_prompts(sam, boxes, "boxes")
        logits, quality = prompting.decode(sam, embeddings, sparse, dense)
        for i in range(3):
            expected_logits, expected_quality = sam.mask_decoder(
                image_embeddings=embeddings[i : i + 1],
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse[i : i + 1],
                dense_prompt_embeddings=dense[i : i + 1],
                multimask_output=False,
            )
            torch.testing.assert_close(logits[i], expected_logits[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(quality[i], expected_quality[0], atol=1e-4, rtol=0)
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)


def test_sam_lite_keeps_segment_anythings_proportions(lite: Sam) -> None:
    """Its decoder's masks have a quarter of the embedding's stride, as in the official models."""
    with torch.inference_mode():
        embeddings = lite.image_encoder(torch.zeros(2, 3, 320, 320))
        sparse, dense = prompting.encode_prompts(lite, torch.zeros(2, 4), "boxes")
        logits, quality = prompting.decode(lite, embeddings, sparse, dense)
    assert embeddings.shape == (2, 128 + 16 * 4 * 4, 40, 40)
    assert logits.shape == (2, 1, 160, 160)
    assert quality.shape == (2, 1)


# ---- sam-lite's own parts --------------------------------------------------------------------


@pytest.mark.parametrize("points", [False, True])
def test_sam_lite_sees_a_box_as_a_filled_mask_too(lite: Sam, points: bool) -> None:
    """Filled by hand, at half the input's resolution; a mask that is given comes first."""
    boxes = torch.tensor([[20.0, 40, 100, 60], [0, 0, 320, 320], [302, 4, 304, 8]])
    filled_by_hand = torch.full((3, 1, 160, 160), -sam_lite.BOX_LOGIT)
    filled_by_hand[0, :, 20:30, 10:50] = sam_lite.BOX_LOGIT
    filled_by_hand[1] = sam_lite.BOX_LOGIT
    filled_by_hand[2, :, 2:4, 151] = sam_lite.BOX_LOGIT
    shown = (torch.full((3, 1, 2), 50.0), torch.ones(3, 1)) if points else None
    with torch.inference_mode():
        found = lite.prompt_encoder(points=shown, boxes=boxes, masks=None)
        expected = lite.prompt_encoder(points=shown, boxes=boxes, masks=filled_by_hand)
        other = lite.prompt_encoder(points=shown, boxes=boxes, masks=-filled_by_hand)
        without_box = lite.prompt_encoder(points=shown, boxes=None, masks=None)[1]
    for part, same in zip(found, expected, strict=True):
        torch.testing.assert_close(part, same, rtol=0, atol=1e-6)
    assert not torch.allclose(found[1], other[1], atol=1e-2)
    no_mask = lite.prompt_encoder.no_mask_embed.weight[0]
    assert (without_box == no_mask[:, None, None]).all()


@given(
    st.lists(
        st.tuples(*[st.floats(-40, 360, width=32, allow_subnormal=False)] * 4),
        min_size=1,
        max_size=4,
    )
)
def test_a_filled_box_has_the_boxs_area(corners: list[tuple[float, ...]]) -> None:
    """Of what lies in the picture, to a part of a pixel: its cells are two by two pixels."""
    x, y = np.sort(np.array(corners)[:, ::2]), np.sort(np.array(corners)[:, 1::2])
    boxes = torch.from_numpy(np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)).float()
    encoder = sam_lite.LitePromptEncoder(8, (40, 40), (320, 320), 16)
    logits = encoder._filled(boxes)
    assert logits.shape == (len(corners), 1, 160, 160)
    assert logits.abs().max() <= sam_lite.BOX_LOGIT
    covered = (logits / sam_lite.BOX_LOGIT + 1) / 2
    inside = np.clip(x, 0, 320), np.clip(y, 0, 320)
    areas = np.diff(inside[0])[:, 0] * np.diff(inside[1])[:, 0]
    np.testing.assert_allclose(4 * covered.sum((1, 2, 3)), areas, rtol=1e-4, atol=0.5)


def test_an_embedding_for_all_prompts_equals_one_for_each(lite: Sam) -> None:
    torch.manual_seed(1)
    embedding = torch.randn(1, 384, 40, 40)
    boxes = torch.tensor([[10.0, 20, 60, 90], [0, 0, 255, 255], [200, 5, 210, 30]])
    with torch.inference_mode():
        prompts = prompting.encode_prompts(lite, boxes, "boxes")
        shared = prompting.decode(lite, embedding, *prompts)
        repeated = prompting.decode(lite, embedding.repeat(3, 1, 1, 1), *prompts)
    for found, expected in zip(shared, repeated, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_sam_lites_masks_follow_the_fine_features_and_stay_where_they_are(lite: Sam) -> None:
    """A change of the fine features of one embedding vector is seen around its own pixels."""
    torch.manual_seed(1)
    embedding = torch.randn(1, 384, 40, 40)
    changed = embedding.clone()
    changed[:, 128:, 10, 30] += 1
    prompts = prompting.encode_prompts(lite, torch.tensor([[10.0, 20, 60, 90]]), "boxes")
    with torch.inference_mode():
        before, after = (prompting.decode(lite, e, *prompts)[0] for e in (embedding, changed))
    difference = (after - before)[0, 0].abs()
    row, column = divmod(int(difference.argmax()), 160)
    assert difference.max() > 1e-3
    assert 36 <= row < 48 and 116 <= column < 128


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


# ---- Quality ---------------------------------------------------------------------------------


def test_quality_is_the_calibrated_estimate(lite: Sam) -> None:
    """Platt scaling, by hand, of what the decoder predicts."""
    predicted: list[np.ndarray] = []
    hook = lite.mask_decoder.register_forward_hook(
        lambda _, __, out: predicted.append(out[1][:, 0].numpy())
    )
    loaded = LoadedSam(lite, "sam-lite", 1.5, Calibration(0.5, -1.0))
    found = Segmenter(loaded, None, CPU).segment(picture(), detections(BOXES))
    hook.remove()
    estimates = np.clip(np.concatenate(predicted).astype(float), 1e-4, 1 - 1e-4)
    np.testing.assert_allclose(found.data["quality"], expit(logit(estimates) / 2 - 1), atol=1e-5)
    assert np.abs(found.data["quality"] - estimates).max() > 0.1


# ---- Checkpoints -----------------------------------------------------------------------------


def published(architecture: str) -> dict[str, torch.Tensor]:
    """A state dict of the published names and shapes; the i-th tensor is i everywhere.

    The names of MobileSAM are those that Ultralytics reads the published file with.
    """
    if architecture == "mobile-sam":
        from ultralytics.models.sam.build import build_mobile_sam

        model: nn.Module = build_mobile_sam()
    else:
        with torch.device("meta"):
            model = sam_model_registry[architecture.removeprefix("sam-").replace("-", "_")]()
    return {
        key: torch.tensor(i, dtype=tensor.dtype).expand(tensor.shape)  # one number on disk
        for i, (key, tensor) in enumerate(model.state_dict().items())
    }


@pytest.mark.parametrize("architecture", PUBLISHED_BYTES)
def test_published_checkpoints_are_told_apart(architecture: str) -> None:
    state = published(architecture)
    size = 4 * sum(tensor.numel() for tensor in state.values())
    assert 0.99 < size / PUBLISHED_BYTES[architecture] < 1  # the rest is the names
    assert sams._architecture_of(state) == architecture


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("sam-vit-b", "sam_vit_b_01ec64.pth"), ("mobile-sam", "mobile_sam.pt")],
)
def test_loads_a_published_checkpoint(tmp_path: Path, architecture: str, name: str) -> None:
    state = published(architecture)
    torch.save(state, tmp_path / name)
    loaded = load_sam(str(tmp_path / name))
    assert (loaded.architecture, loaded.zoom) == (architecture, sams.WHOLE_IMAGE)
    assert loaded.calibration == Calibration(1, 0)
    found = loaded.model.state_dict()
    assert found.keys() == state.keys()
    for i, tensor in enumerate(found[key] for key in state):
        assert (tensor == i).all()
    assert loaded.model.image_encoder.img_size == 1024


def test_sam_lite_starts_from_imagenet() -> None:
    loaded = load_sam(sams.IMAGENET_START)
    assert (loaded.architecture, loaded.zoom) == ("sam-lite", sams.LITE_ZOOM)
    assert loaded.calibration == Calibration(1, 0)
    whole: Any = imagenet.efficientnet_lite0(pretrained=True).eval()
    encoder = loaded.model.image_encoder.eval()
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        coarsest = encoder.backbone(image)[-1]
        expected = whole.blocks(whole.bn1(whole.conv_stem(image)))  # without the head
    torch.testing.assert_close(coarsest, expected, atol=1e-4, rtol=1e-4)
    assert coarsest.std() > 0.1


def test_save_and_load(lite: Sam, tmp_path: Path) -> None:
    path = tmp_path / "sam.safetensors"
    calibration = Calibration(0.1 + 0.2, -1.0 / 3)
    save_sam(path, LoadedSam(lite, "sam-lite", 1.75, calibration))
    loaded = load_sam(str(path))
    assert (loaded.architecture, loaded.zoom) == ("sam-lite", 1.75)
    assert loaded.calibration == calibration
    expected = lite.state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    for key, tensor in loaded.model.state_dict().items():
        assert tensor.dtype == expected[key].dtype, key
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-6)
    assert path.stat().st_size < 2.1 * sum(p.numel() for p in lite.parameters())  # half precision
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_comes_from_the_registry(
    lite: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_sam(tmp_path / "a.safetensors", LoadedSam(lite, "sam-lite", 2))
    asked = []

    def resolve(name: str, *, offline: bool) -> Path:
        asked.append((name, offline))
        return tmp_path / "a.safetensors"

    monkeypatch.setattr(weights, "resolve", resolve)
    assert load_sam("sam-lite", offline=True).zoom == 2
    assert asked == [("sam-lite", True)]


@pytest.mark.parametrize("architecture", PUBLISHED_BYTES)
def test_a_registry_name_that_cannot_be_had(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=f"^{architecture}: .*not on this machine"):
        load_sam(architecture, offline=True)


def test_an_unknown_name() -> None:
    with pytest.raises(UserError, match="did you mean sam-vit-b"):
        load_sam("sam-vit-bb", offline=True)


class Malicious:
    """A pickle that creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}, path)
    path.write_bytes(path.read_bytes()[:-5000])


def _other_network(path: Path) -> None:
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({"fc.weight": torch.zeros(3, 3)}, path)


def _missing_tensors(path: Path) -> None:
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(3, 3)}, path)


def _nested(path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "signature": "of a training"}, path)


def _a_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


def _whole_module(path: Path) -> None:
    torch.save(nn.Linear(2, 2), path)


def _code(path: Path) -> None:
    torch.save({"image_encoder.pos_embed": Malicious(path.with_name("touched"))}, path)


def _old_pickle_with_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(path.with_name("touched")), protocol=2))


def _half_code_half_weights(path: Path) -> None:
    torch.save({"a": torch.zeros(1), "b": Malicious(path.with_name("touched"))}, path)


@pytest.mark.parametrize("write", [_garbage, _empty, _truncated, _other_network, _missing_tensors])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_other_files_are_named(tmp_path: Path, write: Callable[[Path], None], name: str) -> None:
    _check_refused(tmp_path / name, write)


@pytest.mark.parametrize(
    "write",
    [_nested, _a_tensor, _whole_module, _code, _old_pickle_with_code, _half_code_half_weights],
)
def test_pickles_of_other_things_are_named_and_not_run(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    _check_refused(tmp_path / "x.pt", write)
    assert not (tmp_path / "touched").exists()


def _check_refused(path: Path, write: Callable[[Path], None]) -> None:
    write(path)
    with pytest.raises(UserError) as caught:
        load_sam(str(path))
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: expected")
    assert "\n" not in problem and len(problem) < 600


def test_safetensors_of_another_architecture(tmp_path: Path) -> None:
    """Such as a detector's of ours, whose metadata names its own architecture."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"architecture": "yolov8n-worldv2.yaml"})
    with pytest.raises(UserError, match=r"expected a SAM checkpoint .*found other weights"):
        load_sam(str(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("calibration", "x"),
        ("calibration", ""),
        ("calibration", "1"),
        ("calibration", "1 0 0"),
        ("calibration", "-1 0"),
        ("calibration", "nan 0"),
        ("calibration", "1 inf"),
        ("zoom", "x"),
        ("zoom", "0.5"),
        ("zoom", "-1"),
        ("zoom", "nan"),
        ("zoom", "inf"),
    ],
)
def test_metadata_that_inference_cannot_use(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "x.safetensors"
    metadata = {"architecture": "tiny", "zoom": "1.5", "calibration": "1 0"}
    save_file({"a": torch.zeros(1)}, path, metadata | {key: value})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setitem(sams.ARCHITECTURES, "tiny", lambda: nn.ParameterDict({"a": torch.ones(1)}))
        load_sam(str(path))
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: expected metadata with a zoom")
    assert repr(value) in problem.split("found")[1]


def test_a_checkpoint_from_before_calibration(lite: Sam, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state = {key: tensor.contiguous() for key, tensor in lite.state_dict().items()}
    save_file(state, path, {"architecture": "sam-lite", "zoom": "1.5"})
    assert load_sam(str(path)).calibration == Calibration(1, 0)


def test_depthwise_convolutions_keep_float32_under_mixed_precision() -> None:
    """And a copy, such as the averaged weights of a training, computes with its own weights."""
    torch.manual_seed(0)
    encoder = sam_lite.LiteEncoder()
    copied = copy.deepcopy(encoder)
    name, conv = next(
        (name, module)
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1
    )
    x = torch.randn(1, conv.in_channels, 16, 16).bfloat16()
    expected = torch.nn.functional.conv2d(
        x.float(), conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(conv(x), expected.bfloat16(), rtol=0, atol=0)
        copied.get_submodule(name).weight.zero_()
        assert not copied.get_submodule(name)(x).any()
        assert conv(x).any()
