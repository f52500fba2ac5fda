"""A classifier on frozen ImageNet features: what is fitted is small, and fitted in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import nn

from pipeline.data import tensors
from pipeline.errors import UserError
from pipeline.models.ecrt import SourceMap
from pipeline.models.imagenet import LITE0_MEAN, LITE0_STD, efficientnet_lite0

CHANNELS = 1280  # of the features
NEVER = -1e4  # a logit whose probability is 0, yet finite as files want it


class Encoder(nn.Module):
    """EfficientNet-Lite0 with ImageNet weights, frozen, up to the features its own head sees.

    Input: (n, 3, size, size) uint8 RGB. Output: (n, 1280). Raises `UserError` when the weights are
    not installed.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.img_size = image_size  # where `CachedEncoder` looks for it
        network: Any = efficientnet_lite0(pretrained=True)
        self.network = network.eval().to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(LITE0_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(LITE0_STD).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.float() / 255 - self.mean) / self.std
        features = self.network.forward_features(x.contiguous(memory_format=torch.channels_last))
        pooled: torch.Tensor = self.network.forward_head(features, pre_logits=True)
        return pooled


class Whitening(nn.Module):
    """Principal components of features (n, channels), each of unit variance: (n, components)."""

    def __init__(self, channels: int, components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("basis", torch.zeros(channels, components))

    mean: torch.Tensor
    basis: torch.Tensor

    def fit(self, features: torch.Tensor) -> Whitening:
        """To features of at least `components` + 1 images."""
        components = self.basis.shape[1]
        with np.errstate(invalid="ignore"):  # of equal images it divides by a variance of 0
            pca = PCA(components, svd_solver="full").fit(features.double().numpy())
        variance = pca.explained_variance_
        some = variance > 1e-9 * max(variance[0], 1e-9)  # equal images have fewer components
        inverse = np.divide(1, np.sqrt(variance), out=np.zeros(components), where=some)
        self.mean.copy_(torch.from_numpy(pca.mean_))
        self.basis.copy_(torch.from_numpy(pca.components_.T * inverse))
        return self

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) @ self.basis


class Head(nn.Module):
    """Whitened features, with ECRT also their sources, and multinomial logistic regression.

    Input: features (n, 1280). Output: (n, len(classes)) logits.
    """

    def __init__(
        self, classes: Sequence[str], image_size: int, whitening: Whitening, map: SourceMap | None
    ) -> None:
        super().__init__()
        self.classes, self.image_size = tuple(classes), image_size
        self.whitening, self.map = whitening, map
        self.linear = nn.Linear(whitening.basis.shape[1], len(self.classes))

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """(n, components): what the logistic regression sees."""
        white = self.whitening(features)
        return white if self.map is None else self.map(white)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(self.embed(features))
        return logits


def fit_linear(
    head: Head, embedded: np.ndarray, labels: np.ndarray, weights: np.ndarray | None, inverse: float
) -> None:
    """Fit the head's last layer to what `Head.embed` gives (n, components), and labels (n,).

    `weights` (n,) are those of the samples; `inverse` is scikit-learn's C, the inverse strength of
    the L2 penalty. A class without samples is never decided for.
    """
    regression = LogisticRegression(C=inverse, max_iter=1000)
    regression.fit(embedded.astype(np.float64), labels, sample_weight=weights)
    weight, bias = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:  # then it has the second class's logits alone
        weight, bias = np.stack([-weight[0], weight[0]]) / 2, np.array([-bias[0], bias[0]]) / 2
    occurs = torch.from_numpy(regression.classes_)
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.bias.fill_(NEVER)
        head.linear.weight[occurs] = torch.from_numpy(weight).float()
        head.linear.bias[occurs] = torch.from_numpy(bias).float()


def save(head: Head, path: Path) -> None:
    """Write a safetensors file; its metadata says how to build the head."""
    about = {
        "classes": head.classes,
        "image_size": head.image_size,
        "components": head.whitening.basis.shape[1],
        "sources": head.map is not None,
    }
    tensors.write(path, head.state_dict(), {"head": json.dumps(about)})


def load(path: Path) -> Head:
    """Read what `save` wrote, on the CPU. Raises `UserError` when it is not such a file."""
    state, metadata = tensors.read(path, "a classifier head")
    try:
        about = json.loads(metadata["head"])
        components = about["components"]
        head = Head(
            about["classes"],
            about["image_size"],
            Whitening(CHANNELS, components),
            SourceMap(components) if about["sources"] else None,
        )
        head.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{path}: expected a classifier head, found {detail}") from None
    return head.eval()
