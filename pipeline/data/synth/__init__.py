"""Rendered datasets in the layout of MVTec AD, of several products.

Nothing is copied from any photograph: every pixel is painted from geometry and noise. A scene is
sampled first, a defect then changes a copy of it, and the mask is drawn from the geometry of both.
Masks follow MVTec's convention: they mark what is there and should not be, and what should be there
and is not.
"""

from pipeline.data.synth.dataset import PRODUCTS, render_dataset

__all__ = ["PRODUCTS", "render_dataset"]
