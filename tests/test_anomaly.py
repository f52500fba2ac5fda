"""Anomaly detectors on small random features, against plain or other libraries' implementations.

And what was learned, written and read again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist, mahalanobis
from sklearn.covariance import LedoitWolf

from pipeline.config import DetectAnomalyConfig, build
from pipeline.data import tensors
from pipeline.errors import UserError
from pipeline.models import anomaly
from pipeline.models import anomaly_features as features
from pipeline.models.anomaly_method import Method
from pipeline.models.imagenet import efficientnet_lite0

Arrays = list[np.ndarray]
SIZE = 64


def levels(count: int, seed: int, sides: Sequence[int] = (8, 4, 2)) -> list[torch.Tensor]:
    """Random features of `count` images, whose mean is not 0."""
    generator = torch.Generator().manual_seed(seed)
    channels = (4, 3, 5)
    return [
        torch.randn(count, c, side, side, generator=generator)
        + torch.linspace(0.5, 2, c)[:, None, None]
        for c, side in zip(channels, sides, strict=True)
    ]


@pytest.fixture
def plain_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heat maps as they are before they are enlarged and smoothed."""
    monkeypatch.setattr(Method, "heat_maps", lambda self, maps: maps.cpu())


def as_arrays(tensors: list[torch.Tensor]) -> Arrays:
    return [tensor.numpy().astype(np.float64) for tensor in tensors]


# ---- Whole images ----------------------------------------------------------------------------


@pytest.mark.usefixtures("plain_maps")
def test_cosine() -> None:
    good, new = levels(12, 0), levels(5, 1)
    detector = features.Cosine(SIZE)
    detector.fit_features(good)
    scores, maps = detector.score_features(new)
    pooled = [
        (a.mean((2, 3)), b.mean((2, 3))) for a, b in zip(*map(as_arrays, (new, good)), strict=True)
    ]
    expected = np.mean([cdist(a, b, "cosine") for a, b in pooled], axis=0).min(axis=1)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    np.testing.assert_allclose(maps.mean((1, 2)), expected, atol=1e-6)  # its parts, place by place
    assert (
        np.abs(detector.score_features(good)[0].numpy()).max() < 1e-6
    )  # each is its own neighbour


@pytest.mark.usefixtures("plain_maps")
def test_mahalanobis() -> None:
    good, new = levels(12, 0), levels(5, 1)
    detector = features.Mahalanobis(SIZE)
    detector.fit_features(good)
    scores, maps = detector.score_features(new)
    expected = np.zeros(5)
    for a, b in zip(as_arrays(new), as_arrays(good), strict=True):
        fitted = LedoitWolf().fit(b.mean((2, 3)))
        expected += np.sqrt(fitted.mahalanobis(a.mean((2, 3))))
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    np.testing.assert_allclose(maps.mean((1, 2)), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "detector", [features.Cosine(SIZE), features.Mahalanobis(SIZE)], ids=["cos", "maha"]
)
@pytest.mark.usefixtures("plain_maps")
def test_parts_of_a_distance_are_where_the_image_differs(detector: features.FeatureMethod) -> None:
    """One of the good images, with other features in a corner."""
    good = [1 + 0.1 * level for level in levels(20, 0)]
    new = [level[:1].clone() for level in good]
    generator = torch.Generator().manual_seed(5)
    for level, cell in zip(new, (4, 2, 1), strict=True):
        change = torch.randn(level.shape[1], generator=generator)[:, None, None]
        level[:, :, -cell:, -cell:] += change
    detector.fit_features(good)
    (heat,) = detector.score_features(new)[1].numpy()
    assert heat[4:, 4:].mean() > 5 * np.abs(heat[:4, :4]).mean()


# ---- Patches ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("plain_maps")
def test_padim() -> None:
    good, new = levels(30, 0, (4, 4, 1)), levels(3, 1, (4, 4, 1))
    detector = features.PaDiM(SIZE)
    detector.fit_features(good)
    scores, maps = detector.score_features(new)
    known, seen = (np.concatenate(as_arrays(x[:2]), axis=1) for x in (good, new))
    expected = np.empty((3, 4, 4))
    for i, row, column in np.ndindex(3, 4, 4):
        at_place = known[:, :, row, column]
        covariance = np.cov(at_place, rowvar=False) + 0.01 * np.eye(7)
        vector = seen[i, :, row, column]
        expected[i, row, column] = mahalanobis(vector, at_place.mean(0), np.linalg.inv(covariance))
    np.testing.assert_allclose(maps, expected, rtol=1e-4)
    np.testing.assert_allclose(scores, expected.max((1, 2)), rtol=1e-4)


