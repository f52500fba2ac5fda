"""Records of results: what they say, and when a result counts as the same."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import __version__, cli, record, resources
from pipeline.config import (
    ConvertConfig,
    EvaluateConfig,
    FinetuneSamConfig,
    FinetuneYoloConfig,
    OverlayConfig,
    RunConfig,
    SegmentConfig,
    StageConfig,
    build,
    read_yaml,
)
from pipeline.data.files import read_json, write_json
from pipeline.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "a.png").write_bytes(b"a")
    (tmp_path / "data" / "deep" / "b.png").write_bytes(b"b")
    return tmp_path / "data"


def yolo(data: Path, **options: Any) -> FinetuneYoloConfig:
    return build(FinetuneYoloConfig, {"data": data, "out": data.parent / "out", **options})


def sign(config: StageConfig) -> str:
    return record.signature("finetune-yolo", config)


# What is written


def test_the_configuration_comes_back_equal_through_its_own_first_line(data: Path) -> None:
    config = yolo(data, prompts={"cut lead": "ein Draht: ü"}, fold=0, lr=1e-7, device="0,1")
    record.claim("finetune-yolo", config)
    record.write_config(config.out, "finetune-yolo", config)
    path = config.out / "config.yaml"
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert shlex.split(first) == [
        "#", "pipeline", "finetune-yolo", "--config", str(config.out / "config.yaml")
    ]  # fmt: skip
    assert build(FinetuneYoloConfig, read_yaml(path)) == config


def test_every_kind_of_configuration_comes_back_equal(tmp_path: Path) -> None:
    here = {"out": tmp_path / "o"}
    examples: dict[str, Any] = {
        "convert": build(ConvertConfig, here | {"source": tmp_path, "one_per_image": ()}),
        "segment": build(SegmentConfig, here | {"source": tmp_path, "boxes": "truth"}),
        "evaluate": build(
            EvaluateConfig,
            here | {"data": "d", "predictions": "p", "classifiers": (tmp_path, tmp_path)},
        ),
        "run": build(RunConfig, here | {"convert": {"source": "x"}, "init": "yolov8n.pt"}),
    }
    for command, config in examples.items():
        record.write_config(config.out, command, config)
        assert build(type(config), read_yaml(config.out / "config.yaml")) == config
    first = (tmp_path / "o" / "config.yaml").read_text().splitlines()[0]
    assert first == f"# pipeline run {tmp_path / 'o' / 'config.yaml'}"  # a run takes no --config


def test_the_record_has_versions_revision_and_checksums(data: Path) -> None:
    weights = data.parent / "start.pt"
    weights.write_bytes(b"abc")
    config = yolo(data, model=str(weights))
    record.claim("finetune-yolo", config)
    record.write_config(config.out, "finetune-yolo", config)
    assert not (config.out / "run.json").exists()
    record.write_record(config.out, "finetune-yolo", config)
    written = read_json(config.out / "run.json")
    assert written["command"] == "finetune-yolo"
    assert written["signature"] == sign(config)
    assert written["inputs"]["model"] == hashlib.sha256(b"abc").hexdigest()
    assert len(written["inputs"]["data"]) == 64
    assert written["pipeline"] == __version__
    assert written["packages"]["torch"]
    assert written["packages"]["numpy"]
    assert not (config.out / "begun.json").exists()
    assert record.is_complete(config.out, sign(config))


def test_the_revision_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["git", "rev-parse", "HEAD"]
    root = Path(record.__file__).parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    revision = record.versions()["revision"]
    if done.returncode:  # not a checkout: an unpacked archive
        assert revision is None
    else:
        assert done.stdout.startswith(revision.removesuffix("+").split("-g")[-1])
    monkeypatch.setattr(resources, "in_checkout", lambda: False)
    assert record.versions()["revision"] is None


def test_a_video_has_its_record_beside_it(data: Path) -> None:
    config = build(OverlayConfig, {"source": data, "out": data.parent / "review.mp4"})
    config.out.write_bytes(b"video")
    record.write_record(config.out, "overlay", config)
    wanted = record.signature("overlay", config)
    assert (data.parent / "review.mp4.json").is_file()
    assert not (data.parent / "config.yaml").exists()
    assert record.is_complete(config.out, wanted)
    config.out.unlink()
    assert not record.is_complete(config.out, wanted)  # the record alone is no video


# Signatures


@pytest.mark.parametrize(
    "options",
    [{"out": "elsewhere"}, {"force": True}, {"resume": True}, {"device": "0"}, {"offline": True}],
)
def test_where_and_how_a_stage_runs_does_not_count(data: Path, options: dict[str, Any]) -> None:
    assert sign(yolo(data, **options)) == sign(yolo(data))


@pytest.mark.parametrize(
    "options",
    [{"epochs": 3}, {"seed": 1}, {"lr": 1e-4}, {"prompts": {"a": "b"}}, {"model": "other"},
     {"fold": 0}, {"augment": False}],
)  # fmt: skip
def test_options_count(data: Path, options: dict[str, Any]) -> None:
    assert sign(yolo(data, **options)) != sign(yolo(data))


def test_the_command_and_the_version_count(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sign(yolo(data))
    assert record.signature("other", yolo(data)) != before
    monkeypatch.setattr(record, "__version__", "99")
    assert sign(yolo(data)) != before


def test_the_content_of_inputs_counts_but_not_their_place_or_age(data: Path) -> None:
    before = sign(yolo(data))
    os.utime(data / "a.png", (0, 0))
    assert sign(yolo(data)) == before
    data = data.rename(data.with_name("moved"))
    assert sign(yolo(data)) == before
    (data / "a.png").write_bytes(b"A")
    changed = sign(yolo(data))
    assert changed != before
    (data / "a.png").rename(data / "c.png")
    assert sign(yolo(data)) not in (before, changed)
    (data / "c.png").unlink()
    assert sign(yolo(data)) not in (before, changed)


def test_the_signature_of_a_finished_run_stands_for_its_folder(data: Path) -> None:
    write_json(data / "run.json", {"signature": "s1"})
    before = sign(yolo(data))
    (data / "a.png").write_bytes(b"a cache, or a log")
    assert sign(yolo(data)) == before
    write_json(data / "run.json", {"signature": "s2"})
    assert sign(yolo(data)) != before


@pytest.mark.parametrize("content", [{"other": 1}, [1], {"signature": None}])
def test_another_tools_run_json_is_just_a_file(data: Path, content: Any) -> None:
    before = sign(yolo(data))
    write_json(data / "run.json", content)
    assert sign(yolo(data)) != before
    assert not record.is_complete(data, "x")


def test_known_weights_count_by_their_checksum(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config() -> FinetuneSamConfig:
        return build(FinetuneSamConfig, {"data": data, "out": "o", "model": "mobile-sam"})

    entry = record.load_registry()["mobile-sam"]
    assert record.inputs_of(config())["model"] == entry.sha256
    before = sign(config())
    replaced = entry.model_copy(update={"sha256": "0" * 64})
    monkeypatch.setattr(record, "load_registry", lambda: {"mobile-sam": replaced})
    assert sign(config()) != before


def test_several_inputs_of_one_option_all_count(data: Path) -> None:
    def evaluate(*classifiers: Path) -> str:
        values = {"data": data, "predictions": data, "out": data, "classifiers": classifiers}
        config = build(EvaluateConfig, values)
        return record.signature("evaluate", config)

    other = data / "deep"
    signatures = [evaluate(), evaluate(data), evaluate(data, other), evaluate(other, data)]
    assert len(set(signatures)) == 4


# Claiming a folder


def test_a_new_or_empty_folder_can_be_claimed(data: Path, tmp_path: Path) -> None:
    config = yolo(data, out=tmp_path / "a" / "b")
    for _ in range(2):
        record.claim("finetune-yolo", config)
        assert config.out.is_dir()


def test_a_finished_result_wants_force(data: Path) -> None:
    config = yolo(data)
    record.claim("finetune-yolo", config)
    record.write_record(config.out, "finetune-yolo", config)
    with pytest.raises(UserError, match="holds a finished result; give --force"):
        record.claim("finetune-yolo", config)
    assert record.is_complete(config.out, sign(config))
    record.claim("finetune-yolo", config.model_copy(update={"force": True}))
    assert not record.is_complete(config.out, sign(config))


@pytest.mark.parametrize("force", [False, True])
def test_other_peoples_files_are_never_claimed(data: Path, tmp_path: Path, force: bool) -> None:
    path = tmp_path / "mine" / "thesis.doc"
    path.parent.mkdir()
    path.touch()
    with pytest.raises(UserError, match="found other files in"):
        record.claim("finetune-yolo", yolo(data, out=path.parent, force=force))
    with pytest.raises(UserError, match="expected a folder, found the file"):
        record.claim("finetune-yolo", yolo(data, out=path, force=force))
    assert path.exists()


@pytest.mark.parametrize("text", ["", "lr: 0.1\n", "# settings of mine\nlr: 0.1\n"])
def test_a_config_of_somebody_else_does_not_make_a_folder_ours(data: Path, text: str) -> None:
    config = yolo(data, force=True)
    config.out.mkdir()
    (config.out / "config.yaml").write_text(text)
    with (
        pytest.raises(UserError, match="found other files in"),
        record.result("finetune-yolo", config),
    ):
        pass
    with pytest.raises(UserError, match="found other files in"):
        record.claim("finetune-yolo", config)
    assert (config.out / "config.yaml").read_text() == text


def test_a_result_of_another_command_is_never_replaced(data: Path) -> None:
    config = yolo(data, force=True)
    record.claim("finetune-yolo", config)
    record.write_config(config.out, "finetune-yolo", config)
    with pytest.raises(UserError, match="expected a new folder or one of segment, found finetune"):
        record.claim(
            "segment",
            build(SegmentConfig, {"source": data, "boxes": "x", "out": config.out, "force": True}),
        )


@pytest.mark.parametrize("out", ["data", ".", "runs", "runs/fold1"])
def test_an_input_is_never_replaced(tmp_path: Path, out: str) -> None:
    (tmp_path / "data").mkdir()
    for fold in range(2):
        (tmp_path / "runs" / f"fold{fold}" / "predictions").mkdir(parents=True)
    values = {"data": tmp_path / "data", "predictions": tmp_path / "runs/fold{fold}/predictions"}
    config = build(EvaluateConfig, {**values, "fold": "all", "out": tmp_path / out, "force": True})
    with pytest.raises(UserError, match=r"--out: expected a place apart from --(data|predictions)"):
        record.check_out("evaluate", config)


def test_the_result_takes_its_place_when_it_is_complete(data: Path) -> None:
    config = yolo(data, force=True)
    for content in ("old", "new"):
        with record.result("finetune-yolo", config) as folder:
            (folder / f"{content}.txt").write_text(content)
            record.write_record(folder, "finetune-yolo", config)
    assert {path.name for path in config.out.iterdir()} == {"config.yaml", "new.txt", "run.json"}
    with pytest.raises(RuntimeError), record.result("finetune-yolo", config) as folder:
        (folder / "newer.txt").touch()
        raise RuntimeError
    assert (config.out / "new.txt").read_text() == "new"
    assert record.is_complete(config.out, sign(config))
    (config.out / "notes.txt").touch()
    with (
        pytest.raises(
            UserError, match=r"nothing but the result to replace in .*, found notes\.txt"
        ),
        record.result("finetune-yolo", config),
    ):
        pass
    assert {path.name for path in data.parent.iterdir()} == {"data", "out"}


def test_a_result_that_is_a_link_stays_one(data: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    config = yolo(data, out=tmp_path / "link")
    with record.result("finetune-yolo", config) as folder:
        record.write_record(folder, "finetune-yolo", config)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "run.json").is_file()


def test_what_a_killed_process_left_can_be_claimed(data: Path) -> None:
    config = yolo(data)
    record.claim("finetune-yolo", config)
    (config.out / ".config-x1.yaml").touch()  # a temporary file
    record.claim("finetune-yolo", config)
    record.write_config(config.out, "finetune-yolo", config)
    (config.out / "results.csv").touch()
    record.claim("finetune-yolo", config)


# Resuming


@pytest.mark.parametrize("checkpoint", ["last.pt", "weights/last.pt"])
def test_a_training_resumes_only_with_the_same_options_and_inputs(
    data: Path, checkpoint: str
) -> None:
    config = yolo(data)

    def resumable(config: StageConfig) -> bool:
        return record.can_resume("finetune-yolo", config)

    assert not resumable(config)
    record.claim("finetune-yolo", config)
    record.write_config(config.out, "finetune-yolo", config)
    assert not resumable(config)  # no checkpoint yet
    path = config.out / checkpoint
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert resumable(config)
    assert resumable(config.model_copy(update={"force": True, "device": "0"}))
    assert not resumable(config.model_copy(update={"epochs": 3}))
    (data / "a.png").write_bytes(b"changed")
    assert not resumable(config)
    (data / "a.png").write_bytes(b"a")
    record.write_record(config.out, "finetune-yolo", config)
    assert not resumable(config)  # finished


def test_a_new_claim_forgets_old_checkpoints(data: Path) -> None:
    config = yolo(data)
    record.claim("finetune-yolo", config)
    record.write_config(config.out, "finetune-yolo", config)
    (config.out / "last.pt").touch()
    record.claim("finetune-yolo", config)
    assert not (config.out / "last.pt").exists()


def test_recorded_configurations_can_be_run_again(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yolo(data, epochs=3)
    record.write_config(config.out, "finetune-yolo", config)
    first = (config.out / "config.yaml").read_text().splitlines()[0]
    seen: list[Any] = []
    monkeypatch.setattr(
        cli.importlib, "import_module", lambda name: type("Stage", (), {"run": seen.append})
    )
    cli.main(shlex.split(first)[2:])
    assert seen == [config]
    assert yaml.safe_load((config.out / "config.yaml").read_text())["epochs"] == 3


# How long it took


def test_the_record_says_how_long_a_stage_took(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(record.time, "time", lambda: now)
    config = yolo(data)
    for resumed, expected in ((False, 90.5), (True, None)):
        record.claim("finetune-yolo", config.model_copy(update={"force": True}))
        record.write_config(config.out, "finetune-yolo", config)
        now += 90.5
        again = config.model_copy(update={"resume": resumed})
        record.write_record(config.out, "finetune-yolo", again)
        assert read_json(config.out / "run.json")["seconds"] == expected
        assert record.seconds_of(config.out) == expected
