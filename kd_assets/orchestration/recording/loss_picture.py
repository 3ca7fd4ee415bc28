"""The picture of a training's losses over its steps, as Markdown that holds a PNG: a student's, the demo teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd_assets.orchestration.recording.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    as_markdown,
    few_steps,
    in_ink,
    legend_beside,
    new_figure,
    short,
)

LINES = {
    "total": ("all", INK),
    "response": ("response (top-k)", BLUE),
    "feature": ("feature (hidden states)", ORANGE),
    "relation": ("relation", GREEN),
    "loss": ("next token", PURPLE),
}
"""Loss → its label and colour."""
WIDE = 8.0
"""Largest over smallest loss from which on the axis is logarithmic: below it hides how far a loss fell."""


def loss_picture_markdown(curve: Mapping[str, Sequence[float]], *, of: str = "the student") -> str:
    """The losses over their steps, one line each.

    `curve` has `steps` and some of `total`, `response`, `feature`, `relation`, `loss`, all of equal length.
    """
    figure = new_figure(7.6, 3.2)
    axes = figure.add_subplot()
    drawn = [name for name in LINES if name in curve]
    for name in drawn:
        label, colour = LINES[name]
        axes.plot(curve["steps"], curve[name], label=label, color=colour, linewidth=2.2 if name == "total" else 1.4)
    in_ink(axes, xlabel="step", ylabel="loss (nats)" if drawn == ["loss"] else "loss")
    values = [value for name in drawn for value in curve[name] if value > 0]
    if values and max(values) / min(values) > WIDE:
        _logarithmic(axes)
    else:
        axes.set_ylim(bottom=0)
        few_steps(axes.yaxis)
    few_steps(axes.xaxis, most=6, integer=True)
    if len(drawn) > 1:
        legend_beside(axes)
    return as_markdown(figure, f"loss of {of}")


def _logarithmic(axes: Any) -> None:
    """Numbers at 1, 2 and 5 times each power of ten, as people count."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
