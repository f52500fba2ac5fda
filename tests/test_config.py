"""Configurations: checked as a whole, every problem one line that names file or flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.config import (
    Config,
    ConvertConfig,
    FinetuneSamConfig,
    FinetuneYoloConfig,
    OverlayConfig,
    RunConfig,
    SynthConfig,
    build,
    read_yaml,
)
from pipeline.errors import UserError

YOLO = {"data": "d", "out": "o"}


def problems(cls: type[Config], values: dict[Any, Any], **where: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        build(cls, values, **where)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("cls", "values", "expected"),
    [
        (SynthConfig, {}, ["--out: required, not given"]),
        (SynthConfig, {"out": 3}, ["--out: expected a path, found 3"]),
        (
            SynthConfig,
            {"out": "o", "size": 63},
            ["--size: expected greater than or equal to 64, found 63"],
        ),
        (
            SynthConfig,
            {"out": "o", "train_good": "1e9"},
            ["--train-good: expected a whole number, found '1e9'"],
        ),
        (SynthConfig, {"out": "o", "seed": 1.5}, ["--seed: expected a whole number, found 1.5"]),
        (SynthConfig, {"out": "o", 1: 2}, ["1: unknown key"]),
        (FinetuneYoloConfig, YOLO | {"lr": "nan"}, ["--lr: expected a finite number, found 'nan'"]),
        (FinetuneYoloConfig, YOLO | {"lr": "inf"}, ["--lr: expected a finite number, found 'inf'"]),
        (FinetuneYoloConfig, YOLO | {"lr": 0}, ["--lr: expected greater than 0, found 0"]),
        (FinetuneYoloConfig, YOLO | {"lr": "x"}, ["--lr: expected a number, found 'x'"]),
        (FinetuneYoloConfig, YOLO | {"epoch": 1}, ["epoch: unknown key, did you mean 'epochs'?"]),
        (FinetuneYoloConfig, YOLO | {"qqq": 1}, ["qqq: unknown key"]),
        (
            FinetuneYoloConfig,
            YOLO | {"prompts": "x"},
            ["--prompts: expected keys and values, found 'x'"],
        ),
        (
            FinetuneYoloConfig,
            YOLO | {"text": "clap"},
            ["--text: expected 'auto', 'clip' or 'learned', found 'clap'"],
        ),
        (
            ConvertConfig,
            {"source": "s", "out": "o", "fractions": (0.5, 0.3, 0.1)},
            ["--fractions: expected a sum of 1, found 0.9"],
        ),
        (
            ConvertConfig,
            {"source": "s", "out": "o", "fractions": (0, 0.5, 0.5), "folds": 1},
            [
                "--fractions: expected a training part above 0, found 0",
                "--folds: expected 0 or at least 2, found 1",
            ],
        ),
        (
            ConvertConfig,
            {"source": "s", "out": "o", "one_per_image": "misplaced"},
            ["--one-per-image: expected a list, found 'misplaced'"],
        ),
        (FinetuneSamConfig, {"out": "o"}, ["--data: required, not given"]),
        (FinetuneSamConfig, {"out": "o", "data": []}, ["--data: expected more values, found []"]),
        (FinetuneSamConfig, YOLO | {"patience": 8}, ["patience: unknown key"]),
        (OverlayConfig, {"out": "o", "source": "s", "threshold": 1.01},
         ["--threshold: expected less than or equal to 1, found 1.01"]),
    ],
)  # fmt: skip
def test_a_bad_value_is_one_line_with_what_was_expected_and_found(
    cls: type[Config], values: dict[Any, Any], expected: list[str]
) -> None:
    assert problems(cls, values) == expected


@pytest.mark.parametrize(
    ("fractions", "expected"),
    [
        ((0.5, 0.5), "more values"),
        ((0.25, 0.25, 0.25, 0.25), "fewer values"),
    ],
)
def test_a_tuple_of_the_wrong_length_is_not_called_missing(
    fractions: tuple[float, ...], expected: str
) -> None:
    values = {"source": "s", "out": "o", "fractions": fractions}
    (problem,) = problems(ConvertConfig, values, flags={"fractions": "--fractions"})
    assert problem.startswith(f"--fractions: expected {expected}, found (")


def test_all_problems_come_at_once_and_each_names_where_it_came_from() -> None:
    found = problems(
        FinetuneYoloConfig,
        {"out": "o", "epochs": "many", "lr": -1, "bacth": 4},
        flags={"lr": "--lr"},
        file=Path("my.yaml"),
    )
    assert sorted(found) == [
        "--data: required, not given",
        "--lr: expected greater than 0, found -1",
        "my.yaml: bacth: unknown key, did you mean 'batch'?",
        "my.yaml: epochs: expected a whole number, found 'many'",
    ]


def test_a_long_value_is_cut_in_the_message() -> None:
    (problem,) = problems(SynthConfig, {"out": "o", "size": "9" * 5000 + "x"})
    assert len(problem) < 100


def test_text_from_flags_and_numbers_from_yaml_become_the_types_of_the_fields() -> None:
    settings = build(
        FinetuneYoloConfig,
        {"data": "d", "out": "o", "epochs": "7", "lr": "1e-4", "device": 0, "prompts": {1: 2}},
    )
    assert (settings.epochs, settings.lr, settings.device) == (7, 1e-4, "0")
    assert settings.prompts == {"1": "2"}
    assert settings.data == Path("d")


@pytest.mark.parametrize(
    ("data", "expected"), [("d", ("d",)), (Path("d"), ("d",)), (["a", "b"], ("a", "b"))]
)
def test_a_sam_is_trained_on_one_dataset_or_several(data: Any, expected: tuple[str, ...]) -> None:
    settings = build(FinetuneSamConfig, {"data": data, "out": "o"})
    assert settings.data == tuple(map(Path, expected))


def test_a_configuration_cannot_be_changed() -> None:
    settings = build(SynthConfig, {"out": "o"})
    with pytest.raises(ValueError, match="frozen"):
        settings.size = 128


RUN = {"out": "o", "convert": {"source": "transistor"}}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"finetune_yolo": {"epoch": 3}},
            ["f.yaml: finetune_yolo.epoch: unknown key, did you mean 'epochs'?"],
        ),
        (
            {"finetune_classifier": {"a": {"modle": "resnet18"}}},
            ["f.yaml: finetune_classifier.a.modle: unknown key, did you mean 'model'?"],
        ),
        (
            {"finetune_sam": {"epochs": 0, "train": "x"}, "overlay": {"height": 3}},
            [
                "f.yaml: finetune_sam.epochs: expected greater than 0, found 0",
                "f.yaml: finetune_sam.train: expected 'decoder', 'neck', 'lora' or 'all', "
                "found 'x'",
                "f.yaml: overlay.height: expected greater than or equal to 64, found 3",
            ],
        ),
        ({"segment": [1]}, ["f.yaml: segment: expected keys and values, found [1]"]),
        ({"evaluate": None}, ["f.yaml: evaluate: expected keys and values, found None"]),
        (
            {"finetune_classifier": {"a": 3}},
            ["f.yaml: finetune_classifier.a: expected keys and values, found 3"],
        ),
        (
            {"segmen": {}, "finetune_yolo": {"lr": "nan"}},
            [
                "f.yaml: finetune_yolo.lr: expected a finite number, found 'nan'",
                "f.yaml: segmen: unknown key, did you mean 'segment'?",
            ],
        ),
        (
            {"convert": {"source": "a", "fractions": [1, 1, 1]}},
            ["f.yaml: convert.fractions: expected a sum of 1, found 3"],
        ),
        (
            {"convert": {}},
            ["f.yaml: convert.source: expected a category, or a section synth, found neither"],
        ),
        (
            {"synth": {}},
            ["f.yaml: convert.source: expected none beside a section synth, found one"],
        ),
        (
            {"finetune_sam": {}, "segment": {"sam": "mobile-sam"}},
            ["f.yaml: segment.sam: expected none beside a section finetune_sam, found one"],
        ),
    ],
)
def test_sections_of_a_run_are_checked_as_their_commands_would(
    sections: dict[str, Any], expected: list[str]
) -> None:
    assert sorted(problems(RunConfig, RUN | sections, file=Path("f.yaml"))) == expected


def test_a_section_keeps_only_what_was_given() -> None:
    settings = build(RunConfig, RUN | {"finetune_yolo": {"epochs": 3}})
    assert settings.finetune_yolo == {"epochs": 3}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "expected a YAML file, found nothing there"),
        (b"a: [1", "expected a YAML file, found: while parsing a flow sequence"),
        (b"a: 1\n b: 2", "expected a YAML file, found: mapping values are not allowed here"),
        (b"- 1\n- 2\n", "expected keys and values, found list"),
        (b"just text", "expected keys and values, found str"),
        (b"a: \xff\xfe", "expected a YAML file, found: 'utf-8' codec can't decode"),
        (b"a: !!python/object/apply:os.getcwd []", "expected a YAML file, found: could not det"),
    ],
)
def test_a_bad_yaml_file_is_named_with_its_fault(
    tmp_path: Path, content: bytes | None, expected: str
) -> None:
    path = tmp_path / "ü ber.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_yaml_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a YAML file, found: Is a directory"):
        read_yaml(tmp_path)


def test_an_empty_yaml_file_has_no_keys(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    assert read_yaml(tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize("value", ["", None])
def test_the_mvtec_root_has_a_default_even_if_the_variable_is_empty(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("PIPELINE_MVTEC_ROOT", raising=False)
    if value is not None:
        monkeypatch.setenv("PIPELINE_MVTEC_ROOT", value)
    assert build(RunConfig, RUN).mvtec_root == Path("datasets/mvtec_ad")
    monkeypatch.setenv("PIPELINE_MVTEC_ROOT", "/data")
    assert build(RunConfig, RUN).mvtec_root == Path("/data")


def test_every_input_names_a_field() -> None:
    for cls in config.SECTIONS.values():
        assert set(cls.inputs) <= set(cls.model_fields)


def test_every_option_is_described() -> None:
    for cls in config.SECTIONS.values():
        bare = [name for name, info in cls.model_fields.items() if not info.description]
        assert not bare, cls
