"""A recipe whose top-k cache is compact, from YAML to a student, a diff and an export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_assets import cli
from kd_assets.store import CacheReader, read_manifest
from kd_assets.store.partfile import PartFile
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment, failure_text

STATES = {"blocks": [1], "final": "both", "max_length": 32}


def caches(**topk: Any) -> dict[str, Any]:
    return {
        "topk": {"k": 4, "max_length": 64, "draws": 3, "codec": "compact", **topk},
        "hidden_states": STATES,
        "embeddings": {"max_length": 64},
    }


@pytest.mark.parametrize("options", [{}, {"logsumexp": False, "positions": "learned"}])
def test_a_compact_cache_goes_from_the_recipe_to_a_student_and_an_export(
    deploy: Callable[..., Deployment],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
) -> None:
    deployment = deploy(caches=caches(**options))
    deployment.plan()
    run = deployment.run("shards_manifest", *CACHES, "student_smoke", partition_range=(SHARDS[0], SHARDS[-1]))
    assert run.success, failure_text(run)
    evaluations = deployment.checks(run.run_id)
    assert {e.check_name for e in evaluations} == {"complete", "schema", "finite", "recomputed", "codec", "rebuilt"}
    assert all(e.passed for e in evaluations), [e.description for e in evaluations if not e.passed]

    folder = deployment.platform.recipe_folder(deployment.recipe.name)
    topk = CacheReader(folder, "topk_cache")
    assert topk.manifests[0].params["codec"] == "compact"
    assert topk.manifests[0].params.get("logsumexp", True) is options.get("logsumexp", True)
    assert ("logsumexp" in topk.fields) is options.get("logsumexp", True)
    for result, manifest in zip(topk.folders, topk.manifests, strict=True):
        assert 0 < manifest.stats["max_codec_mean_kl"] <= manifest.stats["max_codec_kl"] < 1.2e-4
        with PartFile(result / manifest.parts[0].name) as part:
            assert part.stored_schema.metadata[b"kd_assets.codec"] == b"compact_2"
        assert read_manifest(result).checks["recomputed"]["passed"] is True
    states = CacheReader(folder, "hidden_state_cache")
    assert all(m.checks["rebuilt"]["passed"] is True and m.checks["rebuilt"]["n_positions"] for m in states.manifests)

    capsys.readouterr()
    assert cli.main(["verify", str(folder), "--recompute", "2", "--device", "cpu"]) == 0
    assert f"{3 * len(CACHES)} results recomputed, 0 differ" in capsys.readouterr().out
    assert cli.main(["inspect", str(folder), "--documents", "1"]) == 0
    assert "codec=compact" in capsys.readouterr().out
    for name in ("safetensors", "hf"):
        assert cli.main(["export", name, str(folder), "--to", str(tmp_path / name)]) == 0, capsys.readouterr().err


def test_a_cache_of_as_many_tokens_as_have_a_mass_goes_from_the_recipe_to_a_student(
    deploy: Callable[..., Deployment], capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = deploy(caches=caches(k=16, top_p=0.05))
    deployment.plan()
    run = deployment.run("shards_manifest", *CACHES, "student_smoke", partition_range=(SHARDS[0], SHARDS[-1]))
    assert run.success, failure_text(run)
    evaluations = deployment.checks(run.run_id)
    assert all(e.passed for e in evaluations), [e.description for e in evaluations if not e.passed]
    folder = deployment.platform.recipe_folder(deployment.recipe.name)
    topk = CacheReader(folder, "topk_cache")
    assert topk.manifests[0].params["top_p"] == 0.05
    for manifest in topk.manifests:
        assert 1 <= manifest.stats["n_kept_ids"] / manifest.stats["n_positions"] < 16
        assert manifest.checks["recomputed"]["max_kept_mass_difference"] < 1e-3
    capsys.readouterr()
    assert cli.main(["verify", str(folder), "--recompute", "1", "--device", "cpu"]) == 0
    assert cli.main(["export", "hf", str(folder), "--to", str(folder / "out"), "--assets", "topk_cache"]) != 0
    assert "make it without top_p" in capsys.readouterr().err
