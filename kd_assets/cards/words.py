"""Numbers and values as people read them."""

from __future__ import annotations

import json
from typing import Any


def bytes_in_words(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def counted(n: int, what: str) -> str:
    """`1 partition`, `2,000 partitions`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"


def energy(joules: float) -> str:
    kwh = joules / 3.6e6
    return f"{number(kwh)} kWh" if kwh >= 0.1 else f"{number(joules / 1000)} kJ"


def pairs(values: dict[str, Any]) -> str:
    return "  ".join(f"{name}={short(value)}" for name, value in values.items())


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and len(value) == 64:  # a hash
        return f"{value[:12]}…"
    return json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
