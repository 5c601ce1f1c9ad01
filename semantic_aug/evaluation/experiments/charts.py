"""Charts of comparisons: bars with spread and a dot for every seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from os import PathLike

TITLES = {"top1": "top-1", "macro": "macro (mean over classes)", "worst_group": "worst group"}
BAR, DOT, REAL = "#5b8db8", "#1f2d3a", "#b0b7bd"


def bars(panels: Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]], path: str | PathLike) -> None:
    """Draws one row of panels per setting and one column per score, and writes a PNG.

    Args:
        panels: setting -> score -> method -> seed -> value in [0, 1]. Bars are means, whiskers standard deviations.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scores = list(dict.fromkeys(score for panel in panels.values() for score in panel))
    most = max(len(methods) for panel in panels.values() for methods in panel.values())
    figure, axes = plt.subplots(
        len(panels), len(scores), figsize=(5.2 * len(scores), (0.9 + 0.34 * most) * len(panels)), squeeze=False
    )
    for row, (setting, panel) in zip(axes, panels.items(), strict=True):
        for axis, score in zip(row, scores, strict=True):
            methods = panel.get(score, {})
            names, values = list(methods), [[100 * v for v in found.values()] for found in methods.values()]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            colours = [REAL if name in ("real-only", "mixup", "cutmix") else BAR for name in names]
            axis.barh(names, [statistics.fmean(v) for v in values], xerr=spread, color=colours, ecolor=DOT, capsize=3)
            for place, dots in enumerate(values):
                axis.plot(dots, [place] * len(dots), ".", color=DOT, markersize=5)
                text = f"{statistics.fmean(dots):.1f}"
                axis.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
            axis.invert_yaxis()
            axis.set_title(f"{setting}: {TITLES.get(score, score)}", fontsize=10)
            axis.set_xlabel("%")
            axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=110)
    plt.close(figure)
