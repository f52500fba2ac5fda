"""Options of evaluate."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.base import (
    ANOMALY_THRESHOLD,
    FOLD,
    FoldOrAll,
    Fraction,
    LoggedConfig,
    Seed,
    SplitName,
    check_split_of_all,
    flag_of,
)

COSTS = ("miss", "false-alarm")


def _check_cost(cost: object) -> object:
    """'miss=50,false-alarm=1', or the same as keys and values."""
    if isinstance(cost, str):
        cost = dict(part.strip().partition("=")[::2] for part in cost.split(","))
    if cost is None:
        return None
    expected = "expected miss=COST,false-alarm=COST"
    if not isinstance(cost, dict) or sorted(cost) != sorted(COSTS):
        raise ValueError(f"{expected}, found {reprlib.repr(cost)}")
    try:
        numbers = {name: float(cost[name]) for name in COSTS}
    except (TypeError, ValueError):
        raise ValueError(f"{expected} with numbers, found {reprlib.repr(cost)}") from None
    if min(numbers.values()) < 0 or not 0 < sum(numbers.values()) < float("inf"):
        raise ValueError(f"{expected} of 0 or more, and not both 0, found {reprlib.repr(cost)}")
    return numbers


Cost = Annotated[dict[str, float], BeforeValidator(_check_cost)]


class EvaluateConfig(LoggedConfig):
    """Measure boxes, masks and the image decision, or make one table of runs of any kind."""

    positional: ClassVar[tuple[str, ...]] = ("runs",)
    of_predictions: ClassVar[tuple[str, ...]] = (
        "predictions", "truth_boxes", "classifiers", "anomaly", "anomaly_threshold", "threshold",
        "cost", "review_below",
    )  # fmt: skip
    inputs: ClassVar[tuple[str, ...]] = (
        "data", "predictions", "truth_boxes", "classifiers", "anomaly", "runs",
    )  # fmt: skip
    runs: tuple[Path, ...] = Field(
        (),
        description="output folders of detect-anomaly, finetune-classifier, finetune-head and "
        "segment to compare, in place of --predictions",
    )
    data: Path = Field(description="dataset folder written by `pipeline convert`")
    predictions: Path | None = Field(
        None,
        description="output folder of `pipeline segment`; with --fold all, '{fold}' in a path is "
        "the number of the fold",
    )
    truth_boxes: Path | None = Field(
        None, description="output folder of `pipeline segment --boxes truth`: the upper bound"
    )
    classifiers: tuple[Path, ...] = Field(
        (), description="output folders of `pipeline finetune-classifier` or `finetune-head`"
    )
    anomaly: Path | None = Field(
        None,
        description="output folder of `pipeline detect-anomaly` on the same dataset: images it "
        "calls anomalous, and on which no box counts, are reported as unknown defects, and one "
        "image decision takes both scores (default: the scores that the predictions have, if any)",
    )
    anomaly_threshold: float | None = Field(
        None, description=f"{ANOMALY_THRESHOLD} (default: the one chosen on val, by its run)"
    )
    fold: FoldOrAll = Field(
        None,
        description="fold of the dataset instead of its single split; 'all': every fold's test "
        "images, each with the predictions of its fold",
    )
    split: SplitName = Field("test", description="split that is measured")
    threshold: Fraction | None = Field(
        None, description="score from which a box counts (default: the best on the val split)"
    )
    cost: Cost | None = Field(
        None,
        description="what it costs to miss a defective image, and to raise an alarm on a good one, "
        "as in miss=50,false-alarm=1: the best threshold is then the cheapest, not that of the "
        "best F1",
    )
    review_below: Fraction | None = Field(
        None,
        description="quality under which a mask is for review (default: what lists every badly "
        "drawn mask of the val split)",
    )
    published: bool = Field(
        True, description="show the published rows of the study, if it had the same classes"
    )
    resamples: int = Field(
        1000, ge=0, description="bootstrap resamples for the intervals (0: none)"
    )
    seed: Seed = Field(0, description="seed of the bootstrap")

    @model_validator(mode="after")
    def _check_threshold(self) -> EvaluateConfig:
        if self.cost is not None and self.threshold is not None:
            raise ValueError(
                "--cost: expected no --threshold beside it, for it chooses one, "
                f"found {self.threshold:g}"
            )
        return self

    @model_validator(mode="after")
    def _check_runs(self) -> EvaluateConfig:
        given = (name for name in self.of_predictions if getattr(self, name) not in (None, ()))
        if self.runs and (name := next(given, None)):
            raise ValueError(
                f"{flag_of(EvaluateConfig, name)}: expected none beside runs to compare, "
                f"found {getattr(self, name)}"
            )
        return self

    @model_validator(mode="after")
    def _check_folds(self) -> EvaluateConfig:
        if self.fold != "all":
            return self
        check_split_of_all(self.split)
        folders = {"predictions": self.predictions, "truth_boxes": self.truth_boxes}
        folders |= {"anomaly": self.anomaly}
        for name in ("classifiers", "runs"):
            folders[name] = next((p for p in getattr(self, name) if FOLD not in str(p)), None)
        for name, folder in folders.items():
            if folder is not None and FOLD not in str(folder):
                flag = flag_of(EvaluateConfig, name)
                raise ValueError(
                    f"{flag}: expected a path with {FOLD} beside --fold all, found {folder}"
                )
        return self
