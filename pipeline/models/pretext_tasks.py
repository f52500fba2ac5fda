"""Tasks that a network can learn from images without labels, and the network that learns them.

Each task is a module that owns a head. Called with images (n, 3, size, size) uint8 RGB it draws
what it needs from torch's random numbers and returns the loss of one step, a scalar.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from pipeline.errors import UserError
from pipeline.models.imagenet import LITE0_MEAN, LITE0_STD, efficientnet_lite0

FROZEN = 3  # blocks of the trunk below stride 16, which keep ImageNet's weights
TURNS = 4

# What CutPaste draws from (arXiv 2104.04015). Its scars are given in pixels of images of 256.
AREA = (0.02, 0.15)  # of a patch, part of the image
ASPECT = ((0.3, 1.0), (1.0, 3.3))  # one or the other
SCAR_WIDTH, SCAR_LENGTH, SCAR_IMAGE = (2.0, 16.0), (10.0, 25.0), 256
SCAR_TURN = (-45.0, 45.0)  # degrees
Recolour = Callable[[torch.Tensor], torch.Tensor]


class Trunk(nn.Module):
    """EfficientNet-Lite0 without its head. What lies below stride 16 stays as `begin` gives it.

    So do the statistics of all BatchNorm layers: in a hundred steps they would not settle, and two
    views of a batch cannot be told by them (for which MoCo shuffles its batches).

    Input: (n, 3, size, size) uint8 RGB. Output: features (n, 1280, size / 32, size / 32). The
    weights are random before `begin`.
    """

    width = 1280
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = _without_head(efficientnet_lite0(False))
        self.network.to(memory_format=torch.channels_last)
        for part in (self.network.conv_stem, self.network.bn1, *self.network.blocks[:FROZEN]):
            part.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(LITE0_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(LITE0_STD).view(3, 1, 1), persistent=False)

    def begin(self) -> None:
        """Take ImageNet's weights. Raises `UserError` when they are not installed."""
        self.network.load_state_dict(_without_head(efficientnet_lite0(True)).state_dict())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.float() / 255 - self.mean) / self.std
        features: torch.Tensor = self.network.forward_features(
            x.contiguous(memory_format=torch.channels_last)
        )
        return features

    def train(self, mode: bool = True) -> Trunk:
        """As usual, but the network keeps its statistics."""
        super().train(mode)
        self.network.eval()
        return self


def _without_head(network: Any) -> Any:
    network.reset_classifier(0)
    return network


# ---- Classification --------------------------------------------------------------------------


class RotationTask(nn.Module):
    """By which of four quarter turns was an image turned? Gidaris et al., ICLR 2018, 1803.07728."""

    def __init__(self, trunk: Trunk, head: nn.Linear) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        turns = torch.arange(TURNS, device=images.device).repeat_interleave(len(images))
        return F.cross_entropy(self.head(self.trunk(turned(images)).mean(dim=(2, 3))), turns)


def turned(images: torch.Tensor) -> torch.Tensor:
    """(4 n, ...): all images, then all by one quarter turn counter-clockwise, by two, by three."""
    return torch.cat([images.rot90(turn, (-2, -1)) for turn in range(TURNS)])


class CutPasteTask(nn.Module):
    """Is an image whole, does it have a patch in the wrong place, or a scar?

    The 3-way task of Li et al., CutPaste, CVPR 2021, arXiv 2104.04015.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(trunk.width, 3)
        # As in the paper, a patch differs a little in colour from where it was cut.
        self.recolour = v2.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        seen = [
            *images,
            *(with_patch(image, self.recolour) for image in images),
            *(with_scar(image, self.recolour) for image in images),
        ]
        kinds = torch.arange(3, device=images.device).repeat_interleave(len(images))
        return F.cross_entropy(self.head(self.trunk(torch.stack(seen)).mean(dim=(2, 3))), kinds)


def with_patch(image: torch.Tensor, recolour: Recolour) -> torch.Tensor:
    """A copy of an image (3, h, w) in which a rectangle of it stands somewhere else, too."""
    height, width = image.shape[1:]
    area = _uniform(AREA) * height * width
    aspect = _uniform(ASPECT[int(torch.randint(2, ()))])
    size = (
        min(height, max(1, round(math.sqrt(area / aspect)))),
        min(width, max(1, round(math.sqrt(area * aspect)))),
    )
    return _paste(image, recolour(_cut(image, size)), torch.ones(size, dtype=torch.bool))


def with_scar(image: torch.Tensor, recolour: Recolour) -> torch.Tensor:
    """A copy of an image (3, h, w) with a long thin rectangle of it, turned, somewhere else."""
    scale = max(image.shape[1:]) / SCAR_IMAGE
    size = (
        max(1, round(_uniform(SCAR_LENGTH) * scale)),
        max(1, round(_uniform(SCAR_WIDTH) * scale)),
    )
    angle = _uniform(SCAR_TURN)
    # The nearest pixel, so that the scar has the image's own colours; its shape turns with it.
    patch = vision.rotate(recolour(_cut(image, size)), angle, expand=True)
    shape = vision.rotate(torch.ones(1, *size, dtype=torch.uint8), angle, expand=True)[0]
    return _paste(image, patch, shape.bool())


def _cut(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A rectangle (3, *size) of the image, anywhere."""
    top, left = _anywhere(image, size)
    return image[:, top : top + size[0], left : left + size[1]]


