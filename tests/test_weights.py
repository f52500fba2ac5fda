"""The weights registry and its downloads, against a local server that misbehaves in every way."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import cli, resources
from pipeline.errors import UserError
from pipeline.models import weights
from pipeline.models.weights import Entry

CONTENT = bytes(range(256)) * 4096  # 1 MiB
OTHER = CONTENT[::-1]
HALF = len(CONTENT) // 2
SHA256 = hashlib.sha256(CONTENT).hexdigest()

# Stated by the publishers or pinned by their users, written down here a second time.
KNOWN_SHA256 = {
    "sam-vit-b": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam-vit-l": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam-vit-h": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    "mobile-sam": "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    "yolov8l-world": "8bdfaef999116760247d6fb0b0f8fca064b43e94598b3d4a807ebae9bcf0cdd5",
}


# A server whose answers are scripted: the n-th request for a path gets the path's n-th answer, and
# the last answer repeats.

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.close_connection = True
        path = self.path.lstrip("/")
        with self.server.mutex:
            number = sum(asked == path for asked, _ in self.server.requests)
            self.server.requests.append((path, self.headers.get("Range")))
        answers = self.server.answers.get(path, [status(404)])
        answers[min(number, len(answers) - 1)](self)

    def head(self, code: int, headers: dict[str, Any]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.mutex = threading.Lock()
        self.stop = threading.Event()

    def url(self, path: str, *answers: Answer) -> str:
        self.answers[path] = list(answers)
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the tests


def good(content: bytes = CONTENT, etag: str | None = '"v1"') -> Answer:
    """As a server should: ranges, If-Range, 416."""

    def answer(handler: Handler) -> None:
        validator = {"ETag": etag} if etag else {}
        asked = handler.headers.get("Range")
        if asked and handler.headers.get("If-Range") == etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                handler.head(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": 0})
                return
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            size = len(content) - start
            handler.head(206, {"Content-Range": span, "Content-Length": size, **validator})
            handler.wfile.write(content[start:])
        else:
            handler.head(200, {"Content-Length": len(content), **validator})
            handler.wfile.write(content)

    return answer


def whole(content: bytes = CONTENT, etag: str = '"v1"', **headers: str) -> Answer:
    """All of it, whatever range was asked for."""

    def answer(handler: Handler) -> None:
        extra = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.head(200, {"Content-Length": len(content), "ETag": etag, **extra})
        handler.wfile.write(content)

    return answer


def half(etag: str | None = '"v1"', then: str = "close") -> Answer:
    """The first half, then the connection is closed, reset or stalls."""

    def answer(handler: Handler) -> None:
        handler.head(200, {"Content-Length": len(CONTENT), **({"ETag": etag} if etag else {})})
        handler.wfile.write(CONTENT[:HALF])
        if then == "stall":
            handler.server.stop.wait(30)
        elif then == "reset":
            time.sleep(0.05)
            option = struct.pack("ii", 1, 0)  # no lingering: closing sends RST
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            handler.connection.close()

    return answer


def partial(start: int, content: bytes, etag: str) -> Answer:
    """A 206 with this content, whatever was asked for: it ignores If-Range."""

    def answer(handler: Handler) -> None:
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        size = len(content) - start
        handler.head(206, {"Content-Range": span, "Content-Length": size, "ETag": etag})
        handler.wfile.write(content[start:])

    return answer


def status(code: int, **headers: str) -> Answer:
    def answer(handler: Handler) -> None:
        extra = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.head(code, {"Content-Length": 0, **extra})

    return answer


def unsized(content: bytes = CONTENT) -> Answer:
    """No length: the end is where the connection closes."""

    def answer(handler: Handler) -> None:
        handler.head(200, {"Connection": "close"})
        handler.wfile.write(content)

    return answer


def slow(seconds: float) -> Answer:
    def answer(handler: Handler) -> None:
        time.sleep(seconds)
        good()(handler)

    return answer


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BACKOFF", 0.001)
    monkeypatch.setattr(weights, "TIMEOUT", (1.0, 0.3))
    for name in ("PIPELINE_OFFLINE", "PIPELINE_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


@pytest.fixture
def shipped(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped weights folder of a pretended installation; downloads go to `folder`."""
    root = tmp_path / "shipped"
    (root / "weights").mkdir(parents=True)
    monkeypatch.setattr(resources, "_SHIPPED", root)
    monkeypatch.setenv("PIPELINE_WEIGHTS", str(folder))
    return root / "weights"


