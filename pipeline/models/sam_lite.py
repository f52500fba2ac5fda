"""`sam-lite`, the small Segment Anything model of this project: EfficientNet-Lite0 as encoder."""

from __future__ import annotations

from typing import Any

import timm
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import nn
from torch.nn import functional as F

from pipeline.models import imagenet

SIZE = 256  # input side in pixels
STRIDE = 8  # input pixels per embedding vector
DIM = 128  # length of an embedding vector


class LiteEncoder(nn.Module):
    """EfficientNet-Lite0 whose features of strides 4 to 32 are summed top-down at stride 8.

    (n, 3, 256, 256) normalised RGB in; (n, 128, 32, 32) out. The sum is that of a feature pyramid
    (Lin et al., CVPR 2017, arXiv 1612.03144), with stride 4 folded in for fine edges.
    """

    img_size = SIZE

    def __init__(self) -> None:
        super().__init__()
        backbone: Any = timm.create_model("tf_efficientnet_lite0", features_only=True)
        fine, *coarse = backbone.feature_info.channels()[1:]
        self.backbone = backbone.to(memory_format=torch.channels_last)  # a third faster on a CPU
        self.neck = nn.ModuleDict(
            {
                "fine": nn.Conv2d(fine, DIM, 3, stride=2, padding=1),
                "coarse": nn.ModuleList(nn.Conv2d(c, DIM, 1) for c in coarse),
                "smooth": nn.Sequential(
                    LayerNorm2d(DIM),
                    nn.Conv2d(DIM, DIM, 3, padding=1),
                    LayerNorm2d(DIM),
                ),
            }
        )

    def general_parameters(self) -> list[nn.Parameter]:
        """Those of the first layers, up to stride 4: edges and textures that hold for any picture.

        Two fifths of a training step would go there.
        """
        first = [self.backbone.conv_stem, self.backbone.bn1, *self.backbone.blocks[:2]]
        return [parameter for module in first for parameter in module.parameters()]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        _, fine, *coarse = self.backbone(image.contiguous(memory_format=torch.channels_last))
        layers: Any = self.neck["coarse"]
        total = layers[-1](coarse[-1])
        for layer, features in zip(layers[-2::-1], coarse[-2::-1], strict=True):
            total = layer(features) + F.interpolate(total, features.shape[-2:])
        return self.neck["smooth"](total + self.neck["fine"](fine))


def build_sam_lite(pretrained: bool = False) -> Sam:
    """The small SAM; with `pretrained`, its encoder has ImageNet features. Raises `UserError`."""
    encoder = LiteEncoder()
    if pretrained:
        features = imagenet.efficientnet_lite0(pretrained=True).state_dict()
        wanted = encoder.backbone.state_dict().keys()
        encoder.backbone.load_state_dict({key: features[key] for key in wanted})
    grid = SIZE // STRIDE
    return Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(DIM, (grid, grid), (SIZE, SIZE), 16),
        mask_decoder=MaskDecoder(
            transformer_dim=DIM,
            transformer=TwoWayTransformer(depth=2, embedding_dim=DIM, num_heads=8, mlp_dim=512),
            iou_head_hidden_dim=DIM,
        ),
        pixel_mean=[255 * v for v in imagenet.LITE0_MEAN],
        pixel_std=[255 * v for v in imagenet.LITE0_STD],
    )
