"""The report page as people use it, in Chromium: opened from disk, without server or network."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
import reported
from rectangles import CLASSES

from pipeline.data.costs import cheapest_threshold
from pipeline.data.files import read_json, write_json
from pipeline.data.masks import decode_rle

PAGE = 60_000  # ms that anything may take on a machine that is busy with trainings
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = reported.write_run(tmp_path_factory.mktemp("run"))
    reported.report(root, root / "report", "--video", str(root / "review.mp4"))
    return root


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium.launched() as browser:
        yield browser


class Opened:
    """A page, and what it has asked for and complained of."""

    def __init__(self, context: Any, index: Path) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        context.route("http://**", lambda route: route.abort())
        context.route("https://**", lambda route: route.abort())
        context.on("request", lambda request: self.requests.append(request.url))
        self.page = context.new_page()
        self.page.set_default_timeout(PAGE)
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(index.as_uri(), wait_until="domcontentloaded")

    def _hear(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)


def open_page(browser: Any, index: Path, **options: Any) -> Iterator[Any]:
    """The page; at the end, that it asked for nothing but its own files, without complaint.

    Without its policy, which would keep Playwright from waiting for what a script says.
    """
    size = {"width": 1280, "height": 900}
    defaults = {"viewport": size, "reduced_motion": "reduce", "bypass_csp": True}
    context = browser.new_context(**{**defaults, **options})
    opened = Opened(context, index)
    yield opened.page
    own = (index.parent.as_uri(), "data:", "blob:")
    assert [url for url in opened.requests if not url.startswith(own)] == []
    assert opened.complaints == []
    context.close()


@pytest.fixture
def page(browser: Any, root: Path) -> Iterator[Any]:
    yield from open_page(browser, root / "report" / "index.html")


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    expect.set_options(timeout=PAGE)
    return expect(locator)


def names(page: Any) -> list[str]:
    """The images that the gallery shows, in its order."""
    cards = page.locator("#gallery li:not([hidden])")
    found: list[str] = cards.evaluate_all("cards => cards.map((card) => card.card.image.name)")
    return found


def rows(page: Any, column: int) -> list[str]:
    return [
        str(text)
        for text in page.locator(f"#decisions tbody tr td:nth-of-type({column})").all_inner_texts()
    ]


def test_its_own_policy_lets_it_work_and_nothing_out(browser: Any, root: Path) -> None:
    index = root / "report" / "index.html"
    for page in open_page(browser, index, bypass_csp=False):
        expect(page.locator("#count")).to_have_text("10 of 13 images")
        open_image(page, "stain__009.png")
        expect(page.locator("#picture")).to_have_js_property("naturalWidth", reported.WIDTH)
        page.keyboard.press("v")
        expect(page.locator("#open-shown")).to_have_text("Open stain__009.png")
        policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
        assert policy.startswith("default-src 'none';") and "http" not in policy


# ---- Filters


def test_filters(page: Any) -> None:
    assert len(names(page)) == 10  # the split that was measured
    expect(page.locator("#count")).to_have_text("10 of 13 images")
    page.select_option("#by-part", "")
    expect(page.locator("#count")).to_have_text("13 of 13 images")
    page.select_option("#by-part", "val")
    assert sorted(names(page)) == ["good__003.png", "scratch__002.png", "stain__004.png"]
    page.select_option("#by-part", "test")
    page.select_option("#by-class", label="stain")  # in truth, also beside a scratch
    expected = ["scratch__007.png", "stain__008.png", "stain__009.png", "stain__014.png"]
    assert sorted(names(page)) == expected
    page.select_option("#by-class", label="good")
    assert len(names(page)) == 4
    page.select_option("#by-class", "")
    counts = {"hit": 1, "miss": 3, "wrong class": 1, "false alarm": 2, "correct": 3, "errors": 6}
    for verdict, count in counts.items():
        page.select_option("#by-verdict", verdict)
        assert len(names(page)) == count, verdict
    page.select_option("#by-verdict", "")
    page.fill("#score-from", "0.6")
    page.fill("#score-to", "0.7")
    assert sorted(names(page)) == ["stain__008.png", "stain__009.png"]
    page.fill("#score-from", "")
    page.fill("#score-to", "")
    page.fill("#quality-under", "0.5")  # of what counts
    assert sorted(names(page)) == ["good__010.png", "stain__009.png"]
    page.fill("#quality-under", "0.1")
    expect(page.locator("#nothing")).to_be_visible()
    page.get_by_role("button", name="Reset").click()
    expect(page.locator("#count")).to_have_text("10 of 13 images")


def test_the_worst_come_first(page: Any) -> None:
    order = names(page)
    assert set(order[:3]) == {"scratch__006.png", "stain__008.png", "stain__014.png"}  # none found
    assert order[3] == "scratch__007.png"  # one of two
    assert [name[:5] for name in order[6:]] == ["scrat", "good_", "good_", "good_"]
    page.select_option("#order", "score")
    assert names(page)[:2] == ["scratch__005.png", "scratch__007.png"]
    page.select_option("#order", "file")
    assert names(page) == sorted(names(page))


# ---- Threshold


@pytest.mark.parametrize("threshold", [0.2, 0.41, 0.66, 1.0])
def test_the_slider_says_what_python_says(
    browser: Any, page: Any, root: Path, tmp_path: Path, threshold: float
) -> None:
    page.fill("#slider", str(threshold))
    expect(page.locator("#at-now")).to_have_text(f"{threshold:.3f}")
    reported.evaluate(root, tmp_path / "evaluation", threshold)
    metrics = read_json(tmp_path / "evaluation" / "metrics.json")
    accuracy = metrics["image_decision"]["detector"]["accuracy"]
    good = metrics["good_images"]
    confusion = np.array(metrics["image_decision"]["detector"]["confusion"])
    misses = confusion[1:, 0].sum()
    assert rows(page, 2) == [
        f"{round(10 * accuracy)} of 10 ({100 * accuracy:.1f} %)",
        f"{misses} of 6",
        f"{good['with_false_alarms']} of 4",
        f"{len(metrics['missed'])} of 7",
        str(good["false_alarms"]),
        str(50 * misses + good["with_false_alarms"]),
    ]
    page.select_option("#by-verdict", "")
    verdicts = metrics["verdicts"]
    for word, count in verdicts.items():
        page.select_option("#by-verdict", word)
        assert len(names(page)) == count, word


def test_the_slider_starts_where_the_evaluation_is_and_goes_back(page: Any) -> None:
    assert rows(page, 1) == rows(page, 2)
    page.fill("#slider", "0.1")
    expect(page.locator("#at-now")).to_have_text("0.100")
    assert rows(page, 1) != rows(page, 2)
    page.click("#use-evaluated")
    assert rows(page, 1) == rows(page, 2)
    page.locator("#slider").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#at-now")).to_have_text("0.501")
    width = page.locator("#histogram").bounding_box()["width"]
    page.locator("#histogram").click(position={"x": width * 0.75, "y": 20})
    expect(page.locator("#at-now")).to_have_text(re.compile(r"0\.7(49|5\d)"))


@pytest.mark.parametrize(("miss", "alarm"), [(50, 1), (1, 1), (1, 5), (0, 1), (2.5, 1.5)])
def test_the_cheapest_threshold_is_pythons(page: Any, miss: float, alarm: float) -> None:
    scores = np.array([max((f[2] for f in found), default=-np.inf) for _, found in reported.TEST])
    defective = np.array([bool(truth) for truth, _ in reported.TEST])
    costs = {"miss": miss, "false-alarm": alarm}
    threshold, cost = cheapest_threshold(scores, defective, costs)
    page.fill("#miss", str(miss))
    page.fill("#false-alarm", str(alarm))
    expect(page.locator("#at-cheapest")).to_have_text(f"{threshold:.3f}")
    assert float(rows(page, 3)[-1]) == pytest.approx(cost)
    expect(page.locator("#cost-command")).to_contain_text(f"--cost miss={miss},false-alarm={alarm}")
    page.click("#use-cheapest")
    assert rows(page, 2) == rows(page, 3)


# ---- Viewer


def open_image(page: Any, name: str) -> None:
    page.get_by_role("button", name=re.compile(f"^{name}(:|$)")).click()
    expect(page.locator("#viewer-name")).to_have_text(name)


MASKED = """() => {
    const canvas = document.getElementById('masks');
    const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    return [...data].filter((_, i) => i % 4 === 3).map((alpha) => alpha > 0);
}"""


def test_masks_are_drawn_pixel_by_pixel(page: Any) -> None:
    page.fill("#slider", "0.1")
    open_image(page, "scratch__005.png")
    page.keyboard.press("t")  # truth off
    drawn = np.array(page.evaluate(MASKED)).reshape(reported.HEIGHT, reported.WIDTH)
    expected = np.zeros_like(drawn)
    for result in reported.results(6, reported.TEST[0][1]):
        expected |= decode_rle(result["segmentation"])
    assert (drawn == expected).all()
    page.keyboard.press("m")
    assert not any(page.evaluate(MASKED))


def test_run_lengths_of_any_mask(browser: Any, root: Path, tmp_path: Path) -> None:
    """Noise, long runs and the last pixel: differences of either sign and many digits."""
    from pipeline.data.masks import encode_rle
    from pipeline.data.predictions import read_images, write_predictions

    rng = np.random.default_rng(0)
    mask = rng.random((reported.HEIGHT, reported.WIDTH)) < 0.3
    mask[:, 20:70] = False
    mask[-1, -1] = True
    other = tmp_path / "run"
    shutil.copytree(root / "dataset", other / "dataset")
    classes, images = read_images(root / "predictions")
    entry = {"image_id": 6, "category_id": 1, "bbox": [0, 0, 96, 72], "score": 0.9}
    write_predictions(
        other / "predictions", [{**entry, "segmentation": encode_rle(mask)}], images, classes
    )
    reported.evaluate(other, other / "evaluation", 0.5)
    reported.report(other, other / "report")
    for page in open_page(browser, other / "report" / "index.html"):
        open_image(page, "scratch__005.png")
        page.keyboard.press("t")
        assert (np.array(page.evaluate(MASKED)).reshape(mask.shape) == mask).all()


def test_everything_by_keyboard(page: Any) -> None:
    for _ in range(60):  # with Tab alone from the top of the page to the gallery
        page.keyboard.press("Tab")
        focus = page.evaluate(
            """() => { const one = document.activeElement; const style = getComputedStyle(one);
            return [one.className, style.outlineStyle, parseFloat(style.outlineWidth)]; }"""
        )
        if focus[0] == "card":
            break
        if focus[0] != "":  # a label shows the focus of the file input in it
            assert focus[1] != "none" and focus[2] >= 2, focus
    assert focus[0] == "card" and focus[1] == "solid"
    order = names(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(page.locator("#viewer-name")).to_have_text(order[1])
    page.keyboard.press("ArrowRight")
    expect(page.locator("#viewer-name")).to_have_text(order[2])
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # there is none before the first
    expect(page.locator("#viewer-name")).to_have_text(order[0])
    for key, name in (("t", "truth"), ("p", "prediction"), ("m", "mask"), ("b", "box")):
        button = page.locator(f"[data-toggle={name}]")
        expect(button).to_have_attribute("aria-pressed", "true")
        page.keyboard.press(key)
        expect(button).to_have_attribute("aria-pressed", "false")
        page.keyboard.press(key)
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).not_to_be_visible()
    focused = page.evaluate("document.activeElement.closest('li').card.image.name")
    assert focused == order[0]


def test_boxes_and_zoom(page: Any) -> None:
    open_image(page, "stain__009.png")
    boxes = page.locator("#boxes rect.prediction:not(.under)")
    expect(boxes).to_have_count(2)
    expect(page.locator("#boxes rect.truth:not(.under)")).to_have_count(1)
    page.keyboard.press("b")
    expect(page.locator("#boxes rect")).to_have_count(0)
    page.keyboard.press("b")
    expect(page.locator("#boxes rect.chosen.prediction:not(.under)")).to_have_attribute("x", "60")
    before = page.locator("#boxes rect.chosen:not(.under)").bounding_box()
    page.keyboard.press("z")
    page.wait_for_function("document.getElementById('stage').style.transform.includes('scale')")
    after = page.locator("#boxes rect.chosen:not(.under)").bounding_box()
    frame = page.locator("#frame").bounding_box()
    assert after["width"] > 1.5 * before["width"]
    assert frame["x"] <= after["x"] and after["x"] + after["width"] <= frame["x"] + frame["width"]
    page.keyboard.press("ArrowDown")  # the next instance, where the zoom goes
    chosen = page.locator("#boxes rect.chosen:not(.under)")
    expect(chosen).to_have_attribute("x", "40")
    page.keyboard.press("z")
    assert page.evaluate("document.getElementById('stage').style.transform") == ""


# ---- Video


def test_heat_maps_are_there_where_they_are_known(browser: Any, root: Path, tmp_path: Path) -> None:
    folder = reported.write_heat_maps(root)
    out = reported.report(root, tmp_path / "page", "--heat-maps", str(folder))
    for page in open_page(browser, out / "index.html"):
        open_image(page, "scratch__005.png")
        heat, button = page.locator("#heat"), page.locator("[data-toggle=heat]")
        expect(heat).to_be_hidden()
        page.keyboard.press("h")
        expect(heat).to_be_visible()
        expect(heat).to_have_js_property("naturalWidth", reported.WIDTH)
        expect(button).to_have_attribute("aria-pressed", "true")
        button.click()
        expect(heat).to_be_hidden()
        page.keyboard.press("Escape")
        open_image(page, "stain__009.png")
        expect(button).to_be_hidden()
        page.keyboard.press("h")
        expect(heat).to_be_hidden()


def test_anomalous_images_are_those_without_a_box_that_counts(
    browser: Any, root: Path, tmp_path: Path
) -> None:
    """All are anomalous: whether one is of no known class depends on the threshold of the boxes."""
    for part in ("dataset", "predictions"):
        shutil.copytree(root / part, tmp_path / part)
    images = read_json(tmp_path / "predictions" / "images.json")
    for image in images["images"]:
        image["anomaly"] = {"score": 2.0, "threshold": 1.0}
    write_json(tmp_path / "predictions" / "images.json", images)
    reported.evaluate(tmp_path, tmp_path / "evaluation", 0.5)
    out = reported.report(tmp_path, tmp_path / "page")
    for page in open_page(browser, out / "index.html"):
        page.select_option("#by-verdict", "unknown")
        assert sorted(names(page)) == [
            "good__011.png", "good__012.png", "good__013.png", "scratch__006.png", "stain__014.png",
        ]  # fmt: skip
        open_image(page, "stain__014.png")
        expect(page.locator("#viewer-place")).to_contain_text("anomalous, no known class")
        page.keyboard.press("Escape")
        page.fill("#slider", "0.4")
        expect(page.locator("#count")).to_have_text("3 of 13 images")
        assert sorted(names(page)) == ["good__011.png", "good__012.png", "stain__014.png"]


def test_from_an_image_to_its_moment_in_the_video(page: Any, root: Path) -> None:
    moments = read_json(root / "review.mp4.json")["moments"]
    assert len(moments) == 10
    for moment in (moments[7], moments[2]):
        page.get_by_role("button", name=f"{moment['file_name']} in the video").click()
        seconds = moment["seconds"]
        page.wait_for_function(
            "(at) => { const p = document.getElementById('player');"
            " return !p.seeking && p.readyState >= 2 && Math.abs(p.currentTime - at) < 0.01; }",
            arg=seconds,
        )
        expect(page.locator("#open-shown")).to_have_text(f"Open {moment['file_name']}")
    page.evaluate("document.getElementById('player').play()")
    page.wait_for_function(
        "(at) => document.getElementById('player').currentTime > at + 0.3", arg=seconds
    )
    page.locator("#open-shown").click()
    expect(page.locator("#viewer")).to_be_visible()
    page.keyboard.press("v")
    expect(page.locator("#viewer")).not_to_be_visible()
    expect(page.locator("#player")).to_be_focused()
    expect(page.locator("#player")).to_be_in_viewport()


# ---- Corrections


def drag(page: Any, box: tuple[float, float, float, float]) -> None:
    """Draw a box, given in image pixels, with the pointer."""
    place = page.locator("#boxes").bounding_box()

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            place["x"] + x / reported.WIDTH * place["width"],
            place["y"] + y / reported.HEIGHT * place["height"],
        )

    page.mouse.move(*at(box[0], box[1]))
    page.mouse.down()
    page.mouse.move(*at((box[0] + box[2]) / 2, box[3]))
    page.mouse.move(*at(box[2], box[3]))
    page.mouse.up()


def downloaded(page: Any) -> Any:
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "review.json"
    return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))


def test_corrections_become_review_json(browser: Any, page: Any, root: Path) -> None:
    open_image(page, "stain__009.png")
    page.keyboard.press("a")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("r")
    page.fill("textarea", "a reflection")
    page.locator("#frame").focus()
    page.keyboard.press("d")
    page.select_option("[data-key='missed class']", "scratch")
    drag(page, (20.4, 30.3, 39.6, 41.7))
    expect(page.locator("#boxes .missed:not(.under)")).to_have_count(1)
    page.keyboard.press("Escape")  # ends drawing
    page.keyboard.press("Escape")  # and closes
    open_image(page, "stain__008.png")
    page.select_option("[data-key='class 0']", "stain")
    page.click("#close")
    expect(page.locator("#judged")).to_contain_text("5 corrections on 2 images")

    results = {i: reported.results(i, found) for i, (_, found) in enumerate(reported.TEST, start=6)}

    def judged(image_id: int, index: int, **verdict: str) -> dict[str, Any]:
        result = dict(results[image_id][index])
        kept = {key: result[key] for key in ("bbox", "score", "segmentation")}
        return {**kept, "class": CLASSES[result["category_id"] - 1], **verdict}

    image = {"width": reported.WIDTH, "height": reported.HEIGHT}
    expected = {
        "format": "pipeline-review",
        "version": 1,
        "dataset": "dataset",
        "classes": list(CLASSES),
        "images": [
            {
                "image_id": 9,
                "file_name": "stain__008.png",
                **image,
                "predictions": [judged(9, 0, verdict="accept", changed_class="stain")],
                "missed": [],
            },
            {
                "image_id": 10,
                "file_name": "stain__009.png",
                **image,
                "note": "a reflection",
                "predictions": [
                    judged(10, 0, verdict="accept"),
                    judged(10, 1, verdict="reject"),
                ],
                "missed": [{"bbox": [20, 30, 20, 12], "class": "scratch"}],
            },
        ],
    }
    review = downloaded(page)
    assert review == expected

    page.reload()  # this browser has kept them
    expect(page.locator("#judged")).to_contain_text("5 corrections on 2 images")
    page.select_option("#by-review", "judged")
    assert len(names(page)) == 2
    assert downloaded(page) == expected
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#clear")
    expect(page.locator("#download")).to_be_disabled()

    file = {"name": "review.json", "mimeType": "application/json"}  # from a colleague
    page.set_input_files("#load", {**file, "buffer": json.dumps(review).encode()})
    expect(page.locator("#judged")).to_contain_text("5 corrections on 2 images")
    assert downloaded(page) == expected
    other = {**review, "classes": ["dent"]}
    page.set_input_files("#load", {**file, "buffer": json.dumps(other).encode()})
    expect(page.locator("#trouble")).to_have_text(
        "review.json: expected the classes scratch, stain, found dent"
    )
    assert downloaded(page) == expected


def test_what_is_taken_back_is_not_in_review_json(page: Any) -> None:
    open_image(page, "scratch__005.png")
    page.keyboard.press("a")
    page.keyboard.press("a")
    page.keyboard.press("d")
    drag(page, (5, 5, 15, 15))
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("#boxes .missed")).to_have_count(0)
    page.keyboard.press("d")
    page.click("#close")
    expect(page.locator("#judged")).to_contain_text("No corrections yet")
    expect(page.locator("#download")).to_be_disabled()


def test_a_box_drawn_by_keyboard_and_one_while_zoomed(page: Any) -> None:
    open_image(page, "scratch__005.png")
    page.keyboard.press("d")
    for key in ("Enter", "ArrowRight", "ArrowRight", "ArrowUp", "Shift+ArrowRight", "Enter"):
        page.keyboard.press(key)
    # a fifth of 96 x 72, rounded up, in the middle: 38, 28, 20, 15; a step is a pixel
    expect(page.locator("#boxes .missed:not(.under)")).to_have_count(1)
    page.keyboard.press("z")
    page.wait_for_function("document.getElementById('stage').style.transform.includes('scale')")
    drag(page, (42, 30, 50, 38))
    expect(page.locator("#boxes .missed:not(.under)")).to_have_count(2)
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    (image,) = downloaded(page)["images"]
    assert image["missed"][0] == {"bbox": [40, 27, 21, 15], "class": "scratch"}
    x, y, width, height = image["missed"][1]["bbox"]
    assert abs(x - 42) <= 1 and abs(y - 30) <= 1 and abs(width - 8) <= 1 and abs(height - 8) <= 1


def test_a_finger_draws_too(browser: Any, root: Path) -> None:
    tablet = {"viewport": {"width": 820, "height": 1180}, "has_touch": True}
    for page in open_page(browser, root / "report" / "index.html", **tablet):
        open_image(page, "scratch__005.png")
        page.get_by_role("button", name="Missed defect here").tap()
        box = page.locator("#boxes").bounding_box()
        page.locator("#boxes").scroll_into_view_if_needed()
        session = page.context.new_cdp_session(page)
        corners = [(0.25, 0.25), (0.4, 0.4), (0.5, 0.5)]
        points = [(box["x"] + u * box["width"], box["y"] + v * box["height"]) for u, v in corners]
        for kind, (x, y) in zip(("touchStart", "touchMove", "touchMove"), points, strict=True):
            touch = {"type": kind, "touchPoints": [{"x": x, "y": y}]}
            session.send("Input.dispatchTouchEvent", touch)
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        expect(page.locator("#boxes .missed:not(.under)")).to_have_count(1)
        place = page.locator("#boxes .missed:not(.under)")
        found = [float(place.get_attribute(name)) for name in ("x", "y", "width", "height")]
        assert found == pytest.approx([24, 18, 24, 18], abs=1.01)


# ---- How it looks

CONTRAST = """() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgb = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = ([r, g, b]) => [r, g, b]
        .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (one) => {
        for (; one; one = one.parentElement) {
            const colour = rgb(getComputedStyle(one).backgroundColor);
            if (colour[3] > 200) return colour;
        }
        return [255, 255, 255];
    };
    const low = [];
    const texts = 'h1, h2, h3, p, dt, dd, small, th, td, label, a, button, summary, output, b, '
        + '.badge, .faint, figcaption, svg text';
    for (const one of document.querySelectorAll(texts)) {
        if (!one.checkVisibility() || one.disabled || !one.textContent.trim()) continue;
        const style = getComputedStyle(one);
        const colour = one instanceof SVGElement ? style.fill : style.color;
        const [a, b] = [luminance(rgb(colour)), luminance(ground(one))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) low.push([one.tagName, one.textContent.trim().slice(0, 30), ratio]);
    }
    return [luminance(ground(document.body)), low];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(browser: Any, root: Path, scheme: str) -> None:
    for page in open_page(browser, root / "report" / "index.html", color_scheme=scheme):
        page.evaluate("document.getElementById('video').remove()")  # only text counts here
        ground, low = page.evaluate(CONTRAST)
        assert (ground > 0.8) if scheme == "light" else (ground < 0.1)
        assert low == []


