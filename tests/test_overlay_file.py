"""The review video as a file: how long, at what rate, with which chapters, of any container."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from filmed import (
    BOX,
    BY_CLASS,
    CLASSES,
    IMAGES,
    SIZE,
    configured,
    film,
    instance,
    level_of,
    verdict_of,
    write_data,
)

from pipeline.data import palette
from pipeline.data.files import read_json, write_json
from pipeline.data.predictions import write_predictions
from pipeline.data.video import frames, probe
from pipeline.data.writers import create
from pipeline.errors import UserError
from pipeline.stages import overlay


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("overlay")
    write_data(root, IMAGES)
    return root


def belt(root: Path, levels: list[int]) -> Path:
    """A video of 24 frames a second, and predictions without instances for it."""
    source = root / "belt.mp4"
    with create(source, Fraction(24)) as video:
        for level in levels:
            video.write(np.full((SIZE, SIZE, 3), level, np.uint8))
    images = [
        {"id": i, "file_name": f"belt_{i - 1:06d}", "width": SIZE, "height": SIZE}
        for i in range(1, len(levels) + 1)
    ]
    write_predictions(root / "predictions", [], images, CLASSES)
    return source


def chapters(path: Path) -> list[tuple[str, float, float]]:
    with av.open(str(path)) as container:
        found = container.chapters()
    return [
        (c["metadata"]["title"], round(float(c["start"] * c["time_base"]), 2),
         round(float(c["end"] * c["time_base"]), 2))
        for c in found
    ]  # fmt: skip


def test_how_long_an_image_stays(root: Path, tmp_path: Path) -> None:
    for seconds, count in [(0.1, 1), (1.0, 10), (0.25, 2)]:
        out = tmp_path / f"{seconds}.mp4"
        overlay.run(configured(root, out, seconds_per_image=seconds))
        info = probe(out)
        assert info.frames == 9 * count
        assert float(info.frames / info.fps) == pytest.approx(9 * seconds)


@pytest.mark.parametrize(
    ("fps", "seconds", "frames_per_image", "rate"),
    [(25.0, 1.0, 25, 25), (29.97, 0.5, 15, Fraction(2997, 100)), (2.0, 0.5, 1, 2)],
)
def test_a_given_rate(
    root: Path, tmp_path: Path, fps: float, seconds: float, frames_per_image: int, rate: Fraction
) -> None:
    out = tmp_path / "a.mp4"
    overlay.run(configured(root, out, fps=fps, seconds_per_image=seconds))
    info = probe(out)
    assert info.frames == 9 * frames_per_image
    assert float(info.fps) == pytest.approx(float(rate), rel=1e-3)


def test_a_video_keeps_its_frame_rate(tmp_path: Path) -> None:
    source = tmp_path / "belt.mp4"
    levels = [40, 100, 160, 200]
    with create(source, Fraction(24)) as video:
        for level in levels:
            video.write(np.full((SIZE, SIZE, 3), level, np.uint8))
    names = [f"belt_{i:06d}" for i in range(4)]
    images = [
        {"id": i, "file_name": name, "width": SIZE, "height": SIZE}
        for i, name in enumerate(names, start=1)
    ]
    result = instance(2, 0, BOX) | {"score": 0.9}
    write_predictions(tmp_path / "predictions", [result], images, CLASSES)
    out = tmp_path / "a.mp4"
    shown = film(tmp_path, out, source=source)
    assert probe(out).fps == 24
    assert [level_of(image) for image in shown] == levels
    crack = np.array(palette.CLASS_COLOURS.by_idx(0).as_bgr())
    marked = [(np.abs(image[60:190].astype(int) - crack).max(axis=2) < 40).sum() for image in shown]
    assert marked[1] > 100 and marked[0] == marked[2] == marked[3] == 0


@pytest.mark.parametrize(("fps", "count"), [(12.0, 12), (24.0, 24), (48.0, 48), (1.0, 1)])
def test_a_video_lasts_as_long_at_another_rate(tmp_path: Path, fps: float, count: int) -> None:
    source = belt(tmp_path, [100] * 24)
    out = tmp_path / "a.mp4"
    overlay.run(configured(tmp_path, out, source=source, fps=fps))
    assert (probe(out).frames, probe(out).fps) == (count, fps)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("crack", 0, 0.3), ("stain", 0.3, 0.5), ("good", 0.5, 0.9)]),
        (
            {"order": "worst", "only": "errors"},
            [("misses and wrong classes", 0, 0.3), ("false alarms", 0.3, 0.5)],
        ),
        ({"order": "worst", "only": "class=good"}, [("correct", 0, 0.2)]),
        ({"order": "file"}, [("crack", 0, 0.3), ("good", 0.3, 0.7), ("stain", 0.7, 0.9)]),
        ({"order": "score"}, []),
        ({"title_seconds": 2.0}, [("title", 0, 2), ("crack", 2, 2.3), ("stain", 2.3, 2.5),
                                  ("good", 2.5, 2.9)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_chapters(
    root: Path, tmp_path: Path, options: dict[str, Any], expected: list[Any], suffix: str
) -> None:
    overlay.run(configured(root, tmp_path / f"a{suffix}", **options))
    assert chapters(tmp_path / f"a{suffix}") == expected


def test_the_title_card_says_what_was_measured(root: Path, tmp_path: Path) -> None:
    """Each of name, source, figures and verdicts changes the card; the picture has its size."""

    def card(**options: Any) -> np.ndarray:
        out = tmp_path / "frames"
        overlay.run(configured(root, out, title_seconds=1.0, force=True, **options))
        assert len(list(out.glob("*.png"))) == 10
        image = cv2.imread(str(out / "000001.png"))
        assert image.shape == cv2.imread(str(out / "000002.png")).shape
        return image

    def evaluation(value: float) -> Path:
        metrics = {"box": {"map50": value}, "mask": None, "missed": [{}], "instances": 3}
        write_json(tmp_path / "evaluation" / "metrics.json", metrics)
        return tmp_path / "evaluation"

    plain = card(title="run 7")
    assert (plain == card(title="run 7")).all()
    assert (plain != card(title="run 8")).any()
    one, other = (card(title="run 7", evaluation=evaluation(v)) for v in (0.25, 0.75))
    changed = np.nonzero((one != other).any(axis=2))
    assert changed[0].max() - changed[0].min() < 20  # one line, and the end of it
    assert changed[1].max() - changed[1].min() < 40
    misses = np.abs(plain.astype(int) - palette.VERDICT_COLOURS["miss"].as_bgr()).max(axis=2) < 3
    assert misses.sum() > 100  # the pill that counts them


@pytest.mark.parametrize("layout", ["side-by-side", "blink"])
def test_one_image(tmp_path: Path, layout: str) -> None:
    write_data(tmp_path, IMAGES[:1])
    shown = film(tmp_path, tmp_path / "a.mp4", layout=layout, title_seconds=0.5)
    assert level_of(shown[-1]) == 40
    assert [name for name, _, _ in chapters(tmp_path / "a.mp4")] == ["title", "crack"]


def test_images_of_several_sizes_make_one_video(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    sizes = [(64, 64), (200, 50), (50, 200), (7, 5)]
    for i, (width, height) in enumerate(sizes):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((height, width, 3), 100, np.uint8))
    images = [
        {"id": i, "file_name": f"{i}.png", "width": width, "height": height}
        for i, (width, height) in enumerate(sizes)
    ]
    write_predictions(tmp_path / "predictions", [], images, CLASSES)
    assert len({image.shape for image in film(tmp_path, tmp_path / "a.mp4", source=folder)}) == 1


def test_a_recording_held_upright_is_shown_upright(tmp_path: Path) -> None:
    """The matrix of `tkhd` that turns clockwise, as in tests/test_video.py."""
    source = belt(tmp_path, [100] * 4)
    image = np.full((96, 128, 3), 30, np.uint8)
    image[:, :64] = 220  # the left half, which a turn makes the upper one
    with create(source, Fraction(24)) as video:
        for _ in range(4):
            video.write(image)
    data = bytearray(source.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    turned = [0, 0x10000, 0, 0xFFFF0000, 0, 0, 0, 0, 0x40000000]
    data[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big") for n in turned)
    source.write_bytes(data)
    coco = read_json(tmp_path / "predictions" / "images.json")
    for entry in coco["images"]:
        entry |= {"width": 96, "height": 128}
    write_json(tmp_path / "predictions" / "images.json", coco)
    frame = film(tmp_path, tmp_path / "a.mp4", source=source)[0]
    panel = frame[60:240].astype(int)
    middle = panel[:, frame.shape[1] // 2].mean(axis=1)
    assert middle[:60].min() > 200 and middle[-60:].max() < 50
    assert frame.shape[0] > frame.shape[1]


@pytest.mark.parametrize("name", ["a.webm", "a.gif", "a"])
def test_other_containers_show_the_same(root: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    overlay.run(configured(root, out))
    images = [f.image for f in frames(out)][: len(BY_CLASS)]
    assert [level_of(image) for image in images] == BY_CLASS
    verdicts = {level: verdict for _, level, _, _, verdict in IMAGES}
    assert [verdict_of(image) for image in images] == [verdicts[level] for level in BY_CLASS]
    with pytest.raises(UserError, match="--force"):
        overlay.run(configured(root, out))
    overlay.run(configured(root, out, force=True, only="class=good"))
    assert len(list(frames(out))) in (2, 3)  # GIF repeats its last


def test_an_existing_video_is_kept_or_replaced(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    out.write_bytes(b"old")
    with pytest.raises(UserError, match="--force"):
        overlay.run(configured(root, out))
    assert out.read_bytes() == b"old"
    overlay.run(configured(root, out, force=True))
    assert probe(out).frames == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "a.mp4.json"]


def test_a_folder_of_other_things_is_kept(root: Path, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "holiday.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="found other files"):
        overlay.run(configured(root, tmp_path / "frames", force=True))
    assert (tmp_path / "frames" / "holiday.png").read_bytes() == b"mine"


def test_ended_half_way_it_leaves_nothing(root: Path, tmp_path: Path) -> None:
    """A kill that cannot be caught is in tests/test_video.py: a video has no name until its end."""
    out = tmp_path / "frames"
    words = ["--source", root / "data", "--predictions", root / "predictions", "--out", out]
    command = [sys.executable, "-m", "pipeline", "overlay", "--height", 1440, *words]
    log = tmp_path.with_name("overlay.log")
    with log.open("w") as file:
        process = subprocess.Popen([str(word) for word in command], stderr=file)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".frames-*/000002.png")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        assert process.wait(30) == 143, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """An image is 30 kB here, its masks 10 kB each: kept, 100 more would be 1 MB at least."""

    def peak(count: int) -> int:
        root = tmp_path / str(count)
        write_data(root, [(f"crack__{i:03d}.png", 90, *IMAGES[0][2:]) for i in range(count)])
        config = configured(root, root / "a.mp4", height=128, order="worst")
        tracemalloc.start()
        overlay.run(config)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(3)  # fonts and imports
    assert peak(120) - peak(20) < 800_000
