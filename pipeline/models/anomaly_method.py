"""What all anomaly detectors have in common: each learns from good images alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.nn import functional as F

Scored = tuple[torch.Tensor, torch.Tensor]
Show = Callable[[float, str], None]  # gets the part of the fitting that is done, and a few words

BATCH = 16  # images at a time
BLUR = 4.0  # standard deviation in pixels of the network's input, as PaDiM and PatchCore have it


def show_nothing(done: float, words: str) -> None:
    """For a fitting that nobody watches."""


class Method(nn.Module, ABC):
    """An anomaly detector, made with random weights: `begin` and `fit` come first.

    What it has learned is its state. Images are (n, 3, image_size, image_size) uint8 RGB, best made
    by `pipeline.models.classifier.resized`, and may lie on another device than the method.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()  # of the constructor and of `detect-anomaly`, by name
    fitted: ClassVar[tuple[str, ...]] = ()  # buffers whose shapes depend on the images

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.losses: list[dict[str, float]] = []  # of each epoch, where a network is trained
        for buffer in self.fitted:
            self.register_buffer(buffer, torch.empty(0))

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the method's tensors are."""

    @abstractmethod
    def begin(self) -> None:
        """Take the weights to begin with. Raises `UserError` when something is not installed."""

    @abstractmethod
    def fit(self, images: torch.Tensor, show: Show = show_nothing) -> None:
        """Learn from good images."""

    def score(self, images: torch.Tensor) -> Scored:
        """Scores (n,), higher for what is less like a good image, and heat maps (n, image_size,
        image_size), both float32 on the CPU."""
        self.eval()
        scored = [self._score(batch.to(self.device)) for batch in images.split(BATCH)]
        scores, maps = zip(*scored, strict=True)
        return torch.cat(scores), torch.cat(maps)

    @abstractmethod
    def _score(self, images: torch.Tensor) -> Scored:
        """`score` of at most `BATCH` images on the method's device."""

    def learn(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set what is `fitted`, laid out as a file has it: equal strides, equal bits."""
        for buffer, tensor in tensors.items():
            setattr(self, buffer, tensor.contiguous())

    def heat_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (n, h, w) in the size of the images, smoothed, on the CPU."""
        size = (self.image_size, self.image_size)
        large = F.interpolate(maps[:, None], size, mode="bilinear")[:, 0].cpu()
        return torch.from_numpy(gaussian_filter(large.numpy(), BLUR, axes=(1, 2)))
