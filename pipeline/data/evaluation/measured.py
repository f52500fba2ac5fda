"""All parts together, measured image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pycocotools.cocoeval import COCOeval

from pipeline.data import costs, metrics
from pipeline.data.dataset import Sample
from pipeline.data.decision import WITH_ANOMALY
from pipeline.data.evaluation import thresholds
from pipeline.data.evaluation.part import Part
from pipeline.data.metrics import Finds, ImageResult
from pipeline.data.predictions import Predictions
from pipeline.data.quality import Judged
from pipeline.data.unknown import Unknown


@dataclass(frozen=True)
class Review:
    """Masks that are looked at because of their quality, and how many of the bad ones are."""

    below: float | None  # the quality under which a mask is listed; None: each fold has its own
    of_image: np.ndarray  # (images,) the same, image by image
    reason: str
    predictions: Judged | None  # None: no quality is known
    truth_boxes: Judged | None

    @property
    def judged(self) -> dict[str, Judged]:
        """What is known, by its key in metrics.json."""
        parts = {"predictions": self.predictions, "truth_boxes": self.truth_boxes}
        return {name: judged for name, judged in parts.items() if judged is not None}

    def listed(self, judged: Judged) -> np.ndarray:
        """(n,) which of the masks are listed."""
        return np.asarray(judged.quality < self.of_image[judged.image])


@dataclass(frozen=True)
class Measured:
    """One split, or all folds, measured. Lists are in the order of `samples`."""

    classes: Sequence[str]
    samples: Sequence[Sample]
    images: Sequence[ImageResult]
    boxes: COCOeval
    masks: COCOeval | None  # None: predictions without masks
    finds: Finds
    true_boxes: Sequence[np.ndarray] | None  # (2, n) IoU and Dice of the masks from n true boxes
    decisions: dict[str, np.ndarray]  # (images,) by model; good is 0, the classes follow
    review: Review | None  # None: masks without quality
    unknown: Unknown | None  # None: no anomaly scores

    @cached_property
    def labels(self) -> np.ndarray:
        """(images,) the true class; good is 0, the classes follow."""
        return np.array([sample.label + 1 for sample in self.samples])

    @cached_property
    def instance_classes(self) -> np.ndarray:
        """(true instances,) class index, in the order of the images."""
        return np.array([a["category_id"] - 1 for s in self.samples for a in s.annotations], int)


def measure(classes: Sequence[str], parts: Sequence[Part]) -> Measured:
    """All images of all parts, each one at the threshold of its part."""
    samples = [sample for part in parts for sample in part.samples]
    cut = [part.threshold["value"] for part in parts for _ in part.samples]
    predictions = _pooled([(part.samples, part.predictions) for part in parts])
    images = [
        metrics.measure_image(s.truth, predictions.of(s, threshold), len(classes))
        for s, threshold in zip(samples, cut, strict=True)
    ]
    entries = [e for s in samples for e in predictions.results.get(s.image_id, ())]
    boxes = metrics.coco_evaluation(samples, predictions.results, len(classes), "bbox")
    masks = None
    if all("segmentation" in entry for entry in entries):
        masks = metrics.coco_evaluation(samples, predictions.results, len(classes), "segm")
    finds = metrics.find(
        [s.truth for s in samples], [predictions.of(s, masks=False) for s in samples]
    )
    true_boxes = None
    if all(part.oracle is not None for part in parts):
        true_boxes = [overlaps for part in parts for overlaps in part.true_boxes]
    return Measured(
        classes=classes,
        samples=samples,
        images=images,
        boxes=boxes,
        masks=masks,
        finds=finds,
        true_boxes=true_boxes,
        decisions=_decisions(parts, samples, images),
        review=_review(parts, samples, cut, predictions),
        unknown=_unknown(parts, samples, cut),
    )


def _pooled(parts: Sequence[tuple[Sequence[Sample], Predictions]]) -> Predictions:
    """The predictions of each part's own images."""
    results = {
        sample.image_id: predictions.results.get(sample.image_id, [])
        for samples, predictions in parts
        for sample in samples
    }
    return Predictions(frozenset(results), results)


def _decisions(
    parts: Sequence[Part], samples: Sequence[Sample], images: Sequence[ImageResult]
) -> dict[str, np.ndarray]:
    """(images,) decisions by model: those of boxes, classifiers, and always the most frequent."""
    joint = [part.joint for part in parts if part.joint is not None]
    with_anomaly = {WITH_ANOMALY: np.concatenate(joint)} if len(joint) == len(parts) else {}
    most = np.argmax(np.bincount([sample.label + 1 for sample in samples]))
    return {
        "detector": np.array([image.decision + 1 for image in images]),
        **with_anomaly,
        **_joined([part.classifiers for part in parts]),
        "majority": np.full(len(samples), most),
    }


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The classifiers' decisions of all parts, by the names they have in the first."""
    rows = zip(*(part.values() for part in parts), strict=True)
    return dict(zip(parts[0], map(np.concatenate, rows), strict=True))


def _review(
    parts: Sequence[Part],
    samples: Sequence[Sample],
    cut: Sequence[float],
    predictions: Predictions,
) -> Review | None:
    """The masks against their quality, and the quality under which one is for review."""
    found = predictions.judge(samples, cut)
    oracles = [(part.samples, part.oracle) for part in parts if part.oracle is not None]
    from_truth = _pooled(oracles).judge(samples, [0.0] * len(samples)) if oracles else None
    if found is None and from_truth is None:
        return None
    chosen = thresholds.review_together([part.review for part in parts])
    of_image = np.array([part.review["below"] for part in parts for _ in part.samples])
    return Review(chosen["below"], of_image, chosen["reason"], found, from_truth)


def _unknown(
    parts: Sequence[Part], samples: Sequence[Sample], cut: Sequence[float]
) -> Unknown | None:
    """What detector and anomaly detector say of all images; None where the latter has not looked.

    Of all folds, either all have anomaly scores, or they count as none.
    """
    known = [anomaly for part in parts for anomaly in part.anomaly or ()]
    if len(known) < len(samples):
        return None
    scores = [costs.image_scores(part.samples, part.predictions.results) for part in parts]
    return Unknown(
        labels=np.array([sample.label + 1 for sample in samples]),
        part=np.repeat(np.arange(len(parts)), [len(part.samples) for part in parts]),
        box_score=np.concatenate(scores),
        box_threshold=np.array(cut),
        anomaly_score=np.array([its.score for its in known]),
        anomaly_threshold=np.array([its.threshold for its in known]),
        reason=parts[0].anomaly_reason,
    )
