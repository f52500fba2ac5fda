"""Rendered datasets: determinism, layout, and masks that belong to their images."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest

from pipeline.config import SynthConfig
from pipeline.data.synth import PRODUCTS, render_dataset

SIZE = 160
KINDS = [(name, kind) for name, product in PRODUCTS.items() for kind in ("good", *product.defects)]


def _render(name: str, kind: str, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return PRODUCTS[name].render(kind, size, np.random.default_rng(seed))


def _files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.png")}


def test_every_product_can_be_asked_for() -> None:
    assert get_args(SynthConfig.model_fields["product"].annotation) == tuple(PRODUCTS)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_same_generator_same_bytes(name: str, kind: str) -> None:
    first, again, other = (_render(name, kind, SIZE, seed) for seed in (3, 3, 4))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("size", [64, 97])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_shapes_and_types(name: str, kind: str, size: int) -> None:
    image, mask = _render(name, kind, size, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert mask.shape == (size, size) and mask.dtype == bool
    assert mask.any() == (kind != "good")
    assert not mask.all()


@pytest.mark.parametrize(("name", "kind"), [pair for pair in KINDS if pair[1] != "good"])
def test_mask_keeps_its_place_at_another_size(name: str, kind: str) -> None:
    small, large = _render(name, kind, 192, 8)[1], _render(name, kind, 384, 8)[1]
    halved = cv2.resize(large.astype(np.float32), (192, 192), interpolation=cv2.INTER_AREA) >= 0.5
    assert (small & halved).sum() / (small | halved).sum() > 0.8


@pytest.mark.parametrize("name", PRODUCTS)
def test_unknown_kind_is_refused(name: str) -> None:
    with pytest.raises(KeyError):
        _render(name, "melted", SIZE, 0)


@pytest.mark.parametrize("name", PRODUCTS)
def test_dataset_layout(tmp_path: Path, name: str) -> None:
    defects = PRODUCTS[name].defects
    out = tmp_path / "deep" / name
    written = []
    render_dataset(
        out,
        product=name,
        train_good=3,
        test_good=2,
        per_defect=2,
        size=96,
        seed=5,
        on_image=lambda: written.append(1),
    )
    expected = {f"train/good/{i:03d}.png" for i in range(3)}
    expected |= {f"test/good/{i:03d}.png" for i in range(2)}
    expected |= {f"test/{d}/{i:03d}.png" for d in defects for i in range(2)}
    expected |= {f"ground_truth/{d}/{i:03d}_mask.png" for d in defects for i in range(2)}
    assert set(_files(out)) == expected
    assert len(written) == 3 + 2 + 2 * len(defects)
    assert [p.name for p in out.parent.iterdir()] == [name], "a temporary folder is left"
    for path in (out / "ground_truth").rglob("*.png"):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert mask.shape == (96, 96) and set(np.unique(mask)) == {0, 255}


def test_more_images_leave_the_earlier_ones_alone(tmp_path: Path) -> None:
    for name, count, seed in (("few", 2, 5), ("many", 4, 5), ("other", 2, 6)):
        render_dataset(
            tmp_path / name, train_good=count, test_good=count, per_defect=count, size=64, seed=seed
        )
    few, many, other = (_files(tmp_path / name) for name in ("few", "many", "other"))
    assert all(many[name] == data for name, data in few.items())
    assert all(other[name] != data for name, data in few.items())
    assert len(set(many.values())) == len(many), "two images are the same"


def test_worker_processes_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"train_good": 2, "test_good": 1, "per_defect": 1, "size": 64, "seed": 5}
    render_dataset(tmp_path / "alone", **counts)
    monkeypatch.setattr("pipeline.data.synth.dataset.POOL_FROM", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    render_dataset(tmp_path / "pool", **counts)
    assert _files(tmp_path / "alone") == _files(tmp_path / "pool")


def test_existing_dataset_is_left_alone(tmp_path: Path) -> None:
    size = {"test_good": 0, "per_defect": 0, "size": 64, "seed": 0}
    render_dataset(tmp_path / "set", train_good=1, **size)
    before = _files(tmp_path / "set")
    with pytest.raises(FileExistsError):
        render_dataset(tmp_path / "set", train_good=2, **size)
    assert _files(tmp_path / "set") == before
