"""Random access to documents, in whatever process or order, of one variant only."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_assets.contract import CACHES, Asset
from kd_assets.durable import file_sha256
from kd_assets.errors import (
    CorruptManifestError,
    CorruptPartError,
    NotCommittedError,
    UnknownFieldError,
    VariantConflictError,
)
from kd_assets.store import CacheReader, plan_output, read_shard
from kd_assets.store.layout import INDEX_NAME
from kd_assets.store.reading import parts
from kd_assets.store.reading import reader as reader_module
from kd_assets_tests.store import examples

KEYS = ("tiny-00000", "tiny-00001", "tiny-00010")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("original")
    for seed, key in enumerate(KEYS):
        docs = examples.documents(seed=seed)
        for asset in examples.TABLES:
            examples.commit(store, asset, docs=docs, partition_key=key)
    return store


@pytest.fixture
def filled(original: Path, store: Path) -> Path:
    """A recipe's folder with three partitions of everything, to do with as one likes."""
    return Path(shutil.copytree(original, store)) / examples.RECIPE


def checksum(reader: CacheReader) -> list[tuple[str, int]]:
    """Something small that depends on every number of every document."""
    return [
        (str(document["document_id"]), hash(b"".join(v.tobytes() for v in document.values() if hasattr(v, "tobytes"))))
        for document in (reader[i] for i in range(len(reader)))
    ]


def checksum_of_pickled(data: bytes) -> list[int]:
    reader = pickle.loads(data)
    return [int(reader[i]["input_ids"].sum()) for i in range(len(reader))]


@pytest.mark.parametrize("asset", examples.TABLES)
def test_documents_come_as_they_were_encoded(filled: Path, asset: Asset) -> None:
    reader = CacheReader(filled, asset)
    assert len(reader) == 12
    i = 0
    for seed, key in enumerate(KEYS):
        docs = examples.documents(seed=seed)
        kept = docs.slice(0, 4, None if asset == "shards_manifest" else examples.MAX_LENGTH)
        for part in (kept.slice(0, 2), kept.slice(2, 2)):
            for expected in examples.table(asset, part).to_pylist():
                document = reader[i]
                assert document.pop("partition_key") == key
                assert {k: np.asarray(v).tolist() for k, v in document.items()} == {
                    k: np.asarray(v).tolist() for k, v in expected.items()
                }
                i += 1


def test_shapes_and_dtypes_are_those_of_the_format(filled: Path) -> None:
    documents = {asset: CacheReader(filled, asset)[3] for asset in CACHES}
    shapes = {
        name: (value.dtype.name, value.shape)
        for document in documents.values()
        for name, value in document.items()
        if isinstance(value, np.ndarray)
    }
    assert shapes == {
        "input_ids": ("uint32", (6,)),
        "loss_mask": ("bool", (6,)),
        "topk_ids": ("uint32", (5, 4)),
        "topk_logprobs": ("float16", (5, 4)),
        "logsumexp": ("float32", (5,)),
        "target_logprob": ("float32", (5,)),
        "hidden_block_0": ("uint16", (6, 3)),
        "hidden_block_2": ("uint16", (6, 3)),
        "mean_embedding": ("float32", (3,)),
        "last_token_embedding": ("float32", (3,)),
    }
    assert documents["topk_cache"]["n_tokens"] == 6


def test_random_draws_come_as_lists_of_a_document(store: Path) -> None:
    examples.commit(store, "topk_cache", params=examples.WITH_DRAWS)
    reader = CacheReader(store / examples.RECIPE, "topk_cache")
    expected = examples.table("topk_cache", examples.documents().slice(2, 2, 6), draws=examples.DRAWS).to_pylist()
    for i, row in zip((2, 3), expected, strict=True):
        for name, dtype in (("sampled_ids", "uint32"), ("sampled_counts", "uint16")):
            lists = reader[i][name]
            assert [values.tolist() for values in lists] == row[name]
            assert (lists.values.dtype.name, lists.values.flags.writeable) == (dtype, False)
            assert lists.lengths.tolist() == [len(values) for values in row[name]]
            assert [values.tolist() for values in lists[1:2]] == row[name][1:2]
            assert lists[-1].tolist() == row[name][-1]
            assert len(lists[1:1]) == len(lists[2:1]) == 0
    with pytest.raises(IndexError):
        reader[3]["sampled_ids"][5]


