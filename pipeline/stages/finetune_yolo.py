"""Fine-tune YOLO-World on a dataset.

What is kept is the last epoch, at the end of a falling learning rate: with a handful of validation
defects, choosing an epoch by them is choosing by chance.

The detector knows the classes that have instances in the training images; a line names those of the
dataset that it leaves out.

Output folder: detector.pt (an Ultralytics checkpoint), detector.safetensors (without pickles, in
half precision), results.csv, curves, open_vocabulary.json (what prompts that were not trained find
before and after), config.yaml, run.json; weights/ (Ultralytics' own, to resume) until it is done.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import yaml

from pipeline import record
from pipeline.config import FinetuneYoloConfig
from pipeline.data import loggers
from pipeline.data.augment import photometric
from pipeline.data.dataset import Dataset, learned_classes, split_name
from pipeline.data.files import write_json, write_text
from pipeline.errors import UserError
from pipeline.models import open_vocabulary, text, yolo_world
from pipeline.models.device import device_name, has_fast_bfloat16, torch_device
from pipeline.models.yolo_trainer import PromptTrainer, plot_curves

COMMAND = "finetune-yolo"
DETECTOR = "detector.pt"


def run(config: FinetuneYoloConfig) -> None:
    loggers.require(config)
    dataset = Dataset(config.data)
    for split in ("train", "val"):
        if not dataset.split(split, config.fold):
            raise UserError(
                f"--data: expected images in the {split} split of {config.data}, found none"
            )
    classes = _classes(config, dataset)
    device = device_name(config.device)
    detector = config.out / DETECTOR
    last, start = (config.out / "weights" / f"{name}.pt" for name in ("last", "start"))
    if config.resume:
        _check_resumable(config, last)
    else:
        texts = _texts(config, classes)
        embeddings, kind = _prompt_embeddings(config, texts)
        torch.manual_seed(config.seed)  # what a starting point lacks begins at random
        model = yolo_world.load_model(config.model, offline=config.offline)
        if config.freeze_text:
            embeddings = _prompts_to_keep(model, classes, embeddings)
            kind += ", kept as they are"
        model = yolo_world.set_prompts(model, classes, embeddings, config.seed)
        record.claim(COMMAND, config)
        record.write_config(config.out, COMMAND, config)
        for name in (DETECTOR, open_vocabulary.REPORT):
            (config.out / name).unlink(missing_ok=True)  # of an earlier run
        print(f"prompts: {kind}")
        prompts = {"embeddings": kind, "texts": dict(zip(classes, texts, strict=True))}
        write_text(config.out / "prompts.yaml", yaml.safe_dump(prompts, sort_keys=False))
        yolo_world.save_checkpoint(model, start)
    with loggers.opened(config, resumed=config.resume) as log:
        if config.resume and _is_trained(last, config):
            plot_curves(config.out / "results.csv")  # it may have been killed before that
        else:
            trainer = PromptTrainer(overrides=_training_options(config, dataset, classes, device))
            trainer.log = log
            trainer.train()
        log.pictures(config.out)
    model = yolo_world.finish_checkpoint(last, detector)
    yolo_world.save_safetensors(model, detector.with_suffix(".safetensors"), config.image_size)
    _report_open_vocabulary(config, dataset, classes, start, model, device)
    record.write_record(config.out, COMMAND, config)
    shutil.rmtree(last.parent)  # until here it is needed to resume
    print(f"detector: {detector}")


def _check_resumable(config: FinetuneYoloConfig, last: Path) -> None:
    """Raises `UserError` if there is nothing to go on from, or something of other options."""
    if record.record_path(config.out).is_file():
        raise UserError(f"--resume: expected an interrupted run, found that {config.out} is done")
    if not last.is_file():
        raise UserError(f"--resume: expected a checkpoint at {last}, found none")
    if not record.can_resume(COMMAND, config):
        raise UserError(
            f"--resume: expected the options and data that {config.out} was begun with, "
            "found others"
        )


def _classes(config: FinetuneYoloConfig, dataset: Dataset) -> tuple[str, ...]:
    """The classes to learn. Raises `UserError` without any, and for a prompt of no class."""
    classes = learned_classes(dataset.split("train", config.fold), dataset.classes)
    problems = [
        f"--prompts: expected a class of {', '.join(dataset.classes)}, found '{name}'"
        for name in config.prompts
        if name not in dataset.classes
    ]
    if not classes:
        problems.append(f"--data: expected defects in the train split of {config.data}, found none")
    if problems:
        raise UserError(*problems)
    if left_out := [name for name in dataset.classes if name not in classes]:
        print(f"left out, for the training images show none: {', '.join(left_out)}")
    return classes


def _texts(config: FinetuneYoloConfig, classes: tuple[str, ...]) -> list[str]:
    """The prompt of each class."""
    return [config.prompts.get(name, name.replace("_", " ")) for name in classes]


def _prompt_embeddings(
    config: FinetuneYoloConfig, texts: list[str]
) -> tuple[torch.Tensor | None, str]:
    """CLIP's embeddings of the prompts, or None for learned ones; and which of the two it is."""
    if config.text == "learned":
        return None, "learned"
    try:
        return text.clip_embeddings(texts, offline=config.offline), "CLIP ViT-B/32"
    except UserError as error:
        if config.text == "clip":
            raise UserError(*(f"--text clip: {problem}" for problem in error.problems)) from None
        return None, f"learned (not by CLIP: {error.problems[0]})"


