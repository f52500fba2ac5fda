"""Segment Anything models: the official ones, MobileSAM, and the small `sam-lite`.

All are segment-anything's `Sam` (Kirillov et al., Segment Anything, ICCV 2023, arXiv 2304.02643);
they differ in the image encoder. An image, or a window of it, is resized so that its longest side
is the encoder's input size, normalised, and padded at the bottom and right.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import supervision as sv
import timm
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.utils.transforms import ResizeLongestSide
from torch import nn
from torch.nn import functional as F

from pipeline.data.files import atomic_path
from pipeline.errors import UserError
from pipeline.models import imagenet, weights

IMAGENET_START = "sam-lite-imagenet"  # sam-lite with ImageNet features and an untrained decoder
WHOLE_IMAGE = 0.0
SMALLEST_WINDOW = 48  # pixels: around a tiny box, what the window shows must still make sense
DECODED_AT_ONCE = 8  # boxes: each needs its logits at the window's full resolution in memory

LITE_SIZE = 256  # input side of sam-lite in pixels
LITE_STRIDE = 8  # input pixels per embedding vector
LITE_DIM = 128  # length of an embedding vector


class LiteEncoder(nn.Module):
    """EfficientNet-Lite0 whose features of strides 4 to 32 are summed top-down at stride 8.

    (n, 3, 256, 256) normalised RGB in; (n, 128, 32, 32) out. The sum is that of a feature pyramid
    (Lin et al., CVPR 2017, arXiv 1612.03144), with stride 4 folded in for fine edges.
    """

    img_size = LITE_SIZE

    def __init__(self) -> None:
        super().__init__()
        backbone: Any = timm.create_model("tf_efficientnet_lite0", features_only=True)
        fine, *coarse = backbone.feature_info.channels()[1:]
        self.backbone = backbone.to(memory_format=torch.channels_last)  # a third faster on a CPU
        self.neck = nn.ModuleDict(
            {
                "fine": nn.Conv2d(fine, LITE_DIM, 3, stride=2, padding=1),
                "coarse": nn.ModuleList(nn.Conv2d(c, LITE_DIM, 1) for c in coarse),
                "smooth": nn.Sequential(
                    LayerNorm2d(LITE_DIM),
                    nn.Conv2d(LITE_DIM, LITE_DIM, 3, padding=1),
                    LayerNorm2d(LITE_DIM),
                ),
            }
        )

    def general_parameters(self) -> list[nn.Parameter]:
        """Those of the first layers, up to stride 4: edges and textures that hold for any picture.

        Two fifths of a training step would go there.
        """
        first = [self.backbone.conv_stem, self.backbone.bn1, *self.backbone.blocks[:2]]
        return [parameter for module in first for parameter in module.parameters()]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        _, fine, *coarse = self.backbone(image.contiguous(memory_format=torch.channels_last))
        layers: Any = self.neck["coarse"]
        total = layers[-1](coarse[-1])
        for layer, features in zip(layers[-2::-1], coarse[-2::-1], strict=True):
            total = layer(features) + F.interpolate(total, features.shape[-2:])
        return self.neck["smooth"](total + self.neck["fine"](fine))


def build_sam_lite(pretrained: bool = False) -> Sam:
    """The small SAM; with `pretrained`, its encoder has ImageNet features. Raises `UserError`."""
    encoder = LiteEncoder()
    if pretrained:
        features = imagenet.efficientnet_lite0(pretrained=True).state_dict()
        wanted = encoder.backbone.state_dict().keys()
        encoder.backbone.load_state_dict({key: features[key] for key in wanted})
    grid = LITE_SIZE // LITE_STRIDE
    return Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(LITE_DIM, (grid, grid), (LITE_SIZE, LITE_SIZE), 16),
        mask_decoder=MaskDecoder(
            transformer_dim=LITE_DIM,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=LITE_DIM, num_heads=8, mlp_dim=512
            ),
            iou_head_hidden_dim=LITE_DIM,
        ),
        pixel_mean=[255 * v for v in imagenet.LITE0_MEAN],
        pixel_std=[255 * v for v in imagenet.LITE0_STD],
    )


def build_mobile_sam() -> Sam:
    """MobileSAM (Zhang et al., arXiv 2306.14289): TinyViT in place of the ViT-H encoder."""
    from pipeline.models.ultralytics_settings import isolate

    isolate()
    from ultralytics.models.sam.modules.tiny_encoder import TinyViT

    encoder = TinyViT(
        img_size=1024,
        embed_dims=(64, 128, 160, 320),
        depths=(2, 2, 6, 2),
        num_heads=(2, 4, 5, 10),
        window_sizes=(7, 7, 14, 7),
        drop_path_rate=0.0,
    )
    sam = sam_model_registry["vit_b"]()  # the prompt encoder and decoder are the same in all sizes
    encoder.img_size = sam.image_encoder.img_size
    sam.image_encoder = encoder
    return sam


ARCHITECTURES = {
    "sam-vit-b": sam_model_registry["vit_b"],
    "sam-vit-l": sam_model_registry["vit_l"],
    "sam-vit-h": sam_model_registry["vit_h"],
    "mobile-sam": build_mobile_sam,
    "sam-lite": build_sam_lite,
}


@dataclass(frozen=True)
class LoadedSam:
    """A SAM, the name of its architecture, and the zoom it was trained with (0: whole images)."""

    model: Sam
    architecture: str
    zoom: float


def load_sam(source: str, *, offline: bool = False) -> LoadedSam:
    """A SAM by its name in the weights registry, or from a checkpoint of any of the architectures.

    Checkpoints are segment-anything's `.pth`, MobileSAM's `.pt`, or `.safetensors` of `save_sam`.
    Raises `UserError` when the source is none of these.
    """
    if source == IMAGENET_START:
        return LoadedSam(build_sam_lite(pretrained=True), "sam-lite", 1.5)
    path = weights.resolve(source, offline=offline)
    state, metadata = _read_state(path)
    architecture = metadata.get("architecture") or _architecture_of(state)
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: expected a SAM checkpoint ({', '.join(ARCHITECTURES)}), found other weights"
        )
    sam = ARCHITECTURES[architecture]()
    try:
        sam.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{path}: expected weights of {architecture}, found {_one_line(error)}"
        ) from None
    return LoadedSam(sam, architecture, float(metadata.get("zoom", WHOLE_IMAGE)))


def save_sam(path: Path, sam: Sam, architecture: str, zoom: float) -> None:
    """Write a SAM as safetensors in half precision."""
    from safetensors.torch import save_file

    state = {
        key: value.half().contiguous() if value.is_floating_point() else value
        for key, value in sam.state_dict().items()
    }
    with atomic_path(path) as temporary:
        save_file(state, temporary, {"architecture": architecture, "zoom": str(zoom)})


def _read_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a checkpoint, in float32, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        else:  # weights_only refuses pickles that hold more than data: they could run code
            state, metadata = torch.load(path, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: expected a SAM checkpoint of tensors alone, found other content"
        ) from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{path}: expected a SAM checkpoint, found {_one_line(error)}") from None
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path}: expected a SAM checkpoint of tensors by name, found other data")
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, metadata


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _architecture_of(state: dict[str, torch.Tensor]) -> str:
    """Which architecture a published checkpoint belongs to, by its tensors."""
    if "image_encoder.patch_embed.seq.0.c.weight" in state:
        return "mobile-sam"
    positions = state.get("image_encoder.pos_embed")
    width = 0 if positions is None else positions.shape[-1]
    return {768: "sam-vit-b", 1024: "sam-vit-l", 1280: "sam-vit-h"}.get(width, "unknown")


# ---- Windows ---------------------------------------------------------------------------------

Window = tuple[int, int, int, int]  # half-open pixel box (x1, y1, x2, y2) of an image


def window_around(box: Sequence[float] | np.ndarray, shape: tuple[int, int], zoom: float) -> Window:
    """The part of an image that is shown to SAM for one box.

    A square whose side is `zoom` (at least 1) times the box's longest side, moved inside the image
    and cut where the image is smaller. It holds all of the box that lies in the image. `shape` is
    (height, width); zoom 0 is the whole image.
    """
    height, width = shape
    if zoom == WHOLE_IMAGE:
        return 0, 0, width, height
    x1, y1 = math.floor(box[0]), math.floor(box[1])
    x2, y2 = math.ceil(box[2]), math.ceil(box[3])
    side = max(math.ceil(max(zoom, 1) * max(x2 - x1, y2 - y1)), SMALLEST_WINDOW)
    left, top = (x1 + x2 - side) // 2, (y1 + y2 - side) // 2
    left = min(max(left, 0), max(width - side, 0))
    top = min(max(top, 0), max(height - side, 0))
    return left, top, min(left + side, width), min(top + side, height)


def encoder_input(
    sam: Sam, image: np.ndarray, window: Window
) -> tuple[torch.Tensor, tuple[int, int]]:
    """The encoder's input for a window of a (height, width, 3) uint8 BGR image.

    Returns a (3, size, size) tensor and the (height, width) in it that is image, not padding.
    """
    x1, y1, x2, y2 = window
    rgb = cv2.cvtColor(image[y1:y2, x1:x2], cv2.COLOR_BGR2RGB)
    resized = ResizeLongestSide(sam.image_encoder.img_size).apply_image(rgb)
    tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))).float()
    return sam.preprocess(tensor.to(sam.device)), (resized.shape[0], resized.shape[1])


def to_input_frame(points: np.ndarray, window: Window, input_size: tuple[int, int]) -> np.ndarray:
    """Move (..., 2) x, y points from image pixels to pixels of the encoder's input."""
    x1, y1, x2, y2 = window
    scale = np.array([input_size[1] / (x2 - x1), input_size[0] / (y2 - y1)])
    return (points - np.array([x1, y1])) * scale


