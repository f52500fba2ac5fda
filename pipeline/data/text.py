"""Text in pictures: the font, and cutting what is too long."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
from PIL import ImageFont


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: legible when small, and rich in letters."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def elide(text: str, size: int, width: float) -> str:
    """Cut `text` in its middle to at most `width` pixels: the end of a name counts."""
    letters = font(size)
    kept = len(text)
    shown = text
    while kept > 0 and letters.getlength(shown) > width:
        kept -= 1
        head = kept // 2
        shown = text[:head] + "…" + text[len(text) - (kept - head) :]
    return shown if letters.getlength(shown) <= width else ""