def test_the_theme_can_be_chosen_and_is_kept(page: Any) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    page.click("#theme")
    expect(page.locator("#theme")).to_have_text("Theme: dark")
    assert page.evaluate(ground) != light
    page.reload()
    expect(page.locator("#theme")).to_have_text("Theme: dark")


@pytest.mark.parametrize("width", [1280, 820, 390])
def test_nothing_is_wider_than_the_screen(browser: Any, root: Path, width: int) -> None:
    size = {"width": width, "height": 900}
    for page in open_page(browser, root / "report" / "index.html", viewport=size):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        open_image(page, "stain__009.png")
        assert page.evaluate("document.getElementById('viewer').scrollWidth") <= width
        frame = page.locator("#frame").bounding_box()
        assert min(frame["width"], frame["height"]) > 200


# ---- One file, many images


def test_a_single_file_has_everything(browser: Any, root: Path, tmp_path: Path) -> None:
    folder = reported.report(
        root, tmp_path / "single", "--video", str(root / "review.mp4"), "--single-file"
    )
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "index.html", "run.json"]
    alone = tmp_path / "elsewhere" / "page.html"
    alone.parent.mkdir()
    shutil.move(folder / "index.html", alone)
    for page in open_page(browser, alone):
        expect(page.locator("#count")).to_have_text("10 of 13 images")
        open_image(page, "stain__009.png")
        page.wait_for_function("document.getElementById('picture').naturalWidth === 96")
        page.keyboard.press("v")
        page.wait_for_function("document.getElementById('player').currentTime > 1")


