"""What the options of several commands share: types, and the classes they build on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _check_zoom(zoom: float) -> float:
    if 0 < zoom < 1:
        raise ValueError(f"expected 0 or at least 1, found {zoom:g}")
    return zoom


Zoom = Annotated[float, Field(ge=0), AfterValidator(_check_zoom)]
SplitName = Literal["train", "val", "test"]

FOLD = "{fold}"  # in a path: the number of the fold


def of_fold(path: Path, fold: int) -> Path:
    """A path with the number of a fold in place of `{fold}`."""
    return Path(str(path).replace(FOLD, str(fold)))


def _check_fold(fold: object) -> object:
    if fold is None or fold == "all" or str(fold).isdecimal():
        return fold
    raise ValueError(f"expected the number of a fold, or 'all', found {fold!r}")


FoldOrAll = Annotated[int | Literal["all"] | None, BeforeValidator(_check_fold)]


def check_split_of_all(split: SplitName) -> None:
    """Beside `--fold all`, for the validator of a whole model. Raises `ValueError`."""
    if split != "test":  # of the other splits, an image is in several folds
        raise ValueError(f"--split: expected 'test' beside --fold all, found {split!r}")


def listed(value: object) -> object:
    """One value as a list of it: for a `BeforeValidator`."""
    return value if isinstance(value, list | tuple) else [value]


def _check_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder, found the file {folder}")
    return folder


Folder = Annotated[Path, AfterValidator(_check_folder)]
LogFolder = Folder | None
Cache = Annotated[
    Folder | None,
    Field(description="folder that keeps what SAM's encoder computes for later runs, if any"),
]
CacheSize = Annotated[
    PositiveFloat, Field(description="GB in that folder; what was used longest ago goes")
]

ANOMALY_THRESHOLD = "anomaly score from which an image is anomalous"  # a description's start


class Config(BaseModel):
    """Base of all configurations: immutable, and unknown keys are errors."""

    # YAML makes a number of `device: 0`; inf and nan are never meant.
    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )
    positional: ClassVar[tuple[str, ...]] = ()  # fields given without a flag, in this order
    inputs: ClassVar[tuple[str, ...]] = ()  # fields that name files or folders to read


class StageConfig(Config):
    """What all stages share: where the results go, and whether to replace what is there."""

    out: Path = Field(description="folder for the results")
    force: bool = Field(False, description="replace an existing, different output")


class LoggedConfig(StageConfig):
    """What those share whose metrics and pictures TensorBoard and MLflow can show."""

    tensorboard: LogFolder = Field(None, description="folder of TensorBoard's event files, if any")
    mlflow: LogFolder = Field(None, description="folder of MLflow's file store, if any")


def flag_of(cls: type[Config], field: str) -> str:
    """How the command line spells a field."""
    if field in cls.positional:
        return field
    return f"--{field.rstrip('_').replace('_', '-')}"  # one that Python wants for itself ends in _
