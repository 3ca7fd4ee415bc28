"""FORMAT.md, sentence by sentence: the docstring of each test starts with the number of the sentence it holds true."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import torch

from kd_assets.contract import CACHES, Asset, FinalState, Output, PositionChoice, TokenIds
from kd_assets.durable import append_line, atomic_file, atomic_write
from kd_assets.errors import (
    CodecRangeError,
    CorruptManifestError,
    CorruptPartError,
    CorruptPlanError,
    FailedCheckError,
    InputError,
    NotCommittedError,
    ResultBusyError,
    UnknownCodecError,
    VariantConflictError,
)
from kd_assets.store import (
    CacheReader,
    Documents,
    KeptPositions,
    Manifest,
    ResultFiles,
    ResultWriter,
    Samples,
    WrittenFile,
    canonical_json,
    coded,
    commit_file_result,
    committed,
    computing_versions,
    encode_hidden_states,
    encode_topk,
    failed_check,
    fingerprint,
    part_stats,
    plain_table,
    plan_output,
    plan_parts,
    planned_partitions,
    put_aside,
    read_manifest,
    result_folder,
    set_head,
    variant_of,
    verify,
)
from kd_assets.store.arrays import flat
from kd_assets.store.checking.checks import check_schema
from kd_assets.store.manifest import merge_stats
from kd_assets.store.partfile import PartFile, part_suffix, write_table
from kd_assets.store.positions import kept_positions
from kd_assets.store.positions import uniforms as position_uniforms
from kd_assets.store.recoding.recode import recode
from kd_assets.store.recoding.sources import find_source
from kd_assets.store.recorded_checks import require_readable
from kd_assets.store.vocabulary import mean_outside_mass, vocabulary_of
from kd_assets.store.writing.documents import offsets_of
from kd_assets.teacher.batch.sampling import drawn_ids, uniforms
from kd_assets_tests.store import examples
from kd_assets_tests.store.planned import commit_partition, hash_of, write_plan
from kd_assets_tests.store.test_codecs import decoder_to_copy
from kd_assets_tests.store.test_verify import adopt_files

FORMAT_FILE = Path(__file__).parents[2] / "FORMAT.md"


def test_every_sentence_of_the_format_has_a_test_and_every_test_a_sentence() -> None:
    sentences = re.findall(r"^- \[(F\d+)\]", FORMAT_FILE.read_text(), re.MULTILINE)
    cited = [
        number
        for name, test in vars(sys.modules[__name__]).items()
        if name.startswith("test_")
        for number in re.findall(r"\[(F\d+)\]", test.__doc__ or "")
    ]
    assert sentences == [f"F{i + 1}" for i in range(len(sentences))]
    assert set(cited) == set(sentences)


def test_result_that_failed_a_check_is_committed_and_not_made_current_and_readers_refuse_it(store: Path) -> None:
    """[F53] The other ways to fail are in the tests of the checks."""
    failed = examples.RECOMPUTED | {"passed": False}
    folder, manifest = examples.commit(store, "topk_cache", checks={"recomputed": failed})
    assert (folder / "manifest.json").exists()
    assert not (folder.parent / "head.json").exists()
    with pytest.raises(FailedCheckError, match="check recomputed failed"):
        CacheReader.from_folders([folder])
    assert CacheReader.from_folders([folder], allow_failed=True).manifests == (manifest,)


@pytest.mark.parametrize(
    ("record", "fails"),
    [
        (examples.REBUILT, False),
        (examples.REBUILT | {"passed": False}, True),
        (examples.REBUILT | {"n_positions": 0}, True),
        ({"passed": None, "not_made": "the head lies in pieces"}, False),
        ({"passed": None}, True),
        ({}, True),
    ],
)
def test_states_that_do_not_give_the_log_probabilities_back_have_failed_and_ones_that_were_not_asked_have_not(
    store: Path, record: dict[str, Any], fails: bool
) -> None:
    """[F53] [F63]"""
    checks = {"recomputed": examples.RECOMPUTED, "rebuilt": record}
    folder, _ = examples.commit(store, "hidden_state_cache", checks=checks)
    assert (folder.parent / "head.json").exists() is not fails
    if fails:
        with pytest.raises(FailedCheckError, match="check rebuilt failed"):
            CacheReader.from_folders([folder])
    else:
        assert len(CacheReader.from_folders([folder]).manifests) == 1


@pytest.mark.parametrize("blocks", [(), (2, 0)])
@pytest.mark.parametrize("final", [("before_norm",), ("after_norm",), ("after_norm", "before_norm")])
def test_final_states_are_columns_after_those_of_the_blocks(
    store: Path, blocks: tuple[int, ...], final: tuple[FinalState, ...]
) -> None:
    """[F61] [F62] That they are what goes into the norm and comes out of it is in the teacher's tests."""
    params = {"blocks": sorted(blocks), "max_length": examples.MAX_LENGTH, "final": list(final)}
    folder, _ = examples.commit(store, "hidden_state_cache", params=params)
    rows = next(part_tables(folder))
    names = [f"hidden_final_{name}" for name in ("before_norm", "after_norm") if name in final]
    assert rows.schema.names[4:] == [*(f"hidden_block_{n}" for n in sorted(blocks)), *names]
    for name in names:
        field = rows.schema.field(name)
        assert str(field.type).replace(" not null", "") == "list<element: fixed_size_list<element: uint16>[3]>"
        metadata = {key.decode(): value.decode() for key, value in field.metadata.items()}
        assert (metadata["dtype"], metadata["final"]) == ("bfloat16", name.removeprefix("hidden_final_"))
        assert "final norm" in metadata["convention"]
    assert check_schema(ResultFiles(folder)).passed
    assert not verify(store).problems


def test_plan_is_a_head_and_blocks_of_partitions_and_their_inputs_and_is_hashed_over_them(store: Path) -> None:
    """[F54]"""
    write_plan(store, {"a-00000": "one", "a-00001": "two", "a-00005": "three"})
    folder = store / "shard_plan"
    head = json.loads((folder / "plan.json").read_bytes())
    assert (folder / f"{head['plan_hash'][:16]}.json").read_bytes() == (folder / "plan.json").read_bytes()
    assert head.pop("plan_sha256") == fingerprint(head)
    assert head["plan_format"] == 2
    assert head["keys"] == [["a-00000", 2], ["a-00005", 1]]
    shards = []
    for block in head["blocks"]:
        data = (folder / "blocks" / block["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == block["sha256"]
        found = json.loads(data)
        assert len(found) == block["n_shards"]
        shards += [[shard["partition_key"], shard["input_hash"]] for shard in found]
    assert shards == [["a-00000", hash_of("one")], ["a-00001", hash_of("two")], ["a-00005", hash_of("three")]]
    assert head["plan_hash"] == fingerprint({"shards": shards, "sources": [["s", hash_of("s"), "CC0-1.0", None]]})


@pytest.mark.parametrize("has_own_hash", [True, False])
def test_plan_of_an_earlier_version_is_one_file_with_its_shards(store: Path, has_own_hash: bool) -> None:
    """[F59]"""
    key, input_hash = "tiny-00001", hash_of("one")
    named = [["s", hash_of("s"), "CC0-1.0", None]]
    plan: dict[str, Any] = {
        "shards": [{"partition_key": key, "input_hash": input_hash}],
        "sources": [dict(zip(("name", "sha256", "licence", "revision"), named[0], strict=True))],
        "plan_hash": fingerprint({"shards": [[key, input_hash]], "sources": named}),
    }
    plan |= {"plan_sha256": fingerprint(plan)} if has_own_hash else {}
    (store / "shard_plan").mkdir(parents=True)
    (store / "shard_plan" / "plan.json").write_text(json.dumps(plan))
    planned = planned_partitions(store)
    assert planned is not None
    assert dict(planned.input_hashes) == {key: input_hash}
    assert planned.plan_hash == plan["plan_hash"]
    (store / "shard_plan" / "plan.json").write_text(json.dumps(plan | {"plan_hash": hash_of("other")}))
    with pytest.raises(CorruptPlanError, match=r"plan\.json is not the plan that was made"):
        planned_partitions(store)


@pytest.mark.parametrize("harm", ["flip", "truncate", "grow", "gone"])
@pytest.mark.parametrize("part", ["plan.json", "blocks/*.json"])
def test_plan_whose_head_or_block_is_another_is_refused_by_name(store: Path, part: str, harm: str) -> None:
    """[F60] A plan that is gone is none: readers go by what is committed."""
    write_plan(store, {"a-00000": "one"})
    (path,) = (store / "shard_plan").glob(part)
    damage(path, harm)
    if part == "plan.json" and harm == "gone":
        assert planned_partitions(store) is None
        return
    with pytest.raises(CorruptPlanError, match=re.escape(f"{path} is not the plan that was made")):
        input_hash_of(store, "a-00000")


def input_hash_of(store: Path, key: str) -> str:
    planned = planned_partitions(store)
    assert planned is not None
    return planned.input_hashes[key]


def test_reader_reads_exactly_what_the_plan_names(store: Path) -> None:
    """[F55] The other ways for a partition to be missing are in the tests of what is chosen."""
    for key, content in (("tiny-00000", "one"), ("tiny-00001", "two")):
        commit_partition(store, key, content)
    write_plan(store / "tiny", {"tiny-00001": "two", "tiny-00000": "other"})
    for asset in ("shards_manifest", *CACHES):
        with pytest.raises(NotCommittedError, match="partition 'tiny-00000'"):
            CacheReader(store / "tiny", asset)
        reader = CacheReader(store / "tiny", asset, missing="skip")
        assert reader.partition_keys == ("tiny-00001",)
        assert list(reader.left_out) == ["tiny-00000"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "grow", "gone"])
def test_reader_gives_no_document_of_a_part_that_is_not_the_one_that_was_committed(store: Path, harm: str) -> None:
    """[F56] That results in each other's place are named is in the tests of the reader."""
    for asset in CACHES:
        folder, _ = examples.commit(store, asset)
        reader = CacheReader(store / "tiny", asset)
        damage(sorted(folder.glob("part-*"))[1], harm)
        assert reader[0]["document_id"] == "document-0"
        with pytest.raises(CorruptPartError, match=r"part-00001\."):
            reader[2]


@pytest.mark.parametrize("harm", ["truncate", "gone", "flip", "none"])
def test_file_beside_the_parts_is_named_in_the_facts_and_is_none_of_the_content(store: Path, harm: str) -> None:
    """[F57]"""
    _, without = examples.commit(store / "without", "shards_manifest")
    folder, manifest = examples.commit(store, "shards_manifest", beside={"notes.bin": b"beside"})
    parts = {part.name: (folder / part.name).stat().st_mtime_ns for part in manifest.parts}
    sha256 = hashlib.sha256(b"beside").hexdigest()
    assert manifest.facts == {"files": {"notes.bin": {"n_bytes": 6, "sha256": sha256}}}
    assert (manifest.data_version, manifest.n_bytes) == (without.data_version, without.n_bytes)
    assert (verify(folder).problems, verify(folder).notes) == ((), ())
    if harm != "none":
        damage(folder / "notes.bin", harm)
        (problem,) = verify(folder).problems
        expected = {"truncate": "truncated_part", "gone": "missing_part", "flip": "changed_part"}[harm]
        assert (problem.kind, problem.path) == (expected, folder / "notes.bin")
    # As with parts, the size is looked at each time and the hash when something is verified or written.
    assert (committed(folder, manifest.fingerprint) is None) == (harm in ("truncate", "gone"))
    _, again = examples.commit(store, "shards_manifest", beside={"notes.bin": b"beside"})
    assert again.facts == manifest.facts
    assert verify(folder).problems == ()
    assert {name: (folder / name).stat().st_mtime_ns for name in parts} == parts, "no part is made again"


def test_result_of_an_earlier_version_is_left_without_files_beside_its_parts(store: Path) -> None:
    """[F57]"""
    folder, manifest = examples.commit(store, "shards_manifest")
    _, again = examples.commit(store, "shards_manifest", beside={"notes.bin": b"beside"})
    assert again == manifest
    assert not (folder / "notes.bin").exists()


@pytest.mark.parametrize(
    "files", [{"../x": {"n_bytes": 1, "sha256": "0"}}, {"part-00000.parquet": {"n_bytes": 1, "sha256": "0"}}, {"x": 1}]
)
def test_manifest_whose_files_beside_cannot_be_is_refused(store: Path, files: Any) -> None:
    """[F57]"""
    folder, manifest = examples.commit(store, "shards_manifest")
    changed = dataclasses.replace(manifest, facts={"files": files})
    (folder / "manifest.json").write_text(changed.to_json())
    with pytest.raises(CorruptManifestError):
        read_manifest(folder)


def test_samples_have_a_row_a_document(tmp_path: Path) -> None:
    """[F58] What they say of records is in the tests of the facts of a shard."""
    samples = Samples(
        document_id=["a", "b#1"],
        parent_id=["a", "b"],
        sample_id=["0" * 32, "1" * 32],
        source=["web", "web"],
        file=["x.jsonl", "y.jsonl"],
        record_number=np.array([0, 7]),
        n_tokens=np.array([3, 4]),
        n_loss_tokens=np.array([3, 1]),
    )
    data = samples.to_parquet()
    assert data == samples.to_parquet()
    assert pq.read_table(io.BytesIO(data)).to_pylist() == [
        {
            **{"document_id": "a", "parent_id": "a", "sample_id": "0" * 32, "source": "web", "file": "x.jsonl"},
            **{"record_number": 0, "n_tokens": 3, "n_loss_tokens": 3},
        },
        {
            **{"document_id": "b#1", "parent_id": "b", "sample_id": "1" * 32, "source": "web", "file": "y.jsonl"},
            **{"record_number": 7, "n_tokens": 4, "n_loss_tokens": 1},
        },
    ]


# ------------------------------------------------------------------------------------------------------------ names


def test_result_lies_under_recipe_asset_variant_partition_and_fingerprint(store: Path) -> None:
    """[F1]"""
    folder, manifest = examples.commit(store, "topk_cache")
    expected = store / "tiny" / "topk_cache" / manifest.variant / "tiny-00000" / manifest.fingerprint[:16]
    assert folder == expected
    assert (folder / "manifest.json").is_file()


def test_fingerprint_is_the_hash_of_the_canonical_json() -> None:
    """[F2]"""
    identity = {"b": [1, 2.5], "a": "é"}
    assert canonical_json(identity) == '{"a":"\\u00e9","b":[1,2.5]}'
    assert fingerprint(identity) == hashlib.sha256(b'{"a":"\\u00e9","b":[1,2.5]}').hexdigest()


def test_variant_leaves_the_input_out() -> None:
    """[F3]"""
    identity = {"k": 16, "input": "one shard"}
    assert variant_of(identity) == fingerprint({"k": 16})[:12] == variant_of({"k": 16, "input": "another"})
    assert variant_of({"k": 17}) != variant_of(identity)


@pytest.mark.parametrize(
    "key",
    ["", "a/b", "/", "..", "a..b", ".", ".hidden", "a\0b", "a\nb", "a\\b", "x" * 256, "head.json", "tab\there"],
)
def test_partition_key_that_is_no_folder_name_is_refused(tmp_path: Path, key: str) -> None:
    """[F4]"""
    with pytest.raises(InputError, match=r"partition key .* cannot name a folder"):
        result_folder(tmp_path, "topk_cache", "0" * 12, key, "0" * 64)


def test_partition_key_with_spaces_and_letters_of_any_script_is_a_folder_name(tmp_path: Path) -> None:
    """[F4]"""
    folder = result_folder(tmp_path, "topk_cache", "0" * 12, "Straße 7", "1" * 64)
    assert folder.relative_to(tmp_path).parts == ("topk_cache", "0" * 12, "Straße 7", "1" * 16)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_modes_do_not_depend_on_the_umask(store: Path, umask: int) -> None:
    """[F5]"""
    previous = os.umask(umask)
    try:
        examples.commit(store, "topk_cache")
    finally:
        os.umask(previous)
    modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in [store, *store.rglob("*")]}
    assert modes == {(True, 0o750), (False, 0o640)}


