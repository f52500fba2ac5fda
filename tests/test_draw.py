"""What a frame is drawn with: boxes, masks, labels, insets and colours, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import supervision as sv
from filmed import BOX, CLASSES, SIZE, rectangle

from pipeline.data import draw, paint, palette, text


def detections(*boxes: tuple[int, int, int, int], masks: bool = True) -> sv.Detections:
    return sv.Detections(
        xyxy=np.array(boxes, np.float32),
        class_id=np.arange(len(boxes)) % len(CLASSES),
        mask=np.stack([rectangle(box) for box in boxes]) if masks else None,
    )


def panel_of(instances: sv.Detections, side: int = 200) -> np.ndarray:
    """A drawn panel of `side` pixels on a grey image, cut out of its frame."""
    drawer = draw.ReviewDrawer(CLASSES, ("truth",), (side, side))
    image = np.full((SIZE, SIZE, 3), 128, np.uint8)
    labels = ["x"] * len(instances)
    empty = drawer.draw(image, [(sv.Detections.empty(), [])], "", None)
    rows, columns = np.nonzero((empty == 128).all(axis=2))
    frame = drawer.draw(image, [(instances, labels)], "", None)
    return frame[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def test_box_and_mask_are_where_they_belong() -> None:
    """The box (10, 20, 40, 60), doubled, covers the columns 20..79 and the rows 40..119."""
    panel = panel_of(detections(BOX))
    assert panel.shape == (200, 200, 3)
    colour = np.array(palette.CLASS_COLOURS.by_idx(0).as_bgr())
    lines = np.abs(panel.astype(int) - colour).max(axis=2) < 3
    rows, columns = np.nonzero(lines[40:])  # the label stands above
    assert (rows.min() + 40, rows.max() + 40) == (40, 119)
    assert (columns.min(), columns.max()) == (20, 79)
    fill = 0.3 * colour + 0.7 * 128
    assert np.abs(panel[60:100, 30:70] - fill).max() <= 1
    assert (panel[125:] == 128).all() and (panel[:, 90:] == 128).all()


def test_a_hole_in_a_mask_stays_open() -> None:
    mask = rectangle(BOX)
    mask[35:45, 20:30] = False
    instances = sv.Detections(np.array([BOX], np.float32), mask[None], class_id=np.array([0]))
    panel = panel_of(instances)
    assert (panel[76:84, 46:54] == 128).all() and not (panel[60, 46:54] == 128).all()


@pytest.mark.parametrize(
    "box", [(0, 0, 1, 1), (99, 99, 100, 100), (0, 99, 1, 100), (50, 50, 51, 51), (30, 0, 31, 1)]
)
def test_a_one_pixel_defect_is_seen(box: tuple[int, int, int, int]) -> None:
    """Its frame of 12 pixels is whole inside the panel, and its label does not hide it."""
    panel = panel_of(detections(box))
    x = min(max(2 * box[0] + 1 - 6, 0), 200 - 12)
    y = min(max(2 * box[1] + 1 - 6, 0), 200 - 12)
    frame = panel[y : y + 12, x : x + 12].astype(int)
    colour = palette.CLASS_COLOURS.by_idx(0).as_bgr()
    lines = np.abs(frame - colour).max(axis=2) < 3
    assert lines[0].all() and lines[-1].all() and lines[:, 0].all() and lines[:, -1].all()
    assert lines.sum() < 100  # a frame, not a filled label


def test_a_mask_thinner_than_a_pixel_of_the_panel_survives() -> None:
    """A line of 1 pixel at a fifth of the size."""
    instances = sv.Detections(
        xyxy=np.array([[0, 52, 100, 53]], np.float32),
        class_id=np.array([0]),
        mask=rectangle((0, 52, 100, 53))[None],
    )
    bare = detections((0, 52, 100, 53), masks=False)
    assert (panel_of(instances, 64) != panel_of(bare, 64)).any()


def test_small_defects_are_enlarged_in_every_panel_alike() -> None:
    """A black spot of 4 pixels in 100 has about 4 x 4 at a panel of 100, and much more enlarged."""
    image = np.full((SIZE, SIZE, 3), 128, np.uint8)
    image[50:54, 70:74] = 0
    drawer = draw.ReviewDrawer(CLASSES, ("truth", "prediction"), (200, 200))
    nothing: tuple[sv.Detections, list[str]] = (sv.Detections.empty(), [])
    box = np.array([[70, 50, 74, 54]], np.float32)

    def dark(details: np.ndarray | None) -> np.ndarray:
        frame = drawer.draw(image, [nothing, nothing], "", None, "", details)
        return (frame[60:] == 0).all(axis=2)

    half = drawer.size[0] // 2
    plain, enlarged = dark(None), dark(box)
    for part in (np.s_[:, :half], np.s_[:, half:]):
        assert enlarged[part].sum() - plain[part].sum() > 500
    large = np.array([[10, 10, 80, 80]], np.float32)
    assert (dark(large) == plain).all()
    everywhere = np.array([[0, 0, 100, 100]], np.float32)  # no corner is free
    assert (dark(np.vstack([box, everywhere])) == plain).all()


def test_labels_do_not_hide_boxes_or_each_other() -> None:
    rng = np.random.default_rng(3)
    corners = rng.integers(0, 560, (15, 2)).astype(float)
    boxes = np.hstack([corners, corners + rng.integers(12, 60, (15, 2))])
    boxes = np.vstack([boxes, [[300, 300, 400, 400]] * 4, [[0, 0, 12, 12]], [[628, 628, 639, 639]]])
    sizes = np.tile([110.0, 20.0], (len(boxes), 1))
    spots = paint.label_spots(boxes, sizes, (640, 640))
    labels = np.hstack([np.subtract(spots, (0, 20)), np.add(spots, (110, 0))])
    assert labels.min() >= 0 and labels.max() <= 640
    between = np.triu(sv.box_iou_batch(labels, labels), 1)
    assert between.max() < 0.2
    near = np.abs((labels[:, 1] + labels[:, 3]) / 2 - (boxes[:, 1] + boxes[:, 3]) / 2)
    assert (near < 150).all()
    for i, (x1, y1, x2, y2) in enumerate(boxes):  # hidden part of each box, pixel by pixel
        hidden = np.zeros((641, 641), bool)
        for a1, b1, a2, b2 in labels.round().astype(int):
            hidden[b1:b2, a1:a2] = True
        assert hidden[int(y1) : int(y2), int(x1) : int(x2)].mean() < 0.5, i


def test_an_image_may_be_of_any_shape() -> None:
    drawer = draw.ReviewDrawer(CLASSES, ("truth", "prediction"), (64, 64), note="a note " * 20)
    nothing: tuple[sv.Detections, list[str]] = (sv.Detections.empty(), [])
    for shape in [(1, 1), (1, 500), (500, 1), (2000, 30)]:
        image = np.full((*shape, 3), 128, np.uint8)
        frame = drawer.draw(image, [nothing, nothing], "name" * 50, "miss", "1 / 1000")
        assert frame.shape == (drawer.size[1], drawer.size[0], 3)
        assert frame.shape[0] % 2 == frame.shape[1] % 2 == 0


def test_long_names_are_cut_in_the_middle() -> None:
    name = "a_very_long_name_of_a_file_from_some_camera_at_the_line_000123.png"
    cut = text.elide(name, 18, 300)
    assert text.font(18).getlength(cut) <= 300
    head, tail = cut.split("…")
    assert name.startswith(head) and name.endswith(tail) and len(tail) > 8
    assert text.elide("short.png", 18, 300) == "short.png"
    assert text.elide(name, 18, 0) == ""


@pytest.mark.parametrize(
    ("background", "expected"),
    [("#FFFFFF", sv.Color.BLACK), ("#0072B2", sv.Color.WHITE), ("#F0E442", sv.Color.BLACK)],
)
def test_ink_reads_well(background: str, expected: sv.Color) -> None:
    assert palette.ink(sv.Color.from_hex(background)) == expected
