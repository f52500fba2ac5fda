"""Downloads of weights, and their checksums, against a local server that misbehaves."""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from weights_server import (
    CONTENT,
    HALF,
    OTHER,
    SHA256,
    Answer,
    Server,
    entry,
    files,
    good,
    half,
    make_impatient,
    partial,
    serving,
    slow,
    status,
    touch_later,
    unsized,
    whole,
)

from pipeline.errors import UserError
from pipeline.models import weights


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    make_impatient(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


def record(folder: Path) -> Any:
    return json.loads((folder / "checksums.json").read_text())


# Downloads


def test_download(server: Server, folder: Path) -> None:
    path = weights.download(entry(server.url("net.pt", good())), folder)
    assert path == folder / "net.pt"
    assert path.read_bytes() == CONTENT
    assert files(folder) == {"net.pt", "checksums.json"}
    stat = path.stat()
    assert record(folder) == {
        "net.pt": {"sha256": SHA256, "bytes": len(CONTENT), "mtime_ns": stat.st_mtime_ns}
    }


REST = f"bytes={HALF}-"


@pytest.mark.parametrize(
    ("answers", "ranges"),
    [
        ([half(), good()], [None, REST]),
        ([half(then="stall"), good()], [None, REST]),
        ([half(then="reset"), good()], [None, REST]),
        ([status(503), status(429), good()], [None, None, None]),
        ([half(), status(500), good()], [None, REST, REST]),
        ([half(), half(), half(), good()], [None, REST, REST, REST]),
        # Ignores the range: all of it again, not appended.
        ([half(), whole()], [None, REST]),
        # The file changed in between.
        ([half(etag='"v0"'), good()], [None, REST]),
        ([half(etag='"v0"'), partial(HALF, CONTENT, '"v1"'), good()], [None, REST, None]),
        # Lies about where the answer starts.
        ([half(), partial(HALF - 1, CONTENT, '"v1"'), good()], [None, REST, None]),
        ([half(), status(206), good()], [None, REST, None]),
        # Denies the range without need.
        ([half(), status(416, Content_Range="bytes */10"), good()], [None, REST, None]),
        ([half(), status(416), good()], [None, REST, None]),
        # Nothing that says whether the rest would be of the same file.
        ([half(etag=None), good()], [None, None]),
        ([half(etag='W/"v1"'), good()], [None, None]),
        ([unsized()], [None]),
    ],
)
def test_a_download_survives(
    server: Server, folder: Path, answers: list[Answer], ranges: list[str | None]
) -> None:
    path = weights.download(entry(server.url("net.pt", *answers)), folder)
    assert path.read_bytes() == CONTENT
    assert files(folder) == {"net.pt", "checksums.json"}
    assert server.requests == [("net.pt", asked) for asked in ranges]


@pytest.mark.parametrize(
    ("answer", "changes", "attempts", "reason"),
    [
        (whole(OTHER), {}, 1, "expected the published sha256"),
        (whole(OTHER), {"bytes": None}, 1, "expected the published sha256"),
        (whole(CONTENT[:-1]), {}, 1, f"expected {len(CONTENT)} bytes, the server has"),
        (whole(CONTENT + b"x"), {}, 1, f"expected {len(CONTENT)} bytes, the server has"),
        (unsized(CONTENT + b"x"), {}, 1, "the server sends more"),
        (unsized(CONTENT[:-1]), {}, 4, f"ended after {len(CONTENT) - 1} of {len(CONTENT)} bytes"),
        (unsized(), {"sha256": None, "bytes": None}, 1, "no length is known"),
        (whole(Content_Type="text/html; charset=utf-8"), {}, 1, "found a web page"),
        (whole(b""), {"bytes": None}, 1, "expected the published sha256"),
        (status(404), {}, 1, "HTTP 404 Not Found"),
        (status(403), {}, 1, "HTTP 403 Forbidden"),
        (status(500), {}, 4, "HTTP 500"),
        (half(), {}, 4, "the connection broke off"),
        (half(then="stall"), {}, 4, "no data for 0.3 s"),
    ],
)
def test_a_failing_source(
    server: Server,
    folder: Path,
    answer: Answer,
    changes: dict[str, Any],
    attempts: int,
    reason: str,
) -> None:
    """Alone it is an error with one line per attempt; with a mirror the file comes from there."""
    bad = server.url("bad/net.pt", answer)
    with pytest.raises(UserError) as caught:
        weights.download(entry(bad, **changes), folder)
    headline, *lines = caught.value.problems
    assert str(folder) in headline
    assert len(lines) == attempts
    for number, line in enumerate(lines, start=1):
        assert line.startswith(f"{bad}: attempt {number}: ")
        assert reason in line
    assert not files(folder) & {"net.pt", "checksums.json"}

    mirror = server.url("mirror/net.pt", good(etag='"mirror"'))
    assert weights.download(entry(bad, mirror, **changes), folder).read_bytes() == CONTENT
    assert files(folder) == {"net.pt", "checksums.json"}


def test_an_unreachable_host_is_asked_once(server: Server, folder: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/net.pt"
        with pytest.raises(UserError) as caught:
            weights.download(entry(dead), folder)
    assert caught.value.problems[1:] == (f"{dead}: attempt 1: no connection: Connection refused",)


def test_a_complete_part_needs_no_more_bytes(server: Server, folder: Path) -> None:
    """Killed between the last byte and the rename."""
    folder.mkdir()
    (folder / "net.pt.part").write_bytes(CONTENT)
    (folder / "net.pt.part.version").write_text('"v1"')
    path = weights.download(entry(server.url("net.pt", good())), folder)
    assert path.read_bytes() == CONTENT
    assert server.requests == [("net.pt", f"bytes={len(CONTENT)}-")]


def test_a_corrupt_part_is_thrown_away(server: Server, folder: Path) -> None:
    folder.mkdir()
    (folder / "net.pt.part").write_bytes(OTHER[:HALF])
    (folder / "net.pt.part.version").write_text('"v1"')
    item = entry(server.url("net.pt", good()))
    with pytest.raises(UserError, match="expected the published sha256"):
        weights.download(item, folder)
    assert weights.download(item, folder).read_bytes() == CONTENT


DOWNLOAD = """
import sys
from pathlib import Path
from pipeline.models import weights
folder, url, sha256, size = sys.argv[1:]
entry = weights.Entry(name="net", file="net.pt", urls=(url,), sha256=sha256, bytes=int(size),
                      licence="MIT", architecture="mobile-sam")
print(weights.download(entry, Path(folder)))
"""


def start_download(folder: Path, url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DOWNLOAD, str(folder), url, SHA256, str(len(CONTENT))]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
    )


def test_a_killed_download_is_resumed(server: Server, folder: Path) -> None:
    url = server.url("net.pt", half(then="stall"), good())
    process = start_download(folder, url)
    part = folder / "net.pt.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    have = part.stat().st_size
    assert 0 < have <= HALF
    assert not (folder / "net.pt").exists()
    assert weights.download(entry(url), folder).read_bytes() == CONTENT
    assert server.requests[-1] == ("net.pt", f"bytes={have}-")


def test_of_several_processes_one_downloads(server: Server, folder: Path) -> None:
    url = server.url("net.pt", slow(2))
    processes = [start_download(folder, url) for _ in range(3)]
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert output.strip() == str(folder / "net.pt")
    assert (folder / "net.pt").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_full_disk_leaves_no_file(server: Server, folder: Path) -> None:
    """The limit on file sizes stands in for the disk: writing fails midway in the same manner."""
    item = entry(server.url("net.pt", good()))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, before[1]))
    try:
        with pytest.raises(UserError) as caught:
            weights.download(item, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in str(caught.value)
    assert not files(folder) & {"net.pt", "checksums.json"}
    assert weights.download(item, folder).read_bytes() == CONTENT


# Checksums


def test_the_checksum_first_seen_is_held_to(server: Server, folder: Path) -> None:
    item = entry(server.url("net.pt", good(), good(OTHER)), sha256=None, bytes=None)
    path = weights.download(item, folder)
    assert record(folder)["net.pt"]["sha256"] == SHA256

    path.write_bytes(OTHER)
    touch_later(path)
    with pytest.raises(UserError, match="expected the first seen sha256"):
        weights.check(item, path)
    path.unlink()
    with pytest.raises(UserError, match="expected the first seen sha256"):
        weights.download(item, folder)
    assert not path.exists()


def test_an_unchanged_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(weights, "sha256", counted)
    folder.mkdir()
    path = folder / "net.pt"
    path.write_bytes(CONTENT)
    item = entry("https://host/net.pt")
    for change, times in [(lambda: None, 1), (lambda: None, 1), (lambda: touch_later(path), 2)]:
        change()
        weights.check(item, path)
        assert len(hashed) == times
    weights.check(item, path, rehash=True)
    assert len(hashed) == 3
    # A registry that now states another checksum is heeded without hashing.
    with pytest.raises(UserError, match="expected the published sha256"):
        weights.check(entry("https://host/net.pt", sha256="0" * 64), path)
    assert len(hashed) == 3


def test_a_damaged_record_is_reported(folder: Path) -> None:
    folder.mkdir()
    (folder / "net.pt").write_bytes(CONTENT)
    for text in ("[1]", '{"net.pt": {"sha256": 1}}', "{"):
        (folder / "checksums.json").write_text(text)
        with pytest.raises(UserError, match=r"checksums\.json: expected"):
            weights.check(entry("https://host/net.pt"), folder / "net.pt")


def test_a_folder_that_cannot_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "net.pt").write_bytes(CONTENT)

    def denied(path: Path, value: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(weights, "write_json", denied)
    weights.check(entry("https://host/net.pt"), folder / "net.pt")
    assert files(folder) == {"net.pt"}
