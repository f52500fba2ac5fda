"""Train the image-classifier baseline: which of `good` and the defects is this image?

Output folder:

    best.safetensors      the epoch with the lowest validation loss
    last.pt               the state that --resume goes on from
    results.csv curves.png
    predictions.json      probabilities of the validation and test images, by the best epoch
    accuracy.json         accuracy and balanced accuracy of each split, by the best epoch
    config.yaml run.json  the latter also with the seconds that a prediction took, with reading the
                          image
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2

from pipeline import record
from pipeline.config import FinetuneClassifierConfig
from pipeline.data import balance, classification, loggers
from pipeline.data.classification import Classified
from pipeline.data.dataset import GOOD, Dataset, Sample, learned_classes
from pipeline.data.loggers import Log
from pipeline.errors import UserError
from pipeline.models import classifier, training
from pipeline.models.classifier import Classifier
from pipeline.models.device import torch_device

COMMAND = "finetune-classifier"


@dataclass(frozen=True)
class Split:
    """A split in memory: decoded and resized once, so that epochs are fast."""

    samples: list[Sample]
    images: torch.Tensor  # (n, 3, size, size) uint8 RGB
    labels: torch.Tensor  # (n,) int64: 0 is good, then the dataset's classes
    seconds: float  # that reading it took


def run(config: FinetuneClassifierConfig) -> None:
    loggers.require(config)
    dataset = Dataset(config.data)
    samples = {name: dataset.split(name, config.fold) for name in ("train", "val", "test")}
    empty = [name for name in ("train", "val") if not samples[name]]
    if empty:
        raise UserError(
            *(f"--data: expected images in {config.data}'s {n} split, found none" for n in empty)
        )
    learned = learned_classes(samples["train"], dataset.classes)
    if unseen := [name for name in dataset.classes if name not in learned]:
        print(f"not learned, for the training images show none: {', '.join(unseen)}")
    last = config.out / "last.pt"
    if config.resume and not last.is_file():
        raise UserError(f"--resume: expected a checkpoint at {last}, found none")
    device = torch_device(config.device)
    model = _model(config, (GOOD, *dataset.classes)).to(device)
    splits = {name: _in_memory(split, config.image_size) for name, split in samples.items()}
    if not config.resume:
        record.claim(COMMAND, config)
        record.write_config(config.out, COMMAND, config)
    with loggers.opened(config, resumed=config.resume) as log:
        train(model, splits["train"], splits["val"], config, log)
        best = classifier.load(config.out / "best.safetensors").to(device)
        seconds = report(best, splits, config, log)
        log.pictures(config.out)
    record.write_record(config.out, COMMAND, config, seconds_per_image=round(seconds, 6))


def _model(config: FinetuneClassifierConfig, classes: tuple[str, ...]) -> Classifier:
    torch.manual_seed(config.seed)
    if config.pretrained:
        model = classifier.pretrained(
            config.model, classes, config.image_size, offline=config.offline
        )
    else:
        model = Classifier(config.model, classes, config.image_size)
    if config.unfreeze:
        model.train_only(config.unfreeze)
    return model


def _in_memory(samples: list[Sample], size: int) -> Split:
    started = time.monotonic()
    images = [classifier.resized(sample.image(), size) for sample in samples]
    seconds = time.monotonic() - started
    return Split(
        samples,
        torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8),
        torch.tensor([sample.label + 1 for sample in samples], dtype=torch.int64),
        seconds,
    )


def train(
    model: Classifier,
    seen: Split,
    validation: Split,
    config: FinetuneClassifierConfig,
    log: Log,
) -> None:
    """Train until `epochs` or `patience` are used up; checkpoints and curves go to `config.out`."""
    optimizer = _optimizer(model, config)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    augment = _augmentation(config)
    weights, val_weights = _class_weights(seen, validation, len(model.classes), config.balance)
    last, signature = config.out / "last.pt", record.signature(COMMAND, config)
    rows: training.Rows = []
    if config.resume:
        rows = training.restore_state(last, signature, model, optimizer, scheduler)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=config.epochs, completed=len(rows))
        while len(rows) < config.epochs and _since_best(rows) < config.patience:
            epoch = len(rows) + 1
            # Each epoch has its own seed, so that a resumed run equals an uninterrupted one.
            seed = np.random.SeedSequence([config.seed, epoch]).generate_state(1)
            torch.manual_seed(int(seed[0]))

            def show(done: float, loss: float, epoch: int = epoch) -> None:
                text = f"epoch {epoch}/{config.epochs} loss {loss:.3f}"
                progress.update(bar, description=text, completed=epoch - 1 + done)

            order = _order(seen.labels, config.balance)
            loss, accuracy = _train_epoch(
                model, seen, order, augment, optimizer, config.batch, weights, show
            )
            scheduler.step()
            logits = classifier.predict(model, validation.images)
            row = {
                "epoch": epoch,
                "train_loss": loss,
                "train_accuracy": accuracy,
                "val_loss": cross_entropy(logits, validation.labels, val_weights).item(),
                "val_accuracy": (logits.argmax(1) == validation.labels).double().mean().item(),
            }
            if not math.isfinite(row["train_loss"] + row["val_loss"]):
                raise UserError(
                    f"--lr: expected a lower one than {config.lr:g}, found that the loss is not "
                    f"finite in epoch {epoch}"
                )
            rows.append(row)
            if _since_best(rows) == 0:
                classifier.save(model, config.out / "best.safetensors")
            training.write_results(config.out / "results.csv", rows)
            training.save_state(last, signature, model, optimizer, scheduler, rows)
            log.metrics(row, epoch)
    panels = (("train_loss", "val_loss"), ("train_accuracy", "val_accuracy"))
    best = rows[_best(rows)]["epoch"]
    training.plot_curves(config.out / "curves.png", rows, panels, best)


def _train_epoch(
    model: Classifier,
    split: Split,
    order: torch.Tensor,
    augment: v2.Transform,
    optimizer: torch.optim.Optimizer,
    batch: int,
    weights: torch.Tensor | None,
    show: Callable[[float, float], None],
) -> tuple[float, float]:
    """One pass over the images at the places `order`; returns mean loss and accuracy.

    `weights` (classes,) are those of the loss. `show` gets the part done and the last loss.
    """
    model.train()
    device = model.mean.device
    weights = None if weights is None else weights.to(device)
    loss_sum = correct = 0.0
    # Of even size: BatchNorm could not train on a single image left over.
    batches = order.tensor_split(-(-len(order) // batch))
    for i, chosen in enumerate(batches, start=1):
        images = torch.stack([augment(split.images[j]) for j in chosen]).to(device)
        labels = split.labels[chosen].to(device)
        logits = model(images)
        loss = cross_entropy(logits, labels, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(chosen)
        correct += (logits.argmax(1) == labels).sum().item()
        show(i / len(batches), loss.item())
    return loss_sum / len(order), correct / len(order)


def _order(labels: torch.Tensor, balanced: str) -> torch.Tensor:
    """Places of the images of an epoch, by torch's seed: as many as there are."""
    if balanced != "sampling":
        return torch.randperm(len(labels))
    rng = np.random.default_rng(torch.initial_seed())
    return torch.from_numpy(balance.evenly(labels.numpy(), rng)[: len(labels)])


