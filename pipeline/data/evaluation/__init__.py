"""The measuring of `pipeline evaluate`, in the order of the work.

    part.py         what is read of the images that one model is measured on, and checked
    thresholds.py   what is chosen on their val split: from which score a box counts, under which
                    quality a mask is for review
    measured.py     all parts together, measured image by image
    figures.py      the figures of metrics.json
    intervals.py    their intervals

What each figure means is written in docs/metrics.md.
"""