def test_document_of_one_token_has_empty_rows_of_the_right_shape(filled: Path) -> None:
    assert CacheReader(filled, "topk_cache")[1]["topk_ids"].shape == (0, 4)


def test_fields_restrict_what_is_read(filled: Path) -> None:
    reader = CacheReader(filled, "topk_cache", fields=["logsumexp"])
    assert set(reader[0]) == {"partition_key", "document_id", "logsumexp"}
    assert reader.fields == ("logsumexp",)


def test_unknown_field_is_refused_with_those_there_are(filled: Path) -> None:
    with pytest.raises(UnknownFieldError, match=r"no field 'hidden_block_1'; it has .*hidden_block_0, hidden_block_2"):
        CacheReader(filled, "hidden_state_cache", fields=["hidden_block_1"])


def test_index_counts_from_the_end_and_stops_there(filled: Path) -> None:
    reader = CacheReader(filled, "topk_cache")
    assert reader[-1]["partition_key"] == "tiny-00010"
    assert reader[-12]["document_id"] == reader[0]["document_id"] == reader[np.int64(0)]["document_id"]  # type: ignore[index]
    for i in (12, -13):
        with pytest.raises(IndexError, match="of 12"):
            reader[i]


def test_keys_ids_and_lengths_agree_across_caches(filled: Path) -> None:
    readers = [CacheReader(filled, asset) for asset in CACHES]
    assert readers[0].keys() == readers[1].keys() == readers[2].keys()
    assert readers[0].keys()[5] == ("tiny-00001", "document-1")
    assert readers[0].document_ids[:4] == [f"document-{i}" for i in range(4)]
    for reader in readers:
        assert reader.n_tokens_D.tolist() == [5, 1, 3, 6] * 3


def test_partitions_are_sorted_or_as_they_were_asked_for(filled: Path) -> None:
    assert CacheReader(filled, "topk_cache").partition_keys == KEYS
    chosen = CacheReader(filled, "topk_cache", partition_keys=["tiny-00010", "tiny-00000"])
    assert chosen.partition_keys == ("tiny-00010", "tiny-00000")
    assert chosen[0]["partition_key"] == "tiny-00010"


def test_missing_partition_is_named(filled: Path) -> None:
    with pytest.raises(NotCommittedError, match=r"no committed result for partition 'tiny-00007' \(1 missing of 2\)"):
        CacheReader(filled, "topk_cache", partition_keys=["tiny-00000", "tiny-00007"])
    with pytest.raises(NotCommittedError, match=r"no committed results in .*/other_cache"):
        CacheReader(filled, "other_cache")
    with pytest.raises(VariantConflictError, match="'tiny-00000' is given twice"):
        CacheReader(filled, "topk_cache", partition_keys=["tiny-00000", "tiny-00000"])
    with pytest.raises(NotCommittedError, match="of variant 000000000000"):
        CacheReader(filled, "topk_cache", variant="0" * 12)


def test_variants_are_never_mixed(filled: Path) -> None:
    folder, other = examples.commit(
        filled.parent, "topk_cache", params={"k": examples.K, "max_length": 7}, partition_key="tiny-00002"
    )
    with pytest.raises(VariantConflictError, match=rf"{other.variant}: 1 partitions"):
        CacheReader(filled, "topk_cache")
    chosen = CacheReader(filled, "topk_cache", variant=other.variant)
    assert chosen.partition_keys == ("tiny-00002",)
    first = Path(examples.output(filled.parent, "topk_cache").path)
    with pytest.raises(VariantConflictError, match="one reader reads one variant"):
        CacheReader.from_folders([first, folder])
    with pytest.raises(VariantConflictError, match="one variant of one asset"):
        CacheReader.from_folders([first, Path(examples.output(filled.parent, "embedding_cache").path)])
    with pytest.raises(VariantConflictError, match="given twice"):
        CacheReader.from_folders([first, first])
    with pytest.raises(NotCommittedError, match="no result folders"):
        CacheReader.from_folders([])


def test_reader_keeps_to_the_results_it_was_made_with(filled: Path) -> None:
    reader = CacheReader(filled, "topk_cache")
    before = checksum(reader)
    identity = examples.output(filled.parent, "topk_cache").identity | {"input": "changed shard"}
    out = plan_output("topk_cache", identity, recipe_folder=filled, partition_key=KEYS[0])
    docs = examples.documents((2,), seed=9)
    rows = examples.table("topk_cache", docs)
    with examples.writer(filled.parent, out) as result:
        result.write_part(0, rows, n_tokens=2, stats={})
        result.commit(parts=1, checks={}, provenance={})
    assert checksum(reader) == before
    assert len(CacheReader(filled, "topk_cache")) == 9


