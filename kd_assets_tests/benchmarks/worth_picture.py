"""The picture of `worth`: held-out loss against bytes a token, one point a variant, as an SVG for the README.

Readable on white and on black: the ground is the page's. Equal figures give equal bytes with one version of matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

INK = "#7d8590"
FAMILIES: dict[str, tuple[str, str, str]] = {
    "bucket": ("top-k, the rest in a bucket", "#4c8dd6", "o"),
    "target": ("top-k, the rest to the target", "#d9822b", "s"),
    "renormalised": ("top-k, renormalised", "#d65c5c", "^"),
    "top-p": ("top-p, the rest in a bucket", "#2fa59a", "P"),
    "draws": ("random draws", "#3f9b4f", "D"),
    "states": ("top-16 in a bucket, and states", "#9a70d0", "v"),
}
"""Of a variant's name → what the legend says, colour, marker."""


def family(name: str) -> str | None:
    """None of what reads no cache."""
    if "with states" in name:
        return "states"
    if name.startswith("top-p"):
        return "top-p"
    if "draws" in name:
        return "draws"
    return name.rsplit(", ", 1)[-1] if ", " in name else None


def draw(figures: Mapping[str, Any], path: Path) -> None:
    # The object interface: pyplot keeps global state, and picks a GUI where there is one.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    variants: Mapping[str, Mapping[str, Any]] = figures["variants"]
    with matplotlib.rc_context(
        {"svg.hashsalt": "worth", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    ):
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        shown = set()
        for name, of in variants.items():
            if (kind := family(name)) is None:
                continue
            shown.add(kind)
            _, colour, marker = FAMILIES[kind]
            hollow = " plain" in name
            axes.errorbar(
                of["bytes_per_token"],
                of["loss"],
                yerr=of["ratio_spread"] * figures["online_loss"] / 2,
                color=colour,
                marker=marker,
                markersize=6,
                markerfacecolor="none" if hollow else colour,
                linestyle="none",
                elinewidth=0.8,
            )
        for loss, label, style in (
            (figures["online_loss"], "online: the whole distribution", "-"),
            (figures["no_teacher_loss"], "no teacher: cross-entropy", "--"),
        ):
            axes.axhline(loss, color=INK, linestyle=style, linewidth=1.2, label=label)
        axes.axvline(40, color=INK, linestyle=":", linewidth=0.8)
        axes.set_xscale("log")
        ticks = [8, 16, 32, 64, 128, 256, 512]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("bytes a token, beside its id", color=INK)
        axes.set_ylabel("held-out loss, nats a token", color=INK)
        axes.tick_params(colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.grid(visible=True, color=INK, alpha=0.25)
        axes.set_axisbelow(True)
        handles: list[Any] = list(axes.get_legend_handles_labels()[0])
        for kind, (label, colour, marker) in FAMILIES.items():
            if kind in shown:
                handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=label))
        filled, hollow_ = (
            Line2D([], [], color=INK, marker="o", markerfacecolor=face, linestyle="none", label=label)
            for face, label in ((INK, "filled: a codec"), ("none", "hollow: plain"))
        )
        figure.legend(handles=[*handles, filled, hollow_], loc="outside right upper", frameon=False, labelcolor=INK)
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasSVG(figure).print_svg(str(path), metadata={"Date": None, "Title": "loss against bytes a token"})
