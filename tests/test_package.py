"""The wheel: what is in it, and that it works outside the repository."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ["yolo-world-n.safetensors", "yolo-world-n.md", "sam-lite.safetensors", "sam-lite.md"]


def build_wheel(tree: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def copy_tree(to: Path) -> Path:
    """What a checkout has, without big weights, as if freshly cloned."""
    for name in ("pipeline", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, to / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, to / name)
    (to / "weights").mkdir()
    for name in ("README.md", "registry.yaml"):
        shutil.copy(ROOT / "weights" / name, to / "weights" / name)
    return to


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, unpacked: what pip would put into site-packages."""
    folder = tmp_path_factory.mktemp("installed")
    wheel = build_wheel(copy_tree(tmp_path_factory.mktemp("tree")), folder / "dist")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the installed package: -S keeps the checkout's own path file from being read."""
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    return subprocess.run(
        [sys.executable, "-S", *argv],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_wheel_has_what_ships_and_nothing_else(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    present = (*SHIPPED, "mobile_sam.pt", "yolov8s-worldv2.pt.part", "checksums.json", ".lock")
    for name in present:
        (tree / "weights" / name).write_bytes(b"x")
    for name in ("tests/test_x.py", "datasets/t/images/a.png", "runs/demo/a.mp4", "build/x.py"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_bytes(b"x")
    names = names_in(build_wheel(tree, tmp_path / "dist"))
    weights = {n.split("/")[-1] for n in names if n.startswith("pipeline/shipped/weights/")}
    assert weights == {"README.md", "registry.yaml", *SHIPPED}
    configs = {n.split("/")[-1] for n in names if n.startswith("pipeline/shipped/configs/")}
    assert configs == {path.name for path in (ROOT / "configs").glob("*.yaml")}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "pipeline").rglob("*.py")}
    assert sources == {n for n in names if n.endswith(".py")}
    pages = {p.name for p in (ROOT / "pipeline" / "data").glob("*_page.*") if p.suffix != ".py"}
    assert {"report_page.html", "report_page.css", "report_page.js"} <= pages
    assert pages <= {n.split("/")[-1] for n in names if n.startswith("pipeline/data/")}
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"pipeline"}
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)


def test_the_wheel_builds_before_there_are_weights_to_ship(installed: Path) -> None:
    found = {path.name for path in (installed / "pipeline" / "shipped" / "weights").iterdir()}
    assert found == {"README.md", "registry.yaml"}


def test_it_is_the_installed_package_that_runs(installed: Path, tmp_path: Path) -> None:
    code = "import pipeline, pydantic; print(pipeline.__file__)"
    done = run(installed, tmp_path, "-c", code)
    assert done.stdout.strip() == str(installed / "pipeline" / "__init__.py"), done.stderr


def test_the_registry_is_found_and_downloads_go_to_the_users_cache(
    installed: Path, tmp_path: Path
) -> None:
    done = run(installed, tmp_path, "-m", "pipeline", "weights", "list", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert "mobile-sam" in done.stdout
    place = tmp_path / ".cache" / "pipeline" / "weights"
    assert done.stdout.splitlines()[-1] == f"downloads: {place}"
    cache = str(tmp_path / "xdg")
    done = run(installed, tmp_path, "-m", "pipeline", "weights", "list", XDG_CACHE_HOME=cache)
    assert done.stdout.splitlines()[-1] == f"downloads: {cache}/pipeline/weights"
    assert not list(tmp_path.iterdir())  # listing writes nothing


def test_configurations_that_ship_are_found(installed: Path, tmp_path: Path) -> None:
    argv = ["-m", "pipeline", "run", "demo.yaml", "--set", "segment.prompt=x"]
    done = run(installed, tmp_path, *argv)
    path = installed / "pipeline" / "shipped" / "configs" / "demo.yaml"
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "pipeline run: --set segment.prompt: expected 'boxes', 'points', 'boxes+points', "
        "'masks' or 'boxes+masks', found 'x'"
    ]
    done = run(installed, tmp_path, *argv[:-2], "--fold", "x", "--set", "synth.size=1")
    assert "--fold: expected the number of a fold" in done.stderr
    code = f"from pipeline import resources as r; from pathlib import Path; \
assert r.config_file(Path('demo.yaml')) == Path({str(path)!r}); assert not r.in_checkout()"
    assert run(installed, tmp_path, "-c", code).returncode == 0


def test_a_stage_runs_from_the_installed_package(installed: Path, tmp_path: Path) -> None:
    options = shlex.split("synth --train-good 1 --test-good 1 --per-defect 1 --size 64 --out mvtec")
    done = run(installed, tmp_path, "-m", "pipeline", *options)
    assert done.returncode == 0, done.stderr
    assert '"revision": null' in (tmp_path / "mvtec" / "run.json").read_text()


def test_the_command_is_installed_with_the_package() -> None:
    command = Path(sysconfig.get_path("scripts")) / "pipeline"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("pipeline ")
