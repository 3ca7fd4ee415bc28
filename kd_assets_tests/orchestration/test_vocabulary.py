"""A teacher whose head is longer than its tokenizer, and students with their own: from the recipe to exports."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_assets import cli
from kd_assets.contract import TokenIds
from kd_assets.export.folder import read_export
from kd_assets.model_files.vocabulary import token_table
from kd_assets.store import CacheReader, read_manifest
from kd_assets.store.vocabulary import VOCABULARY_NAME, vocabulary_of
from kd_assets_tests.orchestration.deployment import SHARDS, Deployment, failure_text, make_tiny_teacher

PADDING = 120


@pytest.fixture(scope="module")
def padded_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_teacher(tmp_path_factory.mktemp("padded"), padding=PADDING)


def caches(vocabulary: Any = None, **topk: Any) -> dict[str, Any]:
    said = {} if vocabulary is None else {"vocabulary": vocabulary}
    return {
        "topk": {"k": 4, "max_length": 64, "draws": 3, **said, **topk},
        "hidden_states": {"blocks": [1], "final": "both", "max_length": 64},
    }


def made(deployment: Deployment, *assets: str) -> CacheReader:
    return made_and_shown(deployment, *assets)[0]


def made_and_shown(deployment: Deployment, *assets: str) -> tuple[CacheReader, dict[Any, Any]]:
    """The top-k cache of all partitions, and what the run recorded of each."""
    deployment.plan()
    run = deployment.run("shards_manifest", "topk_cache", *assets, partition_range=(SHARDS[0], SHARDS[-1]))
    assert run.success, failure_text(run)
    evaluations = deployment.checks(run.run_id)
    assert all(e.passed for e in evaluations), [e.description for e in evaluations if not e.passed]
    reader = CacheReader(deployment.platform.recipe_folder(deployment.recipe.name), "topk_cache")
    return reader, deployment.materializations(run.run_id, "topk_cache")


def teacher_of(folder: Path) -> dict[str, Any]:
    return {"model_id": str(folder), "dtype": "float32", "token_budget": 256}


def students_tokenizer(folder: Path, teacher: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    raw = json.loads((teacher / "tokenizer.json").read_text())
    change(raw["model"]["vocab"])
    raw["model"]["merges"] = []
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


def test_the_padding_of_a_head_is_left_out_and_known(
    deploy: Callable[..., Deployment], padded_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n = len(token_table(padded_teacher))
    deployment = deploy(teacher=teacher_of(padded_teacher), caches=caches("tokenizer"))
    cut, shown_of_run = made_and_shown(deployment, "hidden_state_cache", "student_smoke")
    manifest = cut.manifests[0]
    assert manifest.params["vocabulary"] == n
    assert manifest.facts["vocab_size"] == n + PADDING
    for i in range(len(cut)):
        document = cut[i]
        assert document["topk_ids"].max(initial=0) < n
        assert (document["outside_mass"] > 0).all()
    mean = PADDING / (n + PADDING)  # of a random teacher, about
    assert manifest.stats["n_expected_outside"] / manifest.stats["n_positions"] == pytest.approx(mean, rel=0.1)
    for (shown,) in shown_of_run.values():
        provenance: Any = shown.metadata["provenance"].value
        mean, most = shown.metadata["mean_outside_mass"].value, provenance["statistics"]["max_outside_mass"]
        assert 0 < float(str(mean)) <= most < 1
    folder = deployment.platform.recipe_folder(deployment.recipe.name)
    states = CacheReader(folder, "hidden_state_cache")
    assert all(read_manifest(f).checks["rebuilt"]["passed"] is True for f in states.folders)

    capsys.readouterr()
    assert cli.main(["inspect", str(folder), "--documents", "1"]) == 0
    assert re.search(r"outside mass +0\.\d+ on average, 0\.\d+ at most", capsys.readouterr().out)
    assert cli.main(["verify", str(folder), "--recompute", "2", "--device", "cpu"]) == 0
    for name in ("hf", "safetensors"):
        assert cli.main(["export", name, str(folder), "--to", str(tmp_path / name)]) == 0
    assert read_export(tmp_path / "hf").said["n_documents"] == len(cut)


def test_a_cache_of_a_padded_head_is_not_exported_and_says_what_to_set(
    deploy: Callable[..., Deployment], padded_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = deploy(teacher=teacher_of(padded_teacher), caches=caches())
    plain = made(deployment)
    n = len(token_table(padded_teacher))
    assert max(int(plain[i]["topk_ids"].max(initial=0)) for i in range(len(plain))) >= n
    assert "vocabulary" not in plain.manifests[0].params
    folder = deployment.platform.recipe_folder(deployment.recipe.name)
    capsys.readouterr()
    assert cli.main(["export", "hf", str(folder), "--to", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "has no such token" in said
    assert "`vocabulary: tokenizer`" in said
    assert not (tmp_path / "out").exists()


def test_a_students_tokenizer_cuts_to_the_tokens_that_both_have(
    deploy: Callable[..., Deployment], padded_teacher: Path, tmp_path: Path
) -> None:
    """Tokens that the documents do not need are taken out of it, and one that the teacher lacks is added."""
    n = len(token_table(padded_teacher))
    probe = deploy(teacher=teacher_of(padded_teacher), caches=caches())
    probe.plan()
    assert probe.run("shards_manifest", partition_range=(SHARDS[0], SHARDS[-1])).success
    folder = probe.platform.recipe_folder(probe.recipe.name)
    shards = [f for f in folder.glob("shards_manifest/*/*/*") if (f / "manifest.json").exists()]
    shown = CacheReader.from_folders(shards)
    used = {int(i) for row in range(len(shown)) for i in shown[row]["input_ids"]}
    gone = [i for i in range(2, n) if i not in used][:7]

    def take_out(vocabulary: dict[str, int]) -> None:
        for token in [token for token, token_id in vocabulary.items() if token_id in gone]:
            del vocabulary[token]
        vocabulary["the student's own"] = n + 3

    student = students_tokenizer(tmp_path / "student", padded_teacher, take_out)
    deployment = deploy(teacher=teacher_of(padded_teacher), caches=caches(str(student)))
    cut = made(deployment)
    expected = TokenIds.of(i for i in range(n) if i not in gone)
    manifest = cut.manifests[0]
    assert manifest.params["vocabulary"] == expected.in_identity()
    assert manifest.provenance["vocabulary"] == str(student)
    assert all(vocabulary_of(read_manifest(f), f) == expected for f in cut.folders)
    assert all((f / VOCABULARY_NAME).exists() for f in cut.folders)
    assert all(int(i) in expected for row in range(len(cut)) for i in cut[row]["topk_ids"].ravel())


def test_mismatched_vocabularies_are_refused_before_any_job(
    deploy: Callable[..., Deployment], padded_teacher: Path, tmp_path: Path
) -> None:
    def swap(vocabulary: dict[str, int]) -> None:
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    student = students_tokenizer(tmp_path / "student", padded_teacher, swap)
    deployment = deploy(teacher=teacher_of(padded_teacher), caches=caches(str(student)))
    deployment.plan()
    run = deployment.run("shards_manifest", "topk_cache", partition_range=(SHARDS[0], SHARDS[-1]))
    assert not run.success
    assert "mismatched vocabularies: 2 of the" in failure_text(run)
    assert not list((deployment.home / "jobs").rglob("job.json")), "the shards are not made either"


def test_a_document_with_a_token_outside_fails_its_partition_by_name(
    deploy: Callable[..., Deployment], padded_teacher: Path
) -> None:
    deployment = deploy(teacher=teacher_of(padded_teacher), caches=caches(100))
    deployment.plan()
    run = deployment.run("shards_manifest", "topk_cache", partition_range=(SHARDS[0], SHARDS[-1]))
    assert not run.success
    said = failure_text(run)
    assert "which is not among the 100 ids of topk.vocabulary" in said
    assert "document 'd0'" in said
