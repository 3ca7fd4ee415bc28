"""One picture across the shards of a recipe: how fast, how exact, and how much of the probability is kept.

What is out of line is seen at once: a slow node, a drifting kernel, a source whose text the teacher finds hard.
"""

from __future__ import annotations

from collections.abc import Sequence

from kd_assets.cards.contents import Measured
from kd_assets.orchestration.recording.figures import (
    BLUE,
    GREEN,
    ORANGE,
    as_markdown,
    few_steps,
    in_ink,
    new_figure,
)

PANELS = (
    ("tokens_per_s", "tokens/s", BLUE, True),
    ("largest_difference", "largest difference\n(1: its tolerance)", ORANGE, True),
    ("kept_mass", "kept probability", GREEN, False),
)
"""Figure, label, colour, and whether the axis begins at 0."""


def shards_picture_markdown(measured: Sequence[Measured]) -> str | None:
    """A panel each figure that is known, over the shards in their order; None of fewer than two shards."""
    if len(measured) < 2:
        return None
    known = [panel for panel in PANELS if any(getattr(m, panel[0]) is not None for m in measured)]
    if not known:
        return None
    figure = new_figure(7.6, 0.5 + 1.5 * len(known))
    all_axes = figure.subplots(len(known), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, label, colour, from_zero) in zip(all_axes, known, strict=True):
        points = [(i, value) for i, m in enumerate(measured) if (value := getattr(m, name)) is not None]
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.6)
        axes.scatter(x, y, color=colour, s=max(2, min(18, 2000 / len(points))))
        in_ink(axes, ylabel=label, xlabel="shard" if axes is all_axes[-1] else "")
        if from_zero:
            axes.set_ylim(0, 1.1 * max(y) or 1)
        few_steps(axes.yaxis, most=4)
    few_steps(all_axes[-1].xaxis, most=8, integer=True)
    figure.align_ylabels()
    words = ", ".join(label.partition("\n")[0] for _, label, _, _ in known)
    return as_markdown(figure, f"{words} of each shard")
