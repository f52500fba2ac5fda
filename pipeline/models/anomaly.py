"""Anomaly detectors that learn from good images alone: making them, and keeping what they learned.

    method = load(folder)
    scores, heat_maps = method.score(images)

with images of `method.image_size`; see `Method`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipeline.config import DetectAnomalyConfig
from pipeline.data import tensors
from pipeline.errors import UserError
from pipeline.models.anomaly_features import Cosine, Mahalanobis, PaDiM, PatchCore
from pipeline.models.anomaly_method import Method
from pipeline.models.self_supervised import CutPaste, MoCo, Rotation, SimCLR

FILE = "model.safetensors"  # in the output folder of `pipeline detect-anomaly`
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Cosine, Mahalanobis, PaDiM, PatchCore, Rotation, CutPaste, SimCLR, MoCo)
}


def create(config: DetectAnomalyConfig) -> Method:
    """The method that the options ask for, not fitted yet, on the CPU.

    Raises `UserError` when something that it begins with is not installed.
    """
    method = METHODS[config.method]
    options = {name: getattr(config, name) for name in method.options}
    made = method(config.image_size, **options)
    made.begin()
    return made


def save(method: Method, folder: Path) -> None:
    """Write a fitted method into `folder`; the file's metadata says how to build it."""
    options = {name: getattr(method, name) for name in method.options}
    about = {"method": method.name, "image_size": method.image_size, "options": options}
    tensors.write(folder / FILE, method.state_dict(), {"anomaly": json.dumps(about)})


def load(folder: Path, device: torch.device | str = "cpu") -> Method:
    """The method that `save` wrote into `folder`; it gives equal scores.

    Raises `UserError` when there is none. Nothing beside the file is needed, no package with
    weights either.
    """
    path = folder / FILE
    state, metadata = tensors.read(path, "an anomaly detector of `pipeline detect-anomaly`")
    try:
        about = json.loads(metadata["anomaly"])
        if type(about["image_size"]) is not int or about["image_size"] < 1:
            raise ValueError(f"an image size of {about['image_size']!r}")
        if broken := [name for name, its in state.items() if not torch.isfinite(its).all()]:
            raise ValueError(f"numbers that are not finite in {broken[0]}")
        method = METHODS[about["method"]](about["image_size"], **about["options"])
        method.learn({name: state[name] for name in method.fitted})
        method.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        detail = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: expected an anomaly detector of `pipeline detect-anomaly`, found {detail}"
        ) from None
    return method.to(device)
