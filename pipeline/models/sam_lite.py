"""`sam-lite`, the small Segment Anything model of this project.

Its encoder is EfficientNet-Lite0. Segment-anything's prompt encoder and mask decoder are extended
where masks need to follow edges: a box is also shown as a filled mask, and the decoder's features
are refined at stride 2 with fine features of the encoder (as in HQ-SAM, Ke et al., NeurIPS 2023,
arXiv 2306.01567).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import nn
from torch.nn import functional as F

from pipeline.models import imagenet

SIZE = 320  # input side in pixels
STRIDE = 8  # input pixels per embedding vector
DIM = 128  # length of an embedding vector, as the prompts and the decoder's transformer have it
DETAIL = 16  # channels of fine features at stride 2
BOX_LOGIT = 4.0  # of the pixels in a box that is shown as a mask; those outside have the negative
CELLS = STRIDE // 2  # side of the square of fine features that lie in one embedding vector


class LiteEncoder(nn.Module):
    """EfficientNet-Lite0 whose features of strides 4 to 32 are summed top-down at stride 8.

    (n, 3, SIZE, SIZE) normalised RGB in; (n, DIM + DETAIL * CELLS ** 2, SIZE / 8, SIZE / 8) out.
    The first DIM channels are the sum, that of a feature pyramid (Lin et al., CVPR 2017, arXiv
    1612.03144) with stride 4 folded in for fine edges; the others are the fine features of stride
    2, folded into channels (`pixel_unshuffle`).
    """

    img_size = SIZE

    def __init__(self) -> None:
        super().__init__()
        backbone: Any = timm.create_model("tf_efficientnet_lite0", features_only=True)
        finest, fine, *coarse = backbone.feature_info.channels()
        self.backbone = backbone.to(memory_format=torch.channels_last)  # a third faster on a CPU
        _keep_depthwise_in_float32(self.backbone)
        self.neck = nn.ModuleDict(
            {
                "finest": nn.Conv2d(finest, DETAIL, 1),
                "finer": nn.Conv2d(fine, DETAIL, 1),
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
        finest, fine, *coarse = self.backbone(image.contiguous(memory_format=torch.channels_last))
        layers: Any = self.neck["coarse"]
        total = layers[-1](coarse[-1])
        for layer, features in zip(layers[-2::-1], coarse[-2::-1], strict=True):
            total = layer(features) + F.interpolate(total, features.shape[-2:])
        total = self.neck["smooth"](total + self.neck["fine"](fine))
        detail = self.neck["finest"](finest)
        detail = detail + F.interpolate(self.neck["finer"](fine), detail.shape[-2:])
        return torch.cat([total, F.pixel_unshuffle(detail, CELLS)], dim=1)


def _keep_depthwise_in_float32(network: nn.Module) -> None:
    """Exempt depthwise convolutions from mixed precision.

    On CPUs with fast bfloat16 their backward pass in it takes three times as long, and with it a
    whole training step a third longer.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.forward = partial(_in_float32, module.forward)  # type: ignore[method-assign]


def _in_float32(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return forward(x.float()).to(x.dtype)


class LitePromptEncoder(PromptEncoder):
    """Segment-anything's prompt encoder; a box that comes without a mask is one as well."""

    def forward(
        self,
        points: tuple[torch.Tensor, torch.Tensor] | None,
        boxes: torch.Tensor | None,
        masks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sparse (n, tokens, DIM) and dense (n, DIM, h, w) embeddings.

        `points` are (n, k, 2) with labels (n, k), `boxes` (n, 4), both in pixels of the encoder's
        input, and `masks` (n, 1, 4h, 4w) logits.
        """
        if masks is None and boxes is not None:
            masks = self._filled(boxes.reshape(-1, 4))
        sparse, dense = super().forward(points, boxes, masks)
        return sparse, dense

    def _filled(self, boxes: torch.Tensor) -> torch.Tensor:
        """Logits of the boxes' areas: each cell's by the part of it that is covered."""
        height, width = self.mask_input_size
        x1, y1, x2, y2 = (boxes * (width / self.input_image_size[1])).T[..., None]
        across, down = (torch.arange(side, device=boxes.device) for side in (width, height))
        covered_x = (torch.minimum(x2, across + 1) - torch.maximum(x1, across)).clamp(0, 1)
        covered_y = (torch.minimum(y2, down + 1) - torch.maximum(y1, down)).clamp(0, 1)
        covered = covered_y[:, None, :, None] * covered_x[:, None, None, :]
        return BOX_LOGIT * (2 * covered - 1)


class LiteDecoder(MaskDecoder):
    """Segment-anything's mask decoder with features refined at stride 2.

    Its own upsampling does not look beyond one embedding vector, which leaves ragged edges.
    """

    def __init__(self) -> None:
        super().__init__(
            transformer_dim=DIM,
            transformer=TwoWayTransformer(depth=2, embedding_dim=DIM, num_heads=8, mlp_dim=512),
            iou_head_hidden_dim=DIM,
        )
        channels = DIM // 8  # of the upsampled features
        self.refine = nn.Sequential(
            nn.Conv2d(channels + DETAIL, 32, 3, padding=1),
            nn.GroupNorm(1, 32),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=2, dilation=2),
            nn.GroupNorm(1, 32),
            nn.GELU(),
            nn.Conv2d(32, channels, 3, padding=1),
        ).to(memory_format=torch.channels_last)

    def predict_masks(
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits (n, 4, SIZE / 2, SIZE / 2) and predicted IoUs (n, 4) of n prompts.

        Unlike that of segment-anything, it also takes an embedding for every prompt.
        """
        count = len(sparse_prompt_embeddings)
        embeddings = image_embeddings.expand(count, -1, -1, -1)
        features = embeddings[:, :DIM] + dense_prompt_embeddings
        detail = F.pixel_shuffle(embeddings[:, DIM:], CELLS)
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(count, -1, -1), sparse_prompt_embeddings], dim=1)
        position = image_pe.expand(count, -1, -1, -1)
        tokens, pixels = self.transformer(features, position, tokens)
        upscaled = self.output_upscaling(pixels.transpose(1, 2).view(features.shape))
        both = torch.cat([upscaled, detail], dim=1)
        upscaled = upscaled + self.refine(both.contiguous(memory_format=torch.channels_last))
        weights = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        masks = torch.einsum("nmc,nchw->nmhw", torch.stack(weights, dim=1), upscaled)
        return masks, self.iou_prediction_head(tokens[:, 0])


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
        prompt_encoder=LitePromptEncoder(DIM, (grid, grid), (SIZE, SIZE), 16),
        mask_decoder=LiteDecoder(),
        pixel_mean=[255 * v for v in imagenet.LITE0_MEAN],
        pixel_std=[255 * v for v in imagenet.LITE0_STD],
    )
