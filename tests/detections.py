"""Detections written as rows of numbers."""

from __future__ import annotations

import numpy as np
import supervision as sv


def detections(*rows: tuple[float, ...]) -> sv.Detections:
    """From (x1, y1, x2, y2, class) or (x1, y1, x2, y2, class, score)."""
    if not rows:
        return sv.Detections.empty()
    values = np.array(rows, float)
    return sv.Detections(
        xyxy=values[:, :4],
        class_id=values[:, 4].astype(int),
        confidence=values[:, 5] if values.shape[1] == 6 else None,
    )
