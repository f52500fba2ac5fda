"""Anomaly detectors on ImageNet features; none of them trains a network.

All of them see the same features: those of EfficientNet-Lite0 at strides 8, 16 and 32, `levels`.

`Cosine` and `Mahalanobis` compare an image's mean features with those of the good images. `PaDiM`
and `PatchCore` compare patches: an image's features at stride 8, beside those of stride 16.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import timm
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.anomaly_method import BATCH, Method, Scored, Show, show_nothing
from pipeline.models.image_distances import (
    Levels,
    cosine,
    gaussian,
    mahalanobis,
    over_norm_of_mean,
)
from pipeline.models.imagenet import LITE0_MEAN, LITE0_STD, efficientnet_lite0


class Backbone(nn.Module):
    """Features of strides 8, 16 and 32 of EfficientNet-Lite0, frozen.

    Input: (n, 3, size, size) uint8 RGB, with a size that is a multiple of 32. Output: (n, 40,
    size / 8, size / 8), (n, 112, size / 16, ...) and (n, 320, size / 32, ...). The weights are
    random before `begin`.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        network: Any = timm.create_model(
            "tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4)
        )
        self.network = network.eval().to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(LITE0_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(LITE0_STD).view(3, 1, 1))

    def begin(self) -> None:
        """Take ImageNet's weights. Raises `UserError` when they are not installed."""
        weights = efficientnet_lite0(pretrained=True).state_dict()
        self.network.load_state_dict({key: weights[key] for key in self.network.state_dict()})

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = (images.float() / 255 - self.mean) / self.std
        features = self.network(x.contiguous(memory_format=torch.channels_last))
        return [level.contiguous() for level in features]


class FeatureMethod(Method):
    """A method that sees an image's features alone, and how it gets them."""

    def __init__(self, image_size: int) -> None:
        super().__init__(image_size)
        self.backbone = Backbone()

    @property
    def device(self) -> torch.device:
        return self.backbone.mean.device

    def begin(self) -> None:
        self.backbone.begin()

    def fit(self, images: torch.Tensor, show: Show = show_nothing) -> None:
        seen, batches = 0, []
        for batch in images.split(BATCH):
            batches.append(self.backbone(batch.to(self.device)))
            seen += len(batch)
            show(seen / len(images), "learning")
        self.fit_features([torch.cat(level) for level in zip(*batches, strict=True)])

    def _score(self, images: torch.Tensor) -> Scored:
        return self.score_features(self.backbone(images))

    @abstractmethod
    def fit_features(self, levels: Levels) -> None:
        """`fit`, given the features of all good images."""

    @abstractmethod
    def score_features(self, levels: Levels) -> Scored:
        """`score`, given the features of any number of images."""


# ---- Distances of whole images ---------------------------------------------------------------
#
# The heat map shows each place's part: before it is smoothed, its mean is the score.


class Cosine(FeatureMethod):
    """Cosine distance to the nearest good image, the mean of that of each level.

    Nearest neighbours of pooled ImageNet features are Bergman et al., Deep Nearest Neighbor Anomaly
    Detection, arXiv 2002.10445, with another distance.
    """

    name = "cosine"
    fitted = ("fine", "middle", "coarse")  # the good images' features over the norm of their means

    def fit_features(self, levels: Levels) -> None:
        self.learn(dict(zip(self.fitted, map(over_norm_of_mean, levels), strict=True)))

    def score_features(self, levels: Levels) -> Scored:
        good = [self.get_buffer(name) for name in self.fitted]
        scores, parts = cosine([over_norm_of_mean(level) for level in levels], good)
        return scores.cpu(), self.heat_maps(parts)


class Mahalanobis(FeatureMethod):
    """Mahalanobis distance to a Gaussian of the good images, the sum over levels.

    Rippel et al., Modeling the Distribution of Normal Data in Pre-Trained Deep Features for Anomaly
    Detection, ICPR 2020, arXiv 2005.14140.
    """

    name = "mahalanobis"
    fitted = (
        "typical_fine", "typical_middle", "typical_coarse",
        "precision_fine", "precision_middle", "precision_coarse",
    )  # fmt: skip

    def fit_features(self, levels: Levels) -> None:
        typical, precision = zip(*map(gaussian, levels), strict=True)
        self.learn(dict(zip(self.fitted, [*typical, *precision], strict=True)))

    def score_features(self, levels: Levels) -> Scored:
        learned = [self.get_buffer(name) for name in self.fitted]
        scores, parts = mahalanobis(levels, list(zip(learned[:3], learned[3:], strict=True)))
        return scores.cpu(), self.heat_maps(parts)


# ---- Distances of patches --------------------------------------------------------------------


