"""How many bytes a coded cache is decoded to, about."""

from __future__ import annotations

from typing import Any

import pytest

from kd_assets.contract import Asset
from kd_assets.store.codecs.sizes import decoded_per_byte


@pytest.mark.parametrize(
    ("asset", "params", "expected"),
    [
        ("topk_cache", {"k": 16}, 1.0),
        ("topk_cache", {"k": 16, "codec": "compact"}, (16 * 6 + 8) / (16 * 4 + 5)),
        ("topk_cache", {"k": 16, "codec": "compact", "logsumexp": False}, (16 * 6 + 8) / (16 * 4 + 3)),
        ("topk_cache", {"k": 4, "codec": "compact", "draws": 50}, (4 * 6 + 8 + 300) / (4 * 4 + 5 + 4 + 150)),
        ("topk_cache", {"k": 4, "codec": "compact", "draws": 256}, (4 * 6 + 8 + 1536) / (4 * 4 + 5 + 8 + 768)),
        ("hidden_state_cache", {}, 1.0),
        ("hidden_state_cache", {"codec": "fp8"}, 128 / 68),
        ("hidden_state_cache", {"codec": "int8_32"}, 128 / 68),
        ("hidden_state_cache", {"codec": "split"}, 1.5),
        ("embedding_cache", {}, 1.0),
    ],
)
def test_what_is_coded_is_decoded_to_more_bytes(asset: Asset, params: dict[str, Any], expected: float) -> None:
    assert decoded_per_byte(asset, params, 64) == pytest.approx(expected)
    if asset == "hidden_state_cache":
        assert decoded_per_byte(asset, params, None) == 1.0
