"""The page to review results in: one HTML file with its style, its script and its data in it.

The script (report_page.js) works on the data alone; it needs no other file than the pictures and
the video, and the page's own policy forbids it to ask for any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from pipeline.data import report
from pipeline.data.dataset import GOOD
from pipeline.data.palette import CLASS_COLOURS, VERDICT_COLOURS, ink
from pipeline.data.provenance import Made

HERE = Path(__file__)


@dataclass(frozen=True)
class Plot:
    title: str
    svg: str


@dataclass(frozen=True)
class Page:
    title: str
    dataset: str  # name of its folder
    classes: Sequence[str]
    figures: Mapping[str, Any]  # metrics.json
    identity: str  # of the predictions: corrections are kept under it
    images: Sequence[Mapping[str, Any]]  # see `_entries` in pipeline/stages/report.py
    plots: Sequence[Plot]
    video: str | None  # its address
    counts: report.Table
    made: Made


def render(page: Page) -> str:
    """The whole page."""
    figures = page.figures
    template = jinja2.Template(
        _text(".html"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    parts = list(dict.fromkeys(image["part"] for image in page.images))
    return template.render(
        page=page,
        policy=_policy(),
        css=_text(".css"),
        js=_text(".js"),
        data=_json(_data(page)),
        figures=figures,
        scope="all folds" if figures["fold"] == "all" else f"the {figures['split']} split",
        key_figures=report.key_figures(figures),
        notes=report.notes(figures),
        tables=report.tables(figures),
        confusions=_confusions(figures),
        names=(GOOD, *page.classes),
        parts=parts,
        verdicts=list(VERDICT_COLOURS),
        has_anomalies=any(image["anomaly"] for image in page.images),
        options={step.folder: _json(step.options, indent=2) for step in page.made.steps},
    )


def _text(suffix: str) -> str:
    return HERE.with_suffix(suffix).read_text(encoding="utf-8")


def _policy() -> str:
    """Content-Security-Policy: what is in the page or beside it, and nothing from elsewhere."""
    beside = "'self' file: data: blob:"
    return (
        f"default-src 'none'; img-src {beside}; media-src {beside}; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )


def _data(page: Page) -> dict[str, Any]:
    colours = [CLASS_COLOURS.by_idx(k) for k in range(len(page.classes))]
    review = page.figures["review"]
    return {
        "dataset": page.dataset,
        "identity": page.identity,
        "classes": list(page.classes),
        "colours": [colour.as_hex() for colour in colours],
        "inks": [ink(colour).as_hex() for colour in colours],
        "verdicts": {
            word: {"colour": colour.as_hex(), "ink": ink(colour).as_hex()}
            for word, colour in VERDICT_COLOURS.items()
        },
        "threshold": page.figures["threshold"]["value"],
        "reviewBelow": None if review is None else review["below"],
        "cost": page.figures.get("cost"),
        "images": page.images,
    }


def _json(value: Any, indent: int | None = None) -> str:
    """JSON that cannot end the element it stands in."""
    separators = None if indent else (",", ":")
    text = json.dumps(
        value, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators
    )
    return text if indent else text.replace("<", r"\u003c")


def _confusions(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each model's confusion matrix: rows of (count, share of the row)."""
    return [
        {
            "model": name,
            "rows": [[(n, n / max(sum(row), 1)) for n in row] for row in scores["confusion"]],
        }
        for name, scores in figures["image_decision"].items()
        if name != "majority"
    ]
