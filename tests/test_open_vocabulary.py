"""What fine-tuning leaves of an open vocabulary: the report, and `--freeze-text`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
import torch
from detections import detections
from hypothesis import given, settings
from hypothesis import strategies as st
from rectangles import CLASSES, write_dataset
from torch import nn

from pipeline.config import FinetuneYoloConfig
from pipeline.data.dataset import Sample
from pipeline.data.files import read_json
from pipeline.errors import UserError
from pipeline.models import open_vocabulary, text, yolo_world
from pipeline.models.open_vocabulary import agreement, compare
from pipeline.models.yolo_trainer import PromptTrainer
from pipeline.stages import finetune_yolo

SCRATCH = "yolov8n-worldv2.yaml"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- how well boxes agree


def samples(count: int, folder: Path = Path("nowhere")) -> list[Sample]:
    """Of 96 x 64 pixels, with ids that are not their places."""
    return [Sample(7 + i, folder / f"{i}.png", 96, 64, ()) for i in range(count)]


Row = tuple[float, ...]


@pytest.mark.parametrize(
    ("before", "after", "mean_best_iou", "ap50"),
    [
        ([[(0, 0, 10, 10, 0, 0.9)]], [[(0, 0, 10, 10, 0, 0.2)]], 1, 1),
        ([[(0, 0, 10, 10, 0, 0.9)]], [[(5, 0, 15, 10, 0, 0.9)]], 1 / 3, 0),
        ([[(0, 0, 10, 10, 0, 0.9)]], [[(2, 0, 10, 10, 0, 0.9)]], 0.8, 1),
        ([[(0, 0, 10, 10, 0, 0.9)]], [[]], 0, 0),
        ([[], []], [[], [(0, 0, 10, 10, 0, 0.9)]], None, None),
        # found in the other image
        ([[(0, 0, 10, 10, 0, 0.9)], []], [[], [(0, 0, 10, 10, 0, 0.9)]], 0, 0),
        # a new box, surer than the old one: a precision of 1/2 at all recalls
        ([[(0, 0, 10, 10, 0, 0.9)]],
         [[(50, 30, 60, 40, 0, 0.9), (0, 0, 10, 10, 0, 0.8)]], 1, 0.5),
        # one of two: a recall of 1/2, so 51 of COCO's 101 recall points
        ([[(0, 0, 10, 10, 0, 0.9)], [(0, 0, 10, 10, 0, 0.9)]],
         [[(0, 0, 10, 10, 0, 0.9)], []], 0.5, 51 / 101),
    ],
)  # fmt: skip
def test_agreement(
    before: Sequence[Sequence[Row]],
    after: Sequence[Sequence[Row]],
    mean_best_iou: float | None,
    ap50: float | None,
) -> None:
    old, new = ([detections(*rows) for rows in side] for side in (before, after))
    found = agreement(samples(len(before)), old, new)
    assert found["mean_best_iou"] == (mean_best_iou and pytest.approx(mean_best_iou, abs=1e-4))
    assert found["ap50"] == (ap50 and pytest.approx(ap50, abs=1e-4))


box = st.tuples(
    st.integers(0, 40), st.integers(0, 20), st.integers(41, 96), st.integers(21, 64),
    st.just(0), st.floats(0.1, 1),
)  # fmt: skip
images = st.lists(st.lists(box, max_size=3), min_size=2, max_size=2)


@given(images, images)
@settings(max_examples=40)
def test_agreement_is_at_most_that_of_boxes_with_themselves(
    before: list[list[Row]], after: list[list[Row]]
) -> None:
    old, new = ([detections(*rows) for rows in side] for side in (before, after))
    found = agreement(samples(2), old, new)
    if not any(before):
        assert found == {"mean_best_iou": None, "ap50": None}
        return
    assert agreement(samples(2), old, old)["mean_best_iou"] == 1
    assert found["mean_best_iou"] is not None and 0 <= found["mean_best_iou"] <= 1
    both = [sv.Detections.merge([a, b]) for a, b in zip(old, new, strict=True)]
    assert agreement(samples(2), old, both)["mean_best_iou"] == 1, "more boxes cover no less"


# ---------------------------------------------------------------- two models


@pytest.fixture(scope="module")
def model() -> Any:
    """A network whose scores differ from place to place and from prompt to prompt."""
    torch.manual_seed(3)
    network = yolo_world.load_model(SCRATCH)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0, 0.2)
    for contrast in network.model[-1].cv4:
        contrast.bias.data.fill_(-2.0)
    return network


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(2):
        cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 256, (64, 96, 3), np.uint8))
    return samples(2, folder)


@pytest.fixture(scope="module")
def prompts() -> dict[str, torch.Tensor]:
    return dict(zip(("bolt", "nut"), torch.randn(2, 512), strict=True))


def compared(before: Any, after: Any, prompts: Any, pictures: list[Sample]) -> dict[str, Any]:
    return compare(deepcopy(before), deepcopy(after), prompts, pictures, 96, CPU)


def test_a_model_that_stays_keeps_all(
    model: Any, prompts: dict[str, torch.Tensor], pictures: list[Sample]
) -> None:
    report = compared(model, model, prompts, pictures)
    assert report["images"] == 2
    assert list(report["prompts"]) == ["bolt", "nut"]
    for found in report["prompts"].values():
        assert found["before"] == found["after"]
        assert found["before"]["boxes"] > 3
        assert (found["mean_best_iou"], found["ap50"]) == (1, 1)
    bolt, nut = (found["before"] for found in report["prompts"].values())
    assert bolt["top_score"] != nut["top_score"]


def test_a_prompt_does_not_depend_on_the_others(
    model: Any, prompts: dict[str, torch.Tensor], pictures: list[Sample]
) -> None:
    whole = compared(model, model, prompts, pictures)
    alone = compared(model, model, {"nut": prompts["nut"]}, pictures)
    assert alone["prompts"]["nut"] == whole["prompts"]["nut"]


def test_scores_count_from_the_threshold(
    model: Any,
    prompts: dict[str, torch.Tensor],
    pictures: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = compared(model, model, prompts, pictures)["prompts"]["bolt"]["before"]
    assert found["top_score"] >= found["mean_score"] > open_vocabulary.MIN_SCORE
    monkeypatch.setattr(open_vocabulary, "MIN_SCORE", found["top_score"] - 1e-3)
    best = compared(model, model, prompts, pictures)["prompts"]["bolt"]["before"]
    assert 1 <= best["boxes"] < found["boxes"]
    assert best["top_score"] == found["top_score"]


def test_a_model_that_forgets_is_found_out(
    model: Any,
    prompts: dict[str, torch.Tensor],
    pictures: list[Sample],
    capsys: pytest.CaptureFixture[str],
) -> None:
    mute = deepcopy(model)
    for contrast in mute.model[-1].cv4:
        contrast.bias.data.fill_(-30.0)
    report = compared(model, mute, {"[b]olt": prompts["bolt"]}, pictures)
    found = report["prompts"]["[b]olt"]
    assert found["after"] == {"boxes": 0, "top_score": None, "mean_score": None}
    assert (found["mean_best_iou"], found["ap50"]) == (0, 0)
    back = compared(mute, model, prompts, pictures)["prompts"]["bolt"]
    assert (back["mean_best_iou"], back["ap50"]) == (None, None)
    assert back["after"] == found["before"]
    open_vocabulary.show(report)
    row = next(line for line in capsys.readouterr().out.splitlines() if "olt" in line)
    top = f"{found['before']['top_score']:.2f}"
    assert row.split() == ["[b]olt", str(found["before"]["boxes"]), "0", top, "-", "0.00", "0.00"]


# ---------------------------------------------------------------- a whole fine-tuning


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    defects = [[("scratch", (10, 10, 40, 30))], [("stain", (50, 30, 80, 60))], []]
    return write_dataset(tmp_path_factory.mktemp("data") / "d", {"train": defects, "val": defects})


@pytest.fixture(scope="module")
def base(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of the dataset's classes whose text branch is trained, by all that one can see."""
    known = yolo_world.set_prompts(deepcopy(model), CLASSES, torch.randn(2, 512))
    for contrast in known.model[-1].cv4:
        contrast.logit_scale.data.fill_(-0.5)
    path = tmp_path_factory.mktemp("base") / "base.pt"
    yolo_world.save_checkpoint(yolo_world.plain(known), path)
    return path


