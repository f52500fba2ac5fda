"""A rendered dataset in the layout of MVTec AD: folders, masks and worker processes."""

from __future__ import annotations

import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.synth import leather, parts, transistor

Render = Callable[[str, int, np.random.Generator], tuple[NDArray[np.uint8], NDArray[np.bool_]]]


@dataclass(frozen=True)
class Product:
    """What can be rendered.

    ``render`` takes "good" or a defect, the size in pixels and a generator. It returns the image
    (size, size, 3) uint8 in BGR order and the mask (size, size) bool, which is empty exactly for
    "good".
    """

    defects: tuple[str, ...]
    render: Render


PRODUCTS = {
    "transistor": Product(transistor.DEFECTS, transistor.render),
    "leather": Product(leather.DEFECTS, leather.render),
    "parts": Product(parts.DEFECTS, parts.render),
}
POOL_FROM = 64  # images from which starting worker processes pays
_Job = tuple[Path, str, str, int, int, int]  # what `_write` takes


def _nothing() -> None:
    """Default progress callback."""


def render_dataset(
    out: Path,
    *,
    product: str = "transistor",
    train_good: int,
    test_good: int,
    per_defect: int,
    size: int,
    seed: int,
    on_image: Callable[[], None] = _nothing,
) -> None:
    """Writes a dataset of one of PRODUCTS in MVTec layout to ``out``.

    Each image depends on the seed, its folder and its number alone, so a larger set begins with
    the images of a smaller one. ``on_image`` is called once for every image written. Raises
    ``FileExistsError`` where there is a dataset already.
    """
    out = Path(out)
    defects = PRODUCTS[product].defects
    counts = {"train/good": train_good, "test/good": test_good}
    counts |= {f"test/{defect}": per_defect for defect in defects}
    for folder in counts:
        (out / folder).mkdir(parents=True)
    for defect in defects:
        (out / "ground_truth" / defect).mkdir(parents=True)
    jobs = [(out, product, f, i, size, seed) for f, n in counts.items() for i in range(n)]
    if len(jobs) < POOL_FROM:
        for job in jobs:
            _write(*job)
            on_image()
    else:
        _write_in_processes(jobs, on_image)


def _write_in_processes(jobs: list[_Job], on_image: Callable[[], None]) -> None:
    """Runs `_write` for every job on all cores. Interrupted, it stops at once."""
    others = set(active_children())
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), cv2.setNumThreads, (1,)) as pool:
        try:
            with _interrupts_later():  # only this process answers Ctrl-C
                done = pool.map(_write, *zip(*jobs, strict=True), chunksize=8)
            for _ in done:
                on_image()
        except BaseException:  # or the pool would render all that is left
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - others:
                process.terminate()
            raise


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C waits until the end; processes that are started meanwhile never get it."""
    if sys.platform == "win32":  # has no such masks
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write(root: Path, product: str, folder: str, index: int, size: int, seed: int) -> None:
    """Renders one image of the set and writes it, with its mask if it shows a defect."""
    kind = folder.split("/")[1]
    rng = np.random.default_rng([seed, zlib.crc32(folder.encode()), index])
    image, mask = PRODUCTS[product].render(kind, size, rng)
    _save(root / folder / f"{index:03d}.png", image)
    if kind != "good":
        truth = root / "ground_truth" / kind / f"{index:03d}_mask.png"
        _save(truth, mask.astype(np.uint8) * np.uint8(255))


def _save(path: Path, image: NDArray[np.uint8]) -> None:
    if not cv2.imwrite(str(path), image):
        raise OSError(f"cannot write {path}")