def _paste(image: torch.Tensor, patch: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """A copy of the image with the patch (3, h, w) anywhere, where its `shape` (h, w) is true."""
    size = (patch.shape[1], patch.shape[2])
    top, left = _anywhere(image, size)
    pasted = image.clone()
    place = pasted[:, top : top + size[0], left : left + size[1]]
    place[:, shape] = patch[:, shape]
    return pasted


def _anywhere(image: torch.Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """Top and left of a rectangle within the image."""
    top, left = (
        int(torch.randint(side - part + 1, ()))
        for side, part in zip(image.shape[1:], size, strict=True)
    )
    return top, left


def _uniform(limits: tuple[float, float]) -> float:
    return float(torch.empty(()).uniform_(*limits))


# ---- Contrast --------------------------------------------------------------------------------
#
# Two views of an image are to have like features, views of different images are not. Losses, heads
# and the momentum update are those of lightly (github.com/lightly-ai/lightly).


def require_lightly() -> None:
    """Raises `UserError` when lightly is not installed."""
    try:
        import lightly.loss  # noqa: F401
    except ImportError:
        raise UserError(
            "--method: expected the package lightly for simclr and moco, found it not installed: "
            "pip install 'pipeline[anomaly]'"
        ) from None


class SimCLRTask(nn.Module):
    """Find an image's other view among those of a batch. Chen et al., ICML 2020, arXiv 2002.05709.

    The temperature is the paper's for small batches; `Views` says how views are made.
    """

    temperature = 0.5

    def __init__(self, trunk: Trunk, image_size: int) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        self.views = Views(image_size)
        self.trunk = trunk
        self.head = SimCLRProjectionHead(trunk.width, trunk.width, 128)
        self.loss = NTXentLoss(self.temperature)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.views(images), self.views(images)])
        projected = self.head(self.trunk(both).mean(dim=(2, 3)))
        loss: torch.Tensor = self.loss(*projected.chunk(2))
        return loss


class MoCoTask(nn.Module):
    """Find an image's other view among those that a slower encoder has seen before.

    He et al., CVPR 2020, arXiv 1911.05722, with head and views of MoCo v2 (Chen et al., 2020, arXiv
    2003.04297). With a few hundred images and steps instead of millions, the encoder's momentum is
    lower, and the `queue` of features is to be shorter than an epoch: it should not hold an image's
    own views.
    """

    temperature = 0.2
    momentum = 0.99

    def __init__(self, trunk: Trunk, image_size: int, queue: int) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead

        self.views = Views(image_size)
        self.encoder = nn.ModuleList([trunk, MoCoProjectionHead(trunk.width, trunk.width, 128)])
        self.slow = copy.deepcopy(self.encoder).requires_grad_(False)
        self.loss = NTXentLoss(self.temperature, memory_bank_size=(queue, 128))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        from lightly.models.utils import update_momentum

        update_momentum(self.encoder, self.slow, self.momentum)
        with torch.no_grad():
            keys = self._project(self.slow, self.views(images))
        loss: torch.Tensor = self.loss(self._project(self.encoder, self.views(images)), keys)
        return loss

    @staticmethod
    def _project(encoder: nn.ModuleList, views: torch.Tensor) -> torch.Tensor:
        trunk, head = encoder
        projected: torch.Tensor = head(trunk(views).mean(dim=(2, 3)))
        return projected


class Views(nn.Module):
    """Makes one view of each image: part of it, mirrored, recoloured, blurred, as MoCo v2 does."""

    def __init__(self, size: int) -> None:
        super().__init__()
        kernel = size // 20 * 2 + 1  # about a tenth of the side, as SimCLR has it
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.2, 1)),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], 0.5),
                v2.RandomHorizontalFlip(),
            ]
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.transform(image) for image in images])
