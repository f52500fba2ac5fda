"""Defect inspection: MVTec masks in; boxes, pixel masks, metrics and a review video out."""

__version__ = "0.1.0"
