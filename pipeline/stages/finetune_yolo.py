"""Fine-tune YOLO-World on a dataset.

Output folder: weights/best.pt and weights/last.pt (Ultralytics checkpoints), results.csv, curves,
config.yaml, run.json.
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from pipeline import record
from pipeline.config import FinetuneYoloConfig
from pipeline.data.augment import photometric
from pipeline.data.dataset import Dataset, split_name
from pipeline.data.files import atomic_path, write_text
from pipeline.errors import UserError
from pipeline.models import text, yolo_world
from pipeline.models.device import device_name, has_fast_bfloat16
from pipeline.models.yolo_trainer import PromptTrainer


def run(config: FinetuneYoloConfig) -> None:
    dataset = Dataset(config.data)
    for split in ("train", "val"):
        if not dataset.split(split, config.fold):
            raise UserError(
                f"--data: expected images in the {split} split of {config.data}, found none"
            )
    device = device_name(config.device)
    last = config.out / "weights" / "last.pt"
    if config.resume and not last.is_file():
        raise UserError(f"--resume: expected a checkpoint at {last}, found none")
    if not config.resume:
        embeddings, kind = _prompt_embeddings(config, dataset.classes)
        model = yolo_world.load_model(config.model, offline=config.offline)
        model = yolo_world.set_prompts(model, dataset.classes, embeddings, config.seed)
        record.claim(config.out, config.force)
        last.unlink(missing_ok=True)
        print(f"prompts: {kind}")
        write_text(
            config.out / "prompts.yaml",
            yaml.safe_dump({"embeddings": kind, "texts": _texts(config, dataset.classes)}),
        )
        yolo_world.save_checkpoint(model, config.out / "weights" / "start.pt")
    record.write_config(config.out, "finetune-yolo", config)
    if not _is_trained(last):
        options = _training_options(config, dataset, device)
        PromptTrainer(overrides=options).train()
    for name in ("best.pt", "last.pt"):
        _make_plain(config.out / "weights" / name)
    (config.out / "weights" / "start.pt").unlink(missing_ok=True)
    record.write_record(config.out, "finetune-yolo", config)
    print(f"detector: {config.out / 'weights' / 'best.pt'}")


def _texts(config: FinetuneYoloConfig, classes: tuple[str, ...]) -> list[str]:
    """The prompt of each class. Raises `UserError` for a prompt of a class that does not exist."""
    unknown = [name for name in config.prompts if name not in classes]
    if unknown:
        known = ", ".join(classes)
        raise UserError(*(f"--prompts: expected a class of {known}, found '{u}'" for u in unknown))
    return [config.prompts.get(name, name.replace("_", " ")) for name in classes]


def _prompt_embeddings(
    config: FinetuneYoloConfig, classes: tuple[str, ...]
) -> tuple[torch.Tensor | None, str]:
    """CLIP's embeddings of the prompts, or None for learned ones; and which of the two it is."""
    texts = _texts(config, classes)
    if config.text == "learned":
        return None, "learned"
    try:
        return text.clip_embeddings(texts, offline=config.offline), "CLIP ViT-B/32"
    except UserError as error:
        if config.text == "clip":
            raise
        return None, f"learned (no CLIP: {error.problems[0]})"


def _training_options(
    config: FinetuneYoloConfig, dataset: Dataset, device: str
) -> dict[str, object]:
    """The run in Ultralytics' terms."""
    root = dataset.root.resolve()
    data = {
        "path": str(root),
        "train": f"{split_name('train', config.fold)}.txt",
        "val": f"{split_name('val', config.fold)}.txt",
        "splits": {"train": ["train", config.fold], "val": ["val", config.fold]},
        "names": dict(enumerate(dataset.classes)),
    }
    write_text(config.out / "data.yaml", yaml.safe_dump(data, sort_keys=False))
    weights = config.out.resolve() / "weights"
    options: dict[str, object] = {
        "model": str(weights / "start.pt"),
        "data": str(config.out.resolve() / "data.yaml"),
        "save_dir": str(config.out.resolve()),
        "epochs": config.epochs,
        "patience": config.patience,
        "batch": config.batch,
        "nbs": config.batch,  # one optimiser step per batch: few images make few batches
        "imgsz": config.image_size,
        "optimizer": "AdamW",  # "auto" would ignore lr0
        "lr0": config.lr,
        "lrf": 0.01,
        "momentum": 0.9,
        "cos_lr": True,
        "warmup_epochs": min(3.0, config.epochs / 10),
        "warmup_bias_lr": 0.0,
        "seed": config.seed,
        "deterministic": True,
        "device": device,
        # Without "bf16" Ultralytics would download a model to test mixed precision with.
        "amp": "bf16" if device != "cpu" and has_fast_bfloat16() else False,
        "plots": True,
        **(AUGMENTATION if config.augment else NO_AUGMENTATION),
    }
    if config.augment:
        options["augmentations"] = photometric()
    if config.resume:
        options["resume"] = str(weights / "last.pt")
    return options


# The part lies in about the same pose in every picture, so geometry changes little.
AUGMENTATION: dict[str, object] = {
    "mosaic": 0.3,
    "close_mosaic": 5,
    "fliplr": 0.5,
    "degrees": 5.0,
    "translate": 0.1,
    "scale": 0.25,
    "hsv_h": 0.0,  # colour is albumentations' part
    "hsv_s": 0.0,
    "hsv_v": 0.0,
}
NO_AUGMENTATION: dict[str, object] = {
    name: 0.0 for name in "mosaic fliplr degrees translate scale hsv_h hsv_s hsv_v erasing".split()
} | {"augmentations": []}


def _is_trained(last: Path) -> bool:
    """Whether training has ended and only what comes after it is missing."""
    return last.is_file() and torch.load(last, weights_only=False)["epoch"] == -1


def _make_plain(path: Path) -> None:
    """Rewrite a finished checkpoint so that it loads without this package."""
    checkpoint = torch.load(path, weights_only=False)
    if isinstance(checkpoint["model"], yolo_world.PromptedWorldModel):
        checkpoint["model"] = yolo_world.plain(checkpoint["model"])
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)
