"""YOLO-World detectors (v2): where they start from, how they are saved, how they detect.

The network is Ultralytics' `WorldModel` (Cheng et al., YOLO-World, CVPR 2024, arXiv 2401.17270).
A checkpoint of ours is an ordinary Ultralytics one: the prompt embeddings are inside, so detection
needs no text encoder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import supervision as sv
import torch
from torch import nn

from pipeline.data import tensors
from pipeline.data.files import atomic_path
from pipeline.errors import UserError
from pipeline.models import weights
from pipeline.models.device import has_fast_bfloat16
from pipeline.models.ultralytics_settings import isolate, quiet

isolate()

from ultralytics.data.augment import LetterBox
from ultralytics.nn.modules import C2fAttn, ImagePoolingAttn, WorldDetect
from ultralytics.nn.tasks import DetectionModel, WorldModel, load_checkpoint
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes
from ultralytics.utils.torch_utils import strip_optimizer

SCRATCH = re.compile(r"yolov8[nsmlx]-worldv2\.yaml")
EMBEDDING = 512  # length of a prompt embedding, that of CLIP ViT-B/32
# The width of the head's class branch depends on the number of classes a model is built for: COCO's
# 80 in official checkpoints. The number of classes it detects is that of its prompts.
BUILT_FOR = 80
SCALES = {16: "n", 32: "s", 48: "m", 64: "l", 80: "x"}  # by the channels of the first convolution
LOGIT_SCALE = -1.0  # what the head's scale of similarities begins at, and training always moves
NMS_IOU = 0.5  # of two boxes of a class that overlap more, the better one is kept


class PromptedWorldModel(WorldModel):
    """A `WorldModel` that trains on its own prompt embeddings instead of texts in the batch.

    `txt_feats` is (1, classes, 512): a parameter if the prompts are learned, else a plain tensor.
    """

    def loss(self, batch: dict[str, Any], preds: Any = None) -> Any:
        if preds is None:
            # Ultralytics leaves mixed precision to GPUs; on a CPU that has it, it halves the time.
            fast = batch["img"].device.type == "cpu" and has_fast_bfloat16("cpu")
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                preds = self.forward(batch["img"])
            preds = {k: v.float() if torch.is_tensor(v) else v for k, v in preds.items()}
        return super().loss(batch, preds)


def load_model(source: str, *, offline: bool = False) -> WorldModel:
    """A YOLO-World network from any starting point.

    `source` is a name of the weights registry, a path to a YOLO-World checkpoint, a path to a plain
    YOLOv8 checkpoint (converted by `from_yolov8`), or `yolov8n-worldv2.yaml` (n, s, m, l or x) for
    random weights. Raises `UserError` when it is none of these.
    """
    if SCRATCH.fullmatch(source):
        return _expect_few(WorldModel(source, nc=BUILT_FOR, verbose=False))
    path = weights.resolve(source, offline=offline)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        model, _ = load_checkpoint(str(path))
    except Exception as error:  # unpickling raises whatever the file's classes raise
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: expected an Ultralytics checkpoint, found {found}") from error
    if isinstance(model, WorldModel):
        return model
    if type(model) is DetectionModel and _is_yolov8(model):
        return from_yolov8(model)
    raise UserError(
        f"{path}: expected a YOLO-World or YOLOv8 detector, found {type(model).__name__} "
        f"of {_yaml_name(model)}"
    )


def from_yolov8(detector: DetectionModel) -> WorldModel:
    """Convert a plain YOLOv8 detector, keeping the function of its backbone, neck and box branch.

    The tensors that both networks have are copied. A `C2fAttn` block is a `C2f` block with one more
    input to its last convolution, the text attention; that input starts at zero weight, so neck and
    boxes equal those of YOLOv8. Class embeddings have no counterpart and start at random.
    """
    world = WorldModel(f"yolov8{_scale(detector)}-worldv2.yaml", nc=BUILT_FOR, verbose=False)
    own, given = world.state_dict(), detector.float().state_dict()
    copied = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    for index, block in enumerate(world.model):
        if isinstance(block, C2fAttn):
            key = f"model.{index}.cv2.conv.weight"
            copied[key] = torch.zeros_like(own[key])
            copied[key][:, : given[key].shape[1]] = given[key]
    world.load_state_dict(copied, strict=False)
    return _expect_few(world)


def _is_yolov8(detector: DetectionModel) -> bool:
    """Whether a detector has the layers of a plain YOLOv8. Old checkpoints do not name it."""
    scale = _scale(detector)
    if scale is None:
        return False
    plain = DetectionModel(f"yolov8{scale}.yaml", nc=detector.model[-1].nc, verbose=False)
    found, expected = (
        {k: v.shape for k, v in model.state_dict().items()} for model in (detector, plain)
    )
    return found == expected


def _scale(detector: DetectionModel) -> str | None:
    first = detector.state_dict().get("model.0.conv.weight", torch.empty(0))
    return SCALES.get(len(first))


def _expect_few(world: WorldModel) -> WorldModel:
    """Start an untrained class head at about five objects per 640 px image, as YOLOv8 does."""
    head = world.model[-1]
    for stride, contrast in zip(head.stride, head.cv4, strict=True):
        contrast.bias.data.fill_(math.log(5 / BUILT_FOR / (640 / float(stride)) ** 2))
    return world


def set_prompts(
    model: WorldModel, classes: Sequence[str], embeddings: torch.Tensor | None, seed: int = 0
) -> PromptedWorldModel:
    """Make the model detect `classes`, by fixed embeddings (classes, 512) or learned ones (None).

    Learned prompts keep what the model has if it was trained for the same classes; otherwise they
    start as random orthonormal vectors.
    """
    learned = embeddings is None
    if embeddings is None:
        embeddings = trained_prompts(model, classes)
    if embeddings is None:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.randn(EMBEDDING, len(classes), generator=generator)
        embeddings = torch.linalg.qr(basis).Q.T
    model.__class__ = PromptedWorldModel
    del model.txt_feats
    features = embeddings.detach().clone().reshape(1, len(classes), EMBEDDING)
    model.txt_feats = nn.Parameter(features) if learned else features
    model.names = dict(enumerate(classes))
    model.nc = model.model[-1].nc = len(classes)
    model.criterion = None  # an earlier loss counts the old classes
    return model


def trained_prompts(model: WorldModel, classes: Sequence[str]) -> torch.Tensor | None:
    """The embeddings (classes, 512) that the model has of its classes; None if it lacks any."""
    known = dict(zip(model.names.values(), range(len(model.names)), strict=True))
    if model.txt_feats.shape[1] != len(known) or not all(name in known for name in classes):
        return None
    return model.txt_feats[0, [known[name] for name in classes]].float()


def text_layers(model: WorldModel) -> list[str]:
    """The layers that give a prompt its meaning, such as `12.attn`: places in `model.model`.

    By the paper a prompt is read in two places: the neck's attention (its equations 2 and 3), and
    the head, which compares it with the embedding of a region (equation 1). The comparison is
    worth no more than its two sides, so the branch that embeds regions in CLIP's space, `cv3`,
    belongs to it: trained on the words of a few classes, it forgets where all others lie.
    """
    names = []
    for index, layer in enumerate(model.model):
        if isinstance(layer, C2fAttn):
            names.append(f"{index}.attn")
        elif isinstance(layer, ImagePoolingAttn):  # of YOLO-World v1
            names.append(str(index))
        elif isinstance(layer, WorldDetect):
            names += [f"{index}.cv3", f"{index}.cv4"]
    return names


def has_trained_text(model: WorldModel) -> bool:
    """Whether prompts ever had a meaning: not in a network that begins at random or as YOLOv8."""
    return any(contrast.logit_scale.item() != LOGIT_SCALE for contrast in model.model[-1].cv4)


def plain(model: WorldModel) -> WorldModel:
    """Turn a trained model into a plain `WorldModel`, which needs nothing of this package."""
    features = model.txt_feats.detach().clone()
    del model.txt_feats
    model.txt_feats = features
    model.__class__ = WorldModel
    return model


def save_checkpoint(model: WorldModel, path: Path) -> None:
    """Write an Ultralytics checkpoint that training can start from."""
    with atomic_path(path) as temporary:
        torch.save({"model": model, "train_args": {}}, temporary)


def finish_checkpoint(training: Path, path: Path) -> WorldModel:
    """Make of a training checkpoint one for detection, which loads without this package.

    Returns its model.
    """
    with atomic_path(path) as temporary:
        with quiet():
            checkpoint = strip_optimizer(training, temporary)
        checkpoint["model"] = plain(checkpoint["model"])
        torch.save(checkpoint, temporary)
    return checkpoint["model"]


def save_safetensors(model: WorldModel, path: Path, image_size: int) -> None:
    """Write a trained model in half precision, without pickles."""
    state = {**model.state_dict(), "txt_feats": model.txt_feats.detach()}
    state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    metadata = {
        "architecture": _yaml_name(model),
        "classes": json.dumps(list(model.names.values())),
        "image_size": str(image_size),
    }
    tensors.write(path, state, metadata)


class Detector:
    """A trained network that finds boxes in images.

    `image_size` is the longest side the network sees, in pixels (None: what it was trained with),
    rounded to a multiple of its stride, 32. It looks at each image at the given `scales` of that
    size and, with `flip`, at its mirror image too: what it finds again and again is more probably
    a defect. The model is taken over: its normalisation layers are fused into the convolutions.
    """

    def __init__(
        self,
        model: WorldModel,
        image_size: int | None,
        device: torch.device,
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> None:
        self.classes: tuple[str, ...] = tuple(model.names.values())
        trained_with = dict(getattr(model, "args", {})).get("imgsz", 640)
        self.image_size = image_size or int(trained_with)
        self.scales = scales
        self.flip = flip
        self.device = device
        self._model = model.float().fuse(verbose=False).eval().to(device)
        self._stride = int(max(model.stride))

    def detect(self, image: np.ndarray, min_score: float, max_boxes: int) -> sv.Detections:
        """Boxes in an image, (height, width, 3) uint8 BGR, best first, in pixels of that image.

        `min_score` and `max_boxes` are those of each look, and the second also of all together.
        """
        found = [self._look(image, scale, min_score, max_boxes) for scale in self.scales]
        if self.flip:
            mirror = np.ascontiguousarray(image[:, ::-1])
            for scale in self.scales:
                boxes = self._look(mirror, scale, min_score, max_boxes)
                boxes.xyxy[:, [0, 2]] = image.shape[1] - boxes.xyxy[:, [2, 0]]
                found.append(boxes)
        return cast(sv.Detections, joined(found)[:max_boxes])

    @torch.inference_mode()
    def _look(
        self, image: np.ndarray, scale: float, min_score: float, max_boxes: int
    ) -> sv.Detections:
        longest = max(1, round(self.image_size * scale / self._stride)) * self._stride
        letterbox = LetterBox(longest, auto=True, stride=self._stride)
        resized = letterbox(image=image)[..., ::-1].transpose(2, 0, 1)
        batch = torch.from_numpy(np.ascontiguousarray(resized)).to(self.device).float()[None] / 255
        found = non_max_suppression(
            self._model(batch),
            min_score,
            iou_thres=NMS_IOU,
            max_det=max_boxes,
            nc=len(self.classes),
        )[0]
        found[:, :4] = scale_boxes(batch.shape[2:], found[:, :4], image.shape)
        boxes, scores, classes = found.cpu().split([4, 1, 1], dim=1)
        return sv.Detections(
            xyxy=boxes.numpy(),
            confidence=scores.numpy().ravel(),
            class_id=classes.numpy().ravel().astype(int),
        )


def joined(found: Sequence[sv.Detections]) -> sv.Detections:
    """What was found at each of several looks at one image, best first.

    Boxes of one class that overlap one with a higher score, as in non-maximum suppression, say the
    same as that one. Its new score is the mean over all looks, where one that has not found it
    counts 0 (as in Weighted Boxes Fusion, Solovyev et al. 2021, arXiv 1910.13302).
    """
    boxes = sv.Detections.merge(list(found))
    if len(found) == 1 or not len(boxes):
        return boxes
    scores, classes = np.asarray(boxes.confidence), np.asarray(boxes.class_id)
    look = np.repeat(np.arange(len(found)), [len(its) for its in found])
    overlap = sv.box_iou_batch(boxes.xyxy, boxes.xyxy) > NMS_IOU
    left = np.ones(len(boxes), bool)
    kept: list[int] = []
    means: list[float] = []
    for i in np.argsort(-scores, kind="stable"):
        if left[i]:
            same = left & overlap[i] & (classes == classes[i])
            best = [scores[same & (look == k)].max(initial=0) for k in range(len(found))]
            kept.append(int(i))
            means.append(float(np.mean(best)))
            left &= ~same
    order = np.argsort(-np.array(means), kind="stable")
    chosen = cast(sv.Detections, boxes[np.array(kept)[order]])
    chosen.confidence = np.array(means, np.float32)[order]
    return chosen


def _read_safetensors(path: Path) -> WorldModel:
    halves, metadata = tensors.read(path, "safetensors")
    state = {key: value.float() for key, value in halves.items()}
    architecture = metadata.get("architecture", "none")
    if not SCRATCH.fullmatch(architecture):
        raise UserError(f"{path}: expected YOLO-World weights, found those of {architecture}")
    model = WorldModel(architecture, nc=BUILT_FOR, verbose=False)
    model.txt_feats = state.pop("txt_feats")
    model.load_state_dict(state)
    model.names = dict(enumerate(json.loads(metadata["classes"])))
    model.nc = model.model[-1].nc = len(model.names)
    model.args = {"imgsz": int(metadata["image_size"])}
    return model


def _yaml_name(model: nn.Module) -> str:
    return Path(str(getattr(model, "yaml", {}).get("yaml_file", "unknown"))).name
