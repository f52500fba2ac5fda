"""Plots of an evaluation: figures, and how they are written."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools.cocoeval import COCOeval

from pipeline.data.files import atomic_path
from pipeline.data.metrics import average_precisions
from pipeline.data.palette import CLASS_COLOURS
from pipeline.data.quality import BAD_IOU, Judged

COLOURS = [colour.as_hex() for colour in CLASS_COLOURS.colors]
MARKERS = "osD^vP*X"


def pr_curves(
    evaluations: Mapping[str, COCOeval], classes: Sequence[str], threshold: float | None
) -> Figure:
    """Precision over recall at IoU 0.5, one panel per evaluation, one line per class with truth.

    A dot marks the recall and precision at the score threshold, if there is one for all images.
    """
    figure, axes = plt.subplots(
        1, len(evaluations), figsize=(5.2 * len(evaluations), 4.6), squeeze=False, sharey=True
    )
    for axis, (title, evaluation) in zip(axes[0], evaluations.items(), strict=True):
        _draw_pr_curves(axis, evaluation, classes, threshold)
        axis.set(title=f"{title}, IoU 0.5", xlabel="recall", xlim=(0, 1.02), ylim=(0, 1.04))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("precision")
    return figure


def _draw_pr_curves(
    axis: Axes, evaluation: COCOeval, classes: Sequence[str], threshold: float | None
) -> None:
    ap50 = average_precisions(evaluation)[0]
    recall = evaluation.params.recThrs
    for k, name in enumerate(classes):
        if np.isnan(ap50[k]):
            continue
        precision = evaluation.eval["precision"][0, :, k, 0, 0]
        scores = evaluation.eval["scores"][0, :, k, 0, 0]
        width = 2 + 1.3 * (len(classes) - 1 - k)  # thinner ones on top, so that none is hidden
        (line,) = axis.step(
            recall,
            np.where(precision > 0, precision, np.nan),
            lw=width,
            color=COLOURS[k % len(COLOURS)],
            label=f"{name}  AP50 {ap50[k]:.2f}",
            solid_capstyle="butt",
        )
        if threshold is None:
            continue
        kept = np.flatnonzero((scores >= threshold) & (precision > 0))
        if kept.size:
            axis.plot(
                recall[kept[-1]],
                precision[kept[-1]],
                "o",
                color=line.get_color(),
                markeredgecolor="white",
                markersize=width + 7,
                clip_on=False,
            )
    if axis.lines:
        if threshold is not None:
            axis.plot([], [], "o", color="grey", label=f"at score {threshold:.2f}")
        for handle in axis.legend(loc="lower left", fontsize=9).get_lines():
            handle.set_linewidth(3)
    else:
        axis.text(0.5, 0.5, "no true defects", ha="center", va="center")


def quality(judged: Mapping[str, Judged], classes: Sequence[str], below: float | None) -> Figure:
    """Predicted quality over true IoU: a panel per source of boxes, a point per mask.

    Left of the line are the masks that are listed for review; in the shaded part, the bad ones
    among them; neither is drawn where folds have lines of their own. On the diagonal, quality and
    IoU are equal.
    """
    titles = {"predictions": "masks in found boxes", "truth_boxes": "masks in true boxes"}
    figure, axes = plt.subplots(
        1, len(judged), figsize=(5.2 * len(judged), 5.0), squeeze=False, sharey=True
    )
    for axis, (name, masks) in zip(axes[0], judged.items(), strict=True):
        _draw_quality(axis, masks, classes, below)
        axis.set(title=titles[name], xlabel="predicted quality")
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("true IoU")
    return figure


def _draw_quality(axis: Axes, judged: Judged, classes: Sequence[str], below: float | None) -> None:
    axis.plot([0, 1], [0, 1], color="grey", lw=1, zorder=1)
    if below is not None:
        axis.axvline(below, color="black", ls="--", lw=1.2, label=f"review below {below:.2f}")
        axis.fill_between(
            [-0.02, below], -0.02, BAD_IOU, color="grey", alpha=0.15, lw=0, label="bad, and listed"
        )
    for k, name in enumerate(classes):
        own = judged.class_id == k
        if own.any():
            axis.scatter(
                judged.quality[own],
                judged.iou[own],
                s=42,
                marker=MARKERS[k % len(MARKERS)],
                color=COLOURS[k % len(COLOURS)],
                edgecolors="black",
                linewidths=0.5,
                alpha=0.85,
                zorder=3,
                clip_on=False,
                label=f"{name} ({own.sum()})",
            )
    error, rank = judged.mean_absolute_error, judged.spearman
    figures = [f"mean error {error:.2f}"] * (not np.isnan(error))
    figures += [f"Spearman {rank:.2f}"] * (not np.isnan(rank))
    title = ", ".join(figures) or ("" if judged.iou.size else "no masks")
    axis.legend(title=title, loc="upper left", fontsize=9, title_fontsize=9)


def mask_ious(ious: Sequence[Sequence[float | None]], classes: Sequence[str]) -> Figure:
    """The masks' IoU with the truth: a row per class, a point per found defect, and quartiles.

    `ious` are those of each class's true instances; None is a missed one, which is only counted.
    """
    figure, axis = plt.subplots(figsize=(5.2, max(4.6, 1.3 + 0.5 * len(classes))))
    rng = np.random.default_rng(0)  # points keep clear of one another
    for k, of_class in enumerate(ious):
        found = np.array([value for value in of_class if value is not None])
        colour = COLOURS[k % len(COLOURS)]
        if found.size:
            axis.boxplot(
                [found],
                positions=[k],
                orientation="horizontal",
                widths=0.62,
                showfliers=False,
                medianprops={"color": "black", "lw": 2},
            )
            spread = k + rng.uniform(-0.2, 0.2, len(found))
            axis.scatter(
                found, spread, s=26, color=colour, edgecolors="black", lw=0.4, alpha=0.85, zorder=3
            )
    labels = [
        f"{name}\n{sum(v is not None for v in own)} of {len(own)} found"
        for name, own in zip(classes, ious, strict=True)
    ]
    axis.set_yticks(range(len(classes)), labels, fontsize=9)
    axis.set(xlim=(-0.02, 1.02), ylim=(len(classes) - 0.5, -0.5), xlabel="mask IoU with the truth")
    axis.grid(axis="x", alpha=0.3)
    return figure


def confusions(confusions: Mapping[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """One confusion matrix (true class by decision) per model; shade: share of the row."""
    columns = min(3, len(confusions))
    rows = -(-len(confusions) // columns)
    side = max(3.6, 1.6 + 0.62 * len(classes))
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns, side * rows), squeeze=False)
    for axis in axes.flat[len(confusions) :]:
        axis.set_visible(False)
    for axis, (title, confusion) in zip(axes.flat, confusions.items(), strict=False):
        share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                dark = share[row, column] > 0.5
                axis.text(
                    column,
                    row,
                    str(count),
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                )
        ticks = range(len(classes))
        axis.set_xticks(ticks, classes, rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
        axis.set_yticks(ticks, classes, fontsize=9)
        axis.set(title=title, xlabel="decision", ylabel="true class")
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure, and be done with it."""
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(
            temporary, dpi=120, metadata={"Software": None}
        )  # equal bytes on equal input
    plt.close(figure)


def svg(figure: Figure, name: str) -> str:
    """A figure as an <svg> element of a page, whose colours and font it takes on where it is black.

    `name` tells its ids from those of the page's other figures. The figure is done with.
    """
    figure.tight_layout()
    for axis in figure.axes:
        if (legend := axis.get_legend()) is not None:
            legend.set_frame_on(False)  # it would be white
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    plt.close(figure)
    element = text.getvalue()
    return element[element.index("<svg") :].replace("#000000", "currentColor")
