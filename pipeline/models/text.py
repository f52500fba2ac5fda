"""Prompt embeddings from CLIP's text encoder, where it can be had.

CLIP ViT-B/32: Radford et al., Learning Transferable Visual Models From Natural Language
Supervision, ICML 2021, arXiv 2103.00020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.models import weights

if TYPE_CHECKING:
    import torch


def clip_embeddings(texts: Sequence[str], *, offline: bool) -> torch.Tensor:
    """Embeddings of length 1, shape (texts, 512).

    Raises `UserError` when the package `clip-anytorch` or the weights cannot be had.
    """
    try:
        import clip
    except ImportError:
        raise UserError(
            "expected the package clip-anytorch (pip install 'pipeline[clip]'), found none"
        ) from None
    import torch

    path = weights.resolve("clip-vit-b-32", offline=offline)
    model, _ = clip.load(str(path), device="cpu")
    with torch.inference_mode():
        features = model.encode_text(clip.tokenize(list(texts))).float()
    return features / features.norm(dim=-1, keepdim=True)
