"""What a program has measured so far, kept in a file, so that a program that is cut off still tells. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kd_assets.durable import atomic_write


class Figures:
    """Figures by name, in the order in which they became known."""

    def __init__(self, path: Path | None) -> None:
        """`path`: a file that always holds all of them as one JSON object; None: no file."""
        self._path = path
        self.known: dict[str, Any] = {}

    def add(self, **figures: Any) -> None:
        self.known |= figures
        if self._path is not None:
            atomic_write(self._path, json.dumps(self.known, indent=1, default=str).encode() + b"\n")


def read_figures(path: Path) -> dict[str, Any]:
    """The figures in a file of `Figures`; none where there is no such file yet."""
    try:
        figures: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    return figures
