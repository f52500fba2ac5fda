"""Render a synthetic dataset in MVTec layout."""

from __future__ import annotations

from rich.progress import Progress

from pipeline import record
from pipeline.config import SynthConfig
from pipeline.data import synth


def run(config: SynthConfig) -> None:
    total = (
        config.train_good
        + config.test_good
        + config.per_defect * len(synth.PRODUCTS[config.product].defects)
    )
    with record.result("synth", config) as place, Progress() as progress:
        task = progress.add_task("rendering", total=total)
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
