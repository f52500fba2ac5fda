"""Files that ship with the package: configurations, the weights registry, small weights.

In a checkout they lie beside the package; in an installed wheel, inside it, under `shipped/`.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError

_PACKAGE = Path(__file__).parent
_SHIPPED = _PACKAGE / "shipped"


def shipped(name: str) -> Path:
    """Path of a shipped file or folder such as `weights/registry.yaml`; it may not exist."""
    return (_SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent) / name


def in_checkout() -> bool:
    """Whether the package runs from a checkout rather than from an installed wheel."""
    return not _SHIPPED.is_dir()


def config_file(path: Path) -> Path:
    """The file itself or, where there is none, the shipped configuration of that name.

    A shipped one is called `demo.yaml` or `configs/demo.yaml`. Raises `UserError` when there is
    neither.
    """
    if path.exists():
        return path
    candidate = shipped("configs") / path.name
    if path.parent in (Path(), Path("configs")) and candidate.is_file():
        return candidate
    names = ", ".join(sorted(file.name for file in shipped("configs").glob("*.yaml")))
    raise UserError(
        f"{path}: expected a configuration file, found nothing there (shipped: {names})"
    )
