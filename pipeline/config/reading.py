"""Files and flags become a checked configuration, or one line for each problem."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from pipeline.config.base import Config, flag_of
from pipeline.config.run import SECTIONS
from pipeline.errors import UserError

C = TypeVar("C", bound=Config)


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML mapping. Raises `UserError` when it is missing, malformed or not a mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: expected a YAML file, found nothing there") from None
    except OSError as error:
        raise UserError(f"{path}: expected a YAML file, found: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{path}: expected a YAML file, found: {detail}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def build(
    cls: type[C],
    values: Mapping[Any, Any],
    *,
    flags: Mapping[str, str] | None = None,
    file: Path | None = None,
    section: str = "",
) -> C:
    """Check `values` as a whole. Raises `UserError` with one line per problem.

    What names a key in a problem: `flags` has the flag of each key that came from the command line,
    `file` is where the others came from, and `section` the part of the file they stand in, with a
    dot at its end.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors()
    lines = []
    for problem in problems:
        parts = [str(part) for part in problem["loc"]]
        key = ".".join(parts)
        outer = (".".join(parts[: n + 1]) for n in range(len(parts)))
        given = next((flags[k] for k in outer if k in flags), None) if flags else None
        absent = file is None or problem["type"] == "missing"
        if given is None and absent and not section and key in cls.model_fields:
            given = flag_of(cls, key)
        name = given or (f"{file}: {section}{key}" if file is not None else f"{section}{key}")
        lines.append(_line(cls, name, problem))
    raise UserError(*lines)


EXPECTED = {  # of pydantic's types of problems, where its own words would not fit
    "path_type": "a path",
    "string_type": "text",
    "dict_type": "keys and values",
    "tuple_type": "a list",
    "too_long": "fewer values",
    "too_short": "more values",
    "missing": "more values",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "list_type": "a list",
    "model_type": "keys and values",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
}


def _line(cls: type[Config], name: str, problem: Any) -> str:
    """One problem as a line: where, what was expected, what was found."""
    kind, loc = problem["type"], problem["loc"]
    if kind in ("extra_forbidden", "invalid_key"):
        owner = SECTIONS.get(str(loc[0]), cls) if len(loc) > 1 else cls
        near = difflib.get_close_matches(str(loc[-1]), list(owner.model_fields), n=1)
        return f"{name}: unknown key" + (f", did you mean '{near[0]}'?" if near else "")
    if kind == "missing" and str(loc[-1]) in cls.model_fields:
        return f"{name}: required, not given"
    if (
        kind == "value_error"
    ):  # from a validator of ours; that of a whole model names the key itself
        return f"{name}: {problem['ctx']['error']}" if loc else f"{name}{problem['ctx']['error']}"
    expected = EXPECTED.get(kind) or problem["msg"].removeprefix("Input should be ")
    return f"{name}: expected {expected}, found {reprlib.repr(problem['input'])}"
