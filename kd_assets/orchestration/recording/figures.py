"""What matplotlib's pictures in the web UI have in common: they are read on white and on black.

The ground is the page's, ink is a grey in the middle, legends stand beside the plot and axes have few, short numbers.
(The picture of telemetry is written by hand, see `telemetry_picture`, in the same colours.)
"""

from __future__ import annotations

import base64
import io
from typing import Any

INK = "#7d8590"
BLUE, ORANGE, GREEN, PURPLE = "#4c8dd6", "#cf7320", "#369a52", "#9f6cf0"
"""Each at least 3 to 1 against #fff and against #121212 (WCAG 2.2, 1.4.11, graphical objects)."""


def new_figure(width: float, height: float) -> Any:
    """Inches. By the object interface: pyplot keeps global state, and picks a GUI where there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def in_ink(axes: Any, *, xlabel: str = "", ylabel: str = "") -> None:
    """Labels, ticks, spines and a faint horizontal grid."""
    axes.patch.set_alpha(0)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(visible=True, axis="y", color=INK, alpha=0.25)
    axes.set_axisbelow(True)


def few_steps(axis: Any, *, most: int = 5, integer: bool = False) -> None:
    """Ticks at 1, 2, 2.5 or 5 times a power of ten, with no more digits than tell them apart."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=integer))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """`0.0004`, `0.25`, `12`, `1,500`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def legend_beside(axes: Any) -> None:
    """Right of the plot, where it hides nothing."""
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))


def as_markdown(figure: Any, alt: str) -> str:
    """The figure as a PNG in Markdown."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return f"![{alt}](data:image/png;base64,{base64.b64encode(png.getvalue()).decode()})"
