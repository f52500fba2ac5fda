"""benchmarks/study: rows are the figures of the runs, or their means over folds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rectangles import draw, filled

from benchmarks.study import run as benchmark
from pipeline import cli
from pipeline.data.files import read_json

IN_A_PROCESS = subprocess.run
SIDE = 64


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    """A folder with a category: noise with a bright rectangle, and without."""
    root = tmp_path / "mvtec" / "transistor"
    for i in range(6):
        box = (10 + 4 * i, 12, 40 + 3 * i, 44)
        write(root / "test" / "stain" / f"{i:03}.png", draw([("stain", box)], SIDE, SIDE, i))
        mask = filled(box, SIDE, SIDE) * np.uint8(255)
        write(root / "ground_truth" / "stain" / f"{i:03}_mask.png", mask)
    for part, count in (("train", 8), ("test", 4)):
        for i in range(count):
            image = draw([], SIDE, SIDE, 10 * count + i)
            write(root / part / "good" / f"{i:03}.png", image)
    return root.parent


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that were run: in this process and on small images, for speed."""
    names: list[str] = []

    def in_this_process(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if command[0] != sys.executable:  # git, for the record
            return IN_A_PROCESS(command, **options)
        written = Path(command[command.index("--config") + 1])
        names.append(f"{written.parent.name}/{written.stem}")
        cli.main(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", in_this_process)
    monkeypatch.setattr(benchmark, "FOLDS", 2)
    monkeypatch.setattr(benchmark, "OPTIONS", {"image_size": 64})
    return names


def test_rows(mvtec: Path, tmp_path: Path, calls: list[str]) -> None:
    work = tmp_path / "work"
    options = ["--mvtec-root", str(mvtec), "--work", str(work), "--methods", "cosine", "padim"]
    benchmark.main(options)
    assert calls == [
        "mvtec/cosine", "mvtec/padim", "fold0/cosine", "fold1/cosine", "fold0/padim", "fold1/padim",
    ]  # fmt: skip
    results = read_json(work / "results.json")
    rows = {(row["protocol"], row["method"]): row for row in results["rows"]}
    assert list(rows) == [(p, m) for p in ("mvtec", "folds") for m in ("cosine", "padim")]
    for (protocol, method), row in rows.items():
        folders = ["mvtec"] if protocol == "mvtec" else ["fold0", "fold1"]
        runs = [read_json(work / folder / method / "metrics.json") for folder in folders]
        for key, (group, name) in benchmark.FIGURES.items():
            values = [run[group][name] for run in runs if run[group][name] is not None]
            assert row[key] == (
                pytest.approx(sum(values) / len(values), abs=1e-4) if values else None
            )
        assert (row["images"], row["defective"]) == ((10, 6) if protocol == "mvtec" else (18, 6))
    assert rows["mvtec", "padim"]["pixel_iou"] is None  # no validation split
    assert rows["folds", "padim"]["pixel_iou"] > 0.2
    assert [run["fold"] for run in rows["folds", "padim"]["per_fold"]] == [0, 1]
    assert results["command"].endswith("--category transistor --methods cosine padim")
    calls.clear()
    benchmark.main(options)  # all is there
    assert calls == []
    assert read_json(work / "results.json")["rows"] == results["rows"]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["--mvtec-root", str(tmp_path), "--work", str(tmp_path / "work")])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run.py: ")


def test_the_results_that_are_kept_reach_what_is_published() -> None:
    results = read_json(benchmark.HERE / "results.json")
    rows = {(row["protocol"], row["method"]): row for row in results["rows"]}
    patchcore, padim = rows["mvtec", "patchcore"], rows["mvtec", "padim"]
    assert patchcore["image_auroc"] >= 0.99 and patchcore["pixel_auroc"] >= 0.97
    assert padim["image_auroc"] >= 0.95
