"""LoRA in a SAM's encoder: what is trained, what is written, what resumes. On a tiny ViT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rectangles import Defects, write_dataset
from segment_anything import sam_model_registry
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)

from pipeline.config import FinetuneSamConfig, build
from pipeline.errors import UserError
from pipeline.models import lora, sam_lite, training
from pipeline.models import sam as sams
from pipeline.stages import finetune_sam
from pipeline.stages.finetune_sam import BEST

SIDE, DIM = 64, 16
PROJECTIONS = {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.attn.qkv", "blocks.1.attn.proj"}


def tiny_vit() -> Sam:
    """A SAM of segment-anything's own parts, one block with windows and one without."""
    encoder = ImageEncoderViT(
        img_size=SIDE,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        out_chans=DIM,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )
    decoder = MaskDecoder(
        transformer_dim=DIM,
        transformer=TwoWayTransformer(depth=2, embedding_dim=DIM, num_heads=2, mlp_dim=32),
        iou_head_hidden_dim=DIM,
    )
    return Sam(encoder, PromptEncoder(DIM, (8, 8), (SIDE, SIDE), 4), decoder)


@pytest.fixture
def sam() -> Sam:
    torch.manual_seed(0)
    return tiny_vit().eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def encoded(sam: Sam, image: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return sam.image_encoder(image)


def take_steps(sam: Sam, image: torch.Tensor, steps: int = 5) -> None:
    """Train the updates alone, towards anything."""
    optimizer = torch.optim.AdamW(lora.lora_parameters(sam), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        sam.image_encoder(image).square().mean().backward()
        optimizer.step()


# ---- The model -------------------------------------------------------------------------------


def test_updates_start_at_zero_and_alone_are_trained(sam: Sam, image: torch.Tensor) -> None:
    before = encoded(sam, image)
    lora.add_lora(sam)
    assert torch.equal(encoded(sam, image), before)
    assert sam.image_encoder.img_size == SIDE
    trained = {n for n, p in sam.image_encoder.named_parameters() if p.requires_grad}
    assert {name.split("model.")[-1].split(".lora_")[0] for name in trained} == PROJECTIONS
    parameters = lora.lora_parameters(sam)
    assert len(parameters) == len(trained) == 2 * len(PROJECTIONS)
    assert all(lora.RANK in parameter.shape for parameter in parameters)


@pytest.mark.parametrize(("architecture", "blocks"), [("sam-vit-b", 12), ("mobile-sam", 10)])
def test_all_attention_of_the_published_models_is_updated(architecture: str, blocks: int) -> None:
    """And nothing else: the patch embedding of the ViTs has a `proj` too."""
    if architecture == "mobile-sam":
        sam = sams.build_mobile_sam()
    else:
        with torch.device("meta"):
            sam = sam_model_registry["vit_b"]()
    lora.add_lora(sam)
    names = {n.split(".lora_")[0] for n, _ in sam.named_parameters() if ".lora_" in n}
    assert len(names) == 2 * blocks
    assert all(name.endswith((".attn.qkv", ".attn.proj")) for name in names)


def test_merged_weights_compute_what_the_trained_model_does(
    sam: Sam, image: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sam.state_dict().keys()
    before = encoded(sam, image)
    lora.add_lora(sam)
    take_steps(sam, image)
    state = {key: value.clone() for key, value in sam.state_dict().items()}
    trained = encoded(sam, image)
    assert (trained - before).abs().max() > 0.1
    merged = lora.merged(sam)
    assert merged.state_dict().keys() == names
    torch.testing.assert_close(encoded(merged, image), trained, rtol=0, atol=1e-5)
    # Training goes on from exactly where it was.
    assert sam.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in sam.state_dict().items())
    take_steps(sam, image, 1)
    assert not torch.equal(encoded(sam, image), trained)
    # What is written loads as any other SAM does.
    monkeypatch.setitem(sams.ARCHITECTURES, "tiny-vit", tiny_vit)
    sams.save_sam(tmp_path / BEST, sams.LoadedSam(merged, "tiny-vit", 0))
    loaded = sams.load_sam(str(tmp_path / BEST)).model.eval()
    torch.testing.assert_close(encoded(loaded, image), trained, rtol=0, atol=0.02)


def test_an_encoder_without_attention() -> None:
    with pytest.raises(UserError, match=r"^--train lora: expected a SAM whose encoder has att"):
        lora.add_lora(sam_lite.build_sam_lite())


def test_without_the_package(sam: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"expected the package peft \(pip install 'pipeline\[lora"):
        lora.add_lora(sam)


# ---- The command -----------------------------------------------------------------------------

IMAGES: tuple[Defects, ...] = (
    [("scratch", (10, 12, 40, 30))],
    [("stain", (50, 40, 90, 64)), ("scratch", (2, 2, 30, 20))],
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "d"
    return write_dataset(root, {"train": IMAGES, "val": IMAGES[:1]})


@pytest.fixture
def start(sam: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sams.ARCHITECTURES, "tiny-vit", tiny_vit)
    sams.save_sam(tmp_path / "start.safetensors", sams.LoadedSam(sam, "tiny-vit", 0))
    return tmp_path / "start.safetensors"


def train(data: Path, model: object, out: Path, **options: Any) -> None:
    tiny = {"epochs": 3, "repeats": 2, "batch": 2, "lr": 1e-2, "device": "cpu", "train": "lora"}
    values = tiny | {"data": data, "model": str(model), "out": out} | options
    finetune_sam.run(build(FinetuneSamConfig, values))


def test_training_changes_attention_and_decoder_alone(
    dataset: Path, start: Path, tmp_path: Path
) -> None:
    train(dataset, start, tmp_path / "out")
    before, after = (
        sams.load_sam(str(path)).model.state_dict() for path in (start, tmp_path / "out" / BEST)
    )
    assert after.keys() == before.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    encoder = {key for key in changed if not key.startswith("mask_decoder.")}
    assert encoder == {f"image_encoder.{name}.weight" for name in PROJECTIONS}
    assert len(changed) > len(encoder)


class Killed(BaseException):
    pass


def test_a_resumed_training_equals_an_uninterrupted_one(
    dataset: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(dataset, start, tmp_path / "whole")
    save_state = training.save_state

    def save_then_die(*arguments: Any) -> None:
        save_state(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_state", save_then_die)
        with pytest.raises(Killed):
            train(dataset, start, tmp_path / "cut")
    torch.manual_seed(99)  # another process
    train(dataset, start, tmp_path / "cut", resume=True)
    for name in (BEST, "results.csv"):
        whole, cut = (tmp_path / run / name for run in ("whole", "cut"))
        assert cut.read_bytes() == whole.read_bytes()
    states = [torch.load(tmp_path / run / "last.pt")["model"] for run in ("whole", "cut")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0] | states[1])


def test_sam_lite_is_refused_before_an_earlier_result_is_touched(
    dataset: Path, start: Path, tmp_path: Path
) -> None:
    train(dataset, start, tmp_path / "out", epochs=1, train="decoder")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=r"^--train lora: expected a SAM whose encoder"):
        train(dataset, sams.IMAGENET_START, tmp_path / "out", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
