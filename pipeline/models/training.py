"""What our own training loops share: the state to resume from, results.csv, curves."""

from __future__ import annotations

import csv
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from pipeline.data.files import atomic_path, write_text
from pipeline.errors import UserError

Rows = list[dict[str, float]]  # one row of results.csv per epoch


def save_state(
    path: Path,
    signature: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    rows: Rows,
) -> None:
    """Write everything that `restore_state` needs, in one file."""
    state = {
        "signature": signature,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rows": rows,
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def restore_state(
    path: Path,
    signature: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> Rows:
    """Load `save_state`'s file; returns the epochs done.

    Raises `UserError` if the file cannot be read or is of a training with another signature.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise UserError(
            f"--resume: expected a checkpoint at {path}, found a file that cannot be read"
        ) from None
    if state.get("signature") != signature:
        raise UserError(
            f"--resume: expected the options and data that {path} was made with, found others"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return list(state["rows"])


def write_results(path: Path, rows: Rows) -> None:
    """Write one line per epoch as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
    write_text(path, text.getvalue())


def plot_curves(
    path: Path, rows: Rows, panels: Sequence[Sequence[str]], best_epoch: float | None = None
) -> None:
    """Plot columns of the rows over the epochs, one panel for each group of columns."""
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axis, columns in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for column in columns:
            axis.plot(epochs, [row[column] for row in rows], label=column.replace("_", " "))
        if best_epoch is not None:
            axis.axvline(best_epoch, color="grey", linestyle=":", label="best")
        axis.set(xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
