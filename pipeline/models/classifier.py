"""The image classifier: an ImageNet backbone with a linear head over the dataset's classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from torch import nn

from pipeline.data import tensors
from pipeline.errors import UserError
from pipeline.models import weights
from pipeline.models.imagenet import LITE0_MEAN, LITE0_STD, efficientnet_lite0

LITE0 = "efficientnet-lite0"
# What torchvision's ResNets were trained with, of RGB values in 0..1.
_RESNET_MEAN = (0.485, 0.456, 0.406)
_RESNET_STD = (0.229, 0.224, 0.225)


class Classifier(nn.Module):
    """Backbone, head and preprocessing in one. The weights are random; see `pretrained`.

    Input: (n, 3, height, width) uint8 RGB. Output: (n, len(classes)) logits.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, name: str, classes: Sequence[str], image_size: int, backbone: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.name, self.classes, self.image_size = name, tuple(classes), image_size
        if backbone is None:
            backbone = efficientnet_lite0(False) if name == LITE0 else _resnet(name)
        head = "classifier" if name == LITE0 else "fc"
        width = getattr(backbone, head).in_features
        setattr(backbone, head, nn.Linear(width, len(self.classes)))
        self.backbone = backbone.to(memory_format=torch.channels_last)  # a third faster on a CPU
        mean, std = (LITE0_MEAN, LITE0_STD) if name == LITE0 else (_RESNET_MEAN, _RESNET_STD)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        logits: torch.Tensor = self.backbone(x.contiguous(memory_format=torch.channels_last))
        return logits

    def train(self, mode: bool = True) -> Classifier:
        """As usual, but BatchNorm layers that are frozen keep their running statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def train_only(self, parts: Sequence[str]) -> None:
        """Freeze all but these parts of the backbone, such as `layer4` or `blocks.6`.

        Raises `UserError` for a part that the backbone does not have.
        """
        names = {name for name, _ in self.backbone.named_modules() if name}
        for part in parts:
            if part not in names:
                known = ", ".join(name for name, _ in self.backbone.named_children())
                raise UserError(
                    f"--unfreeze: expected parts of {self.name} ({known}), found '{part}'"
                )
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(any(name.startswith(f"{part}.") for part in parts))


def pretrained(name: str, classes: Sequence[str], image_size: int, *, offline: bool) -> Classifier:
    """A classifier with ImageNet weights below its new head.

    EfficientNet-Lite0's come from a package, the ResNets' are torchvision's and may be downloaded
    unless `offline`. Raises `UserError` when they cannot be had.
    """
    if name == LITE0:
        return Classifier(name, classes, image_size, efficientnet_lite0(True))
    path = weights.resolve(name, offline=offline)
    backbone = _resnet(name)
    backbone.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Classifier(name, classes, image_size, backbone)


def _resnet(name: str) -> nn.Module:
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def resized(image: np.ndarray, size: int) -> torch.Tensor:
    """A (height, width, 3) uint8 BGR image as the classifier's (3, size, size) uint8 RGB."""
    square = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(np.ascontiguousarray(square[:, :, ::-1].transpose(2, 0, 1)))


@torch.inference_mode()
def predict(model: Classifier, images: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """Logits (n, classes), on the CPU, of (n, 3, size, size) uint8 RGB; switches to eval mode."""
    model.eval()
    return torch.cat([model(part.to(model.mean.device)).cpu() for part in images.split(batch)])


def save(model: Classifier, path: Path) -> None:
    """Write a safetensors file; its metadata says how to build the model."""
    about = {"model": model.name, "classes": model.classes, "image_size": model.image_size}
    tensors.write(path, model.state_dict(), {"classifier": json.dumps(about)})


def load(path: Path) -> Classifier:
    """Read what `save` wrote, on the CPU. Raises `UserError` when it is not such a file."""
    state, metadata = tensors.read(path, "a classifier checkpoint")
    try:
        about = json.loads(metadata["classifier"])
        model = Classifier(about["model"], about["classes"], about["image_size"])
        model.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{path}: expected a classifier checkpoint, found {detail}") from None
    return model
