"""A partition from shard to committed caches: what is recorded, resumed, refused."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_assets.contract import CACHES, Asset, EmbeddingParams, HiddenStateParams, TopkParams, WorkUnit
from kd_assets.errors import ContractError, InterruptedTaskError, NonFiniteTeacherError, RecipeError
from kd_assets.model_files.fingerprints import weights_fingerprint
from kd_assets.store import CacheReader, Documents, ResultFiles, check_all, encode_topk, plan_output, read_manifest
from kd_assets.teacher.model.load import load_teacher
from kd_assets.teacher.partition.input_shard import check_length
from kd_assets.teacher.recompute import sampled_documents
from kd_assets.worker.stop_flag import StopFlag
from kd_assets_tests.teacher.tiny import (
    VOCABULARY,
    Desk,
    part_bytes,
    save_teacher,
    tiny_config,
    tiny_documents,
    tiny_params,
)

LENGTHS = (3, 1, 20, 64, 90, 5, 9, 30, 12, 2, 40, 33, 33, 8)
KEY = "shard-00000"
N_PARTS = 3  # of at most 5 documents


class StopAfter(StopFlag):
    """A request to stop that arrives at the n-th look."""

    def __init__(self, n_looks: int) -> None:
        super().__init__()
        self._looks_left = n_looks

    def __bool__(self) -> bool:
        self._looks_left -= 1
        return self._looks_left < 0


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> WorkUnit:
    """All three caches of one shard, made in one go."""
    desk = Desk(tmp_path_factory.mktemp("uninterrupted"))
    params = tiny_params(teacher_folder)
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params)
    desk.run(params, unit)
    return unit


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_every_cache_is_committed_with_its_checks_facts_and_provenance(
    uninterrupted: WorkUnit, teacher_folder: Path
) -> None:
    for output in uninterrupted.outputs:
        manifest = read_manifest(Path(output.path))
        assert manifest.asset == output.asset
        assert manifest.n_documents == len(LENGTHS)
        assert manifest.n_tokens == sum(min(n, 64) for n in LENGTHS), "cut to the cache's max_length"
        assert len(manifest.parts) == N_PARTS
        assert manifest.stats["n_non_finite"] == 0
        assert manifest.checks["recomputed"]["passed"] is True
        assert manifest.checks["recomputed"]["n_documents"] == 2
        facts = manifest.facts
        assert facts["token_budget"] == 128
        assert "one row a document" in facts["convention"]
        assert 0 <= facts["padding_fraction"] < 0.5
        assert facts["tokens_per_s"] > 0
        assert facts["wall_s"] > 0
        assert facts["peak_memory_gib"] > 0
        assert facts["joules"] is None or facts["joules"] > 0
        provenance = manifest.provenance
        assert provenance["seen_by"] == "the control plane"
        assert provenance["teacher"] == str(teacher_folder)
        assert provenance["architecture"] == "LlamaForCausalLM"
        assert provenance["libraries"]["torch"] == version("torch")


def test_weights_that_are_not_used_stand_in_the_provenance_and_nothing_where_all_are(
    uninterrupted: WorkUnit, desk: Desk, tmp_path: Path
) -> None:
    assert "unused_weights" not in read_manifest(Path(uninterrupted.outputs[0].path)).provenance
    folder = save_teacher(tmp_path / "with a further head")
    weights = load_file(folder / "model.safetensors") | {"mtp.layers.0.weight": torch.ones(4)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    params = tiny_params(folder)
    unit = desk.unit(desk.commit_shard(tiny_documents((5, 6))), params)
    desk.run(params, unit)
    for output in unit.outputs:
        assert read_manifest(Path(output.path)).provenance["unused_weights"] == {"multi-token prediction": 1}


def test_caches_of_an_empty_shard_are_empty_and_committed(desk: Desk, teacher_folder: Path) -> None:
    params = tiny_params(teacher_folder)
    output = plan_output("shards_manifest", {"input": "none"}, recipe_folder=desk.recipe_folder, partition_key=KEY)
    with desk.writer(output) as writer:
        writer.commit(parts=0, checks={}, provenance={})
    unit = desk.unit(Path(output.path), params)
    desk.run(params, unit)
    for cache in unit.outputs:
        manifest = read_manifest(Path(cache.path))
        assert (manifest.n_documents, manifest.n_tokens, manifest.parts) == (0, 0, ())
        assert manifest.checks["recomputed"]["passed"] is True
        found = check_all(ResultFiles(Path(cache.path)), ResultFiles(Path(output.path)))
        # "schema" asks for parameters that the identities of these tests do not have
        assert [(r.name, r.description) for r in found if not r.passed and r.name != "schema"] == []
        assert len(CacheReader.from_folders([Path(cache.path)])) == 0
    full = desk.unit(desk.commit_shard(tiny_documents((5, 6)), "shard-00001"), params, key="shard-00001")
    desk.run(params, full)
    for asset in CACHES:
        assert CacheReader(desk.recipe_folder, asset).document_ids == ["doc-000", "doc-001"]


def test_a_token_id_beyond_the_embeddings_names_its_document(desk: Desk, teacher_folder: Path) -> None:
    params = tiny_params(teacher_folder)
    documents = tiny_documents((5, 6, 7))
    documents.input_ids[8] = VOCABULARY
    unit = desk.unit(desk.commit_shard(documents), params)
    with pytest.raises(
        RecipeError,
        match=rf"document 'doc-001' \(row 1 of the shard, record 1 of source 'tiny'\) has token id {VOCABULARY}, "
        rf"and the teacher has embeddings for ids 0 to {VOCABULARY - 1} \(1 of 3 documents",
    ):
        desk.run(params, unit)


def test_recomputation_reports_the_largest_differences(uninterrupted: WorkUnit) -> None:
    record = {o.asset: read_manifest(Path(o.path)).checks["recomputed"] for o in uninterrupted.outputs}
    assert 0 < record["topk_cache"]["max_abs_logprob_difference"] < 0.01
    assert record["topk_cache"]["max_abs_logsumexp_difference"] < 1e-5
    assert 0 < record["hidden_state_cache"]["max_relative_hidden_difference"] <= 2**-8
    assert record["embedding_cache"]["max_abs_embedding_difference"] < 1e-5
    for numbers in record.values():
        assert 0 <= numbers["worst_over_tolerance"] <= 1


def test_events_tell_of_the_load_and_the_progress(desk: Desk, teacher_folder: Path) -> None:
    params = tiny_params(teacher_folder)
    desk.run(params, desk.unit(desk.commit_shard(tiny_documents([4, 5])), params))
    (loaded,) = desk.events("teacher_loaded")
    assert loaded["n_parameters"] > 0
    assert loaded["load_s"] > 0
    assert desk.events("progress")[-1] | {"tokens_per_s": 0} == {
        "partition_key": "shard-00000",
        "n_documents": 2,
        "done_documents": 2,
        "n_tokens": 9,
        "done_tokens": 9,
        "tokens_per_s": 0,
    }


@pytest.mark.parametrize("order", [CACHES, CACHES[::-1], ("hidden_state_cache", "embedding_cache", "topk_cache")])
def test_caches_made_one_by_one_have_the_bytes_of_caches_made_together(
    order: tuple[Asset, ...], desk: Desk, teacher_folder: Path, uninterrupted: WorkUnit
) -> None:
    params = tiny_params(teacher_folder)
    shard_folder = desk.commit_shard(tiny_documents(LENGTHS))
    for asset in order:
        desk.run(params, desk.unit(shard_folder, params, (asset,)))
    assert part_bytes(desk.unit(shard_folder, params)) == part_bytes(uninterrupted)


@pytest.mark.parametrize("n_batches", range(5))
def test_interrupted_run_resumes_after_its_last_whole_part_with_the_same_bytes(
    n_batches: int, desk: Desk, teacher_folder: Path, uninterrupted: WorkUnit
) -> None:
    params = tiny_params(teacher_folder)
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params)
    with pytest.raises(InterruptedTaskError, match="finished parts are on disk"):
        desk.run(params, unit, StopAfter(n_batches))
    finished = {path: path.stat().st_mtime_ns for o in unit.outputs for path in Path(o.path).glob("part-*")}
    desk.run(params, unit)
    assert part_bytes(unit) == part_bytes(uninterrupted)
    assert finished == {path: path.stat().st_mtime_ns for path in finished}, "finished parts are not made again"


def test_part_that_one_cache_misses_is_made_again_for_that_cache_alone(
    desk: Desk, teacher_folder: Path, uninterrupted: WorkUnit
) -> None:
    params = tiny_params(teacher_folder)
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params)
    with pytest.raises(InterruptedTaskError):
        desk.run(params, unit, StopAfter(4))
    hidden = next(Path(o.path) for o in unit.outputs if o.asset == "hidden_state_cache")
    (hidden / "part-00000.arrow").unlink()
    finished = {path: path.stat().st_mtime_ns for o in unit.outputs for path in Path(o.path).glob("part-*")}
    assert finished
    desk.run(params, unit)
    assert part_bytes(unit) == part_bytes(uninterrupted)
    assert finished == {path: path.stat().st_mtime_ns for path in finished}


def test_run_that_finds_all_parts_on_disk_computes_nothing(
    desk: Desk, teacher_folder: Path, uninterrupted: WorkUnit
) -> None:
    params = tiny_params(teacher_folder)
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params)
    desk.run(params, unit)
    assert desk.run(params, unit)["computed_tokens"] == 0
    assert part_bytes(unit) == part_bytes(uninterrupted)


def test_different_max_lengths_come_from_one_pass(desk: Desk, teacher_folder: Path) -> None:
    params = tiny_params(
        teacher_folder,
        topk=TopkParams(k=4, max_length=100),
        hidden_states=HiddenStateParams(blocks=(0, 2), max_length=16),
        embeddings=EmbeddingParams(max_length=64),
    )
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params)
    desk.run(params, unit)
    n_tokens = {o.asset: read_manifest(Path(o.path)).n_tokens for o in unit.outputs}
    assert n_tokens == {
        "topk_cache": sum(LENGTHS),
        "hidden_state_cache": sum(min(n, 16) for n in LENGTHS),
        "embedding_cache": sum(min(n, 64) for n in LENGTHS),
    }
    assert all(read_manifest(Path(o.path)).checks["recomputed"]["passed"] for o in unit.outputs)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_bfloat16_teacher_stays_within_the_stated_bound(architecture: str, desk: Desk) -> None:
    folder = save_teacher(desk.folder / "teacher", architecture)
    params = tiny_params(folder, dtype="bfloat16", recompute_documents=100)
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params)
    desk.run(params, unit)
    for output in unit.outputs:
        record = read_manifest(Path(output.path)).checks["recomputed"]
        assert record["n_documents"] == len(LENGTHS)
        assert record["passed"], record


def test_difference_is_recorded_as_failed_and_the_result_committed(
    desk: Desk, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes that the encoders are given are wrong, so what is read back must be found wrong."""

    def wrong(documents: Documents, **arrays: Any) -> Any:
        arrays["topk_logprobs_Mk"] = arrays["topk_logprobs_Mk"] * np.float16(1.01)
        return encode_topk(documents, **arrays)

    monkeypatch.setattr("kd_assets.teacher.partition.window.encode_topk", wrong)
    params = tiny_params(teacher_folder)
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params)
    desk.run(params, unit)
    passed = {o.asset: read_manifest(Path(o.path)).checks["recomputed"]["passed"] for o in unit.outputs}
    assert passed == {"topk_cache": False, "hidden_state_cache": True, "embedding_cache": True}


