"""Segment Anything models: the official ones, MobileSAM, and the small `sam-lite`.

All are segment-anything's `Sam` (Kirillov et al., Segment Anything, ICCV 2023, arXiv 2304.02643);
they differ in the image encoder. An image, or a window of it, is resized so that its longest side
is the encoder's input size, normalised, and padded at the bottom and right.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam

from pipeline.data import tensors
from pipeline.data.quality import Calibration
from pipeline.errors import UserError
from pipeline.models import weights
from pipeline.models.sam_lite import build_sam_lite

IMAGENET_START = "sam-lite-imagenet"  # sam-lite with ImageNet features and an untrained decoder
LITE_ZOOM = 1.3  # of sam-lite's windows: close, with some context
AS_PREDICTED = Calibration()
WHOLE_IMAGE = 0.0


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
    """A SAM and what inference has to know of its training."""

    model: Sam
    architecture: str  # a key of `ARCHITECTURES`
    zoom: float  # of the windows it was trained with; 0: whole images
    calibration: Calibration = AS_PREDICTED  # of the IoU that it predicts


def load_sam(source: str, *, offline: bool = False) -> LoadedSam:
    """A SAM by its name in the weights registry, or from a checkpoint of any of the architectures.

    Checkpoints are segment-anything's `.pth`, MobileSAM's `.pt`, or `.safetensors` of `save_sam`.
    Raises `UserError` when the source is none of these.
    """
    if source == IMAGENET_START:
        return LoadedSam(build_sam_lite(pretrained=True), "sam-lite", LITE_ZOOM)
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
    zoom, calibration = _trained_with(path, metadata)
    return LoadedSam(sam, architecture, zoom, calibration)


def _trained_with(path: Path, metadata: dict[str, str]) -> tuple[float, Calibration]:
    """The zoom and the calibration in a checkpoint's metadata; those of a published one without."""
    zoom, calibration = metadata.get("zoom", "0"), metadata.get("calibration", "1 0")
    try:
        a, b = map(float, calibration.split())
        if float(zoom) == WHOLE_IMAGE or 1 <= float(zoom) < math.inf:
            return float(zoom), Calibration(a, b)
    except ValueError:
        pass
    raise UserError(
        f"{path}: expected metadata with a zoom of 0 or at least 1 and a calibration of two "
        f"numbers, the first at least 0, found {zoom!r} and {calibration!r}"
    )


def save_sam(path: Path, loaded: LoadedSam) -> None:
    """Write a SAM as safetensors in half precision."""
    state = loaded.model.state_dict()
    halves = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    metadata = {
        "architecture": loaded.architecture,
        "zoom": str(loaded.zoom),
        "calibration": f"{loaded.calibration.a} {loaded.calibration.b}",
    }
    tensors.write(path, halves, metadata)


def _read_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a checkpoint, in float32, and its metadata."""
    if path.suffix == ".safetensors":
        state, metadata = tensors.read(path, "a SAM checkpoint")
    else:
        state, metadata = _read_pickle(path), {}
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, metadata


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:  # weights_only refuses pickles that hold more than data: they could run code
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: expected a SAM checkpoint of tensors alone, found other content"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{path}: expected a SAM checkpoint, found {_one_line(error)}") from None
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path}: expected a SAM checkpoint of tensors by name, found other data")
    return state


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _architecture_of(state: dict[str, torch.Tensor]) -> str:
    """Which architecture a published checkpoint belongs to, by its tensors."""
    if "image_encoder.patch_embed.seq.0.c.weight" in state:
        return "mobile-sam"
    positions = state.get("image_encoder.pos_embed")
    width = 0 if positions is None else positions.shape[-1]
    return {768: "sam-vit-b", 1024: "sam-vit-l", 1280: "sam-vit-h"}.get(width, "unknown")
