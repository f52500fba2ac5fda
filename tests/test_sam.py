"""The SAMs: parity with segment-anything's own predictor and decoder, and the quality of masks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from rectangles import filled
from sam_cases import BOXES, CPU, MASKS, POINTS, PROMPTS, detections, picture, random_lite
from scipy.special import expit, logit
from segment_anything import SamPredictor
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from pipeline.data.masks import iou
from pipeline.data.quality import Calibration
from pipeline.models import prompting
from pipeline.models.prompting import Window
from pipeline.models.sam import LoadedSam
from pipeline.models.segmenter import Segmenter


@pytest.fixture(scope="module")
def lite() -> Sam:
    return random_lite()


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
