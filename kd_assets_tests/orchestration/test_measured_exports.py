"""Which exports that are there are the recipe's: those of the variants of its caches that are its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_assets.contract import CACHES, Asset, ExportParams
from kd_assets.orchestration.billing.bill import CacheLine, export_lines
from kd_assets.orchestration.billing.measured import Committed, committed_results
from kd_assets.store import read_manifest
from kd_assets_tests.export import exported, made_up
from kd_assets_tests.recipes.test_exports import recipe


def caches_there(folders: dict[Asset, Path]) -> dict[Asset, Committed]:
    return {
        asset: Committed(n_there=1, n_bytes=1, bytes_per_token=1.0, variants=frozenset({read_manifest(folder).variant}))
        for asset, folder in folders.items()
    }


@pytest.mark.parametrize("changed", [CACHES, ("topk_cache",)])
def test_an_export_of_another_variant_of_a_cache_is_not_there(tmp_path: Path, changed: tuple[Asset, ...]) -> None:
    documents, params = made_up.truths(1, exported.KEY, n=12), ExportParams(asset="export_hf")
    before = made_up.commit(tmp_path, documents)
    now = made_up.commit(tmp_path, documents, max_lengths=dict.fromkeys(changed, 4))
    assert {asset for asset in CACHES if now[asset] != before[asset]} == set(changed)
    assert exported.run(exported.job_of(tmp_path, before, [params])) == 0

    def n_there(caches: dict[Asset, Committed]) -> int:
        folder = tmp_path / made_up.RECIPE
        committed, newest = committed_results(recipe(["hf"]), folder, "export_hf", [exported.KEY], caches=caches)
        assert (newest is None) == (not committed.n_there)
        return committed.n_there

    assert n_there(caches_there(before)) == 1
    assert n_there(caches_there(now)) == 0
    assert n_there({}) == 0
    assert exported.run(exported.job_of(tmp_path, now, [params])) == 0
    assert n_there(caches_there(now)) == 1


@pytest.mark.parametrize(
    ("codec", "measured", "expected"),
    [("raw", False, 1.0), ("fp8", False, 128 / 68), ("split", False, 1.0), ("split", True, 1.5)],
)
def test_an_export_that_is_not_there_is_billed_by_the_decoded_bytes_of_its_caches(
    codec: str, measured: bool, expected: float
) -> None:
    states = {"blocks": [1, 2], "max_length": 8, "codec": codec}
    made = recipe(["safetensors"], {"hidden_states": states})
    nothing = Committed(n_there=0, n_bytes=0, bytes_per_token=None)
    there: dict[Asset, Committed] = {
        "hidden_state_cache": Committed(n_there=1, n_bytes=10, bytes_per_token=1.0) if measured else nothing,
        "export_safetensors": nothing,
    }
    cache = CacheLine(
        asset="hidden_state_cache", n_tokens=100, n_bytes=1_000_000, rests_on="a test", n_there=0, bytes_there=0
    )
    (line,) = export_lines(made, [cache], there, n_shards=3, hidden_size=64)
    assert line.n_bytes == round(1_000_000 * expected)
    assert line.rests_on == "about as its caches, decoded"
