"""Render a synthetic dataset in MVTec layout."""

from __future__ import annotations

from rich.progress import Progress

from pipeline import record
from pipeline.config import SynthConfig
from pipeline.data import synth
from pipeline.data.files import atomic_folder
from pipeline.errors import UserError

RENDERED = {"train", "test", "ground_truth", "config.yaml", "run.json"}


def run(config: SynthConfig) -> None:
    record.claim(config.out, config.force)
    if foreign := sorted({path.name for path in config.out.iterdir()} - RENDERED):
        raise UserError(
            f"--out: expected nothing but a rendered dataset in {config.out}, found {foreign[0]}"
        )
    total = (
        config.train_good
        + config.test_good
        + config.per_defect * len(synth.PRODUCTS[config.product].defects)
    )
    with Progress() as progress, atomic_folder(config.out) as place:
        task = progress.add_task("rendering", total=total)
        place.rmdir()  # what renders it also makes it
        synth.render_dataset(
            place,
            product=config.product,
            train_good=config.train_good,
            test_good=config.test_good,
            per_defect=config.per_defect,
            size=config.size,
            seed=config.seed,
            on_image=lambda: progress.advance(task),
        )
        record.write_record(place, "synth", config)
    print(f"{total} images: {config.out}")
