"""The official SAMs at their true size, on checkpoints with random weights written here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import supervision as sv
import torch
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import nn

from pipeline.models import prompting
from pipeline.models.sam import ARCHITECTURES, LoadedSam, load_sam
from pipeline.models.segmenter import Segmenter

HEIGHT, WIDTH = 300, 420  # not square: the encoder's input is padded at the bottom
BOXES = np.array(
    [[10, 20, 150, 140], [160, 5, 418, 290], [0, 0, 420, 300], [33.5, 160, 40, 171]], np.float32
)


def randomise(sam: Sam) -> None:
    """As if trained: no parameter is left at the zeros that many start from."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sam.parameters():
            noise = torch.randn(parameter.shape[-1:], generator=generator)
            parameter.add_(0.02 * noise)


def picture() -> np.ndarray:
    """Smooth random colours, BGR."""
    noise = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


class EncodesOnce(nn.Module):
    """An encoder that computes the first time and later expects the same input again."""

    img_size = 1024

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.seen is None:
            self.seen = images, self.encoder(images)
        torch.testing.assert_close(images, self.seen[0], rtol=0, atol=1e-5)
        return self.seen[1]


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        pytest.param("sam-vit-b", "sam_vit_b_01ec64.pth", marks=pytest.mark.slow),
        ("mobile-sam", "mobile_sam.pt"),
    ],
)
def test_boxes_decoded_together_equal_the_official_predictor(
    tmp_path: Path, architecture: str, name: str
) -> None:
    torch.manual_seed(0)
    written = ARCHITECTURES[architecture]()
    randomise(written)
    torch.save(written.state_dict(), tmp_path / name)
    loaded = load_sam(str(tmp_path / name))
    assert (loaded.architecture, loaded.zoom) == (architecture, 0)
    sam = loaded.model.eval()
    sam.image_encoder = EncodesOnce(sam.image_encoder)

    predictor = SamPredictor(sam)
    predictor.set_image(picture()[..., ::-1])
    assert predictor.get_image_embedding().shape == (1, 256, 64, 64)
    expected = [
        predictor.predict(box=box, multimask_output=False, return_logits=True) for box in BOXES
    ]
    sam.mask_threshold = float(np.median([logits for logits, _, _ in expected]))

    whole = (0, 0, WIDTH, HEIGHT)
    tensor, size = prompting.encoder_input(sam, picture(), whole)
    assert tensor.shape == (3, 1024, 1024) and size == (731, 1024)
    corners = prompting.to_input_frame(BOXES.reshape(-1, 2, 2), whole, size).reshape(-1, 4)
    with torch.inference_mode():
        embeddings = sam.image_encoder(tensor[None]).expand(len(BOXES), -1, -1, -1)
        prompts = prompting.encode_prompts(sam, torch.from_numpy(corners).float(), "boxes")
        logits, _ = prompting.decode(sam, embeddings, *prompts)
    assert logits.shape == (len(BOXES), 1, 256, 256)
    found = Segmenter(LoadedSam(sam, architecture, 0), None, torch.device("cpu")).segment(
        picture(), sv.Detections(BOXES, class_id=np.zeros(len(BOXES), int))
    )
    assert found.mask is not None
    for i, (full, quality, low_resolution) in enumerate(expected):
        np.testing.assert_allclose(logits[i].numpy(), low_resolution, rtol=0, atol=1e-4)
        assert low_resolution.std() > 1e-2  # the box and the image make a difference
        sure = np.abs(full[0] - sam.mask_threshold) > 1e-4
        assert sure.mean() > 0.98
        np.testing.assert_array_equal(found.mask[i][sure], (full[0] > sam.mask_threshold)[sure])
        assert found.data["quality"][i] == pytest.approx(np.clip(quality[0], 0, 1), abs=1e-4)
