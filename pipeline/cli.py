"""The command line: one thin function per command.

Flags are made from the fields of the command's configuration. The stage is imported only when it
runs, so `pipeline --help` stays fast.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
import threading
import typing
from pathlib import Path
from typing import Any

import yaml

from pipeline import __version__, config, resources
from pipeline.errors import UserError

COMMANDS: dict[str, type[config.Config]] = {
    "synth": config.SynthConfig,
    "convert": config.ConvertConfig,
    "finetune-yolo": config.FinetuneYoloConfig,
    "finetune-sam": config.FinetuneSamConfig,
    "finetune-classifier": config.FinetuneClassifierConfig,
    "finetune-head": config.FinetuneHeadConfig,
    "detect-anomaly": config.DetectAnomalyConfig,
    "segment": config.SegmentConfig,
    "apply-review": config.ApplyReviewConfig,
    "export": config.ExportConfig,
    "import": config.ImportConfig,
    "evaluate": config.EvaluateConfig,
    "measure": config.MeasureConfig,
    "overlay": config.OverlayConfig,
    "report": config.ReportConfig,
    "run": config.RunConfig,
    "weights": config.WeightsConfig,
}
MODULES = {"export": "export_labels", "import": "import_labels"}  # not named like their commands


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, check the configuration, run the command's stage.

    Exit codes: 0 done, 2 bad input (one line per problem on stderr), 130 interrupted, 143 ended.
    """
    ended = threading.Event()

    def end(*_: object) -> None:
        """End as an exception does, so that what is half-written is removed."""
        ended.set()
        sys.exit(143)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
    parsed, unknown = _parser().parse_known_args(argv)
    arguments = vars(parsed)
    command = arguments.pop("command")
    try:
        _run(command, arguments, unknown)
    except BaseException:
        if ended.is_set():  # what was ended between two lines may raise something else
            sys.exit(143)
        raise


def _run(command: str, arguments: dict[str, Any], unknown: list[str]) -> None:
    """Run the command's stage; what the user or the system did wrong ends as lines on stderr."""
    try:
        settings = _settings(COMMANDS[command], arguments, unknown)
        name = MODULES.get(command, command.replace("-", "_"))
        stage = importlib.import_module(f"pipeline.stages.{name}")
        stage.run(settings)
    except UserError as error:
        for problem in error.problems:
            print(f"pipeline {command}: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"pipeline {command}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a read-only folder, a path below a file
        if error.errno is None:  # not the system's word, so a mistake of ours
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        print(f"pipeline {command}: {place}{error.strerror}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pipeline", description="Find, name and outline defects: from MVTec masks to a report."
    )
    parser.add_argument("--version", action="version", version=f"pipeline {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, cls in COMMANDS.items():
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        if "config" in cls.positional:
            command.add_argument("config", type=Path, help="YAML file with the options")
        else:
            command.add_argument(
                "--config", type=Path, metavar="FILE", help="YAML file; flags override it"
            )
        for field, info in cls.model_fields.items():
            _add_flag(command, config.flag_of(cls, field), field, info)
        if cls is config.RunConfig:
            command.add_argument(
                "--set",
                nargs="+",
                action="extend",
                metavar="KEY=VALUE",
                help="set any key: finetune_yolo.epochs=10",
            )
    return parser


def _add_flag(parser: argparse.ArgumentParser, flag: str, name: str, info: Any) -> None:
    """Add the flag of one field. Values stay text: the configuration parses and checks them."""
    kind = info.annotation
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    text = (info.description or "").replace("%", "%%")
    if default not in (None, (), {}) and default is not False:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {'yes' if default is True else shown})"
    origin = typing.get_origin(kind)
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif origin is tuple:
        parser.add_argument(flag, nargs="*", help=text, metavar=name.upper())
    elif kind == dict[str, str]:
        parser.add_argument(flag, nargs="+", action="extend", help=text, metavar="KEY=TEXT")
    elif "dict[str, Any]" not in str(kind):  # a run's sections come from its YAML file, or --set
        choices = typing.get_args(kind) if origin is typing.Literal else ()
        metavar = "|".join(choices) or name.upper()
        if flag.startswith("-"):
            parser.add_argument(flag, help=text, metavar=metavar, dest=name)
        else:  # it may also stand in the file of --config
            parser.add_argument(flag, help=text, metavar=metavar, nargs="?")


def _settings(cls: type[config.Config], flags: dict[str, Any], unknown: list[str]) -> config.Config:
    """The configuration: a YAML file's values, overridden by flags. Raises `UserError`."""
    file = flags.pop("config", None)
    assignments = flags.pop("set", [])
    problems = _unknown_flags(cls, unknown)
    values: dict[Any, Any] = {}
    if file is not None:
        file = resources.config_file(file)
        values = config.read_yaml(file)
    given = {name: config.flag_of(cls, name) for name in flags}
    for name, value in flags.items():
        if cls.model_fields[name].annotation == dict[str, str]:
            pairs, bad = _pairs(name, value)
            problems += bad
            value = dict(pairs)
        values[name] = value
    pairs, bad = _pairs("set", assignments)
    problems += bad
    for key, text in pairs:
        try:
            _assign(values, key, text)
            given[key] = f"--set {key}"
        except UserError as error:
            problems += error.problems
    try:
        settings = config.build(cls, values, flags=given, file=file)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    return settings


def _unknown_flags(cls: type[config.Config], unknown: list[str]) -> list[str]:
    """A problem for each flag that is not the command's, and each value without a flag."""
    known = [config.flag_of(cls, name) for name in cls.model_fields]
    problems = []
    for previous, item in zip(["", *unknown], unknown, strict=False):
        if item.startswith("-"):
            near = difflib.get_close_matches(item.split("=")[0], known, n=1)
            problems.append(
                f"{item}: unknown flag" + (f", did you mean '{near[0]}'?" if near else "")
            )
        elif not previous.startswith("-"):
            problems.append(f"{item}: expected a flag, found a value")
    return problems


def _pairs(flag: str, items: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """KEY=VALUE texts as pairs, and a problem for each that is none."""
    split = [item.partition("=") for item in items]
    pairs = [(key, value) for key, equals, value in split if key and equals]
    bad = [f"{key}{equals}{value}" for key, equals, value in split if not (key and equals)]
    return pairs, [f"--{flag}: expected KEY=VALUE, found '{item}'" for item in bad]


def _assign(values: dict[Any, Any], key: str, text: str) -> None:
    """Set a key, which names its sections with dots. Raises `UserError` if that cannot be."""
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise UserError(f"--set {key}: expected keys and values in {section}, found {inner!r}")
        values = inner
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {key}: expected a YAML value, found '{text}'") from None
