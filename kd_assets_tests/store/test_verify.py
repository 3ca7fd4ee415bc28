"""Every way to harm a result on disk is found, as what it is, with the file named."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kd_assets.contract import Asset
from kd_assets.durable import atomic_file, file_sha256
from kd_assets.errors import MissingInputError, NotCommittedError
from kd_assets.store import (
    CacheReader,
    Manifest,
    ResultFiles,
    commit_file_result,
    committed,
    plan_output,
    read_manifest,
    verify,
)
from kd_assets.store.fingerprint import data_version
from kd_assets.store.layout import INDEX_NAME, recipe_folder_of
from kd_assets.store.manifest import audit_record, is_audited, without_non_finite, write_head
from kd_assets.store.partfile import part_suffix, write_table
from kd_assets_tests.store import examples
from kd_assets_tests.store.planned import commit, commit_partition, write_plan


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("original")
    for key in ("tiny-00000", "tiny-00001"):
        examples.commit_all(store, partition_key=key)
    return store


@pytest.fixture
def filled(original: Path, store: Path) -> Path:
    return Path(shutil.copytree(original, store))


def folder_of(store: Path, asset: Asset = "topk_cache") -> Path:
    return Path(examples.output(store, asset).path)


def test_sound_store_is_counted_and_has_no_problems(filled: Path) -> None:
    report = verify(filled)
    assert (report.ok, report.problems, report.notes) == (True, (), ())
    assert (report.n_results, report.n_parts, report.n_documents) == (8, 16, 32)
    assert report.n_tokens == 2 * (16 + 3 * 15)
    assert report.n_bytes == sum(path.stat().st_size for path in filled.rglob("part-*"))


@pytest.mark.parametrize(("depth", "n_results"), [(0, 1), (1, 1), (2, 2), (3, 2), (4, 8), (5, 8)])
def test_any_folder_from_a_result_up_to_the_root_can_be_verified(filled: Path, depth: int, n_results: int) -> None:
    folder = folder_of(filled)
    path = folder if depth == 0 else folder.parents[depth - 1]
    assert verify(path).n_results == n_results


@pytest.mark.parametrize("asset", examples.TABLES)
@pytest.mark.parametrize("position", [0, 1, 2, 3, 4, 5, 6, 7])
def test_flipped_byte_anywhere_in_a_part_is_found(filled: Path, asset: Asset, position: int) -> None:
    path = sorted(folder_of(filled, asset).glob("part-*"))[1]
    examples.flip_byte(path, (path.stat().st_size - 1) * position // 7)
    assert found(filled) == [("changed_part", path)]


def test_flipped_bytes_of_a_manifest_are_found_wherever_they_are(filled: Path) -> None:
    path = folder_of(filled) / "manifest.json"
    good = path.read_bytes()
    for offset in range(0, len(good) - 1, 7):
        data = bytearray(good)
        data[offset] ^= 1  # one bit: often still JSON
        path.write_bytes(bytes(data))
        if json_or_none(bytes(data)) != json.loads(good):
            assert found(path.parent) == [("corrupt_manifest", path)], offset


def test_missing_truncated_and_grown_parts_are_told_apart(filled: Path) -> None:
    first, second = sorted(folder_of(filled).glob("part-*"))
    third = sorted(folder_of(filled, "hidden_state_cache").glob("part-*"))[0]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    third.write_bytes(third.read_bytes() + b"\0")
    assert found(filled) == [("grown_part", third), ("missing_part", first), ("truncated_part", second)]


def test_remedy_of_a_damaged_part_works(filled: Path) -> None:
    folder = folder_of(filled)
    first, second = sorted(folder.glob("part-*"))
    manifest = read_manifest(folder)
    kept = second.stat().st_mtime_ns
    examples.flip_byte(first)
    (problem,) = verify(folder).problems
    assert "remove this file and materialize the partition again" in problem.message
    assert committed(folder, manifest.fingerprint) is not None  # only reading every byte finds it
    first.unlink()
    assert committed(folder, manifest.fingerprint) is None
    examples.commit(filled, "topk_cache")
    assert verify(filled).problems == ()
    assert second.stat().st_mtime_ns == kept
    assert read_manifest(folder).data_version == manifest.data_version


def test_contents_that_are_not_what_the_manifest_says_are_told_apart(filled: Path) -> None:
    """Hashes are right here: the task that wrote the manifest was wrong."""
    rows = examples.table("topk_cache", examples.documents((5, 1)))
    folder = folder_of(filled)

    rewrite(folder, lambda part: {"n_documents": part["n_documents"] + 1})
    assert kinds(folder) == ["wrong_documents"] * 2
    rewrite(folder, lambda part: {"n_documents": part["n_documents"] - 1, "n_tokens": part["n_tokens"] + 3})
    assert kinds(folder) == ["wrong_tokens"] * 2

    replace_part(folder, rows.rename_columns([*rows.schema.names[:-1], "target_logprobs"]))
    assert "column target_logprob is missing" in verify(folder).problems[0].message
    assert kinds(folder)[0] == "wrong_schema"

    lengths = pa.array([4, 2], pa.int32())
    replace_part(folder, rows.set_column(1, rows.schema.field("n_tokens"), lengths))
    assert kinds(folder)[0] == "wrong_tokens"
    assert "n_tokens differs from the length of input_ids" in verify(folder).problems[0].message

    with atomic_file(folder / "part-00000.parquet") as file:
        file.write(b"no parquet file at all")
    adopt_files(folder)
    assert kinds(folder)[0] == "unreadable_part"


@pytest.mark.parametrize(
    ("ids", "counts", "message"),
    [
        ([[2, 1], [3]], [[1, 1], [2]], "not in ascending order"),
        ([[1, 1], [3]], [[1, 1], [2]], "not in ascending order"),
        ([[1, 2], [3]], [[1, 2], [2]], "add up to something else than 2"),
        ([[1, 2], [3]], [[0, 2], [2]], "are below 1"),
        ([[], [3]], [[], [2]], "add up to something else than 2"),
        ([[1, 2], [3]], [[2], [2]], "have lists of different lengths"),
        ([[1, 2]], [[1, 1]], "has not one list"),
        ([[1, 11], [3]], [[1, 1], [2]], "a sampled id is 11, the teacher knows ids 0 to 10"),
    ],
)
def test_draws_that_cannot_be_are_found(
    store: Path, ids: list[list[int]], counts: list[list[int]], message: str
) -> None:
    params = {"k": examples.K, "max_length": examples.MAX_LENGTH, "draws": 2, "seed": 0}
    folder, manifest = examples.commit(store, "topk_cache", docs=examples.documents((3,)), params=params)
    write_manifest(folder, dataclasses.replace(manifest, facts={"vocab_size": examples.VOCABULARY}))
    assert kinds(folder) == []
    rows = examples.table("topk_cache", examples.documents((3,)), draws=2)
    for name, lists in (("sampled_ids", ids), ("sampled_counts", counts)):
        field = rows.schema.field(name)
        rows = rows.set_column(rows.schema.get_field_index(name), field, pa.array([lists], type=field.type))
    replace_part(folder, rows)
    assert kinds(folder) == ["wrong_draws"]
    assert message in verify(folder).problems[0].message


def test_first_id_of_a_position_may_be_below_the_last_of_the_one_before(store: Path) -> None:
    params = {"k": examples.K, "max_length": examples.MAX_LENGTH, "draws": 1, "seed": 0}
    folder, _ = examples.commit(store, "topk_cache", docs=examples.documents((6, 6, 1)), params=params)
    drawn = [ids.item() for ids in CacheReader.from_folders([folder])[0]["sampled_ids"]]
    assert drawn != sorted(drawn)
    assert kinds(folder) == []


def test_hidden_states_that_are_no_arrow_file_are_unreadable(filled: Path) -> None:
    folder = folder_of(filled, "hidden_state_cache")
    with atomic_file(folder / "part-00000.arrow") as file:
        file.write(b"no arrow file")
    adopt_files(folder)
    assert kinds(folder) == ["unreadable_part"]


def test_identity_without_its_parameters_is_found_and_hashes_are_checked_all_the_same(store: Path) -> None:
    folder, _ = examples.commit(store, "topk_cache", params={})
    part = sorted(folder.glob("part-*"))[0]
    examples.flip_byte(part)
    assert found(store) == [("changed_part", part), ("wrong_identity", folder / "manifest.json")]


def test_result_under_the_name_of_another_is_found(filled: Path) -> None:
    folder = folder_of(filled)
    elsewhere = folder.parent.parent / "tiny-00007" / folder.name
    shutil.copytree(folder, elsewhere)
    assert found(filled) == [("misplaced_result", elsewhere)]
    renamed = folder.with_name("0123456789abcdef")
    folder.rename(renamed)
    assert [kind for kind, _ in found(renamed)] == ["misplaced_result"]


def test_copy_of_one_result_outside_a_store_can_be_verified(filled: Path, tmp_path: Path) -> None:
    folder = folder_of(filled)
    copy = Path(shutil.copytree(folder, tmp_path / "copies" / folder.name))
    report = verify(copy)
    assert (report.n_results, report.problems) == (1, ())


@pytest.mark.parametrize("data", [b"", b"[]", b'{"fingerprint": 3}', b'{"fingerprint": "abc"}'])
def test_head_that_is_none_is_found(filled: Path, data: bytes) -> None:
    head = folder_of(filled).parent / "head.json"
    head.write_bytes(data)
    assert found(filled) == [("corrupt_head", head)]


def test_head_that_points_nowhere_is_found(filled: Path) -> None:
    folder = folder_of(filled)
    head = folder.parent / "head.json"
    shutil.rmtree(folder)
    assert found(filled) == [("dangling_head", head), ("missing_result", folder)]
    assert all(str(folder) in problem.message for problem in verify(filled).problems)


def test_head_that_is_a_link_to_nowhere_is_none(filled: Path) -> None:
    head = folder_of(filled).parent / "head.json"
    head.unlink()
    head.symlink_to("nowhere")
    assert found(filled) == [("no_head", head.parent)]


@pytest.mark.parametrize(
    "name", ["../part", "/etc/passwd", "part\0", "part\x1b[2J", "", ".", "..", "manifest.json", ".lease"]
)
def test_manifest_whose_part_would_lie_elsewhere_is_corrupt(filled: Path, name: str) -> None:
    folder = folder_of(filled)
    rewrite(folder, lambda part: {"name": name} if part["index"] == 1 else {})
    assert [problem.kind for problem in verify(folder).problems] == ["corrupt_manifest"]
    assert "a part is named" in verify(folder).problems[0].message


def test_manifest_with_two_parts_of_one_name_is_corrupt(filled: Path) -> None:
    folder = folder_of(filled)
    rewrite(folder, lambda part: {"name": "part-00000.parquet"})
    assert "two parts have one name" in verify(folder).problems[0].message


def test_head_whose_fingerprint_only_begins_right_is_found(filled: Path) -> None:
    folder = folder_of(filled)
    head = folder.parent / "head.json"
    head.write_text(json.dumps({"fingerprint": folder.name + "0" * 48}))
    assert found(filled) == [("dangling_head", head)]


def test_unfinished_results_and_foreign_files_are_notes(filled: Path) -> None:
    folder = folder_of(filled)
    (folder / "notes.txt").write_text("mine")
    out = examples.output(filled, "topk_cache", partition_key="tiny-00002")
    with examples.writer(filled, out, partition_key="tiny-00002"):
        pass
    report = verify(filled)
    assert report.ok
    assert [(note.kind, note.path) for note in report.notes] == [
        ("foreign_file", folder / "notes.txt"),
        ("unfinished", Path(out.path)),
    ]
    assert all(str(note.path) in note.message for note in report.notes)
    assert report.n_results == 8


def test_result_without_a_line_in_the_audit_log_is_a_note(filled: Path) -> None:
    (filled / "tiny" / "audit.jsonl").unlink()
    report = verify(folder_of(filled))
    assert (report.ok, [note.kind for note in report.notes]) == (True, ["not_audited"])


def test_a_result_that_is_made_again_within_a_second_has_no_line_yet(filled: Path) -> None:
    folder = folder_of(filled)
    manifest = read_manifest(folder)
    assert is_audited(folder, manifest)
    again = dataclasses.replace(manifest, provenance={**manifest.provenance, "wall_s": 9.75})
    assert not is_audited(folder, again), "the line is of the result that was there before"


# What is gone


def test_partition_without_its_head_is_found(filled: Path) -> None:
    partition = folder_of(filled).parent
    (partition / "head.json").unlink()
    assert found(filled) == [("no_head", partition)]


@pytest.mark.parametrize("n_up", [0, 1, 2, 3])
def test_deleted_result_partition_variant_or_asset_is_found(filled: Path, n_up: int) -> None:
    folder = folder_of(filled)
    gone = [folder, *folder.parents][n_up]
    shutil.rmtree(gone)
    missing = [path for kind, path in found(filled) if kind == "missing_result"]
    keys = ("tiny-00000", "tiny-00001")[: 1 if n_up < 2 else 2]
    assert missing == [Path(examples.output(filled, "topk_cache", partition_key=key).path) for key in keys]


@pytest.mark.parametrize("n_up", [0, 1, 2, 3])
def test_file_in_the_place_of_a_folder_is_found(filled: Path, n_up: int) -> None:
    folder = folder_of(filled)
    gone = [folder, *folder.parents][n_up]
    shutil.rmtree(gone)
    gone.write_text("in the way")
    assert ("missing_result", folder) in found(filled)


def test_what_is_missing_outside_the_folder_that_is_verified_is_not_told(filled: Path) -> None:
    shutil.rmtree(folder_of(filled, "embedding_cache").parent)
    assert found(filled / "tiny" / "topk_cache") == []


def test_part_that_is_dropped_with_the_manifest_hashed_anew_is_found(filled: Path) -> None:
    folder = folder_of(filled)
    manifest = read_manifest(folder)
    audit = (filled / "tiny" / "audit.jsonl").read_text()
    write_manifest(folder, dataclasses.replace(manifest, parts=manifest.parts[:1]))
    (filled / "tiny" / "audit.jsonl").write_text(audit)
    (folder / manifest.parts[1].name).unlink()
    assert found(filled) == [("not_as_audited", folder / "manifest.json")]
    assert "the audit log has" in verify(filled).problems[0].message


def test_manifest_of_another_time_than_its_commits_is_found(filled: Path) -> None:
    folder = folder_of(filled)
    manifest = dataclasses.replace(read_manifest(folder), created_at="2001-01-01T00:00:00+00:00")
    (folder / "manifest.json").write_text(manifest.to_json())
    assert found(filled) == [("not_as_audited", folder / "manifest.json")]


@pytest.mark.parametrize("n_up", [0, 1, 2, 3, 4])
def test_folders_that_are_links_are_verified_as_they_are_read(filled: Path, tmp_path: Path, n_up: int) -> None:
    folder = folder_of(filled)
    linked = [folder, *folder.parents][n_up]
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    assert verify(filled).ok
    assert verify(filled).n_results == 8
    part = sorted(folder.glob("part-*"))[0]
    examples.flip_byte(part)
    assert found(filled) == [("changed_part", part)]


def test_store_whose_path_is_no_utf8_is_read_and_verified(tmp_path: Path) -> None:
    store = Path(os.fsdecode(os.fsencode(tmp_path) + b"/st\xffre"))
    for folder in examples.commit_all(store).values():
        assert ResultFiles(folder).manifest.n_documents
    assert verify(store).problems == ()
    reader = CacheReader.from_folders([folder_of(store)])
    assert len(reader[0]["input_ids"])


def test_link_that_leads_back_up_ends(filled: Path) -> None:
    (folder_of(filled).parents[2] / "again").symlink_to(filled)
    (folder_of(filled).parents[2] / "itself").symlink_to("itself")
    assert verify(filled).ok


@pytest.mark.parametrize("name", ["manifest.json", "part-00000.parquet", "head.json", "audit.jsonl"])
@pytest.mark.parametrize("what", ["pipe", "folder", "link to itself", "socket"])
def test_what_is_no_file_is_named_and_the_rest_goes_on(filled: Path, name: str, what: str) -> None:
    folder = folder_of(filled)
    path = {"head.json": folder.parent, "audit.jsonl": filled / "tiny"}.get(name, folder) / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "link to itself":
        path.symlink_to(path.name)
    else:
        os.mknod(path, stat.S_IFSOCK | 0o600)
    examples.flip_byte(sorted(folder_of(filled, "embedding_cache").glob("part-*"))[0])
    by_path = {problem.path: problem for problem in verify(filled).problems}
    assert len(by_path) >= 2
    assert "move it away" in by_path[path].message


def test_what_the_plan_names_and_is_not_there_is_noted_and_the_other_way_round(store: Path) -> None:
    write_plan(store / "tiny", {"a": "1", "b": "2", "c": "3"})
    for key, content in (("a", "1"), ("z", "9")):
        commit_partition(store, key, content)
    report = verify(store)
    assert report.ok
    of_topk = {note.kind: note.message for note in report.notes if note.path.parent.name == "topk_cache"}
    assert "lacks 2 partitions (b, c) of the 3 that are planned" in of_topk["not_made"]
    assert "has 1 partition (z) that the plan does not name" in of_topk["not_planned"]


def test_plan_that_was_changed_is_found(store: Path) -> None:
    write_plan(store / "tiny", {"a": "1"})
    commit_partition(store, "a", "1")
    plan = store / "tiny" / "shard_plan" / "plan.json"
    (block,) = (store / "tiny" / "shard_plan" / "blocks").iterdir()
    was = block.read_text()
    block.write_text(was.replace('"/s.jsonl"', '"/t.jsonl"'))
    assert found(store) == [("corrupt_plan", block)]
    block.write_text(was)
    assert found(store) == []
    plan.write_text(plan.read_text().replace('"/s.jsonl"', '"/t.jsonl"'))
    assert found(store) == [("corrupt_plan", plan)]


def test_result_that_failed_a_check_is_a_note_and_a_problem_where_it_is_current(store: Path) -> None:
    commit_partition(store, "a", "1")
    commit(store, "topk_cache", "a", "x" * 64, passed=False)
    report = verify(store)
    assert (report.problems, [note.kind for note in report.notes]) == ((), ["failed_check"])
    failed = report.notes[0].path
    write_head(failed, read_manifest(failed).fingerprint)
    assert found(store) == [("failed_current", failed.parent / "head.json")]


DEEP = b"[" * 900 + b"]" * 900
"""Shallow enough to be read, too deep to be written."""


@pytest.mark.parametrize(
    "data", [b'{"format_version": NaN}', b"[" * 5000 + b"]" * 5000, b'{"format_version": 1, "x": ' + DEEP + b"}"]
)
def test_manifest_that_is_no_json_of_ours_is_named(filled: Path, data: bytes) -> None:
    path = folder_of(filled) / "manifest.json"
    path.write_bytes(data)
    assert found(filled) == [("corrupt_manifest", path)]


def test_file_results_are_verified_by_their_hashes(store: Path) -> None:
    out = plan_output("student_smoke", {"input": "i"}, recipe_folder=store / "tiny", partition_key="all")
    commit_file_result(
        out,
        recipe="tiny",
        recipe_folder=store / "tiny",
        partition_key="all",
        files={"curve.png": b"picture", "losses.json": b"[1]"},
        checks={},
        provenance={},
    )
    assert verify(store).ok
    examples.flip_byte(Path(out.path) / "curve.png")
    assert found(store) == [("changed_part", Path(out.path) / "curve.png")]


def test_folder_that_is_not_there_or_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        verify(tmp_path / "missing")
    with pytest.raises(NotCommittedError, match="holds no results"):
        verify(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(MissingInputError, match="is not a folder"):
        verify(tmp_path / "file")


def found(path: Path) -> list[tuple[str, Path]]:
    """Kind and file of every problem, each of which also names its file in words."""
    problems = verify(path).problems
    assert all(str(problem.path) in problem.message for problem in problems)
    return sorted((problem.kind, problem.path) for problem in problems)


def kinds(path: Path) -> list[str]:
    return [problem.kind for problem in verify(path).problems]


def json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A manifest whose parts say something else, consistent in itself."""
    manifest = read_manifest(folder)
    parts = tuple(dataclasses.replace(part, **change(dataclasses.asdict(part))) for part in manifest.parts)
    write_manifest(folder, dataclasses.replace(manifest, parts=parts))


