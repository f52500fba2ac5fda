"""Pretrained weights: the registry, and getting a checked file for a name.

A file is used only after its checksum was checked. The checksum is the registry's or, where none is
known, the one seen at first use, which is recorded and held to from then on.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import requests
from filelock import AcquireReturnProxy, FileLock, Timeout
from pydantic import (
    BaseModel,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from urllib3.exceptions import NewConnectionError, ReadTimeoutError

from pipeline import config, resources
from pipeline.data.files import read_json, sha256, write_json
from pipeline.errors import UserError

RECORD = "checksums.json"  # beside the downloads: what was checked, and checksums first seen
ATTEMPTS = 4  # per URL, with waits of 1, 2 and 4 times BACKOFF between them
BACKOFF = 1.0  # seconds
TIMEOUT = (10.0, 30.0)  # seconds to connect, and without a byte
CHUNK = 1 << 16  # bytes; what an interruption loses at most

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Url = Annotated[str, StringConstraints(pattern=r"^https?://")]
Architecture = Literal[
    "yolo-world",
    "sam-vit-b",
    "sam-vit-l",
    "sam-vit-h",
    "mobile-sam",
    "sam-lite",
    "clip-vit-b-32",
    "resnet18",
    "resnet34",
    "resnet50",
]


class Entry(config.Config):
    """One file of the registry."""

    name: str
    file: str = Field(pattern=r"^\w[\w.-]*$")
    urls: tuple[Url, ...] = ()
    sha256: Sha256 | None
    bytes: config.PositiveInt | None
    licence: str
    architecture: Architecture
    shipped: bool = False

    @model_validator(mode="after")
    def _check_source(self) -> Entry:
        if self.shipped and (self.urls or not self.sha256 or not self.bytes):
            raise ValueError("shipped: expected sha256 and bytes, and no urls")
        if not self.shipped and not self.urls:
            raise ValueError("urls: expected at least one, found none")
        return self


class Seen(BaseModel):
    """A file as it was when its checksum was last computed; `mtime_ns` is its modification time."""

    sha256: Sha256
    bytes: int
    mtime_ns: int


def load_registry(path: Path | None = None) -> dict[str, Entry]:
    """The entries by name, in the file's order (default: the registry that ships).

    Raises `UserError` with one line per problem of the whole file.
    """
    path = path or resources.shipped("weights") / "registry.yaml"
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    owners: dict[str, str] = {}
    for name, values in config.read_yaml(path).items():
        if not isinstance(values, dict):
            problems.append(f"{path}: {name}: expected keys and values, found {values!r}")
            continue
        try:
            entry = config.build(Entry, {"name": name, **values}, section=f"{path}: {name}.")
        except UserError as error:
            problems += error.problems
            continue
        if entry.file in owners:
            problems.append(
                f"{path}: {name}.file: expected a name of its own, "
                f"found '{entry.file}' of {owners[entry.file]}"
            )
        owners[entry.file] = name
        entries[name] = entry
    if problems:
        raise UserError(*problems)
    return entries


def find(registry: Mapping[str, Entry], names: tuple[str, ...]) -> list[Entry]:
    """The entries of these names. Raises `UserError` with the nearest names of each unknown one."""
    problems = [_unknown(registry, name) for name in names if name not in registry]
    if problems:
        raise UserError(*problems)
    return [registry[name] for name in names]


def _unknown(registry: Mapping[str, Entry], name: str) -> str:
    near = difflib.get_close_matches(name, list(registry), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see `pipeline weights list`"
    return f"{name}: expected a checkpoint file or a known name of weights, found neither; {hint}"


def download_folder() -> Path:
    """Where downloads go: $PIPELINE_WEIGHTS, a checkout's `weights/` or the user's cache."""
    if chosen := os.environ.get("PIPELINE_WEIGHTS"):
        return Path(chosen).expanduser()
    if resources.in_checkout():
        return resources.shipped("weights")
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "pipeline" / "weights"


def locate(entry: Entry) -> Path | None:
    """The entry's file on this machine, not yet checked, or None."""
    folders = [resources.shipped("weights")] + ([] if entry.shipped else [download_folder()])
    return next(
        (folder / entry.file for folder in folders if (folder / entry.file).is_file()), None
    )


def resolve(name_or_path: str, *, offline: bool) -> Path:
    """The checkpoint file of a registry name, checked and fetched if need be; or the path itself.

    `offline`, or PIPELINE_OFFLINE=1 in the environment, forbids downloads. Raises `UserError` when
    there is no such file or name, a checksum is wrong, or the file cannot be had.
    """
    path = Path(name_or_path)
    if path.is_file():
        note_pickle(path)
        return path
    registry = load_registry()
    if name_or_path not in registry and path.exists():  # a folder, such as that of a finished run
        return path
    return obtain(find(registry, (name_or_path,))[0], offline=offline)


@functools.cache  # once per file
def note_pickle(path: Path) -> None:
    """Say that a checkpoint which the user named, and no checksum vouches for, is a pickle."""
    if path.suffix in {".pt", ".pth"}:
        print(
            f"note: {path} is a pickle, which can run code; trusted because you named it",
            file=sys.stderr,
        )


