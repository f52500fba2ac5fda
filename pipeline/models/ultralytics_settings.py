"""Ultralytics, kept to itself: import it only after `isolate()`.

Left alone it reads and writes a settings folder in the user's home, sends usage statistics, looks
for newer versions and installs packages. All of that is switched off before its first import.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def isolate() -> None:
    """Give this process, and those it starts, a throw-away settings folder without telemetry."""
    if os.environ.get("PIPELINE_ULTRALYTICS_ISOLATED"):
        return
    folder = Path(tempfile.mkdtemp(prefix="pipeline-ultralytics-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    os.environ.update(
        PIPELINE_ULTRALYTICS_ISOLATED="1",
        YOLO_CONFIG_DIR=str(folder),
        YOLO_OFFLINE="1",
        YOLO_AUTOINSTALL="0",
        NO_ALBUMENTATIONS_UPDATE="1",
    )
    _provide_fonts(folder)
    from ultralytics import settings

    settings.update({"sync": False, "datasets_dir": str(folder), "runs_dir": str(folder)})


def _provide_fonts(folder: Path) -> None:
    """Put matplotlib's own font where Ultralytics would otherwise download Arial for its plots."""
    import matplotlib

    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    settings_folder = folder / "Ultralytics"  # the name Ultralytics adds to YOLO_CONFIG_DIR
    settings_folder.mkdir()
    for name in ("Arial.ttf", "Arial.Unicode.ttf"):
        shutil.copyfile(font, settings_folder / name)
