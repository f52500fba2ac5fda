"""The procedural data set: determinism, layout, and masks that mark what was drawn."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.data.synth import DEFECTS, mask_of, render, render_dataset, scenes
from pipeline.data.synth_draw import coverage, lead_shape, paint

SIZE = 160


def _difference(kind: str, seed: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Grey-level change the defect makes (size, size) and its mask."""
    good, scene = scenes(kind, np.random.default_rng(seed))
    before, after = paint(good, size).astype(int), paint(scene, size).astype(int)
    return np.abs(after - before).max(axis=2), mask_of(kind, good, scene, size)


def _files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.png")}


@pytest.mark.parametrize("kind", ("good", *DEFECTS))
def test_same_generator_same_bytes(kind: str) -> None:
    first = render(kind, SIZE, np.random.default_rng(3))
    again = render(kind, SIZE, np.random.default_rng(3))
    other = render(kind, SIZE, np.random.default_rng(4))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("size", (97, 160, 224))
@pytest.mark.parametrize("kind", ("good", *DEFECTS))
def test_shapes_and_types(kind: str, size: int) -> None:
    image, mask = render(kind, size, np.random.default_rng(size))
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert mask.shape == (size, size) and mask.dtype == bool
    assert mask.any() == (kind != "good")
    assert not mask.all()


@pytest.mark.parametrize("kind", DEFECTS)
def test_mask_keeps_its_place_at_another_size(kind: str) -> None:
    small = render(kind, 128, np.random.default_rng(8))[1]
    large = render(kind, 256, np.random.default_rng(8))[1]
    halved = cv2.resize(large.astype(np.float32), (128, 128), interpolation=cv2.INTER_AREA) >= 0.5
    assert (small & halved).sum() / (small | halved).sum() > 0.85


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(KeyError):
        render("melted", SIZE, np.random.default_rng(0))


@pytest.mark.parametrize("kind", ("bent_lead", "cut_lead", "damaged_case"))
@pytest.mark.parametrize("seed", range(8))
def test_mask_marks_what_changed(kind: str, seed: int) -> None:
    change, mask = _difference(kind, seed)
    assert change[mask].mean() > 12, "the defect can hardly be seen"
    near = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert change[~near].mean() < 0.2, "something else changed too"
    assert (change[~near] > 40).mean() < 0.0005
    drawn = change > 20
    assert drawn.any()
    assert (drawn & near).sum() > 0.94 * drawn.sum()  # the rest is its shadow


@pytest.mark.parametrize("seed", range(6))
def test_misplaced_mask_covers_the_part_before_and_after(seed: int) -> None:
    change, mask = _difference("misplaced", seed)
    assert mask.mean() > 0.25
    strong = change > 60
    assert strong.mean() > 0.04, "the part has hardly moved"
    assert (strong & mask).sum() > 0.8 * strong.sum()


def test_misplaced_includes_an_absent_part() -> None:
    absent = [scenes("misplaced", np.random.default_rng(s))[1].part is None for s in range(40)]
    assert 0 < sum(absent) < 20


@pytest.mark.parametrize("seed", range(8))
def test_cut_lead_mask_holds_a_hole_and_no_metal(seed: int) -> None:
    good, scene = scenes("cut_lead", np.random.default_rng(seed))
    mask = mask_of("cut_lead", good, scene, SIZE)
    assert scene.part is not None and good.part is not None
    metal = coverage([p for lead in scene.part.leads for p in lead_shape(lead)], SIZE)
    assert not (mask & (metal > 0)).any()
    cut = [i for i, lead in enumerate(scene.part.leads) if lead.cut]
    assert cut
    for i in cut:
        column, row = (scene.board.hole(i - 1) * SIZE).astype(int)
        assert mask[row, column]
        whole = coverage(lead_shape(good.part.leads[i]), SIZE) > 0
        kept = coverage(lead_shape(scene.part.leads[i]), SIZE) > 0
        assert kept.sum() < 0.8 * whole.sum()


def test_defects_vary() -> None:
    def changed(seed: int) -> tuple[int, ...]:
        good, scene = scenes("bent_lead", np.random.default_rng(seed))
        assert good.part is not None and scene.part is not None
        pairs = zip(good.part.leads, scene.part.leads, strict=True)
        return tuple(i for i, (a, b) in enumerate(pairs) if a is not b)

    assert {(0,), (1,), (2,)} < {changed(seed) for seed in range(60)}  # and pairs of leads


def test_data_set_layout(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "transistor"
    written = []
    render_dataset(
        out,
        train_good=3,
        test_good=2,
        per_defect=2,
        size=96,
        seed=5,
        on_image=lambda: written.append(1),
    )
    expected = {f"train/good/{i:03d}.png" for i in range(3)}
    expected |= {f"test/good/{i:03d}.png" for i in range(2)}
    expected |= {f"test/{d}/{i:03d}.png" for d in DEFECTS for i in range(2)}
    expected |= {f"ground_truth/{d}/{i:03d}_mask.png" for d in DEFECTS for i in range(2)}
    assert set(_files(out)) == expected
    assert len(written) == 3 + 2 + 2 * len(DEFECTS)
    assert [p.name for p in out.parent.iterdir()] == ["transistor"], "a temporary folder is left"
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
    monkeypatch.setattr("pipeline.data.synth.POOL_FROM", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    render_dataset(tmp_path / "pool", **counts)
    assert _files(tmp_path / "alone") == _files(tmp_path / "pool")


def test_existing_folder_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    with pytest.raises(FileExistsError):
        render_dataset(out, train_good=1, test_good=0, per_defect=0, size=64, seed=0)
    assert list(out.iterdir()) == []


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        render_dataset(
            tmp_path / "set",
            train_good=2,
            test_good=0,
            per_defect=0,
            size=64,
            seed=0,
            on_image=fail,
        )
    assert list(tmp_path.iterdir()) == []