def test_padim_of_one_image_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least 2 images, found 1"):
        features.PaDiM(SIZE).fit_features(levels(1, 0))


def local_means(x: list[torch.Tensor]) -> np.ndarray:
    """Patches (n, places, channels) of levels of one size: the mean over 3 x 3, zeros outside."""
    both = np.concatenate(as_arrays(x[:2]), axis=1)
    means = ndimage.uniform_filter(both, (0, 0, 3, 3), mode="constant")
    return means.reshape(len(both), both.shape[1], -1).transpose(0, 2, 1)


@pytest.mark.usefixtures("plain_maps")
def test_patchcore() -> None:
    good, new = levels(6, 0, (4, 4, 1)), levels(3, 1, (4, 4, 1))
    detector = features.PatchCore(SIZE, coreset=1.0, seed=0)  # all patches, in another order
    detector.fit_features(good)
    scores, maps = detector.score_features(new)
    bank = local_means(good).reshape(-1, 7)
    np.testing.assert_allclose(sorted(detector.bank.tolist()), sorted(bank.tolist()), atol=1e-5)
    for i, patches in enumerate(local_means(new)):
        distances = cdist(patches, bank)
        nearest = distances.min(axis=1)
        np.testing.assert_allclose(maps[i].flatten(), nearest, rtol=1e-4)
        worst = int(nearest.argmax())
        best = int(distances[worst].argmin())
        around = np.argsort(cdist(bank[best : best + 1], bank)[0])[:9]  # equation 7 of the paper
        total = np.exp(distances[worst, around]).sum()
        weight = 1 - math.exp(nearest[worst]) / total
        assert float(scores[i]) == pytest.approx(weight * nearest[worst], rel=1e-4)


def test_coarse_features_are_enlarged_to_the_fine_ones() -> None:
    fine, coarse = torch.zeros(1, 1, 4, 4), torch.tensor([[[[0.0, 4.0], [0.0, 4.0]]]])
    patches = features._patches([fine, coarse])
    assert patches.shape == (1, 2, 4, 4)
    assert patches[0, 1].tolist() == [[0.0, 1.0, 3.0, 4.0]] * 4


def test_the_coreset_is_greedy() -> None:
    """Each is the farthest from those before it, as of a plain search; the first is given."""
    vectors = np.random.default_rng(3).normal(size=(60, 5))
    chosen = features.coreset(torch.from_numpy(vectors).float(), 25, seed=7).tolist()
    distances = cdist(vectors, vectors)
    for i in range(1, len(chosen)):
        to_nearest = distances[:, chosen[:i]].min(axis=1)
        assert chosen[i] == int(to_nearest.argmax())
    firsts = {int(features.coreset(torch.from_numpy(vectors), 1, seed)[0]) for seed in range(10)}
    assert len(firsts) > 3
    assert features.coreset(torch.from_numpy(vectors).float(), 25, seed=7).tolist() == chosen


def test_no_patch_is_chosen_twice() -> None:
    chosen = features.coreset(torch.ones(9, 4), 9, seed=0)
    assert sorted(chosen.tolist()) == list(range(9))


@pytest.mark.usefixtures("plain_maps")
def test_a_coreset_of_a_single_patch_is_not_weighted() -> None:
    good = levels(2, 0)
    detector = features.PatchCore(SIZE, coreset=1e-9, seed=0)
    detector.fit_features(good)
    scores, maps = detector.score_features(levels(3, 1))
    assert detector.bank.shape == (1, 7)
    assert torch.equal(scores, maps.amax((1, 2)))


# ---- Heat maps and features ------------------------------------------------------------------


