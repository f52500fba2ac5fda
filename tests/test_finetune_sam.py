"""`pipeline finetune-sam`: examples, losses, training and its resumption, calibration."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from rectangles import Defects, filled, write_dataset
from segment_anything.modeling import Sam

from pipeline import cli
from pipeline.config import FinetuneSamConfig, build
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.files import read_json
from pipeline.data.quality import Calibration
from pipeline.errors import UserError
from pipeline.models import prompting, sam_lite, training
from pipeline.models import sam as sams
from pipeline.models.sam import LoadedSam
from pipeline.models.sam_examples import Example, instances, make_example
from pipeline.stages import finetune_sam
from pipeline.stages.finetune_sam import BEST, TrainingSet, run

TRAIN: tuple[Defects, ...] = (
    [("scratch", (10, 12, 40, 30))],
    [("stain", (50, 40, 90, 64))],
    [("stain", (8, 40, 30, 66)), ("scratch", (60, 6, 90, 16))],
    [],
)
VAL: tuple[Defects, ...] = ([("scratch", (30, 20, 64, 40))], [])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "d", {"train": TRAIN, "val": VAL})


@pytest.fixture(scope="module")
def lite() -> Sam:
    torch.manual_seed(0)
    return sam_lite.build_sam_lite().eval()


FOUR_EPOCHS: dict[str, Any] = {"epochs": 4, "lr": 3e-3, "repeats": 2}


def config(data: Path, out: Path, **options: Any) -> FinetuneSamConfig:
    tiny = {"model": sams.IMAGENET_START, "epochs": 2, "repeats": 2, "batch": 4, "device": "cpu"}
    return build(FinetuneSamConfig, tiny | {"data": data, "out": out} | options)


# ---- Examples --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "input_size"),
    [(1000, 1000, (256, 256)), (300, 900, (85, 256)), (60, 60, (256, 256)), (48, 20, (256, 107))],
)
def test_the_target_has_the_area_of_the_mask(
    height: int, width: int, input_size: tuple[int, int]
) -> None:
    """At the decoder's resolution, of masks larger and smaller than that; and of thin parts too."""
    y, x = np.mgrid[:height, :width]
    mask = ((x / width - 0.6) / 0.3) ** 2 + ((y / height - 0.5) / 0.4) ** 2 < 1
    example = Example(torch.empty(0), np.empty(4), mask, input_size)
    target = finetune_sam._target(example, 0.5)
    assert target.shape == (round(input_size[0] / 2), round(input_size[1] / 2))
    assert target.min() >= 0 and target.max() <= 1 + 1e-6
    assert target.mean().item() == pytest.approx(mask.mean(), rel=0.02)
    line = np.zeros((height, width), bool)
    line[:, 3 * width // 7] = True
    thin = finetune_sam._target(Example(torch.empty(0), np.empty(4), line, input_size), 0.5)
    assert thin.mean().item() == pytest.approx(line.mean(), rel=0.02)
    centre = (target.sum(0) * torch.arange(target.shape[1])).sum() / target.sum()
    assert centre / target.shape[1] == pytest.approx(0.6, abs=0.02)


def training_set(data: Path) -> TrainingSet:
    samples = Dataset(data).split("train")
    return TrainingSet(instances(samples), [s for s in samples if not s.annotations])


def test_boxes_move_by_their_part_of_the_size_and_with_the_epoch(
    lite: Sam, dataset: Path, tmp_path: Path
) -> None:
    true = TrainingSet(training_set(dataset).defects[:1], [])
    still = config(tmp_path, tmp_path, box_jitter=0)
    moving = config(tmp_path, tmp_path, box_jitter=0.2)
    offsets = []
    for epoch in range(1, 30):
        box = finetune_sam._training_example(lite, true, still, epoch, 1).box
        moved = finetune_sam._training_example(lite, true, moving, epoch, 1).box
        size = np.tile(box[2:] - box[:2], 2)
        offsets.append((moved - box) / size)
    assert np.abs(offsets).max() == pytest.approx(0.2, abs=0.02)
    assert np.abs(offsets).max() <= 0.2
    assert np.std(offsets, axis=0).min() > 0.05
    assert 5 < (np.abs(offsets) < 1e-9).all(axis=1).sum() < 20  # some are exact


@pytest.mark.parametrize(("train", "fixed"), [("decoder", True), ("neck", False), ("all", False)])
def test_views_are_fixed_only_for_a_cached_encoder(
    lite: Sam, dataset: Path, tmp_path: Path, train: str, fixed: bool
) -> None:
    true = TrainingSet(training_set(dataset).defects[:1], [])
    options = config(tmp_path, tmp_path, train=train)
    first, second = (
        finetune_sam._training_example(lite, true, options, epoch, 0).image for epoch in (0, 3)
    )
    assert torch.equal(first, second) == fixed


def test_some_examples_are_decoys_in_good_pictures_of_the_same_size(
    lite: Sam, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About one in seven; none where there is no such picture."""
    true = training_set(dataset)
    monkeypatch.setattr(finetune_sam, "make_example", lambda *_: _example(True))
    monkeypatch.setattr(finetune_sam, "make_decoy", lambda *_: _example(False))
    options = config(tmp_path, tmp_path, repeats=200)

    def decoys(train: TrainingSet) -> int:
        return sum(
            not finetune_sam._training_example(lite, train, options, 1, copy).mask.any()
            for copy in range(800)
        )

    assert 0.12 < decoys(true) / 800 < 0.18
    assert decoys(TrainingSet(true.defects, [])) == 0
    larger = Sample(9, tmp_path / "a.png", 97, 72, ())
    assert decoys(TrainingSet(true.defects, [larger])) == 0


def _example(defect: bool) -> Example:
    return Example(torch.empty(0), np.array([0.0, 0, 8, 8]), np.full((8, 8), defect), (8, 8))


@pytest.mark.parametrize("mask", [(3, 2, 4, 3), (2, 1, 9, 6)])
def test_a_point_lies_on_the_mask(mask: tuple[int, int, int, int]) -> None:
    """In the middle of one of its pixels; without a mask, in the middle of the box."""
    example = Example(torch.empty(0), np.array([8.0, 4, 36, 24]), filled(mask, 10, 20), (40, 80))
    shown = np.array(
        [finetune_sam._point(example, np.random.default_rng(seed))[0] for seed in range(200)]
    )
    pixels = {(x, y) for x in range(mask[0], mask[2]) for y in range(mask[1], mask[3])}
    assert {(x / 4 - 0.5, y / 4 - 0.5) for x, y, _ in shown} == pixels
    assert (shown[:, 2] == 1).all()
    empty = Example(torch.empty(0), example.box, np.zeros((10, 20), bool), (40, 80))
    (point,) = finetune_sam._point(empty, np.random.default_rng(0)).tolist()
    assert point == [22, 14, 1]


# ---- Losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bce", "focal"])
@pytest.mark.parametrize("size", [20, 1e4])
def test_loss_of_perfect_and_of_inverted_logits(kind: str, size: float) -> None:
    target = torch.from_numpy(filled((8, 4, 40, 30), 48, 64)).float()
    perfect = finetune_sam._mask_loss((2 * target - 1) * size, target, kind)
    inverted = finetune_sam._mask_loss((1 - 2 * target) * size, target, kind)
    assert 0 <= perfect.item() < 1e-4
    assert math.isfinite(inverted.item()) and inverted.item() > 10


@pytest.mark.parametrize(("kind", "pixels"), [("bce", math.log(2)), ("focal", 5 * math.log(2))])
def test_loss_of_undecided_logits(kind: str, pixels: float) -> None:
    """By hand: every probability is 1/2, so BCE is ln 2, and focal loss 20 / 4 of that."""
    target = torch.zeros(10, 10)
    target[:2] = 1
    dice = 1 - (2 * 0.5 * 20 + 1) / (50 + 20 + 1)
    loss = finetune_sam._mask_loss(torch.zeros(10, 10), target, kind)
    assert loss.item() == pytest.approx(dice + pixels, rel=1e-5)


@pytest.mark.parametrize("kind", ["bce", "focal"])
def test_loss_without_any_defect_in_sight(kind: str) -> None:
    logits = torch.full((8, 8), -20.0, requires_grad=True)
    loss = finetune_sam._mask_loss(logits, torch.zeros(8, 8), kind)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-3)
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["bce", "focal"])
def test_pixels_at_the_edge_weigh_more(kind: str) -> None:
    """64 pixels of a square are missed: in its middle, or along its side."""
    target = torch.from_numpy(filled((16, 16, 48, 48), 64, 64)).float()
    losses = []
    for missed in [(28, 28, 36, 36), (16, 16, 18, 48)]:
        found = target * ~torch.from_numpy(filled(missed, 64, 64))
        logits = 8 * (2 * found - 1)
        losses.append(finetune_sam._mask_loss(logits, target, kind).item())
    middle, edge = losses
    assert edge > 1.5 * middle > 0.01


def test_the_weight_of_an_edge_by_hand() -> None:
    """Of the 9 x 9 pixels around one at a straight edge, 4 of 9 columns differ: 1 + 5 * 4 / 9."""
    target = torch.zeros(64, 64)
    target[:, 32:] = 1
    weight = 1 + 5 * torch.tensor([1, 2, 3, 4]) / 9  # from afar to the edge, on either side
    total = 64 * (56 + 2 * weight.sum())
    logits = torch.zeros(64, 64, requires_grad=True)
    finetune_sam._mask_loss(logits, target, "bce").backward()
    # The slopes of Dice and of BCE at a probability of 1/2, whose own slope is 1/4.
    both = 0.5 * total / 2
    slope = 0.25 * (2 * both + 1) / (total + 1) ** 2 + 0.5 / total
    assert logits.grad is not None
    rows = logits.grad[20, [20, 31]] / torch.tensor([1.0, 1 + 20 / 9])
    np.testing.assert_allclose(rows, [slope, slope], rtol=1e-3)


@pytest.fixture
def examples(lite: Sam, dataset: Path) -> list[Example]:
    defects = training_set(dataset).defects
    return [make_example(lite, i, 1.5, False, np.random.default_rng(0)) for i in defects]


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_sam, "SECOND_PASS", 0.0)


def generator() -> np.random.Generator:
    return np.random.default_rng(5)


def test_where_there_is_no_defect_only_the_predicted_iou_counts(lite: Sam) -> None:
    logits = torch.randn(2, 1, 160, 160, requires_grad=True)
    iou = torch.tensor([[0.75], [0.25]], requires_grad=True)
    decoys = [Example(torch.empty(0), np.zeros(4), np.zeros((20, 20), bool), (320, 320))] * 2
    loss = finetune_sam._decoded_loss(lite, decoys, logits, iou, config(Path(), Path()))
    assert loss.item() == pytest.approx((0.75**2 + 0.25**2) / 2)
    loss.backward()
    assert iou.grad is not None and iou.grad.tolist() == [[0.75], [0.25]]
    assert logits.grad is None


def test_the_predicted_iou_is_held_against_that_of_the_decoded_mask(lite: Sam) -> None:
    """A mask that is the left half of the truth has an IoU of 1/2; its padding is left out."""
    example = Example(torch.empty(0), np.zeros(4), np.ones((20, 20), bool), (160, 320))
    logits = torch.full((1, 1, 160, 160), -20.0)
    logits[..., :80] = logits[..., 80:, :] = 20
    options = config(Path(), Path())
    near, far = (
        finetune_sam._decoded_loss(lite, [example], logits, torch.tensor([[iou]]), options).item()
        for iou in (0.5, 0.9)
    )
    assert far - near == pytest.approx(0.4**2, rel=1e-3)


@pytest.mark.parametrize("prompt", ["boxes", "boxes+points", "points"])
@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_reach_all_of_the_decoder(
    lite: Sam,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
    passes: int,
) -> None:
    """Save for the heads of the masks that are not asked for."""
    monkeypatch.setattr(finetune_sam, "PROMPTS", {prompt: 1.0})
    monkeypatch.setattr(finetune_sam, "SECOND_PASS", float(passes - 1))
    shown: list[str] = []
    encode = prompting.encode_prompts

    def encode_prompts(sam: Sam, boxes: torch.Tensor, kind: str, *more: Any, **masks: Any) -> Any:
        shown.append(kind)
        return encode(sam, boxes, kind, *more, **masks)

    monkeypatch.setattr(prompting, "encode_prompts", encode_prompts)
    options = config(Path(), Path(), train="all")
    groups = finetune_sam._trained_parameters(lite, options)
    lite.zero_grad()
    finetune_sam._loss(lite, examples[:2], None, options, generator()).backward()
    assert shown == [prompt, "boxes+masks"][:passes]
    heads = tuple(f"output_hypernetworks_mlps.{i}." for i in (1, 2, 3))
    for name, parameter in lite.mask_decoder.named_parameters():
        if not name.startswith(heads):
            assert parameter.grad is not None and parameter.grad.any(), name
    for name, parameter in lite.image_encoder.neck.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert all(id(p) in trained for p in lite.parameters())
    for parameter in lite.image_encoder.general_parameters():
        assert parameter.grad is None  # it is frozen
    if prompt == "boxes" or passes == 2:
        assert lite.prompt_encoder.mask_downscaling[0].weight.grad.any()
    lite.zero_grad()
    lite.requires_grad_(True)


def test_cached_embeddings_give_the_same_loss(lite: Sam, dataset: Path, tmp_path: Path) -> None:
    options = config(dataset, tmp_path)
    true = training_set(dataset)
    cache = finetune_sam._cached_embeddings(lite, true, options)
    assert len(cache) == len(true.defects) * options.repeats
    assert not list(tmp_path.iterdir())  # the file is gone, its content is not
    copies = np.array([5, 0, 3])
    views = [finetune_sam._training_example(lite, true, options, 7, i) for i in copies]
    with torch.no_grad():
        cached = finetune_sam._loss(lite, views, cache[copies], options, generator())
        fresh = finetune_sam._loss(lite, views, None, options, generator())
        other = finetune_sam._loss(lite, views, cache[copies[::-1]], options, generator())
    assert cached.item() == pytest.approx(fresh.item(), rel=2e-3)
    assert abs(other.item() - fresh.item()) > 5 * abs(cached.item() - fresh.item())


def test_padding_does_not_count(lite: Sam, examples: list[Example], one_pass: None) -> None:
    """The loss of a window that is not square does not look at what lies below or beside it."""
    wide = Example(examples[0].image, examples[0].box, examples[0].mask[:20], (100, 320))
    decode = prompting.decode

    def with_noise(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, quality = decode(*arguments)
        logits[..., 50:, :] = 1e3
        return logits, quality

    options = config(Path(), Path())
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        clean = finetune_sam._loss(lite, [wide], None, options, generator())
        patch.setattr(prompting, "decode", with_noise)
        noisy = finetune_sam._loss(lite, [wide], None, options, generator())
    assert noisy.item() == clean.item()


# ---- Training --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """What a training left."""

    out: Path
    rows: list[dict[str, float]]
    model: dict[str, torch.Tensor]

    @property
    def live(self) -> dict[str, torch.Tensor]:
        """The weights after the last step."""
        prefix = "live."
        return {k.removeprefix(prefix): v for k, v in self.model.items() if k.startswith(prefix)}


def train(data: Path, out: Path, **options: Any) -> Finished:
    run(config(data, out, **options))
    with (out / "results.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return Finished(out, rows, torch.load(out / "last.pt", weights_only=True)["model"])


def starting_point(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return sams.load_sam(sams.IMAGENET_START).model.state_dict()


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Four epochs of the decoder alone, uninterrupted."""
    return train(dataset, tmp_path_factory.mktemp("run"), **FOUR_EPOCHS)


def test_learns_bright_rectangles(dataset: Path, finished: Finished) -> None:
    losses = [row["train_loss"] for row in finished.rows]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]
    kept = sams.load_sam(str(finished.out / BEST))
    assert (kept.architecture, kept.zoom) == ("sam-lite", 1.3)
    val = defective(dataset, "val")
    reached = finetune_sam.mean_iou(kept, val, kept.zoom)
    assert reached == pytest.approx(finished.rows[-1]["val_iou"], abs=0.02)
    assert reached > finetune_sam.mean_iou(_untrained(), val, 1.3) + 0.1


def defective(data: Path, split: str) -> list[Sample]:
    return [sample for sample in Dataset(data).split(split) if sample.annotations]


def _untrained() -> LoadedSam:
    torch.manual_seed(0)
    return sams.load_sam(sams.IMAGENET_START)


def test_outputs(finished: Finished) -> None:
    assert {path.name for path in finished.out.iterdir()} == {
        BEST, "last.pt", "results.csv", "curves.png", "config.yaml", "run.json",
    }  # fmt: skip
    assert cv2.imread(str(finished.out / "curves.png")) is not None
    assert [row["epoch"] for row in finished.rows] == [1, 2, 3, 4]
    assert json.loads((finished.out / "run.json").read_text())["command"] == "finetune-sam"
    assert (finished.out / "config.yaml").read_text().startswith("# pipeline finetune-sam --config")


@pytest.mark.parametrize(
    ("part", "trained"),
    [
        ("decoder", ("mask_decoder.",)),
        ("neck", ("mask_decoder.", "image_encoder.neck.")),
        ("all", ("mask_decoder.", "image_encoder.", "prompt_encoder.")),
    ],
)
def test_only_what_is_named_is_trained(
    dataset: Path, tmp_path: Path, part: str, trained: tuple[str, ...]
) -> None:
    found = train(dataset, tmp_path, train=part, epochs=1, repeats=1).live
    start = starting_point()
    changed = {key for key in start if not torch.equal(start[key], found[key])}
    assert all(key.startswith(trained) for key in changed)
    for prefix in trained:
        assert any(key.startswith(prefix) for key in changed), prefix
    assert not any("running_" in key or "num_batches" in key for key in changed)  # of BatchNorm


class Killed(BaseException):
    pass


@pytest.mark.parametrize("part", ["decoder", "neck"])
def test_a_resumed_training_equals_an_uninterrupted_one(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: Finished,
    part: str,
) -> None:
    options = FOUR_EPOCHS
    if part == "decoder":
        whole = finished
    else:
        options = {"epochs": 2, "train": part, "repeats": 1}
        whole = train(dataset, tmp_path / "whole", **options)
    save_state = training.save_state

    def save_then_die(*arguments: Any) -> None:
        save_state(*arguments)
        if 2 * len(arguments[-1]) == options["epochs"]:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_state", save_then_die)
        with pytest.raises(Killed):
            train(dataset, tmp_path / "cut", **options)
    assert not (tmp_path / "cut" / "run.json").exists()
    torch.manual_seed(99)  # another process
    resumed = train(dataset, tmp_path / "cut", **options, resume=True)
    assert resumed.rows == whole.rows
    assert any(key.startswith("averaged.") for key in resumed.model)
    best, same = (sams.load_sam(str(done.out / BEST)).model for done in (whole, resumed))
    for expected, found in ((whole.model, resumed.model), (best.state_dict(), same.state_dict())):
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert torch.equal(tensor, expected[key]), key


def test_resuming_a_finished_training_changes_nothing(dataset: Path, finished: Finished) -> None:
    before = (finished.out / BEST).read_bytes()
    again = train(dataset, finished.out, **FOUR_EPOCHS, resume=True)
    assert again.rows == finished.rows
    assert (finished.out / BEST).read_bytes() == before


def test_resuming_with_other_options_or_nothing_to_resume(
    dataset: Path, tmp_path: Path, finished: Finished
) -> None:
    before = (finished.out / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"^--resume: expected the options and data"):
        run(config(dataset, finished.out, **FOUR_EPOCHS, box_jitter=0, resume=True))
    assert (finished.out / "config.yaml").read_text() == before
    with pytest.raises(UserError, match=r"^--resume: expected a checkpoint at .*found none"):
        run(config(dataset, tmp_path / "new", resume=True))
    assert not (tmp_path / "new").exists()
    (tmp_path / "last.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"^--resume: expected a checkpoint .*cannot be read"):
        run(config(dataset, tmp_path, resume=True))


def test_a_finished_result_is_replaced_only_by_force(dataset: Path, finished: Finished) -> None:
    with pytest.raises(UserError, match="finished result; give --force"):
        run(config(dataset, finished.out))


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training without its expensive part."""
    parameter = torch.zeros(1, requires_grad=True)
    monkeypatch.setattr(finetune_sam, "_loss", lambda *_: parameter.square().sum())
    monkeypatch.setattr(
        finetune_sam, "_cached_embeddings", lambda sam, train, config: np.zeros(1000)
    )
    monkeypatch.setattr(finetune_sam, "_training_example", lambda *_: None)


def test_trains_to_the_end_whatever_the_validation_says(
    dataset: Path, tmp_path: Path, no_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [0.9, 0.5, 0.4, 0.3, 0.2, 0.1]
    monkeypatch.setattr(finetune_sam, "mean_iou", lambda *_: scores.pop(0))
    done = train(dataset, tmp_path, epochs=6)
    assert [row["val_iou"] for row in done.rows] == [0.9, 0.5, 0.4, 0.3, 0.2, 0.1]


def test_what_is_kept_is_a_moving_average_of_the_weights(
    dataset: Path, tmp_path: Path, no_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the weights after each step, from the first on: 0.98 of what it was and 0.02 of them."""
    seen: list[torch.Tensor] = []

    def loss(sam: Sam, *_: Any) -> torch.Tensor:
        weight = sam.mask_decoder.iou_token.weight
        seen.append(weight.detach().clone())
        return weight.square().sum()

    monkeypatch.setattr(finetune_sam, "_loss", loss)
    done = train(dataset, tmp_path, epochs=3, repeats=5, lr=0.1)
    name = "mask_decoder.iou_token.weight"
    after = torch.stack([*seen[1:], done.live[name]])  # step k's weights are seen in step k + 1
    k = len(after)
    assert k == 15
    shares = torch.tensor([0.98 ** (k - 1), *(0.02 * 0.98 ** (k - j) for j in range(2, k + 1))])
    assert shares.sum().item() == pytest.approx(1)
    expected = (shares[:, None, None] * after).sum(0)
    assert (after[0] - after[-1]).abs().max() > 0.1
    torch.testing.assert_close(done.model[f"averaged.module.{name}"], expected, atol=1e-5, rtol=0)
    kept = sams.load_sam(str(tmp_path / BEST)).model.state_dict()
    torch.testing.assert_close(kept[name], expected, atol=1e-3, rtol=1e-3)  # in half precision


def test_a_loss_that_is_not_finite_stops_the_training(
    dataset: Path, tmp_path: Path, no_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = torch.full((1,), math.nan, requires_grad=True)
    monkeypatch.setattr(finetune_sam, "_loss", lambda *_: nothing.sum())
    with pytest.raises(UserError, match=r"^--lr: expected a lower one than 0.0005, found"):
        run(config(dataset, tmp_path))


def test_without_validation_defects_it_trains_to_the_end(
    tmp_path: Path, no_steps: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "d", {"train": TRAIN, "val": [[]]})
    done = train(data, tmp_path / "out", epochs=3)
    assert len(done.rows) == 3
    assert all(math.isnan(row["val_iou"]) for row in done.rows)
    kept = sams.load_sam(str(tmp_path / "out" / BEST))
    assert kept.calibration == Calibration(1, 0)  # there is nothing to learn another from
    assert "segmenter: " in capsys.readouterr().out


def test_several_datasets_are_learned_as_one(
    dataset: Path, tmp_path: Path, no_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other sizes and with other classes, too: to a SAM a defect is a box and a mask."""
    more: tuple[Defects, ...] = ([("hole", (5, 6, 30, 40))], [("hole", (9, 9, 20, 20))], [])
    splits = {"train": more, "val": more[:1]}
    other = write_dataset(tmp_path / "other", splits, classes=("hole",), height=64, width=80)
    fit = finetune_sam.fit
    given: list[tuple[TrainingSet, list[Sample]]] = []

    def spy(loaded: LoadedSam, train: TrainingSet, val: list[Sample], *options: Any) -> LoadedSam:
        given.append((train, val))
        return fit(loaded, train, val, *options)

    monkeypatch.setattr(finetune_sam, "fit", spy)
    options = ["--model", sams.IMAGENET_START, "--epochs", "1", "--device", "cpu"]
    out = tmp_path / "out"
    cli.main(["finetune-sam", "--data", str(dataset), str(other), "--out", str(out), *options])
    ((learned, validated),) = given
    folders = [instance.sample.path.parents[1] for instance in learned.defects]
    assert folders == 4 * [dataset] + 2 * [other]
    assert [sample.path.parents[1] for sample in learned.good] == [dataset, other]
    assert [sample.path.parents[1] for sample in validated] == [dataset, other]
    record = read_json(out / "run.json")
    assert {"data[0]", "data[1]"} <= set(record["inputs"])
    assert record["inputs"]["data[0]"] != record["inputs"]["data[1]"]


def test_no_defects_to_train_on(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "d", {"train": [[]], "val": VAL})
    with pytest.raises(UserError, match=r"^--data: expected defects in the train .*, found none"):
        run(config(data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_bad_input_exits_with_2(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(dataset), "--out", str(tmp_path / "out"), "--model", "sam-lit"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["finetune-sam", *options])
    assert stopped.value.code == 2
    assert "sam-lit: expected a checkpoint file or a known name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- Calibration -----------------------------------------------------------------------------


def test_calibration_brings_the_quality_closer_to_the_true_iou(
    dataset: Path, finished: Finished
) -> None:
    kept = sams.load_sam(str(finished.out / BEST))
    assert kept.calibration != Calibration(1, 0)
    val = defective(dataset, "val")
    boxes = [sample.truth for sample in val]
    errors = []
    for calibration in (kept.calibration, Calibration(1, 0)):
        calibrated = replace(kept, calibration=calibration)
        predicted, true = finetune_sam._predicted_and_true_iou(calibrated, val, kept.zoom, boxes)
        assert len(predicted) == len(true) == 1
        errors.append(np.abs(predicted - true).mean())
    assert errors[0] < 0.5 * errors[1]


def test_an_earlier_calibration_does_not_count(
    dataset: Path, tmp_path: Path, no_steps: None
) -> None:
    """It was of other weights: a training that starts from these finds the same one without it."""
    torch.manual_seed(0)
    start = LoadedSam(sam_lite.build_sam_lite(), "sam-lite", 1.3)
    start.model.mask_decoder.iou_prediction_head.layers[-1].bias.data += 0.5
    found = []
    for name, calibration in [("plain", Calibration(1, 0)), ("earlier", Calibration(0.3, -2))]:
        path = tmp_path / f"{name}.safetensors"
        sams.save_sam(path, replace(start, calibration=calibration))
        train(dataset, tmp_path / name, model=str(path), epochs=1)
        found.append(sams.load_sam(str(tmp_path / name / BEST)).calibration)
    assert found[0] == found[1] != Calibration(1, 0)


# ---- Parts -----------------------------------------------------------------------------------


def test_the_rate_rises_and_falls() -> None:
    rates = [finetune_sam._learning_rate(step, 100) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[52] == pytest.approx(0.5, abs=0.02)
    assert rates[100] == pytest.approx(0, abs=1e-9)


def test_training_keeps_batchnorm_and_trains_attention_biases() -> None:
    """MobileSAM's attention would use biases cached before the first step in evaluation mode."""
    encoder = sams.build_mobile_sam().image_encoder
    sam = sam_lite.build_sam_lite()
    sam.image_encoder = encoder
    finetune_sam._train_mode(sam.eval())
    modules = list(sam.modules())
    assert not any(m.training for m in modules if isinstance(m, torch.nn.BatchNorm2d))
    attention = next(m for m in modules if hasattr(m, "attention_biases"))
    tokens = attention.attention_bias_idxs.shape[0]
    attention(torch.randn(1, tokens, attention.norm.normalized_shape[0])).sum().backward()
    assert attention.attention_biases.grad is not None
