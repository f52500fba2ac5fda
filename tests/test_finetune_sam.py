"""`pipeline finetune-sam`: examples, losses, training and its resumption."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from rectangles import Defects, draw, filled, write_dataset
from segment_anything.modeling import Sam

from pipeline import cli
from pipeline.config import FinetuneSamConfig, build
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.masks import box_of, encode_rle
from pipeline.errors import UserError
from pipeline.models import prompting, sam_lite, training
from pipeline.models import sam as sams
from pipeline.models.sam import LoadedSam
from pipeline.models.segmenter import Segmenter
from pipeline.stages import finetune_sam
from pipeline.stages.finetune_sam import BEST, Example, Instance, make_example, run

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


FOUR_EPOCHS: dict[str, Any] = {"epochs": 4, "lr": 3e-3, "repeats": 6}


def config(data: Path, out: Path, **options: Any) -> FinetuneSamConfig:
    tiny = {"model": sams.IMAGENET_START, "epochs": 2, "repeats": 2, "batch": 4, "device": "cpu"}
    return build(FinetuneSamConfig, tiny | {"data": data, "out": out} | options)


def instance(box: tuple[int, int, int, int], height: int, width: int, path: Path) -> Instance:
    """A true instance whose image has a rectangle."""
    cv2.imwrite(str(path), draw([("stain", box)], height, width))
    x1, y1, x2, y2 = box
    annotation = {
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "category_id": 1,
        "segmentation": encode_rle(filled(box, height, width)),
    }
    return Instance(Sample(1, path, width, height, (annotation,)), 0)


class Still:
    """A random number generator that varies nothing, save for the symmetry it was given."""

    def __init__(self, transpose: int = 0, flip_x: int = 0, flip_y: int = 0) -> None:
        self._symmetry = np.array([transpose, flip_x, flip_y])

    def uniform(self, low: float, high: float, size: int | None = None) -> Any:
        return 1.0 if size is None else np.zeros(size)

    def integers(self, *_: int) -> np.ndarray:
        return self._symmetry


@pytest.fixture
def same_light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_sam, "vary_light", lambda image, rng: image)


# ---- Examples --------------------------------------------------------------------------------


@pytest.mark.parametrize("zoom", [0, 1.5, 3])
@pytest.mark.parametrize("box", [(20, 30, 80, 50), (0, 0, 12, 60), (100, 60, 160, 90)])
def test_an_unvaried_example_is_what_inference_sees(
    lite: Sam, tmp_path: Path, same_light: None, zoom: float, box: tuple[int, int, int, int]
) -> None:
    true = instance(box, 90, 160, tmp_path / "a.png")
    example = make_example(lite, true, zoom, Still())  # type: ignore[arg-type]
    images: list[torch.Tensor] = []
    prompts: list[torch.Tensor] = []
    hooks = [
        lite.image_encoder.register_forward_hook(lambda _, args, __: images.append(args[0])),
        lite.prompt_encoder.register_forward_hook(
            lambda _, __, kwargs, ___: prompts.append(kwargs["boxes"]), with_kwargs=True
        ),
    ]
    segmenter = Segmenter(LoadedSam(lite, "sam-lite", zoom), None, torch.device("cpu"))
    segmenter.segment(true.sample.image(), true.sample.truth)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(example.image, images[0][0], rtol=0, atol=0)
    np.testing.assert_allclose(example.box, prompts[0][0].numpy(), atol=1e-4)


@pytest.mark.parametrize("transpose", [0, 1])
@pytest.mark.parametrize("flip_x", [0, 1])
@pytest.mark.parametrize("flip_y", [0, 1])
@pytest.mark.parametrize("zoom", [0, 2])
def test_image_mask_and_box_stay_in_step(
    lite: Sam,
    tmp_path: Path,
    same_light: None,
    transpose: int,
    flip_x: int,
    flip_y: int,
    zoom: float,
) -> None:
    """In all eight symmetries of a window that is not square: the bright part is the mask."""
    true = instance((70, 12, 118, 32), 80, 120, tmp_path / "a.png")
    symmetry = Still(transpose, flip_x, flip_y)
    example = make_example(lite, true, zoom, symmetry)  # type: ignore[arg-type]
    upright = make_example(lite, true, zoom, Still())  # type: ignore[arg-type]
    expected = upright.mask.T if transpose else upright.mask
    expected = expected[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    np.testing.assert_array_equal(example.mask, expected)
    height, width = example.mask.shape
    assert max(example.input_size) == 256
    scale = [example.input_size[1] / width, example.input_size[0] / height] * 2
    np.testing.assert_allclose(example.box, np.array(box_of(example.mask)) * scale, atol=1e-6)
    # The picture itself: bright where the mask is.
    rows, columns = example.input_size
    bright = example.image.numpy()[0, :rows, :columns] > 0
    mask = cv2.resize(example.mask.astype(np.float32), (columns, rows)) > 0.5
    assert (bright == mask).mean() > 0.98
    assert (example.image[:, rows:] == 0).all() and (example.image[:, :, columns:] == 0).all()


def test_varied_examples_stay_in_step(lite: Sam, tmp_path: Path) -> None:
    true = instance((70, 12, 118, 32), 80, 120, tmp_path / "a.png")
    windows = set()
    for seed in range(20):
        example = make_example(lite, true, 1.5, np.random.default_rng(seed))
        height, width = example.mask.shape
        scale = [example.input_size[1] / width, example.input_size[0] / height] * 2
        np.testing.assert_allclose(example.box, np.array(box_of(example.mask)) * scale, atol=1e-6)
        assert example.mask.sum() > 0.9 * 48 * 20
        windows.add((height, width))
        again = make_example(lite, true, 1.5, np.random.default_rng(seed))
        torch.testing.assert_close(again.image, example.image, rtol=0, atol=0)
    assert len(windows) > 5


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


def test_jittered_boxes_move_by_their_part_of_the_size_and_with_the_epoch(
    lite: Sam, tmp_path: Path
) -> None:
    true = [instance((20, 20, 60, 40), 80, 120, tmp_path / "a.png")]
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


@pytest.mark.parametrize(("train", "fixed"), [("decoder", True), ("neck", False), ("all", False)])
def test_views_are_fixed_only_for_a_cached_encoder(
    lite: Sam, tmp_path: Path, train: str, fixed: bool
) -> None:
    true = [instance((20, 20, 60, 40), 80, 120, tmp_path / "a.png")]
    options = config(tmp_path, tmp_path, train=train)
    first, second = (
        finetune_sam._training_example(lite, true, options, epoch, 0).image for epoch in (0, 3)
    )
    assert torch.equal(first, second) == fixed


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


@pytest.fixture
def examples(lite: Sam, dataset: Path) -> list[Example]:
    true = finetune_sam._instances(Dataset(dataset).split("train"))
    return [make_example(lite, i, 1.5, np.random.default_rng(0)) for i in true]


def test_cached_embeddings_give_the_same_loss(lite: Sam, dataset: Path, tmp_path: Path) -> None:
    options = config(dataset, tmp_path)
    true = finetune_sam._instances(Dataset(dataset).split("train"))
    cache = finetune_sam._cached_embeddings(lite, true, options)
    assert len(cache) == len(true) * options.repeats
    assert not list(tmp_path.iterdir())  # the file is gone, its content is not
    copies = np.array([5, 0, 3])
    views = [finetune_sam._training_example(lite, true, options, 7, i) for i in copies]
    with torch.no_grad():
        cached = finetune_sam._loss(lite, views, cache[copies], options)
        fresh = finetune_sam._loss(lite, views, None, options)
        other = finetune_sam._loss(lite, views, cache[copies[::-1]], options)
    assert cached.item() == pytest.approx(fresh.item(), rel=2e-3)
    assert abs(other.item() - fresh.item()) > 5 * abs(cached.item() - fresh.item())


def test_padding_does_not_count(lite: Sam, examples: list[Example]) -> None:
    """The loss of a window that is not square does not look at what lies below or beside it."""
    wide = Example(examples[0].image, examples[0].box, examples[0].mask[:20], (100, 256))
    decode = prompting.decode

    def with_noise(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, quality = decode(*arguments)
        logits[..., 50:, :] = 1e3
        return logits, quality

    options = config(Path(), Path())
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        clean = finetune_sam._loss(lite, [wide], None, options)
        patch.setattr(prompting, "decode", with_noise)
        noisy = finetune_sam._loss(lite, [wide], None, options)
    assert noisy.item() == clean.item()


# ---- Training --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """What a training left."""

    out: Path
    rows: list[dict[str, float]]
    model: dict[str, torch.Tensor]


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
    best = sams.load_sam(str(finished.out / BEST))
    assert (best.architecture, best.zoom) == ("sam-lite", 1.5)
    val = finetune_sam._instances(Dataset(dataset).split("val"))
    reached = finetune_sam.mean_iou(best, val, best.zoom)
    assert reached == pytest.approx(max(row["val_iou"] for row in finished.rows), abs=0.02)
    assert reached > finetune_sam.mean_iou(_untrained(), val, 1.5) + 0.1


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
    found = train(dataset, tmp_path, train=part, epochs=1, repeats=1).model
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
        options = {"epochs": 3, "train": part, "repeats": 1}
        whole = train(dataset, tmp_path / "whole", **options)
    save_state = training.save_state

    def save_then_die(*arguments: Any) -> None:
        save_state(*arguments)
        if len(arguments[-1]) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_state", save_then_die)
        with pytest.raises(Killed):
            train(dataset, tmp_path / "cut", **options)
    assert not (tmp_path / "cut" / "run.json").exists()
    torch.manual_seed(99)  # another process
    resumed = train(dataset, tmp_path / "cut", **options, resume=True)
    assert resumed.rows == whole.rows
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


def test_stops_early_and_keeps_the_best(
    dataset: Path, tmp_path: Path, no_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [0.3, 0.5, 0.5, 0.4, 0.9]
    saved = []
    monkeypatch.setattr(finetune_sam, "mean_iou", lambda *_: scores.pop(0))
    monkeypatch.setattr(sams, "save_sam", lambda *_: saved.append(len(scores)))
    done = train(dataset, tmp_path, epochs=9, patience=2)
    assert [row["val_iou"] for row in done.rows] == [0.3, 0.5, 0.5, 0.4]
    assert saved == [4, 3]  # scores left over after the first and the second epoch


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
    done = train(data, tmp_path / "out", epochs=3, patience=1)
    assert len(done.rows) == 3
    assert all(math.isnan(row["val_iou"]) for row in done.rows)
    assert (tmp_path / "out" / BEST).is_file()
    assert "segmenter: " in capsys.readouterr().out


def test_no_defects_to_train_on(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "d", {"train": [[]], "val": VAL})
    with pytest.raises(UserError, match=r"^--data: expected defects in .*train split, found none"):
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


def test_the_rate_rises_and_falls() -> None:
    rates = [finetune_sam._learning_rate(step, 100) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[52] == pytest.approx(0.5, abs=0.02)
    assert rates[100] == pytest.approx(0, abs=1e-9)


def test_training_keeps_batchnorm_and_trains_attention_biases() -> None:
    """MobileSAM's attention would use biases cached before the first step in evaluation mode."""
    pytest.importorskip("ultralytics")
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
