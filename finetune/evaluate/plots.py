"""Plots as SVG text, to stand inside a page that needs no other file."""

from collections.abc import Mapping, Sequence
from io import StringIO

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from finetune.evaluate.intervals import Interval

COLOURS = ("#d1495b", "#30638e", "#edae49", "#00798c", "#6f4a8e", "#5b8c5a")
OTHERS = "#b8b4c0"
FEWEST_SPOKES = 3


def radar(title: str, values: Mapping[str, Mapping[str, float | None]]) -> str:
    """Model → category → per cent, one line for each model; a spoke for each category that all have a score in."""
    categories = spokes(values)
    angles = np.linspace(0, 2 * np.pi, len(categories), endpoint=False)
    figure = Figure(figsize=(5.2, 4.4))
    axes = figure.add_subplot(projection="polar")
    for (model, scores), colour in zip(values.items(), _colours(len(values)), strict=True):
        heights = [scores[category] or 0.0 for category in categories]
        axes.plot([*angles, angles[0]], [*heights, heights[0]], color=colour, label=model)
        axes.fill(angles, heights, color=colour, alpha=0.12)
    axes.set_xticks(angles, categories, fontsize=8)
    axes.set_ylim(0, max(100.0, *(scores[category] or 0.0 for scores in values.values() for category in categories)))
    axes.set_title(title, fontsize=10)
    if len(values) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.25, -0.12), fontsize=8)
    return _svg(figure)


def spokes(values: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """The categories in which every model has a score; a radar needs FEWEST_SPOKES."""
    names = dict.fromkeys(name for scores in values.values() for name in scores)
    return [name for name in names if all(scores.get(name) is not None for scores in values.values())]


def bars(title: str, rows: Sequence[tuple[str, float, Interval | None, bool]]) -> str:
    """One bar for each (name, per cent, 95 % interval, whether it was measured here)."""
    figure = Figure(figsize=(6.4, 0.8 + 0.36 * len(rows)))
    axes = figure.add_subplot()
    for place, (_, score, interval, ours) in enumerate(rows):
        axes.barh(place, score, color=COLOURS[0] if ours else OTHERS, height=0.62)
        if interval:
            axes.plot(interval, (place, place), color="#26222f", linewidth=1.4)
        axes.text(max(score, interval[1] if interval else 0) + 1, place, f"{score:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max([100.0, *(score for _, score, _, _ in rows)]))
    axes.set_title(title, fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _svg(figure)


def _colours(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def _svg(figure: Figure) -> str:
    """The figure without an XML head, its text as text, the same for the same figure."""
    out = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "llava", "font.family": "sans-serif"}):
        figure.set_layout_engine("tight")
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
