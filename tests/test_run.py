"""`pipeline run`: what is planned, skipped, run again and resumed.

The stages are replaced by small ones that claim, write and record as the real ones do, and whose
outputs depend on all of their inputs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import record
from pipeline.cli import COMMANDS
from pipeline.config import RunConfig, StageConfig, TrainConfig, build, of_fold
from pipeline.data.files import atomic_folder, read_json, write_json, write_text
from pipeline.errors import UserError
from pipeline.stages import run as run_stage

WEIGHTS = {"finetune-yolo": "detector.pt", "finetune-sam": "sam.safetensors"}
CHECKPOINT = {"finetune-yolo": "weights/last.pt"}
EPOCHS = 3
FOLDS = 2


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class FakeStages:
    """Takes the place of all stage modules."""

    def __init__(self) -> None:
        self.calls: list[str] = []  # the output folder of each stage that ran
        self.epochs = 0
        self.resumed: list[str] = []
        self.kill_at: int | None = None  # which of the points where a process could die
        self.points = 0

    def point(self) -> None:
        self.points += 1
        if self.points == self.kill_at:
            raise Killed

    def run(self, command: str, config: StageConfig) -> None:
        self.calls.append(config.out.name)
        if getattr(config, "resume", False):
            self.resumed.append(config.out.name)
        self.point()
        if command in ("synth", "convert"):
            with atomic_folder(config.out) as place:
                write_text(place / "data.txt", content(command, config))
                self.point()
                record.write_record(place, command, config)
        elif command == "overlay":
            write_text(config.out, content(command, config))
            self.point()
            record.write_record(config.out, command, config)
        elif isinstance(config, TrainConfig):
            if not config.resume:
                record.claim(command, config)
                self.point()
                record.write_config(config.out, command, config)
            self.point()
            self._train(config.out / CHECKPOINT.get(command, "last.pt"), command, config)
            self._write(config.out, command, config)
        else:
            with record.result(command, config) as out:
                self.point()
                self._write(out, command, config)
        self.point()

    def _write(self, out: Path, command: str, config: StageConfig) -> None:
        result = content(command, config)
        write_text(out / WEIGHTS.get(command, "result.txt"), result)
        self.point()
        if command == "evaluate":
            chosen = None if config.model_dump()["fold"] == "all" else 0.375
            write_json(out / "metrics.json", {"threshold": {"value": chosen}, "result": result})
            if chosen is None:
                write_text(out / "out_of_fold" / "predictions.json", result)
        self.point()
        record.write_record(out, command, config)

    def _train(self, last: Path, command: str, config: TrainConfig) -> None:
        done = read_json(last) if config.resume else []
        while len(done) < EPOCHS:
            self.epochs += 1
            done.append(content(command, config))
            write_json(last, done)
            self.point()
        assert set(done) == {content(command, config)}, "resumed from other data"


def content(command: str, config: StageConfig) -> str:
    """A hash of the options, and of what every input file holds."""
    options = config.model_dump(
        mode="json", exclude={"out", "force", "resume", "device", "offline", *config.inputs}
    )
    state = [command, sorted(options.items())]
    for name in config.inputs:
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            if "{fold}" in str(item):
                state += [text for k in range(FOLDS) for _, text in tree(of_fold(item, k))]
            elif item is None or not Path(item).exists():
                state.append(str(item))
            else:
                state += [text for _, text in tree(Path(item))]
    return hashlib.sha256(repr(state).encode()).hexdigest()


def tree(root: Path) -> list[tuple[str, str]]:
    """Names and contents of all files that are results."""
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    return [
        (str(p.relative_to(root)), p.read_text())
        for p in files
        if p.name not in ("run.json", "config.yaml", "begun.json", "last.pt", "review.mp4.json")
    ]


def state(root: Path) -> dict[str, str]:
    """All files, with the options that say how a result came about left out."""
    found: dict[str, str] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        text = path.read_text()
        if path.name == "config.yaml":
            options = yaml.safe_load(text)
            text = repr({k: v for k, v in options.items() if k not in ("force", "resume")})
        elif path.name in ("run.json", "review.mp4.json"):
            text = repr({k: v for k, v in json.loads(text).items() if k != "seconds"})
        found[str(path.relative_to(root))] = text
    return found


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fake = FakeStages()
    real = importlib.import_module

    def import_module(name: str) -> Any:
        command = name.removeprefix("pipeline.stages.").replace("_", "-")
        if command not in COMMANDS:
            return real(name)

        def run(config: StageConfig) -> None:
            fake.run(command, config)

        return type("Stage", (), {"run": staticmethod(run)})

    monkeypatch.setattr(run_stage.importlib, "import_module", import_module)
    monkeypatch.setattr(run_stage.report, "show", lambda metrics: None)
    monkeypatch.setattr(record, "versions", dict)  # these two are slow, and tested elsewhere
    monkeypatch.setattr(record, "load_registry", dict)
    return fake


def settings(out: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "out": out,
        "synth": {"seed": 1},
        "finetune_sam": {},
        "finetune_classifier": {"small": {"model": "resnet18"}, "large": {"model": "resnet50"}},
        "detect_anomaly": {},
    }
    return build(RunConfig, values | changes)


ALL = [
    "mvtec", "dataset", "detector", "segmenter", "small", "large", "anomaly", "predictions",
    "truth_boxes", "evaluation", "review.mp4", "report",
]  # fmt: skip


# Planning


def test_stages_are_linked_by_their_folders(tmp_path: Path) -> None:
    plan = run_stage.plan(settings(tmp_path, fold=2, init="start.pt"))
    stages: dict[str, Any] = {stage.out.name: stage for _, stage in plan}
    assert list(stages) == ALL
    shared = {"mvtec", "dataset"}
    for name, stage in stages.items():
        assert stage.out.is_relative_to(tmp_path / ("" if name in shared else "fold2"))
    assert stages["dataset"].source == stages["mvtec"].out
    for name in ("detector", "small", "large", "evaluation"):
        assert (stages[name].data, stages[name].fold) == (stages["dataset"].out, 2)
    assert (stages["segmenter"].data, stages["segmenter"].fold) == ((stages["dataset"].out,), 2)
    for name in ("anomaly", "predictions", "truth_boxes"):
        assert (stages[name].source, stages[name].fold) == (stages["dataset"].out, 2)
    for name in ("predictions", "truth_boxes"):
        assert stages[name].sam == str(stages["segmenter"].out / "sam.safetensors")
    assert stages["detector"].model == "start.pt"
    assert stages["predictions"].boxes == str(stages["detector"].out / "detector.pt")
    assert stages["predictions"].splits == ("val", "test")
    assert (stages["truth_boxes"].boxes, stages["truth_boxes"].splits) == ("truth", ("test",))
    evaluation, review = stages["evaluation"], stages["review.mp4"]
    assert evaluation.predictions == review.predictions == stages["predictions"].out
    assert evaluation.truth_boxes == stages["truth_boxes"].out
    assert evaluation.classifiers == (stages["small"].out, stages["large"].out)
    assert (review.source, review.fold) == (stages["dataset"].out, 2)
    report = stages["report"]
    assert evaluation.anomaly == review.heat_maps == report.heat_maps == stages["anomaly"].out
    assert (report.data, report.predictions) == (stages["dataset"].out, stages["predictions"].out)
    assert (report.evaluation, report.video) == (evaluation.out, review.out)


def test_without_synth_the_source_is_a_category_of_the_mvtec_root(tmp_path: Path) -> None:
    config = settings(tmp_path, synth=None, convert={"source": "cable"}, mvtec_root="/data/mvtec")
    command, convert = run_stage.plan(config)[0]
    assert command == "convert"
    assert convert.model_dump()["source"] == Path("/data/mvtec/cable")


def test_links_follow_a_folder_that_is_given(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    sections = ("synth", "convert", "finetune_yolo", "finetune_sam", "detect_anomaly", "segment")
    changes: dict[str, Any] = {name: {"out": elsewhere / name} for name in (*sections, "evaluate")}
    changes["finetune_classifier"] = {"one": {"out": elsewhere / "one"}}
    plan = run_stage.plan(settings(tmp_path, **changes))
    stages: dict[str, Any] = {stage.out.name: stage for _, stage in plan}
    assert stages["convert"].source == elsewhere / "synth"
    assert stages["finetune_yolo"].data == elsewhere / "convert"
    assert stages["segment"].boxes == str(elsewhere / "finetune_yolo" / "detector.pt")
    assert stages["segment"].sam == str(elsewhere / "finetune_sam" / "sam.safetensors")
    assert stages["evaluate"].predictions == elsewhere / "segment"
    assert stages["evaluate"].classifiers == (elsewhere / "one",)
    assert stages["evaluate"].anomaly == elsewhere / "detect_anomaly"


def test_without_sections_there_is_no_such_training(tmp_path: Path) -> None:
    config = settings(
        tmp_path,
        finetune_sam=None,
        finetune_classifier={},
        detect_anomaly=None,
        segment={"sam": "mobile-sam"},
    )
    stages: dict[str, Any] = {stage.out.name: stage for _, stage in run_stage.plan(config)}
    left_out = ("segmenter", "small", "large", "anomaly")
    assert list(stages) == [name for name in ALL if name not in left_out]
    assert stages["predictions"].sam == stages["truth_boxes"].sam == "mobile-sam"
    assert stages["evaluation"].classifiers == ()
    assert stages["evaluation"].anomaly is stages["report"].heat_maps is None


def test_the_upper_bound_and_the_video_are_of_the_split_that_is_measured(tmp_path: Path) -> None:
    plan = run_stage.plan(settings(tmp_path, evaluate={"split": "val"}))
    stages: dict[str, Any] = {stage.out.name: stage for _, stage in plan}
    assert stages["truth_boxes"].splits == ("val",)
    assert stages["review.mp4"].split == "val"


def test_a_video_that_pages_do_not_play_is_not_in_the_report(tmp_path: Path) -> None:
    plan = run_stage.plan(settings(tmp_path, overlay={"out": tmp_path / "review.gif"}))
    stages: dict[str, Any] = {stage.out.name: stage for _, stage in plan}
    assert stages["report"].video is None


# Running


def test_everything_runs_in_order_and_then_nothing(stages: FakeStages, tmp_path: Path) -> None:
    run_stage.run(settings(tmp_path))
    assert stages.calls == ALL
    before = state(tmp_path)
    run_stage.run(settings(tmp_path))
    assert stages.calls == ALL
    assert state(tmp_path) == before


def test_it_says_where_the_report_and_the_video_are(
    stages: FakeStages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage.run(settings(tmp_path))
    run_stage.run(settings(tmp_path))
    out = capsys.readouterr().out
    assert out.count(f"report: {tmp_path / 'report' / 'index.html'}") == 2
    assert out.count(f"tables: {tmp_path / 'evaluation' / 'report.md'}") == 2
    assert out.count(f"video:  {tmp_path / 'review.mp4'}") == 2
    assert out.count("up to date") == len(ALL)


@pytest.mark.parametrize(("overlay", "expected"), [({}, 0.375), ({"threshold": 0.5}, 0.5)])
def test_the_video_shows_the_chosen_threshold_unless_one_is_given(
    stages: FakeStages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overlay: dict[str, Any],
    expected: float,
) -> None:
    seen: list[Any] = []
    run = stages.run

    def watch(command: str, config: StageConfig) -> None:
        seen.append(config)
        run(command, config)

    monkeypatch.setattr(stages, "run", watch)
    run_stage.run(settings(tmp_path, overlay=overlay))
    (overlay,) = (config for config in seen if config.out.name == "review.mp4")
    assert overlay.threshold == expected


AFTER_DATASET = ALL[ALL.index("detector") :]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"synth": {"seed": 2}}, ALL),
        ({"convert": {"seed": 5}}, ["dataset", *AFTER_DATASET]),
        ({"fold": 1}, AFTER_DATASET),
        ({"init": "other"}, ["detector", "predictions", "evaluation", "review.mp4", "report"]),
        (
            {"finetune_yolo": {"epochs": 9}},
            ["detector", "predictions", "evaluation", "review.mp4", "report"],
        ),
        (
            {"finetune_sam": {"lr": 0.5}},
            ["segmenter", "predictions", "truth_boxes", "evaluation", "review.mp4", "report"],
        ),
        (
            {"finetune_classifier": {"small": {"seed": 3}, "large": {"model": "resnet50"}}},
            ["small", "evaluation", "review.mp4", "report"],
        ),
        (
            {"finetune_classifier": {"small": {"model": "resnet18"}}},
            ["evaluation", "review.mp4", "report"],
        ),
        (
            {"segment": {"min_score": 0.5}},
            ["predictions", "truth_boxes", "evaluation", "review.mp4", "report"],
        ),
        ({"evaluate": {"resamples": 5}}, ["evaluation", "review.mp4", "report"]),
        ({"overlay": {"order": "worst"}}, ["review.mp4", "report"]),
        ({"finetune_yolo": {"device": "cpu", "offline": True}}, []),
    ],
)
def test_a_change_runs_exactly_what_depends_on_it(
    stages: FakeStages, tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    run_stage.run(settings(tmp_path))
    stages.calls.clear()
    run_stage.run(settings(tmp_path, **changes))
    assert stages.calls == expected
    assert stages.resumed == []
    stages.calls.clear()
    run_stage.run(settings(tmp_path, **changes))
    assert stages.calls == []


def test_changed_source_images_are_noticed(stages: FakeStages, tmp_path: Path) -> None:
    image = tmp_path / "mvtec" / "part" / "train" / "good" / "0.png"
    write_text(image, "one")
    changes = {"synth": None, "convert": {"source": "part"}, "mvtec_root": tmp_path / "mvtec"}
    run_stage.run(settings(tmp_path / "out", **changes))
    stages.calls.clear()
    image.touch()
    run_stage.run(settings(tmp_path / "out", **changes))
    assert stages.calls == []
    write_text(image, "two")
    run_stage.run(settings(tmp_path / "out", **changes))
    assert stages.calls == ["dataset", *AFTER_DATASET]


@pytest.mark.parametrize("lost", ["review.mp4", "review.mp4.json", "evaluation/run.json"])
def test_what_was_deleted_is_made_again(stages: FakeStages, tmp_path: Path, lost: str) -> None:
    run_stage.run(settings(tmp_path))
    before = state(tmp_path)
    (tmp_path / lost).unlink()
    stages.calls.clear()
    run_stage.run(settings(tmp_path))
    assert stages.calls == ["review.mp4" if "review" in lost else "evaluation"]
    assert state(tmp_path) == before


def killed(stages: FakeStages, at: int, config: RunConfig) -> bool:
    """Run until the `at`-th point where a process could die; False if there is none."""
    stages.points, stages.kill_at = 0, at
    try:
        run_stage.run(config)
    except Killed:
        return True
    finally:
        stages.kill_at = None
    return False


def test_killed_at_any_point_it_ends_with_the_same_result(
    stages: FakeStages, tmp_path: Path
) -> None:
    def results(out: Path) -> dict[str, str]:
        return {k: v.replace(str(out), "OUT") for k, v in state(out).items()}

    run_stage.run(settings(tmp_path / "whole"))
    expected, points = results(tmp_path / "whole"), stages.points
    assert points > 5 * len(ALL)
    trainings_resumed = set()
    for at in range(1, points + 1):
        out = tmp_path / str(at)
        stages.calls, stages.resumed, stages.epochs = [], [], 0
        assert killed(stages, at, settings(out))
        died = stages.calls[-1]
        run_stage.run(settings(out))
        assert results(out) == expected, f"killed at point {at}, in {died}"
        assert [n for n in ALL if stages.calls.count(n) > 1] in ([died], [])  # nothing else twice
        assert stages.epochs == 4 * EPOCHS, f"epochs were lost or repeated: point {at}, {died}"
        assert set(stages.resumed) <= {died}
        trainings_resumed |= set(stages.resumed)
    assert trainings_resumed == {"detector", "segmenter", "small", "large"}


def test_killed_twice_or_while_replacing_an_older_result(
    stages: FakeStages, tmp_path: Path
) -> None:
    """What a new run replaces must not be taken for a part of it."""
    newer = {"synth": {"seed": 2}, "finetune_yolo": {"epochs": 9}}
    run_stage.run(settings(tmp_path / "new", **newer))
    expected = tree(tmp_path / "new")
    stages.points = 0
    run_stage.run(settings(tmp_path / "old"))
    points = stages.points
    for at in range(1, points, 4):
        run_stage.run(settings(tmp_path / "old"))
        assert killed(stages, at, settings(tmp_path / "old", **newer))
        killed(stages, 3, settings(tmp_path / "old", **newer))
        run_stage.run(settings(tmp_path / "old", **newer))
        assert tree(tmp_path / "old") == expected, at


def test_a_training_that_was_interrupted_starts_anew_when_its_data_changed(
    stages: FakeStages, tmp_path: Path
) -> None:
    at = next(n for n in range(1, 99) if _dies_in_epoch(stages, n, tmp_path / str(n)))
    out = tmp_path / str(at)
    stages.resumed = []
    run_stage.run(settings(out, convert={"seed": 8}))  # asserts that no epoch is of other data
    assert stages.resumed == []
    assert (out / "detector" / "run.json").is_file()


def _dies_in_epoch(stages: FakeStages, at: int, out: Path) -> bool:
    killed(stages, at, settings(out))
    return (out / "detector" / "weights" / "last.pt").is_file()


# Folds

OF_A_FOLD = ALL[ALL.index("detector") : ALL.index("evaluation")]
OF_ALL = [*ALL[:2], *OF_A_FOLD * FOLDS, *ALL[-3:]]


def folds(out: Path, **changes: Any) -> RunConfig:
    return settings(out, **({"fold": "all", "convert": {"folds": FOLDS}} | changes))


def test_all_folds_have_stages_of_their_own_and_one_evaluation(tmp_path: Path) -> None:
    plan = run_stage.plan(folds(tmp_path, init="start.pt"))
    assert [stage.out.name for _, stage in plan] == OF_ALL
    stages: dict[str, Any] = {str(stage.out.relative_to(tmp_path)): stage for _, stage in plan}
    assert len(stages) == len(plan)
    for k in range(FOLDS):
        of_fold = [stage for name, stage in stages.items() if name.startswith(f"fold{k}/")]
        assert [stage.fold for stage in of_fold] == [k] * len(OF_A_FOLD)
        detector, predictions = stages[f"fold{k}/detector"], stages[f"fold{k}/predictions"]
        assert detector.model == "start.pt"
        assert predictions.boxes == str(detector.out / "detector.pt")
        assert predictions.sam == str(tmp_path / f"fold{k}" / "segmenter" / "sam.safetensors")
    evaluation, review = stages["evaluation"], stages["review.mp4"]
    assert (evaluation.fold, review.fold) == ("all", "all")
    assert evaluation.predictions == tmp_path / "fold{fold}" / "predictions"
    assert evaluation.truth_boxes == tmp_path / "fold{fold}" / "truth_boxes"
    assert evaluation.classifiers[1] == tmp_path / "fold{fold}" / "classifiers" / "large"
    assert evaluation.anomaly == review.heat_maps == tmp_path / "fold{fold}" / "anomaly"
    assert review.predictions == tmp_path / "evaluation" / "out_of_fold"
    assert review.threshold is None  # each image has that of its fold
    assert stages["report"].predictions == review.predictions


def test_one_fold_of_a_configuration_is_taken_over_by_all(
    stages: FakeStages, tmp_path: Path
) -> None:
    run_stage.run(folds(tmp_path, fold=1))
    assert stages.calls == ALL
    stages.calls.clear()
    run_stage.run(folds(tmp_path))
    assert stages.calls == [*OF_A_FOLD, *ALL[-3:]]  # the other fold, and the two of all
    stages.calls.clear()
    for fold in ("all", 1):
        run_stage.run(folds(tmp_path, fold=fold))
        assert stages.calls == []
    run_stage.run(folds(tmp_path, finetune_yolo={"epochs": 9}))
    assert stages.calls == [*["detector", "predictions"] * FOLDS, *ALL[-3:]]


def test_all_folds_killed_here_and_there_end_with_the_same_result(
    stages: FakeStages, tmp_path: Path
) -> None:
    run_stage.run(folds(tmp_path / "whole"))
    expected, points = tree(tmp_path / "whole"), stages.points
    for at in range(3, points, 17):
        out = tmp_path / str(at)
        stages.calls, stages.epochs = [], 0
        assert killed(stages, at, folds(out))
        run_stage.run(folds(out))
        assert tree(out) == expected, at
        assert stages.epochs == 4 * EPOCHS * FOLDS


def test_the_time_of_each_fold_is_told(
    stages: FakeStages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = [0.0]
    monkeypatch.setattr(run_stage.time, "monotonic", lambda: clock[0])
    run = stages.run

    def take_time(command: str, config: StageConfig) -> None:
        clock[0] += 90 if command == "finetune-yolo" else 6
        run(command, config)

    monkeypatch.setattr(stages, "run", take_time)
    run_stage.run(folds(tmp_path))
    seconds = read_json(tmp_path / "fold1" / "detector" / "run.json")["seconds"]
    assert seconds == 90
    out = " ".join(capsys.readouterr().out.split())
    assert "fold 0: 2.1 minutes" in out and "fold 1: 2.1 minutes" in out  # 90 + 6 x 6 seconds
    assert "fold 1, finetune-sam" in out
    assert read_json(tmp_path / "review.mp4.json")["seconds"] == 6
    run_stage.run(folds(tmp_path))  # nothing runs, but the time stays known
    assert "fold 1: 2.1 minutes" in capsys.readouterr().out


def test_the_time_of_a_resumed_training_is_not_known(
    stages: FakeStages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = next(n for n in range(1, 99) if _dies_in_epoch(stages, n, tmp_path / str(n)))
    run_stage.run(settings(tmp_path / str(at)))
    assert stages.resumed == ["detector"]
    assert read_json(tmp_path / str(at) / "detector" / "run.json")["seconds"] is None
    assert read_json(tmp_path / str(at) / "segmenter" / "run.json")["seconds"] is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convert": {}}, "convert.folds: expected 2 or more for fold all, found none"),
        ({"evaluate": {"split": "val"}}, "evaluate.split: expected 'test' for fold all"),
        (
            {"finetune_classifier": {"small": {"out": "o"}}},
            r"finetune_classifier.small.out: expected a path with {fold} for fold all, found o",
        ),
        ({"fold": 1.5}, "fold: expected the number of a fold, or 'all', found 1.5"),
    ],
)
def test_what_does_not_go_with_all_folds(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        folds(tmp_path, **changes)


def test_folders_that_are_given_can_have_the_number_of_the_fold(tmp_path: Path) -> None:
    elsewhere = tmp_path / "{fold}" / "detector"
    plan = run_stage.plan(folds(tmp_path, finetune_yolo={"out": elsewhere}))
    stages: Any = [stage for _, stage in plan]
    detectors = [s for s in stages if s.out.name == "detector"]
    assert [s.out for s in detectors] == [tmp_path / str(k) / "detector" for k in range(FOLDS)]
    predictions = [s for s in stages if s.out.name == "predictions"]
    assert [s.boxes for s in predictions] == [str(s.out / "detector.pt") for s in detectors]


# Bad input


def test_nothing_is_written_when_a_section_is_wrong(stages: FakeStages, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^finetune_yolo.epoch: unknown key, did you mean 'epoc"):
        run_stage.run(settings(tmp_path / "out", finetune_yolo={"epoch": 3}))
    assert stages.calls == []
    assert not (tmp_path / "out").exists()


def test_other_peoples_files_are_left_alone(stages: FakeStages, tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(UserError, match="found other files in"):
        run_stage.run(settings(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]
    assert stages.calls == []


def test_the_resolved_configuration_is_kept(stages: FakeStages, tmp_path: Path) -> None:
    config = settings(tmp_path, evaluate={"resamples": 7})
    run_stage.run(config)
    path = tmp_path / "config.yaml"
    assert path.read_text().startswith(f"# pipeline run {path}\n")
    assert build(RunConfig, yaml.safe_load(path.read_text())) == config