def config(dataset: Path, out: Path, model: Path | str, **changes: Any) -> FinetuneYoloConfig:
    given = {
        "data": dataset, "out": out, "model": str(model), "text": "learned", "epochs": 1,
        "batch": 2, "image_size": 64, "device": "cpu", "offline": True,
    }  # fmt: skip
    return FinetuneYoloConfig.model_validate(given | changes)


def clip(texts: list[str], *, offline: bool) -> torch.Tensor:
    assert offline
    return torch.stack([torch.full((512,), float(len(text))).cos() for text in texts])


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """In half precision, which finished checkpoints have."""
    found = torch.load(path, weights_only=False)["model"]
    state = {**found.state_dict(), "txt_feats": found.txt_feats.detach()}
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


@pytest.fixture(scope="module", params=[True, False], ids=["frozen", "free"])
def finetuned(
    request: pytest.FixtureRequest,
    dataset: Path,
    base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[bool, Path]:
    """Whether the text branch was frozen, and the run folder."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as context:
        context.setattr(text, "clip_embeddings", clip)
        context.setattr(
            finetune_yolo,
            "PromptTrainer",
            lambda overrides: PromptTrainer(overrides=overrides | {"plots": False}),
        )
        asked = ("stain", "a bolt", "nut")
        changes = {"freeze_text": request.param, "unseen_prompts": asked, "epochs": 2}
        finetune_yolo.run(config(dataset, out, base, **changes))
    return request.param, out


TEXT = ("txt_feats", "model.22.cv3.", "model.22.cv4.")
ATTENTION = tuple(f"model.{i}.attn." for i in (12, 15, 18, 21))


def test_a_frozen_text_branch_stays_to_the_bit(finetuned: tuple[bool, Path], base: Path) -> None:
    """With the statistics of its BatchNorms; all other layers are trained."""
    frozen, out = finetuned
    before, after = tensors(base), tensors(out / "detector.pt")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    text_branch = {key for key in before if key.startswith((*TEXT, *ATTENTION))}
    assert {key for key in text_branch if "running_mean" in key}
    assert not frozen or not changed & text_branch
    assert frozen or {"txt_feats", "model.22.cv4.0.bias", "model.12.attn.gl.weight"} <= changed
    weights = {key for key in before if key.endswith("conv.weight") and ".dfl." not in key}
    trained = weights - text_branch
    assert {"model.0.conv.weight", "model.12.cv2.conv.weight"} < trained <= changed


def test_the_report_lies_beside_the_weights(finetuned: tuple[bool, Path]) -> None:
    report = read_json(finetuned[1] / open_vocabulary.REPORT)
    assert list(report["prompts"]) == ["a bolt", "nut"], "'stain' was trained"
    assert report["images"] == 3
    assert all(found["before"]["boxes"] for found in report["prompts"].values())
    assert (finetuned[1] / "detector.pt").is_file()


class Untrained:
    """A training that changes nothing."""

    def __init__(self, overrides: dict[str, Any]) -> None:
        self.start = Path(overrides["model"])

    def train(self) -> None:
        self.start.with_name("last.pt").write_bytes(self.start.read_bytes())


@pytest.mark.parametrize(
    ("known", "changes", "line"),
    [
        (True, {}, "open vocabulary: not measured (expected the package clip-anytorch"),
        (False, {}, "open vocabulary: none to lose, the text branch began at random"),
        (True, {"unseen_prompts": ()}, None),
        (True, {"unseen_prompts": ("stain",)}, None),
    ],
    ids=["no CLIP", "random start", "nothing asked", "all trained"],
)
def test_without_a_report_one_line_says_why(
    dataset: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    known: bool,
    changes: dict[str, Any],
    line: str | None,
) -> None:
    monkeypatch.setitem(sys.modules, "clip", None)
    monkeypatch.setattr(finetune_yolo, "PromptTrainer", Untrained)
    finetune_yolo.run(config(dataset, tmp_path / "out", base if known else SCRATCH, **changes))
    lines = [row for row in capsys.readouterr().out.splitlines() if "open vocabulary" in row]
    assert len(lines) == (line is not None)
    assert all(row.startswith(str(line)) for row in lines)
    assert not (tmp_path / "out" / open_vocabulary.REPORT).exists()
    assert (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("known", "changes", "problem"),
    [
        (False, {}, "expected a model whose text branch is trained, found one that begins"),
        (False, {"text": "clip"}, "expected a model whose text branch is trained, found one that"),
        (True, {}, "expected prompts by CLIP, or a model trained for these classes, found learned"),
    ],
)
def test_freezing_what_begins_at_random_is_refused(
    model: Any,
    dataset: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    known: bool,
    changes: dict[str, Any],
    problem: str,
) -> None:
    """Nothing would be kept. Here the model that is known is one of other classes."""
    monkeypatch.setattr(text, "clip_embeddings", clip)
    other = yolo_world.set_prompts(yolo_world.load_model(str(base)), ("a", "b"), None)
    yolo_world.save_checkpoint(yolo_world.plain(other), tmp_path / "other.pt")
    start = tmp_path / "other.pt" if known else SCRATCH
    with pytest.raises(UserError) as raised:
        finetune_yolo.run(config(dataset, tmp_path / "out", start, freeze_text=True, **changes))
    assert raised.value.problems[0].startswith(f"--freeze-text: {problem}")
    assert raised.value.problems[0].endswith("nothing to keep")
    assert not (tmp_path / "out").exists()


def test_shipped_weights_have_a_text_branch_and_random_ones_do_not() -> None:
    shipped, random = (yolo_world.load_model(name) for name in ("yolo-world-n", SCRATCH))
    assert yolo_world.has_trained_text(shipped)
    assert not yolo_world.has_trained_text(random)