def obtain(entry: Entry, *, offline: bool) -> Path:
    """The entry's file, checked and downloaded if need be. Raises `UserError` as `resolve` does."""
    if found := locate(entry):
        check(entry, found)
        return found
    folder = download_folder()
    if entry.shipped:
        missing = resources.shipped("weights") / entry.file
        raise UserError(
            f"{missing}: expected the weights that ship, found nothing there; install anew"
        )
    if offline or os.environ.get("PIPELINE_OFFLINE", "0") not in {"", "0"}:
        raise UserError(
            f"{entry.name}: {entry.file} is not on this machine and downloads are off (--offline "
            f"or PIPELINE_OFFLINE); fetch {entry.urls[0]} and put it into {folder}"
        )
    return download(entry, folder)


# Checksums


def check(entry: Entry, path: Path, *, rehash: bool = False) -> None:
    """Raise `UserError` unless the file is the entry's.

    A file with the size and modification time of its last check is hashed only with `rehash`.
    """
    stat = path.stat()
    if entry.bytes not in (None, stat.st_size):
        raise UserError(_wrong(entry, path, f"expected {entry.bytes} bytes, found {stat.st_size}"))
    # Shipped files are small, and may lie in a folder that is not ours to write.
    seen = None if entry.shipped else read_record(path.parent).get(entry.file)
    unchanged = seen is not None and (seen.bytes, seen.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    digest = seen.sha256 if seen and unchanged and not rehash else sha256(path)
    expected, source = _expected(entry, seen)
    if expected not in (None, digest):
        raise UserError(_wrong(entry, path, _mismatch(expected, source, digest)))
    if not unchanged and not entry.shipped:
        _remember(path, digest)


def _expected(entry: Entry, seen: Seen | None) -> tuple[str | None, str]:
    """The checksum that the file must have, if one is known, and what it is called."""
    if entry.sha256:
        return entry.sha256, "published"
    return (seen.sha256, "first seen") if seen else (None, "not known")


def checksum_state(entry: Entry) -> str:
    """'published', 'first seen' (recorded at first use) or 'not known' (to be recorded)."""
    folder = (locate(entry) or download_folder() / entry.file).parent
    return _expected(entry, None if entry.sha256 else read_record(folder).get(entry.file))[1]


def _mismatch(expected: str | None, source: str, digest: str) -> str:
    where = f" ({RECORD})" if source == "first seen" else ""
    return f"expected the {source} sha256 {expected}{where}, found {digest}"


def _wrong(entry: Entry, path: Path, problem: str) -> str:
    pull = f"delete it and run `pipeline weights pull {entry.name}`"
    return f"{path}: {problem}; {'install anew' if entry.shipped else pull}"


def read_record(folder: Path) -> dict[str, Seen]:
    """What was recorded of the files in a folder. Raises `UserError` when the record is damaged."""
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        return TypeAdapter(dict[str, Seen]).validate_python(read_json(path))
    except ValidationError:
        raise UserError(
            f"{path}: expected what `pipeline weights` recorded, found something else; delete it"
        ) from None


def _remember(path: Path, digest: str) -> None:
    """Record a checked file; in a folder that cannot be written it is hashed again next time."""
    stat = path.stat()
    seen = Seen(sha256=digest, bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)
    try:
        with FileLock(path.parent / f".{RECORD}.lock"):
            record = {**read_record(path.parent), path.name: seen}
            write_json(path.parent / RECORD, {name: dict(record[name]) for name in sorted(record)})
    except OSError:
        pass


# Download


class _Interrupted(Exception):
    """The transfer broke off; what came is kept and the rest can be asked for again."""


class _Refused(Exception):
    """This URL does not give the file; the next one may."""


def download(entry: Entry, folder: Path) -> Path:
    """Fetch the entry's file into `folder`, trying its URLs in turn, and check it.

    An interrupted download is resumed, now or by a later call. The file appears under its name only
    when it is whole and its checksum is right. Of several processes one downloads and the others
    wait. Raises `UserError` with one line per failed attempt.
    """
    target = folder / entry.file
    part = folder / f"{entry.file}.part"
    failures = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _acquire(folder / f".{entry.file}.lock", entry):
            if target.is_file():  # another process was faster
                check(entry, target)
                return target
            seen = read_record(folder).get(entry.file)
            for url in entry.urls:
                for attempt in range(1, ATTEMPTS + 1):
                    try:
                        _fetch(entry, url, part)
                        digest = _check_part(entry, part, seen)
                    except _Interrupted as error:
                        failures.append(f"{url}: attempt {attempt}: {error}")
                        if attempt < ATTEMPTS:
                            time.sleep(BACKOFF * 2 ** (attempt - 1))
                    except _Refused as error:
                        failures.append(f"{url}: attempt {attempt}: {error}")
                        break
                    else:
                        part.replace(target)
                        _origin(part).unlink(missing_ok=True)
                        _remember(target, digest)
                        return target
    except OSError as error:  # disk full, no permission: no mirror helps
        raise UserError(
            f"{target}: expected to write the download there, found: {error.strerror or error} "
            "(PIPELINE_WEIGHTS names another folder)"
        ) from None
    raise UserError(
        f"{entry.name}: no download succeeded; {entry.file} can also be put into {folder} by hand",
        *failures,
    )


def _acquire(path: Path, entry: Entry) -> AcquireReturnProxy:
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"{entry.name}: waiting for another process that downloads it", file=sys.stderr)
        return lock.acquire()


