"""What `pipeline overlay` writes, played in Chromium: the browser that people review it in."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest

from pipeline.data.writers import Chapter, create

COLOURS = [(30, 40, 200), (40, 180, 60), (200, 60, 40)]  # BGR: red, green, blue
MIME = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif"}

# Plays a video to its end; gives its size, its length, and the colour in the middle at each time.
PLAY = """async ([source, times]) => {
    const video = document.createElement('video');
    video.muted = true;
    video.src = source;
    document.body.append(video);
    const happens = (name) => new Promise((resolve, reject) => {
        video.addEventListener(name, resolve, {once: true});
        video.addEventListener('error', () => reject(new Error(video.error.message)));
    });
    const painted = async () => {
        for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);
    };
    await happens('loadeddata');
    const ended = happens('ended');
    await video.play();
    await ended;
    const canvas = document.createElement('canvas').getContext('2d');
    canvas.canvas.width = video.videoWidth;
    canvas.canvas.height = video.videoHeight;
    const colours = [];
    for (const time of times) {
        const seeked = happens('seeked');
        video.currentTime = time;
        await seeked;
        await painted();  // on a busy machine the frame comes after the event
        canvas.drawImage(video, 0, 0);
        const {videoWidth: w, videoHeight: h} = video;
        colours.push([...canvas.getImageData(w / 2, h / 2, 1, 1).data].slice(0, 3));
    }
    return {size: [video.videoWidth, video.videoHeight], seconds: video.duration, colours};
}"""

SHOW = """async (source) => {
    const image = new Image();
    image.src = source;
    await image.decode();
    const canvas = document.createElement('canvas').getContext('2d');
    canvas.drawImage(image, 0, 0);
    const colour = [...canvas.getImageData(20, 20, 1, 1).data].slice(0, 3);
    return {size: [image.naturalWidth, image.naturalHeight], colour};
}"""


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page of Debian's Chromium, which has H.264."""
    with chromium.launched() as browser:
        yield browser.new_page()


def written(path: Path, size: tuple[int, int]) -> str:
    """A video of three colours for half a second each, as a data URL."""
    chapters = [Chapter("one", 5), Chapter("two", 10)]
    with create(path, Fraction(10), chapters) as video:
        for colour in COLOURS:
            video.write(np.full((size[1], size[0], 3), colour, np.uint8), 5)
    return f"data:{MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("size", [(128, 96), (97, 65)])
def test_a_video_plays_to_its_end_in_its_colours(
    tmp_path: Path, page: Any, suffix: str, size: tuple[int, int]
) -> None:
    source = written(tmp_path / f"a{suffix}", size)
    found = page.evaluate(PLAY, [source, [0.25, 0.75, 1.25]])
    assert found["size"] == [size[0] + size[0] % 2, size[1] + size[1] % 2]
    assert found["seconds"] == pytest.approx(1.5, abs=0.11)
    shown = np.array(found["colours"])
    assert np.abs(shown[:, ::-1] - np.array(COLOURS)).max() <= 12


def test_a_gif_is_shown(tmp_path: Path, page: Any) -> None:
    found = page.evaluate(SHOW, written(tmp_path / "a.gif", (97, 65)))
    assert found["size"] == [97, 65]
    assert np.abs(np.array(found["colour"])[::-1] - COLOURS[0]).max() <= 3
