"""The command line, mostly with a stage that only notes the configuration it was given."""

from __future__ import annotations

import errno
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli, config
from pipeline.config import Config
from pipeline.errors import UserError

ROOT = Path(__file__).parents[1]
MAIN = (sys.executable, "-m", "pipeline")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that stages were called with; no stage does anything."""
    configurations: list[Any] = []
    for command in cli.COMMANDS:
        _replace(monkeypatch, command, configurations.append)
    return configurations


def _replace(monkeypatch: pytest.MonkeyPatch, command: str, run: Callable[[Any], object]) -> None:
    name = f"pipeline.stages.{command.replace('-', '_')}"
    monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setattr(sys.modules[name], "run", run, raising=False)


def failing(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """The lines on stderr of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(argv))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


# The process


def test_help_answers_in_half_a_second() -> None:
    """Of the processor's time: whatever else the machine does would be counted in a clock's."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(5):
        before = spent()
        done = subprocess.run([*MAIN, "--help"], cwd=ROOT, capture_output=True, text=True)
        times.append(spent() - before)
        assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^ +{command}\b", done.stdout, re.M) for command in cli.COMMANDS)
    assert min(times) < 0.5, times


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['pipeline', 'segment', '--help']\n"
        "import atexit; atexit.register(lambda: print(*sys.modules, sep='\\n', file=sys.stderr))\n"
        "from pipeline.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    modules = {line.split(".")[0] for line in done.stderr.splitlines()}
    assert "pydantic" in modules  # so the list is one of modules
    heavy = {"torch", "cv2", "numpy", "ultralytics", "supervision", "matplotlib", "requests"}
    assert not modules & heavy


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["run"], ["weights"], ["synth", "--size"]])
def test_a_command_line_that_says_too_little_ends_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help_with_every_option(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    cls = cli.COMMANDS[command]
    assert (cls.__doc__ or "").splitlines()[0] in " ".join(text.split())
    for name in cls.model_fields:
        if name not in config.SECTIONS and name not in cls.positional:
            assert config.flag_of(cls, name) in text


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("finetune-yolo", "segment"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in ("images (default: yes)", "random (default: 0)", "dataset (default: val test)"):
        assert default in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"pipeline \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_real_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    options = shlex.split("synth --train-good 1 --test-good 1 --per-defect 1 --size 64 --out")
    out = tmp_path / "ünï côde 数据"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*MAIN, *options, out], cwd=ROOT, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(out.rglob("*.png"))) == 2 + 4 * 2
    done = subprocess.run([*MAIN, *options, out], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert done.stderr == (
        f"pipeline synth: --out: {out} holds a finished result; give --force to replace it\n"
    )


def test_ctrl_c_ends_with_130_and_leaves_no_result(tmp_path: Path) -> None:
    out = tmp_path / "mvtec"
    command = [*MAIN, "synth", "--train-good", "4000", "--size", "64", "--out", str(out)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while not list(tmp_path.rglob("*.png")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "pipeline synth: interrupted"
    assert not list(tmp_path.rglob("*.png"))
    assert not (out / "run.json").exists()


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [*MAIN, "weights", "list"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(timeout=30)


# Values


def test_flags_override_the_file(called: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "yolo.yaml"
    file.write_text("data: d\nout: o\nepochs: 3\nlr: 1e-3\naugment: false\nprompts: {a: x}\n")
    cli.main(["finetune-yolo", "--config", str(file), "--epochs", "5", "--augment"])
    (settings,) = called
    assert (settings.epochs, settings.lr, settings.augment) == (5, 1e-3, True)
    assert settings.prompts == {"a": "x"}
    assert settings.image_size == 416  # the default


@pytest.mark.parametrize(
    ("argv", "field", "expected"),
    [
        (["--no-augment"], "augment", False),
        (["--augment"], "augment", True),
        (["--offline"], "offline", True),
        (["--prompts", "a=cut lead", "b=x=y"], "prompts", {"a": "cut lead", "b": "x=y"}),
        (["--prompts", "a=1", "--prompts", "b=2"], "prompts", {"a": "1", "b": "2"}),
        (["--device", "0,1"], "device", "0,1"),
        (["--fold", "2"], "fold", 2),
        (["--out", "a b/ü"], "out", Path("a b/ü")),
    ],
)
def test_flags_become_values(
    called: list[Any], argv: list[str], field: str, expected: object
) -> None:
    cli.main(["finetune-yolo", "--data", "d", "--out", "o", *argv])
    assert getattr(called[0], field) == expected


def test_lists_of_values(called: list[Any]) -> None:
    cli.main(["segment", "--source", "s", "--boxes", "truth", "--out", "o", "--splits", "test"])
    assert called[0].splits == ("test",)
    cli.main(shlex.split("convert --source s --out o --fractions .5 .25 .25 --one-per-image"))
    assert called[1].fractions == (0.5, 0.25, 0.25)
    assert called[1].one_per_image == ()
    cli.main(["weights", "verify", "a", "b"])
    assert (called[2].action, called[2].names) == ("verify", ("a", "b"))
    cli.main(shlex.split("finetune-sam --data a b --out o --free-pose"))
    assert (called[3].data, called[3].free_pose) == ((Path("a"), Path("b")), True)


def test_set_reaches_any_key_of_a_run(called: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("out: o\nconvert: {source: a}\nfinetune_sam:\nfinetune_yolo: {lr: 0.1}\n")
    flags = """
        --fold 1
        --set finetune_yolo.epochs=3 convert.seed=5
        --set "finetune_yolo.prompts.bent_lead=a bent lead" finetune_sam.train=all
        --set segment.splits=[test] finetune_classifier.x.rotation=15 init=n.pt
    """
    cli.main(["run", str(file), *shlex.split(flags)])
    (settings,) = called
    assert settings.finetune_yolo == {
        "lr": 0.1,
        "epochs": 3,
        "prompts": {"bent_lead": "a bent lead"},
    }
    assert settings.convert == {"source": "a", "seed": 5}
    assert settings.finetune_sam == {"train": "all"}
    assert settings.segment == {"splits": ["test"]}
    assert settings.finetune_classifier == {"x": {"rotation": 15}}
    assert (settings.init, settings.fold) == ("n.pt", 1)


def test_set_null_leaves_a_section_out(called: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("out: o\nconvert: {source: a}\nfinetune_sam: {epochs: 2}\n")
    cli.main(["run", str(file), "--set", "finetune_sam=null"])
    assert called[0].finetune_sam is None


# Bad input


def test_all_problems_of_file_flags_and_assignments_come_at_once(
    called: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("out: o\nconvert: {source: a, sede: 3}\n7: x\n")
    lines = failing(
        capsys, "run", str(file), "--inti", "x", "--fold", "-1", "stray", "--set",
        "finetune_yolo.epoch=3", "nonsense", "=1", "out.deep=1", "segment.zoom=[1",
    )  # fmt: skip
    start = "pipeline run: "
    assert all(line.startswith(start) for line in lines)
    assert sorted(line.removeprefix(start) for line in lines) == sorted(
        [
            "--inti: unknown flag, did you mean '--init'?",
            "--set: expected KEY=VALUE, found 'nonsense'",
            "--set: expected KEY=VALUE, found '=1'",
            "--set out.deep: expected keys and values in out, found 'o'",
            "--set segment.zoom: expected a YAML value, found '[1'",
            "--set finetune_yolo.epoch: unknown key, did you mean 'epochs'?",
            "--fold: expected the number of a fold, or 'all', found '-1'",
            f"{file}: convert.sede: unknown key, did you mean 'seed'?",
            f"{file}: 7: unknown key",
            "stray: expected a flag, found a value",
        ]
    )
    assert called == []


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["synth", "--out", "o", "--siez", "9"], "--siez: unknown flag, did you mean '--size'?"),
        (["synth", "--out", "o", "--siz=9"], "--siz=9: unknown flag, did you mean '--size'?"),
        (["synth", "--out", "o", "--zzzz"], "--zzzz: unknown flag"),
        (["synth", "--out", "o", "foo"], "foo: expected a flag, found a value"),
        (["synth"], "--out: required, not given"),
        (["synth", "--out", "o", "--seed", "1e9"], "--seed: expected a whole number, found '1e9'"),
        (
            ["synth", "--out", "o", "--config", "."],
            ".: expected a YAML file, found: Is a directory",
        ),
        (["weights", "lst"], "action: expected 'list', 'pull' or 'verify', found 'lst'"),
        (
            ["finetune-yolo", "--data", "d", "--out", "o", "--prompts", "x"],
            "--prompts: expected KEY=VALUE, found 'x'",
        ),
        (
            ["finetune-yolo", "--data", "d", "--out", "o", "--lr", "nan"],
            "--lr: expected a finite number, found 'nan'",
        ),
    ],
)
def test_a_mistake_is_one_line(
    called: list[Any], capsys: pytest.CaptureFixture[str], argv: list[str], expected: str
) -> None:
    assert failing(capsys, *argv) == [f"pipeline {argv[0]}: {expected}"]
    assert called == []


def test_a_configuration_that_is_nowhere_lists_those_that_ship(
    called: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = failing(capsys, "run", "configs/nope.yaml")
    assert line.startswith("pipeline run: configs/nope.yaml: expected a configuration file, found")
    assert "demo.yaml" in line
    # Another folder's demo.yaml is not the one that ships.
    failing(capsys, "run", "elsewhere/demo.yaml")
    assert called == []


def test_a_configuration_that_ships_is_found_from_anywhere(
    called: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo.yaml", "configs/demo.yaml"):
        cli.main(["run", name])
    (tmp_path / "demo.yaml").write_text("out: mine\nsynth: {}\n")
    cli.main(["run", "demo.yaml"])
    assert [str(settings.out) for settings in called] == ["runs/demo", "runs/demo", "mine"]


# What a stage may raise


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UserError("--a: one", "--b: two"), 2, ["--a: one", "--b: two"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            2,
            ["/x/y: No space left on device"],
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, ["No space left on device"]),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, ["/x: Permission denied"]),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    lines: list[str],
) -> None:
    def run(_: Config) -> None:
        raise error

    _replace(monkeypatch, "synth", run)
    with pytest.raises(SystemExit) as caught:
        cli.main(["synth", "--out", "o"])
    assert caught.value.code == code
    assert capsys.readouterr().err.splitlines() == [f"pipeline synth: {line}" for line in lines]


@pytest.mark.parametrize("error", [RuntimeError("cannot release un-acquired lock"), OSError(4, "")])
def test_ended_is_143_whatever_the_code_it_met_makes_of_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run(_: Config) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise error

    before = signal.getsignal(signal.SIGTERM)
    _replace(monkeypatch, "synth", run)
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main(["synth", "--out", "o"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ValueError("a bug"), OSError("a bug")):

        def run(_: Config, error: Exception = error) -> None:
            raise error

        _replace(monkeypatch, "synth", run)
        with pytest.raises(type(error), match="a bug"):
            cli.main(["synth", "--out", "o"])


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("file/deep", "{root}/file: File exists"),
        ("file", "--out: expected a folder, found the file {root}/file"),
        ("n" * 300, "{root}/" + "n" * 300 + ": File name too long"),
        ("full", "--out: expected a new folder or one of ours, found other files in {root}/full"),
    ],
)
def test_a_place_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, out: str, expected: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (line,) = failing(capsys, "synth", "--out", str(tmp_path / out), "--force")
    assert line == "pipeline synth: " + expected.format(root=tmp_path)
    assert (tmp_path / "file").read_text() == (tmp_path / "full/notes.txt").read_text() == "mine"
