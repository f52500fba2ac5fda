"""Ultralytics, kept to itself: import it only after `isolate()`.

Left alone it reads and writes a settings folder in the user's home, sends usage statistics, looks
for newer versions, installs packages and logs to every experiment tracker that is installed. All of
that is switched off before its first import.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRACKERS = ("clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")


def isolate() -> None:
    """Give this process, and those it starts, a throw-away settings folder without telemetry."""
    if os.environ.get("PIPELINE_ULTRALYTICS_ISOLATED"):
        return
    folder = Path(tempfile.mkdtemp(prefix="pipeline-ultralytics-"))
    atexit.register(_remove, folder, owner=os.getpid())
    os.environ.update(
        PIPELINE_ULTRALYTICS_ISOLATED="1",
        YOLO_CONFIG_DIR=str(folder),
        YOLO_OFFLINE="1",
        YOLO_AUTOINSTALL="0",
        NO_ALBUMENTATIONS_UPDATE="1",
    )
    os.environ.setdefault("MPLCONFIGDIR", str(folder))  # matplotlib's cache of fonts
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "torch"))
    _provide_fonts(folder)
    with quiet():
        from ultralytics import settings

        places = {f"{name}_dir": str(folder / name) for name in ("datasets", "weights", "runs")}
        settings.update({"sync": False, **places, **dict.fromkeys(TRACKERS, False)})


@contextmanager
def quiet() -> Iterator[None]:
    """Within it Ultralytics logs warnings and progress bars, but no information."""
    logger = logging.getLogger("ultralytics")

    def is_warning(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING

    logger.addFilter(is_warning)  # not the level, which Ultralytics sets when it is imported
    try:
        yield
    finally:
        logger.removeFilter(is_warning)


def _remove(folder: Path, owner: int) -> None:
    """Remove the settings folder, unless this is a fork of the process that made it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _provide_fonts(folder: Path) -> None:
    """Put matplotlib's own font where Ultralytics would otherwise download Arial for its plots."""
    import matplotlib

    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    settings_folder = folder / "Ultralytics"  # the name Ultralytics adds to YOLO_CONFIG_DIR
    settings_folder.mkdir()
    for name in ("Arial.ttf", "Arial.Unicode.ttf"):
        shutil.copyfile(font, settings_folder / name)