def test_folders_keep_the_setgid_bit_they_inherit(store: Path) -> None:
    """[F5]"""
    store.mkdir()
    store.chmod(0o2770)
    folder, _ = examples.commit(store, "topk_cache")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2750


# ---------------------------------------------------------------------------------------------------------- results


def test_result_exists_when_its_manifest_does(store: Path) -> None:
    """[F6]"""
    folder, manifest = examples.commit(store, "topk_cache")
    assert committed(folder, manifest.fingerprint) == manifest
    (folder / "manifest.json").unlink()
    assert committed(folder, manifest.fingerprint) is None
    with pytest.raises(NotCommittedError, match=re.escape(str(folder))):
        read_manifest(folder)


def test_parts_are_numbered_and_named_by_container(store: Path) -> None:
    """[F7]"""
    names = {asset: sorted(path.name for path in examples.commit(store, asset)[0].glob("p*")) for asset in CACHES}
    assert names == {
        "topk_cache": ["part-00000.parquet", "part-00001.parquet"],
        "hidden_state_cache": ["part-00000.arrow", "part-00001.arrow"],
        "embedding_cache": ["part-00000.parquet", "part-00001.parquet"],
    }


def test_file_result_has_its_files_in_the_order_of_their_names(store: Path) -> None:
    """[F8]"""
    out = plan_output("student_smoke", {"input": "caches"}, recipe_folder=store / "tiny", partition_key="student")
    files = {"losses.json": b"[2.0, 1.0]", "curve.png": b"picture"}
    manifest = commit_file_result(
        out,
        recipe="tiny",
        recipe_folder=store / "tiny",
        partition_key="student",
        files=files,
        checks={},
        provenance={},
        facts={"last_loss": 1.0},
    )
    assert [(p.index, p.name, p.n_documents, p.n_tokens) for p in manifest.parts] == [
        (0, "curve.png", 0, 0),
        (1, "losses.json", 0, 0),
    ]
    assert (Path(out.path) / "curve.png").read_bytes() == b"picture"


def test_a_slash_in_a_name_leads_into_a_folder_of_the_result(store: Path) -> None:
    """[F8]"""
    out = plan_output("export_hf", {"input": "caches"}, recipe_folder=store / "tiny", partition_key="tiny-00000")
    with ResultWriter(out, recipe="tiny", recipe_folder=store / "tiny", partition_key="tiny-00000") as writer:
        (writer.folder / "data").mkdir()
        (writer.folder / "data" / "rows.bin").write_bytes(b"rows")
        sha256 = hashlib.sha256(b"rows").hexdigest()
        writer.adopt_files([WrittenFile(name="data/rows.bin", n_bytes=4, sha256=sha256)])
        manifest = writer.commit(parts=1, checks={}, provenance={})
    (part,) = manifest.parts
    assert (part.name, part.sha256, part.n_documents, part.n_tokens) == ("data/rows.bin", sha256, 0, 0)


def test_files_are_synced_before_their_rename_and_their_folder_after_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[F9] The real calls run; they are only written down."""
    calls: list[tuple[str, str]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real_fsync(descriptor)

    def replace(source: str, target: Path) -> None:
        calls.append(("rename", Path(target).name))
        real_replace(source, target)

    with examples.writer(store, examples.output(store, "topk_cache")) as result:
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)
        docs = examples.documents()
        rows = examples.table("topk_cache", docs)
        result.write_part(0, rows, n_tokens=docs.n_tokens, stats=part_stats("topk_cache", rows))
        result.commit(parts=1, checks={}, provenance={})
    for name in ("part-00000.parquet", "manifest.json", "head.json"):
        renamed = calls.index(("rename", name))
        kind, temporary = calls[renamed - 1]
        assert (kind, temporary.startswith(f".{name}.")) == ("sync", True)
        assert calls[renamed + 1][0] == "sync"
    order = [("rename", "part-00000.parquet"), ("sync", "journal.jsonl"), ("rename", "manifest.json")]
    assert sorted(order, key=calls.index) == order


def test_manifest_is_written_last_and_stays_as_it_is(store: Path) -> None:
    """[F10]"""
    folder, _ = examples.commit(store, "topk_cache")
    before = (folder / "manifest.json").stat()
    parts = [path.stat().st_mtime_ns for path in folder.glob("part-*")]
    assert before.st_mtime_ns >= max(parts)
    _, again = examples.commit(store, "topk_cache", checks={"recomputed": {"passed": False}})
    after = (folder / "manifest.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert again == read_manifest(folder)
    assert again.checks["recomputed"]["passed"] is True


@pytest.mark.parametrize("name", ["manifest.json", "journal.jsonl"])
def test_folder_of_another_fingerprint_is_never_written_to(store: Path, name: str) -> None:
    """[F11]"""
    out = examples.output(store, "topk_cache")
    other, manifest = examples.commit(store, "topk_cache", params={"k": examples.K, "max_length": 5})
    folder = Path(out.path)
    folder.mkdir(parents=True)
    if name == "manifest.json":
        (folder / name).write_bytes((other / name).read_bytes())
    else:
        record = {
            "fingerprint": manifest.fingerprint,
            "part": json.loads((other / "manifest.json").read_text())["parts"][0],
        }
        append_line(folder / name, record)
    before = (folder / name).read_bytes()
    with pytest.raises(CorruptManifestError, match=f"{manifest.fingerprint}, expected {out.fingerprint}"):
        examples.commit(store, "topk_cache")
    assert (folder / name).read_bytes() == before
    if name == "manifest.json":
        with pytest.raises(CorruptManifestError, match="move it away"):
            committed(folder, out.fingerprint)


def test_head_names_the_result_committed_or_reused_last(store: Path) -> None:
    """[F12]"""
    first_docs, second_docs = examples.documents(seed=1), examples.documents(seed=2)
    first, first_manifest = commit_of_input(store, "one", first_docs)
    second, second_manifest = commit_of_input(store, "two", second_docs)
    head = first.parent / "head.json"
    assert first.parent == second.parent
    assert head.read_text() == json.dumps({"fingerprint": second_manifest.fingerprint}) + "\n"
    set_head(first)
    assert json.loads(head.read_text()) == {"fingerprint": first_manifest.fingerprint}


def test_results_that_are_not_current_stay(store: Path) -> None:
    """[F13]"""
    first, manifest = commit_of_input(store, "one", examples.documents(seed=1))
    before = contents(first)
    commit_of_input(store, "two", examples.documents(seed=2))
    assert contents(first) == before
    assert CacheReader.from_folders([first]).manifests == (manifest,)


def test_audit_log_gets_a_line_a_commit_and_is_only_appended_to(store: Path) -> None:
    """[F14]"""
    audit = store / "tiny" / "audit.jsonl"
    folders = []
    for asset in CACHES:
        before = audit.read_bytes() if audit.exists() else b""
        folders.append(examples.commit(store, asset)[0])
        examples.commit(store, asset)  # reused, so no commit
        assert audit.read_bytes().startswith(before)
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [line["asset"] for line in lines] == list(CACHES)
    assert [store / "tiny" / line["path"] for line in lines] == folders
    assert all(line["provenance"] == {"host": "here"} for line in lines)


def kept_by_hand(docs: Documents, positions: list[list[int]]) -> KeptPositions:
    return KeptPositions(
        offsets=offsets_of(np.array([len(p) for p in positions])),
        positions_M=np.array([i for p in positions for i in p], dtype=np.uint32),
    )


@pytest.mark.parametrize("asset", ["topk_cache", "hidden_state_cache"])
def test_a_cache_of_learned_positions_has_their_rows_and_says_which(store: Path, asset: Asset) -> None:
    """[F65] [F66] That the rows are those of the whole cache is in the teacher's tests."""
    docs = examples.documents((5, 1, 3))
    mask = np.array([True, False, True, True, False, True, False, False, True])
    docs = dataclasses.replace(docs, loss_mask=mask)
    kept = kept_by_hand(docs, [[1, 2], [], [1]])
    n, rng = 3, np.random.default_rng(0)
    if asset == "topk_cache":
        table = encode_topk(
            docs,
            topk_ids_Mk=rng.integers(0, 9, (n, 2), dtype=np.uint32),
            topk_logprobs_Mk=np.full((n, 2), -1, np.float16),
            logsumexp_M=np.zeros(n, np.float32),
            target_logprob_M=np.full(n, -1, np.float32),
            positions=kept,
        )
        params: dict[str, Any] = {"k": 2, "max_length": 9, "positions": "learned"}
    else:
        table = encode_hidden_states(docs, {1: np.zeros((n, 4), np.uint16)}, kept)
        params = {"blocks": [1], "max_length": 9, "positions": "learned"}
    assert table.schema.names[-1] == "positions"
    out = examples.output(store, asset, params=params)
    with examples.writer(store, out) as writer:
        writer.write_part(0, table, n_tokens=docs.n_tokens, stats=part_stats(asset, table))
        writer.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    assert verify(Path(out.path)).ok
    reader = CacheReader.from_folders([Path(out.path)])
    assert [reader[i]["positions"].tolist() for i in range(3)] == [[1, 2], [], [1]]
    assert [len(reader[i]["input_ids"]) for i in range(3)] == [5, 1, 3]
    other = table.set_column(
        table.schema.get_field_index("positions"),
        table.schema.field("positions"),
        pa.array([[0, 2], [], [1]], type=table.schema.field("positions").type),
    )
    suffix = part_suffix(asset)
    with atomic_file(Path(out.path) / f"part-00000{suffix}") as file:
        write_table(other, suffix, file)
    adopt_files(Path(out.path))
    (problem,) = (p for p in verify(Path(out.path)).problems if p.kind == "wrong_positions")
    assert "not those that the parameters say" in problem.message