def test_pictures_are_loaded_where_they_are_looked_at(
    browser: Any, root: Path, tmp_path: Path
) -> None:
    """Two thousand images in the page: few pictures at first, and others on the way down."""
    index = root / "report" / "index.html"
    start, rest = index.read_text(encoding="utf-8").split(
        '<script type="application/json" id="data">'
    )
    text, end = rest.split("</script>", 1)
    data = json.loads(text)
    images = [image for image in data["images"] if image["measured"]]
    data["images"] = [
        {**images[i % 10], "id": i + 1, "name": f"{i:04}.png", "moment": None} for i in range(2000)
    ]
    folder = tmp_path / "many"
    shutil.copytree(root / "report", folder)
    marked = json.dumps(data).replace("<", r"\u003c")
    page_text = f'{start}<script type="application/json" id="data">{marked}</script>{end}'
    (folder / "index.html").write_text(page_text, encoding="utf-8")
    for page in open_page(browser, folder / "index.html"):
        expect(page.locator("#count")).to_have_text("2000 of 2000 images")
        page.select_option("#order", "file")
        assert page.locator(".card img").count() < 100
        page.locator("#gallery li").last.scroll_into_view_if_needed()
        page.wait_for_function(
            "document.getElementById('gallery').lastElementChild.querySelector('img') !== null"
        )
        assert page.locator(".card img").count() < 100  # and those out of sight are let go
        took = page.evaluate(
            """async () => {
                const started = performance.now();
                const slider = document.getElementById('slider');
                slider.value = 0.3;
                slider.dispatchEvent(new Event('input', {bubbles: true}));
                const frame = () => new Promise((done) => requestAnimationFrame(done));
                await frame();
                await frame();
                return performance.now() - started;
            }"""
        )
        assert took < 3000