def test_a_patch_is_drawn_where_it_lies() -> None:
    """Of 8 patches a side, that in row 5 and column 2 is at (43.5, 19.5) of 64 x 64 pixels."""
    maps = torch.zeros(1, 8, 8)
    maps[0, 5, 2] = 1
    (heat,) = features.Cosine(64).heat_maps(maps).numpy()
    assert heat.shape == (64, 64)
    assert ndimage.center_of_mass(heat) == pytest.approx((5 * 8 + 3.5, 2 * 8 + 3.5), abs=0.05)
    assert heat.sum() == pytest.approx(64, rel=1e-3)  # the pixels of a patch


def test_features_are_those_of_the_whole_network() -> None:
    images = torch.randint(
        0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)
    ).byte()
    backbone = features.Backbone()
    backbone.begin()
    fine, middle, coarse = backbone(images)
    assert [tuple(x.shape) for x in (fine, middle, coarse)] == [
        (2, 40, 8, 8),
        (2, 112, 4, 4),
        (2, 320, 2, 2),
    ]
    network = efficientnet_lite0(pretrained=True).eval()
    with torch.no_grad():
        x = network.bn1(network.conv_stem((images.float() - 127) / 128))
        for i, block in enumerate(network.blocks):
            x = block(x)
            if i in (2, 4):
                torch.testing.assert_close((fine, None, middle)[i - 2], x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(coarse, x, rtol=1e-3, atol=1e-3)


# ---- On disk ---------------------------------------------------------------------------------


def images(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator).byte()


def created(method: str, **options: object) -> Method:
    values = {"source": "x", "out": "y", "method": method, "image_size": SIZE, **options}
    return anomaly.create(build(DetectAnomalyConfig, values))


@pytest.mark.parametrize("name", anomaly.METHODS)
def test_a_method_that_is_read_again_scores_as_before(name: str, tmp_path: Path) -> None:
    method = created(name, coreset=0.3, epochs=1, seed=5)
    method.fit(images(18, 0))
    anomaly.save(method, tmp_path)
    same = anomaly.load(tmp_path)
    assert (type(same), same.image_size) == (type(method), SIZE)
    given = {"coreset": 0.3, "epochs": 1, "seed": 5}
    assert all(getattr(same, option) == given[option] for option in same.options)
    new = images(17, 1)
    for before, after in zip(method.score(new), same.score(new), strict=True):
        assert before.dtype == torch.float32 and torch.equal(before, after)
    assert method.score(new)[1].shape == (17, SIZE, SIZE)
    anomaly.save(same, tmp_path / "again")
    first, second = (folder / anomaly.FILE for folder in (tmp_path, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_only_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / anomaly.FILE
    expected = rf"^{path}: expected an anomaly detector of `pipeline detect-anomaly`, found [^\n]+$"
    for write in (
        lambda: None,  # no file
        lambda: path.write_bytes(b"no tensors"),
        lambda: tensors.write(path, {"a": torch.zeros(1)}, {}),
        lambda: tensors.write(path, {"a": torch.zeros(1)}, {"anomaly": "no JSON"}),
        lambda: tensors.write(path, {"a": torch.zeros(1)}, {"anomaly": "[]"}),
    ):
        write()
        with pytest.raises(UserError, match=expected):
            anomaly.load(tmp_path)
    method = created("patchcore")
    method.fit(images(3, 0))
    anomaly.save(method, tmp_path)
    whole, (state, about) = path.read_bytes(), tensors.read(path, "")
    for write in (
        lambda: path.write_bytes(whole[:-100]),
        lambda: tensors.write(path, {k: v for k, v in state.items() if k != "bank"}, about),
        lambda: tensors.write(path, {k: v for k, v in state.items() if "conv" not in k}, about),
        lambda: tensors.write(path, state, {"anomaly": about["anomaly"].replace("seed", "sed")}),
        lambda: tensors.write(path, state, {"anomaly": about["anomaly"].replace("core", "co")}),
        lambda: tensors.write(path, state, {"anomaly": about["anomaly"].replace(f" {SIZE}", " 0")}),
        lambda: tensors.write(path, {**state, "bank": state["bank"] * torch.nan}, about),
    ):
        write()
        with pytest.raises(UserError, match=expected):
            anomaly.load(tmp_path)
