"""DistillKit's way of reading, written anew from its published format: what it takes compressed rows for.

Plain Python over the bytes of one position, so that it has nothing in common with what wrote them. Its code was last
compared with this in November 2026 (commit a61c2e7).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FORMATS = {"float16": "e", "float32": "f", "float64": "d"}


def read_config(path: Path) -> dict[str, Any]:
    """`compression_config.yaml`: one name and value a line is all that there is in ours."""
    words: dict[str, Any] = {"true": True, "false": False, "null": None, "[]": []}
    lines = [line.split(": ") for line in path.read_text().splitlines()]
    return {name: words[value] if value in words else int(value) if value.isdigit() else value for name, value in lines}


def read_position(
    logprob_bytes: Sequence[int], id_bytes: Sequence[int], config: Mapping[str, Any]
) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities of one position."""
    assert config["exact_k"] == config["k"]
    assert not config["polynomial_terms"]
    assert not config["residual_bins"]
    assert not config["delta_encoding"]
    k = config["k"]
    logprobs = struct.unpack(f"<{k}{_FORMATS[config['exact_dtype']]}", bytes(logprob_bytes))
    bits = "".join(f"{byte:08b}" for byte in id_bytes)
    width = next(width for width in range(64) if 2**width >= config["d"])
    assert 0 <= len(bits) - k * width < 8, "a whole number of bytes, and no more"
    return [int(bits[at * width : (at + 1) * width], 2) for at in range(k)], list(logprobs)