class PaDiM(FeatureMethod):
    """Mahalanobis distance of each patch to a Gaussian of the good images' patches at its place.

    Defard et al., PaDiM, ICPR Workshops 2021, arXiv 2011.08785. Its random choice of channels is
    left out, for there are but 152 of them; the score is the maximum of the smoothed heat map.
    """

    name = "padim"
    fitted = ("mean", "root")  # at each place: of the patches; of their covariance, Cholesky's
    mean: torch.Tensor  # (places, 1, channels)
    root: torch.Tensor  # (places, channels, channels)
    epsilon = 0.01  # added to the covariance's diagonal

    def fit_features(self, levels: Levels) -> None:
        """Raises `ValueError` for fewer than two images."""
        patches = _patches(levels[:2])
        count, channels = patches.shape[:2]
        if count < 2:
            raise ValueError(f"expected at least 2 images, found {count}")
        at_place = patches.flatten(2).permute(2, 0, 1)  # (places, n, channels)
        mean = at_place.mean(dim=1, keepdim=True)
        centred = at_place - mean
        covariance = centred.mT @ centred / (count - 1)
        covariance += self.epsilon * torch.eye(channels, device=covariance.device)
        self.learn({"mean": mean, "root": torch.linalg.cholesky(covariance)})

    def score_features(self, levels: Levels) -> Scored:
        patches = _patches(levels[:2])
        centred = patches.flatten(2).permute(2, 0, 1) - self.mean
        whitened = torch.linalg.solve_triangular(self.root, centred.mT, upper=False)
        distances = whitened.norm(dim=1)  # (places, n)
        maps = self.heat_maps(distances.T.unflatten(1, patches.shape[2:]))
        return maps.amax(dim=(1, 2)), maps


class PatchCore(FeatureMethod):
    """Distance of each patch to the nearest of a coreset of the good images' patches.

    Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022, arXiv 2106.08265:
    patch features are means over 3 x 3 neighbours, the coreset is chosen greedily, each patch the
    farthest from those before it (the first one is random), and an image's score is that of its
    farthest patch, weighted (equation 7). Their random projection, which makes the choice faster,
    is left out: 152 channels are about as few as the 128 they project to.
    """

    name = "patchcore"
    options = ("coreset", "seed")
    fitted = ("bank",)
    bank: torch.Tensor  # (patches, channels)
    neighbours = 9  # good patches around the nearest one, whose distances make the weight

    def __init__(self, image_size: int, coreset: float, seed: int) -> None:
        """`coreset` is the part of the patches that is kept."""
        super().__init__(image_size)
        self.coreset, self.seed = coreset, seed

    def fit_features(self, levels: Levels) -> None:
        patches = _vectors(_patches(_neighbourhoods(levels[:2]))).flatten(0, 1)
        count = max(1, int(len(patches) * self.coreset))
        self.learn({"bank": patches[coreset(patches, count, self.seed)]})

    def score_features(self, levels: Levels) -> Scored:
        grid = _patches(_neighbourhoods(levels[:2]))
        scores, distances = zip(*map(self._score_one, _vectors(grid)), strict=True)
        maps = torch.stack(distances).unflatten(1, grid.shape[2:])
        return torch.stack(scores).cpu(), self.heat_maps(maps)

    def _score_one(self, patches: torch.Tensor) -> Scored:
        """The score of one image and the distance of each of its patches (n, channels)."""
        distances, nearest = torch.cdist(patches, self.bank).min(dim=1)
        farthest = distances.argmax()
        around = torch.cdist(self.bank[nearest[farthest]][None], self.bank)[0]
        near = around.topk(min(self.neighbours, len(around)), largest=False).indices
        rivals = torch.cdist(patches[farthest][None], self.bank[near])[0]
        # The nearest is its own first neighbour. Where it is the only one, nothing is weighted.
        weight = 1 - rivals.softmax(dim=0)[0] if len(near) > 1 else 1
        return weight * distances[farthest], distances


def coreset(vectors: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Places of `count` of the vectors (n, channels), each the farthest from those before it.

    Greedy k-centre (Sener & Savarese, ICLR 2018, arXiv 1708.00489); the seed decides the first.
    """
    chosen = torch.empty(count, dtype=torch.long, device=vectors.device)
    chosen[0] = int(np.random.default_rng(seed).integers(len(vectors)))
    squares = vectors.square().sum(dim=1)
    distances = torch.full_like(squares, torch.inf)  # squared, to the nearest of those chosen
    for i in range(1, count):
        last = chosen[i - 1]
        to_last = squares + squares[last] - 2 * (vectors @ vectors[last])
        distances = torch.minimum(distances, to_last)
        distances[last] = -torch.inf  # not again, even among equal vectors
        chosen[i] = distances.argmax()
    return chosen


def _neighbourhoods(levels: Levels) -> Levels:
    """The mean over 3 x 3 neighbours, with zeros beyond the border."""
    return [F.avg_pool2d(level, 3, stride=1, padding=1) for level in levels]


def _patches(levels: Levels) -> torch.Tensor:
    """(n, channels, h, w): all channels at the finest level's places."""
    size = levels[0].shape[2:]
    resized = [F.interpolate(level, size, mode="bilinear") for level in levels[1:]]
    return torch.cat([levels[0], *resized], dim=1)


def _vectors(patches: torch.Tensor) -> torch.Tensor:
    """(n, places, channels), a patch in each row."""
    return patches.flatten(2).mT
