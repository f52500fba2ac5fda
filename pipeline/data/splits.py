"""Splits: which images train, validate and test. Stratified by class and seeded.

Every class is shuffled by a generator of its own, seeded by the seed and the class's name, so that
adding a class leaves the others' splits as they were. A split maps train, val and test to image
names; within one, names are sorted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

Split = dict[str, list[str]]
Groups = Mapping[str, Sequence[str]]  # class -> its images' names

STUDY_TEST = 0.2  # 63 of 313 images


def by_fractions(groups: Groups, fractions: tuple[float, float, float], seed: int) -> Split:
    """Split every class by `fractions` of train, val and test.

    Sizes are rounded; a class of three or more images has at least one in each part whose fraction
    is above 0, and every class has at least one in train.
    """
    parts = {}
    for cls, names in groups.items():
        _, val, test = sizes(len(names), fractions)
        parts[cls] = _cut(_shuffled(names, cls, seed), val, test)
    return _merged(parts)


def study(groups: Groups, val_fraction: float, seed: int) -> Split:
    """A split in the sizes of the classifier study: 250 training and 63 test images of 313.

    The test part is 20 % of all images, rounded, dealt to the classes by largest remainder. The
    validation part is `val_fraction` of the rest: nothing is ever chosen on the test images.
    """
    tests = _apportioned({cls: len(names) for cls, names in groups.items()}, STUDY_TEST)
    parts = {}
    for cls, names in groups.items():
        rest = len(names) - tests[cls]
        _, val, _ = sizes(rest, (1 - val_fraction, val_fraction, 0))
        parts[cls] = _cut(_shuffled(names, cls, seed), val, tests[cls])
    return _merged(parts)


def by_folds(groups: Groups, folds: int, val_fraction: float, seed: int) -> list[Split]:
    """Cross-validation: every image is tested in exactly one fold.

    Validation takes `val_fraction` of the whole class from what a fold does not test, at least one
    image where two are left; the remaining ones train.
    """
    dealt = {}
    for cls, names in groups.items():
        first = int(_generator(cls, seed).integers(folds))  # else small classes all miss the last
        order = _shuffled(names, cls, seed)
        dealt[cls] = [order[(k - first) % folds :: folds] for k in range(folds)]
    splits = []
    for k in range(folds):
        parts = {}
        for cls, hands in dealt.items():
            rest = [name for step in range(1, folds) for name in hands[(k + step) % folds]]
            val = _rounded(val_fraction * len(groups[cls]))
            if val_fraction > 0:
                val = max(val, 1)
            val = min(val, max(len(rest) - 1, 0))
            parts[cls] = {"train": rest[val:], "val": rest[:val], "test": hands[k]}
        splits.append(_merged(parts))
    return splits


def only_tested(split: Split, names: Collection[str]) -> Split:
    """The split with these images in no part but the test part, if they are in it."""
    return {
        part: kept if part == "test" else [name for name in kept if name not in names]
        for part, kept in split.items()
    }


def sizes(count: int, fractions: tuple[float, float, float]) -> tuple[int, int, int]:
    """Sizes of train, val and test for a class of `count` images; their sum is `count`."""
    val, test = (_rounded(count * fraction) for fraction in fractions[1:])
    if count >= 3:
        val = max(val, 1) if fractions[1] > 0 else 0
        test = max(test, 1) if fractions[2] > 0 else 0
    while count and val + test >= count:  # leave one to train
        if val > test:
            val -= 1
        else:
            test -= 1
    return count - val - test, val, test


def _rounded(value: float) -> int:
    """Nearest whole number, halves up; the margin absorbs floating point (0.1 * 15 -> 2)."""
    return int(value + 0.5 + 1e-9)


def _apportioned(counts: Mapping[str, int], fraction: float) -> dict[str, int]:
    """Deal `fraction` of the total to the classes: whole parts, then the largest remainders.

    A class of three or more images has at least one.
    """
    shares = {cls: count * fraction for cls, count in counts.items()}
    result = {cls: max(int(shares[cls] + 1e-9), int(counts[cls] >= 3)) for cls in counts}
    left = max(_rounded(sum(shares.values())) - sum(result.values()), 0)
    by_remainder = sorted(shares, key=lambda cls: (result[cls] - shares[cls], cls))
    for cls in by_remainder[:left]:
        result[cls] += 1
    return result


def _generator(cls: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(cls.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def _shuffled(names: Sequence[str], cls: str, seed: int) -> list[str]:
    ordered = sorted(names)
    return [ordered[i] for i in _generator(cls, seed).permutation(len(ordered))]


def _cut(names: list[str], val: int, test: int) -> Split:
    return {"test": names[:test], "val": names[test : test + val], "train": names[test + val :]}


def _merged(parts: Mapping[str, Split]) -> Split:
    return {
        split: sorted(name for part in parts.values() for name in part[split])
        for split in ("train", "val", "test")
    }
