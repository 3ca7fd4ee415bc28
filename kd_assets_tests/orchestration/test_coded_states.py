"""A recipe with coded hidden states, from YAML to checks, a student and exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kd_assets import cli
from kd_assets.store import CacheReader
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment, failure_text

CODED = {
    "topk": {"k": 4, "max_length": 64},
    "hidden_states": {"blocks": [1], "final": "after_norm", "max_length": 32, "codec": "fp8"},
    "embeddings": {"max_length": 64},
}


def test_coded_states_go_from_the_recipe_to_checks_a_student_and_an_export(
    deploy: Callable[..., Deployment], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = deploy(caches=CODED)
    deployment.plan()
    run = deployment.run("shards_manifest", *CACHES, "student_smoke", partition_range=(SHARDS[0], SHARDS[-1]))
    assert run.success, failure_text(run)
    evaluations = deployment.checks(run.run_id)
    assert {e.check_name for e in evaluations} == {"complete", "schema", "finite", "recomputed", "rebuilt", "codec"}
    assert all(e.passed for e in evaluations), [e.description for e in evaluations if not e.passed]
    assert {e.asset_key.path[-1] for e in evaluations if e.check_name == "codec"} == {"hidden_state_cache"}

    folder = deployment.platform.recipe_folder(deployment.recipe.name)
    states = CacheReader(folder, "hidden_state_cache")
    assert states.manifests[0].params["codec"] == "fp8"
    assert states[0]["hidden_block_1"].dtype == np.uint16
    assert 0 < states.manifests[0].stats["max_codec_relative_rms"] < 0.03

    capsys.readouterr()
    assert cli.main(["verify", str(folder), "--recompute", "2", "--device", "cpu"]) == 0
    assert f"{3 * len(CACHES)} results recomputed, 0 differ" in capsys.readouterr().out
    assert cli.main(["inspect", str(folder), "--documents", "1"]) == 0
    assert "codec=fp8" in capsys.readouterr().out
    for name in ("safetensors", "original", "hf"):
        assert cli.main(["export", name, str(folder), "--to", str(tmp_path / name)]) == 0, capsys.readouterr().err