@pytest.mark.parametrize("asset", CACHES)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reader_works_in_forked_and_spawned_processes(filled: Path, asset: Asset, method: str) -> None:
    reader = CacheReader(filled, asset)
    expected = [int(reader[i]["input_ids"].sum()) for i in range(12)]  # files are open here, too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process with threads
        with multiprocessing.get_context(method).Pool(2) as pool:
            results = pool.map(checksum_of_pickled, [pickle.dumps(reader)] * 3)
    assert results == [expected] * 3


def test_forked_child_uses_the_inherited_reader_though_a_thread_holds_its_lock(filled: Path) -> None:
    reader = CacheReader(filled, "topk_cache")
    expected = checksum(reader)
    context: Any = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child() -> None:
        queue.put([int(reader[i]["input_ids"].sum()) for i in range(12)])

    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        with reader._lock:
            locked.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = context.Process(target=child)
        process.start()
        sums = queue.get()
    process.join()
    done.set()
    holder.join()
    assert len(sums) == 12
    assert checksum(reader) == expected


def test_pickled_reader_is_small_and_carries_no_open_files(filled: Path) -> None:
    reader = CacheReader(filled, "hidden_state_cache")
    fresh = len(pickle.dumps(reader))
    checksum(reader)
    assert len(pickle.dumps(reader)) == fresh
    assert checksum(pickle.loads(pickle.dumps(reader))) == checksum(reader)


