"""What the formats share: labels in memory, and the file that a user has named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.coco import Item
from pipeline.data.splits import Split
from pipeline.errors import UserError


@dataclass(frozen=True)
class Labels:
    """What is exported."""

    root: Path  # absolute: the folder that the export will lie in
    classes: Sequence[str]
    items: Sequence[Item]  # with empty instances where an image has no defect
    splits: Split  # the images' file names
    predicted: bool  # whether a model made the instances, and people are to correct them


def find_file(source: Path, *patterns: str) -> Path:
    """`source` itself, or the one file in that folder that matches the first pattern with any.

    Raises `UserError` where there is none or more than one.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise UserError(f"--source: expected a file or a folder, found nothing at {source}")
    for pattern in patterns:
        found = sorted(source.glob(pattern))
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(source)) for path in found[:5])
            raise UserError(f"--source: expected one {pattern} in {source}, found {names}")
        if found:
            return found[0]
    raise UserError(f"--source: expected {' or '.join(patterns)} in {source}, found none")