def test_the_numbers_of_a_share_are_philox_words_of_the_documents_key() -> None:
    """[F67]"""
    key = int.from_bytes(hashlib.sha256(b"positions:7:doc").digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(3).tolist()
    halves = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    assert position_uniforms(7, "doc", 5).tolist() == [half / 2**32 for half in halves[:5]]
    docs = Documents(
        document_ids=["doc"],
        offsets=np.array([0, 6]),
        input_ids=np.zeros(6, np.uint32),
        loss_mask=np.zeros(6, np.bool_),
    )
    kept = kept_positions(PositionChoice(kept="share", share=0.5, seed=7), docs, has_next=True)
    assert kept is not None
    assert kept.positions_M.tolist() == [i for i, half in enumerate(halves[:5]) if half / 2**32 < 0.5]


HOLES = TokenIds.of([*range(20), 25, 26, 31])


def cut_rows(docs: Documents, mass_M: Any, *, last_id: int = 31) -> pa.Table:
    m = docs.n_tokens - docs.n_documents
    return encode_topk(
        docs,
        topk_ids_Mk=np.tile(np.array([3, last_id], np.uint32), (m, 1)),
        topk_logprobs_Mk=np.tile(np.array([-0.5, -1.5], np.float16), (m, 1)),
        logsumexp_M=np.ones(m, np.float32),
        target_logprob_M=np.full(m, -1, np.float32),
        sampled_ids_Md=np.full((m, 3), 25, np.uint32),
        outside_mass_M=np.asarray(mass_M, np.float32),
    )


def commit_cut(
    store: Path, table: pa.Table, token_ids: TokenIds, *, beside: bytes | None = None
) -> tuple[Path, Manifest]:
    params = {"k": 2, "max_length": 9, "draws": 3, "seed": 0, "vocabulary": token_ids.in_identity()}
    out = examples.output(store, "topk_cache", params=params)
    with examples.writer(store, out) as writer:
        n_tokens = int(table["n_tokens"].to_numpy().sum())
        writer.write_part(0, table, n_tokens=n_tokens, stats=part_stats("topk_cache", table))
        if beside is not None:
            writer.write_beside("vocabulary.json", beside)
        manifest = writer.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    return Path(out.path), manifest


def small_documents() -> Documents:
    docs = examples.documents((4, 1, 3))
    return dataclasses.replace(docs, input_ids=docs.input_ids % np.uint32(20))


def test_a_student_s_vocabulary_is_a_number_or_a_hash_with_its_runs_beside(store: Path) -> None:
    """[F68] That a cache without one says nothing of it, and that jobs write this, is in the teacher's tests."""
    runs = b"[[0,20],[25,27],[31,32]]\n"
    folder, manifest = commit_cut(store, cut_rows(small_documents(), [0.25] * 5), HOLES, beside=runs)
    assert manifest.params["vocabulary"] == {"n_ids": 23, "sha256": hashlib.sha256(runs).hexdigest()}
    assert manifest.facts["files"]["vocabulary.json"]["sha256"] == hashlib.sha256(runs).hexdigest()
    assert vocabulary_of(manifest, folder) == HOLES
    numbered = dataclasses.replace(manifest, identity={**manifest.identity, "params": {"vocabulary": 32}})
    assert vocabulary_of(numbered, folder) == TokenIds.below(32)
    without = dataclasses.replace(manifest, identity={**manifest.identity, "params": {}})
    assert vocabulary_of(without, folder) is None


@pytest.mark.parametrize("token_ids", [HOLES, TokenIds.below(32)], ids=["holes", "number"])
def test_no_other_id_is_in_a_cut_cache(store: Path, token_ids: TokenIds) -> None:
    """[F69] That the numbers are those of the softmax over these ids is in the teacher's tests."""
    docs = small_documents()
    good, beside = cut_rows(docs, [0.25] * 5), token_ids.to_json() if token_ids is HOLES else None
    assert b"against the ids of a student's vocabulary" in good.schema.metadata[b"kd_assets.convention"]
    assert b"over the ids of a student's vocabulary" in good.schema.field("sampled_ids").metadata[b"convention"]
    folder, _ = commit_cut(store, good, token_ids, beside=beside)
    assert verify(folder).ok
    stranger = dataclasses.replace(docs, input_ids=np.where(docs.input_ids > 0, docs.input_ids, 33).astype(np.uint32))
    assert (stranger.input_ids == 33).any()
    drawn = cut_rows(docs, [0.25] * 5)
    at = drawn.schema.get_field_index("sampled_ids")
    ids = pa.array([[[35]] * (n - 1) for n in (4, 1, 3)], type=drawn.schema.field(at).type)
    counts = drawn.set_column(at, drawn.schema.field(at), ids)
    for bad, named in (
        (cut_rows(docs, [0.25] * 5, last_id=32), "topk_ids has 32"),
        (counts, "sampled_ids has 35"),
        (cut_rows(stranger, [0.25] * 5), "input_ids has 33"),
    ):
        with atomic_file(folder / "part-00000.parquet") as file:
            write_table(bad, ".parquet", file)
        adopt_files(folder)
        (problem,) = (p for p in verify(folder).problems if p.kind == "wrong_vocabulary")
        assert named in problem.message


def test_the_mass_outside_is_a_column_between_the_others_and_positions(store: Path) -> None:
    """[F70] That it is the probability of all other ids is in the teacher's tests."""
    docs, mass_M = small_documents(), [0.0, 0.25, 1e-30, 1.0, 0.5]
    rows = cut_rows(docs, mass_M)
    assert rows.schema.names[-3:] == ["sampled_ids", "sampled_counts", "outside_mass"]
    field = rows.schema.field("outside_mass")
    assert field.type == pa.list_(pa.field("element", pa.float32(), nullable=False))
    assert b"student's vocabulary lacks" in field.metadata[b"convention"]
    folder, _ = commit_cut(store, rows, TokenIds.below(32))
    assert check_schema(ResultFiles(folder)).passed
    reader = CacheReader.from_folders([folder])
    found = [x for i in range(3) for x in reader[i]["outside_mass"].tolist()]
    np.testing.assert_array_equal(found, np.array(mass_M, np.float32))
    kept = kept_by_hand(docs, [[0, 2], [], [1]])
    some = encode_topk(
        docs,
        topk_ids_Mk=np.zeros((3, 1), np.uint32),
        topk_logprobs_Mk=np.zeros((3, 1), np.float16),
        logsumexp_M=np.zeros(3, np.float32),
        target_logprob_M=np.zeros(3, np.float32),
        outside_mass_M=np.zeros(3, np.float32),
        positions=kept,
    )
    assert some.schema.names[-2:] == ["outside_mass", "positions"]


@pytest.mark.parametrize("wrong", [-0.1, 1.5, math.nan, None])
def test_statistics_tell_the_mass_outside_and_refuse_what_is_no_probability(store: Path, wrong: float | None) -> None:
    """[F71] [F53]"""
    mass_M = [0.5, 0.25, 0.125, 0.0, 0.125 if wrong is None else wrong]
    folder, manifest = commit_cut(store, cut_rows(small_documents(), mass_M), TokenIds.below(32))
    if wrong is None:
        found = {name: value for name, value in manifest.stats.items() if "outside" in name}
        assert found == {"min_outside_mass": 0.0, "max_outside_mass": 0.5, "n_expected_outside": 1.0}
        assert mean_outside_mass(manifest.stats) == 0.2
        assert (folder.parent / "head.json").exists()
    else:
        assert failed_check(manifest) is not None
        assert not (folder.parent / "head.json").exists()


def test_a_result_that_is_put_aside_is_audited_then_loses_its_head_then_moves(store: Path) -> None:
    """[F64] What a kill in between leaves is in test_quarantine.py."""
    folder, manifest = examples.commit(store, "topk_cache")
    before = contents(folder)
    (moved,) = put_aside(
        store / "tiny", [manifest.partition_key], ["topk_cache"], why="wrong", clock=examples.fixed_clock
    )
    assert moved.folder == store / "tiny/quarantine/20261122T120000Z" / folder.relative_to(store / "tiny")
    assert contents(moved.folder) == before
    assert not (folder.parent / "head.json").exists()
    line = json.loads((store / "tiny" / "audit.jsonl").read_text().splitlines()[-1])
    assert (line["event"], line["why"]) == ("quarantine", "wrong")
    assert store / "tiny" / line["path"] == folder
    assert store / "tiny" / line["to"] == moved.folder
    assert verify(store).ok


def test_reader_reads_one_variant_and_does_not_choose(store: Path) -> None:
    """[F15]"""
    _, one = examples.commit(store, "topk_cache")
    _, other = examples.commit(store, "topk_cache", params={"k": examples.K, "max_length": 99})
    with pytest.raises(
        VariantConflictError, match=f"{min(one.variant, other.variant)}.*{max(one.variant, other.variant)}"
    ):
        CacheReader(store / "tiny", "topk_cache")
    assert CacheReader(store / "tiny", "topk_cache", variant=one.variant).manifests == (one,)


# ------------------------------------------------------------------------------------- while a result is being made


def test_lease_is_held_while_writing_and_its_file_stays(store: Path) -> None:
    """[F16] That it ends with a killed process is in test_kill.py."""
    out = examples.output(store, "topk_cache")
    with examples.writer(store, out):
        with pytest.raises(ResultBusyError, match="this very process"):
            examples.writer(store, out).__enter__()
    assert (Path(out.path) / ".lease").exists()
    with examples.writer(store, out):
        pass


def test_journal_has_a_line_a_part_until_the_commit(store: Path) -> None:
    """[F17]"""
    out = examples.output(store, "topk_cache")
    journal = Path(out.path) / "journal.jsonl"
    with examples.writer(store, out) as result:
        for index in range(2):
            write_part(result, index)
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        result.commit(parts=2, checks={}, provenance={})
    assert [line["fingerprint"] for line in lines] == [out.fingerprint] * 2
    raw = json.loads((Path(out.path) / "manifest.json").read_text())
    assert [line["part"] for line in lines] == raw["parts"]
    assert not journal.exists()


@pytest.mark.parametrize("torn", [b'{"fingerprint": "ab', b"\x00\x00\xff", b"{}\n", b"[1]\n", b'{"part": 3}\n'])
def test_line_of_the_journal_that_is_no_record_is_passed_over(store: Path, torn: bytes) -> None:
    """[F18]"""
    out = examples.output(store, "topk_cache")
    with examples.writer(store, out) as result:
        write_part(result, 0)
    with (Path(out.path) / "journal.jsonl").open("ab") as journal:
        journal.write(torn)
    with examples.writer(store, out) as result:
        assert list(result.finished) == [0]
        write_part(result, 1)
    with examples.writer(store, out) as result:
        assert list(result.finished) == [0, 1]


def test_half_a_journal_line_costs_only_its_own_part(store: Path) -> None:
    """[F18]"""
    out = examples.output(store, "topk_cache")
    with examples.writer(store, out) as result:
        for index in range(3):
            write_part(result, index)
    journal = Path(out.path) / "journal.jsonl"
    for cut in (1, 10, 100):
        journal.write_bytes(journal.read_bytes()[:-cut])
        with examples.writer(store, out) as result:
            assert list(result.finished) == [0, 1]
            write_part(result, 2)


@pytest.mark.parametrize("harm", ["flip", "truncate", "grow", "remove"])
def test_part_that_differs_from_the_journal_is_made_again(store: Path, harm: str) -> None:
    """[F19]"""
    out = examples.output(store, "topk_cache")
    with examples.writer(store, out) as result:
        for index in range(3):
            write_part(result, index)
    parts = sorted(Path(out.path).glob("part-*"))
    good = parts[1].read_bytes()
    kept = parts[0].stat().st_mtime_ns
    damage(parts[1], harm)
    with examples.writer(store, out) as result:
        assert list(result.finished) == [0, 2]
        assert len(result.forgotten) == 1
        assert result.forgotten[0].startswith("part-00001.parquet: ")
        for index in range(3):
            write_part(result, index)
        result.commit(parts=3, checks={}, provenance={})
    assert parts[1].read_bytes() == good
    assert parts[0].stat().st_mtime_ns == kept
    assert verify(store).ok


def test_temporary_files_of_a_killed_writer_are_removed(store: Path) -> None:
    """[F20]"""
    out = examples.output(store, "topk_cache")
    leftover = Path(out.path) / ".part-00000.parquet.abc123.tmp"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half a part")
    with examples.writer(store, out) as result:
        assert not result.finished
        assert not leftover.exists()


# ----------------------------------------------------------------------------------------------------- the manifest


def test_manifest_has_exactly_these_keys(store: Path) -> None:
    """[F21]"""
    raw = raw_manifest(examples.commit(store, "topk_cache")[0])
    listed = re.search(r"\[F21\](.*?)- \[F22\]", FORMAT_FILE.read_text(), re.DOTALL)
    assert listed is not None
    assert sorted(raw) == re.findall(r"`(\w+)`", listed[1])


def test_part_record_has_the_hash_that_sha256sum_gives(store: Path) -> None:
    """[F22]"""
    folder, _ = examples.commit(store, "topk_cache")
    for record in raw_manifest(folder)["parts"]:
        assert sorted(record) == ["index", "n_bytes", "n_documents", "n_tokens", "name", "sha256", "stats"]
        data = (folder / record["name"]).read_bytes()
        assert (record["n_bytes"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("asset", examples.TABLES)
def test_totals_are_sums_over_parts(store: Path, asset: Asset) -> None:
    """[F23]"""
    folder, manifest = examples.commit(store, asset)
    assert (manifest.n_documents, manifest.n_tokens) == (4, 16 if asset == "shards_manifest" else 15)
    assert [(p.n_documents, p.n_tokens) for p in manifest.parts] == [(2, 6), (2, manifest.n_tokens - 6)]
    assert manifest.n_bytes == sum(path.stat().st_size for path in folder.glob("part-*"))


def test_data_version_is_the_hash_of_the_parts_hashes(store: Path) -> None:
    """[F24]"""
    _, manifest = examples.commit(store, "embedding_cache")
    first, second = (part.sha256 for part in manifest.parts)
    expected = hashlib.sha256(f"embedding_cache\n1\n{first}\n{second}\n".encode()).hexdigest()
    assert manifest.data_version == expected


def test_change_of_any_value_of_a_manifest_is_found(store: Path) -> None:
    """[F25]"""
    folder, _ = examples.commit(store, "topk_cache")
    raw = raw_manifest(folder)
    rest = {key: value for key, value in raw.items() if key != "manifest_sha256"}
    assert raw["manifest_sha256"] == fingerprint(rest)
    for key in rest:
        (folder / "manifest.json").write_text(json.dumps(raw | {key: "changed"}))
        with pytest.raises(CorruptManifestError, match=re.escape(str(folder / "manifest.json"))):
            read_manifest(folder)


def test_statistics_merge_by_the_start_of_their_names() -> None:
    """[F26]"""
    merged = merge_stats([{"n_x": 1, "max_y": 2, "min_z": 3}, {"n_x": 10, "max_y": 1, "min_z": 5, "max_w": -1}])
    assert merged == {"n_x": 11, "max_y": 2, "min_z": 3, "max_w": -1}
    with pytest.raises(ValueError, match="mean_y"):
        merge_stats([{"mean_y": 1}])


def test_numbers_that_json_lacks_are_null(store: Path) -> None:
    """[F27]"""
    checks = {"recomputed": {"largest": math.inf, "all": [1.0, math.nan]}}
    folder, manifest = examples.commit(store, "topk_cache", checks=checks)
    assert manifest.checks == {"recomputed": {"largest": None, "all": [1.0, None]}}
    assert read_manifest(folder) == manifest


@pytest.mark.parametrize("version", [2, True, 1.0, "1"])
def test_manifest_of_another_format_version_is_refused(store: Path, version: object) -> None:
    """[F28]"""
    folder, _ = examples.commit(store, "topk_cache")
    (folder / "manifest.json").write_text(json.dumps(raw_manifest(folder) | {"format_version": version}))
    with pytest.raises(CorruptManifestError, match=rf"format version {version!r}, this version of kd_assets reads 1"):
        read_manifest(folder)


@pytest.mark.parametrize("asset", CACHES)
def test_identity_holds_the_parameters(store: Path, asset: Asset) -> None:
    """[F29]"""
    _, manifest = examples.commit(store, asset)
    assert manifest.params == manifest.identity["params"] == examples.PARAMS[asset]
    assert "max_length" in manifest.params


def test_identity_of_a_cache_with_draws_holds_their_number_and_seed(store: Path) -> None:
    """[F29]"""
    _, manifest = examples.commit(store, "topk_cache", params=examples.WITH_DRAWS)
    assert manifest.params == {"k": 4, "max_length": 6, "draws": 20, "seed": 0}
    assert manifest.variant != examples.commit(store, "topk_cache")[1].variant


# -------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("asset", examples.TABLES)
def test_rows_are_the_documents_of_the_shard_in_order(store: Path, asset: Asset) -> None:
    """[F30]"""
    ids = [i for rows in part_tables(examples.commit(store, asset)[0]) for i in rows["document_id"].to_pylist()]
    assert ids == ["document-0", "document-1", "document-2", "document-3"]


@pytest.mark.parametrize("asset", examples.TABLES)
def test_common_columns_come_first(store: Path, asset: Asset) -> None:
    """[F31]"""
    docs = examples.documents()
    tokens = docs.slice(0, 2)
    rows = next(part_tables(examples.commit(store, asset)[0]))
    types = [(field.name, str(field.type)) for field in rows.schema][:4]
    assert types == [
        ("document_id", "string"),
        ("n_tokens", "int32"),
        ("input_ids", "list<element: uint32 not null>"),
        ("loss_mask", "list<element: bool not null>"),
    ]
    assert rows["n_tokens"].to_pylist() == [5, 1]
    assert flat(rows["input_ids"]).tolist() == tokens.input_ids.tolist()
    assert flat(rows["loss_mask"]).tolist() == tokens.loss_mask.tolist()


@pytest.mark.parametrize("asset", examples.TABLES)
def test_nothing_is_nullable_and_elements_are_called_element(store: Path, asset: Asset) -> None:
    """[F32]"""
    for rows in part_tables(examples.commit(store, asset)[0]):
        pending = list(rows.schema)
        while pending:
            field = pending.pop()
            assert not field.nullable
            if pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type):
                assert field.type.value_field.name == "element"
                pending.append(field.type.value_field)


def test_documents_without_tokens_are_refused() -> None:
    """[F33]"""
    with pytest.raises(ValueError, match="'document-1' has no tokens"):
        examples.documents((3, 0, 2))


def test_cached_documents_are_prefixes_of_the_shards(store: Path) -> None:
    """[F33]"""
    folders = examples.commit_all(store)
    shard = CacheReader.from_folders([folders["shards_manifest"]])
    for asset in CACHES:
        cache = CacheReader.from_folders([folders[asset]])
        assert cache.n_tokens_D.tolist() == [5, 1, 3, 6]
        for i in range(4):
            prefix = shard[i]["input_ids"][: examples.MAX_LENGTH]
            assert cache[i]["input_ids"].tolist() == prefix.tolist()


@pytest.mark.parametrize("asset", examples.TABLES)
def test_schema_metadata_says_what_the_numbers_mean(store: Path, asset: Asset) -> None:
    """[F34]"""
    for rows in part_tables(examples.commit(store, asset)[0]):
        metadata = {key.decode(): value.decode() for key, value in rows.schema.metadata.items()}
        assert metadata.pop("kd_assets.convention").startswith("one row a document")
        assert metadata == {"kd_assets.asset": asset, "kd_assets.format_version": "1"}


def test_shard_rows_say_which_record_they_are_of(store: Path) -> None:
    """[F35]"""
    rows = next(part_tables(examples.commit(store, "shards_manifest")[0]))
    assert rows.schema.names[4:] == ["source", "source_record"]
    assert rows.select(["source", "source_record"]).to_pylist() == [
        {"source": "corpus", "source_record": 0},
        {"source": "corpus", "source_record": 1},
    ]


def test_topk_columns_have_a_row_less_than_tokens(store: Path) -> None:
    """[F36]"""
    rows = next(part_tables(examples.commit(store, "topk_cache")[0]))
    assert [(field.name, str(field.type).replace(" not null", "")) for field in rows.schema][4:] == [
        ("topk_ids", "list<element: fixed_size_list<element: uint32>[4]>"),
        ("topk_logprobs", "list<element: fixed_size_list<element: halffloat>[4]>"),
        ("logsumexp", "list<element: float>"),
        ("target_logprob", "list<element: float>"),
    ]
    for name in rows.schema.names[4:]:
        assert [len(values) for values in rows[name].to_pylist()] == [4, 0]
    document = CacheReader(store / "tiny", "topk_cache")[0]
    assert (np.diff(document["topk_logprobs"].astype(np.float32), axis=1) <= 0).all()


def test_element_i_concerns_token_i_plus_one(store: Path) -> None:
    """[F37]"""
    examples.commit(store, "topk_cache")
    part = examples.documents().slice(0, 2)
    document = CacheReader(store / "tiny", "topk_cache")[0]
    logits = examples.teacher_logits(part)[:4]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = [logprobs[i, document["input_ids"][i + 1]] for i in range(4)]
    np.testing.assert_allclose(document["target_logprob"], expected, atol=1e-5)


def test_logprobs_are_those_of_the_full_vocabulary(store: Path) -> None:
    """[F38]"""
    _, manifest = examples.commit(store, "topk_cache")
    part = examples.documents().slice(0, 2)
    document = CacheReader(store / "tiny", "topk_cache")[0]
    logits = np.take_along_axis(examples.teacher_logits(part)[:4], document["topk_ids"].astype(np.int64), axis=1)
    restored = document["topk_logprobs"].astype(np.float32) + document["logsumexp"][:, None]
    np.testing.assert_allclose(restored, logits, atol=4e-3)
    kept = np.exp(document["topk_logprobs"].astype(np.float32)).sum(axis=1)
    assert (kept < 1).all()  # 4 of 11 tokens: what is missing was not normalised away
    assert kept.max() <= manifest.stats["max_probability_sum"] <= 1 + 4e-3


def test_hidden_states_are_bits_of_bfloat16_in_ascending_blocks(store: Path) -> None:
    """[F39]"""
    rows = next(part_tables(examples.commit(store, "hidden_state_cache")[0]))
    assert [(field.name, str(field.type).replace(" not null", "")) for field in rows.schema][4:] == [
        ("hidden_block_0", "list<element: fixed_size_list<element: uint16>[3]>"),
        ("hidden_block_2", "list<element: fixed_size_list<element: uint16>[3]>"),
    ]
    assert CacheReader(store / "tiny", "hidden_state_cache")[0]["hidden_block_2"].shape == (5, 3)


def test_hidden_columns_say_which_block_they_are(store: Path) -> None:
    """[F40]"""
    rows = next(part_tables(examples.commit(store, "hidden_state_cache")[0]))
    metadata = {key.decode(): value.decode() for key, value in rows.schema.field("hidden_block_2").metadata.items()}
    assert (metadata["dtype"], metadata["block"]) == ("bfloat16", "2")
    assert "hidden_states[2 + 1] before any final norm" in metadata["convention"]


def test_embeddings_are_vectors_of_float32(store: Path) -> None:
    """[F41] That they are the mean and the last token is in the teacher's tests."""
    rows = next(part_tables(examples.commit(store, "embedding_cache")[0]))
    assert [(field.name, str(field.type).replace(" not null", "")) for field in rows.schema][4:] == [
        ("mean_embedding", "fixed_size_list<element: float>[3]"),
        ("last_token_embedding", "fixed_size_list<element: float>[3]"),
    ]


# -------------------------------------------------------------------------------------------------------- containers


@pytest.mark.parametrize("asset", ["shards_manifest", "topk_cache", "embedding_cache"])
def test_parquet_parts_split_bytes_of_four_byte_numbers_only(store: Path, asset: Asset) -> None:
    """[F42]"""
    folder, _ = examples.commit(store, asset, params=examples.WITH_DRAWS if asset == "topk_cache" else None)
    file = pq.ParquetFile(folder / "part-00000.parquet")
    for i in range(file.metadata.num_columns):
        column = file.metadata.row_group(0).column(i)
        leaf = file.schema.column(i)
        is_unsigned = re.search("bitWidth=(16|32), isSigned=false", str(leaf.logical_type)) is not None
        is_split = leaf.physical_type == "FLOAT" or is_unsigned
        assert column.compression == "ZSTD"
        assert not column.has_dictionary_page
        assert not column.is_stats_set
        assert ("BYTE_STREAM_SPLIT" in column.encodings) == is_split, column.path_in_schema


def test_mapped_hidden_states_are_a_view_of_the_file(store: Path) -> None:
    """[F43]"""
    folder, manifest = examples.commit(store, "hidden_state_cache")
    path = folder / "part-00000.arrow"
    allocated = pa.total_allocated_bytes()
    with pa.memory_map(str(path)) as mapped:
        batch = pa.ipc.open_file(mapped).get_batch(0)
        assert pa.total_allocated_bytes() == allocated
        values = batch["hidden_block_0"].values.values.to_numpy(zero_copy_only=True)
        assert values.tobytes() in path.read_bytes()
    document = CacheReader(store / "tiny", "hidden_state_cache", variant=manifest.variant)[0]
    assert not document["hidden_block_0"].flags.owndata


@pytest.mark.parametrize("asset", ["topk_cache", "hidden_state_cache"])
def test_rows_come_in_groups_of_4096_tokens_or_one_longer_document(store: Path, asset: Asset) -> None:
    """[F44]"""
    lengths = (4_000, 96, 1, 5_000, 3)
    docs = examples.documents(lengths)
    out = examples.output(store, asset)
    with examples.writer(store, out) as result:
        rows = examples.table(asset, docs)
        record = result.write_part(0, rows, n_tokens=docs.n_tokens, stats={})
    with PartFile(Path(out.path) / record.name) as part:
        assert part.first_rows.tolist() == [0, 2, 3, 4, 5]
        assert part.read(rows.schema.names).equals(rows)


@pytest.mark.parametrize("asset", examples.TABLES)
def test_equal_content_gives_equal_bytes(tmp_path: Path, asset: Asset) -> None:
    """[F45]"""
    first, one = examples.commit(tmp_path / "first", asset)
    second, other = examples.commit(tmp_path / "second", asset)
    assert {p.name: p.read_bytes() for p in first.glob("part-*")} == {
        p.name: p.read_bytes() for p in second.glob("part-*")
    }
    assert one.data_version == other.data_version
    for path in first.glob("part-*"):
        assert str(tmp_path).encode() not in path.read_bytes()


def test_parts_open_in_plain_pyarrow(store: Path) -> None:
    """[F46]"""
    folders = examples.commit_all(store)
    for asset in ("shards_manifest", "topk_cache", "embedding_cache"):
        assert pq.read_table(folders[asset] / "part-00001.parquet").num_rows == 2
    with pa.ipc.open_file(folders["hidden_state_cache"] / "part-00000.arrow") as file:
        assert file.read_all()["n_tokens"].to_pylist() == [5, 1]


@pytest.mark.parametrize("asset", ["shards_manifest", "topk_cache", "embedding_cache"])
@pytest.mark.parametrize("library", ["pandas", "duckdb", "polars", "datasets"])
def test_parquet_parts_open_in_everyday_readers_and_hold_the_same_numbers_there(
    store: Path, library: str, asset: Asset, tmp_path: Path
) -> None:
    """[F46] Where they are installed: none of them is a dependency. All parts at once, every value of every column."""
    module: Any = pytest.importorskip(library)
    params = examples.WITH_DRAWS if asset == "topk_cache" else None
    folder = examples.commit(store, asset, params=params)[0]
    pattern = str(folder / "*.parquet")
    if library == "duckdb":
        found = module.sql(f"select * from '{pattern}' order by document_id").to_arrow_table().to_pylist()
    elif library == "polars":
        found = module.read_parquet(pattern).to_dicts()
    elif library == "pandas":
        parts = [module.read_parquet(path) for path in sorted(folder.glob("*.parquet"))]
        found = module.concat(parts).to_dict("records")
    else:
        found = list(module.Dataset.from_parquet(pattern, cache_dir=str(tmp_path / "hf")))
    expected = [row for table in part_tables(folder) for row in table.to_pylist()]
    assert [{name: plain(value) for name, value in row.items()} for row in found] == expected


def plain(value: Any) -> Any:
    """Arrays, however deep, as lists."""
    if isinstance(value, (list, np.ndarray)):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


# ------------------------------------------------------------------------------------------------------ random draws


def test_cache_without_draws_is_named_and_made_as_before_there_were_draws(store: Path) -> None:
    """[F47] The fingerprint is the one that the version before draws gave."""
    folder, manifest = examples.commit(store, "topk_cache")
    assert manifest.fingerprint == "914593e0ed944ad8a65e127d86de6c12a4c5bd48fbf40339146b72d9e4bb28f7"
    names = next(part_tables(folder)).schema.names
    assert names[4:] == ["topk_ids", "topk_logprobs", "logsumexp", "target_logprob"]
    assert set(manifest.params) == {"k", "max_length"}


def test_cache_with_draws_has_two_more_columns(store: Path) -> None:
    """[F48]"""
    folder, manifest = examples.commit(store, "topk_cache", params=examples.WITH_DRAWS)
    rows = next(part_tables(folder))
    assert [(field.name, str(field.type).replace(" not null", "")) for field in rows.schema][8:] == [
        ("sampled_ids", "list<element: list<element: uint32>>"),
        ("sampled_counts", "list<element: list<element: uint16>>"),
    ]
    for name in ("sampled_ids", "sampled_counts"):
        metadata = {key.decode(): value.decode() for key, value in rows.schema.field(name).metadata.items()}
        assert metadata["draws"] == "20"
        assert metadata["convention"].startswith("token ids drawn at random, with replacement")
    assert manifest.format_version == 1
    assert verify(store).problems == ()


def test_cache_with_draws_differs_from_one_without_in_nothing_else(store: Path) -> None:
    """[F48]"""
    with_draws, _ = examples.commit(store, "topk_cache", params=examples.WITH_DRAWS)
    without, _ = examples.commit(store, "topk_cache")
    for one, other in zip(part_tables(with_draws), part_tables(without), strict=True):
        assert one.select(other.schema.names).equals(other)


@pytest.mark.parametrize("draws", [0, 65_536])
def test_draws_that_have_no_columns_are_refused(draws: int) -> None:
    """[F48]"""
    docs = examples.documents((2,))
    numbers = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="with d from 1 to 65535"):
        encode_topk(
            docs,
            topk_ids_Mk=np.zeros((1, 1), np.uint32),
            topk_logprobs_Mk=np.zeros((1, 1), np.float16),
            logsumexp_M=numbers,
            target_logprob_M=numbers,
            sampled_ids_Md=np.zeros((1, draws), np.uint32),
        )


def test_lists_of_draws_are_the_different_ids_and_their_counts(store: Path) -> None:
    """[F49] Counted here one by one."""
    _, manifest = examples.commit(store, "topk_cache", params=examples.WITH_DRAWS)
    reader = CacheReader(store / "tiny", "topk_cache")
    drawn = examples.sampled_ids(examples.documents().slice(0, 2)).tolist()
    document = reader[0]
    assert len(document["sampled_ids"]) == len(document["sampled_counts"]) == 4
    for i, ids in enumerate(drawn):
        counted = {token: ids.count(token) for token in sorted(ids)}
        assert document["sampled_ids"][i].tolist() == list(counted)
        assert document["sampled_counts"][i].tolist() == list(counted.values())
    assert [len(reader[1][name]) for name in ("sampled_ids", "sampled_counts")] == [0, 0]
    assert manifest.stats["n_draws"] == 20 * manifest.stats["n_positions"]
    assert manifest.stats["max_sampled_id"] < examples.VOCABULARY


def test_draw_is_the_lowest_id_with_more_than_u_up_to_it() -> None:
    """[F50] That draws follow the distribution is in the teacher's tests."""
    probabilities = torch.tensor([[0.25, 0.0, 0.5, 0.0, 0.25]])
    u = torch.tensor([[0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-24]])
    logits = probabilities.log()
    assert drawn_ids(logits, logits.amax(1), u).tolist() == [[0, 0, 2, 2, 4, 4]]


def test_numbers_behind_the_draws_can_be_had_from_numpy_alone() -> None:
    """[F51]"""
    key = int.from_bytes(hashlib.sha256(b"7:document-0").digest()[:16], "little")
    words = [int(word) for word in np.random.Philox(key=key).random_raw(3)]
    halves = [half for word in words for half in (word % 2**32, word // 2**32)]
    expected = [half // 2**8 / 2**24 for half in halves]
    assert uniforms(7, "document-0", 2, 3).reshape(-1).tolist() == expected
    assert expected[0] == 0.13234221935272217
    assert uniforms(7, "document-0", 1, 3).tolist() == [expected[:3]]
    assert uniforms(8, "document-0", 1, 3).tolist() != uniforms(7, "document-1", 1, 3).tolist() != [expected[:3]]


# --------------------------------------------------------------------------------------------------------- versions


def test_versions_of_what_computes_are_in_an_identity_once_they_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """[F52] That they are in those that the planner makes is in the golden store's tests."""
    assets: list[tuple[Asset, dict[str, Any]]] = [
        ("shards_manifest", {}),
        ("topk_cache", {"draws": 3}),
        *((cache, {}) for cache in CACHES),
        ("student_smoke", {}),
    ]
    coded = {"draws": 3, "codec": "compact"}
    assert computing_versions.computing_versions("topk_cache", coded) == {"draws_codec_version": 2}
    assert computing_versions.computing_versions("topk_cache", {"codec": "compact"}) == {}
    versions = ("TOKENISING_VERSION", "PASS_VERSION", "DRAWS_VERSION")
    for name in versions:
        monkeypatch.setattr(computing_versions, name, 1)
    assert [computing_versions.computing_versions(*asset) for asset in assets] == [{}] * 6
    for raised, name in enumerate(versions, start=2):
        monkeypatch.setattr(computing_versions, name, raised)
    assert [computing_versions.computing_versions(*asset) for asset in assets] == [
        {"tokenising_version": 2},
        {"pass_version": 3, "draws_version": 4},
        *[{"pass_version": 3}] * 3,
        {},
    ]


# ------------------------------------------------------------------------------------------------------------ golden


# ----------------------------------------------------------------------------------------------- coded hidden states


def coded_result(store: Path, codec: str, *, lengths: tuple[int, ...] = (5, 1, 3), size: int = 128) -> tuple[Path, Any]:
    """The folder of a result of one part, and the exact states of block 1."""
    docs = examples.documents(lengths)
    numbers = np.random.default_rng(0).normal(0, 1, (docs.n_tokens, size)).astype(np.float32)
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    named = {} if codec == "plain" else {"codec": codec}
    params = {"blocks": [1], "final": ["after_norm"], "max_length": 9_999, **named}
    out = examples.output(store, "hidden_state_cache", params=params)
    with examples.writer(store, out) as writer:
        table = coded(encode_hidden_states(docs, {1: bits, "after_norm": bits}), codec)
        stats = part_stats("hidden_state_cache", table.decoded) | table.error
        writer.write_part(0, table.stored, n_tokens=docs.n_tokens, stats=stats)
        writer.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    return Path(out.path), bits


def stored_column(folder: Path, name: str) -> Any:
    """The numbers of a column of the file, nesting dropped."""
    with pa.memory_map(str(folder / "part-00000.arrow")) as mapped:
        return flat(pa.ipc.open_file(mapped).read_all()[name]).copy()


@pytest.mark.parametrize(
    ("codec", "columns"),
    [
        ("split", ("high_bytes", "low_bytes")),
        ("fp8", ("fp8", "fp8_scale")),
        ("int8_32", ("int8", "int8_scales")),
        ("int8_128", ("int8", "int8_scales")),
    ],
)
def test_coded_states_have_two_columns_in_the_place_of_each(store: Path, codec: str, columns: tuple[str, str]) -> None:
    """[F86] [F90]"""
    folder, bits = coded_result(store, codec)
    (rows,) = part_tables(folder)
    states = ("hidden_block_1", "hidden_final_after_norm")
    assert rows.schema.names[4:] == [f"{state}_{column}" for state in states for column in columns]
    assert rows.schema.metadata[b"kd_assets.codec"].decode() == codec
    assert b"kd_assets.codec_since" in rows.schema.metadata
    of_block = rows.schema.field(f"hidden_block_1_{columns[0]}").metadata
    assert (of_block[b"block"], of_block[b"dtype"], of_block[b"codec"].decode()) == (b"1", b"bfloat16", codec)
    plain, _ = coded_result(store, "plain")
    reader, raw = CacheReader.from_folders([folder]), CacheReader.from_folders([plain])
    assert reader.schema.equals(raw.schema, check_metadata=True)
    assert "codec" not in raw.manifests[0].params
    assert np.array_equal(raw[0]["hidden_block_1"], bits[:5])
    assert verify(folder).problems == ()


def test_split_states_are_low_bytes_and_a_frame_of_high_bytes_a_document(store: Path) -> None:
    """[F87]"""
    folder, bits = coded_result(store, "split")
    (rows,) = part_tables(folder)
    assert (
        str(rows.schema.field("hidden_block_1_low_bytes").type.value_type)
        == "fixed_size_list<element: uint8 not null>[128]"
    )
    assert np.array_equal(stored_column(folder, "hidden_block_1_low_bytes"), (bits & 0xFF).ravel())
    frames = rows["hidden_block_1_high_bytes"].to_pylist()
    high = [pa.decompress(f, n * 128, codec="zstd", asbytes=True) for f, n in zip(frames, (5, 1, 3), strict=True)]
    assert b"".join(high) == (bits >> 8).astype(np.uint8).tobytes()


def test_fp8_states_are_e4m3_numbers_and_a_scale_a_state(store: Path) -> None:
    """[F88] [F90]"""
    folder, bits = coded_result(store, "fp8")
    exact = (bits.astype(np.uint32) << 16).view(np.float32)
    scales = stored_column(folder, "hidden_block_1_fp8_scale")
    assert np.array_equal(scales, np.abs(exact).max(axis=1) / np.float32(448))
    numbers = torch.from_numpy(stored_column(folder, "hidden_block_1_fp8")).view(torch.float8_e4m3fn).view(-1, 128)
    assert torch.equal(numbers.float(), torch.from_numpy(exact / scales[:, None]).to(torch.float8_e4m3fn).float())
    decoded = (numbers.float() * torch.from_numpy(scales)[:, None]).bfloat16().view(torch.int16).numpy()
    reader = CacheReader.from_folders([folder])
    assert np.array_equal(np.concatenate([reader[i]["hidden_block_1"] for i in range(3)]), decoded.view(np.uint16))


@pytest.mark.parametrize("group", [32, 128])
def test_int8_states_are_whole_numbers_and_a_scale_a_group(store: Path, group: int) -> None:
    """[F89] [F90]"""
    folder, bits = coded_result(store, f"int8_{group}")
    exact = (bits.astype(np.uint32) << 16).view(np.float32).reshape(-1, group)
    scale_bits = stored_column(folder, "hidden_block_1_int8_scales")
    scales = (scale_bits.astype(np.uint32) << 16).view(np.float32)
    least = np.abs(exact).max(axis=1) / np.float32(127)
    below = ((scale_bits - 1).astype(np.uint32) << 16).view(np.float32)
    assert (scales >= least).all()
    assert (below < least).all()
    numbers = stored_column(folder, "hidden_block_1_int8").reshape(-1, group)
    assert np.array_equal(numbers, np.rint(exact / scales[:, None]).astype(np.int8))
    decoded = torch.from_numpy(numbers.astype(np.float32) * scales[:, None]).bfloat16().view(torch.int16).numpy()
    reader = CacheReader.from_folders([folder])
    found = np.concatenate([reader[i]["hidden_block_1"] for i in range(3)])
    assert np.array_equal(found.ravel(), decoded.view(np.uint16).ravel())


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**41, -(2.0**41), 2.0**-41])
def test_codecs_that_round_refuse_what_no_state_is_and_split_holds_it(bad: float) -> None:
    """[F91]"""
    docs = examples.documents((2,))
    numbers = np.zeros((2, 128), dtype=np.float32)
    numbers[1, 7] = bad
    plain = encode_hidden_states(docs, {1: (numbers.view(np.uint32) >> 16).astype(np.uint16)})
    for codec in ("fp8", "int8_32", "int8_128"):
        with pytest.raises(CodecRangeError, match="'document-0', vector 1"):
            coded(plain, codec)
    assert coded(plain, "split").decoded.equals(plain)


@pytest.mark.parametrize(
    ("codec", "most"),
    [
        ("split", 0.0),
        ("fp8", 2.0**-4 + 2.0**-8 + 2.0**-10),
        ("int8_32", math.sqrt(32) * (1 + 2.0**-7) / 254 + 2.0**-8),
        ("int8_128", math.sqrt(128) * (1 + 2.0**-7) / 254 + 2.0**-8),
    ],
)
def test_the_error_of_coding_is_in_the_manifest_and_has_a_limit(store: Path, codec: str, most: float) -> None:
    """[F92]"""
    folder, bits = coded_result(store, codec)
    exact = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    reader = CacheReader.from_folders([folder])
    read = np.concatenate([reader[i]["hidden_block_1"] for i in range(3)])
    error = (read.astype(np.uint32) << 16).view(np.float32) - exact
    stats = reader.manifests[0].stats
    of_states = np.sqrt((error**2).sum(axis=1) / (exact**2).sum(axis=1))
    assert stats["max_codec_state_error"] == pytest.approx(of_states.max(), rel=1e-5)
    assert stats["max_codec_relative_rms"] == pytest.approx(math.sqrt((error**2).sum() / (exact**2).sum()), rel=1e-5)
    assert stats["max_codec_abs_error"] == np.abs(error).max()
    assert stats["max_codec_state_error"] <= most
    for value, fails in ((most, False), (most * 1.001 + 1e-9, True)):
        part = dataclasses.replace(
            reader.manifests[0].parts[0],
            stats=reader.manifests[0].parts[0].stats | {"max_codec_state_error": value},
        )
        changed = dataclasses.replace(reader.manifests[0], parts=(part,))
        assert (failed_check(changed) is not None) == fails


@pytest.mark.parametrize("codec", ["split", "fp8", "int8_32"])
def test_coded_rows_come_in_groups_of_512_tokens_or_one_longer_document(store: Path, codec: str) -> None:
    """[F93]"""
    folder, _ = coded_result(store, codec, lengths=(500, 12, 1, 600, 3), size=32)
    with PartFile(folder / "part-00000.arrow") as part:
        assert part.first_rows.tolist() == [0, 2, 3, 4, 5]


def recoded_result(store: Path, wanted: Output) -> tuple[Path, Manifest]:
    source = find_source(wanted).source
    assert source is not None
    return Path(wanted.path), recode(source, wanted, made_by={"kd_assets": "9"}, clock=examples.fixed_clock)


def test_a_recoded_result_is_what_the_teachers_pass_gives(store: Path) -> None:
    """[F103] Every codec, and what is refused, in the tests of recoding."""
    examples.commit(store / "recoded", "topk_cache")
    for form in (examples.COMPACT, examples.COMPACT | {"logsumexp": False}):
        expected, by_teacher = examples.commit(store / "teacher", "topk_cache", params=form)
        folder, manifest = recoded_result(
            store / "recoded", examples.output(store / "recoded", "topk_cache", params=form)
        )
        assert (manifest.identity, manifest.parts, manifest.stats) == (
            by_teacher.identity,
            by_teacher.parts,
            by_teacher.stats,
        )
        for name in (*(part.name for part in manifest.parts), "documents.index"):
            assert (folder / name).read_bytes() == (expected / name).read_bytes()
    rounded = store / "rounded"
    examples.commit(rounded, "topk_cache", params=examples.COMPACT | {"logsumexp": False})
    for form in (examples.COMPACT, examples.PARAMS["topk_cache"]):
        assert find_source(examples.output(rounded, "topk_cache", params=form)).source is None


def test_a_recoded_result_keeps_its_sources_provenance_and_says_its_own(store: Path) -> None:
    """[F104]"""
    source, before = examples.commit(store, "topk_cache")
    _, manifest = recoded_result(store, examples.output(store, "topk_cache", params=examples.COMPACT))
    assert (manifest.facts, manifest.provenance["host"]) == (before.facts, before.provenance["host"])
    assert manifest.provenance["recoded_from"] == {
        "codec": "plain",
        "fingerprint": before.fingerprint,
        "data_version": before.data_version,
        "folder": str(source.relative_to(store / examples.RECIPE)),
        "n_bytes": before.n_bytes,
        "created_at": before.created_at,
    }
    assert manifest.provenance["recoded_by"]["kd_assets"] == "9"
    compact = {**manifest.identity, "params": {**manifest.params, "codec": "later"}}
    with pytest.raises(UnknownCodecError, match="kd_assets 9 and later read it"):
        require_readable(dataclasses.replace(manifest, identity=compact))


def test_a_recoded_result_is_compared_with_its_source(store: Path) -> None:
    """[F105]"""
    _, before = examples.commit(store, "topk_cache")
    _, manifest = recoded_result(store, examples.output(store, "topk_cache", params=examples.COMPACT))
    assert manifest.checks["recomputed"] == {**examples.RECOMPUTED, "of_result": before.fingerprint}
    record = manifest.checks["recoded"]
    assert record == {
        "max_kl": pytest.approx(manifest.stats["max_codec_kl"], abs=1e-7),
        "passed": True,
        "is_exact": False,
        "n_parts": len(manifest.parts),
        "n_documents": manifest.n_documents,
        "source_data_version": before.data_version,
    }
    assert failed_check(manifest) is None
    for change in ({"passed": False}, {"n_parts": 0}, {"n_documents": 0}):
        changed = dataclasses.replace(manifest, checks=manifest.checks | {"recoded": {**record, **change}})
        assert (failed_check(changed) or "").startswith("check recoded failed")


def test_golden_manifest_and_names_of_a_tiny_result(store: Path) -> None:
    """To the byte. Part bytes depend on the version of pyarrow, so this result is one of plain files."""
    out = plan_output(
        "student_smoke", {"asset": "student_smoke", "input": "i"}, recipe_folder=store / "r", partition_key="all"
    )
    commit_file_result(
        out,
        recipe="r",
        recipe_folder=store / "r",
        partition_key="all",
        files={"losses.json": b"[2]\n"},
        checks={},
        provenance={"host": "h"},
        clock=examples.fixed_clock,
    )
    golden = Path(__file__).with_name("golden_manifest.json")
    assert (Path(out.path) / "manifest.json").read_text() == golden.read_text()
    names = sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file())
    assert names == [
        "r/audit.jsonl",
        "r/student_smoke/b2fe26c0b202/all/51de2142916cdea3/.lease",
        "r/student_smoke/b2fe26c0b202/all/51de2142916cdea3/losses.json",
        "r/student_smoke/b2fe26c0b202/all/51de2142916cdea3/manifest.json",
        "r/student_smoke/b2fe26c0b202/all/head.json",
    ]


# ------------------------------------------------------------------------------------------------- index of documents


@pytest.mark.parametrize("asset", examples.TABLES)
def test_index_lies_beside_the_parts_and_its_result_is_whole_without_it(store: Path, asset: Asset) -> None:
    """[F72]"""
    folder, manifest = examples.commit(store, asset)
    assert "documents.index" in contents(folder)
    assert "documents.index" not in (folder / "manifest.json").read_text()
    assert manifest.n_bytes == sum(len(data) for name, data in contents(folder).items() if name.startswith("part-"))
    (folder / "documents.index").unlink()
    assert verify(folder).ok
    assert committed(folder, manifest.fingerprint) == manifest
    assert CacheReader.from_folders([folder]).document_ids == [f"document-{i}" for i in range(4)]


@pytest.mark.parametrize("asset", examples.TABLES)
def test_index_is_written_anew_with_the_same_bytes_when_its_result_is_reused(store: Path, asset: Asset) -> None:
    """[F72]"""
    folder, _ = examples.commit(store, asset)
    written = contents(folder)
    for lose in (Path.unlink, examples.flip_byte):
        lose(folder / "documents.index")
        set_head(folder)
        assert contents(folder) == written
    (folder / ".lease").unlink()
    (folder / "documents.index").unlink()
    archived = contents(folder)
    set_head(folder)
    assert contents(folder) == archived


def test_index_comes_before_the_manifest(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[F72]"""
    written: list[str] = []

    def noted(path: Path, data: bytes) -> str:
        written.append(path.name)
        return atomic_write(path, data)

    monkeypatch.setattr("kd_assets.store.writing.writer.atomic_write", noted)
    examples.commit(store, "topk_cache")
    assert written == ["documents.index", "manifest.json"]


def test_result_without_tables_or_documents_has_no_index(store: Path) -> None:
    """[F72]"""
    docs = examples.documents(())
    assert "documents.index" not in contents(examples.commit(store, "topk_cache", docs=docs)[0])


@pytest.mark.parametrize("asset", examples.TABLES)
def test_index_is_read_with_json_and_numpy_alone(store: Path, asset: Asset) -> None:
    """[F73] [F74]"""
    folder, manifest = examples.commit(store, asset)
    line, rest = (folder / "documents.index").read_bytes().split(b"\n", 1)
    header = json.loads(line)
    assert line.decode() == canonical_json(header)
    assert header["index_sha256"] == fingerprint({k: v for k, v in header.items() if k != "index_sha256"})
    assert set(header) == {
        "asset",
        "data_version",
        "index_sha256",
        "index_version",
        "n_documents",
        "sections",
    }
    said = (header["asset"], header["data_version"], header["index_version"], header["n_documents"])
    assert said == (asset, manifest.data_version, 1, 4)
    found = {}
    for name in ("schema", "n_tokens", "document_ids"):
        section = header["sections"][name]
        found[name], rest = rest[: section["n_bytes"]], rest[section["n_bytes"] :]
        assert section == {"n_bytes": len(found[name]), "sha256": hashlib.sha256(found[name]).hexdigest()}
    assert rest == b""
    tables = pa.concat_tables(part_tables(folder))
    assert pa.ipc.read_schema(pa.py_buffer(found["schema"])).equals(tables.schema, check_metadata=True)
    assert np.frombuffer(found["n_tokens"], "<i4").tolist() == tables["n_tokens"].to_pylist()
    offsets, text = np.frombuffer(found["document_ids"][:40], "<i8"), found["document_ids"][40:]
    ids = [text[start:stop].decode() for start, stop in itertools.pairwise(offsets)]
    assert ids == tables["document_id"].to_pylist()


def test_index_of_another_commit_is_named_and_nothing_of_it_is_read(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """[F73] [F75] Every flipped byte is in the tests of the index."""
    folder, _ = examples.commit(store, "topk_cache")
    other, _ = examples.commit(store.parent / "other", "topk_cache", docs=examples.documents((1, 2, 3, 4), seed=9))
    shutil.copy(other / "documents.index", folder / "documents.index")
    assert CacheReader.from_folders([folder]).n_tokens_D.tolist() == [5, 1, 3, 6]
    assert "is of another commit" in caplog.text
    assert [problem.kind for problem in verify(folder).problems] == ["corrupt_index"]


# --------------------------------------------------------------------------------------- codec compact of top-k caches


def test_coded_part_names_its_codec_and_has_planes_of_bytes_in_the_place_of_its_columns(store: Path) -> None:
    """[F76] [F77]"""
    plain, _ = examples.commit(store, "topk_cache")
    folder, manifest = examples.commit(store, "topk_cache", params=examples.COMPACT)
    assert manifest.params["codec"] == "compact"
    schema, of_plain = (next(part_tables(found)).schema for found in (folder, plain))
    assert (schema.metadata[b"kd_assets.codec"], schema.metadata[b"kd_assets.codec_since"]) == (b"compact", b"0.1.0")
    assert not {b"kd_assets.codec", b"kd_assets.codec_since"} & of_plain.metadata.keys()
    coded_names = [
        *(f"topk_ids_byte_{n}" for n in range(3)),
        *("topk_codes_0", "topk_codes_1", "topk_codes_2_3"),
        *("topk_tail", "target_logprob_outside", "logsumexp_float16"),
    ]
    assert schema.names == [*schema.names[:4], *coded_names]
    for name in coded_names:
        assert schema.field(name).type == pa.binary()
        assert schema.field(name).metadata == {b"k": b"4"}
    for name in schema.names[:4]:
        assert schema.field(name).equals(of_plain.field(name), check_metadata=True)


def test_bytes_of_a_coded_part_are_the_ids_the_codes_and_the_mass_of_what_is_not_kept(store: Path) -> None:
    """[F78] [F79] [F80] [F81] [F82] By the decoder in FORMAT.md, which has nothing of this package."""
    decode = decoder_to_copy()
    plain = CacheReader.from_folders([examples.commit(store, "topk_cache")[0]])
    folder, _ = examples.commit(store, "topk_cache", params=examples.COMPACT)
    reader = CacheReader.from_folders([folder])
    assert reader.fields == plain.fields
    n_inside = n_outside = 0
    for i, row in enumerate(row for part in part_tables(folder) for row in part.to_pylist()):
        ids, logprobs, target, sums = decode(row, examples.K)
        found, exact = reader[i], plain[i]
        np.testing.assert_array_equal(ids, exact["topk_ids"])
        for name, values in (("topk_ids", ids), ("topk_logprobs", logprobs), ("target_logprob", target)):
            np.testing.assert_array_equal(found[name], values)
        np.testing.assert_array_equal(found["logsumexp"], exact["logsumexp"].astype(np.float16))
        np.testing.assert_array_equal(found["logsumexp"], sums)
        inside = ids == exact["input_ids"][1:, None]
        np.testing.assert_array_equal(target[inside.any(axis=1)], logprobs[inside])
        outside = exact["target_logprob"][~inside.any(axis=1)].astype(np.float16)
        np.testing.assert_array_equal(target[~inside.any(axis=1)], outside)
        n_inside, n_outside = n_inside + int(inside.sum()), n_outside + len(outside)
    assert n_inside
    assert n_outside
    without, _ = examples.commit(store, "topk_cache", params=examples.COMPACT | {"logsumexp": False})
    assert "logsumexp_float16" not in next(part_tables(without)).schema.names
    assert "logsumexp" not in CacheReader.from_folders([without]).fields


def test_code_is_the_rounded_fourth_root_and_what_cannot_be_held_is_refused_before_anything_is_written(
    store: Path,
) -> None:
    """[F83]"""
    rows = examples.table("topk_cache", examples.documents())
    stored = coded(rows, "compact").stored
    first = b"".join(stored["topk_codes_0"].to_pylist())
    p = np.exp(flat(rows["topk_logprobs"]).reshape(-1, examples.K)[:, 0].astype(np.float64))
    assert list(first) == np.rint(255 * p**0.25).astype(int).tolist()
    infinite = pa.array(np.full(len(flat(rows["logsumexp"])), np.inf, np.float32))
    lists = pa.ListArray.from_arrays(rows["logsumexp"].chunk(0).offsets, infinite)
    field = rows.schema.field("logsumexp")
    broken = rows.set_column(rows.schema.get_field_index("logsumexp"), field, lists.cast(field.type))
    with pytest.raises(CodecRangeError, match="row 0 of document 'document-0' has inf as a logsumexp"):
        coded(broken, "compact")


def test_coding_is_measured_and_one_that_cost_too_much_has_failed(store: Path) -> None:
    """[F84] Its numbers are compared with their definition in the tests of the codec."""
    _, manifest = examples.commit(store, "topk_cache", params=examples.COMPACT)
    for part in manifest.parts:
        assert 0 < part.stats["max_codec_mean_kl"] <= part.stats["max_codec_kl"] <= 4e-5 * (1 + examples.K**0.5)
    out = examples.output(store, "topk_cache", params=examples.COMPACT, partition_key="tiny-00001")
    docs = examples.documents()
    made = coded(examples.table("topk_cache", docs), "compact")
    stats = part_stats("topk_cache", made.decoded) | made.error | {"max_codec_kl": 1.3e-4}
    with examples.writer(store, out, partition_key="tiny-00001") as result:
        result.write_part(0, made.stored, n_tokens=docs.n_tokens, stats=stats)
        result.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    assert not (Path(out.path).parent / "head.json").exists()
    with pytest.raises(FailedCheckError, match=r"check codec failed: .* and coding can cost"):
        CacheReader.from_folders([Path(out.path)])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("topk_tail", b""),
        ("topk_codes_0", b"\0\0\0\0"),
        ("topk_ids_byte_2", b"\x01" * 16),
        ("logsumexp_float16", b"\0\x7c" * 4),
    ],
)
def test_bytes_that_no_encoder_writes_are_refused(store: Path, column: str, value: bytes) -> None:
    """[F85] Each other case is among the tests of the codec."""
    docs = examples.documents((5,))
    stored = coded(examples.table("topk_cache", docs), "compact").stored
    field = stored.schema.field(column)
    changed = stored.set_column(stored.schema.get_field_index(column), field, pa.array([value], pa.binary()))
    out = examples.output(store, "topk_cache", params=examples.COMPACT)
    with examples.writer(store, out) as result:
        stats = {"n_non_finite": 0, "max_probability_sum": 1, "max_codec_kl": 0, "max_codec_mean_kl": 0}
        result.write_part(0, changed, n_tokens=docs.n_tokens, stats=stats)
        facts = {"vocab_size": examples.VOCABULARY}
        result.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={}, facts=facts)
    with pytest.raises(CorruptPartError, match="part-00000"):
        CacheReader.from_folders([Path(out.path)])[0]
    assert [problem.kind for problem in verify(store).problems] == ["unreadable_part"]


@pytest.mark.parametrize("library", ["pandas", "duckdb", "polars", "datasets"])
def test_coded_parts_open_in_everyday_readers_as_bytes(store: Path, library: str, tmp_path: Path) -> None:
    """[F46] Where they are installed."""
    module: Any = pytest.importorskip(library)
    path = str(examples.commit(store, "topk_cache", params=examples.COMPACT)[0] / "part-00000.parquet")
    if library == "duckdb":
        (tail,) = module.sql(f"select topk_tail from '{path}' limit 1").fetchall()[0]
    elif library == "datasets":
        tail = module.Dataset.from_parquet(path, cache_dir=str(tmp_path))[0]["topk_tail"]
    else:
        frame = module.read_parquet(path)
        tail = frame["topk_tail"][0]
    assert tail == pq.read_table(path)["topk_tail"][0].as_py()
    assert len(tail) == 4


# ---------------------------------------------------------------------------------------------------- what they share


def commit_of_input(store: Path, name: str, docs: Documents) -> tuple[Path, Any]:
    """A top-k result of the same variant and partition for each name of an input."""
    identity = examples.output(store, "topk_cache").identity | {"input": name}
    out = plan_output("topk_cache", identity, recipe_folder=store / "tiny", partition_key=examples.PARTITION)
    with examples.writer(store, out) as result:
        for plan in plan_parts(docs.n_tokens_D, max_documents=10, max_tokens=100):
            part = docs.slice(plan.first_document, plan.n_documents)
            rows = examples.table("topk_cache", part)
            result.write_part(plan.index, rows, n_tokens=part.n_tokens, stats=part_stats("topk_cache", rows))
        manifest = result.commit(parts=1, checks={}, provenance={})
    return Path(out.path), manifest


def write_part(result: Any, index: int) -> None:
    docs = examples.documents(seed=index)
    docs = dataclasses.replace(docs, document_ids=[f"{index}-{document_id}" for document_id in docs.document_ids])
    rows = examples.table("topk_cache", docs)
    result.write_part(index, rows, n_tokens=docs.n_tokens, stats=part_stats("topk_cache", rows))


def damage(path: Path, harm: str) -> None:
    data = path.read_bytes()
    if harm == "flip":
        examples.flip_byte(path)
    elif harm == "truncate":
        path.write_bytes(data[:-1])
    elif harm == "grow":
        path.write_bytes(data + b"\0")
    else:
        path.unlink()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def raw_manifest(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return raw


def part_tables(folder: Path) -> Iterator[pa.Table]:
    """The parts as plain pyarrow reads them, without this package."""
    for path in sorted(folder.glob("part-*")):
        if path.suffix == ".parquet":
            yield pq.ParquetFile(path).read()
        else:
            yield pa.ipc.open_file(path).read_all()


# ------------------------------------------------------------------------------------------------ coded random draws


def test_draws_of_a_coded_cache_are_planes_of_bytes_and_its_identity_says_so(store: Path) -> None:
    """[F94] That those without it are read as they were is in the tests of coded draws."""
    folder, manifest = examples.commit(store, "topk_cache", params=examples.COMPACT | {"draws": 20, "seed": 0})
    plain, _ = examples.commit(store, "topk_cache", params=examples.WITH_DRAWS)
    assert manifest.identity["draws_codec_version"] == 2
    schema = next(part_tables(folder)).schema
    assert (schema.metadata[b"kd_assets.codec"], schema.metadata[b"kd_assets.codec_since"]) == (b"compact_2", b"0.2.0")
    names = [
        *("sampled_slots_0", "sampled_slots_1", "sampled_slots_2_3"),
        *(f"sampled_outside_byte_{n}" for n in range(3)),
    ]
    assert schema.names[-len(names) :] == names
    for name in names:
        assert schema.field(name).type == pa.binary()
        assert schema.field(name).metadata == {b"k": b"4", b"draws": b"20"}
    for found, expected in zip(*(CacheReader.from_folders([of]) for of in (folder, plain)), strict=True):
        for name in ("sampled_ids", "sampled_counts"):
            np.testing.assert_array_equal(found[name].values, expected[name].values)
            np.testing.assert_array_equal(found[name].offsets, expected[name].offsets)


@pytest.mark.parametrize("draws", [20, 300])
def test_slots_have_counts_and_all_other_draws_are_gaps_between_their_ids(draws: int) -> None:
    """[F95] [F96] By the decoder in FORMAT.md."""
    rows = examples.table("topk_cache", examples.documents(), draws=draws)
    n_outside = 0
    made = coded(rows, "compact").stored
    assert ("sampled_slots_2_3_high" in made.schema.names) == (draws > 255)
    for row, plain in zip(made.to_pylist(), rows.to_pylist(), strict=True):
        ids = decoder_to_copy()(row, examples.K)[0]
        found = decoder_to_copy("decode_draws")(row, ids, draws)
        assert [drawn.tolist() for drawn, _ in found] == plain["sampled_ids"]
        assert [counts.tolist() for _, counts in found] == plain["sampled_counts"]
        n_outside += len(row["sampled_outside_byte_0"])
    assert n_outside


def test_draws_that_cannot_be_are_refused_by_the_encoder_and_the_reader(store: Path) -> None:
    """[F97] Each other case is among the tests of coded draws."""
    docs = examples.documents((5,))
    rows = examples.table("topk_cache", docs, draws=3)
    field = rows.schema.field("sampled_ids")
    more = rows.set_column(
        rows.schema.get_field_index("sampled_ids"), field.with_metadata({b"draws": b"4"}), rows["sampled_ids"]
    )
    with pytest.raises(CodecRangeError, match="row 0 of document 'document-0' has 3 draws, not 4"):
        coded(more, "compact")
    stored = coded(rows, "compact").stored
    at = stored.schema.get_field_index("sampled_slots_0")
    changed = stored.set_column(at, stored.schema.field(at), pa.array([b"\x04" * 4], pa.binary()))
    with pytest.raises(ValueError, match="row 0 of document 0 of the rows has counts of its slots that add up to"):
        plain_table(changed)


# ---------------------------------------------------------------------------------------- as many tokens as have a mass

MASS = {"top_p": 0.8}


def test_a_position_keeps_the_fewest_tokens_whose_float16_probabilities_have_the_mass(store: Path) -> None:
    """[F98]"""
    params = examples.PARAMS["topk_cache"]
    every = CacheReader.from_folders([examples.commit(store, "topk_cache", params=params)[0]])
    folder, manifest = examples.commit(store, "topk_cache", params=params | MASS)
    assert "top_p" not in every.manifests[0].params
    assert manifest.params["top_p"] == 0.8
    reader, found = CacheReader.from_folders([folder]), set()
    for i in range(len(reader)):
        ids, logprobs = reader[i]["topk_ids"], reader[i]["topk_logprobs"]
        for at, of_k in enumerate(every[i]["topk_logprobs"]):
            n, mass = 0, 0.0
            while n < examples.K and (n == 0 or mass < 0.8):
                mass += math.exp(float(of_k[n]))
                n += 1
            assert logprobs[at].tolist() == of_k[:n].tolist()
            assert ids[at].tolist() == every[i]["topk_ids"][at][:n].tolist()
            found.add(n)
    assert found == {1, 2, 3, 4}


def test_lists_of_what_a_position_keeps_have_different_lengths_and_are_counted(store: Path) -> None:
    """[F99]"""
    folder, manifest = examples.commit(store, "topk_cache", params=examples.PARAMS["topk_cache"] | MASS)
    n = 0
    for part in part_tables(folder):
        for name, leaf in (("topk_ids", pa.uint32()), ("topk_logprobs", pa.float16())):
            field = part.schema.field(name)
            assert field.type.value_type.value_type == leaf
            assert pa.types.is_list(field.type.value_type)
            assert (field.metadata[b"k"], field.metadata[b"top_p"]) == (b"4", b"0.8")
            assert b"the mass of all others" in field.metadata[b"convention"]
        for row in part.to_pylist():
            assert len(row["topk_ids"]) == len(row["topk_logprobs"]) == row["n_tokens"] - 1
            lengths = [len(ids) for ids in row["topk_ids"]]
            assert lengths == [len(logprobs) for logprobs in row["topk_logprobs"]]
            n += sum(lengths)
    assert manifest.stats["n_kept_ids"] == n


@pytest.mark.parametrize("changes", [{}, MASS, {"codec": "compact"}, MASS | {"codec": "compact"}])
def test_the_probability_that_is_kept_is_counted(store: Path, changes: dict[str, Any]) -> None:
    """[F100]"""
    folder, manifest = examples.commit(store, "topk_cache", params=examples.PARAMS["topk_cache"] | changes)
    reader = CacheReader.from_folders([folder])
    mass = 0.0
    for document in (reader[i] for i in range(len(reader))):
        mass += sum(math.exp(float(logprob)) for row in document["topk_logprobs"] for logprob in row)
    assert manifest.stats["n_kept_mass"] == pytest.approx(mass, rel=1e-6)
    assert manifest.stats["n_kept_mass"] == sum(part.stats["n_kept_mass"] for part in manifest.parts)


def test_coded_positions_have_the_bytes_of_a_cache_of_as_many_as_they_keep() -> None:
    """[F101] That the decoders in FORMAT.md read them is in the tests of ragged top-k."""
    docs = examples.documents((25,))
    stored = coded(examples.table("topk_cache", docs, draws=20, top_p=0.8), "compact").stored
    assert stored.schema.metadata[b"kd_assets.codec"] == b"compact_2"
    assert stored.schema.names[4] == "topk_kept"
    assert stored.schema.field("topk_kept").metadata == {b"k": b"4", b"top_p": b"0.8"}
    row = stored.to_pylist()[0]
    kept = list(row["topk_kept"])
    assert set(kept) == {1, 2, 3, 4}
    bands = {"0": (0, 1), "1": (1, 2), "2_3": (2, 4)}
    for n in range(1, examples.K + 1):
        whole = examples.table("topk_cache", docs, draws=20)
        ids, logprobs = (flat(whole[name]).reshape(-1, examples.K)[:, :n] for name in ("topk_ids", "topk_logprobs"))
        of_n = coded(
            encode_topk(
                docs,
                topk_ids_Mk=np.ascontiguousarray(ids),
                topk_logprobs_Mk=np.ascontiguousarray(logprobs),
                logsumexp_M=flat(whole["logsumexp"]),
                target_logprob_M=flat(whole["target_logprob"]),
                sampled_ids_Md=examples.sampled_ids(docs),
            ),
            "compact",
        ).stored.to_pylist()[0]
        for at in (at for at, m in enumerate(kept) if m == n):
            assert row["topk_tail"][at] == of_n["topk_tail"][at]
            for name in (f"topk_ids_byte_{b}" for b in range(3)):
                assert row[name][sum(kept[:at]) :][:n] == of_n[name][at * n :][:n]
            for stem in ("topk_codes", "sampled_slots"):
                for band, (first, stop) in bands.items():
                    before = sum(min(max(m - first, 0), stop - first) for m in kept[:at])
                    width = min(max(n - first, 0), stop - first)
                    if width:
                        short = band if width == stop - first else str(first)
                        expected = of_n[f"{stem}_{short}"][at * width :][:width]
                        assert row[f"{stem}_{band}"][before:][:width] == expected


def test_a_number_of_kept_tokens_that_cannot_be_is_refused_and_named(store: Path) -> None:
    """[F102] Each other case is among the tests of ragged top-k."""
    docs = examples.documents((3, 4))
    stored = coded(examples.table("topk_cache", docs, top_p=0.8), "compact").stored
    field = stored.schema.field("topk_kept")
    changed = stored.set_column(4, field, pa.array([b"\x01\x05", b"\x01\x01\x01"], pa.binary()))
    with pytest.raises(ValueError, match="row 1 of document 0 of the rows keeps 5 tokens, and it must be 1 to 4"):
        plain_table(changed)
    out = examples.output(store, "topk_cache", params=examples.PARAMS["topk_cache"] | MASS)
    rows = examples.table("topk_cache", docs, top_p=0.3)
    for name in ("topk_ids", "topk_logprobs"):
        at, of_list = rows.schema.get_field_index(name), rows.schema.field(name)
        said = of_list.with_metadata({**of_list.metadata, b"top_p": b"0.8"})
        rows = rows.set_column(at, said, rows[name])
    with examples.writer(store, out) as result:
        result.write_part(0, rows, n_tokens=docs.n_tokens, stats=part_stats("topk_cache", rows))
        result.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    assert [problem.kind for problem in verify(store).problems] == ["wrong_kept"]


def test_of_several_variants_a_reader_gets_the_recipes(store: Path) -> None:
    """[F106] What is not believed of it is among the tests of what is chosen."""
    _, one = examples.commit(store, "topk_cache")
    _, other = examples.commit(store, "topk_cache", params={"k": examples.K, "max_length": 99})
    for manifest in (one, other):
        (store / "tiny" / "current_variants.json").write_text(json.dumps({"topk_cache": manifest.variant}))
        assert CacheReader(store / "tiny", "topk_cache").manifests == (manifest,)
