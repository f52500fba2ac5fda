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
        return "0" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu"
    if wanted == "cpu" or (wanted == "mps" and _has_mps()):
        return wanted
    count = torch.cuda.device_count()
    gpus = wanted.split(",")
    if len(set(gpus)) == len(gpus) and set(gpus) <= {str(gpu) for gpu in range(count)}:
        return wanted
    raise UserError(f"--device: expected auto, cpu, mps or one of {count} GPUs, found '{wanted}'")


def torch_device(wanted: str) -> torch.device:
    """One device for PyTorch. Raises `UserError` for several, or one that this machine lacks."""
    name = device_name(wanted)
    if "," in name:
        raise UserError(f"--device: expected one device, found '{wanted}'")
    return torch.device(f"cuda:{name}" if name.isdigit() else name)


def has_fast_bfloat16(kind: str) -> bool:
    """Whether a device (`cuda`, `mps`, `cpu`) is faster in bfloat16.

    New GPUs are, and CPUs that multiply it: with AMX, or AVX-512's instructions for it.
    """
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )


def _has_mps() -> bool:
    return torch.backends.mps.is_available()
