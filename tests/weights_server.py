"""A server of weights that misbehaves in every way, and entries of a registry that name it."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.models import weights
from pipeline.models.weights import Entry

CONTENT = bytes(range(256)) * 4096  # 1 MiB
OTHER = CONTENT[::-1]
HALF = len(CONTENT) // 2
SHA256 = hashlib.sha256(CONTENT).hexdigest()


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


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()


def make_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting takes no time, and what the environment says does not count."""
    monkeypatch.setattr(weights, "BACKOFF", 0.001)
    monkeypatch.setattr(weights, "TIMEOUT", (1.0, 0.3))
    for name in ("PIPELINE_OFFLINE", "PIPELINE_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)


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


def touch_later(path: Path) -> None:
    later = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))