def test_threads_share_a_reader(filled: Path) -> None:
    reader = CacheReader(filled, "topk_cache", cache_bytes=1)
    expected = checksum(reader)
    results: list[list[tuple[str, int]]] = []
    threads = [threading.Thread(target=lambda: results.append(checksum(reader))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_decoded_groups_are_kept_within_the_limit(filled: Path) -> None:
    reader = CacheReader(filled, "topk_cache", cache_bytes=500)
    for i in (0, 11, 3, 7, 0):
        reader[i]
        assert reader._groups_bytes <= 500 or len(reader._groups) == 1
    generous = CacheReader(filled, "topk_cache")
    assert checksum(generous) == checksum(reader)
    assert len(generous._groups) == 6
    assert generous._groups_bytes > 500


def test_arrays_are_read_only(filled: Path) -> None:
    document = CacheReader(filled, "hidden_state_cache")[0]
    with pytest.raises(ValueError, match="read-only"):
        document["hidden_block_0"][0, 0] = 1


@pytest.mark.parametrize("asset", CACHES)
def test_truncated_part_is_found_before_it_is_mapped(filled: Path, asset: Asset) -> None:
    reader = CacheReader(filled, asset)
    part = sorted(reader.folders[1].glob("part-*"))[1]
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(CorruptPartError, match=rf"{part.name}: expected \d+ bytes, it has \d+; remove this file"):
        reader[7]
    part.unlink()
    with pytest.raises(CorruptPartError, match="it is missing"):
        reader[7]
    assert reader[5]["document_id"] == "document-1"


@pytest.mark.parametrize("asset", [*CACHES, "shards_manifest"])
def test_one_flipped_bit_is_named_before_any_document_of_its_part_is_given(filled: Path, asset: Asset) -> None:
    part = sorted(CacheReader(filled, asset).folders[1].glob("part-*"))[1]
    whole = part.read_bytes()
    for at in range(0, len(whole), 61):
        part.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CorruptPartError, match=rf"{part.name} .*(changed after its commit|damaged|no sound table)"):
            documents_of(CacheReader(filled, asset))
        with pytest.raises(CorruptPartError, match=part.name):
            CacheReader(filled, asset, partition_keys=[KEYS[1]], fields=["n_tokens"])[3]
    part.write_bytes(whole)
    assert len(documents_of(CacheReader(filled, asset))) == 12


def documents_of(reader: CacheReader) -> list[dict[str, Any]]:
    return [reader[i] for i in range(len(reader))]


def noting_hashes(monkeypatch: pytest.MonkeyPatch, hashed: Any) -> None:
    def noted(path: Path) -> str:
        hashed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(parts, "file_sha256", noted)


@pytest.mark.parametrize("asset", ["topk_cache", "hidden_state_cache"])
def test_a_part_is_hashed_once_when_it_is_first_read_and_not_for_its_ids(
    filled: Path, asset: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    noting_hashes(monkeypatch, hashed)
    monkeypatch.setattr(reader_module, "_OPEN_FILES", 1)
    reader = CacheReader(filled, asset, cache_bytes=1)
    assert len(reader.keys()) == len(reader.n_tokens_D) == 12
    assert hashed == []
    reader[0]
    assert len(hashed) == 1
    threads = [threading.Thread(target=documents_of, args=(reader,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hashed) == 6, "though its files are closed and opened again all the time"


def test_what_a_forked_loader_has_verified_its_parent_and_siblings_need_not(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context: Any = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    monkeypatch.setattr(parts, "file_sha256", lambda path: (queue.put(path.name), file_sha256(path))[1])
    reader = CacheReader(filled, "topk_cache")
    for _ in range(2):  # epochs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            process = context.Process(target=documents_of, args=(reader,))
            process.start()
        process.join()
    documents_of(reader)
    queue.put("end")
    assert len(list(iter(queue.get, "end"))) == 6


def test_a_part_that_is_touched_after_it_was_verified_is_verified_again(filled: Path) -> None:
    reader = CacheReader(filled, "topk_cache")
    documents_of(reader)
    part = sorted(reader.folders[0].glob("part-*"))[0]
    times = part.stat()
    examples.flip_byte(part)
    os.utime(part, ns=(times.st_atime_ns, times.st_mtime_ns))
    reader._start_in_process()  # as in a loader that is forked off now
    with pytest.raises(CorruptPartError, match="changed after its commit"):
        reader[0]


def test_results_in_each_others_place_are_named(filled: Path) -> None:
    (variant,), (other,) = (list((filled / asset).iterdir()) for asset in ("topk_cache", "embedding_cache"))
    first, second = filled / "topk_cache" / other.name, filled / "embedding_cache" / variant.name
    variant.rename(second)
    other.rename(first)
    for asset in ("topk_cache", "embedding_cache"):
        with pytest.raises(CorruptManifestError, match=r"holds the result .* which is not its place: move it there"):
            CacheReader(filled, asset)


def test_a_head_that_points_to_another_result_is_named(filled: Path) -> None:
    head = next(filled.glob(f"topk_cache/*/{KEYS[0]}/head.json"))
    fingerprint = json.loads(head.read_bytes())["fingerprint"]
    for wrong in (fingerprint[:16] + "0" * 48, "0" * 64):
        head.write_text(json.dumps({"fingerprint": wrong}))
        with pytest.raises((CorruptManifestError, NotCommittedError), match=r"points to|has no manifest\.json"):
            CacheReader(filled, "topk_cache")


def test_shard_is_read_whole_and_verified(filled: Path) -> None:
    folder = Path(examples.output(filled.parent, "shards_manifest").path)
    shard, docs = read_shard(folder), examples.documents()
    assert shard.document_ids == list(docs.document_ids)
    assert shard.offsets_D1.tolist() == docs.offsets.tolist()
    assert shard.n_tokens_D.tolist() == list(examples.LENGTHS)
    assert shard.input_ids_N.tolist() == docs.input_ids.tolist()
    assert shard.loss_mask_N.tolist() == docs.loss_mask.tolist()
    assert shard.slice(2, 2, 4).offsets.tolist() == [0, 3, 7]
    part = folder / "part-00000.parquet"
    examples.flip_byte(part, 20)
    with pytest.raises(CorruptPartError, match=r"part-00000\.parquet"):
        read_shard(folder)


def test_a_column_whose_name_was_damaged_is_named_as_damage(store: Path) -> None:
    """The name stands in an Arrow file's footer as it is; a byte of it flips to what no UTF-8 has."""
    folder = examples.commit_all(store)["hidden_state_cache"]
    part = sorted(folder.glob("part-*.arrow"))[0]
    data = part.read_bytes()
    at = data.rfind(b"document_id")
    part.write_bytes(data[:at] + b"\xee" + data[at + 1 :])
    (folder / INDEX_NAME).unlink()  # without it the part is asked for its columns
    with pytest.raises(CorruptPartError, match="is damaged"):
        CacheReader.from_folders([folder])
