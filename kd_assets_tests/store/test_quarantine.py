"""Results are put aside whole, in an order that a kill may interrupt anywhere, and what comes next makes them again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_assets import cli
from kd_assets.errors import (
    InputError,
    NotCommittedError,
    ResultBusyError,
    StorageUnavailableError,
    VariantConflictError,
)
from kd_assets.store import CacheReader, put_aside, still_put_aside, verify
from kd_assets.store.reading.summary import inspect
from kd_assets_tests.store import examples
from kd_assets_tests.store.planned import commit_partition, hash_of, write_plan

KEYS = ("tiny-00000", "tiny-00001")


@pytest.fixture
def recipe_folder(store: Path) -> Path:
    folder = store / examples.RECIPE
    write_plan(folder, dict.fromkeys(KEYS, "content"))
    for key in KEYS:
        commit_partition(store, key, "content")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def result_of(recipe_folder: Path, asset: str, key: str) -> Path:
    (head,) = recipe_folder.glob(f"{asset}/*/{key}/head.json")
    return head.parent / str(json.loads(head.read_text())["fingerprint"])[:16]


def test_a_result_that_is_put_aside_is_there_to_the_byte_and_no_reader_has_it(recipe_folder: Path) -> None:
    was = result_of(recipe_folder, "topk_cache", KEYS[0])
    before, others = contents(was), contents(result_of(recipe_folder, "topk_cache", KEYS[1]))
    (moved,) = put_aside(recipe_folder, [KEYS[0]], ["topk_cache"], why="a bad disk", clock=examples.fixed_clock)
    assert moved.folder == recipe_folder / "quarantine/20261122T120000Z" / was.relative_to(recipe_folder)
    assert contents(moved.folder) == before
    assert not was.exists()
    with pytest.raises(NotCommittedError, match=KEYS[0]):
        CacheReader(recipe_folder, "topk_cache")
    left = CacheReader(recipe_folder, "topk_cache", missing="skip")
    assert left.partition_keys == (KEYS[1],)
    assert contents(left.folders[0]) == others
    assert CacheReader(recipe_folder, "hidden_state_cache").partition_keys == KEYS


def test_the_audit_log_says_what_was_put_aside_and_why(recipe_folder: Path) -> None:
    audit = recipe_folder / "audit.jsonl"
    before = audit.read_bytes()
    (moved,) = put_aside(recipe_folder, [KEYS[0]], ["topk_cache"], why="a bad disk", clock=examples.fixed_clock)
    assert audit.read_bytes().startswith(before)
    assert json.loads(audit.read_bytes()[len(before) :]) == {
        "event": "quarantine",
        "path": str(moved.was.relative_to(recipe_folder)),
        "time": "2026-11-22T12:00:00+00:00",
        "to": str(moved.folder.relative_to(recipe_folder)),
        "why": "a bad disk",
    }


def test_what_is_put_aside_is_a_note_until_it_is_made_again(store: Path, recipe_folder: Path) -> None:
    assert verify(recipe_folder).ok
    (moved,) = put_aside(recipe_folder, [KEYS[0]], ["topk_cache"], why="a bad disk")
    report = verify(recipe_folder)
    assert report.ok
    assert {note.kind for note in report.notes} == {"quarantined", "not_made"}
    assert "a bad disk" in next(note.message for note in report.notes if note.kind == "quarantined")
    assert still_put_aside(recipe_folder)["topk_cache"].keys() == {KEYS[0]}
    commit_partition(store, KEYS[0], "content")
    assert result_of(recipe_folder, "topk_cache", KEYS[0]) == moved.was
    assert verify(recipe_folder).notes == ()
    assert verify(recipe_folder).ok
    assert still_put_aside(recipe_folder) == {}
    assert verify(moved.folder).n_results == 1  # who names it looks at it


def test_a_second_one_of_the_same_second_has_a_place_of_its_own(store: Path, recipe_folder: Path) -> None:
    folders = []
    for _ in range(3):
        folders += put_aside(recipe_folder, [KEYS[0]], ["topk_cache"], why="again", clock=examples.fixed_clock)
        commit_partition(store, KEYS[0], "content")
    assert len({moved.folder for moved in folders}) == 3
    assert all((moved.folder / "manifest.json").is_file() for moved in folders)


def test_inspect_and_verify_walk_past_what_is_put_aside(recipe_folder: Path) -> None:
    n_results = verify(recipe_folder.parent).n_results
    (moved,) = put_aside(recipe_folder, [KEYS[0]], ["topk_cache"], why="damaged")
    (moved.folder / "part-00000.parquet").write_bytes(b"damaged")
    assert verify(recipe_folder.parent).n_results == n_results - 1
    assert verify(recipe_folder.parent).ok
    assert not verify(moved.folder).ok
    (topk,) = (cache for cache in inspect(recipe_folder).caches if cache.asset == "topk_cache")
    assert topk.partition_keys == (KEYS[1],)


def test_what_had_been_replaced_stays_where_it_is_and_is_no_problem(store: Path, recipe_folder: Path) -> None:
    older = result_of(recipe_folder, "topk_cache", KEYS[0])
    write_plan(recipe_folder, {KEYS[0]: "other", KEYS[1]: "content"})
    commit_partition(store, KEYS[0], "other")
    newer = result_of(recipe_folder, "topk_cache", KEYS[0])
    assert newer != older
    (moved,) = put_aside(recipe_folder, [KEYS[0]], ["topk_cache"], why="wrong")
    assert moved.was == newer
    assert (older / "manifest.json").is_file()
    assert verify(recipe_folder).ok
    with pytest.raises(NotCommittedError, match="nothing was moved"):
        put_aside(recipe_folder, [KEYS[0]], ["topk_cache"], why="again")


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    module = "kd_assets.store.quarantine." if "." not in name else ""
    monkeypatch.setattr(f"{module}{name}", fail)


@pytest.mark.parametrize("step", ["append_audit", "remove_file", "prepare_folder", "os.rename"])
def test_a_kill_at_any_step_leaves_what_the_same_call_completes(
    recipe_folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    was = result_of(recipe_folder, "topk_cache", KEYS[0])
    before = contents(was)
    with monkeypatch.context() as patch:
        fail_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            put_aside(recipe_folder, [KEYS[0]], ["topk_cache"], why="a bad disk")
    assert contents(was) == before
    (moved,) = put_aside(recipe_folder, [KEYS[0]], ["topk_cache"], why="a bad disk")
    assert contents(moved.folder) == before
    assert verify(recipe_folder).ok
    assert still_put_aside(recipe_folder)["topk_cache"].keys() == {KEYS[0]}


def test_a_kill_before_the_head_goes_takes_nothing_from_readers(
    recipe_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, "remove_file")
    with pytest.raises(KeyboardInterrupt):
        put_aside(recipe_folder, [KEYS[0]], ["topk_cache"], why="a bad disk")
    assert CacheReader(recipe_folder, "topk_cache").partition_keys == KEYS
    assert still_put_aside(recipe_folder) == {}


def test_a_result_that_a_task_is_at_is_left_alone(store: Path, recipe_folder: Path) -> None:
    was = result_of(recipe_folder, "topk_cache", KEYS[0])
    from kd_assets.locks import Lease

    lease = Lease(was / ".lease")
    lease.acquire({"pid": os.getpid()})
    try:
        with pytest.raises(ResultBusyError):
            put_aside(recipe_folder, [KEYS[0]], ["topk_cache"], why="a bad disk")
    finally:
        lease.release()
    assert CacheReader(recipe_folder, "topk_cache").partition_keys == KEYS


def test_a_result_that_failed_a_check_goes_with_the_current_one(store: Path) -> None:
    from kd_assets_tests.store.planned import commit

    shard = commit(store, "shards_manifest", KEYS[0], hash_of("content"))
    commit(store, "topk_cache", KEYS[0], shard, passed=False)
    folder = store / examples.RECIPE
    (moved,) = put_aside(folder, [KEYS[0]], ["topk_cache"], why="it failed")
    assert not moved.was.exists()
    assert verify(folder).ok


def test_several_variants_are_not_chosen_from(store: Path) -> None:
    one = examples.commit(store, "topk_cache")[1]
    examples.commit(store, "topk_cache", params={"k": examples.K, "max_length": 99})
    folder = store / examples.RECIPE
    with pytest.raises(VariantConflictError, match="name one"):
        put_aside(folder, [examples.PARTITION], ["topk_cache"], why="which?")
    (moved,) = put_aside(folder, [examples.PARTITION], ["topk_cache"], why="this", variant=one.variant)
    assert moved.variant == one.variant


def test_nothing_is_moved_where_one_partition_is_not_there(recipe_folder: Path) -> None:
    with pytest.raises(NotCommittedError, match="tiny-00009"):
        put_aside(recipe_folder, [KEYS[0], "tiny-00009"], ["topk_cache"], why="a typing error")
    with pytest.raises(InputError, match="slash"):
        put_aside(recipe_folder, ["../x"], ["topk_cache"], why="a path")
    assert CacheReader(recipe_folder, "topk_cache").partition_keys == KEYS


def test_a_damaged_head_and_a_damaged_manifest_are_put_aside_too(recipe_folder: Path) -> None:
    was = result_of(recipe_folder, "topk_cache", KEYS[0])
    (was.parent / "head.json").write_text("{")
    (was / "manifest.json").write_text("{")
    (moved,) = put_aside(recipe_folder, [KEYS[0]], ["topk_cache"], why="damaged")
    assert moved.was == was
    assert verify(recipe_folder).ok


def test_a_file_system_that_cannot_move_says_so(recipe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file system below a store cannot be made here without mounting: the call fails as the kernel would."""

    def refuse(*arguments: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.rename", refuse)
    with pytest.raises(StorageUnavailableError, match="cannot move"):
        put_aside(recipe_folder, [KEYS[0]], ["topk_cache"], why="a bad disk")


def test_the_command_says_what_it_moved_and_what_comes_next(
    recipe_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Callable[..., int] = lambda *words: cli.main(["quarantine", *map(str, words)])  # noqa: E731
    assert run(recipe_folder, KEYS[0], "--why", "a bad disk", "--assets", "topk_cache") == 0
    out = capsys.readouterr().out
    assert f"tiny/topk_cache {KEYS[0]}: moved to {recipe_folder}/quarantine/" in out
    assert f"Materialize topk_cache of {KEYS[0]} to make them again" in out
    assert run(recipe_folder, KEYS[1], "--why", "all of it", "--json") == 0
    moved = json.loads(capsys.readouterr().out)["moved"]
    assert [result["asset"] for result in moved] == ["topk_cache", "hidden_state_cache", "embedding_cache"]
    assert run(recipe_folder, KEYS[1], "--why", "x", "--assets", "no_cache") == 2
    assert "has nothing of an asset 'no_cache'; it has" in capsys.readouterr().err
    assert run(recipe_folder / "topk_cache", KEYS[1], "--why", "x") == 2
    assert "is no recipe's folder in a store" in capsys.readouterr().err
