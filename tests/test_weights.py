"""The weights registry, the names in it, and `pipeline weights`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from weights_server import (
    CONTENT,
    OTHER,
    SHA256,
    Server,
    fields,
    files,
    good,
    make_impatient,
    serving,
    status,
    write_registry,
)

from pipeline import cli, resources
from pipeline.errors import UserError
from pipeline.models import weights

# Stated by the publishers or pinned by their users, written down here a second time.
KNOWN_SHA256 = {
    "sam-vit-b": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam-vit-l": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam-vit-h": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    "mobile-sam": "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    "yolov8l-world": "8bdfaef999116760247d6fb0b0f8fca064b43e94598b3d4a807ebae9bcf0cdd5",
}


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


@pytest.fixture
def shipped(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped weights folder of a pretended installation; downloads go to `folder`."""
    root = tmp_path / "shipped"
    (root / "weights").mkdir(parents=True)
    monkeypatch.setattr(resources, "_SHIPPED", root)
    monkeypatch.setenv("PIPELINE_WEIGHTS", str(folder))
    return root / "weights"


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
