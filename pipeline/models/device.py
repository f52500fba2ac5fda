"""Where networks run."""

from __future__ import annotations

import torch

from pipeline.errors import UserError


def device_name(wanted: str) -> str:
    """`auto` resolved to `0`, `mps` or `cpu`; anything else checked to be there.

    `wanted` is in Ultralytics' notation: `cpu`, `mps`, `0`, or `0,1` for several GPUs. Raises
    `UserError` for one that this machine lacks.
    """
    if wanted == "auto":
        return "0" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    if wanted == "cpu" or (wanted == "mps" and torch.mps.is_available()):
        return wanted
    count = torch.cuda.device_count()
    gpus = wanted.split(",")
    if all(gpu.isdigit() and int(gpu) < count for gpu in gpus):
        return wanted
    raise UserError(f"--device: expected auto, cpu, mps or one of {count} GPUs, found '{wanted}'")


def torch_device(wanted: str) -> torch.device:
    """One device for PyTorch. Raises `UserError` for several, or one that this machine lacks."""
    name = device_name(wanted)
    if "," in name:
        raise UserError(f"--device: expected one device, found '{wanted}'")
    return torch.device(f"cuda:{name}" if name.isdigit() else name)


def has_fast_bfloat16() -> bool:
    """Whether this machine computes faster in bfloat16: a GPU that has it, or a CPU with AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported()
