"""A recipe that keeps learned positions and final states, from YAML to a student and an export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kd_assets import cli
from kd_assets.store import CacheReader, read_manifest
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment, failure_text

KEPT = {
    "topk": {"k": 4, "max_length": 64, "draws": 3, "positions": "learned"},
    "hidden_states": {"blocks": [1], "final": "both", "max_length": 32, "positions": {"share": 0.5, "seed": 3}},
    "embeddings": {"max_length": 64},
}


def test_kept_positions_and_final_states_go_from_the_recipe_to_a_student_and_an_export(
    deploy: Callable[..., Deployment], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = deploy(caches=KEPT)
    deployment.plan()
    run = deployment.run("shards_manifest", *CACHES, "student_smoke", partition_range=(SHARDS[0], SHARDS[-1]))
    assert run.success, failure_text(run)
    evaluations = deployment.checks(run.run_id)
    assert {e.check_name for e in evaluations} == {"complete", "schema", "finite", "recomputed", "rebuilt"}
    assert all(e.passed for e in evaluations), [e.description for e in evaluations if not e.passed]

    folder = deployment.platform.recipe_folder(deployment.recipe.name)
    topk, states = (CacheReader(folder, asset) for asset in ("topk_cache", "hidden_state_cache"))
    assert topk.manifests[0].params["positions"] == "learned"
    assert states.manifests[0].params == {
        "blocks": [1],
        "final": ["before_norm", "after_norm"],
        "max_length": 32,
        "positions": {"share": 0.5, "seed": 3},
    }
    for reader in (topk, states):
        document = reader[0]
        assert 0 < len(document["positions"]) < len(document["input_ids"])
    rebuilt = [read_manifest(f).checks["rebuilt"] for f in states.folders]
    assert all(record["passed"] is True and record["n_positions"] for record in rebuilt)

    capsys.readouterr()
    assert cli.main(["verify", str(folder), "--recompute", "2", "--device", "cpu"]) == 0
    assert f"{3 * len(CACHES)} results recomputed, 0 differ" in capsys.readouterr().out
    assert cli.main(["inspect", str(folder), "--documents", "1"]) == 0
    assert "positions=learned" in capsys.readouterr().out
    assert cli.main(["export", "safetensors", str(folder), "--to", str(tmp_path / "exported")]) == 0
    assert cli.main(["export", "original", str(folder), "--to", str(tmp_path / "refused")]) != 0
    assert "positions" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
