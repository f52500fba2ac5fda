"""A folder that keeps what an image encoder has computed, for later runs and other processes.

An entry is one safetensors file in the precision it was computed in, so it equals a new computation
with the same library on the same kind of device. Its name is a hash of all it depends on: other
weights or other pixels are another entry, and nothing has to be invalidated.

Nothing is locked. Files appear by renaming and go by unlinking; an entry that another process has
removed, or that is damaged, is computed again. diskcache would do the same with locks, but it
unpickles what it finds, and its SQLite index does not work in a folder on a network.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from pipeline.data import tensors
from pipeline.errors import UserError

SUFFIX = ".embedding"  # of the files here: nothing else in the folder is ever removed


class CachedEncoder(nn.Module):
    """An image encoder for inference that looks into a folder before it computes.

    It takes the place of a SAM's own `image_encoder`, whose weights must not change from then on.
    At most `limit_gb` times 10^9 bytes are kept: those used longest ago go first. Other processes
    that write at the same time may exceed it for a moment. A folder that cannot be written costs
    time and a warning, no more.
    """

    def __init__(self, encoder: nn.Module, folder: Path, limit_gb: float) -> None:
        super().__init__()
        self.encoder, self.img_size = encoder, encoder.img_size
        self._folder, self._limit = folder, limit_gb * 1e9
        self._weights = _digest(encoder.state_dict())

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder's output, on the device of `images`."""
        path = self._folder / f"{self._signature(images)}{SUFFIX}"
        embedding = _read(path)
        if embedding is None:
            embedding = self.encoder(images)
            try:
                _write(path, embedding)
                self._evict()
            except OSError as error:
                warnings.warn(f"embedding not kept: {error}", stacklevel=2)
        return embedding.to(images.device)

    def _signature(self, images: torch.Tensor) -> str:
        """Names an output: the weights, the input, and the arithmetic."""
        kind = images.device.type
        fast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        about = f"{self._weights} {torch.__version__} {kind} {fast}"
        return hashlib.sha256(f"{about} {_digest({'images': images})}".encode()).hexdigest()

    def _evict(self) -> None:
        """Remove what was used longest ago, until the rest is within the limit.

        Temporary files count too, so what a killed process left behind goes in its turn.
        """
        used = []
        for path in self._folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):  # removed by another process
                status = path.stat()
                used.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in used)
        for _, size, path in sorted(used):
            if total <= self._limit:
                break
            path.unlink(missing_ok=True)
            total -= size


def _read(path: Path) -> torch.Tensor | None:
    """The embedding in a file, which becomes the one used last; None if absent or damaged."""
    try:
        content, metadata = tensors.read(path, "an embedding")
    except UserError:
        return None
    if metadata.get("sha256") != _digest(content):
        return None
    with suppress(OSError):  # removed just now, or a folder to read only
        os.utime(path)
    return content.get("embedding")


def _write(path: Path, embedding: torch.Tensor) -> None:
    content = {"embedding": embedding.cpu()}
    tensors.write(path, content, {"sha256": _digest(content)})


def _digest(state: dict[str, torch.Tensor]) -> str:
    """A hash of tensors: names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
