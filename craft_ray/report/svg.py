"""Matplotlib figures as SVG in the page's fonts and colours, light or dark, with nothing loaded from outside."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation

INK, PAPER = "#101418", "#fdfdfb"
"""Placeholders for the page's text and background colours, which replace them."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "craft-ray",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.2,
}


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure in the report's style, sizes in inches. Draw and convert it inside the block."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


class _PlainMinorLabels(LogFormatterSciNotation):
    """Labels the same ticks as matplotlib's own formatter, but without TeX, which the figures show as it is."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def label_log_axis(axis: Axis) -> None:
    """Label a log axis with plain numbers; between the powers of ten where it spans few of them."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(_PlainMinorLabels(minor_thresholds=(1, 0.4)))


class Plot(Markup):
    """A figure as one `<svg>` element of a page. It keeps the figure, which `craft_ray.report.export` saves."""

    name: str
    """Unique in its page, and fit for the name of a file."""
    description: str
    figure: Figure


def inline_svg(figure: Figure, prefix: str, description: str, titles: Mapping[str, str] | None = None) -> Plot:
    """The figure as one `<svg>` element.

    Args:
        prefix: put before every id, which must be unique in the page.
        description: what a screen reader says.
        titles: the tooltip of an artist, by its `gid`.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", text)
    text = text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    for gid, title in (titles or {}).items():
        text = text.replace(f'<g id="{prefix}-{gid}">', f'<g id="{prefix}-{gid}"><title>{escape(title)}</title>')
    # The page sets the size, not the figure.
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    plot = Plot(text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))
    plot.name, plot.description, plot.figure = prefix, description, figure
    return plot
