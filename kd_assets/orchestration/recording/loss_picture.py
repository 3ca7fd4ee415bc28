"""The picture of a student's losses over its steps, as Markdown that holds a PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

NAMES = {"total": "all", "response": "response (top-k)", "feature": "feature (hidden states)", "relation": "relation"}


def loss_picture_markdown(curve: Mapping[str, Sequence[float]]) -> str:
    """The student's losses over its steps, one line each, on a logarithmic axis.

    `curve` has `steps` and some of `total`, `response`, `feature`, `relation`, all of equal length.
    """
    # The object interface: pyplot keeps global state, and picks a GUI where there is one.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label in NAMES.items():
        if name in curve:
            axes.plot(curve["steps"], curve[name], label=label, linewidth=2.2 if name == "total" else 1.2)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png = io.BytesIO()
    canvas.print_png(png)
    return f"![loss of the student](data:image/png;base64,{base64.b64encode(png.getvalue()).decode()})"