def fields(*urls: str, **changes: Any) -> dict[str, Any]:
    return {
        "file": "net.pt",
        "urls": list(urls),
        "sha256": SHA256,
        "bytes": len(CONTENT),
        "licence": "MIT",
        "architecture": "mobile-sam",
    } | changes


def entry(*urls: str, **changes: Any) -> Entry:
    return Entry(name="net", **fields(*urls, **changes))


def write_registry(shipped: Path, **entries: dict[str, Any]) -> None:
    (shipped / "registry.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))


def files(folder: Path) -> set[str]:
    """What a user sees in the folder: all but lock files."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def record(folder: Path) -> Any:
    return json.loads((folder / "checksums.json").read_text())


def touch_later(path: Path) -> None:
    later = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))


# Registry


def test_the_shipped_registry() -> None:
    registry = weights.load_registry()
    names = {f"yolov8{size}-worldv2" for size in "smlx"} | {f"yolov8{size}" for size in "nsmlx"}
    names |= {"yolov8l-world", "sam-vit-b", "sam-vit-l", "sam-vit-h", "mobile-sam"}
    names |= {"clip-vit-b-32", "resnet18", "resnet34", "resnet50"}
    assert names <= set(registry)
    assert {name: registry[name].sha256 for name in KNOWN_SHA256} == KNOWN_SHA256
    for item in registry.values():
        assert all(url.startswith("https://") for url in item.urls)
        if not item.shipped:
            assert item.urls[0].rpartition("/")[2] == item.file
    # Publishers that put (the start of) the checksum into the URL.
    assert str(registry["clip-vit-b-32"].sha256) in registry["clip-vit-b-32"].urls[0]
    for depth in (18, 34, 50):
        item = registry[f"resnet{depth}"]
        assert item.file == f"resnet{depth}-{str(item.sha256)[:8]}.pth"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sha256": "40d36571"}, "net.sha256: "),
        ({"sha256": SHA256.upper()}, "net.sha256: "),
        ({"bytes": 0}, "net.bytes: "),
        ({"file": "../net.pt"}, "net.file: "),
        ({"file": ".net"}, "net.file: "),
        ({"urls": ["ftp://host/net.pt"]}, "net.urls.0: "),
        ({"urls": []}, "urls: expected at least one"),
        ({"shipped": True}, "shipped: expected sha256 and bytes, and no urls"),
        ({"shipped": True, "urls": [], "sha256": None}, "shipped: expected sha256"),
        ({"architecture": "resnet19"}, "net.architecture: "),
        ({"licence": None}, "net.licence: "),
        ({"sha265": None}, "net.sha265: unknown key, did you mean 'sha256'?"),
    ],
)
def test_a_bad_entry_is_reported(shipped: Path, changes: dict[str, Any], problem: str) -> None:
    write_registry(shipped, net=fields("https://host/net.pt", **changes))
    with pytest.raises(UserError) as caught:
        weights.load_registry()
    assert len(caught.value.problems) == 1
    assert problem in caught.value.problems[0]
    assert str(shipped / "registry.yaml") in caught.value.problems[0]


def test_all_problems_of_a_registry_are_reported_at_once(shipped: Path) -> None:
    ok = fields("https://host/net.pt")
    missing = {key: value for key, value in ok.items() if key not in ("licence", "bytes")}
    write_registry(shipped, a=ok, b=ok, c=missing | {"file": "c.pt"}, d="text")  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        weights.load_registry()
    assert [problem.split(": ", 1)[1] for problem in caught.value.problems] == [
        "b.file: expected a name of its own, found 'net.pt' of a",
        "c.bytes: required, not given",
        "c.licence: required, not given",
        "d: expected keys and values, found 'text'",
    ]


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


# Resolving names


def test_a_path_is_returned_as_it_is(
    tmp_path: Path, shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_registry(shipped)
    for name, noted in [("best.pt", True), ("best.pth", True), ("best.safetensors", False)]:
        path = tmp_path / name
        path.write_bytes(b"any")
        assert weights.resolve(str(path), offline=True) == path
        assert weights.resolve(str(path), offline=True) == path
        notes = capsys.readouterr().err.splitlines()
        assert len(notes) == noted  # once, not once a call
        assert all(str(path) in note and "pickle" in note for note in notes)
    assert weights.resolve(str(tmp_path), offline=True) == tmp_path


def test_a_name_is_downloaded_once(server: Server, shipped: Path, folder: Path) -> None:
    write_registry(shipped, net=fields(server.url("net.pt", good())))
    assert weights.resolve("net", offline=False) == folder / "net.pt"
    assert weights.resolve("net", offline=False) == folder / "net.pt"
    assert weights.resolve("net", offline=True) == folder / "net.pt"
    assert len(server.requests) == 1


def test_a_folder_does_not_hide_a_name(
    server: Server, shipped: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_registry(shipped, net=fields(server.url("net.pt", good())))
    (tmp_path / "net").mkdir()
    monkeypatch.chdir(tmp_path)
    assert weights.resolve("net", offline=False) == folder / "net.pt"


@pytest.mark.parametrize("variable", [None, "1"])
def test_offline(
    server: Server,
    shipped: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
) -> None:
    url = server.url("net.pt", good())
    write_registry(shipped, net=fields(url))
    if variable:
        monkeypatch.setenv("PIPELINE_OFFLINE", variable)
    with pytest.raises(UserError) as caught:
        weights.resolve("net", offline=variable is None)
    assert all(text in str(caught.value) for text in ("net.pt", url, str(folder)))
    assert len(caught.value.problems) == 1
    assert server.requests == []

    folder.mkdir()
    (folder / "net.pt").write_bytes(CONTENT)  # as the message says
    assert weights.resolve("net", offline=variable is None) == folder / "net.pt"


def test_a_file_put_there_by_hand_is_checked(shipped: Path, folder: Path) -> None:
    write_registry(shipped, net=fields("https://host/net.pt"))
    folder.mkdir()
    for content, problem in [(OTHER, "expected the published sha256"), (b"x", "bytes, found 1;")]:
        (folder / "net.pt").write_bytes(content)
        with pytest.raises(UserError, match=problem):
            weights.resolve("net", offline=True)
        assert (folder / "net.pt").read_bytes() == content


def test_shipped_weights(shipped: Path, folder: Path) -> None:
    write_registry(shipped, lite=fields(shipped=True, file="lite.safetensors"))
    path = shipped / "lite.safetensors"
    with pytest.raises(UserError, match="expected the weights that ship"):
        weights.resolve("lite", offline=False)
    path.write_bytes(CONTENT)
    assert weights.resolve("lite", offline=True) == path
    assert files(shipped) == {"registry.yaml", "lite.safetensors"}  # not ours to write to
    path.write_bytes(OTHER)
    with pytest.raises(UserError, match=r"expected the published sha256 .*; install anew"):
        weights.resolve("lite", offline=True)


def test_an_unknown_name_gets_the_nearest(shipped: Path) -> None:
    write_registry(
        shipped,
        **{name: fields("https://host/x", file=name) for name in ("sam-vit-b", "resnet18")},
    )
    with pytest.raises(UserError, match="did you mean sam-vit-b"):
        weights.resolve("sam_vit_b", offline=True)
    with pytest.raises(
        UserError, match=r"runs/best\.pt: expected a checkpoint file or a known name"
    ):
        weights.resolve("runs/best.pt", offline=True)


@pytest.mark.parametrize(
    ("variables", "installed", "expected"),
    [
        ({"PIPELINE_WEIGHTS": "/chosen"}, False, "/chosen"),
        ({"PIPELINE_WEIGHTS": "/chosen"}, True, "/chosen"),
        ({"PIPELINE_WEIGHTS": "~/chosen"}, True, "/home/user/chosen"),
        ({}, False, str(Path(weights.__file__).parents[2] / "weights")),
        ({}, True, "/home/user/.cache/pipeline/weights"),
        ({"XDG_CACHE_HOME": "/cache"}, True, "/cache/pipeline/weights"),
    ],
)
def test_download_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    installed: bool,
    expected: str,
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(resources, "_SHIPPED", tmp_path if installed else tmp_path / "none")
    for name, value in {"HOME": "/home/user", **variables}.items():
        monkeypatch.setenv(name, value)
    assert weights.download_folder() == Path(expected)


# The command


def run(*arguments: str) -> int:
    try:
        cli.main(["weights", *arguments])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_the_list(server: Server, shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unseen = fields(server.url("b.pt", good()), file="b.pt", sha256=None, bytes=None)
    write_registry(
        shipped,
        a=fields("https://host/a.pt", file="a.pt"),
        b=unseen,
        lite=fields(shipped=True, file="lite.safetensors", architecture="sam-lite"),
    )
    (shipped / "lite.safetensors").write_bytes(CONTENT)

    def rows() -> list[list[str]]:
        assert run("list") == 0
        return [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]

    size = ["1.0", "MB", "MIT"]
    assert rows() == [
        ["a", "mobile-sam", *size, "not", "here", "published"],
        ["b", "mobile-sam", "?", "MIT", "not", "here", "not", "known"],
        ["lite", "sam-lite", *size, "shipped", "published"],
    ]
    assert run("pull", "b") == 0
    assert "sha256 first seen" in capsys.readouterr().out
    assert rows()[1] == ["b", "mobile-sam", "?", "MIT", "downloaded", "first", "seen"]


def test_pull(
    server: Server, shipped: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_registry(
        shipped,
        a=fields(server.url("a.pt", good()), file="a.pt"),
        b=fields(server.url("b.pt", status(404)), file="b.pt"),
        c=fields(server.url("c.pt", good()), file="c.pt"),
    )
    assert run("pull") == 2
    assert "expected at least one name" in capsys.readouterr().err
    assert run("pull", "a", "d", "e") == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert server.requests == []

    assert run("pull", "a", "b", "c") == 2  # one that fails does not keep the others
    assert "b.pt: attempt 1: HTTP 404" in capsys.readouterr().err
    assert {"a.pt", "c.pt"} <= files(folder)
    assert run("pull", "b", "--offline") == 2
    assert "downloads are off" in capsys.readouterr().err


def test_verify(shipped: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("good", "short", "wrong", "absent")
    write_registry(
        shipped, **{name: fields(f"https://host/{name}.pt", file=f"{name}.pt") for name in names}
    )
    folder.mkdir()
    for name, content in [("good", CONTENT), ("short", CONTENT[1:]), ("wrong", CONTENT)]:
        (folder / f"{name}.pt").write_bytes(content)
    weights.resolve("wrong", offline=True)
    before = (folder / "wrong.pt").stat()
    (folder / "wrong.pt").write_bytes(OTHER)  # rotten, with size and time as they were
    os.utime(folder / "wrong.pt", ns=(before.st_atime_ns, before.st_mtime_ns))

    assert run("verify") == 2
    output = capsys.readouterr()
    assert "good.pt is right (sha256 published)" in output.out
    first, second = output.err.splitlines()
    assert "short.pt: expected 1048576 bytes, found 1048575" in first
    assert "wrong.pt: expected the published sha256" in second
    assert run("verify", "good") == 0
    assert run("verify", "absent") == 2
    for name in ("short", "wrong"):
        (folder / f"{name}.pt").unlink()
    assert run("verify") == 0


def test_verify_misses_weights_that_ship(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_registry(shipped, lite=fields(shipped=True, file="lite.safetensors"))
    assert run("verify") == 2
    assert "lite: expected lite.safetensors" in capsys.readouterr().err
