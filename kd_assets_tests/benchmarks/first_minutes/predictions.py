"""What was predicted of each figure, read from the log of the benchmarks: it is written there and nowhere else.

A prediction is a row `| step | figure | number | from |` of the table under the heading that holds `HEADING`.
"""

from __future__ import annotations

import re
from pathlib import Path

LOG_FILE = Path(__file__).parents[1] / "LOG.md"
HEADING = "Predictions for `.ci/gpu`"
SURPRISE = 0.1
"""A figure that is off by more than this share has a cause, and is to be looked at."""


def predictions(log: str) -> dict[str, dict[str, float]]:
    """step → figure → number. Empty where the log has no such table."""
    found: dict[str, dict[str, float]] = {}
    for row in re.findall(r"^\|.*\|$", _section(log), re.MULTILINE):
        step, figure, number, *_ = (cell.strip().strip("`") for cell in row.strip("|").split("|"))
        if re.fullmatch(r"-?[\d,.]+", number):
            found.setdefault(step, {})[figure] = float(number.replace(",", ""))
    return found


def beside(value: float, predicted: float) -> str:
    """How a figure compares with its prediction, an arrow at what surprises."""
    if not predicted:
        return f"predicted {predicted:g}"
    off = (value - predicted) / predicted
    return f"predicted {predicted:g} ({off:+.0%}){'  <---' if abs(off) > SURPRISE else ''}"


def _section(log: str) -> str:
    _, _, after = log.partition(HEADING)
    return re.split(r"^#+ ", after, maxsplit=1, flags=re.MULTILINE)[0]
