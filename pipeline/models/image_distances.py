"""Distances of whole images in feature space, and each place's part of them.

Features are `levels`, (n, channels, height, width) each, from fine to coarse. What is compared are
their means over places. The distances are sums over channels, and a mean feature is a mean over
places. So each place has its part of the distance: the mean of all parts is the distance.

Distances are (n,), their parts (n, height, width) in the finest level's size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.covariance import LedoitWolf
from torch.nn import functional as F

Levels = Sequence[torch.Tensor]
Distances = tuple[torch.Tensor, torch.Tensor]


def cosine(levels: Levels, good: Levels) -> Distances:
    """Cosine distance to the nearest good image, the mean of that of each level.

    Both are results of `over_norm_of_mean`.
    """
    similarity = torch.stack([mean(x) @ mean(y).T for x, y in zip(levels, good, strict=True)])
    most, nearest = similarity.sum(dim=0).max(dim=1)
    parts = []
    for mine, known in zip(levels, good, strict=True):
        # Of unit vectors a and b, 1 - a·b is half of (a - b)·(a - b).
        difference = mine - known[nearest]
        parts.append((difference * mean(difference)[:, :, None, None]).sum(dim=1) / 2)
    return 1 - most / len(levels), _sum(parts) / len(levels)


def gaussian(level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `mahalanobis` compares with: the mean at each place, (channels, height, width), and the
    precision (channels, channels) of the means over places.

    The covariance is shrunk as Ledoit and Wolf (2004) have it.
    """
    fitted = LedoitWolf().fit(mean(level).cpu().double().numpy())
    return level.mean(dim=0), torch.from_numpy(fitted.precision_).float().to(level.device)


def mahalanobis(
    levels: Levels, gaussians: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> Distances:
    """Mahalanobis distance to a `gaussian` for each level, the sum over levels."""
    parts, total = [], torch.zeros(len(levels[0]), device=levels[0].device)
    for level, (typical, precision) in zip(levels, gaussians, strict=True):
        difference = level - typical
        pooled = mean(difference)
        weights = pooled @ precision
        distance = (weights * pooled).sum(dim=1).clamp_min(1e-12).sqrt()
        weighted = difference * (weights / distance[:, None])[:, :, None, None]
        parts.append(weighted.sum(dim=1))
        total += distance
    return total, _sum(parts)


def mean(level: torch.Tensor) -> torch.Tensor:
    """(n, channels): the mean over places."""
    return level.mean(dim=(2, 3))


def over_norm_of_mean(level: torch.Tensor) -> torch.Tensor:
    return level / mean(level).norm(dim=1)[:, None, None, None]


def _sum(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of maps (n, h, w) of several sizes, in the first one's."""
    total = torch.zeros_like(maps[0])
    for single in maps:
        total += F.interpolate(single[:, None], total.shape[1:], mode="nearest-exact")[:, 0]
    return total
