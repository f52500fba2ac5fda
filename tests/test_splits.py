"""Splits: sizes worked out by hand, and what must hold for any classes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import splits

SPLITS = ("train", "val", "test")
STANDARD = (0.7, 0.1, 0.2)
TRANSISTOR = {"good": 273, "bent_lead": 10, "cut_lead": 10, "damaged_case": 10, "misplaced": 10}
COUNTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 40), min_size=1)
SEEDS = st.integers(0, 2**32 - 1)


def groups(counts: dict[str, int]) -> dict[str, list[str]]:
    return {cls: [f"{cls}__{i:03}.png" for i in range(count)] for cls, count in counts.items()}


def sizes_of(split: splits.Split, cls: str) -> tuple[int, ...]:
    return tuple(sum(name.startswith(f"{cls}__") for name in split[part]) for part in SPLITS)


@st.composite
def fractions(draw: st.DrawFn) -> tuple[float, float, float]:
    train = draw(st.integers(1, 100))
    val = draw(st.integers(0, 100 - train))
    return train / 100, val / 100, (100 - train - val) / 100


@pytest.mark.parametrize(
    ("count", "fractions", "expected"),
    [
        (273, STANDARD, (191, 27, 55)),
        (10, STANDARD, (7, 1, 2)),
        (5, STANDARD, (3, 1, 1)),
        (3, STANDARD, (1, 1, 1)),
        (2, STANDARD, (2, 0, 0)),
        (1, STANDARD, (1, 0, 0)),
        (0, STANDARD, (0, 0, 0)),
        (15, (0.8, 0.1, 0.1), (11, 2, 2)),  # halves round up
        (10, (0.8, 0.0, 0.2), (8, 0, 2)),
        (10, (1.0, 0.0, 0.0), (10, 0, 0)),
        (3, (0.1, 0.45, 0.45), (1, 1, 1)),
        (2, (0.1, 0.45, 0.45), (1, 1, 0)),  # one always trains
        (10, (0.02, 0.49, 0.49), (1, 5, 4)),
    ],
)
def test_sizes(
    count: int, fractions: tuple[float, float, float], expected: tuple[int, ...]
) -> None:
    assert splits.sizes(count, fractions) == expected


@given(COUNTS, fractions(), SEEDS)
def test_fractions_deal_every_image_once(
    counts: dict[str, int], fractions: tuple[float, float, float], seed: int
) -> None:
    split = splits.by_fractions(groups(counts), fractions, seed)
    names = [name for part in SPLITS for name in split[part]]
    assert sorted(names) == sorted(name for members in groups(counts).values() for name in members)
    assert all(split[part] == sorted(split[part]) for part in SPLITS)
    for cls, count in counts.items():
        for size, fraction in zip(sizes_of(split, cls), fractions, strict=True):
            assert size >= (1 if count >= 3 and fraction > 0 else 0)
            assert size == 0 or fraction > 0
            assert abs(size - fraction * count) <= 2


@given(COUNTS, SEEDS)
def test_a_class_does_not_influence_the_others(counts: dict[str, int], seed: int) -> None:
    whole = splits.by_fractions(groups(counts), STANDARD, seed)
    folds = splits.by_folds(groups(counts), 3, 0.1, seed)
    for cls, count in counts.items():
        alone = splits.by_fractions(groups({cls: count}), STANDARD, seed)
        alone_folds = splits.by_folds(groups({cls: count}), 3, 0.1, seed)
        for together, single in ((whole, alone), *zip(folds, alone_folds, strict=True)):
            for part in SPLITS:
                assert [n for n in together[part] if n.startswith(f"{cls}__")] == single[part]


def test_seed_and_class_decide_the_order() -> None:
    members = groups({"a": 30, "b": 30})
    splits_of = [splits.by_fractions(members, STANDARD, seed) for seed in (0, 0, 1)]
    assert splits_of[0] == splits_of[1] != splits_of[2]
    in_test = [{n[3:] for n in splits_of[0]["test"] if n.startswith(cls)} for cls in "ab"]
    assert in_test[0] != in_test[1], "classes of one size must not get one permutation"
    backwards = {cls: names[::-1] for cls, names in reversed(members.items())}
    assert splits.by_fractions(backwards, STANDARD, 0) == splits_of[0]


def test_study_has_250_and_63_images() -> None:
    split = splits.study(groups(TRANSISTOR), 0.1, 0)
    assert len(split["train"]) + len(split["val"]) == 250 and len(split["test"]) == 63
    assert sizes_of(split, "good") == (196, 22, 55)
    for cls in ("bent_lead", "cut_lead", "damaged_case", "misplaced"):
        assert sizes_of(split, cls) == (7, 1, 2)


@given(COUNTS, SEEDS)
def test_study_tests_a_fifth(counts: dict[str, int], seed: int) -> None:
    split = splits.study(groups(counts), 0.1, seed)
    total = sum(counts.values())
    least = sum(max(1, count // 5) if count >= 3 else 0 for count in counts.values())
    assert len(split["test"]) == max(int(total * 2 + 5) // 10, least)
    assert sum(map(len, split.values())) == total == len(set().union(*split.values()))


@given(COUNTS, st.integers(2, 7), st.sampled_from([0.0, 0.1, 0.3]), SEEDS)
def test_folds_test_every_image_once(
    counts: dict[str, int], folds: int, val: float, seed: int
) -> None:
    result = splits.by_folds(groups(counts), folds, val, seed)
    everything = sorted(name for members in groups(counts).values() for name in members)
    assert len(result) == folds
    assert sorted(name for split in result for name in split["test"]) == everything
    for split in result:
        assert sorted(name for part in SPLITS for name in split[part]) == everything
        for cls, count in counts.items():
            train, validate, test = sizes_of(split, cls)
            assert count // folds <= test <= -(-count // folds)
            assert (validate > 0) == (val > 0 and train + validate >= 2)
            assert train > 0 or count - test == 0
            if train > 1:
                assert abs(validate - max(val * count, 1 if val else 0)) <= 0.5 + 1e-6


def test_folds_of_transistor() -> None:
    for split in splits.by_folds(groups(TRANSISTOR), 5, 0.1, 0):
        counts = {cls: sizes_of(split, cls) for cls in TRANSISTOR}
        assert counts["good"] in ((191, 27, 55), (192, 27, 54))
        assert all(counts[cls] == (7, 1, 2) for cls in counts if cls != "good")


def test_small_classes_are_not_all_absent_from_the_same_folds() -> None:
    counts = {f"class{i}": 1 for i in range(40)}
    held = Counter(
        {k: len(s["test"]) for k, s in enumerate(splits.by_folds(groups(counts), 4, 0, 0))}
    )
    assert all(held[fold] > 0 for fold in range(4))


def test_what_is_only_tested_leaves_the_other_parts() -> None:
    split = {"train": ["a", "b"], "val": ["c"], "test": ["d", "e"]}
    kept = {"train": ["b"], "val": [], "test": ["d", "e"]}
    assert splits.only_tested(split, {"a", "c", "d"}) == kept
