"""benchmarks/review_loop without its trainings, and the commands and figures of its document."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.data.dataset import Dataset
from pipeline.data.files import read_json, write_json
from pipeline.data.masks import decode_rle, iou
from pipeline.data.synth import render_dataset

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "review-loop.md").read_text(encoding="utf-8")


def run_reviewer(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    from benchmarks.review_loop import reviewer

    monkeypatch.setattr(sys, "argv", ["reviewer.py", *map(str, arguments)])
    reviewer.main()


def test_the_scripted_reviewer_gives_back_the_hidden_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    mvtec, complete, weak, found, new = (tmp_path / n for n in ("m", "c", "w", "p", "n"))
    render_dataset(mvtec, train_good=4, test_good=3, per_defect=6, size=128, seed=0)
    cli.main(["convert", "--source", str(mvtec), "--out", str(complete)])
    run_reviewer(monkeypatch, "hide", complete, weak)
    full, hidden = Dataset(complete), Dataset(weak)
    labelled = [sample for sample in hidden.split("train") if sample.annotations]
    assert sorted(sample.label for sample in labelled) == [0, 1, 2, 3]  # one of each class
    for part in ("val", "test"):
        pairs = zip(full.split(part), hidden.split(part), strict=True)
        assert all(len(a.annotations) == len(b.annotations) for a, b in pairs)

    # A detector that finds every second defect, each twice, takes one for another, and sees one
    # where there is none.
    results = []
    truth = [a for sample in full.split("train") for a in sample.annotations]
    for annotation in truth[::2]:
        entry = {k: annotation[k] for k in ("image_id", "category_id", "bbox", "segmentation")}
        results += [entry | {"score": 0.9}, entry | {"score": 0.3}]
    results[0] |= {"category_id": truth[0]["category_id"] % 4 + 1}
    good = next(s for s in full.split("train") if s.label < 0)
    results.append(results[0] | {"image_id": good.image_id, "category_id": 1})
    write_json(found / "predictions.json", results)
    run_reviewer(monkeypatch, "review", complete, weak, found, tmp_path / "review.json")
    said = read_json(tmp_path / "review.json")["images"]
    verdicts = [p["verdict"] for image in said for p in image["predictions"]]
    assert verdicts.count("accept") == len(truth[::2])
    assert verdicts.count("reject") == len(truth[::2]) + 1
    assert sum(len(image["missed"]) for image in said) == len(truth[1::2])

    argv = ["apply-review", str(tmp_path / "review.json"), "--data", str(weak), "--out", str(new)]
    cli.main([*argv, "--device", "cpu"])
    after = {sample.image_id: sample for sample in Dataset(new).split("train")}
    ious = []
    for sample in full.split("train"):
        corrected = after[sample.image_id]
        classes = [sorted(a["category_id"] for a in s.annotations) for s in (sample, corrected)]
        assert classes[0] == classes[1]
        ious += [
            max(iou(decode_rle(a["segmentation"]), decode_rle(b["segmentation"]))
                for b in corrected.annotations)
            for a in sample.annotations
        ]  # fmt: skip
    assert sum(value == 1 for value in ious) >= len(truth[::2])  # what was accepted
    assert sorted(ious)[len(ious) // 4] > 0.5  # what was drawn
    assert [s.image_id for s in after.values() if s.label < 0 and s.hard_negatives] == [
        good.image_id
    ]


@pytest.mark.parametrize("line", re.findall(r"^    (pipeline .*)$", DOC, re.MULTILINE))
def test_the_documented_commands_can_be_given(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[Any] = []
    _, command, *arguments = shlex.split(line)
    name = f"pipeline.stages.{command.replace('-', '_')}"
    monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setattr(sys.modules[name], "run", called.append, raising=False)
    cli.main([command, *arguments])
    assert len(called) == 1


def test_the_documented_figures_are_those_that_were_measured() -> None:
    results = read_json(ROOT / "benchmarks" / "review_loop" / "results.json")
    table = (ROOT / "benchmarks" / "review_loop" / "results.md").read_text(encoding="utf-8")
    for run in results["seeds"].values():
        for detector, test in run["test"].items():
            row = f"| {detector} | {run['labels'][detector]} | {test['box_map50']:.2f} |"
            assert row in table
    assert table in DOC
