"""The command line: one thin function per command.

Flags are made from the fields of the command's configuration. The stage is imported only when it
runs, so `pipeline --help` stays fast.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
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
    "segment": config.SegmentConfig,
    "evaluate": config.EvaluateConfig,
    "overlay": config.OverlayConfig,
    "run": config.RunConfig,
    "weights": config.WeightsConfig,
}


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, check the configuration, run the command's stage.

    Exit codes: 0 done, 2 bad input (one line per problem on stderr), 130 interrupted.
    """
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        settings = _settings(COMMANDS[command], arguments)
        stage = importlib.import_module(f"pipeline.stages.{command.replace('-', '_')}")
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pipeline", description="Find, name and outline defects: from MVTec masks to a report."
    )
    parser.add_argument("--version", action="version", version=f"pipeline {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, cls in COMMANDS.items():
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=summary, argument_default=argparse.SUPPRESS
        )
        if "config" in cls.positional:
            command.add_argument("config", type=Path, help="YAML file with the options")
        else:
            command.add_argument(
                "--config", type=Path, metavar="FILE", help="YAML file; flags override it"
            )
        for field, info in cls.model_fields.items():
            _add_flag(command, field, info.annotation, info, field in cls.positional)
        if cls is config.RunConfig:
            command.add_argument(
                "--set", nargs="+", metavar="KEY=VALUE", help="set any key: finetune_yolo.epochs=10"
            )
    return parser


def _add_flag(
    parser: argparse.ArgumentParser, name: str, kind: Any, info: Any, positional: bool
) -> None:
    """Add the flag of one field. Values stay text: the configuration parses and checks them."""
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    text = (info.description or "").replace("%", "%%")
    if default not in (None, (), {}) and not isinstance(default, bool):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {shown})"
    flag = name if positional else f"--{name.replace('_', '-')}"
    origin = typing.get_origin(kind)
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif origin is tuple:
        parser.add_argument(flag, nargs="*", help=text, metavar=name.upper())
    elif kind == dict[str, str]:
        parser.add_argument(flag, nargs="+", help=text, metavar="KEY=TEXT")
    elif "dict[" not in str(kind):  # the sections of a run come from its YAML file, or --set
        choices = typing.get_args(kind) if origin is typing.Literal else ()
        parser.add_argument(flag, help=text, metavar="|".join(choices) or name.upper())


def _settings(cls: type[config.Config], flags: dict[str, Any]) -> config.Config:
    """The configuration: a YAML file's values, overridden by flags. Raises `UserError`."""
    file = flags.pop("config", None)
    assignments = flags.pop("set", [])
    values: dict[str, Any] = {}
    if file is not None:
        file = resources.config_file(file)
        values = config.read_yaml(file)
    for name, value in flags.items():
        values[name] = (
            _pairs(name, value) if cls.model_fields[name].annotation == dict[str, str] else value
        )
    for key, value in _pairs("set", assignments).items():
        *sections, last = key.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = yaml.safe_load(value)
    return config.build(cls, values, flags=flags, file=file)


def _pairs(flag: str, items: list[str]) -> dict[str, str]:
    bad = [item for item in items if "=" not in item]
    if bad:
        raise UserError(*(f"--{flag}: expected KEY=VALUE, found '{item}'" for item in bad))
    return dict(item.split("=", 1) for item in items)  # type: ignore[misc]