def test_nan_weights_fail_the_partition_naming_the_document_and_commit_nothing(
    desk: Desk, teacher_folder: Path
) -> None:
    weights = load_file(teacher_folder / "model.safetensors")
    documents = tiny_documents(LENGTHS)
    token = int(documents.slice(6, 1).input_ids[0])
    weights["model.embed_tokens.weight"][token] = float("nan")
    folder = desk.folder / "broken"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((teacher_folder / "config.json").read_text())
    params = tiny_params(folder)
    unit = desk.unit(desk.commit_shard(documents), params)
    with pytest.raises(NonFiniteTeacherError, match=r"partition shard-00000: .* document 'doc-\d\d\d'"):
        desk.run(params, unit)
    assert not any((Path(o.path) / "manifest.json").exists() for o in unit.outputs)


def test_shard_of_another_tokenizer_is_refused(desk: Desk, teacher_folder: Path) -> None:
    params = tiny_params(teacher_folder)
    unit = desk.unit(desk.commit_shard(tiny_documents([10, 10], vocabulary=VOCABULARY * 100)), params)
    with pytest.raises(
        RecipeError, match=r"the teacher has embeddings for ids 0 to 199 \(2 of 2 documents .* or was another one"
    ):
        desk.run(params, unit)
    assert not any(Path(o.path).exists() for o in unit.outputs)


