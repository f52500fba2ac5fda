"""Render a synthetic dataset in MVTec layout."""

from __future__ import annotations

import shutil

from rich.progress import Progress

from pipeline import record
from pipeline.config import SynthConfig
from pipeline.data import synth
from pipeline.errors import UserError


def run(config: SynthConfig) -> None:
    if config.out.exists():
        if not config.force:
            raise UserError(f"--out: {config.out} exists; give --force to replace it")
        record.claim(config.out, force=True)  # only what this command has made is removed
        shutil.rmtree(config.out)
    total = config.train_good + config.test_good + config.per_defect * len(synth.DEFECTS)
    with Progress() as progress:
        task = progress.add_task("rendering", total=total)
        synth.render_dataset(
            config.out,
            train_good=config.train_good,
            test_good=config.test_good,
            per_defect=config.per_defect,
            size=config.size,
            seed=config.seed,
            on_image=lambda: progress.advance(task),
        )
    record.write_record(config.out, "synth", config)
    print(f"{total} images: {config.out}")
