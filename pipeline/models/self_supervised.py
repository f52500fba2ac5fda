"""Anomaly detectors that train a network on good images, by a task that needs no labels.

The network is EfficientNet-Lite0. It begins with ImageNet's weights, of which those below stride 16
stay as they are: a few hundred images and ten minutes on two cores are too few to begin with random
ones. The tasks are in `pipeline.models.pretext_tasks`.

What a heat map shows has one value for each 32 x 32 pixels, which are then smoothed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.anomaly_method import BATCH, Method, Scored, Show, show_nothing
from pipeline.models.image_distances import cosine, gaussian, mahalanobis, over_norm_of_mean
from pipeline.models.pretext_tasks import (
    TURNS,
    CutPasteTask,
    MoCoTask,
    RotationTask,
    SimCLRTask,
    Trunk,
    require_lightly,
    turned,
)


class SelfSupervised(Method):
    """A network that is trained, then looked at as `learn_features` and `_score` say."""

    options = ("epochs", "seed")
    default_epochs: ClassVar[int]
    lr: ClassVar[float] = 5e-4  # peak
    weight_decay: ClassVar[float] = 1e-4
    batch: ClassVar[int] = 32  # images; a task makes several of each

    def __init__(self, image_size: int, epochs: int | None, seed: int) -> None:
        super().__init__(image_size)
        self.epochs, self.seed = epochs or self.default_epochs, seed
        self.trunk = Trunk()

    @property
    def device(self) -> torch.device:
        return self.trunk.mean.device

    def begin(self) -> None:
        self.trunk.begin()

    def fit(self, images: torch.Tensor, show: Show = show_nothing) -> None:
        """Train, then learn what good images' features are. The seed decides all that is random."""
        torch.manual_seed(self.seed)
        self._train(self.task(len(images)).to(self.device), images, show)
        show(1, "features of the good images")
        self.eval()
        with torch.inference_mode():
            batches = [self.trunk(batch.to(self.device)) for batch in images.split(BATCH)]
        self.learn_features(torch.cat(batches))

    def _train(self, task: nn.Module, images: torch.Tensor, show: Show) -> None:
        steps = math.ceil(len(images) / self.batch)
        parameters = [p for p in task.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.epochs * steps
        )
        self.losses = []
        task.train()
        for epoch in range(1, self.epochs + 1):
            losses = []
            # Of even size: a single image left over would have no other to differ from.
            for chosen in torch.randperm(len(images)).tensor_split(steps):
                loss = task(images[chosen].to(self.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                losses.append(loss.item())
                done = (epoch - 1 + len(losses) / steps) / self.epochs
                show(done, f"epoch {epoch}/{self.epochs} loss {losses[-1]:.3f}")
            self.losses.append({"epoch": epoch, "loss": float(np.mean(losses))})

    @abstractmethod
    def task(self, count: int) -> nn.Module:
        """What the trunk learns of so many images, with a head of random weights."""

    def learn_features(self, features: torch.Tensor) -> None:
        """Learn what is compared with: the trunk's features of the good images."""


class Rotation(SelfSupervised):
    """How badly the network tells by which quarter turn an image was turned.

    The task is that of Gidaris et al. (see `RotationTask`). The score is the mean cross entropy of
    the image's four turns, as Hendrycks et al., Using Self-Supervised Learning Can Improve Model
    Robustness and Uncertainty, NeurIPS 2019, arXiv 1906.12340, have it (their sum is four times
    it); with softmax responses instead of their logarithms the idea is Golan & El-Yaniv's,
    NeurIPS 2018, arXiv 1805.10917. The heat map is the cross entropy of each place's own class
    activations, turned back, the mean over turns.
    """

    name = "rotation"
    default_epochs = 3

    def __init__(self, image_size: int, epochs: int | None, seed: int) -> None:
        super().__init__(image_size, epochs, seed)
        self.head = nn.Linear(self.trunk.width, TURNS)

    def task(self, count: int) -> nn.Module:
        self.head.reset_parameters()  # now the seed counts
        return RotationTask(self.trunk, self.head)

    @torch.inference_mode()
    def _score(self, images: torch.Tensor) -> Scored:
        features = self.trunk(turned(images))
        turns = torch.arange(TURNS, device=images.device).repeat_interleave(len(images))
        losses = F.cross_entropy(self.head(features.mean(dim=(2, 3))), turns, reduction="none")
        activations = self.head(features.movedim(1, -1)).movedim(-1, 1)
        places = turns[:, None, None].expand(-1, *features.shape[2:])
        maps = F.cross_entropy(activations, places, reduction="none").chunk(TURNS)
        back = torch.stack([one.rot90(-turn, (-2, -1)) for turn, one in enumerate(maps)])
        scores = losses.unflatten(0, (TURNS, len(images))).mean(dim=0)
        return scores.cpu(), self.heat_maps(back.mean(dim=0))


class CutPaste(SelfSupervised):
    """Mahalanobis distance to a Gaussian of the good images' features, after the task CutPaste.

    Li et al., CVPR 2021, arXiv 2104.04015 (see `CutPasteTask`). With the distance d, the log
    density of the paper's Gaussian density estimate is -d * d / 2 and a constant. The covariance of
    1280 features of a few hundred images is shrunk. The heat map shows each place's part of the
    distance: before it is smoothed, its mean is the score.
    """

    name = "cutpaste"
    default_epochs = 5
    fitted = ("typical", "precision")
    typical: torch.Tensor  # (channels, height, width)
    precision: torch.Tensor  # (channels, channels)

    def task(self, count: int) -> nn.Module:
        return CutPasteTask(self.trunk)

    def learn_features(self, features: torch.Tensor) -> None:
        typical, precision = gaussian(features)
        self.learn({"typical": typical, "precision": precision})

    @torch.inference_mode()
    def _score(self, images: torch.Tensor) -> Scored:
        distances, parts = mahalanobis([self.trunk(images)], [(self.typical, self.precision)])
        return distances.cpu(), self.heat_maps(parts)


class Contrastive(SelfSupervised):
    """Cosine distance to the nearest good image's features (kNN with k = 1).

    The heat map shows each place's part of it: before it is smoothed, its mean is the score.
    """

    default_epochs = 10
    fitted = ("good",)
    good: torch.Tensor  # (images, channels, height, width), over the norm of their means

    def begin(self) -> None:
        require_lightly()
        super().begin()

    def learn_features(self, features: torch.Tensor) -> None:
        self.learn({"good": over_norm_of_mean(features)})

    @torch.inference_mode()
    def _score(self, images: torch.Tensor) -> Scored:
        distances, parts = cosine([over_norm_of_mean(self.trunk(images))], [self.good])
        return distances.cpu(), self.heat_maps(parts)


class SimCLR(Contrastive):
    """kNN in features of `SimCLRTask`."""

    name = "simclr"

    def task(self, count: int) -> nn.Module:
        return SimCLRTask(self.trunk, self.image_size)


class MoCo(Contrastive):
    """kNN in features of `MoCoTask`."""

    name = "moco"

    def task(self, count: int) -> nn.Module:
        return MoCoTask(self.trunk, self.image_size, queue=max(1, count // 2))