# ---- Decoding --------------------------------------------------------------------------------


def encode_prompts(sam: Sam, boxes: torch.Tensor, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse (n, tokens, dim) and dense (n, dim, h, w) prompt embeddings of boxes.

    `boxes` is (n, 4) in the input frame. `prompt` is `boxes`, `points` (their centres, as
    foreground) or `boxes+points`.
    """
    centres = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    labels = torch.ones(len(boxes), 1, dtype=torch.int, device=boxes.device)
    sparse, dense = sam.prompt_encoder(
        points=(centres, labels) if "points" in prompt else None,
        boxes=boxes if "boxes" in prompt else None,
        masks=None,
    )
    return sparse, dense


def decode(
    sam: Sam, embeddings: torch.Tensor, sparse: torch.Tensor, dense: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask logits (n, 1, H, W) at a quarter of the embedding's stride, and predicted IoUs (n, 1).

    `embeddings` is (n, dim, h, w), one for every prompt. The decoder itself repeats one image's
    embedding for all prompts; since it only adds it to the dense prompt, adding it here and giving
    the decoder zeros is the same.
    """
    return sam.mask_decoder(
        image_embeddings=torch.zeros_like(embeddings[:1]),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense + embeddings,
        multimask_output=False,
    )


class Segmenter:
    """Turns boxes of an image into pixel masks."""

    def __init__(self, loaded: LoadedSam, zoom: float | None, device: torch.device) -> None:
        self.zoom = loaded.zoom if zoom is None else zoom
        self._sam = loaded.model.eval().to(device)

    @torch.inference_mode()
    def segment(
        self, image: np.ndarray, detections: sv.Detections, prompt: str = "boxes"
    ) -> sv.Detections:
        """The same detections with masks (n, height, width) and SAM's IoU estimate as `quality`.

        `image` is (height, width, 3) uint8 BGR. Every window is encoded once for all its boxes;
        without boxes nothing is encoded.
        """
        masks = np.zeros((len(detections), *image.shape[:2]), bool)
        quality = np.zeros(len(detections), np.float32)
        windows = [window_around(box, image.shape[:2], self.zoom) for box in detections.xyxy]
        for window in dict.fromkeys(windows):
            rows = [i for i, other in enumerate(windows) if other == window]
            x1, y1, x2, y2 = window
            masks[rows, y1:y2, x1:x2], quality[rows] = self._segment_window(
                image, window, detections.xyxy[rows], prompt
            )
        return sv.Detections(
            xyxy=detections.xyxy,
            class_id=detections.class_id,
            confidence=detections.confidence,
            mask=masks if len(detections) else None,
            data={**detections.data, "quality": quality},
        )

    def _segment_window(
        self, image: np.ndarray, window: Window, boxes: np.ndarray, prompt: str
    ) -> tuple[np.ndarray, np.ndarray]:
        sam = self._sam
        tensor, input_size = encoder_input(sam, image, window)
        embedding = sam.image_encoder(tensor[None])
        corners = to_input_frame(boxes.reshape(-1, 2, 2), window, input_size).reshape(-1, 4)
        prompts = torch.from_numpy(corners).float().to(tensor.device)
        x1, y1, x2, y2 = window
        masks, quality = [], []
        for some in prompts.split(DECODED_AT_ONCE):
            sparse, dense = encode_prompts(sam, some, prompt)
            logits, iou = decode(sam, embedding.expand(len(some), -1, -1, -1), sparse, dense)
            logits = sam.postprocess_masks(logits, input_size, (y2 - y1, x2 - x1))
            masks.append((logits[:, 0] > sam.mask_threshold).cpu().numpy())
            quality.append(iou[:, 0].clamp(0, 1).cpu().numpy())
        return np.concatenate(masks), np.concatenate(quality)
