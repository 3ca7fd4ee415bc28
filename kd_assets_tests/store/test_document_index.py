"""The index beside the parts: what it spares readers, and that no damage to it becomes a wrong document."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kd_assets.contract import Asset
from kd_assets.errors import CorruptIndexError, StorageUnavailableError
from kd_assets.locks import Lease
from kd_assets.store import CacheReader, Manifest, part_stats, read_manifest, set_head, verify
from kd_assets.store.document_index import DocumentRows, index_bytes, read_index
from kd_assets.store.fingerprint import fingerprint
from kd_assets.store.layout import INDEX_NAME, LEASE_NAME
from kd_assets.store.partfile import PartFile
from kd_assets.store.writing import lost_index
from kd_assets_tests.store import examples

LENGTHS = [min(n, examples.MAX_LENGTH) for n in examples.LENGTHS]
IDS = [f"document-{i}" for i in range(len(LENGTHS))]


def reread(folder: Path) -> CacheReader:
    return CacheReader.from_folders([folder])


def read_whole(folder: Path, manifest: Manifest) -> tuple[DocumentRows, pa.Schema]:
    index = read_index(folder, manifest)
    assert index is not None
    return index.rows(), index.schema()


def no_part_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a part was opened")

    monkeypatch.setattr(PartFile, "__init__", refuse)


@pytest.mark.parametrize("asset", examples.TABLES)
def test_a_cache_opens_and_tells_its_ids_and_lengths_without_a_part(
    tmp_path: Path, asset: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = examples.commit(tmp_path, asset)
    with PartFile(sorted(folder.glob("part-*"))[0]) as part:
        schema = part.schema
    no_part_is_opened(monkeypatch)
    reader = reread(folder)
    assert len(reader) == len(LENGTHS)
    assert reader.document_ids == IDS
    assert reader.n_tokens_D.tolist() == (list(examples.LENGTHS) if asset == "shards_manifest" else LENGTHS)
    assert reader.schema.equals(schema, check_metadata=True)


def test_a_result_without_an_index_is_whole_and_reads_the_same(tmp_path: Path) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache")
    (folder / INDEX_NAME).unlink()
    reader = reread(folder)
    assert (reader.document_ids, reader.n_tokens_D.tolist()) == (IDS, LENGTHS)
    assert verify(folder).ok
    assert [note.kind for note in verify(folder).notes] == []


def test_the_index_is_in_no_hash_and_no_count_of_the_result(tmp_path: Path) -> None:
    folder, manifest = examples.commit(tmp_path, "topk_cache")
    assert INDEX_NAME not in (folder / "manifest.json").read_text()
    assert manifest.n_bytes == sum(path.stat().st_size for path in folder.glob("part-*"))


def test_equal_results_have_equal_indexes(tmp_path: Path) -> None:
    (first, _), (second, _) = (examples.commit(tmp_path / name, "embedding_cache") for name in "ab")
    assert (first / INDEX_NAME).read_bytes() == (second / INDEX_NAME).read_bytes()


def test_an_attempt_that_goes_on_from_another_writes_the_index_of_all_parts(tmp_path: Path) -> None:
    whole, _ = examples.commit(tmp_path / "whole", "topk_cache")
    out = examples.output(tmp_path / "cut", "topk_cache")
    docs = examples.documents().slice(0, len(LENGTHS), examples.MAX_LENGTH)
    for first, commits in ((0, False), (2, True)):
        with examples.writer(tmp_path / "cut", out) as writer:
            part = docs.slice(first, 2)
            rows = examples.table("topk_cache", part)
            stats = part_stats("topk_cache", rows)
            writer.write_part(first // 2, rows, n_tokens=part.n_tokens, stats=stats)
            if commits:
                writer.commit(parts=2, checks={}, provenance={})
    assert (Path(out.path) / INDEX_NAME).read_bytes() == (whole / INDEX_NAME).read_bytes()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def newer(path: Path) -> None:
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(json.dumps(json.loads(first) | {"index_version": 2}).encode() + b"\n" + rest)


def true_as_version(path: Path) -> None:
    """Its hash is made anew; to Python, `true` is 1."""
    first, rest = path.read_bytes().split(b"\n", 1)
    header = {name: value for name, value in json.loads(first).items() if name != "index_sha256"}
    header |= {"index_version": True}
    path.write_bytes(json.dumps(header | {"index_sha256": fingerprint(header)}).encode() + b"\n" + rest)


def other_commit(path: Path) -> None:
    docs = examples.documents((2, 2, 2, 2), seed=5)
    other, _ = examples.commit(path.parents[5] / "other", "topk_cache", docs=docs)
    shutil.copy(other / INDEX_NAME, path)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop_instead(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


HARMS: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "a folder": folder_instead,
    "a link to itself": loop_instead,
    "emptied": lambda path: path.write_bytes(b""),
    "no JSON": lambda path: path.write_bytes(b"index\n"),
    "a list": lambda path: path.write_bytes(b"[]\n"),
    "of a newer version": newer,
    "of a version that is no number": true_as_version,
    "of another commit": other_commit,
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_index_is_named_and_the_parts_are_read_instead(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, manifest = examples.commit(tmp_path / "store", "topk_cache")
    HARMS[harm](folder / INDEX_NAME)
    with pytest.raises(CorruptIndexError, match=r"documents\.index is not the index of this result.*remove this file"):
        read_index(folder, manifest)
    with caplog.at_level(logging.WARNING):
        reader = reread(folder)
        assert (reader.document_ids, reader.n_tokens_D.tolist()) == (IDS, LENGTHS)
    assert len([r for r in caplog.records if "The parts are read instead" in r.getMessage()]) == 1
    (problem,) = verify(folder).problems
    assert (problem.kind, problem.path) == ("corrupt_index", folder / INDEX_NAME)


def reuse_by_head(folder: Path, store: Path) -> None:
    assert set_head(folder)


def reuse_by_writer(folder: Path, store: Path) -> None:
    with examples.writer(store, examples.output(store, "topk_cache")) as writer:
        writer.commit(parts=len(writer.finished), checks={}, provenance={})


LOSSES = {
    "absent": Path.unlink,
    "an id that flipped": lambda path: examples.flip_byte(path, path.stat().st_size - 3),
    **{name: harm for name, harm in HARMS.items() if name != "a folder"},
}


@pytest.mark.parametrize("reuse", [reuse_by_head, reuse_by_writer])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_index_is_written_anew_when_its_result_is_reused(
    tmp_path: Path, loss: str, reuse: Callable[[Path, Path], None]
) -> None:
    store = tmp_path / "store"
    folder, manifest = examples.commit(store, "topk_cache")
    sound = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LEASE_NAME}
    LOSSES[loss](folder / INDEX_NAME)
    reuse(folder, store)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LEASE_NAME} == sound
    assert verify(folder).ok
    assert read_manifest(folder) == manifest


@pytest.mark.parametrize("asset", examples.TABLES)
def test_every_kind_of_table_gets_its_index_back(tmp_path: Path, asset: Asset) -> None:
    folder, _ = examples.commit(tmp_path, asset)
    sound = (folder / INDEX_NAME).read_bytes()
    (folder / INDEX_NAME).unlink()
    assert set_head(folder)
    assert (folder / INDEX_NAME).read_bytes() == sound


def test_a_sound_index_costs_a_reuse_no_part_and_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    no_part_is_opened(monkeypatch)
    assert set_head(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_result_without_documents_is_reused_without_an_index(tmp_path: Path) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache", docs=examples.documents(()))
    assert set_head(folder)
    assert not (folder / INDEX_NAME).exists()


def test_no_index_is_made_of_a_part_that_was_changed_and_the_reuse_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache")
    (folder / INDEX_NAME).unlink()
    examples.flip_byte(sorted(folder.glob("part-*"))[0])
    assert set_head(folder)
    assert not (folder / INDEX_NAME).exists()
    assert "was not written anew" in caplog.text
    assert "was changed after its commit" in caplog.text


def test_an_index_that_cannot_be_written_fails_no_reuse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache")
    folder_instead(folder / INDEX_NAME)
    assert set_head(folder)
    assert "was not written anew" in caplog.text
    (folder / INDEX_NAME).rmdir()

    def refuse(*_: object) -> None:
        raise StorageUnavailableError("read-only file system")

    monkeypatch.setattr(Lease, "acquire", refuse)
    assert set_head(folder)


def test_an_index_is_left_to_who_has_the_lease(tmp_path: Path) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache")
    (folder / INDEX_NAME).unlink()
    with examples.writer(tmp_path, examples.output(tmp_path, "topk_cache")):
        assert set_head(folder)
        assert not (folder / INDEX_NAME).exists()
    assert set_head(folder)
    assert (folder / INDEX_NAME).exists()


def test_every_flipped_byte_of_an_index_is_found_and_changes_nothing_that_is_read(tmp_path: Path) -> None:
    folder, manifest = examples.commit(tmp_path, "topk_cache")
    path = folder / INDEX_NAME
    sound = path.read_bytes()
    for offset in range(0, len(sound), 3):
        examples.flip_byte(path, offset)
        reader = reread(folder)
        assert (reader.document_ids, reader.n_tokens_D.tolist()) == (IDS, LENGTHS), offset
        assert "topk_ids" in reader.fields
        with pytest.raises(CorruptIndexError):
            read_whole(folder, manifest)
        path.write_bytes(sound)
    assert verify(folder).ok


def test_verify_finds_an_index_that_was_written_wrong(tmp_path: Path) -> None:
    folder, manifest = examples.commit(tmp_path, "topk_cache")
    rows, schema = read_whole(folder, manifest)
    backwards = rows.document_ids.take(np.arange(len(LENGTHS))[::-1])
    wrong = {
        "lengths": (DocumentRows(document_ids=rows.document_ids, n_tokens_D=rows.n_tokens_D[::-1]), schema),
        "document ids": (DocumentRows(document_ids=backwards, n_tokens_D=rows.n_tokens_D), schema),
        "columns": (rows, schema.remove(len(schema) - 1)),
    }
    for what, (said, columns) in wrong.items():
        data = index_bytes(asset=manifest.asset, data_version=manifest.data_version, schema=columns, rows=said)
        (folder / INDEX_NAME).write_bytes(data)
        (problem,) = verify(folder).problems
        assert problem.kind == "corrupt_index"
        assert f"has other {what} than the parts" in problem.message


def test_a_damaged_part_is_said_to_be_damaged_and_the_index_is_not(tmp_path: Path) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache")
    examples.flip_byte(sorted(folder.glob("part-*"))[0])
    assert [problem.kind for problem in verify(folder).problems] == ["changed_part"]
    assert read_manifest(folder).n_documents == len(LENGTHS)


def test_a_large_result_is_not_read_for_its_lost_index_when_it_is_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = examples.commit(tmp_path, "topk_cache")
    (folder / INDEX_NAME).unlink()
    monkeypatch.setattr(lost_index, "MOST_BYTES", manifest.n_bytes - 1)
    assert set_head(folder)
    assert not (folder / INDEX_NAME).exists()
    monkeypatch.setattr(lost_index, "MOST_BYTES", manifest.n_bytes)
    assert set_head(folder)
    assert (folder / INDEX_NAME).exists()
