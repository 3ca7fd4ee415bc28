"""What a shard's manifest says of its samples, lengths, rows, reasons, fingerprints and licences."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd_assets.contract import JobFile
from kd_assets.errors import ContractError, InterruptedTaskError
from kd_assets.sources.records import Record
from kd_assets.sources.shard_facts import length_facts, samples_of, source_facts
from kd_assets.store import SAMPLES_NAME, Samples, plan_output, read_shard, verify
from kd_assets_tests.sources.conftest import MARKED_TEMPLATE, UNMARKED_TEMPLATE, SaveTokenizer
from kd_assets_tests.sources.records.parsing import range_of
from kd_assets_tests.sources.test_shards import ANSWER, QUESTION, StopAfter, make_job, run, write_jsonl

RECORDS: list[Any] = [
    {"text": "The import statement finds a module"},
    {"id": "chat", "messages": [QUESTION, ANSWER]},
    {"text": ""},
    {"text": 3},
    {"messages": [{"role": "robot", "content": "x"}]},
    "broken",
    {"text": "x " * 200},
]


def job_of(folder: Path, tokenizer: Path, records: list[Any] = RECORDS, **params: Any) -> JobFile:
    folder.mkdir(exist_ok=True)
    return make_job(folder, write_jsonl(folder / "web.jsonl", records), tokenizer, on_bad_record="skip", **params)


def folder_of(job: JobFile) -> Path:
    return Path(job.units[0].outputs[0].path)


def samples(job: JobFile) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder_of(job) / SAMPLES_NAME).to_pylist()
    return rows


def test_each_document_has_a_row_of_samples_with_the_hash_of_its_content(
    tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    job = job_of(tmp_path / "a", save_tokenizer())
    (manifest,) = run(job)
    shard = read_shard(folder_of(job))
    rows = samples(job)
    assert [row["document_id"] for row in rows] == shard.document_ids == ["web-000000000", "chat", "web-000000006"]
    assert [row["parent_id"] for row in rows] == shard.document_ids
    assert [row["record_number"] for row in rows] == [0, 1, 6]
    assert [row["n_tokens"] for row in rows] == shard.n_tokens_D.tolist()
    assert sum(row["n_loss_tokens"] for row in rows) == manifest.facts["n_loss_tokens"]
    assert {(row["source"], row["file"]) for row in rows} == {("web", "web.jsonl")}
    expected = hashlib.sha256(b'["web",{"text":"The import statement finds a module"}]').hexdigest()[:32]
    assert rows[0]["sample_id"] == expected
    data = (folder_of(job) / SAMPLES_NAME).read_bytes()
    assert manifest.facts["files"] == {SAMPLES_NAME: {"n_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    report = verify(folder_of(job))
    assert (report.problems, report.notes) == ((), ())


def test_samples_keep_their_ids_where_records_move_to_another_place(
    tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    one, other = (
        job_of(tmp_path / name, save_tokenizer(), records)
        for name, records in (("one", RECORDS), ("other", [{"text": "before", "url": "x"}, *reversed(RECORDS)]))
    )
    run(one)
    run(other)
    ids = [row["sample_id"] for row in samples(one)]
    assert [row["sample_id"] for row in samples(other)][1:] == ids[::-1]


@pytest.mark.parametrize("n_parts", [1, 2])
def test_a_resumed_shard_has_the_samples_of_one_that_was_not_stopped(
    tmp_path: Path, save_tokenizer: SaveTokenizer, n_parts: int
) -> None:
    records = [{"text": f"document {i}"} for i in range(9)]
    whole = job_of(tmp_path / "whole", save_tokenizer(), records, part_documents=3)
    (expected,) = run(whole)
    stopped = job_of(tmp_path / "stopped", save_tokenizer(), records, part_documents=3)
    with pytest.raises(InterruptedTaskError):
        run(stopped, stop=StopAfter(folder_of(stopped), n_parts))
    assert not (folder_of(stopped) / SAMPLES_NAME).exists()
    (manifest,) = run(stopped)
    assert manifest.facts == expected.facts
    assert samples(stopped) == samples(whole)


def test_a_lost_samples_file_is_made_again_and_no_part_is(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    job = job_of(tmp_path, save_tokenizer())
    (manifest,) = run(job)
    (part,) = folder_of(job).glob("part-*")
    made_at, data = part.stat().st_mtime_ns, (folder_of(job) / SAMPLES_NAME).read_bytes()
    (folder_of(job) / SAMPLES_NAME).unlink()
    (again,) = run(job)
    assert (folder_of(job) / SAMPLES_NAME).read_bytes() == data
    assert (part.stat().st_mtime_ns, again.facts, again.data_version) == (
        made_at,
        manifest.facts,
        manifest.data_version,
    )


def test_a_shard_without_documents_has_empty_samples_and_facts(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    job = job_of(tmp_path, save_tokenizer(), ["broken"])
    (manifest,) = run(job)
    assert samples(job) == []
    facts = manifest.facts
    assert (facts["p95_document_tokens"], facts["learned_share"], facts["length_histogram"]) == (0.0, 0.0, [])


def test_skipped_records_are_counted_by_kind(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    (manifest,) = run(job_of(tmp_path / "a", save_tokenizer()))
    assert manifest.facts["bad_record_kinds"] == {"not JSON": 1, "not of its shape": 1, "unknown role": 1}
    assert sum(manifest.facts["bad_record_kinds"].values()) == manifest.facts["n_bad_records"]
    (manifest,) = run(job_of(tmp_path / "b", save_tokenizer(), [{"text": "x"}]))
    assert "bad_record_kinds" not in manifest.facts


def test_rows_revisions_and_licences_are_those_of_the_plan(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    job = job_of(tmp_path, save_tokenizer())
    pinned = [{"name": "web", "licence": "CC0-1.0", "revision": "v1"}, {"name": "other", "licence": "MIT"}]
    job = dataclasses.replace(job, provenance={"sources": pinned})
    (manifest,) = run(job)
    assert manifest.facts["source_rows"] == [
        {"source": "web", "file": "web.jsonl", "revision": "v1", "first": 0, "last": 6, "records": 7}
    ]
    assert manifest.facts["licences"] == ["CC0-1.0"]


def test_rows_of_one_file_in_several_ranges_are_told_together() -> None:
    ranges = [
        range_of(first_record=0, n_records=10, file_name="a", dropped=(3, 4)),
        range_of(first_record=0, n_records=5, file_name="b"),
        range_of(first_record=10, n_records=10, file_name="a"),
    ]
    assert source_facts(ranges, ())["source_rows"] == [
        {"source": "web", "file": "a", "revision": None, "first": 0, "last": 19, "records": 18},
        {"source": "web", "file": "b", "revision": None, "first": 0, "last": 4, "records": 5},
    ]
    assert source_facts(ranges, ())["licences"] == ["unknown"]


def test_the_fingerprints_of_tokenizer_and_template_are_there(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    hashes: dict[str, str] = {}
    for template in (MARKED_TEMPLATE, UNMARKED_TEMPLATE):
        folder = tmp_path / str(len(hashes))
        job = job_of(folder, save_tokenizer(template))
        (manifest,) = run(job)
        assert job.shards is not None
        assert manifest.facts["tokenizer_fingerprint"] == job.shards.tokenizer_fingerprint
        hashes[template] = manifest.facts["chat_template_sha256"]
    assert hashes == {template: hashlib.sha256(template.encode()).hexdigest() for template in hashes}
    (manifest,) = run(
        job_of(tmp_path / "recipes own", save_tokenizer(MARKED_TEMPLATE), chat_template=UNMARKED_TEMPLATE)
    )
    assert manifest.facts["chat_template_sha256"] == hashes[UNMARKED_TEMPLATE]
    (manifest,) = run(job_of(tmp_path / "texts", save_tokenizer(), [{"text": "x"}]))
    assert "chat_template_sha256" not in manifest.facts, "no record is a chat"


# ---------------------------------------------------------------- in numbers


def made_up(n_tokens: list[int], n_loss_tokens: list[int]) -> Samples:
    words = [str(i) for i in range(len(n_tokens))]
    return Samples(
        document_id=words,
        parent_id=words,
        sample_id=words,
        source=words,
        file=words,
        record_number=np.arange(len(words)),
        n_tokens=np.array(n_tokens, dtype=np.int64),
        n_loss_tokens=np.array(n_loss_tokens, dtype=np.int64),
    )


def test_lengths_are_counted_in_powers_of_two_and_learned_shares_in_tenths() -> None:
    facts = length_facts(made_up([1, 2, 3, 4, 7, 8], [0, 1, 3, 0, 7, 1]))
    assert facts["length_histogram"] == [1, 2, 2, 1]
    assert facts["learned_histogram"] == [2, 1, 0, 0, 0, 1, 0, 0, 0, 2]
    assert facts["learned_share"] == round(12 / 25, 6)
    assert facts["p95_document_tokens"] == 7.75


def record(document_id: str, number: int) -> Record:
    return Record(where="x", source="web", number=number, document_id=document_id, text="x", sample_id=document_id)


@pytest.mark.parametrize(
    ("document_id", "number", "parent"),
    [("a", 0, "a"), ("a#2", 0, "a"), ("a/3", 0, "a"), ("a#2/3", 0, "a"), ("a#1", 1, "a#1"), ("a#1/2", 1, "a#1")],
)
def test_documents_of_one_record_have_it_as_their_parent(
    tmp_path: Path, save_tokenizer: SaveTokenizer, document_id: str, number: int, parent: str
) -> None:
    """The part is one of a real shard whose record has that id."""
    rows = [{"id": "x", "text": "x"}] * number + [{"id": document_id, "text": "x"}]
    job = job_of(tmp_path, save_tokenizer(), rows)
    (manifest,) = run(job)
    parts = {part.index: part for part in manifest.parts}
    others = [record("x", 0)] if number else []
    found = samples_of(folder_of(job), parts, [*others, record("a", 0), record("a#1", 1)])
    assert found.parent_id[-1] == parent
    with pytest.raises(ContractError, match="is of none of the records"):
        samples_of(folder_of(job), parts, [record("b", 0)])


def test_a_plan_of_an_earlier_version_names_the_same_result(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    """Samples are of no identity: what a shard is called does not depend on them."""
    job = job_of(tmp_path, save_tokenizer())
    output = job.units[0].outputs[0]
    (manifest,) = run(job)
    assert "samples" not in json.dumps(manifest.identity)
    again = plan_output(
        "shards_manifest", output.identity, recipe_folder=Path(job.recipe_folder), partition_key="shard-00000"
    )
    assert again.fingerprint == manifest.fingerprint
