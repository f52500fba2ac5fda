"""Frames in, one at a time: memory does not grow with their number."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.data.files import list_images, read_image
from pipeline.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Frame:
    """An image of a folder or a frame of a video. Ids count from 1 in the order of the source."""

    image_id: int
    name: str  # the file's name, or <video stem>_000123 with the frame's index from 0
    image: np.ndarray  # (height, width, 3) uint8 BGR


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video file says."""

    codec: str
    pixel_format: str
    width: int
    height: int
    fps: Fraction
    frames: int  # 0: the file does not say


def frames(source: Path) -> Iterator[Frame]:
    """The images of a folder, by name, or the frames of a video.

    Raises `UserError` when there are none, or one cannot be decoded.
    """
    if source.is_dir():
        paths = list_images(source)
        if not paths:
            raise UserError(f"{source}: expected a folder of images, found none in it")
        for image_id, path in enumerate(paths, start=1):
            yield Frame(image_id, path.name, read_image(path))
        return
    index = -1
    with _open_video(source) as (container, stream):
        stream.thread_type = "AUTO"
        try:
            for index, frame in enumerate(_decoded(source, container, stream)):
                # The turn that players apply to, say, a telephone's upright recording.
                image = np.rot90(frame.to_ndarray(format="bgr24"), frame.rotation // 90)
                name = f"{source.stem}_{index:06d}"
                yield Frame(index + 1, name, np.ascontiguousarray(image))
        except av.FFmpegError as error:
            raise UserError(
                f"{source}: frame {index + 1}: expected a frame, found {error}"
            ) from None
    if index < 0:
        raise UserError(f"{source}: expected a video with frames, found none in it")


def _decoded(
    source: Path, container: av.container.InputContainer, stream: VideoStream
) -> Iterator[VideoFrame]:
    """The frames. Raises `UserError` where the file is cut short: FFmpeg would just end there."""
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise UserError(f"{source}: expected whole frames, found the end inside of one")
        yield from packet.decode()


def count_frames(source: Path) -> int | None:
    """How many frames `frames` will give; None if the video does not say beforehand."""
    return len(list_images(source)) if source.is_dir() else probe(source).frames or None


def ahead(items: Iterable[T], count: int = 2) -> Iterator[T]:
    """The items, of which a thread makes the next `count` while the last one is in use."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming: deque[Any] = deque(pool.submit(next, iterator, end) for _ in range(count))
        while (item := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, iterator, end))
            yield item


def probe(path: Path) -> VideoInfo:
    """Read the header of a video. Raises `UserError` when it is missing or not a video."""
    with _open_video(path) as (_, stream):
        context = stream.codec_context
        return VideoInfo(
            context.name,
            context.pix_fmt or "",
            context.width,
            context.height,
            Fraction(stream.average_rate or stream.guessed_rate or 25),
            stream.frames,
        )


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, VideoStream]]:
    if not path.exists():
        raise UserError(f"{path}: expected a folder of images or a video, found nothing there")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: expected a video, found {error}") from None
    with container:
        if not container.streams.video:
            raise UserError(f"{path}: expected a video, found a file without a video stream")
        yield container, container.streams.video[0]
