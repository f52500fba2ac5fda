"""Tensors and a few words about them in a safetensors file (github.com/huggingface/safetensors)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pipeline.data.files import atomic_path
from pipeline.errors import UserError

_LENGTH = 8  # bytes at the start of the file: the length of the JSON header that follows


def read(path: Path, expected: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file by name, on the CPU, and its metadata.

    Raises `UserError`, which says what was `expected`, when the file is absent, cut off or not
    safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return state, file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError) as error:  # the last: gone while it is opened
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: expected {expected}, found {detail}") from None


def write(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, from any device, and metadata: the same input gives the same bytes."""
    content = save({key: value.contiguous() for key, value in state.items()}, dict(metadata))
    end = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    # The library writes the metadata in random order.
    header = json.loads(content[_LENGTH:end]) | {"__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little") + text)
        file.write(memoryview(content)[end:])
