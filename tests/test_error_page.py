"""The page of errors, as a browser would see it."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import supervision as sv
from rectangles import CLASSES, Defects, write_dataset

from pipeline.data import error_page
from pipeline.data.box_errors import box_errors
from pipeline.data.dataset import Dataset, Sample

SCRATCH = (10, 10, 30, 20)
STAIN = (60, 40, 80, 60)


class Page(HTMLParser):
    """The headings, text and picture names of a page."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.text = (folder / "index.html").read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.pictures: list[str] = []
        self.errors: list[str] = []
        self._in_error = False
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in_error = tag == "h3"
        if tag == "img":
            self.pictures.append(str(dict(attrs)["src"]))

    def handle_data(self, data: str) -> None:
        if self._in_error:
            self.errors.append(data)
            self._in_error = False


def boxes(*rows: tuple[tuple[int, int, int, int], int, float]) -> sv.Detections:
    if not rows:
        return sv.Detections.empty()
    return sv.Detections(
        xyxy=np.array([box for box, _, _ in rows], np.float32),
        class_id=np.array([k for _, k, _ in rows]),
        confidence=np.array([score for _, _, score in rows], np.float32),
    )


def shot(sample: Sample, seen: sv.Detections, threshold: float = 0.5) -> error_page.Shot:
    found = seen[seen.confidence >= threshold] if len(seen) else seen
    return error_page.Shot(sample, seen, found, box_errors(sample.truth, found))


def samples(root: Path, *images: Defects) -> list[Sample]:
    return Dataset(write_dataset(root / "data", {"test": images})).split("test")


def test_every_error_is_shown_the_surest_first(tmp_path: Path) -> None:
    images = samples(
        tmp_path, [("scratch", SCRATCH)], [("stain", STAIN)], [], [("scratch", SCRATCH)]
    )
    shots = [
        shot(images[0], boxes((SCRATCH, 1, 0.6))),  # wrong class: an alarm, and a miss
        shot(images[1], boxes(((70, 50, 90, 70), 1, 0.3), ((0, 0, 5, 5), 1, 0.4))),
        shot(images[2], boxes((STAIN, 0, 0.9))),
        shot(images[3], boxes((SCRATCH, 0, 0.8))),  # right
    ]
    error_page.write(tmp_path / "errors", CLASSES, shots)
    page = Page(tmp_path / "errors")
    assert page.errors == [
        "scratch: background, score 0.90",
        "stain: wrong class, score 0.60",
        "scratch: wrong class, best score 0.60",
        "stain: missed, best score 0.30",  # 0.4 is elsewhere
    ]
    for image in images[:3]:
        assert image.path.name in page.text
    assert images[3].path.name not in page.text
    assert len(page.pictures) == 8
    for name in page.pictures:
        picture = cv2.imread(str(tmp_path / "errors" / name))
        assert picture is not None and max(picture.shape) == error_page.SIDE
        assert (tmp_path / "errors" / name).stat().st_size < 60_000


def test_the_pictures_show_the_truth_and_what_the_model_saw(tmp_path: Path) -> None:
    (image,) = samples(tmp_path, [("scratch", SCRATCH)])

    def picture(side: str, score: float) -> np.ndarray:
        out = tmp_path / str(score)
        error_page.write(out, CLASSES, [shot(image, boxes(((40, 10, 50, 30), 1, score)))])
        return cv2.imread(str(out / f"0000_{side}.jpg")).astype(int)

    def coloured(picture: np.ndarray) -> int:
        return int((np.ptp(picture, axis=2) > 90).sum())  # the image itself is grey

    assert coloured(picture("truth", 0.04)) > 500
    assert coloured(picture("model", 0.04)) == 0  # under the score from which boxes are shown
    assert coloured(picture("model", 0.06)) > 100
    assert np.abs(picture("truth", 0.04) - picture("truth", 0.06)).max() == 0


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    images = samples(tmp_path, [("scratch", SCRATCH)])
    error_page.write(tmp_path / "errors", CLASSES, [shot(image, boxes()) for image in images])
    page = Page(tmp_path / "errors")
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|//", page.text)
    assert {p.name for p in (tmp_path / "errors").iterdir()} == {"index.html", *page.pictures}


def test_images_that_are_gone_leave_their_errors_without_pictures(tmp_path: Path) -> None:
    images = samples(tmp_path, [("scratch", SCRATCH)], [("stain", STAIN)])
    images[0].path.unlink()
    error_page.write(tmp_path / "errors", CLASSES, [shot(image, boxes()) for image in images])
    page = Page(tmp_path / "errors")
    assert len(page.errors) == 2
    assert len(page.pictures) == 2
    assert "cannot be read" in page.text


def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", {"test": [[("<b>&x", SCRATCH)]]}, classes=("<b>&x",))
    (image,) = Dataset(root).split("test")
    error_page.write(tmp_path / "errors", ("<b>&x",), [shot(image, boxes())])
    page = Page(tmp_path / "errors")
    assert "b" not in page.tags
    assert page.errors == ["<b>&x: missed, best score 0.00"]


def test_an_older_page_is_replaced(tmp_path: Path) -> None:
    (image,) = samples(tmp_path, [("scratch", SCRATCH)])
    error_page.write(tmp_path / "errors", CLASSES, [shot(image, boxes())])
    error_page.write(tmp_path / "errors", CLASSES, [shot(image, boxes((SCRATCH, 0, 0.9)))])
    assert [p.name for p in (tmp_path / "errors").iterdir()] == ["index.html"]
    assert Page(tmp_path / "errors").text.count("None.") == 2


def test_thousands_of_errors_take_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (image,) = samples(tmp_path, [])
    alarms = boxes(*(((n % 80, n % 60, n % 80 + 9, n % 60 + 9), 0, 0.9) for n in range(50)))
    crowd = shot(image, alarms)
    calm = shot(image, boxes((SCRATCH, 0, 0.95)))
    monkeypatch.setattr(error_page, "MOST_PICTURES", 20)
    started = time.process_time()
    error_page.write(tmp_path / "errors", CLASSES, [calm, *[crowd] * 40])
    page = Page(tmp_path / "errors")
    assert len(page.errors) == 2001
    assert page.errors[0] == "scratch: background, score 0.95"
    assert len(page.pictures) == 40
    assert time.process_time() - started < 20
