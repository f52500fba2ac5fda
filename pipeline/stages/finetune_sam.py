"""Fine-tune a SAM on a dataset's boxes and masks.

What is kept is a moving average of the weights over the last steps: with a handful of validation
defects, choosing an epoch by them is choosing by chance. They calibrate the predicted IoU instead.

Output folder: sam.safetensors, last.pt (to resume), results.csv, curves.png, config.yaml, run.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import supervision as sv
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from segment_anything.modeling import Sam
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline import record
from pipeline.config import FinetuneSamConfig
from pipeline.data import loggers, masks, quality
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.loggers import Log
from pipeline.data.quality import Calibration
from pipeline.errors import UserError
from pipeline.models import lora, prompting, sam_lite, training
from pipeline.models import sam as sams
from pipeline.models.device import has_fast_bfloat16, torch_device
from pipeline.models.embedding_cache import CachedEncoder
from pipeline.models.sam_examples import (
    Example,
    Instance,
    instances,
    jittered,
    make_decoy,
    make_example,
)
from pipeline.models.segmenter import Segmenter

WEIGHT_DECAY = 1e-4
WARM_UP = 0.05  # part of all steps over which the learning rate rises
ENCODER_LR = 0.3  # of the decoder's learning rate: its features are already good
FOCAL_WEIGHT = 20.0  # of the focal loss against Dice, as SAM was trained
EDGE_WEIGHT = 5.0  # of a pixel in a mask's edge, beside 1 for every pixel
EDGE_REACH = 16  # an edge reaches one part in so many of the window's side to either side
AVERAGE = 0.98  # share of the averaged weights that a step keeps: of about the last 50
PROMPTS = {"boxes": 0.8, "boxes+points": 0.1, "points": 0.1}  # and how often each is shown
DECOYS = 0.15  # part of the examples without a defect: the place of one in a good picture
SECOND_PASS = 0.25  # part of the steps with one
CALIBRATION_DRAWS = 5  # boxes of each validation defect
COMMAND = "finetune-sam"
BEST = "sam.safetensors"


@dataclass(frozen=True)
class TrainingSet:
    """What there is to learn from."""

    defects: list[Instance]
    good: list[Sample]  # images without a defect


def run(config: FinetuneSamConfig) -> None:
    loggers.require(config)
    datasets = [Dataset(folder) for folder in config.data]
    seen, val = (
        [sample for dataset in datasets for sample in dataset.split(split, config.fold)]
        for split in ("train", "val")
    )
    train = TrainingSet(instances(seen), [sample for sample in seen if not sample.annotations])
    if not train.defects:
        folders = ", ".join(map(str, config.data))
        raise UserError(f"--data: expected defects in the train split of {folders}, found none")
    device = torch_device(config.device)
    last = config.out / "last.pt"
    if config.resume and not last.is_file():
        raise UserError(f"--resume: expected a checkpoint at {last}, found none")
    torch.manual_seed(config.seed)  # sam-lite-imagenet has a decoder of random weights
    loaded = sams.load_sam(config.model, offline=config.offline)
    if config.train == "lora":
        lora.add_lora(loaded.model)
    if not config.resume:
        record.claim(COMMAND, config)
        record.write_config(config.out, COMMAND, config)
        (config.out / BEST).unlink(missing_ok=True)  # of an earlier run
    loaded.model.to(device)
    val = [sample for sample in val if sample.annotations]
    with loggers.opened(config, resumed=config.resume) as log:
        tuned = fit(loaded, train, val, config, log)
        log.pictures(config.out)
    tuned = replace(tuned, calibration=_calibration(tuned, val, config))
    sams.save_sam(config.out / BEST, tuned)
    record.write_record(config.out, COMMAND, config)
    print(f"segmenter: {config.out / BEST}")


def fit(
    loaded: sams.LoadedSam,
    train: TrainingSet,
    val: list[Sample],
    config: FinetuneSamConfig,
    log: Log,
) -> sams.LoadedSam:
    """Train for `epochs`; returns the averaged SAM. The validation IoU is only reported."""
    sam = loaded.model
    trained = _trained_parameters(sam, config)
    optimizer = torch.optim.AdamW(trained, weight_decay=WEIGHT_DECAY)
    copies_per_epoch = len(train.defects) * config.repeats
    batches = -(-copies_per_epoch // config.batch)
    schedule = partial(_learning_rate, steps=config.epochs * batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    averaged = AveragedModel(sam, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    both = torch.nn.ModuleDict({"live": sam, "averaged": averaged})
    signature = record.signature(COMMAND, config)
    rows: training.Rows = []
    if config.resume:
        rows = training.restore_state(config.out / "last.pt", signature, both, optimizer, scheduler)
    sam.eval()
    cache = _cached_embeddings(sam, train, config) if config.train == "decoder" else None
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=config.epochs * batches, completed=len(rows) * batches)
        while len(rows) < config.epochs:
            epoch = len(rows) + 1
            _train_mode(sam)
            losses = []
            for step, copies in enumerate(_batches(copies_per_epoch, config, epoch)):
                examples = [_training_example(sam, train, config, epoch, i) for i in copies]
                rng = np.random.default_rng([config.seed, epoch, step, 2])
                loss = _loss(sam, examples, None if cache is None else cache[copies], config, rng)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_([p for g in trained for p in g["params"]], 1.0)
                optimizer.step()
                scheduler.step()
                averaged.update_parameters(sam)
                losses.append(loss.item())
                text = f"epoch {epoch}/{config.epochs} loss {np.mean(losses):.3f}"
                progress.update(bar, advance=1, description=text)
            mean_loss = float(np.mean(losses))
            if not math.isfinite(mean_loss):
                raise UserError(
                    f"--lr: expected a lower one than {config.lr:g}, found that the loss is not "
                    f"finite in epoch {epoch}"
                )
            val_iou = mean_iou(replace(loaded, model=averaged.module), val, config.zoom)
            rows.append({"epoch": epoch, "train_loss": mean_loss, "val_iou": val_iou})
            training.write_results(config.out / "results.csv", rows)
            training.save_state(config.out / "last.pt", signature, both, optimizer, scheduler, rows)
            log.metrics(rows[-1], epoch)
            progress.console.print(f"{text}  val mean IoU {val_iou:.3f}")
    training.plot_curves(config.out / "curves.png", rows, (("train_loss",), ("val_iou",)))
    tuned = lora.merged(averaged.module) if config.train == "lora" else averaged.module
    return replace(loaded, model=tuned.eval(), zoom=config.zoom, calibration=sams.AS_PREDICTED)


def _batches(count: int, config: FinetuneSamConfig, epoch: int) -> list[np.ndarray]:
    """Shuffled copies of the instances: copy `i` is of instance `i // repeats`."""
    order = np.random.default_rng([config.seed, epoch]).permutation(count)
    return np.array_split(order, -(-count // config.batch))


def _cached_embeddings(sam: Sam, train: TrainingSet, config: FinetuneSamConfig) -> np.ndarray:
    """The frozen encoder's output for every copy, (n, dim, h, w) float16, in a file of the run."""
    count = len(train.defects) * config.repeats
    encoder = sam.image_encoder
    if config.cache is not None:
        encoder = CachedEncoder(encoder, config.cache, config.cache_gb)
    path = config.out / "embeddings.tmp"
    cache: np.ndarray | None = None
    for i in track(range(count), description="encoding"):
        image = _training_example(sam, train, config, 0, i).image
        with torch.inference_mode(), _fast(sam):
            embedding = encoder(image[None])[0].float().cpu().numpy()
        if cache is None:
            shape = (count, *embedding.shape)
            cache = np.memmap(path, np.float16, "w+", shape=shape)
            path.unlink()  # the file goes with the process, however it ends
        cache[i] = embedding
    assert cache is not None
    return cache


