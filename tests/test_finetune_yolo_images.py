"""`pipeline finetune-yolo`: which images the network is shown, how changed, and how often."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mvtec_tree import write_tree
from spots import SIDE, begin, config, converted, shown, write_dataset

from pipeline.data.augment import vary_light
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.files import read_json, write_json
from pipeline.models.yolo_trainer import BalancedSampler, PromptTrainer, few_shot

# Ultralytics is imported after our modules, which keep it to themselves.
from ultralytics.data import base as ultralytics_base  # isort: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def pixel_boxes(item: dict[str, Any]) -> np.ndarray:
    """(n, 4): left, top, width and height."""
    boxes = item["bboxes"].numpy() * SIDE
    boxes[:, :2] -= boxes[:, 2:] / 2
    return boxes


def gaps(a: Any, b: Any) -> np.ndarray:
    """Distances between the four sides of two boxes, each left, top, width, height."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    return np.array([ax - bx, ay - by, ax + aw - bx - bw, ay + ah - by - bh])


# ---------------------------------------------------------------- labels, augmentation


def test_labels_are_the_coco_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of awkward images: grey, 16 bit, many formats and shapes, several instances or one pixel."""
    root = converted(write_tree(tmp_path / "widget"), tmp_path / "data", (0.5, 0.5, 0.0))
    counts = []
    for mode in ("train", "val"):
        coco = read_json(root / "annotations" / f"instances_{mode}.json")
        dataset = shown(root, tmp_path / mode, monkeypatch, mode, augment=False)
        assert len(dataset) == len(coco["images"]) > 0
        for index, entry in enumerate(coco["images"]):
            label = dataset.labels[index]
            assert Path(label["im_file"]).name == entry["file_name"]
            truth = [a for a in coco["annotations"] if a["image_id"] == entry["id"]]
            size = np.array([entry["width"], entry["height"]] * 2)
            boxes = label["bboxes"] * size
            boxes[:, :2] -= boxes[:, 2:] / 2
            np.testing.assert_allclose(
                boxes, np.array([a["bbox"] for a in truth]).reshape(-1, 4), atol=1e-4
            )
            assert label["cls"].ravel().tolist() == [a["category_id"] - 1 for a in truth]
            pixels = dataset.load_image(index)[0]
            picture = Dataset(root).split(mode)[index].image()
            expected = cv2.resize(picture, pixels.shape[1::-1], interpolation=cv2.INTER_LINEAR)
            assert np.array_equal(pixels, expected), entry["file_name"]
            counts.append(len(truth))
    assert 0 in counts and 1 in counts and 2 in counts
    assert not list(root.rglob("*.cache"))


@pytest.mark.parametrize("mode", ["train", "val"])
def test_without_augmentation_images_are_only_padded(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    samples = Dataset(dataset).split(mode)
    for item, sample in zip(
        shown(dataset, tmp_path, monkeypatch, mode, augment=False), samples, strict=True
    ):
        picture = item["img"].numpy()[::-1].transpose(1, 2, 0)  # RGB (3, h, w) to BGR (h, w, 3)
        assert np.array_equal(picture[8:56], sample.image())
        assert (picture[:8] == 114).all() and (picture[56:] == 114).all()
        expected = np.array([a["bbox"] for a in sample.annotations]).reshape(-1, 4)
        np.testing.assert_allclose(pixel_boxes(item) - [0, 8, 0, 0], expected, atol=1e-3)


def test_augmentation_keeps_boxes_and_classes_in_step(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = shown(dataset, tmp_path, monkeypatch, "train")
    drawn = 0
    changed = 0
    for _ in range(15):
        for item, sample in zip(items, Dataset(dataset).split("train"), strict=True):
            picture = item["img"].numpy().transpose(1, 2, 0)
            grey = cv2.medianBlur(picture.mean(2).astype(np.uint8), 3).astype(int)
            changed += not np.array_equal(picture[8:56, :, ::-1], sample.image())
            contrast = grey - np.median(grey)
            for box, cls in zip(pixel_boxes(item), item["cls"].ravel().tolist(), strict=True):
                if min(box[2:]) < 5:
                    continue  # a sliver at the border, which the blur may remove
                spot = (contrast > 30) if cls == 0 else (contrast < -30)
                _count, components = cv2.connectedComponents(spot.astype(np.uint8))
                x, y, w, h = box.round().astype(int)
                inside = components[y : y + h, x : x + w]
                inside = inside[inside > 0]
                assert len(inside), "the box holds a spot of its class"
                rows, columns = np.nonzero(components == np.bincount(inside).argmax())
                left, top = columns.min(), rows.min()
                extent = [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
                assert np.abs(gaps(extent, box)).max() <= 2, (box, extent)
                drawn += 1
    assert drawn > 100
    assert changed > 150  # of 180


def test_augmentation_is_seeded(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again, other = (
        torch.stack([x["img"] for x in shown(dataset, tmp_path / n, monkeypatch, "train", seed=s)])
        for n, s in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_light_varies_by_the_generator_alone() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    varied = [vary_light(picture, np.random.default_rng(seed)) for seed in range(300)]
    again = [vary_light(picture, np.random.default_rng(seed)) for seed in range(300)]
    assert all(np.array_equal(a, b) for a, b in zip(varied, again, strict=True))
    assert all(v.shape == picture.shape and v.dtype == np.uint8 for v in varied)
    unchanged = sum(np.array_equal(v, picture) for v in varied)
    assert 30 < unchanged < 80  # 300 * 0.5 * 0.7 * 0.8**3 = 54, if each is drawn by itself


# ---------------------------------------------------------------- pasted defects


def test_defects_are_pasted_on_good_training_images_alone(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And come with labels: the boxes hold what differs from the good image."""
    changes = {"paste": 1.0, "free_pose": True}
    items = shown(dataset, tmp_path / "a", monkeypatch, "train", **changes)
    pasted = 0
    for index, sample in enumerate(Dataset(dataset).split("train")):
        before, label = sample.image(), items.get_image_and_label(index)
        if sample.annotations:
            assert np.array_equal(label["img"], before)
            assert len(label["cls"]) == len(sample.annotations)
            continue
        assert np.array_equal(items.load_image(index)[0], before), "the cache stays as it is"
        boxes = label["instances"].bboxes * [64, 48, 64, 48]
        for (x, y, width, height), cls in zip(boxes, label["cls"].ravel(), strict=True):
            left, top = round(x - width / 2), round(y - height / 2)
            grey = label["img"].mean(axis=2)
            spot = grey > 185 if cls == 0 else grey < 60
            inside = np.zeros_like(spot)
            inside[top : top + round(height), left : left + round(width)] = True
            _, found = cv2.connectedComponents((spot & inside).astype(np.uint8))
            assert np.abs(gaps(cv2.boundingRect((found > 0).astype(np.uint8)),
                               (left, top, width, height))).max() <= 2  # fmt: skip
            pasted += 1
    assert pasted >= 3


