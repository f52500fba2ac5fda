"""Fit a classifier on frozen ImageNet features, with a remedy for rare classes.

All methods see the same features and fit the same multinomial logistic regression, to:

    plain                 the training images as they are
    balanced-sampling     each class as often as any other: images of rare ones again and again
    balanced-weights      the images as they are, weighted by their class's effective number
    ecrt                  each class as often as any other: rare ones filled up with made-up
                          samples, all of them sources instead of features (pipeline/models/ecrt.py)

How many components of the features, and how strong a penalty, is chosen on the validation split:
by the log loss in which every class counts the same. Nothing is fitted to that split but, with
ecrt, when the training of the map stops.

Output folder:

    head.safetensors      what was fitted
    results.csv           all that was tried: components, c (inverse penalty), val_loss
    predictions.json accuracy.json    see pipeline/data/classification.py
    config.yaml run.json  the latter also with what was chosen, as in results.csv, and the seconds
                          that a prediction took, with reading the image
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import nn
from torch.nn.functional import cross_entropy

from pipeline import record
from pipeline.config import FinetuneHeadConfig
from pipeline.data import balance, classification, loggers
from pipeline.data.classification import Classified
from pipeline.data.dataset import GOOD, Dataset, Sample, learned_classes
from pipeline.errors import UserError
from pipeline.models import ecrt, training
from pipeline.models import head as heads
from pipeline.models.classifier import LITE0, resized
from pipeline.models.device import torch_device
from pipeline.models.embedding_cache import CachedEncoder
from pipeline.models.head import Head, Whitening

COMMAND = "finetune-head"
COMPONENTS = (8, 16, 32, 64)
INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
EPOCHS = 100  # of the map to sources; the one with the lowest validation loss counts


@dataclass(frozen=True)
class Split:
    samples: list[Sample]
    features: torch.Tensor  # (n, 1280)
    labels: torch.Tensor  # (n,) int64: 0 is good, then the dataset's classes
    seconds: float  # that features took, with reading the images


def run(config: FinetuneHeadConfig) -> None:
    """Raises `UserError` for a dataset without the splits, or with a single class to learn."""
    loggers.require(config)
    dataset = Dataset(config.data)
    samples = {name: dataset.split(name, config.fold) for name in ("train", "val", "test")}
    _check(samples, config)
    learned = learned_classes(samples["train"], dataset.classes)
    if unseen := [name for name in dataset.classes if name not in learned]:
        print(f"not learned, for the training images show none: {', '.join(unseen)}")
    device = torch_device(config.device)
    encoder: nn.Module = heads.Encoder(config.image_size).to(device)
    if config.cache is not None:
        encoder = CachedEncoder(encoder, config.cache, config.cache_gb)
    with record.result(COMMAND, config) as out:
        about = _train(encoder, samples, (GOOD, *dataset.classes), config, out)
        record.write_record(out, COMMAND, config, **about)


def _train(
    encoder: nn.Module,
    samples: Mapping[str, list[Sample]],
    classes: tuple[str, ...],
    config: FinetuneHeadConfig,
    out: Path,
) -> dict[str, Any]:
    """Write all files; returns what the record is to have beside them."""
    device = torch_device(config.device)
    with Progress() as progress:
        bar = progress.add_task("features", total=sum(map(len, samples.values())))
        advance = partial(progress.advance, bar)
        splits = {
            name: _features(encoder, split, config.image_size, device, advance)
            for name, split in samples.items()
        }
        bar = progress.add_task(config.method, total=1)

        def show(done: float) -> None:
            progress.update(bar, completed=done)

        head, rows = fit(splits["train"], splits["val"], classes, config, show)
    heads.save(head, out / "head.safetensors")
    training.write_results(out / "results.csv", rows)
    head = heads.load(out / "head.safetensors")
    classified = {name: _classify(head, split) for name, split in splits.items()}
    accuracies = classification.write(out, _name(config), head.classes, classified)
    with loggers.opened(config) as log:
        log.metrics(loggers.flat(accuracies))
    seconds = classification.seconds_per_image(classified)
    return {"chosen": _best(rows), "seconds_per_image": round(seconds, 6)}


def _check(samples: Mapping[str, list[Sample]], config: FinetuneHeadConfig) -> None:
    empty = [name for name in ("train", "val") if not samples[name]]
    if empty:
        raise UserError(
            *(f"--data: expected images in {config.data}'s {n} split, found none" for n in empty)
        )
    if len({sample.label for sample in samples["train"]}) == 1:
        raise UserError(
            f"--data: expected images of two classes in {config.data}'s train split, found one"
        )
    if not {s.label for s in samples["val"]} & {s.label for s in samples["train"]}:
        raise UserError(
            f"--data: expected images of the train split's classes in {config.data}'s val split, "
            "found none"
        )


def _features(
    encoder: nn.Module,
    samples: list[Sample],
    size: int,
    device: torch.device,
    advance: Callable[[], None],
) -> Split:
    """The features of a split, image by image: each is computed once."""
    started = time.monotonic()
    features = torch.empty(len(samples), heads.CHANNELS)
    for i, sample in enumerate(samples):
        features[i] = encoder(resized(sample.image(), size)[None].to(device))[0].cpu()
        advance()
    labels = torch.tensor([sample.label + 1 for sample in samples], dtype=torch.int64)
    return Split(samples, features, labels, time.monotonic() - started)


def fit(
    seen: Split,
    validation: Split,
    classes: tuple[str, ...],
    config: FinetuneHeadConfig,
    show: Callable[[float], None],
) -> tuple[Head, training.Rows]:
    """The head with the lowest validation loss, and a row for each that was tried.

    `show` gets the part that is done.
    """
    weights = balance.equal_weights(validation.labels.numpy(), len(classes))
    weights[np.bincount(seen.labels, minlength=len(classes)) == 0] = 0  # what cannot be known
    equal = torch.from_numpy(weights).float()
    most = len(seen.samples) - 1  # as many components as n images have
    tried = [count for count in COMPONENTS if count <= most] or [most]
    best, rows = None, []
    for i, components in enumerate(tried):

        def part_done(done: float, before: int = i) -> None:
            show((before + done) / len(tried))

        head = _unfitted(seen, validation, classes, components, config, part_done)
        samples = _samples(head, seen, config)
        for inverse in INVERSE_PENALTIES:
            heads.fit_linear(head, *samples, inverse)
            with torch.no_grad():
                loss = cross_entropy(head(validation.features), validation.labels, equal).item()
            rows.append({"components": components, "c": inverse, "val_loss": loss})
            if _best(rows) is rows[-1]:
                best = copy.deepcopy(head)
        part_done(1)
    assert best is not None
    return best, rows


def _unfitted(
    seen: Split,
    validation: Split,
    classes: tuple[str, ...],
    components: int,
    config: FinetuneHeadConfig,
    show: Callable[[float], None],
) -> Head:
    """A head that embeds features; its last layer is still to be fitted."""
    whitening = Whitening(heads.CHANNELS, components).fit(seen.features)
    if config.method != "ecrt":
        return Head(classes, config.image_size, whitening, None)
    learned, judged = ((whitening(part.features), part.labels) for part in (seen, validation))
    to_sources = ecrt.fit(learned, judged, len(classes), EPOCHS, config.seed, show)
    return Head(classes, config.image_size, whitening, to_sources)


def _samples(
    head: Head, seen: Split, config: FinetuneHeadConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What the last layer is fitted to: embedded features, labels, weights (None: all equal)."""
    with torch.no_grad():
        embedded, labels = head.embed(seen.features).numpy(), seen.labels.numpy()
    rng = np.random.default_rng(config.seed)
    if config.method == "balanced-sampling":
        shown = balance.evenly(labels, rng)
        return embedded[shown], labels[shown], None
    if config.method == "balanced-weights":
        weights = balance.effective_number_weights(labels, len(head.classes))
        return embedded, labels, weights[labels]
    if config.method == "ecrt":
        return *ecrt.augmented(embedded, labels, config.augmentation, rng), None
    return embedded, labels, None


def _best(rows: training.Rows) -> dict[str, float]:
    """The row with the lowest validation loss, the first of equals."""
    return min(rows, key=lambda row: row["val_loss"])


@torch.no_grad()
def _classify(head: Head, split: Split) -> Classified:
    started = time.monotonic()
    probabilities = head(split.features).softmax(dim=1).numpy()
    seconds = split.seconds + time.monotonic() - started
    return Classified(split.samples, split.labels.numpy(), probabilities, seconds)


def _name(config: FinetuneHeadConfig) -> str:
    how = f"ecrt, {config.augmentation}" if config.method == "ecrt" else config.method
    return f"frozen {LITE0} ({how})"
