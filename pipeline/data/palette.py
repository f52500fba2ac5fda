"""Colours that say the same everywhere, in videos, pages and plots, also to colour-blind eyes.

Classes have the set of Okabe and Ito, Color Universal Design (2008), with grey in place of black,
so that each shows on paper and on dark images; verdicts have the "vibrant" set of Tol, Colour
Schemes (2021). What a colour says is also said in words: from the ninth class on they repeat.
"""

from __future__ import annotations

import numpy as np
import supervision as sv

CLASS_COLOURS = sv.ColorPalette.from_hex(
    ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442", "#999999"]
)
VERDICT_COLOURS = {
    "hit": sv.Color.from_hex("#0077BB"),
    "correct": sv.Color.from_hex("#BBBBBB"),  # nothing to see
    "miss": sv.Color.from_hex("#CC3311"),
    "wrong class": sv.Color.from_hex("#EE3377"),
    "false alarm": sv.Color.from_hex("#EE7733"),
}
BACKGROUND = sv.Color.from_hex("#1D1F21")
TEXT = sv.Color.from_hex("#F2F2F2")
FAINT = sv.Color.from_hex("#A8ACB0")


def ink(background: sv.Color) -> sv.Color:
    """Black or white, whichever reads better on `background` (relative luminance of WCAG 2.1)."""
    channels = np.array(background.as_rgb()) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    # equal contrast, (1 + 0.05) / (L + 0.05) = (L + 0.05) / 0.05, is at L = 0.179
    return sv.Color.BLACK if luminance > 0.179 else sv.Color.WHITE
