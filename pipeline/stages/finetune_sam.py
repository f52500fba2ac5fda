"""Fine-tune a SAM on a dataset's boxes and masks.

Output folder: sam.safetensors (best on the val split), last.pt (to resume), results.csv,
curves.png, config.yaml, run.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import cv2
import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from segment_anything.modeling import Sam
from torch.nn import functional as F

from pipeline import record
from pipeline.config import FinetuneSamConfig
from pipeline.data import masks
from pipeline.data.augment import vary_light
from pipeline.data.dataset import Dataset, Sample
from pipeline.errors import UserError
from pipeline.models import lora, prompting, sam_lite, training
from pipeline.models import sam as sams
from pipeline.models.device import has_fast_bfloat16, torch_device
from pipeline.models.embedding_cache import CachedEncoder
from pipeline.models.segmenter import Segmenter

WEIGHT_DECAY = 1e-4
WARM_UP = 0.05  # part of all steps over which the learning rate rises
ENCODER_LR = 0.3  # of the decoder's learning rate: its features are already good
WINDOW_JITTER = 0.15  # shift and scale of the window in training, part of the box's side
FOCAL_WEIGHT = 20.0  # of the focal loss against Dice, as SAM was trained
COMMAND = "finetune-sam"
BEST = "sam.safetensors"


@dataclass(frozen=True)
class Instance:
    """One true defect: its image and its index among the image's true instances."""

    sample: Sample
    index: int

    @property
    def box(self) -> np.ndarray:
        return np.asarray(self.sample.truth.xyxy[self.index])

    @property
    def mask(self) -> np.ndarray:
        assert self.sample.truth.mask is not None
        return np.asarray(self.sample.truth.mask[self.index])


@dataclass(frozen=True)
class Example:
    """What the network is shown of an instance."""

    image: torch.Tensor  # (3, size, size): the encoder's input, normalised and padded
    box: np.ndarray  # (4,) in the frame of the encoder's input
    mask: np.ndarray  # (height, width) bool: the window in the image's own resolution
    input_size: tuple[int, int]  # (height, width) of the window in the encoder's input


def run(config: FinetuneSamConfig) -> None:
    dataset = Dataset(config.data)
    train = _instances(dataset.split("train", config.fold))
    val = _instances(dataset.split("val", config.fold))
    if not train:
        raise UserError(f"--data: expected defects in {config.data}'s train split, found none")
    device = torch_device(config.device)
    last = config.out / "last.pt"
    if config.resume and not last.is_file():
        raise UserError(f"--resume: expected a checkpoint at {last}, found none")
    torch.manual_seed(config.seed)  # sam-lite-imagenet has a decoder of random weights
    loaded = sams.load_sam(config.model, offline=config.offline)
    if config.train == "lora":
        lora.add_lora(loaded.model)
    if not config.resume:
        record.claim(config.out, config.force)
        record.write_config(config.out, COMMAND, config)
    loaded.model.to(device)
    fit(loaded, train, val, config)
    record.write_record(config.out, COMMAND, config)
    print(f"segmenter: {config.out / BEST}")


def _instances(samples: list[Sample]) -> list[Instance]:
    return [Instance(s, i) for s in samples for i in range(len(s.annotations))]


