"""docs/metrics.md describes the keys of metrics.json: all of them, and no others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluated import edit, evaluate, in_folds, predict_folds, score

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
FREE = ("published", "intervals")  # what is below these is not described key by key


def described() -> set[str]:
    """The keys in the first column of the page's tables."""
    rows = re.findall(r"^\| (`.*?`) \| ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`(.*?)`", row)}


def keys(value: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of what is neither an object nor a list of objects."""
    if isinstance(value, dict) and prefix not in FREE:
        for name, inner in value.items():
            yield from keys(inner, f"{prefix}.{name}" if prefix else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from keys(inner, f"{prefix}[]")
    else:
        yield prefix


def with_every_section(root: Path) -> dict[str, Any]:
    """An evaluation of all folds that leaves nothing out."""
    world = in_folds(root)
    predict_folds(world)
    for fold in range(2):
        # The best box goes, so that a defect is missed.
        edit(root / f"found/fold{fold}/predictions.json", lambda c: c.pop(0))
        edit(
            root / f"found/fold{fold}/predictions.json", lambda c: [e.update(quality=1) for e in c]
        )
        score(world, f"anomaly/fold{fold}", {1: 5.0, 2: 6.0, 3: 1.0, 4: 1.5}, fold=fold)
        world.truth_boxes(folder=f"truth/fold{fold}", quality=(0.9,) * 4)
        world.classify(f"net/fold{fold}", "net", dict.fromkeys(range(1, 5), "good"))
    return evaluate(
        world.write(),
        root / "found" / "fold{fold}",
        fold="all",
        threshold=None,
        cost={"miss": 50, "false-alarm": 1},
        anomaly=root / "anomaly" / "fold{fold}",
        truth_boxes=root / "truth" / "fold{fold}",
        classifiers=(root / "net" / "fold{fold}",),
    )


def fits(described: str, key: str) -> bool:
    """Whether a key is the one described, in which <words> stand for any name."""
    pattern = re.sub(r"<\w+>", r"[^.]+", described.replace(".", r"\.").replace("[]", r"\[\]"))
    return re.fullmatch(pattern, key) is not None


def test_every_key_is_described_and_every_description_is_of_a_key(tmp_path: Path) -> None:
    written, page = set(keys(with_every_section(tmp_path))), described()
    assert len(written) > len(page) > 70
    assert {key for key in written if not any(fits(its, key) for its in page)} == set()
    assert {its for its in page if not any(fits(its, key) for key in written)} == set()
