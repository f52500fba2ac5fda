"""The SAMs: parity with segment-anything's own predictor, windows, checkpoints."""

from __future__ import annotations

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
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import Sam
from torch import nn

from pipeline.data.masks import iou
from pipeline.errors import UserError
from pipeline.models import imagenet, prompting, sam_lite, weights
from pipeline.models import sam as sams
from pipeline.models.prompting import Window, window_around
from pipeline.models.sam import LoadedSam, load_sam, save_sam
from pipeline.models.segmenter import DECODED_AT_ONCE, Segmenter

CPU = torch.device("cpu")
BOXES = np.array([[10, 20, 50, 40], [60, 5, 118, 90], [0, 0, 130, 100], [33.5, 60, 40, 71]], float)
PUBLISHED_BYTES = {
    "sam-vit-b": 375_042_383,
    "sam-vit-l": 1_249_524_607,
    "sam-vit-h": 2_564_550_879,
    "mobile-sam": 40_728_226,
}


@pytest.fixture(scope="module")
def lite() -> Sam:
    """sam-lite with random weights, whose masks are neither empty nor full."""
    torch.manual_seed(0)
    sam = sam_lite.build_sam_lite().eval()
    with torch.inference_mode():
        tensor, size = prompting.encoder_input(sam, picture(), (0, 0, 130, 100))
        boxes = torch.from_numpy(BOXES * size[1] / 130).float()
        embeddings = sam.image_encoder(tensor[None]).expand(len(BOXES), -1, -1, -1)
        logits, _ = prompting.decode(
            sam, embeddings, *prompting.encode_prompts(sam, boxes, "boxes")
        )
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


# ---- Parity with segment-anything ------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["boxes", "points", "boxes+points"])
def test_parity_with_the_official_predictor(lite: Sam, prompt: str) -> None:
    """All boxes at once on the whole image equal SamPredictor, which takes one box at a time."""
    predictor = SamPredictor(lite)
    predictor.set_image(picture()[..., ::-1])
    found = Segmenter(LoadedSam(lite, "sam-lite", 0), None, CPU).segment(
        picture(), detections(BOXES), prompt
    )
    tensor, size = prompting.encoder_input(lite, picture(), (0, 0, 130, 100))
    corners = prompting.to_input_frame(BOXES.reshape(-1, 2, 2), (0, 0, 130, 100), size)
    with torch.inference_mode():
        boxes = torch.from_numpy(corners.reshape(-1, 4)).float()
        prompts = prompting.encode_prompts(lite, boxes, prompt)
        embeddings = lite.image_encoder(tensor[None]).expand(len(BOXES), -1, -1, -1)
        logits, _ = prompting.decode(lite, embeddings, *prompts)
    found_masks = np.asarray(found.mask)
    assert found_masks.any() and not found_masks.all()
    for i, box in enumerate(BOXES):
        masks, quality, low_resolution = predictor.predict(
            point_coords=(box[:2] + box[2:])[None] / 2 if "points" in prompt else None,
            point_labels=np.ones(1) if "points" in prompt else None,
            box=box if "boxes" in prompt else None,
            multimask_output=False,
            return_logits=True,
        )
        np.testing.assert_allclose(logits[i].numpy(), low_resolution, atol=1e-4)
        sure = np.abs(masks[0] - lite.mask_threshold) > 1e-4
        np.testing.assert_array_equal(found_masks[i][sure], (masks[0] > lite.mask_threshold)[sure])
        assert sure.mean() > 0.99
        assert found.data["quality"][i] == pytest.approx(np.clip(quality[0], 0, 1), abs=1e-4)


def test_decoding_many_images_equals_the_decoder_called_for_each(lite: Sam) -> None:
    torch.manual_seed(1)
    embeddings = torch.randn(3, 128, 32, 32)
    boxes = torch.tensor([[10.0, 20, 60, 90], [0, 0, 255, 255], [200, 5, 210, 30]])
    with torch.inference_mode():
        sparse, dense = prompting.encode_prompts(lite, boxes, "boxes")
        logits, quality = prompting.decode(lite, embeddings, sparse, dense)
        for i in range(3):
            expected_logits, expected_quality = lite.mask_decoder(
                image_embeddings=embeddings[i : i + 1],
                image_pe=lite.prompt_encoder.get_dense_pe(),
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
        embeddings = lite.image_encoder(torch.zeros(2, 3, 256, 256))
        sparse, dense = prompting.encode_prompts(lite, torch.zeros(2, 4), "boxes")
        logits, quality = prompting.decode(lite, embeddings, sparse, dense)
    assert embeddings.shape == (2, 128, 32, 32)
    assert logits.shape == (2, 1, 128, 128)
    assert quality.shape == (2, 1)


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
    resized = np.asarray(rgb.resize((256, 160), Image.Resampling.BILINEAR), np.float32)
    expected = np.zeros((256, 256, 3), np.float32)
    expected[:160] = (resized - 127) / 128  # the preprocessing of EfficientNet-Lite
    assert size == (160, 256)
    np.testing.assert_allclose(tensor.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def fill_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the decoder segment exactly what lies in each box."""

    def encode_prompts(sam: Sam, boxes: torch.Tensor, prompt: str) -> tuple[torch.Tensor, ...]:
        return boxes, boxes

    def decode(sam: Sam, embeddings: torch.Tensor, boxes: torch.Tensor, _: Any) -> Any:
        cells = (torch.arange(512) + 0.5) / 2
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
    np.testing.assert_array_equal(found.data["quality"], [1, 1, 1])  # an IoU is at most 1


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


def test_detections_stay_in_order_with_all_that_they_carry(lite: Sam) -> None:
    """More boxes than are decoded at once, in few windows: as if each had come alone."""
    boxes = np.tile(BOXES, (5, 1))[: 2 * DECODED_AT_ONCE + 1]
    given_ = detections(boxes)
    given_.data["name"] = np.array([f"box {i}" for i in range(len(boxes))])
    segmenter = Segmenter(LoadedSam(lite, "sam-lite", 1.5), None, CPU)
    found = segmenter.segment(picture(), given_)
    assert found.mask is not None
    np.testing.assert_array_equal(found.xyxy, given_.xyxy)
    np.testing.assert_array_equal(found.class_id, given_.class_id)
    np.testing.assert_array_equal(found.confidence, given_.confidence)
    np.testing.assert_array_equal(found.data["name"], given_.data["name"])
    for i in range(len(BOXES)):
        alone = segmenter.segment(picture(), detections(boxes[i : i + 1]))
        assert alone.mask is not None
        assert iou(np.asarray(found.mask[i]), np.asarray(alone.mask[0])) > 0.999
        assert found.data["quality"][i] == pytest.approx(alone.data["quality"][0], abs=1e-5)


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
    found = loaded.model.state_dict()
    assert found.keys() == state.keys()
    for i, tensor in enumerate(found[key] for key in state):
        assert (tensor == i).all()
    assert loaded.model.image_encoder.img_size == 1024


def test_sam_lite_starts_from_imagenet() -> None:
    loaded = load_sam(sams.IMAGENET_START)
    assert (loaded.architecture, loaded.zoom) == ("sam-lite", 1.5)
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
    save_sam(path, lite, "sam-lite", 1.75)
    loaded = load_sam(str(path))
    assert (loaded.architecture, loaded.zoom) == ("sam-lite", 1.75)
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
    save_sam(tmp_path / "a.safetensors", lite, "sam-lite", 2)
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