def replace_part(folder: Path, rows: pa.Table) -> None:
    suffix = part_suffix("topk_cache")
    with atomic_file(folder / f"part-00000{suffix}") as file:
        write_table(rows, suffix, file)
    adopt_files(folder)


def adopt_files(folder: Path) -> None:
    """A manifest with sizes and hashes of the files as they are."""
    manifest = read_manifest(folder)
    parts = tuple(
        dataclasses.replace(part, n_bytes=(folder / part.name).stat().st_size, sha256=file_sha256(folder / part.name))
        for part in manifest.parts
    )
    write_manifest(folder, dataclasses.replace(manifest, parts=parts))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """As a task that is wrong would have committed it."""
    parts = manifest.parts
    whole = dataclasses.replace(
        manifest,
        n_documents=sum(part.n_documents for part in parts),
        n_tokens=sum(part.n_tokens for part in parts),
        n_bytes=sum(part.n_bytes for part in parts),
        data_version=data_version(manifest.asset, [part.sha256 for part in parts]),
    )
    (folder / "manifest.json").write_text(whole.to_json())
    (folder / INDEX_NAME).unlink(missing_ok=True)  # it is of the true commit
    audit = recipe_folder_of(folder) / "audit.jsonl"
    kept = [line for line in audit.read_text().splitlines() if f'{folder.name}"' not in line]
    record = without_non_finite(audit_record(folder, whole))
    audit.write_text("\n".join([*kept, json.dumps(record, sort_keys=True)]) + "\n")