def _class_weights(
    seen: Split, validation: Split, classes: int, balanced: str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(classes,) weights in the loss of training and of validation; None: all images are equal.

    With any balance, each class counts the same in the validation loss, which chooses the epoch.
    """
    if balanced == "none":
        return None, None
    equal = torch.from_numpy(balance.equal_weights(validation.labels.numpy(), classes)).float()
    if balanced == "sampling":
        return None, equal
    weights = balance.effective_number_weights(seen.labels.numpy(), classes)
    return torch.from_numpy(weights).float(), equal


def _optimizer(model: nn.Module, config: FinetuneClassifierConfig) -> torch.optim.Optimizer:
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return cls(parameters, lr=config.lr, weight_decay=config.weight_decay)


def _augmentation(config: FinetuneClassifierConfig) -> v2.Transform:
    steps: list[nn.Module] = []
    if config.auto_augment:
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET))
    steps.append(v2.RandomHorizontalFlip())
    if config.rotation:
        steps.append(v2.RandomRotation(config.rotation, v2.InterpolationMode.BILINEAR))
    return v2.Compose(steps)


def _best(rows: training.Rows) -> int:
    """Index of the row with the lowest validation loss.

    A few dozen images have too few values of accuracy to choose among epochs by.
    """
    return min(range(len(rows)), key=lambda i: rows[i]["val_loss"])


def _since_best(rows: training.Rows) -> int:
    return len(rows) - 1 - _best(rows) if rows else 0


def report(
    model: Classifier, splits: dict[str, Split], config: FinetuneClassifierConfig, log: Log
) -> float:
    """Write predictions and accuracies of the best epoch, and print the latter as a table.

    Returns the seconds that a prediction took, with reading the image.
    """
    classified: dict[str, Classified] = {}
    for part, split in splits.items():
        if not split.samples:
            continue
        started = time.monotonic()
        probabilities = classifier.predict(model, split.images).softmax(1).numpy()
        seconds = split.seconds + time.monotonic() - started
        classified[part] = Classified(split.samples, split.labels.numpy(), probabilities, seconds)
    start = "ImageNet" if config.pretrained else "scratch"
    name = f"{model.name} ({start})"
    log.metrics(loggers.flat(classification.write(config.out, name, model.classes, classified)))
    return classification.seconds_per_image(classified)
