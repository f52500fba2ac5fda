"""What stages leave as JSON and YAML, checked when another one reads it.

A file may be damaged, edited by hand or made by something else. `Stored` is the base of what files
hold, as pydantic models: of these values, without conversions, and with finite numbers. Keys that a
reader does not know are left alone.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, PositiveInt, ValidationError

from pipeline.config import EXPECTED, read_yaml
from pipeline.data.files import read_json
from pipeline.errors import UserError

S = TypeVar("S", bound="Stored")
ImageT = TypeVar("ImageT", bound="Image")


class Stored(BaseModel):
    """Base of what files hold."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Image(Stored):
    """An image as COCO has it: https://cocodataset.org/#format-data."""

    id: int
    file_name: str
    width: PositiveInt
    height: PositiveInt


def _check_ids(images: list[ImageT]) -> list[ImageT]:
    (image_id, times), *_ = Counter(image.id for image in images).most_common(1) or [(0, 0)]
    if times > 1:
        raise ValueError(f"expected each id once, found {image_id} {times} times")
    return images


Images = Annotated[list[ImageT], AfterValidator(_check_ids)]


def read(path: Path, model: type[S], what: str) -> S:
    """The content of a JSON file, which is `what`.

    Raises `UserError` with the first place that holds something else.
    """
    return check(path, read_json(path), model, what)


def check(path: Path, content: Any, model: type[S], what: str) -> S:
    """`content`, read from `path`, as in `read`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem, *others = error.errors(include_url=False)
    kind, place = problem["type"], problem["loc"]
    if not place or (kind == "missing" and len(place) == 1):
        raise UserError(f"{path}: expected {what}, found other JSON")
    where = f"{path}: {'.'.join(map(str, place))}"
    more = f" (and {len(others)} more)" if others else ""
    if kind == "value_error":  # from a validator of ours
        raise UserError(f"{where}: {problem['ctx']['error']}{more}")
    if kind == "missing":
        raise UserError(f"{where}: expected a value, found none{more}")
    expected = EXPECTED.get(kind) or problem["msg"].removeprefix("Input should be ")
    raise UserError(f"{where}: expected {expected}, found {reprlib.repr(problem['input'])}{more}")


def check_fold(folder: Path, fold: int | None) -> None:
    """Raise `UserError` if a folder has the result of another fold, or of none instead of one.

    A folder that does not say, such as one that another program has written, is accepted.
    """
    path = folder / "config.yaml"
    options = read_yaml(path) if path.is_file() else {}
    if "fold" in options and options["fold"] != fold:
        raise UserError(
            f"{path}: expected a run of {fold_in_words(fold)}, "
            f"found one of {fold_in_words(options['fold'])}"
        )


def fold_in_words(fold: object) -> str:
    return "the dataset's single split" if fold is None else f"the dataset's fold {fold}"


def first_of(problems: Sequence[str]) -> str:
    """The first problem in words, with the number of the others."""
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
