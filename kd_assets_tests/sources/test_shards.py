"""The job of kind `shards`, run for real: sources on disk in, committed results out."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from kd_assets.contract import JobFile, Reporter, ShardsParams, WorkUnit
from kd_assets.errors import (
    BadRecordError,
    ContractError,
    FieldNotUnderstoodError,
    InputError,
    InterruptedTaskError,
    MissingInputError,
    RecipeError,
    StorageUnavailableError,
    StorageUnreachableError,
    TeacherChangedError,
)
from kd_assets.model_files.fingerprints import tokenizer_fingerprint
from kd_assets.sources import shard_parts
from kd_assets.sources.files.raw import RawRecord
from kd_assets.sources.planning.make import plan_shards
from kd_assets.sources.records import Record, reading
from kd_assets.sources.shards import ShardsRunner
from kd_assets.sources.spec import Sharding, SourceSpec
from kd_assets.store import Manifest, committed, plan_output, read_shard
from kd_assets.worker.stop_flag import StopFlag
from kd_assets_tests.sources.conftest import UNMARKED_TEMPLATE, SaveTokenizer
from kd_assets_tests.store.failing import FailingStorage

QUESTION = {"role": "user", "content": "What is a list?"}
ANSWER = {"role": "assistant", "content": "A mutable sequence."}


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def make_job(
    folder: Path,
    source: Path,
    tokenizer: Path,
    *,
    documents_per_shard: int = 1000,
    control_tokens: Literal["text", "tokens"] = "tokens",
    **params: Any,
) -> JobFile:
    """A job over all shards of one source file, planned as the control plane does it."""
    spec = SourceSpec(
        name="web", path=str(source), file_format="jsonl", licence="CC0-1.0", control_tokens=control_tokens
    )
    shards = ShardsParams(
        **{
            "tokenizer": str(tokenizer),
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer, None),
            "max_length": 64,
            **params,
        }
    )
    recipe_folder = folder / "store" / "demo"
    recipe_folder.mkdir(parents=True, exist_ok=True)
    units = []
    for shard in plan_shards([spec], Sharding(documents_per_shard=documents_per_shard), shard_prefix="shard").shards:
        identity = {"max_length": shards.max_length, "part_documents": shards.part_documents, "input": shard.input_hash}
        output = plan_output(
            "shards_manifest", identity, recipe_folder=recipe_folder, partition_key=shard.partition_key
        )
        units.append(WorkUnit(partition_key=shard.partition_key, records=shard.records, outputs=(output,)))
    return JobFile(
        kind="shards",
        recipe="demo",
        key="k",
        recipe_folder=str(recipe_folder),
        events_folder=str(folder / "events"),
        tasks=(tuple(range(len(units))),),
        units=tuple(units),
        shards=shards,
        provenance={"run_id": "r1"},
    )


def runner_of(job: JobFile, *, stop: StopFlag | None = None, stream: io.StringIO | None = None) -> ShardsRunner:
    report = Reporter(None, stream=stream if stream is not None else io.StringIO())
    return ShardsRunner(job, report, StopFlag() if stop is None else stop)


def run(job: JobFile, **options: Any) -> list[Manifest]:
    """Run all units; their manifests."""
    runner = runner_of(job, **options)
    manifests = []
    for unit in job.units:
        runner.run(unit)
        manifest = committed(Path(unit.outputs[0].path), unit.outputs[0].fingerprint)
        assert manifest is not None
        manifests.append(manifest)
    runner.close()
    return manifests


def contents(job: JobFile) -> list[tuple[list[str], list[int], list[int], list[bool]]]:
    shards = [read_shard(Path(unit.outputs[0].path)) for unit in job.units]
    return [(s.document_ids, s.offsets_D1.tolist(), s.input_ids_N.tolist(), s.loss_mask_N.tolist()) for s in shards]


# ---------------------------------------------------------------- what is committed


def test_fields_that_nothing_was_made_of_are_counted(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    rows = [{"text": "one", "url": "x"}, {"text": "two", "url": None, "meta": {}}, {"text": "three"}]
    (manifest,) = run(make_job(tmp_path, write_jsonl(tmp_path / "web.jsonl", rows), save_tokenizer()))
    assert manifest.facts["passed_over_fields"] == {"url": 2, "meta": 1}


def test_names_of_fields_are_told_in_characters_that_can_be_shown(
    tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    rows = ['{"text": "one", "\\ud800": 1, "\\u001b[31m": 1, "' + "x" * 5_000 + '": 1, "é": 1}']
    (manifest,) = run(make_job(tmp_path, write_jsonl(tmp_path / "web.jsonl", rows), save_tokenizer()))
    assert manifest.facts["passed_over_fields"] == {"\\ud800": 1, "\\x1b[31m": 1, "x" * 100: 1, "é": 1}


def test_many_fields_are_counted_one_by_one_up_to_a_number(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    rows = [{"text": "one", **{f"f{i:03d}": i for i in range(100)}}, {"text": "two", "f099": 1}]
    (manifest,) = run(make_job(tmp_path, write_jsonl(tmp_path / "web.jsonl", rows), save_tokenizer()))
    counts = manifest.facts["passed_over_fields"]
    assert (len(counts), counts["f099"], counts["…"], sum(counts.values())) == (65, 2, 36, 101)


def test_a_shard_without_such_fields_has_the_facts_that_it_had(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    (manifest,) = run(make_job(tmp_path, write_jsonl(tmp_path / "web.jsonl", [{"text": "one"}]), save_tokenizer()))
    assert "passed_over_fields" not in manifest.facts


@pytest.mark.parametrize("on_bad_record", ["fail", "skip"])
def test_a_field_that_is_not_understood_is_never_skipped(
    tmp_path: Path, save_tokenizer: SaveTokenizer, on_bad_record: str
) -> None:
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, ANSWER], "tool_choice": "auto"}]
    job = make_job(tmp_path, write_jsonl(tmp_path / "web.jsonl", rows), save_tokenizer(), on_bad_record=on_bad_record)
    with pytest.raises(FieldNotUnderstoodError, match=r"web\.jsonl:2: the chat has 'tool_choice'"):
        run(job)
    assert not Path(job.units[0].outputs[0].path).exists()


def test_records_become_a_committed_shard_that_reads_back(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    tokenizer = save_tokenizer(adds_bos=True)
    records = [
        {"text": "The import statement finds a module"},
        {"id": "chat", "messages": [QUESTION, ANSWER]},
        {"text": ""},
        {"text": "x " * 200},
        {"text": "<|eot|>"},
        {"messages": [QUESTION]},
    ]
    job = make_job(tmp_path, write_jsonl(tmp_path / "web.jsonl", records), tokenizer)
    (manifest,) = run(job)
    shard = read_shard(Path(job.units[0].outputs[0].path))
    assert shard.document_ids == ["web-000000000", "chat", "web-000000003", "web-000000004", "web-000000005"]
    (part,) = manifest.parts
    rows = pq.read_table(Path(job.units[0].outputs[0].path) / part.name).select(["source", "source_record"]).to_pydict()
    assert rows == {"source": ["web"] * 5, "source_record": [0, 1, 3, 4, 5]}
    lengths = shard.n_tokens_D
    assert lengths.max() == 64
    described = {"files", "source_rows", "licences", "tokenizer_fingerprint", "chat_template_sha256"}
    described |= {"p95_document_tokens", "learned_share", "length_histogram", "learned_histogram"}
    assert described < manifest.facts.keys(), "see test_shard_facts"
    assert {name: value for name, value in manifest.facts.items() if name not in described} == {
        "n_records": 6,
        "n_documents": 5,
        "n_tokens": int(lengths.sum()),
        "n_bad_records": 0,
        "n_empty_documents": 1,
        "n_truncated_documents": 1,
        "n_control_token_documents": 1,
        "n_own_ends_documents": 0,
        "n_documents_without_loss": 1,
        "n_loss_tokens": int(np.count_nonzero(shard.loss_mask_N)),
        "min_document_tokens": int(lengths.min()),
        "median_document_tokens": float(np.median(lengths)),
        "max_document_tokens": 64,
        "bad_records": [],
    }
    assert manifest.checks == {}
    assert manifest.provenance["run_id"] == "r1"
    assert {"host", "libraries", "device", "gpu", "joules", "wall_s", "tokens_per_s"} <= manifest.provenance.keys()


def test_the_summary_says_what_became_of_the_records(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    job = make_job(tmp_path, write_jsonl(tmp_path / "web.jsonl", [{"text": "a"}, {"text": ""}]), save_tokenizer())
    summary = runner_of(job).run(job.units[0])
    assert (summary["n_documents"], summary["n_empty_documents"]) == (1, 1)


def test_each_record_is_read_and_parsed_once(
    tmp_path: Path, save_tokenizer: SaveTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": f"document {i}"} for i in range(25)])
    job = make_job(tmp_path, source, save_tokenizer(), part_documents=4)
    parsed: list[int] = []

    def noting(parser: reading.RecordParser, raw: RawRecord) -> Record:
        parsed.append(raw.number)
        return parse(parser, raw)

    parse = reading.RecordParser.parse
    monkeypatch.setattr(reading.RecordParser, "parse", noting)
    storage = FailingStorage(monkeypatch, source)
    (manifest,) = run(job)
    assert manifest.n_documents == 25
    assert parsed == list(range(25))
    assert storage.n_calls == 1, "the file is opened once"


def test_shards_of_one_source_hold_all_of_it_in_order(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": f"document {i}"} for i in range(25)])
    job = make_job(tmp_path, source, save_tokenizer(), documents_per_shard=10)
    assert [manifest.n_documents for manifest in run(job)] == [10, 10, 5]
    assert [i for ids, *_ in contents(job) for i in ids] == [f"web-{i:09d}" for i in range(25)]


@pytest.mark.parametrize("seed", range(4))
def test_parts_and_batches_change_nothing_of_the_documents(
    tmp_path: Path, save_tokenizer: SaveTokenizer, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", hostile_records(random.Random(seed), 60))
    options: dict[str, Any] = {"on_bad_record": "skip"}
    whole = make_job(tmp_path / "whole", source, save_tokenizer(UNMARKED_TEMPLATE), **options)
    (one,) = run(whole)
    monkeypatch.setattr(shard_parts, "BATCH_RECORDS", 3)
    monkeypatch.setattr(shard_parts, "BATCH_CHARACTERS", 40)
    cut = make_job(tmp_path / "cut", source, save_tokenizer(UNMARKED_TEMPLATE), part_documents=7, **options)
    (two,) = run(cut)
    assert contents(whole) == contents(cut)
    assert one.facts == two.facts
    assert [part.n_documents for part in two.parts[:-1]] == [7] * (len(two.parts) - 1)
    assert {name: int(two.stats[name]) for name in two.stats if name != "n_records"}.items() <= {
        **{name: value for name, value in two.facts.items() if name in two.stats},
        # bad and empty records after the last document are of no part
        "n_bad_records": int(two.stats["n_bad_records"]),
        "n_empty_documents": int(two.stats["n_empty_documents"]),
    }.items()


def hostile_records(rng: random.Random, n_records: int) -> list[Any]:
    """Good, bad and empty records in random order."""
    kinds: list[Any] = [
        {"text": ""},
        {"text": "\0 odd \u2028 text"},
        {"messages": [QUESTION, ANSWER]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"text": 7},
        "broken",
        r'{"text": "\ud800"}',
    ]
    return [
        {"text": "good " * rng.randrange(1, 9)} if rng.random() < 0.5 else rng.choice(kinds) for _ in range(n_records)
    ]


# ---------------------------------------------------------------- bad input


def test_one_bad_record_fails_the_shard_with_file_line_and_reason_and_nothing_is_written(
    tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": "a"}, {"text": None}, {"text": 3}])
    job = make_job(tmp_path, source, save_tokenizer(), part_documents=1)
    with pytest.raises(
        BadRecordError, match=rf"^{source}:2: 'text' is null.*and 1 more of 3.*on_bad_record: skip"
    ) as e:
        runner_of(job).run(job.units[0])
    assert e.value.exit_code == 2
    assert list((tmp_path / "store" / "demo").iterdir()) == []


def test_bad_records_are_skipped_counted_and_named_when_the_recipe_says_so(
    tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    records = ["broken", {"text": "a"}, {"id": "x", "text": "b"}, {"id": "x", "text": "c"}]
    source = write_jsonl(tmp_path / "web.jsonl", records)
    job = make_job(tmp_path, source, save_tokenizer(), on_bad_record="skip")
    stream = io.StringIO()
    (manifest,) = run(job, stream=stream)
    assert manifest.n_documents == 2
    assert manifest.facts["n_bad_records"] == 2
    assert [cause.partition(": give one")[0] for cause in manifest.facts["bad_records"]] == [
        f"{source}:1: not JSON: Expecting value at column 1",
        f"{source}:4: id 'x' is already that of {source}:3",
    ]
    (warning,) = (json.loads(line) for line in stream.getvalue().splitlines())
    assert warning["type"] == "warning"
    assert warning["data"]["message"].startswith("2 of 4 records could not become documents")


@pytest.mark.parametrize(
    ("records", "n_bad", "n_empty"), [(["broken"] * 3, 3, 0), ([{"text": ""}] * 3, 0, 3), (["{}", {"text": ""}], 1, 1)]
)
def test_a_shard_all_of_whose_records_are_skipped_is_empty_and_committed(
    tmp_path: Path, save_tokenizer: SaveTokenizer, records: list[Any], n_bad: int, n_empty: int
) -> None:
    job = make_job(tmp_path, write_jsonl(tmp_path / "web.jsonl", records), save_tokenizer(), on_bad_record="skip")
    stream = io.StringIO()
    (manifest,) = run(job, stream=stream)
    assert (manifest.n_documents, manifest.n_tokens, manifest.parts) == (0, 0, ())
    facts = manifest.facts
    assert (facts["n_records"], facts["n_bad_records"], facts["n_empty_documents"]) == (len(records), n_bad, n_empty)
    assert facts["min_document_tokens"] == facts["median_document_tokens"] == facts["max_document_tokens"] == 0
    assert contents(job) == [([], [0], [], [])]
    assert "warning" in stream.getvalue()


def test_documents_without_tokens_alone_make_no_shard_where_nothing_is_skipped(
    tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": ""}] * 3)
    job = make_job(tmp_path, source, save_tokenizer())
    with pytest.raises(BadRecordError, match=rf"none of the 3 records of shard-00000 in {source} .*3 without tokens"):
        runner_of(job).run(job.units[0])
    assert committed(Path(job.units[0].outputs[0].path), job.units[0].outputs[0].fingerprint) is None


@pytest.mark.parametrize("nested", [False, True])
def test_a_token_that_the_teacher_has_no_embedding_for_is_a_bad_record(
    tmp_path: Path, save_tokenizer: SaveTokenizer, nested: bool
) -> None:
    """The tokenizer got a token, and the model no row for it."""
    tokenizer = shutil.copytree(save_tokenizer(), tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    n_embeddings = len(loaded)
    loaded.add_tokens(["<|pad|>"], special_tokens=True)
    loaded.save_pretrained(tokenizer)
    config = {"vocab_size": n_embeddings}
    (tokenizer / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    source = write_jsonl(
        tmp_path / "web.jsonl", [{"text": "one"}, {"text": "two <|pad|>"}, {"text": "long " * 90 + "<|pad|>"}]
    )
    reason = rf"{source}:2: '<\|pad\|>' is token {n_embeddings}, and .* embeddings for ids 0 to {n_embeddings - 1} "
    with pytest.raises(BadRecordError, match=reason):
        run(make_job(tmp_path, source, tokenizer))
    (manifest,) = run(make_job(tmp_path / "skip", source, tokenizer, on_bad_record="skip"))
    assert manifest.n_documents == 2, "the third is cut before the token"
    assert re.match(reason, manifest.facts["bad_records"][0])


def test_a_chat_that_the_template_refuses_is_a_bad_record(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    bad = {"messages": [{"role": "system", "content": "x"}]}
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": "a"}, bad, {"text": "b"}])
    tokenizer = save_tokenizer(template)
    job = make_job(tmp_path / "fail", source, tokenizer)
    with pytest.raises(BadRecordError, match=rf"^{source}:2: the chat template refuses the messages: no system"):
        runner_of(job).run(job.units[0])
    (manifest,) = run(make_job(tmp_path / "skip", source, tokenizer, on_bad_record="skip"))
    assert (manifest.n_documents, manifest.facts["n_bad_records"]) == (2, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("document 3", "Document 3"),
        lambda text: '{"text": "one more in front"}\n' + text,
        lambda text: text[: len(text) // 4],
        lambda text: "",
    ],
)
def test_a_source_that_changed_since_planning_is_refused_before_anything_is_written(
    tmp_path: Path, save_tokenizer: SaveTokenizer, change: Any
) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": f"document {i}"} for i in range(10)])
    job = make_job(tmp_path, source, save_tokenizer(), documents_per_shard=5)
    source.write_text(change(source.read_text()))
    with pytest.raises(
        InputError, match=r"web\.jsonl changed since shard shard-0000\d was planned: materialize shard_plan"
    ):
        run(job)
    assert list((tmp_path / "store" / "demo").iterdir()) == []


def test_growth_of_a_source_does_not_disturb_the_shards_that_were_planned(
    tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": f"document {i}"} for i in range(10)])
    job = make_job(tmp_path, source, save_tokenizer(), documents_per_shard=5)
    with source.open("a") as f:
        f.write('{"text": "late"}\n')
    assert [manifest.n_documents for manifest in run(job)] == [5, 5]


def test_a_source_that_vanished_since_planning_is_named(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": "a"}])
    job = make_job(tmp_path, source, save_tokenizer())
    source.unlink()
    with pytest.raises(MissingInputError, match=str(source)):
        run(job)


def test_a_source_on_storage_that_does_not_answer_is_neither_missing_nor_malformed(
    tmp_path: Path, save_tokenizer: SaveTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": "a"}])
    job = make_job(tmp_path, source, save_tokenizer())
    runner = runner_of(job)
    storage = FailingStorage(monkeypatch, source)
    storage.fail(errno.ESTALE)
    with pytest.raises(StorageUnreachableError, match=rf"cannot read {source}: Stale file handle"):
        runner.run(job.units[0])
    storage.fail(errno.ESTALE, n_failures=1)
    runner.run(job.units[0])


def test_a_job_that_cannot_be_is_refused_at_once(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": "a"}])
    with pytest.raises(TeacherChangedError):
        runner_of(make_job(tmp_path, source, save_tokenizer(), tokenizer_fingerprint="0" * 64))
    with pytest.raises(RecipeError, match="part_documents is 0"):
        runner_of(make_job(tmp_path, source, save_tokenizer(), part_documents=0))
    job = make_job(tmp_path, source, save_tokenizer())
    unit = WorkUnit(partition_key="p", records=job.units[0].records, outputs=())
    with pytest.raises(ContractError, match="one output of asset shards_manifest"):
        runner_of(job).run(unit)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_store_that_cannot_be_written_says_so(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    job = make_job(tmp_path, write_jsonl(tmp_path / "web.jsonl", [{"text": "a"}]), save_tokenizer())
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageUnavailableError):
            run(job)
    finally:
        tmp_path.chmod(0o700)


# ---------------------------------------------------------------- stopping and resuming


class StopAfter(StopFlag):
    """Asks for a stop once this many parts lie in a folder."""

    def __init__(self, folder: Path, n_parts: int) -> None:
        super().__init__()
        self._folder, self._n_parts = folder, n_parts

    @property
    def signal_name(self) -> str | None:
        return "SIGUSR1" if bool(self) else None

    def __bool__(self) -> bool:
        return len(list(self._folder.glob("part-*"))) >= self._n_parts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_parts", [1, 3])
def test_a_stopped_shard_goes_on_after_its_last_part_with_the_same_result(
    tmp_path: Path, save_tokenizer: SaveTokenizer, n_parts: int, seed: int
) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", hostile_records(random.Random(seed), 80))
    options: dict[str, Any] = {"on_bad_record": "skip", "part_documents": 7}
    undisturbed = make_job(tmp_path / "undisturbed", source, save_tokenizer(), **options)
    (expected,) = run(undisturbed)

    job = make_job(tmp_path / "stopped", source, save_tokenizer(), **options)
    folder = Path(job.units[0].outputs[0].path)
    with pytest.raises(InterruptedTaskError, match=f"stopped by SIGUSR1: {n_parts} parts of shard-00000 are on disk"):
        run(job, stop=StopAfter(folder, n_parts))
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    assert len(written) == n_parts
    (manifest,) = run(job)
    assert {name: (folder / name).stat().st_mtime_ns for name in written} == written, (
        "finished parts are not made again"
    )
    assert manifest.data_version == expected.data_version
    assert manifest.facts == expected.facts
    assert manifest.parts == expected.parts
    assert contents(job) == contents(undisturbed)


def test_a_lost_part_in_the_middle_is_made_again_with_the_same_result(
    tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", hostile_records(random.Random(5), 80))
    options: dict[str, Any] = {"on_bad_record": "skip", "part_documents": 7}
    (expected,) = run(make_job(tmp_path / "undisturbed", source, save_tokenizer(), **options))
    job = make_job(tmp_path / "damaged", source, save_tokenizer(), **options)
    folder = Path(job.units[0].outputs[0].path)
    with pytest.raises(InterruptedTaskError):
        run(job, stop=StopAfter(folder, 4))
    first, second, *_ = sorted(folder.glob("part-*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    (manifest,) = run(job)
    assert (manifest.data_version, manifest.facts) == (expected.data_version, expected.facts)


def test_a_stop_after_the_last_part_lets_the_shard_be_committed(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": f"document {i}"} for i in range(10)])
    job = make_job(tmp_path, source, save_tokenizer(), part_documents=5)
    (manifest,) = run(job, stop=StopAfter(Path(job.units[0].outputs[0].path), 2))
    assert manifest.n_documents == 10


def test_a_killed_worker_resumes_and_the_result_is_the_same(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    """With kill -9, through the real worker, in a process of its own."""
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": f"document {i} " * 30} for i in range(2000)])
    undisturbed = make_job(
        tmp_path / "undisturbed", source, save_tokenizer(), part_documents=20, documents_per_shard=2000
    )
    (expected,) = run(undisturbed)
    job = make_job(tmp_path / "killed", source, save_tokenizer(), part_documents=20, documents_per_shard=2000)
    job_file = tmp_path / "job.json"
    job_file.write_text(job.to_json())
    folder = Path(job.units[0].outputs[0].path)
    command = [sys.executable, "-m", "kd_assets.worker", str(job_file)]
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while len(list(folder.glob("part-*"))) < 5 and worker.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    n_left = len(list(folder.glob("part-*")))
    assert 5 <= n_left < len(expected.parts), "the worker was to be killed in the middle"
    assert committed(folder, job.units[0].outputs[0].fingerprint) is None
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = committed(folder, job.units[0].outputs[0].fingerprint)
    assert manifest is not None
    assert (manifest.data_version, manifest.facts) == (expected.data_version, expected.facts)


def test_progress_is_reported(tmp_path: Path, save_tokenizer: SaveTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_parts, "PROGRESS_EVERY_S", 0.0)
    monkeypatch.setattr(shard_parts, "BATCH_RECORDS", 4)
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": f"document {i}"} for i in range(10)])
    stream = io.StringIO()
    (manifest,) = run(make_job(tmp_path, source, save_tokenizer()), stream=stream)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["type"] for event in events] == ["progress"] * 3
    assert [event["data"]["done_documents"] for event in events] == [4, 8, 10]
    assert events[-1]["data"]["done_tokens"] == manifest.n_tokens
    assert {"partition_key", "n_documents", "n_tokens", "tokens_per_s"} <= events[-1]["data"].keys()


# ---------------------------------------------------------------- several documents of one record

REWRITES = UNMARKED_TEMPLATE.replace("m['content'] +", "(m['content'] if loop.last else 'x') +", 1)


def long_chats(n: int) -> list[Any]:
    return [{"id": f"c{i}", "messages": [QUESTION, {**ANSWER, "content": f"{i}"}] * (1 + i % 3)} for i in range(n)]


def test_a_part_is_closed_after_the_record_that_fills_it(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", long_chats(12))
    whole = make_job(tmp_path / "whole", source, save_tokenizer(REWRITES))
    cut = make_job(tmp_path / "cut", source, save_tokenizer(REWRITES), part_documents=4)
    (one,), (two,) = run(whole), run(cut)
    assert contents(whole) == contents(cut)
    assert one.facts == two.facts
    assert [part.n_documents for part in two.parts] == [6, 6, 6, 6]
    assert (two.facts["n_records"], two.facts["n_documents"], two.facts["n_fanned_out_turns"]) == (12, 24, 12)
    assert contents(cut)[0][0][:6] == ["c0", "c1#1", "c1#2", "c2#1", "c2#2", "c2#3"]


def test_a_lost_part_of_such_records_is_made_again_with_the_same_result(
    tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", long_chats(30))
    whole = make_job(tmp_path / "whole", source, save_tokenizer(REWRITES), part_documents=4)
    (one,) = run(whole)
    again = make_job(tmp_path / "again", source, save_tokenizer(REWRITES), part_documents=4)
    run(again)
    folder = Path(again.units[0].outputs[0].path)
    (folder / "manifest.json").unlink()
    (folder / one.parts[1].name).unlink()
    (two,) = run(again)
    assert contents(whole) == contents(again)
    assert one.facts == two.facts
    assert [part.sha256 for part in one.parts] == [part.sha256 for part in two.parts]


def test_windows_of_long_documents_are_counted(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": "x " * 200}, {"text": "short"}])
    job = make_job(tmp_path, source, save_tokenizer(), on_long="split", overlap=4)
    (manifest,) = run(job)
    assert manifest.facts["n_split_documents"] == 1
    assert manifest.facts["n_windows"] == manifest.facts["n_documents"] - 1
    assert manifest.facts["n_truncated_documents"] == 0
    assert contents(job)[0][0][0] == "web-000000000/1"


def test_long_documents_that_are_left_out_are_counted_and_told(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", [{"text": "x " * 200}, {"text": "short"}])
    stream = io.StringIO()
    (manifest,) = run(make_job(tmp_path, source, save_tokenizer(), on_long="drop"), stream=stream)
    assert (manifest.facts["n_dropped_documents"], manifest.facts["n_documents"]) == (1, 1)
    assert manifest.facts["n_empty_documents"] == 0
    assert "1 of 2 documents are longer than max_length and were left out" in stream.getvalue()


@pytest.mark.parametrize("taken", ["c#2", "c"])
def test_a_document_never_takes_the_name_of_another_record(
    tmp_path: Path, save_tokenizer: SaveTokenizer, taken: str
) -> None:
    chats = [{"id": "c", "messages": [QUESTION, ANSWER] * 2}, {"id": taken, "messages": [QUESTION, ANSWER]}]
    job = make_job(tmp_path, write_jsonl(tmp_path / "web.jsonl", chats), save_tokenizer(REWRITES))
    with pytest.raises(BadRecordError, match=r"'c#2', is the id of another record|id 'c' is already that of"):
        run(job)


def test_a_setting_that_a_template_never_reads_writes_nothing(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    source = write_jsonl(tmp_path / "web.jsonl", [{"messages": [QUESTION, ANSWER]}])
    job = make_job(tmp_path, source, save_tokenizer(), chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(RecipeError, match="'enable_thinking', which it never reads"):
        run(job)
    assert not Path(job.units[0].outputs[0].path).exists()
