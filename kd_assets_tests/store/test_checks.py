"""The checks pass on sound results, and each fails, with the right numbers, on what it is there to find."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kd_assets.contract import CACHES, Asset
from kd_assets.durable import file_sha256
from kd_assets.store import (
    CheckResult,
    Documents,
    ResultFiles,
    check_all,
    check_rebuilt_with,
    encode_embeddings,
    encode_hidden_states,
    encode_topk,
    failed_check,
    part_stats,
    read_head,
    read_manifest,
    set_head,
)
from kd_assets.store.checking import checks
from kd_assets.store.checking.rows import expected_schema, schema_difference
from kd_assets.store.partfile import PartFile
from kd_assets.store.reading import parts
from kd_assets_tests.store import examples
from kd_assets_tests.store.test_verify import replace_part


def check_schema(folder: Path) -> CheckResult:
    return checks.check_schema(ResultFiles(folder))


def check_complete(folder: Path, shard: Path) -> CheckResult:
    return checks.check_complete(ResultFiles(folder), ResultFiles(shard))


def check_finite(folder: Path) -> CheckResult:
    return checks.check_finite(ResultFiles(folder))


def check_recomputed(folder: Path) -> CheckResult:
    return checks.check_recomputed(ResultFiles(folder))


def test_sound_results_pass_all_checks_with_their_numbers(store: Path) -> None:
    folders = examples.commit_all(store)
    shard = folders["shards_manifest"]
    for asset in CACHES:
        results = [
            check_schema(folders[asset]),
            check_complete(folders[asset], shard),
            check_finite(folders[asset]),
            check_recomputed(folders[asset]),
        ]
        assert [result.name for result in results] == ["schema", "complete", "finite", "recomputed"]
        assert [result.description for result in results if not result.passed] == []
    assert check_complete(folders["topk_cache"], shard).numbers == {
        "n_documents": 4,
        "expected_documents": 4,
        "n_tokens": 15,
        "expected_tokens": 15,
    }
    assert check_schema(folders["hidden_state_cache"]).numbers == {"n_parts": 2, "n_columns": 6}
    assert check_finite(folders["topk_cache"]).numbers["n_non_finite"] == 0
    assert check_recomputed(folders["topk_cache"]).numbers == {
        "n_documents": 2,
        "max_abs_logprob_difference": 1e-4,
    }


def test_shard_is_checked_against_itself(store: Path) -> None:
    folder, _ = examples.commit(store, "shards_manifest")
    for result in (check_schema(folder), check_complete(folder, folder), check_finite(folder)):
        assert result.passed, result.description
    assert check_complete(folder, folder).numbers["n_tokens"] == 16


def test_missing_document_fails_complete(store: Path) -> None:
    shard, _ = examples.commit(store, "shards_manifest")
    folder, _ = examples.commit(store, "topk_cache", docs=examples.documents().slice(0, 3))
    result = check_complete(folder, shard)
    fails(result, "has 3 documents, its shard has 4")
    assert (result.numbers["n_documents"], result.numbers["expected_documents"]) == (3, 4)
    assert (result.numbers["n_tokens"], result.numbers["expected_tokens"]) == (9, 15)


def test_documents_of_another_shard_fail_complete(store: Path) -> None:
    docs = examples.documents()
    renamed = Documents(
        document_ids=["document-0", "document-1", "document-3", "document-2"],
        offsets=docs.offsets,
        input_ids=docs.input_ids,
        loss_mask=docs.loss_mask,
    )
    shard, _ = examples.commit(store, "shards_manifest", docs=renamed)
    folder, _ = examples.commit(store, "embedding_cache")
    fails(check_complete(folder, shard), "document 2 is 'document-2', in its shard 'document-3'")


def test_tokens_cut_too_short_fail_complete(store: Path) -> None:
    shard, _ = examples.commit(store, "shards_manifest")
    folder, _ = examples.commit(store, "topk_cache", params={"k": examples.K, "max_length": 7})  # cut at 6 all the same
    result = check_complete(folder, shard)
    fails(result, "'document-3' has 6 tokens, expected 7")
    assert (result.numbers["n_tokens"], result.numbers["expected_tokens"]) == (15, 16)


@pytest.mark.parametrize("asset", CACHES)
def test_missing_and_truncated_parts_fail_complete_and_schema(store: Path, asset: Asset) -> None:
    shard, _ = examples.commit(store, "shards_manifest")
    folder, _ = examples.commit(store, asset)
    part = sorted(folder.glob("part-*"))[1]
    part.write_bytes(part.read_bytes()[:-20])
    for result in (check_complete(folder, shard), check_schema(folder)):
        fails(result, rf"{part}: expected \d+ bytes, it has \d+; remove this file and materialize")
    part.unlink()
    for result in (check_complete(folder, shard), check_schema(folder)):
        fails(result, rf"{part}: expected \d+ bytes, it is missing")


@pytest.mark.parametrize("asset", CACHES)
def test_one_flipped_bit_fails_every_check_whatever_it_asks(store: Path, asset: Asset) -> None:
    shard, _ = examples.commit(store, "shards_manifest")
    folder, _ = examples.commit(store, asset)
    assert all(result.passed for result in all_four(folder, shard))
    part = sorted(folder.glob("part-*"))[1]
    whole = part.read_bytes()
    for at in range(0, len(whole), 97):
        part.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        for result in check_all(ResultFiles(folder), ResultFiles(shard)):
            fails(result, f"{part} was changed after its commit: it has sha256")


def test_a_shard_that_rotted_fails_the_comparison_with_it(store: Path) -> None:
    folders = examples.commit_all(store)
    examples.flip_byte(folders["shards_manifest"] / "part-00000.parquet")
    results = check_all(ResultFiles(folders["topk_cache"]), ResultFiles(folders["shards_manifest"]))
    assert {result.name for result in results if not result.passed} == {"complete"}


def test_a_result_in_the_place_of_another_fails_every_check(store: Path) -> None:
    folders = examples.commit_all(store)
    elsewhere = folders["topk_cache"].parent.with_name("tiny-00001") / folders["topk_cache"].name
    elsewhere.parent.mkdir()
    folders["topk_cache"].rename(elsewhere)
    for result in check_all(ResultFiles(elsewhere), ResultFiles(folders["shards_manifest"])):
        fails(result, "holds the result topk_cache/.*/tiny-00000/.*, which is not its place")


def test_result_that_is_not_committed_fails_every_check(store: Path) -> None:
    folder = store / "nothing here"
    for result in (
        check_schema(folder),
        check_complete(folder, folder),
        check_finite(folder),
        check_recomputed(folder),
    ):
        fails(result, f"{folder} has no manifest.json")


def test_columns_of_another_k_fail_schema(store: Path) -> None:
    folder, _ = examples.commit(store, "topk_cache", params={"k": 5, "max_length": examples.MAX_LENGTH})
    fails(check_schema(folder), r"column topk_ids: expected .*\[5\].*, found .*\[4\]")


def test_a_final_state_that_is_not_there_fails_schema(store: Path) -> None:
    params = {"blocks": [0], "max_length": 6, "final": ["before_norm", "after_norm"]}
    folder, manifest = examples.commit(store, "hidden_state_cache", params=params)
    assert check_schema(folder).passed
    expected = expected_schema(manifest, examples.HIDDEN_SIZE)
    assert expected is not None
    kept = examples.table("hidden_state_cache", examples.documents(), states=(0, "before_norm"))
    assert schema_difference(expected, kept.schema) == "column hidden_final_after_norm is missing"


def test_the_check_rebuilt_is_shown_with_its_numbers_where_it_was_made_and_only_there(store: Path) -> None:
    folders = examples.commit_all(store)
    shard = ResultFiles(folders["shards_manifest"])
    names = [result.name for result in check_all(ResultFiles(folders["hidden_state_cache"]), shard)]
    assert "rebuilt" not in names
    both = {"recomputed": examples.RECOMPUTED}
    params = {"blocks": [], "max_length": 6, "final": ["after_norm"]}
    folder, _ = examples.commit(store, "hidden_state_cache", params=params, checks=both | {"rebuilt": examples.REBUILT})
    result = check_all(ResultFiles(folder), shard)[-1]
    assert (result.name, result.passed) == ("rebuilt", True)
    assert result.description == "7 positions of 2 documents rebuilt"
    assert result.numbers["worst_over_tolerance"] == examples.REBUILT["worst_over_tolerance"]
    params["max_length"] = 5
    record = examples.REBUILT | {"passed": False, "worst_over_tolerance": 7.25}
    folder, _ = examples.commit(store, "hidden_state_cache", params=params, checks=both | {"rebuilt": record})
    fails(check_all(ResultFiles(folder), shard)[-1], r"rebuilt from the final states are not those .*\(7.25 times")
    params["max_length"] = 4
    not_made = {"passed": None, "not_made": "the head lies in pieces"}
    folder, _ = examples.commit(store, "hidden_state_cache", params=params, checks=both | {"rebuilt": not_made})
    assert "rebuilt" not in [result.name for result in check_all(ResultFiles(folder), shard)]


@pytest.mark.parametrize(
    ("record", "is_found"),
    [
        ({}, True),
        ({"compared_with": "f" * 64}, False),
        ({"compared_with": None}, False),
        ({"passed": False}, False),
        ({"passed": None, "not_made": "the head lies in pieces"}, False),
    ],
)
def test_the_check_rebuilt_of_a_result_without_a_record_is_that_of_the_cache_that_was_compared_with_it(
    store: Path, record: dict[str, Any], is_found: bool
) -> None:
    topk, manifest = examples.commit(store, "topk_cache", checks={"recomputed": examples.RECOMPUTED})
    rebuilt = examples.REBUILT | {"compared_with": manifest.fingerprint} | record
    checks = {"recomputed": examples.RECOMPUTED, "rebuilt": rebuilt}
    params = {"blocks": [], "max_length": 6, "final": ["after_norm"]}
    states, _ = examples.commit(store, "hidden_state_cache", params=params, checks=checks)
    found = check_rebuilt_with(ResultFiles(topk), ResultFiles(states))
    assert (found is not None) is is_found
    if found is not None:
        assert (found.name, found.passed) == ("rebuilt", True)
        assert found.description == "7 positions of 2 documents rebuilt, recorded with hidden_state_cache"
        assert found.numbers["worst_over_tolerance"] == examples.REBUILT["worst_over_tolerance"]
        examples.flip_byte(topk / manifest.parts[0].name)
        damaged = check_rebuilt_with(ResultFiles(topk), ResultFiles(states))
        assert damaged is not None
        fails(damaged, "part-")
    assert check_rebuilt_with(ResultFiles(states), ResultFiles(topk)) is None


def test_columns_of_other_blocks_fail_schema(store: Path) -> None:
    folder, _ = examples.commit(store, "hidden_state_cache", params={"blocks": [0, 1], "max_length": 6})
    fails(check_schema(folder), "column hidden_block_1 is missing")


def test_parameters_missing_from_the_identity_fail_schema(store: Path) -> None:
    folder, _ = examples.commit(store, "topk_cache", params={})
    fails(check_schema(folder), r"lacks params\['k'\]")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: rows.append_column("extra", rows["n_tokens"]), "column extra is not of this format"),
        (lambda rows: rows.select([1, 0, *range(2, 8)]), "columns are in the order n_tokens, document_id"),
        (lambda rows: rows.replace_schema_metadata({}), "schema metadata"),
        (lambda rows: rows.drop_columns(["loss_mask"]), "column loss_mask is missing"),
    ],
)
def test_other_columns_fail_schema(store: Path, change: Any, reason: str) -> None:
    folder, _ = examples.commit(store, "topk_cache")
    replace_part(folder, change(examples.table("topk_cache", examples.documents((5, 1)))))
    fails(check_schema(folder), reason)


def test_metadata_that_is_no_text_fails_schema_in_words(store: Path) -> None:
    folder, _ = examples.commit(store, "topk_cache")
    rows = examples.table("topk_cache", examples.documents((5, 1)))
    fields = [*rows.schema]
    fields[4] = fields[4].with_metadata({b"\x8a": b"\xff"})
    replace_part(folder, rows.cast(pa.schema(fields, metadata=rows.schema.metadata)))
    fails(check_schema(folder), r"column topk_ids: expected .*found .*8a")


def test_a_part_whose_name_no_file_can_have_fails_every_check(store: Path) -> None:
    folders = examples.commit_all(store)
    manifest = read_manifest(folders["topk_cache"])
    forged = dataclasses.replace(manifest, parts=(dataclasses.replace(manifest.parts[0], name="part\0"),))
    for result in check_all(ResultFiles(folders["topk_cache"], forged), ResultFiles(folders["shards_manifest"])):
        fails(result, "cannot be a file: its manifest was forged")


def test_hidden_sizes_that_differ_between_parts_fail_schema(store: Path) -> None:
    docs = examples.documents((3, 2))
    out = examples.output(store, "embedding_cache")
    with examples.writer(store, out) as result:
        for index, hidden_size in enumerate((4, 5)):
            part = docs.slice(index, 1)
            vectors = np.ones((1, hidden_size), np.float32)
            rows = encode_embeddings(part, mean_DH=vectors, last_token_DH=vectors)
            result.write_part(index, rows, n_tokens=part.n_tokens, stats=part_stats("embedding_cache", rows))
        result.commit(parts=2, checks={}, provenance={})
    fails(check_schema(Path(out.path)), r"part-00001\.parquet: column mean_embedding: expected .*\[4\].*found .*\[5\]")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_fail_finite_with_their_count(store: Path, value: float) -> None:
    docs = examples.documents((3, 2))
    mean = np.ones((2, 4), np.float32)
    mean[1, 2:] = value
    bits = (np.full((5, 4), value, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    numbers = np.full(3, value, np.float32)
    tables = {
        "embedding_cache": (encode_embeddings(docs, mean_DH=mean, last_token_DH=np.ones((2, 4), np.float32)), 2),
        "hidden_state_cache": (encode_hidden_states(docs, {0: bits}), 20),
        "topk_cache": (
            encode_topk(
                docs,
                topk_ids_Mk=np.zeros((3, 2), np.uint32),
                topk_logprobs_Mk=np.full((3, 2), -1, np.float16),
                logsumexp_M=np.zeros(3, np.float32),
                target_logprob_M=numbers,
            ),
            3,
        ),
    }
    for asset in CACHES:
        rows, n_non_finite = tables[asset]
        result = check_finite(commit_rows(store, asset, rows))
        fails(result, rf"part-00000.* has {n_non_finite}(\.0)? values that are NaN or infinite")
        assert result.numbers["n_non_finite"] == n_non_finite


def test_probabilities_above_one_fail_finite(store: Path) -> None:
    """What the original scripts stored was normalised over the kept tokens; worse is a sum above 1."""
    docs = examples.documents((3, 2))

    def rows(probability: float) -> Any:
        return encode_topk(
            docs,
            topk_ids_Mk=np.zeros((3, 2), np.uint32),
            topk_logprobs_Mk=np.full((3, 2), np.log(probability), np.float16),
            logsumexp_M=np.zeros(3, np.float32),
            target_logprob_M=np.zeros(3, np.float32),
        )

    assert check_finite(commit_rows(store / "right", "topk_cache", rows(0.5))).passed  # rounding to float16 included
    result = check_finite(commit_rows(store / "wrong", "topk_cache", rows(0.51)))
    fails(result, "probabilities add up to 1.0")
    assert result.numbers["max_probability_sum"] == pytest.approx(1.02, abs=1e-3)


def test_positions_without_all_their_draws_fail_finite(store: Path) -> None:
    folder, _ = examples.commit(store / "right", "topk_cache", params=examples.WITH_DRAWS)
    assert check_finite(folder).passed
    docs = examples.documents((3, 2))
    rows = examples.table("topk_cache", docs, draws=examples.DRAWS - 1)
    folder = commit_rows(store / "wrong", "topk_cache", rows, params=examples.WITH_DRAWS)
    fails(check_finite(folder), "has 57 draws, expected 20 a position: 60")
    fails(check_schema(folder), "column sampled_ids: expected .*'draws': '20'.* found .*'draws': '19'")


def test_cache_that_lacks_its_draws_fails_schema(store: Path) -> None:
    rows = examples.table("topk_cache", examples.documents((3, 2)))
    folder = commit_rows(store, "topk_cache", rows, params=examples.WITH_DRAWS)
    fails(check_schema(folder), "column sampled_ids is missing")
    fails(check_finite(folder), "has 0 draws, expected 20 a position: 60")


def test_statistics_that_were_not_taken_fail_finite(store: Path) -> None:
    docs = examples.documents((3, 2))
    folder = commit_rows(store, "topk_cache", examples.table("topk_cache", docs), stats={})
    fails(check_finite(folder), "has an unknown number of values that are NaN")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "no record of a recomputation"),
        ({"passed": True}, "no document was recomputed"),
        (examples.RECOMPUTED | {"n_documents": 0}, "no document was recomputed"),
        (examples.RECOMPUTED | {"passed": False}, "recorded as failed"),
        (examples.RECOMPUTED | {"passed": "yes"}, "recorded as failed"),
        (examples.RECOMPUTED | {"max_abs_logprob_difference": math.nan}, "max_abs_logprob_difference is None"),
    ],
)
def test_recomputation_that_differs_or_is_missing_fails(store: Path, record: Any, reason: str) -> None:
    folder, _ = examples.commit(store, "topk_cache", checks={} if record is None else {"recomputed": record})
    fails(check_recomputed(folder), reason)


def test_a_result_recorded_as_failed_never_becomes_current_and_leaves_the_one_that_is(store: Path) -> None:
    good, _ = examples.commit(store, "topk_cache")
    failed = examples.RECOMPUTED | {"passed": False, "worst_over_tolerance": 7.25}
    folder, manifest = examples.commit(
        store, "topk_cache", params={"k": examples.K, "max_length": 7}, checks={"recomputed": failed}
    )
    assert failed_check(manifest) == (
        "check recomputed failed: the recomputation was recorded as failed (7.25 times its tolerance)"
    )
    assert read_head(folder.parent) is None
    set_head(folder)  # as reuse does
    assert read_head(folder.parent) is None
    assert (folder / "manifest.json").exists()
    assert not (folder / "journal.jsonl").exists(), "all else of its commit is done"
    assert read_head(good.parent) == good


def test_numbers_that_left_the_range_of_what_is_stored_are_a_failed_check(store: Path) -> None:
    """-70,000 is a number in float32, and infinite in float16."""
    docs = examples.documents((3, 2))
    beyond = np.full((3, 2), -70_000, np.float32)
    with np.errstate(over="ignore"):
        logprobs = beyond.astype(np.float16)
    rows = encode_topk(
        docs,
        topk_ids_Mk=np.zeros((3, 2), np.uint32),
        topk_logprobs_Mk=logprobs,
        logsumexp_M=np.zeros(3, np.float32),
        target_logprob_M=beyond[:, 0],
    )
    manifest = read_manifest(commit_rows(store, "topk_cache", rows))
    assert failed_check(manifest) == "check finite failed: part-00000.parquet has 6 values that are NaN or infinite"


def test_sound_results_have_failed_no_check(store: Path) -> None:
    for folder in examples.commit_all(store).values():
        assert failed_check(read_manifest(folder)) is None


def all_four(folder: Path, shard: Path) -> list[CheckResult]:
    return [check_complete(folder, shard), check_schema(folder), check_finite(folder), check_recomputed(folder)]


def test_all_checks_of_all_caches_read_each_file_once_and_find_what_each_finds(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = examples.commit_all(store)
    separately = [all_four(folders[asset], folders["shards_manifest"]) for asset in CACHES]
    opened: list[Path] = []
    hashed: list[Path] = []

    def noting_hashes(hash_file: Callable[[Path], str]) -> Callable[[Path], str]:
        def noted(path: Path) -> str:
            hashed.append(path)
            return hash_file(path)

        return noted

    def noting(read: Callable[..., Any]) -> Callable[..., Any]:
        def noted(path: Path, **options: Any) -> Any:
            opened.append(path)
            return read(path, **options)

        return noted

    monkeypatch.setattr(parts, "PartFile", noting(PartFile))
    monkeypatch.setattr(parts, "file_sha256", noting_hashes(file_sha256))
    monkeypatch.setattr(checks, "read_manifest", noting(read_manifest))
    shard = ResultFiles(folders["shards_manifest"])
    assert [check_all(ResultFiles(folders[asset]), shard) for asset in CACHES] == separately
    files = [path for folder in folders.values() for path in folder.glob("part-*")]
    assert sorted(opened) == sorted([*folders.values(), *files])
    assert sorted(hashed) == sorted(files)


@pytest.mark.parametrize("damage", ["cut", "gone", "other columns", "other bytes", "no manifest", "no shard"])
def test_all_checks_together_find_what_each_finds_in_damaged_results(store: Path, damage: str) -> None:
    folders = examples.commit_all(store)
    folder, shard = folders["topk_cache"], folders["shards_manifest"]
    part = sorted(folder.glob("part-*"))[1]
    match damage:
        case "cut":
            part.write_bytes(part.read_bytes()[:-20])
        case "gone":
            part.unlink()
        case "other columns":
            rows = examples.table("topk_cache", examples.documents((5, 1)))
            replace_part(folder, rows.drop_columns(["input_ids"]))
        case "other bytes":
            data = part.read_bytes()
            part.write_bytes(data[:8] + bytes(len(data) - 16) + data[-8:])
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "no shard":
            (shard / "manifest.json").unlink()
    together = check_all(ResultFiles(folder), ResultFiles(shard))
    assert together == all_four(folder, shard)
    assert not all(result.passed for result in together)


def test_all_checks_together_take_the_manifest_from_who_has_read_it(store: Path) -> None:
    folders = examples.commit_all(store)
    folder, shard = folders["topk_cache"], folders["shards_manifest"]
    manifest = read_manifest(folder)
    (folder / "manifest.json").unlink()
    assert [r.passed for r in check_all(ResultFiles(folder, manifest), ResultFiles(shard))] == [True] * 4


def fails(result: CheckResult, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        assert result.passed, result.description


def commit_rows(
    store: Path,
    asset: Asset,
    rows: Any,
    *,
    stats: dict[str, float] | None = None,
    params: dict[str, Any] | None = None,
) -> Path:
    out = examples.output(store, asset, params=params)
    with examples.writer(store, out) as result:
        n_tokens = sum(rows["n_tokens"].to_pylist())
        result.write_part(0, rows, n_tokens=n_tokens, stats=part_stats(asset, rows) if stats is None else stats)
        result.commit(parts=1, checks={}, provenance={})
    return Path(out.path)
