"""Scores of self-supervised networks against other libraries, and what their training does.

For scores the network is a pooling, so that they can be computed by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors
from torch import nn

from pipeline.config import DetectAnomalyConfig, build
from pipeline.errors import UserError
from pipeline.models import anomaly
from pipeline.models.anomaly_method import Method
from pipeline.models.self_supervised import CutPaste, Rotation, SelfSupervised, SimCLR

SIZE = 64
TRAINED = ("rotation", "cutpaste", "simclr", "moco")


class Pooled(nn.Module):
    """A trunk of three features: the mean colours of each 32 x 32 pixels."""

    width = 3

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(images.float() / 255, 32)


def pooled(images: torch.Tensor) -> np.ndarray:
    """(n, 3): what `Pooled` has as its mean over places."""
    return np.asarray(images.double().mean(dim=(2, 3)) / 255)


def noise(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(count, 3, 2, 2, generator=generator) * 255
    return blocks.repeat_interleave(32, 2).repeat_interleave(32, 3).byte()


@pytest.fixture
def plain_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heat maps as they are before they are enlarged and smoothed."""
    monkeypatch.setattr(Method, "heat_maps", lambda self, maps: maps.cpu())


def with_pooling(cls: Callable[..., SelfSupervised]) -> SelfSupervised:
    method = cls(SIZE, None, 0)
    method.trunk = Pooled()  # type: ignore[assignment]
    return method


def created(name: str, **options: object) -> SelfSupervised:
    values = {"source": "x", "out": "y", "method": name, "image_size": SIZE, **options}
    method = anomaly.create(build(DetectAnomalyConfig, values))
    assert isinstance(method, SelfSupervised)
    return method


# ---- Scores ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("plain_maps")
def test_rotation_score_is_the_mean_cross_entropy_of_four_turns() -> None:
    method = with_pooling(Rotation)
    assert isinstance(method, Rotation)
    head = method.head = nn.Linear(3, 4)
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    images = noise(3, 0)
    scores, maps = method.score(images)
    for image, score, heat in zip(images.numpy() / 255, scores, maps, strict=True):
        losses, places = [], np.zeros((4, 2, 2))
        for turn in range(4):
            seen = np.rot90(image, turn, (1, 2))
            losses.append(-log_softmax(weight @ seen.mean((1, 2)) + bias)[turn])
            for row, column in np.ndindex(2, 2):
                block = seen[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
                logits = weight @ block.mean((1, 2)) + bias
                places[turn, row, column] = -log_softmax(logits)[turn]
            places[turn] = np.rot90(places[turn], -turn)  # as the image lies
        assert float(score) == pytest.approx(np.mean(losses), rel=1e-5)
        np.testing.assert_allclose(heat, places.mean(axis=0), rtol=1e-5)


@pytest.mark.usefixtures("plain_maps")
def test_cutpaste_score_is_a_gaussian_density() -> None:
    """The log density of scipy's Gaussian is -d * d / 2 and a constant."""
    method = with_pooling(CutPaste)
    good, new = noise(30, 0), noise(6, 1)
    method.learn_features(method.trunk(good))
    scores, maps = method.score(new)
    fitted = LedoitWolf().fit(pooled(good))
    gaussian = multivariate_normal(pooled(good).mean(0), fitted.covariance_)
    density = gaussian.logpdf(pooled(new))
    halves = -(scores.double().numpy() ** 2) / 2
    np.testing.assert_allclose(halves - halves[0], density - density[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(maps.mean((1, 2)), scores, rtol=1e-4)  # the parts of the places


@pytest.mark.usefixtures("plain_maps")
def test_contrastive_score_is_the_nearest_neighbours_distance() -> None:
    method = with_pooling(SimCLR)
    good, new = noise(30, 0), noise(6, 1)
    method.learn_features(method.trunk(good))
    scores, maps = method.score(new)
    neighbours = NearestNeighbors(n_neighbors=1, metric="cosine").fit(pooled(good))
    expected = neighbours.kneighbors(pooled(new))[0][:, 0]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    np.testing.assert_allclose(maps.mean((1, 2)), expected, atol=1e-6)


# ---- Training --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_the_seed_decides(name: str) -> None:
    good, new = noise(4, 0), noise(2, 1)
    results = []
    for seed in (3, 3, 4):
        method = created(name, epochs=2, seed=seed)
        torch.rand(7)  # what was drawn before does not matter
        method.fit(good)
        results.append((method.losses, method.score(new)))
    first, same, other = results
    assert first[0] == same[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], same[1], strict=True))
    assert [row["epoch"] for row in first[0]] == [1, 2]
    assert first[0] != other[0] and not torch.equal(first[1][1], other[1][1])


@pytest.mark.parametrize("name", TRAINED)
def test_below_stride_16_nothing_is_trained(name: str) -> None:
    method = created(name, epochs=3)
    before = {key: value.clone() for key, value in method.trunk.state_dict().items()}
    seen: list[tuple[float, str]] = []
    method.fit(noise(3, 0), lambda done, words: seen.append((done, words)))
    after = method.trunk.state_dict()
    frozen = ("network.conv_stem", "network.bn1", *(f"network.blocks.{i}." for i in range(3)))
    for key, value in after.items():
        if key.startswith(frozen) or "running" in key:
            assert torch.equal(value, before[key]), key
    trained = [k for k in after if k.endswith("weight") and not k.startswith(frozen)]
    assert all(not torch.equal(after[key], before[key]) for key in trained)
    assert [done for done, _ in seen] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert seen[1][1].startswith("epoch 2/3 loss ")


def shaded(count: int, seed: int) -> torch.Tensor:
    """Images that are bright above and dark below, each a little different."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(200, 30, SIZE)[:, None].expand(3, SIZE, SIZE)
    return (ramp + 40 * torch.rand(count, 3, SIZE, SIZE, generator=generator)).byte()


def test_rotation_learns_which_way_is_up() -> None:
    method = created("rotation", epochs=10)
    method.fit(shaded(8, 0))
    assert method.losses[-1]["loss"] < 0.5 * method.losses[0]["loss"]
    good = shaded(4, 1)
    scores = method.score(torch.cat([good, good.flip(2), good.flip(2).flip(3)]))[0]
    assert scores[:4].max() < scores[4:].min()


def test_cutpaste_learns_to_see_patches() -> None:
    method = created("cutpaste", epochs=10)
    method.fit(shaded(8, 0))
    assert method.losses[-1]["loss"] < 0.8 * method.losses[0]["loss"]
    good = shaded(4, 1)
    bad = good.clone()
    bad[:, :, 40:60, 10:40] = good[:, :, 0:20, 30:60]
    scores, maps = method.score(torch.cat([good, bad]))
    assert scores[:4].max() < scores[4:].min()
    assert (maps[4:, 40:60, 10:40].mean((1, 2)) > maps[4:, :30].mean((1, 2))).all()


@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_without_lightly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    with pytest.raises(UserError) as caught:
        created(name)
    assert caught.value.problems == (
        "--method: expected the package lightly for simclr and moco, found it not installed: "
        "pip install 'pipeline[anomaly]'",
    )
    created("cutpaste")  # does not need it