def test_only_training_images_are_cut(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = Dataset(dataset).split("train")
    opened: list[str] = []
    imread = ultralytics_base.imread

    def watch(path: str, *rest: Any, **options: Any) -> Any:
        opened.append(Path(path).name)
        return imread(path, *rest, **options)

    monkeypatch.setattr(ultralytics_base, "imread", watch)
    items = shown(dataset, tmp_path / "a", monkeypatch, "train", paste=0.5)
    assert set(opened) == {sample.path.name for sample in samples}
    assert len(items._cuttings) == sum(len(sample.annotations) for sample in samples) > 0


@pytest.mark.parametrize(
    ("mode", "changes"),
    [("val", {"paste": 1.0}), ("train", {"paste": 0.0}), ("train", {"augment": False})],
)
def test_nothing_is_pasted_on_what_is_measured_or_unless_asked(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    changes: dict[str, Any],
) -> None:
    items = shown(dataset, tmp_path, monkeypatch, mode, **changes)
    for index, sample in enumerate(Dataset(dataset).split(mode)):
        for _ in range(3):
            label = items.get_image_and_label(index)
            assert np.array_equal(label["img"], sample.image())
            assert len(label["cls"]) == len(sample.annotations)


# ---------------------------------------------------------------- balanced epochs, few shots

LABELS = [-1] * 31 + [0] * 3 + [1] * 5 + [-1] * 10 + [2]  # 50 images


@given(defective=st.floats(0.05, 0.95), seed=st.integers(0, 9), epochs=st.integers(1, 40))
@settings(max_examples=40)
def test_epochs_are_balanced(defective: float, seed: int, epochs: int) -> None:
    sampler = BalancedSampler(LABELS, defective, seed)
    counts = np.zeros(len(LABELS), int)
    for _ in range(epochs):
        drawn = list(sampler)
        assert len(drawn) == len(sampler) == len(LABELS)
        assert sum(LABELS[i] >= 0 for i in drawn) == round(defective * len(LABELS))
        np.add.at(counts, drawn, 1)
    labels = np.array(LABELS)
    for label in (-1, 0, 1, 2):  # an image as often as any other of its class
        assert np.ptp(counts[labels == label]) <= 1
    assert np.ptp([counts[labels == label].sum() for label in (0, 1, 2)]) <= 1


@given(defective=st.floats(0.05, 0.95), seed=st.integers(0, 9), epochs=st.integers(1, 40))
@settings(max_examples=15)
def test_good_images_with_hard_negatives_are_shown_three_times_as_often(
    defective: float, seed: int, epochs: int
) -> None:
    hard = [i in (0, 7, 31, 34) for i in range(len(LABELS))]  # two of them are good images
    sampler = BalancedSampler(LABELS, defective, seed, hard)
    labels, counts = np.array(LABELS), np.zeros(len(LABELS), int)
    for _ in range(epochs):
        drawn = list(sampler)
        assert sum(LABELS[i] >= 0 for i in drawn) == round(defective * len(LABELS))
        np.add.at(counts, drawn, 1)
    good = np.flatnonzero(labels < 0)
    turns = np.where(np.isin(good, (0, 7)), 3, 1)  # in a round of 45 turns: 41 images and 2 x 2
    rounds, rest = divmod(int(counts[good].sum()), 45)
    assert (counts[good] >= rounds * turns).all() and (counts[good] <= (rounds + 1) * turns).all()
    if rest == 0:
        assert (counts[good] == rounds * turns).all()
    for label in (0, 1, 2):  # of defective images nothing changes
        assert np.ptp(counts[labels == label]) <= 1


def test_without_hard_negatives_epochs_are_as_they_were() -> None:
    with_none = BalancedSampler(LABELS, 0.5, 3, [False] * len(LABELS))
    assert list(with_none) == list(BalancedSampler(LABELS, 0.5, 3))


def test_epochs_differ_and_can_be_repeated() -> None:
    sampler, other = (BalancedSampler(LABELS, 0.5, seed) for seed in (0, 1))
    epochs = [list(sampler) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    sampler.epoch = 1  # as when a training goes on
    assert [list(sampler), list(sampler)] == epochs[1:]
    assert list(other) != epochs[0]


def test_processes_share_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(BalancedSampler(LABELS, 0.5, 0))
    parts = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        sampler = BalancedSampler(LABELS, 0.5, 0)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == 17
    together = [i for images in zip(*parts, strict=True) for i in images]
    assert together[:50] == whole and together[50:] == whole[:1]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_shows_balanced_epochs(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    given = begin(monkeypatch, config(dataset, tmp_path, defective=0.75, paste=0.0))
    trainer = PromptTrainer(overrides=given | {"workers": workers, "mosaic": 0.0})
    loader = trainer.get_dataloader("", batch_size=4, rank=-1)
    labels = {str(s.path): s.label for s in Dataset(dataset).split("train")}
    good: set[str] = set()
    for _ in range(4):
        files = [file for batch in loader for file in batch["im_file"]]
        assert (
            sorted(labels[file] for file in files) == [-1] * 3 + [0] * 4 + [1] * 5
            or sorted(labels[file] for file in files) == [-1] * 3 + [0] * 5 + [1] * 4
        )
        good |= {file for file in files if labels[file] < 0}
    assert len(good) == 4
    loader.close()
    assert trainer.balance is not None
    trainer.train_loader, trainer.epoch = loader, 2
    trainer._close_dataloader_mosaic()  # workers may have begun epoch 4
    assert trainer.balance.epoch == 2


def test_loader_shows_what_was_rejected_more_often(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four good training images, one has a hard negative: half of what good ones are shown."""
    reviewed = tmp_path / "reviewed"
    shutil.copytree(dataset, reviewed)
    good = [s for s in Dataset(reviewed).split("train") if s.label < 0]
    defective = next(s for s in Dataset(reviewed).split("train") if s.label >= 0)
    rejected = {"category_id": 1, "bbox": [1, 1, 5, 5], "score": 0.5}
    write_json(
        reviewed / "hard_negatives.json",
        [{"image_id": s.image_id, **rejected} for s in (good[1], defective)],
    )
    given = begin(monkeypatch, config(reviewed, tmp_path / "out", paste=0.0))
    trainer = PromptTrainer(overrides=given | {"workers": 0, "mosaic": 0.0})
    loader = trainer.get_dataloader("", batch_size=4, rank=-1)
    files = [file for _ in range(6) for batch in loader for file in batch["im_file"]]
    counts = {s.path.name: files.count(str(s.path.resolve())) for s in good}
    assert len(good) == 4 and sum(counts.values()) == 36  # half of 12 images in 6 epochs
    assert counts == {s.path.name: 18 if s is good[1] else 6 for s in good}


def test_fewer_shots_are_a_part_of_more_and_good_images_stay() -> None:
    samples = [
        Sample(i, Path(f"{i}.png"), 64, 48, ({"category_id": label + 1, "area": 1},) * (label >= 0))
        for i, label in enumerate(LABELS)
    ]
    first: set[int] = set()
    for seed in range(9):
        fewer: set[int] = set()
        for shots in (1, 2, 4, 9):
            chosen = [sample.image_id for sample in few_shot(samples, shots, seed)]
            assert chosen == sorted(chosen)
            for label, images in ((-1, 41), (0, 3), (1, 5), (2, 1)):
                found = sum(LABELS[i] == label for i in chosen)
                assert found == (images if label < 0 else min(shots, images))
            assert fewer < set(chosen)
            fewer = set(chosen)
        assert chosen == list(range(50))
        first |= {s.image_id for s in few_shot(samples, 1, seed) if s.label == 1}
    assert len(first) > 1, "another seed chooses others"


def test_training_sees_so_many_shots(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(dataset, tmp_path, shots=1, defective=0.0)
    trainer = PromptTrainer(overrides=begin(monkeypatch, given) | {"workers": 0})
    loader = trainer.get_dataloader("", batch_size=4, rank=-1)
    labels = {str(s.path): s.label for s in Dataset(dataset).split("train")}
    files = [file for batch in loader for file in batch["im_file"]]
    assert sorted(labels[file] for file in files) == [-1] * 4 + [0, 1]
    assert len(trainer.build_dataset("", "val")) == len(Dataset(dataset).split("val"))


@pytest.mark.parametrize(("mode", "changes"), [("train", {"defective": 0.0}), ("val", {})])
def test_each_image_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, changes: Any
) -> None:
    trainer = PromptTrainer(
        overrides=begin(monkeypatch, config(dataset, tmp_path, **changes)) | {"workers": 0}
    )
    loader = trainer.get_dataloader("", batch_size=4, rank=-1, mode=mode)
    files = sorted(Path(file).name for batch in loader for file in batch["im_file"])
    assert files == sorted(sample.path.name for sample in Dataset(dataset).split(mode))
