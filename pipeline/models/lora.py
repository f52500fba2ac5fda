"""LoRA: low-rank updates of the encoder's attention, trained in place of its weights.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685. The
package peft does it; here is what of a SAM it is applied to.
"""

from __future__ import annotations

import copy
from typing import Any

from segment_anything.modeling import Sam
from torch import nn

from pipeline.errors import UserError

RANK = 8
SCALE = 2  # of an update: peft's `lora_alpha` divided by the rank
# The fused query, key and value projection and the output projection, which have the same names in
# segment-anything's ViT and in MobileSAM's TinyViT.
ATTENTION = r".*\.attn\.(qkv|proj)"


def add_lora(sam: Sam) -> None:
    """Put LoRA into the attention of the image encoder, whose own weights are then frozen.

    The updates start at zero: what the SAM computes stays as it is. Raises `UserError` when the
    encoder has no attention or the package peft is absent.
    """
    if not any(name.endswith(".attn.qkv") for name, _ in sam.image_encoder.named_modules()):
        raise UserError(
            "--train lora: expected a SAM whose encoder has attention (sam-vit-*, mobile-sam), "
            "found one without"
        )
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError(
            "--train lora: expected the package peft (pip install 'pipeline[lora]'), found none"
        ) from None
    config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=ATTENTION)
    sam.image_encoder = get_peft_model(sam.image_encoder, config)


def lora_parameters(sam: Sam) -> list[nn.Parameter]:
    """The updates that `add_lora` has put in: two matrices for each projection."""
    return [p for name, p in sam.image_encoder.named_parameters() if ".lora_" in name]


def merged(sam: Sam) -> Sam:
    """A copy whose updates are added to the weights: an ordinary SAM. The given one stays as is."""
    plain = copy.deepcopy(sam)
    encoder: Any = plain.image_encoder
    plain.image_encoder = encoder.merge_and_unload()
    return plain