def fit(
    loaded: sams.LoadedSam, train: list[Instance], val: list[Instance], config: FinetuneSamConfig
) -> None:
    """Train until `epochs` or `patience` are used up. Without validation defects, to the end."""
    sam = loaded.model
    trained = _trained_parameters(sam, config)
    optimizer = torch.optim.AdamW(trained, weight_decay=WEIGHT_DECAY)
    batches = -(-len(train) * config.repeats // config.batch)
    schedule = partial(_learning_rate, steps=config.epochs * batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    signature = record.signature(COMMAND, config)
    rows: training.Rows = []
    if config.resume:
        rows = training.restore_state(config.out / "last.pt", signature, sam, optimizer, scheduler)
    sam.eval()
    cache = _cached_embeddings(sam, train, config) if config.train == "decoder" else None
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=config.epochs * batches, completed=len(rows) * batches)
        while len(rows) < config.epochs and _since_best(rows) < config.patience:
            epoch = len(rows) + 1
            _train_mode(sam)
            losses = []
            for copies in _batches(len(train) * config.repeats, config, epoch):
                examples = [_training_example(sam, train, config, epoch, i) for i in copies]
                loss = _loss(sam, examples, None if cache is None else cache[copies], config)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_([p for g in trained for p in g["params"]], 1.0)
                optimizer.step()
                scheduler.step()
                losses.append(loss.item())
                text = f"epoch {epoch}/{config.epochs} loss {np.mean(losses):.3f}"
                progress.update(bar, advance=1, description=text)
            mean_loss = float(np.mean(losses))
            if not math.isfinite(mean_loss):
                raise UserError(
                    f"--lr: expected a lower one than {config.lr:g}, found that the loss is not "
                    f"finite in epoch {epoch}"
                )
            val_iou = mean_iou(loaded, val, config.zoom)
            rows.append({"epoch": epoch, "train_loss": mean_loss, "val_iou": val_iou})
            if _since_best(rows) == 0:
                best_sam = lora.merged(sam) if config.train == "lora" else sam
                sams.save_sam(config.out / BEST, best_sam, loaded.architecture, config.zoom)
            training.write_results(config.out / "results.csv", rows)
            training.save_state(config.out / "last.pt", signature, sam, optimizer, scheduler, rows)
            progress.console.print(f"{text}  val mean IoU {val_iou:.3f}")
    best = rows[_best(rows)]["epoch"]
    panels = (("train_loss",), ("val_iou",))
    training.plot_curves(config.out / "curves.png", rows, panels, best)


def _batches(count: int, config: FinetuneSamConfig, epoch: int) -> list[np.ndarray]:
    """Shuffled copies of the instances: copy `i` is of instance `i // repeats`."""
    order = np.random.default_rng([config.seed, epoch]).permutation(count)
    return np.array_split(order, -(-count // config.batch))


def _cached_embeddings(sam: Sam, train: list[Instance], config: FinetuneSamConfig) -> np.ndarray:
    """The frozen encoder's output for every copy, (n, dim, h, w) float16, in a file of the run."""
    encoder = sam.image_encoder
    if config.cache is not None:
        encoder = CachedEncoder(encoder, config.cache, config.cache_gb)
    path = config.out / "embeddings.tmp"
    cache: np.ndarray | None = None
    for i in track(range(len(train) * config.repeats), description="encoding"):
        image = _training_example(sam, train, config, 0, i).image
        with torch.inference_mode(), _fast(sam):
            embedding = encoder(image[None])[0].float().cpu().numpy()
        if cache is None:
            shape = (len(train) * config.repeats, *embedding.shape)
            cache = np.memmap(path, np.float16, "w+", shape=shape)
            path.unlink()  # the file goes with the process, however it ends
        cache[i] = embedding
    assert cache is not None
    return cache


def _training_example(
    sam: Sam, train: list[Instance], config: FinetuneSamConfig, epoch: int, copy: int
) -> Example:
    """A varied view of an instance: window, mirroring, light; and its box, each side moved a bit.

    The view changes from epoch to epoch, except with a frozen encoder, whose output is cached.
    """
    instance = train[copy // config.repeats]
    view = np.random.default_rng([config.seed, copy, 0 if config.train == "decoder" else epoch])
    example = make_example(sam, instance, config.zoom, view)
    shift = np.random.default_rng([config.seed, copy, epoch, 1]).uniform(-1, 1, 4)
    size = np.tile(example.box[2:] - example.box[:2], 2)
    return replace(example, box=example.box + config.box_jitter * shift * size)


def make_example(sam: Sam, instance: Instance, zoom: float, rng: np.random.Generator) -> Example:
    """Cut a window around an instance, vary it, and bring image, box and mask into SAM's frame."""
    image, mask, box = _image(instance.sample), instance.mask, instance.box
    side = (box[2:] - box[:2]).max()
    centre = (box[:2] + box[2:]) / 2 + rng.uniform(-1, 1, 2) * WINDOW_JITTER * side
    around = np.hstack([centre - side / 2, centre + side / 2])
    scale = rng.uniform(1 - WINDOW_JITTER, 1 + 2 * WINDOW_JITTER)
    window = prompting.window_around(around, mask.shape, zoom * scale)
    x1, y1, x2, y2 = window
    image, mask = image[y1:y2, x1:x2], mask[y1:y2, x1:x2]
    box = np.clip(box - [x1, y1, x1, y1], 0, [x2 - x1, y2 - y1] * 2)
    image, mask, box = _mirrored(image, mask, box, rng)
    image = vary_light(np.ascontiguousarray(image), rng)
    height, width = mask.shape
    tensor, size = prompting.encoder_input(sam, image, (0, 0, width, height))
    box = prompting.to_input_frame(box.reshape(2, 2), (0, 0, width, height), size).ravel()
    return Example(tensor, box, np.ascontiguousarray(mask), size)


@lru_cache(maxsize=64)  # decoding takes longer than everything else that makes an example
def _image(sample: Sample) -> np.ndarray:
    return sample.image()


def _mirrored(
    image: np.ndarray, mask: np.ndarray, box: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One of the eight mirrorings and quarter turns of a picture, its mask and its box."""
    transpose, flip_x, flip_y = rng.integers(0, 2, 3)
    if transpose:
        image, mask, box = image.swapaxes(0, 1), mask.T, box[[1, 0, 3, 2]]
    height, width = mask.shape
    if flip_x:
        image, mask = image[:, ::-1], mask[:, ::-1]
        box = np.array([width - box[2], box[1], width - box[0], box[3]])
    if flip_y:
        image, mask = image[::-1], mask[::-1]
        box = np.array([box[0], height - box[3], box[2], height - box[1]])
    return image, mask, box


def _loss(
    sam: Sam, examples: list[Example], cached: np.ndarray | None, config: FinetuneSamConfig
) -> torch.Tensor:
    """Dice plus BCE or focal loss of the masks, and the error of the predicted IoU."""
    device = sam.device
    with _fast(sam):
        if cached is None:
            embeddings = sam.image_encoder(torch.stack([e.image for e in examples]))
        else:
            embeddings = torch.from_numpy(cached).to(device)
        embeddings = embeddings.float()
    boxes = torch.from_numpy(np.stack([e.box for e in examples])).float().to(device)
    sparse, dense = prompting.encode_prompts(sam, boxes, "boxes")
    logits, predicted_iou = prompting.decode(sam, embeddings, sparse, dense)
    targets = [_target(e, logits.shape[-1] / sam.image_encoder.img_size) for e in examples]
    total = torch.zeros((), device=device)
    for mask_logits, iou, target in zip(logits[:, 0], predicted_iou[:, 0], targets, strict=True):
        target = target.to(device)
        x = mask_logits[: target.shape[0], : target.shape[1]]  # the rest is padding
        total = total + _mask_loss(x, target, config.loss)
        with torch.no_grad():
            found, true = x > sam.mask_threshold, target >= 0.5
            true_iou = (found & true).sum() / (found | true).sum().clamp(min=1)
        total = total + (iou - true_iou).square()
    return total / len(examples)


def _target(example: Example, scale: float) -> torch.Tensor:
    """The mask at the decoder's resolution: how much of each cell is defect."""
    height, width = (max(1, round(side * scale)) for side in example.input_size)
    mask = example.mask.astype(np.float32)
    shrinks = mask.shape[0] > height
    return torch.from_numpy(
        cv2.resize(
            mask, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        )
    )


def _mask_loss(logits: torch.Tensor, target: torch.Tensor, kind: str) -> torch.Tensor:
    """Dice (Milletari et al., arXiv 1606.04797) plus BCE or focal loss (Lin et al., 1708.02002)."""
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * target).sum() + 1) / (probability.sum() + target.sum() + 1)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if kind == "focal":
        bce = bce * (probability - target).abs() ** 2
        return dice + FOCAL_WEIGHT * bce.mean()
    return dice + bce.mean()


def _fast(sam: Sam) -> torch.autocast:
    """Mixed precision where the encoder gains by it; the depthwise convolutions of a CPU do not."""
    kind = sam.device.type
    gains = kind != "cpu" or not isinstance(sam.image_encoder, sam_lite.LiteEncoder)
    return torch.autocast(kind, torch.bfloat16, enabled=gains and has_fast_bfloat16(kind))


def mean_iou(loaded: sams.LoadedSam, instances: list[Instance], zoom: float) -> float:
    """Mean IoU of the masks that the true boxes give; nan without instances."""
    segmenter = Segmenter(loaded, zoom, loaded.model.device)
    scores = []
    for sample in dict.fromkeys(instance.sample for instance in instances):
        found = segmenter.segment(sample.image(), sample.truth)
        pairs = zip(np.asarray(found.mask), np.asarray(sample.truth.mask), strict=True)
        scores += [masks.iou(mask, truth) for mask, truth in pairs]
    return float(np.mean(scores)) if scores else math.nan


def _best(rows: training.Rows) -> int:
    """Index of the row with the highest validation IoU; the last one where there is none."""
    scores = [row["val_iou"] for row in rows]
    return len(rows) - 1 if math.isnan(scores[-1]) else int(np.argmax(scores))


def _since_best(rows: training.Rows) -> int:
    return len(rows) - 1 - _best(rows) if rows else 0


def _train_mode(sam: Sam) -> None:
    """Train, but keep BatchNorm's statistics: batches are small, and inference uses them."""
    sam.train()
    for module in sam.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()


def _trained_parameters(sam: Sam, config: FinetuneSamConfig) -> list[dict[str, Any]]:
    """Freeze what is not trained; the rest as groups with their learning rates."""
    sam.requires_grad_(False)
    groups: list[dict[str, Any]] = [
        {"params": list(sam.mask_decoder.parameters()), "lr": config.lr}
    ]
    if config.train == "neck":
        groups.append({"params": list(sam.image_encoder.neck.parameters()), "lr": config.lr})
    if config.train == "lora":
        groups.append({"params": lora.lora_parameters(sam), "lr": config.lr})
    if config.train == "all":
        groups.append({"params": list(sam.prompt_encoder.parameters()), "lr": config.lr})
        encoder = list(sam.image_encoder.parameters())
        groups.append({"params": encoder, "lr": config.lr * ENCODER_LR})
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    if isinstance(sam.image_encoder, sam_lite.LiteEncoder):
        for parameter in sam.image_encoder.general_parameters():
            parameter.requires_grad_(False)
    return groups


def _learning_rate(step: int, steps: int) -> float:
    """Part of the peak rate: a linear rise, then half a cosine."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