def _prompts_to_keep(
    model: yolo_world.WorldModel, classes: tuple[str, ...], embeddings: torch.Tensor | None
) -> torch.Tensor:
    """CLIP's embeddings, or those that the model was trained with.

    Raises `UserError` if prompts have no meaning yet that could be kept.
    """
    if not yolo_world.has_trained_text(model):
        raise UserError(
            "--freeze-text: expected a model whose text branch is trained, found one that begins "
            "at random: nothing to keep"
        )
    kept = yolo_world.trained_prompts(model, classes) if embeddings is None else embeddings
    if kept is None:
        raise UserError(
            "--freeze-text: expected prompts by CLIP, or a model trained for these classes, found "
            "learned prompts that begin at random: nothing to keep"
        )
    return kept


def _report_open_vocabulary(
    config: FinetuneYoloConfig,
    dataset: Dataset,
    classes: tuple[str, ...],
    start: Path,
    after: yolo_world.WorldModel,
    device: str,
) -> None:
    """Report what prompts that were not trained find with the model, and found at its start.

    Where that cannot be known, one line says why. The model is taken over.
    """
    trained = _texts(config, classes)
    prompts = [prompt for prompt in config.unseen_prompts if prompt not in trained]
    if not prompts:
        return
    before = yolo_world.load_model(str(start))
    if not yolo_world.has_trained_text(before):
        print("open vocabulary: none to lose, the text branch began at random")
        return
    try:  # whoever wants no CLIP for the training shall not download it for the report
        offline = config.offline or config.text == "learned"
        embeddings = text.clip_embeddings(prompts, offline=offline)
    except UserError as error:
        print(f"open vocabulary: not measured ({error.problems[0]})")
        return
    report = open_vocabulary.compare(
        before,
        after,
        dict(zip(prompts, embeddings, strict=True)),
        dataset.split("val", config.fold),
        config.image_size,
        torch_device(device.split(",")[0]),
    )
    write_json(config.out / open_vocabulary.REPORT, report)
    open_vocabulary.show(report)


def _training_options(
    config: FinetuneYoloConfig, dataset: Dataset, classes: tuple[str, ...], device: str
) -> dict[str, object]:
    """The run in Ultralytics' terms."""
    root = dataset.root.resolve()
    data = {
        "path": str(root),
        "train": f"{split_name('train', config.fold)}.txt",
        "val": f"{split_name('val', config.fold)}.txt",
        "splits": {"train": ["train", config.fold], "val": ["val", config.fold]},
        "names": dict(enumerate(classes)),
        "paste": config.paste if config.augment else 0.0,  # Ultralytics hands these on to us
        "free_pose": config.free_pose,
        "defective": config.defective,
        "shots": config.shots,
        "freeze_text": config.freeze_text,
    }
    write_text(config.out / "data.yaml", yaml.safe_dump(data, sort_keys=False))
    weights = config.out.resolve() / "weights"
    options: dict[str, object] = {
        "model": str(weights / "start.pt"),
        "data": str(config.out.resolve() / "data.yaml"),
        "save_dir": str(config.out.resolve()),
        "epochs": config.epochs,
        "patience": 0,  # never stop early
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
        "amp": "bf16" if device not in {"cpu", "mps"} and has_fast_bfloat16("cuda") else False,
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
    "mosaic": 0.0,
    "fliplr": 0.0,
    "translate": 0.0,
    "scale": 0.0,
    "hsv_h": 0.0,
    "hsv_s": 0.0,
    "hsv_v": 0.0,
    "augmentations": [],
}


def _is_trained(last: Path, config: FinetuneYoloConfig) -> bool:
    """Whether training has ended and only what comes after it is missing."""
    checkpoint = torch.load(last, map_location="cpu", weights_only=False)
    return bool(checkpoint["epoch"] + 1 == config.epochs)
