"""List, fetch or verify pretrained weights."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipeline.config import WeightsConfig
from pipeline.errors import UserError
from pipeline.models.weights import (
    Entry,
    check,
    checksum_state,
    download_folder,
    find,
    load_registry,
    locate,
    obtain,
)


def run(config: WeightsConfig) -> None:
    """Do the action for the named weights, or all. Raises `UserError` with a line per problem."""
    registry = load_registry()
    entries = find(registry, config.names) if config.names else list(registry.values())
    if config.action == "list":
        _list(entries)
    elif config.action == "pull":
        if not config.names:
            raise UserError(
                "names: expected at least one name of `pipeline weights list`, found none"
            )
        _pull(entries, config.offline)
    else:
        _verify(entries, named=bool(config.names))


def _list(entries: list[Entry]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("name", "architecture", "size", "licence", "where", "checksum"):
        table.add_column(title, justify="right" if title == "size" else "left", no_wrap=True)
    for entry in entries:
        size = f"{entry.bytes / 1e6:.1f} MB" if entry.bytes else "?"
        table.add_row(
            entry.name,
            entry.architecture,
            size,
            entry.licence,
            _where(entry),
            checksum_state(entry),
        )
    Console().print(table)
    print(f"downloads: {download_folder()}")


def _where(entry: Entry) -> str:
    if locate(entry) is None:
        return "not here"
    return "shipped" if entry.shipped else "downloaded"


def _pull(entries: list[Entry], offline: bool) -> None:
    problems: list[str] = []
    for entry in entries:
        try:
            path = obtain(entry, offline=offline)
        except UserError as error:
            problems += error.problems
        else:
            print(f"{entry.name}: {path} (sha256 {checksum_state(entry)})")
    if problems:
        raise UserError(*problems)


def _verify(entries: list[Entry], named: bool) -> None:
    """Hash every file that is here; a missing one is a problem if it was `named` or ships."""
    problems: list[str] = []
    checked = 0
    for entry in entries:
        path = locate(entry)
        if path is None:
            if named or entry.shipped:
                problems.append(
                    f"{entry.name}: expected {entry.file} on this machine, found nothing"
                )
            continue
        try:
            check(entry, path, rehash=True)
        except UserError as error:
            problems += error.problems
        else:
            checked += 1
            print(f"{entry.name}: {path} is right (sha256 {checksum_state(entry)})")
    if problems:
        raise UserError(*problems)
    print(f"{checked} of {len(entries)} here and right")
