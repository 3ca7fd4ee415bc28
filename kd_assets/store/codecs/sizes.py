"""How many bytes results take, coded or not: pure numbers of parameters, as the bill and the exports reckon with.

The invariant: `decoded_per_byte` is 1 where a cache is not coded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd_assets.contract import Asset
from kd_assets.store.codecs.state_codec import bytes_a_state

_SPLIT_SAVES = 1 / 3
"""Of the bytes of states, about."""


def bytes_a_topk(codec: str, k: int, *, logsumexp: bool) -> int:
    """Of a position's k ids and log-probabilities, the normaliser and the target's, before compression.

    Of `compact` three bytes of an id and one code, the tail byte, and the two others in float16.
    """
    return k * (3 + 1) + 1 + 2 * (1 + logsumexp) if codec == "compact" else k * (4 + 2) + 8


def bytes_a_number(codec: str) -> int:
    """Of how many tokens a position keeps, where that differs: two offsets, or up to two bytes."""
    return 2 if codec == "compact" else 8


def bytes_a_draw(codec: str, draws: int, k: int) -> int:
    """Of a position's random draws, before compression, at most.

    Of `compact` a count for each of the k ids, and three bytes of a draw of another one.
    """
    return k * (1 if draws < 256 else 2) + draws * 3 if codec == "compact" and draws else draws * (4 + 2)


def decoded_per_byte(asset: Asset, params: Mapping[str, Any], hidden_size: int | None) -> float:
    """Bytes that are decoded from a byte of a cache with these parameters of its identity, about.

    1 for coded states whose size is not known.
    """
    codec = params.get("codec")
    if codec is None:
        return 1.0
    if asset == "topk_cache":
        k = int(params["k"])
        draws = int(params.get("draws", 0))
        coded = bytes_a_topk(codec, k, logsumexp=params.get("logsumexp", True)) + bytes_a_draw(codec, draws, k)
        return (bytes_a_topk("plain", k, logsumexp=True) + bytes_a_draw("plain", draws, k)) / coded
    if asset != "hidden_state_cache" or not hidden_size:
        return 1.0
    if codec == "split":
        return 1 / (1 - _SPLIT_SAVES)
    return bytes_a_state("raw", hidden_size) / bytes_a_state(codec, hidden_size)
