"""Metrics and pictures for TensorBoard and MLflow, where a command was told to hand them on.

TensorBoard: event files under its folder, in one named like the run's output, so that one folder
takes many runs. MLflow: its file store, one run for each output, in the experiment `pipeline`.
Both packages are extras. Nothing goes to a server.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import cv2
import yaml

from pipeline.config import LoggedConfig
from pipeline.data.files import read_image
from pipeline.errors import UserError

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny"}  # by option and extra
EXPERIMENT = "pipeline"
LONGEST = 6000  # characters of a parameter that MLflow takes


class Logger(Protocol):
    """One of the two."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, path: Path, step: int) -> None: ...

    def close(self, status: str) -> None:
        """`status` is MLflow's: FINISHED, FAILED or KILLED."""


class Log:
    """Hands on to each logger what a run has to show; to none, if none was asked for."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self._loggers = loggers
        self._step = 0

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Figures by name, of an epoch or of the whole run. Those that are not finite are left out.

        Characters that MLflow does not take go from the names.
        """
        self._step = max(self._step, step)
        known = {
            re.sub(r"[^\w./ -]", "", name): float(value)
            for name, value in values.items()
            if math.isfinite(value)
        }
        for logger in self._loggers:
            logger.metrics(known, step)

    def pictures(self, folder: Path) -> None:
        """Every PNG and JPEG file of a folder, but not below it."""
        paths = [path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".jpg")]
        for logger in self._loggers:
            for path in paths:
                logger.picture(path, self._step)


def require(config: LoggedConfig) -> None:
    """Raise `UserError` if a package is missing that the options ask for."""
    problems = [
        f"--{option}: expected the package {package} (pip install 'pipeline[{option}]'), found none"
        for option, package in PACKAGES.items()
        if getattr(config, option) is not None and importlib.util.find_spec(option) is None
    ]
    if problems:
        raise UserError(*problems)


@contextmanager
def opened(config: LoggedConfig, *, resumed: bool = False) -> Iterator[Log]:
    """A log of the run into `config.out`. A resumed one goes on where the interrupted one was."""
    name, options = _run_name(config.out), config.model_dump(mode="json")
    loggers: list[Logger] = []
    if config.tensorboard is not None:
        loggers.append(TensorBoard(config.tensorboard / name, options))
    if config.mlflow is not None:
        loggers.append(MLflow(config.mlflow, name, options, resumed))
    status = "FAILED"
    try:
        yield Log(loggers)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        for logger in loggers:
            logger.close(status)


def _run_name(out: Path) -> str:
    """The output's path from the working folder, or from the root if it is elsewhere."""
    place = out.resolve()
    if place.is_relative_to(Path.cwd()):
        return place.relative_to(Path.cwd()).as_posix()
    return place.relative_to(place.anchor).as_posix()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested mappings, each by its keys with slashes between them."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = value
    return numbers


class TensorBoard:
    """https://www.tensorflow.org/tensorboard, by torch's own writer."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
        as_it_is = "".join(f"    {line}\n" for line in text.splitlines())  # in Markdown
        self._writer.add_text("options", as_it_is)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # for those who watch

    def picture(self, path: Path, step: int) -> None:
        image = cv2.cvtColor(read_image(path), cv2.COLOR_BGR2RGB)
        self._writer.add_image(path.stem, image, step, dataformats="HWC")

    def close(self, status: str) -> None:
        self._writer.close()


class MLflow:
    """https://mlflow.org/docs/latest/ml/tracking, into a folder of files.

    Its later versions want MLFLOW_ALLOW_FILE_STORE=true for one, also of those who look at it.
    """

    def __init__(self, folder: Path, name: str, options: Mapping[str, Any], resumed: bool) -> None:
        for variable in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
            os.environ.setdefault(variable, "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=folder.resolve().as_uri())
        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        runs = self._client.search_runs([experiment]) if resumed else []  # the latest one first
        earlier = next((run for run in runs if run.info.run_name == name), None)
        if earlier is not None:
            self._run = earlier.info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(experiment, run_name=name).info.run_id
        for key, value in options.items():
            self._client.log_param(self._run, key, str(value)[:LONGEST])

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def picture(self, path: Path, step: int) -> None:
        self._client.log_artifact(self._run, str(path), "pictures")

    def close(self, status: str) -> None:
        self._client.set_terminated(self._run, status)