def _training_example(
    sam: Sam, train: TrainingSet, config: FinetuneSamConfig, epoch: int, copy: int
) -> Example:
    """A varied view of an instance, or of a place without one; and its box, moved a bit.

    The view changes from epoch to epoch, except with a frozen encoder, whose output is cached.
    """
    instance = train.defects[copy // config.repeats]
    view = np.random.default_rng([config.seed, copy, 0 if config.train == "decoder" else epoch])
    size = instance.sample.width, instance.sample.height
    good = [sample for sample in train.good if (sample.width, sample.height) == size]
    if good and view.uniform() < DECOYS:
        place = good[view.integers(len(good))]
        example = make_decoy(sam, place, instance, config.zoom, config.free_pose, view)
    else:
        example = make_example(sam, instance, config.zoom, config.free_pose, view)
    rng = np.random.default_rng([config.seed, copy, epoch, 1])
    return replace(example, box=jittered(example.box, config.box_jitter, rng))


def _loss(
    sam: Sam,
    examples: list[Example],
    cached: np.ndarray | None,
    config: FinetuneSamConfig,
    rng: np.random.Generator,
) -> torch.Tensor:
    """The loss of the masks that one kind of prompt gives; now and then also of a second pass.

    As SAM was trained, a second pass is shown the mask of the first beside the box.
    """
    device = sam.device
    with _fast(sam):
        if cached is None:
            embeddings = sam.image_encoder(torch.stack([e.image for e in examples]))
        else:
            embeddings = torch.from_numpy(cached).to(device)
        embeddings = embeddings.float()
    boxes = torch.from_numpy(np.stack([e.box for e in examples])).float().to(device)
    prompt = rng.choice(list(PROMPTS), p=list(PROMPTS.values()))
    points = torch.stack([_point(e, rng) for e in examples]).to(device)
    prompts = prompting.encode_prompts(sam, boxes, prompt, points)
    logits, iou = prompting.decode(sam, embeddings, *prompts)
    loss = _decoded_loss(sam, examples, logits, iou, config)
    if rng.uniform() < SECOND_PASS:
        prompts = prompting.encode_prompts(sam, boxes, "boxes+masks", masks=logits.detach())
        logits, iou = prompting.decode(sam, embeddings, *prompts)
        loss = (loss + _decoded_loss(sam, examples, logits, iou, config)) / 2
    return loss


def _point(example: Example, rng: np.random.Generator) -> torch.Tensor:
    """A pixel of the mask as a foreground point: (1, 3) x, y and label in the input frame.

    Where there is no mask, the centre of the box.
    """
    rows, columns = np.nonzero(example.mask)
    if len(rows) == 0:
        x, y = (example.box[:2] + example.box[2:]) / 2
        return torch.tensor([[x, y, 1.0]])
    i = rng.integers(len(rows))
    scale = example.input_size[1] / example.mask.shape[1]
    return torch.tensor([[(columns[i] + 0.5) * scale, (rows[i] + 0.5) * scale, 1.0]])


def _decoded_loss(
    sam: Sam,
    examples: list[Example],
    logits: torch.Tensor,
    predicted_iou: torch.Tensor,
    config: FinetuneSamConfig,
) -> torch.Tensor:
    """Dice plus BCE or focal loss of the masks, and the error of the predicted IoU.

    Where there is no defect, the predicted IoU alone: it should be 0.
    """
    device = logits.device
    targets = [_target(e, logits.shape[-1] / sam.image_encoder.img_size) for e in examples]
    total = torch.zeros((), device=device)
    for mask_logits, iou, target in zip(logits[:, 0], predicted_iou[:, 0], targets, strict=True):
        target = target.to(device)
        x = mask_logits[: target.shape[0], : target.shape[1]]  # the rest is padding
        if target.any():
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
    """Dice (Milletari et al., arXiv 1606.04797) plus BCE or focal loss (Lin et al., 1708.02002).

    Pixels near an edge weigh more, as in F3Net (Wei et al., AAAI 2020, arXiv 1911.11445).
    """
    reach = 2 * (max(target.shape) // EDGE_REACH) + 1
    smooth = F.avg_pool2d(target[None], reach, 1, reach // 2, count_include_pad=False)[0]
    weight = 1 + EDGE_WEIGHT * (smooth - target).abs()
    probability = logits.sigmoid()
    both, sum_ = (weight * probability * target).sum(), (weight * (probability + target)).sum()
    dice = 1 - (2 * both + 1) / (sum_ + 1)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if kind == "focal":
        bce = FOCAL_WEIGHT * bce * (probability - target).abs() ** 2
    return dice + (weight * bce).sum() / weight.sum()


def _fast(sam: Sam) -> torch.autocast:
    """Mixed precision for the encoder, where that is faster."""
    kind = sam.device.type
    return torch.autocast(kind, torch.bfloat16, enabled=has_fast_bfloat16(kind))


def mean_iou(loaded: sams.LoadedSam, samples: list[Sample], zoom: float) -> float:
    """Mean IoU of the masks that the true boxes give; nan without any."""
    _, true = _predicted_and_true_iou(loaded, samples, zoom, [s.truth for s in samples])
    return float(true.mean()) if len(true) else math.nan


def _predicted_and_true_iou(
    loaded: sams.LoadedSam, samples: list[Sample], zoom: float, prompts: list[sv.Detections]
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) IoU estimates and (n,) IoUs of the masks that boxes of the true instances give."""
    segmenter = Segmenter(loaded, zoom, loaded.model.device)
    predicted, true = [], []
    for sample, boxes in zip(samples, prompts, strict=True):
        found = segmenter.segment(sample.image(), boxes)
        pairs = zip(np.asarray(found.mask), np.asarray(sample.truth.mask), strict=True)
        predicted += np.asarray(found.data["quality"]).tolist()
        true += [masks.iou(mask, truth) for mask, truth in pairs]
    return np.array(predicted), np.array(true)


def _calibration(
    loaded: sams.LoadedSam, samples: list[Sample], config: FinetuneSamConfig
) -> Calibration:
    """What brings predicted IoUs close to the true ones, on the validation defects."""
    predicted, true = [], []
    for draw in range(CALIBRATION_DRAWS):
        rng = np.random.default_rng([config.seed, draw, 3])
        prompts = []
        for sample in samples:
            boxes = [jittered(box, config.box_jitter, rng) for box in sample.truth.xyxy]
            prompts.append(
                sv.Detections(xyxy=np.array(boxes, np.float32), class_id=sample.truth.class_id)
            )
        some_predicted, some_true = _predicted_and_true_iou(loaded, samples, config.zoom, prompts)
        predicted.append(some_predicted)
        true.append(some_true)
    return quality.fit(np.concatenate(predicted), np.concatenate(true))


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