def _origin(part: Path) -> Path:
    """The file that names the version `part` belongs to: the server's validator."""
    return part.with_name(part.name + ".version")


def _fetch(entry: Entry, url: str, part: Path) -> None:
    """Bring `part` to full length, going on from what it has.

    Raises `_Interrupted` or `_Refused`.
    """
    have = part.stat().st_size if part.exists() else 0
    version = _origin(part).read_text(encoding="utf-8") if _origin(part).exists() else ""
    headers = {"Accept-Encoding": "identity"}
    if have and version:  # without a version, old and new bytes could be of different files
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code in (206, 416) and not _continues(response, have, version):
                part.unlink(missing_ok=True)
                raise _Interrupted("the server's file is not the one begun; starting anew")
            total = _accept(entry, response)
            if response.status_code == 416:  # nothing is left to send
                return
            if response.status_code == 200:
                have = 0
                part.unlink(missing_ok=True)  # before the version changes, lest the two disagree
            _origin(part).write_text(_version(response), encoding="utf-8")
            _stream(entry, response, part, have, total)
    except requests.RequestException as error:
        raise _failure(error) from None


def _continues(response: requests.Response, have: int, version: str) -> bool:
    """Whether the answer to a range request goes on where `part` ends, in the same version.

    Not all servers heed If-Range: some send the rest of a newer file.
    """
    span, _, length = response.headers.get("Content-Range", "").partition("/")
    if response.status_code == 416:
        return length == str(have) and _version(response) in ("", version)
    return span.startswith(f"bytes {have}-") and _version(response) == version


def _accept(entry: Entry, response: requests.Response) -> int | None:
    """The whole file's length in bytes, if known. Raises when the answer is not the file."""
    status = response.status_code
    if status == 429 or status >= 500:
        raise _Interrupted(f"HTTP {status} {response.reason}")
    if status not in (200, 206, 416):
        raise _Refused(f"HTTP {status} {response.reason}")
    if status == 200 and response.headers.get("Content-Type", "").startswith("text/html"):
        raise _Refused("expected the file, found a web page")
    length = (
        response.headers.get("Content-Length", "")
        if status == 200
        else response.headers["Content-Range"].partition("/")[2]
    )
    total = int(length) if length.isdecimal() else None
    if entry.bytes and total not in (None, entry.bytes):
        raise _Refused(f"expected {entry.bytes} bytes, the server has {total}")
    if not (total or entry.bytes or entry.sha256):
        raise _Refused("no length is known, so a whole file cannot be told from a part")
    return entry.bytes or total


def _version(response: requests.Response) -> str:
    """What identifies the version served: a strong ETag or the modification time ('': nothing)."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _stream(
    entry: Entry, response: requests.Response, part: Path, start: int, total: int | None
) -> None:
    """Put the answer after the first `start` bytes of `part`, up to `total` bytes in all."""
    host = urlsplit(response.url).hostname
    begun = f", going on at {start / 1e6:.1f} MB" if start else ""
    print(f"downloading {entry.name} from {host} to {part.parent}{begun}", file=sys.stderr)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with (
        part.open("r+b" if start else "wb") as file,
        Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress,
    ):
        size = file.seek(start)
        task = progress.add_task(entry.name, total=total, completed=start)
        for chunk in response.iter_content(CHUNK):
            size += file.write(chunk)
            progress.update(task, completed=size)
            if total and size > total:
                file.truncate(0)
                raise _Refused(f"expected {total} bytes, the server sends more")
    if total and size < total:
        raise _Interrupted(f"the server ended after {size} of {total} bytes")


def _check_part(entry: Entry, part: Path, seen: Seen | None) -> str:
    """The sha256 of a complete download. Deletes it and raises `_Refused` when it is wrong."""
    digest = sha256(part)
    expected, source = _expected(entry, seen)
    if expected in (None, digest):
        return digest
    part.unlink()
    raise _Refused(_mismatch(expected, source, digest))


def _failure(error: requests.RequestException) -> _Interrupted | _Refused:
    """What a network error means. A host that cannot be reached at all is not tried again."""
    cause = error.args[0] if error.args else None
    reason = getattr(cause, "reason", None)
    if isinstance(error, requests.ConnectTimeout):
        return _Refused(f"no connection within {TIMEOUT[0]:g} s")
    if isinstance(reason, NewConnectionError):
        return _Refused(f"no connection: {str(reason).rpartition('] ')[2].rstrip(')')}")
    if isinstance(error, requests.ReadTimeout) or isinstance(cause, ReadTimeoutError):
        return _Interrupted(f"no data for {TIMEOUT[1]:g} s")
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return _Interrupted("the connection broke off")
    return _Interrupted(" ".join(str(error).split()))