def test_cache_that_the_recipe_lacks_is_refused(desk: Desk, teacher_folder: Path) -> None:
    params = tiny_params(teacher_folder, topk=None)
    unit = desk.unit(desk.commit_shard(tiny_documents([4])), params)
    with pytest.raises(RecipeError, match="topk_cache is asked for, and the recipe tiny has no such cache"):
        desk.run(params, unit)
    with pytest.raises(RecipeError, match="no cache is asked for"):
        desk.run(params, dataclasses.replace(unit, outputs=()))


def test_unit_without_its_shard_is_refused(desk: Desk, teacher_folder: Path) -> None:
    params = tiny_params(teacher_folder)
    unit = desk.unit(desk.folder, params)
    with pytest.raises(ContractError, match="expected one shard as input, found 0"):
        desk.run(params, dataclasses.replace(unit, inputs={}))


def test_documents_beyond_the_teachers_context_are_warned_of(desk: Desk, teacher_folder: Path) -> None:
    params = tiny_params(teacher_folder, topk=TopkParams(k=4, max_length=1000))
    desk.run(params, desk.unit(desk.commit_shard(tiny_documents([300])), params))
    (warning,) = desk.events("warning")
    assert "has a document of 300 tokens, the teacher's context is 256" in warning["message"]


def test_documents_whose_states_depend_on_what_ran_before_are_refused(desk: Desk) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    folder = save_teacher(desk.folder / "dynamic", rope_parameters=rope, max_position_embeddings=16)
    assert tiny_config("llama", rope_parameters=rope).rope_parameters["rope_type"] == "dynamic"
    teacher = load_teacher(tiny_params(folder), digests=None, warn=print)
    assert check_length(16, teacher, "shard-00000") is None
    with pytest.raises(RecipeError, match=r"beyond 16 .* lower max_length of every cache"):
        check_length(17, teacher, "shard-00000")


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_documents_beyond_the_end_of_a_table_of_positions_are_refused(desk: Desk, architecture: str) -> None:
    """On a GPU the assertion in its kernel would take all later partitions with it."""
    folder = save_teacher(desk.folder / architecture, architecture, max_position_embeddings=16)
    teacher = load_teacher(tiny_params(folder), digests=None, warn=print)
    assert check_length(16, teacher, "shard-00000") is None
    with pytest.raises(RecipeError, match=r"has positions for 16: lower max_length"):
        check_length(17, teacher, "shard-00000")


def test_sample_is_the_same_for_every_attempt_and_another_for_every_partition() -> None:
    one = sampled_documents(1000, 3, seed=0, partition_key="shard-00000")
    assert one == sampled_documents(1000, 3, seed=0, partition_key="shard-00000") == sorted(one)
    assert one != sampled_documents(1000, 3, seed=0, partition_key="shard-00001")
    assert one != sampled_documents(1000, 3, seed=1, partition_key="shard-00000")
    assert sampled_documents(2, 5, seed=0, partition_key="x") == [0, 1]


def test_weights_of_another_teacher_give_another_fingerprint(teacher_folder: Path, tmp_path: Path) -> None:
    assert weights_fingerprint(save_teacher(tmp_path, "qwen3"), None) != weights_fingerprint(teacher_folder, None)
