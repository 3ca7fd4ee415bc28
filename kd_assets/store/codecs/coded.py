"""A table on its way to a part file."""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa


@dataclass(frozen=True, kw_only=True, slots=True)
class Coded:
    """What a codec made of a table, and what is lost by it."""

    stored: pa.Table
    decoded: pa.Table
    """What readers will get: the statistics of a part are taken of it."""
    error: dict[str, float] = field(default_factory=dict)
    """Statistics of the coding; none of a table that is stored as it is."""
