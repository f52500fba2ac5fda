"""What a run consists of: its stages in their order, and what links one to the next.

Of one fold, everything but the dataset is under fold<K>/, and so it is of all folds, but for their
common evaluation, video and report: a run over all folds takes over what was run fold by fold.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import config as configs
from pipeline.config import FOLD, SECTIONS, LoggedConfig, RunConfig, StageConfig, of_fold
from pipeline.errors import UserError

VIDEOS = (".mp4", ".webm")  # what a page can play and seek in


def plan(config: RunConfig) -> list[tuple[str, StageConfig]]:
    """The commands to run and their configurations, in order.

    Raises `UserError` with the problems of all sections.
    """
    planned: list[tuple[str, StageConfig]] = []
    problems: list[str] = []
    for section, values in _stages(config):
        name = section.split(".")[0]
        if issubclass(SECTIONS[name], LoggedConfig):
            values = {"tensorboard": config.tensorboard, "mlflow": config.mlflow, **values}
        try:
            stage = configs.build(SECTIONS[name], values, section=f"{section}.")
            planned.append((name.replace("_", "-"), stage))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return planned


def _stages(config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each stage's section in the file, and its options with the links filled in."""
    out, fold = config.out, config.fold
    if config.synth is not None:
        synth = {"out": out / "mvtec", **config.synth}
        yield "synth", synth
        source = synth["out"]
    else:
        source = config.mvtec_root / str(config.convert["source"])
    convert = {"out": out / "dataset", **config.convert, "source": source}
    yield "convert", convert
    data = convert["out"]
    models = dict(_models(config, data, out if fold is None else out / f"fold{FOLD}"))
    for k in range(int(convert["folds"])) if fold == "all" else (fold,):
        for section, options in models.items():
            yield section, {"fold": k, **_of_fold(options, k)}
    together = out if fold in (None, "all") else out / f"fold{fold}"
    predictions = models["segment"]["out"]
    evaluate = {
        "data": data,
        "predictions": predictions,
        "truth_boxes": models["segment.truth_boxes"]["out"],
        "classifiers": [
            models[f"finetune_classifier.{n}"]["out"] for n in config.finetune_classifier
        ],
        "anomaly": models.get("detect_anomaly", {}).get("out"),
        "out": together / "evaluation",
        **config.evaluate,
    }
    if fold == "all":
        predictions = Path(evaluate["out"]) / "out_of_fold"
    else:
        evaluate, predictions = _of_fold(evaluate, fold), _of_fold({"": predictions}, fold)[""]
    yield "evaluate", {"fold": fold, **evaluate}
    overlay = {
        "source": data,
        "fold": fold,
        "predictions": predictions,
        "evaluation": evaluate["out"],
        "heat_maps": evaluate["anomaly"],
        "split": config.evaluate.get("split", "test"),
        "out": together / "review.mp4",
        **config.overlay,
    }
    yield "overlay", overlay
    report = {
        "data": data,
        "predictions": predictions,
        "evaluation": evaluate["out"],
        "heat_maps": evaluate["anomaly"],
        "video": overlay["out"],
        "out": together / "report",
        **config.report,
    }
    if Path(report["video"]).suffix.lower() not in VIDEOS:
        report["video"] = None
    yield "report", report


def _models(config: RunConfig, data: Path, out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The stages that each fold has; `out` and the links may have `{fold}` in them."""
    detector = {"data": data, "out": out / "detector", **config.finetune_yolo}
    if config.init is not None:
        detector["model"] = config.init
    yield "finetune_yolo", detector
    segment = {
        "source": data,
        "boxes": str(Path(detector["out"]) / "detector.pt"),
        "out": out / "predictions",
        **config.segment,
    }
    if config.finetune_sam is not None:
        segmenter = {"data": data, "out": out / "segmenter", **config.finetune_sam}
        yield "finetune_sam", segmenter
        segment["sam"] = str(Path(segmenter["out"]) / "sam.safetensors")
    for name, options in config.finetune_classifier.items():
        classifier = {"data": data, "out": out / "classifiers" / name, **options}
        yield f"finetune_classifier.{name}", classifier
    if config.detect_anomaly is not None:
        anomaly = {"source": data, "out": out / "anomaly", **config.detect_anomaly}
        yield "detect_anomaly", anomaly
    yield "segment", segment
    measured = config.evaluate.get("split", "test")
    truth_boxes = {**segment, "boxes": "truth", "out": out / "truth_boxes", "splits": (measured,)}
    yield "segment.truth_boxes", truth_boxes


def _of_fold(options: dict[str, Any], fold: int | None) -> dict[str, Any]:
    """Options with the number of the fold in all paths."""

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        if not isinstance(value, str | Path) or FOLD not in str(value) or fold is None:
            return value
        return type(value)(of_fold(Path(value), fold))

    return {key: filled(value) for key, value in options.items()}
