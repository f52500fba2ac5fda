"""What is sam-lite's own: its parts and proportions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sam_cases import random_lite
from segment_anything.modeling import Sam

from pipeline.models import prompting, sam_lite


@pytest.fixture(scope="module")
def lite() -> Sam:
    return random_lite()


def test_sam_lite_keeps_segment_anythings_proportions(lite: Sam) -> None:
    """Its decoder's masks have a quarter of the embedding's stride, as in the official models."""
    with torch.inference_mode():
        embeddings = lite.image_encoder(torch.zeros(2, 3, 320, 320))
        sparse, dense = prompting.encode_prompts(lite, torch.zeros(2, 4), "boxes")
        logits, quality = prompting.decode(lite, embeddings, sparse, dense)
    assert embeddings.shape == (2, 128 + 16 * 4 * 4, 40, 40)
    assert logits.shape == (2, 1, 160, 160)
    assert quality.shape == (2, 1)


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
