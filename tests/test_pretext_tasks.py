"""Pretext tasks: what is pasted where, and losses against plain loops over the papers' formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.models import pretext_tasks as tasks

HEIGHT, WIDTH = 96, 160
Paste = Callable[[torch.Tensor, tasks.Recolour], torch.Tensor]


def numbered() -> torch.Tensor:
    """An image (3, h, w) in which every pixel has a colour of its own: its row and its column."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    return torch.stack([rows, columns, torch.full_like(rows, 7)]).byte()


def pasted(paste: Paste, seed: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """An image, places (n, 2) of the pixels that are pasted, and where these come from (n, 2)."""
    torch.manual_seed(seed)
    before = numbered()
    after = paste(before, lambda patch: patch)
    assert torch.equal(before, numbered())  # it is a copy
    places = (after != before).any(dim=0).nonzero().numpy()
    colours = after[:, places[:, 0], places[:, 1]].numpy().T
    assert (colours[:, 2] == 7).all()  # pixels of the image, and not what lies beside a turned scar
    return after, places, colours[:, :2].astype(int)


def test_a_patch_is_a_rectangle_of_the_same_image() -> None:
    aspects: list[float] = []
    moves = []
    for seed in range(200):
        _, places, sources = pasted(tasks.with_patch, seed)
        if not len(places):  # by chance back to where it was cut
            continue
        (top, left), (bottom, right) = places.min(axis=0), places.max(axis=0)
        height, width = bottom - top + 1, right - left + 1
        assert len(places) == height * width
        assert len(np.unique(sources - places, axis=0)) == 1  # moved as a whole
        moves.append(sources[0] - places[0])
        part = height * width / (HEIGHT * WIDTH)
        assert 0.02 * 0.9 <= part <= 0.15 * 1.1  # sides are rounded to pixels
        aspects.append(width / height)
    assert len(aspects) > 195
    assert min(aspects) > 0.3 * 0.9 and max(aspects) < 3.3 * 1.1
    assert 60 < sum(aspect > 1 for aspect in aspects) < 140  # as often lying as standing
    assert (np.ptp(moves, axis=0) > (HEIGHT / 2, WIDTH / 2)).all()


def test_a_scar_is_thin_and_turned() -> None:
    """Sizes are the paper's for images of 256 pixels, here of 160."""
    scale = WIDTH / 256
    sizes, turned = [], 0
    for seed in range(200):
        _, places, sources = pasted(tasks.with_scar, seed)
        length, width = np.ptp(sources, axis=0) + 1
        # Turned by the nearest pixel, a scar of one or two pixels' width may lose its rim.
        assert 10 * scale * 0.7 - 1 <= length <= 25 * scale + 1
        assert width <= 16 * scale + 1
        sizes.append((length, width))
        assert len(places) <= 1.3 * (length + 1) * (width + 1)
        turned += len(np.unique(sources - places, axis=0)) > 1
    lengths, widths = zip(*sizes, strict=True)
    assert min(widths) <= 2 and max(widths) >= 9 and max(lengths) >= 14
    assert turned > 150


@pytest.mark.parametrize("paste", [tasks.with_patch, tasks.with_scar])
def test_only_what_is_pasted_is_recoloured(paste: Paste) -> None:
    torch.manual_seed(3)
    image = numbered()
    after = paste(image, torch.zeros_like)
    changed = (after != image).any(dim=0)
    assert 3 < changed.sum() < HEIGHT * WIDTH * 0.17
    assert (after[:, changed] == 0).all()


def test_turns_are_counter_clockwise() -> None:
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    for turn, part in enumerate(tasks.turned(images).chunk(4)):
        assert np.array_equal(part.numpy(), np.rot90(images.numpy(), turn, axes=(2, 3)))


class Pooled(nn.Module):
    """A trunk of three features: the mean colours of each 32 x 32 pixels."""

    width = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(images.float() / 255, 32)


class Mixed(Pooled):
    """A trunk that learns 16 mixtures of these."""

    width = 16

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 16, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.mix(super().forward(images))
        return mixed


class Ready(nn.Module):
    """Gives views that are known, one after the other."""

    def __init__(self, views: list[torch.Tensor]) -> None:
        super().__init__()
        self.views = iter(views)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return next(self.views)


def noise(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(count, 3, 1, 1, generator=generator) * 200
    return (means + 50 * torch.rand(count, 3, 64, 64, generator=generator)).byte()


def cross_entropy(logits: np.ndarray, truth: int) -> float:
    return float(np.log(np.exp(logits).sum()) - logits[truth])


def test_rotation_loss() -> None:
    head, images = nn.Linear(3, 4), noise(5, 0)
    loss = tasks.RotationTask(Pooled(), head)(images)  # type: ignore[arg-type]
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    expected = [
        cross_entropy(weight @ np.rot90(image, turn, (1, 2)).mean((1, 2)) / 255 + bias, turn)
        for image in images.numpy()
        for turn in range(4)
    ]
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_cutpaste_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches and scars are made recognisable: black and white images."""
    monkeypatch.setattr(tasks, "with_patch", lambda image, recolour: torch.zeros_like(image))
    monkeypatch.setattr(tasks, "with_scar", lambda image, recolour: torch.full_like(image, 255))
    task, images = tasks.CutPasteTask(Pooled()), noise(4, 1)  # type: ignore[arg-type]
    weight, bias = task.head.weight.detach().numpy(), task.head.bias.detach().numpy()
    expected = [cross_entropy(weight @ i.mean((1, 2)) / 255 + bias, 0) for i in images.numpy()]
    expected += [cross_entropy(bias, 1)] * 4 + [cross_entropy(weight.sum(axis=1) + bias, 2)] * 4
    assert task(images).item() == pytest.approx(np.mean(expected), rel=1e-5)


def unit(vectors: torch.Tensor) -> np.ndarray:
    array = vectors.detach().double().numpy()
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_simclr_loss_is_nt_xent() -> None:
    """Equation 1 of SimCLR, over all ordered pairs of views of one image."""
    torch.manual_seed(0)
    task = tasks.SimCLRTask(Mixed(), 64).eval()  # type: ignore[arg-type]
    views = [noise(4, 2), noise(4, 3)]
    projected = unit(task.head(torch.cat([task.trunk(view).mean((2, 3)) for view in views])))
    similarity = projected @ projected.T / 0.5
    losses = []
    for i in range(8):
        positive = (i + 4) % 8
        others = sum(math.exp(similarity[i, k]) for k in range(8) if k != i)
        losses.append(-math.log(math.exp(similarity[i, positive]) / others))
    task.views = Ready(views)  # type: ignore[assignment]
    assert task(views[0]).item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_moco_loss_and_momentum() -> None:
    """Equations 1 and 2 of MoCo: the queue holds the negatives, the slow encoder follows."""
    torch.manual_seed(0)
    task = tasks.MoCoTask(Mixed(), 64, queue=10)  # type: ignore[arg-type]
    views = [noise(4, seed) for seed in range(2, 6)]
    task.views = Ready(views)  # type: ignore[assignment]
    with torch.no_grad():
        for parameter in task.encoder.parameters():
            parameter.mul_(1.1)
    before = copy.deepcopy(task.slow)
    task(views[0])  # fills the first places of the queue
    for old, new, fast in zip(
        before.parameters(), task.slow.parameters(), task.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.99 * old + 0.01 * fast)
        assert not new.requires_grad
    queue = task.loss.memory_bank.bank.clone()
    keys = unit(task._project(task.slow, views[0]))
    assert queue.shape == (10, 128)
    np.testing.assert_allclose(queue[:4], keys, atol=1e-6)
    loss = task(views[0])
    keys, queries = (
        unit(task._project(*pair)) for pair in ((task.slow, views[2]), (task.encoder, views[3]))
    )
    negatives = unit(queue)
    losses = []
    for query, key in zip(queries, keys, strict=True):
        logits = np.array([query @ key, *(negatives @ query)]) / 0.2
        losses.append(cross_entropy(logits, 0))
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_views_differ_and_keep_their_size() -> None:
    torch.manual_seed(0)
    images = noise(3, 0)
    first, second = (tasks.Views(64)(images) for _ in range(2))
    assert first.shape == second.shape == images.shape
    assert first.dtype == torch.uint8
    assert not torch.equal(first, second)
