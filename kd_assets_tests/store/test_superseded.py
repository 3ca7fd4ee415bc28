"""What nothing reads any more is listed with its reason and its size, and nothing else is."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from kd_assets import cli
from kd_assets.store import Manifest, commit_file_result, plan_output, put_aside, read_manifest
from kd_assets.store.current_variants import say_current
from kd_assets.store.recoding.recode import recode
from kd_assets.store.recoding.sources import find_source
from kd_assets.store.superseded import superseded
from kd_assets_tests.store import examples
from kd_assets_tests.store.planned import commit, commit_partition, hash_of, write_plan

KEYS = ("tiny-00000", "tiny-00001")


@pytest.fixture
def recipe_folder(store: Path) -> Path:
    folder = store / examples.RECIPE
    write_plan(folder, dict.fromkeys(KEYS, "content"))
    for key in KEYS:
        commit_partition(store, key, "content")
    return folder


def reasons(recipe_folder: Path) -> dict[str, list[str]]:
    """Reason → asset and partition of each."""
    found: dict[str, list[str]] = {}
    for item in superseded(recipe_folder):
        found.setdefault(item.why, []).append(f"{item.asset} {item.partition_key}")
    return found


def test_nothing_is_listed_of_a_recipe_all_of_which_is_read(recipe_folder: Path) -> None:
    assert superseded(recipe_folder) == []


def test_what_a_new_plan_made_anew_is_replaced_and_what_it_dropped_is_not_planned(
    store: Path, recipe_folder: Path
) -> None:
    write_plan(recipe_folder, {KEYS[0]: "other"})
    commit_partition(store, KEYS[0], "other")
    found = reasons(recipe_folder)
    every = ("embedding_cache", "hidden_state_cache", "shards_manifest", "topk_cache")
    assert sorted(found["replaced"]) == [f"{asset} {KEYS[0]}" for asset in every]
    assert sorted(found["not planned"]) == [f"{asset} {KEYS[1]}" for asset in every]
    assert found["old plan"] == ["shard_plan None"]
    assert set(found) == {"replaced", "not planned", "old plan"}


def test_a_cache_of_another_shard_than_the_planned_one_is_listed(store: Path, recipe_folder: Path) -> None:
    write_plan(recipe_folder, {KEYS[0]: "other", KEYS[1]: "content"})
    commit_partition(store, KEYS[0], "other", assets=())
    assert sorted(reasons(recipe_folder)["other shard"]) == [
        f"{asset} {KEYS[0]}" for asset in ("embedding_cache", "hidden_state_cache", "topk_cache")
    ]


def test_a_variant_that_was_not_made_last_is_listed(store: Path) -> None:
    later = examples.fixed_clock() + datetime.timedelta(seconds=1)
    one = examples.output(store, "student_smoke", params={"steps": 1})
    two = examples.output(store, "student_smoke", params={"steps": 2})
    for out, time in ((one, later), (two, examples.fixed_clock())):
        commit_file_result(
            out,
            recipe=examples.RECIPE,
            recipe_folder=store / examples.RECIPE,
            partition_key=examples.PARTITION,
            files={"curve.json": b"{}"},
            checks={},
            provenance={},
            clock=partial(datetime.datetime.fromtimestamp, time.timestamp(), datetime.UTC),
        )
    (item,) = superseded(store / examples.RECIPE)
    assert (item.why, item.path) == ("older variant", Path(two.path))


def recode_compact(store: Path, key: str, source: Manifest) -> Manifest:
    """The compact cache of a partition, a second later than the plain one."""
    identity = {**source.identity, "params": {**source.params, "codec": "compact"}}
    wanted = plan_output("topk_cache", identity, recipe_folder=store / examples.RECIPE, partition_key=key)
    found = find_source(wanted).source
    assert found is not None
    later = examples.fixed_clock() + datetime.timedelta(seconds=1)
    return recode(found, wanted, made_by={}, clock=lambda: later)


def test_a_variant_that_was_recoded_of_one_partition_replaces_nothing_of_the_others(
    store: Path, recipe_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = recipe_folder / "topk_cache"
    plain = [read_manifest(path.parent) for path in sorted(source.glob("*/*/*/manifest.json"))]
    recode_compact(store, KEYS[0], plain[0])
    (item,) = superseded(recipe_folder)
    assert (item.why, item.partition_key, item.variant) == ("older variant", KEYS[0], plain[0].variant)
    assert item.is_only_exact_copy
    assert cli.main(["gc", str(recipe_folder), "--dry-run"]) == 0
    assert f"{item.path}  (the only exact copy" in capsys.readouterr().out


def test_the_variant_that_readers_get_is_not_listed_whatever_was_recoded_since(
    store: Path, recipe_folder: Path
) -> None:
    source = recipe_folder / "topk_cache"
    plain = [read_manifest(path.parent) for path in sorted(source.glob("*/*/*/manifest.json"))]
    made = recode_compact(store, KEYS[0], plain[0])
    say_current(recipe_folder, "topk_cache", plain[0].variant)
    assert superseded(recipe_folder) == []
    say_current(recipe_folder, "topk_cache", made.variant)
    assert [item.variant for item in superseded(recipe_folder)] == [plain[0].variant]


def test_what_the_newest_variant_has_of_another_shard_replaces_nothing(store: Path, recipe_folder: Path) -> None:
    source = recipe_folder / "topk_cache"
    plain = [read_manifest(path.parent) for path in sorted(source.glob("*/*/*/manifest.json"))]
    recode_compact(store, KEYS[0], plain[0])
    write_plan(recipe_folder, {KEYS[0]: "other", KEYS[1]: "content"})
    commit_partition(store, KEYS[0], "other")
    found = {(item.why, item.variant): item.is_only_exact_copy for item in superseded(recipe_folder)}
    assert ("older variant", plain[0].variant) not in found


def test_what_failed_a_check_is_unfinished_or_put_aside_is_listed_as_that(store: Path) -> None:
    folder = store / examples.RECIPE
    shard = commit(store, "shards_manifest", KEYS[0], hash_of("content"))
    commit(store, "topk_cache", KEYS[0], shard, passed=False)
    out = examples.output(store, "embedding_cache", partition_key=KEYS[0])
    with examples.writer(store, out, partition_key=KEYS[0]):
        pass
    commit(store, "hidden_state_cache", KEYS[0], shard)
    put_aside(folder, [KEYS[0]], ["hidden_state_cache"], why="a bad disk")
    assert reasons(folder) == {
        "failed check": [f"topk_cache {KEYS[0]}"],
        "unfinished": [f"embedding_cache {KEYS[0]}"],
        "put aside": [f"hidden_state_cache {KEYS[0]}"],
    }


HOLD_LEASE = """
import sys
from pathlib import Path
from kd_assets.locks import Lease
Lease(Path(sys.argv[1])).acquire({})
print("held", flush=True)
sys.stdin.read()
"""


def test_what_a_live_task_is_at_is_not_listed(store: Path) -> None:
    out = examples.output(store, "embedding_cache")
    with examples.writer(store, out):
        pass
    lease = str(Path(out.path) / ".lease")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD_LEASE, lease], stdin=pipe, stdout=pipe) as task:
        assert task.stdout is not None
        assert task.stdout.readline() == b"held\n"
        assert superseded(store / examples.RECIPE) == []
        task.communicate()
    assert [item.why for item in superseded(store / examples.RECIPE)] == ["unfinished"]


def test_sizes_are_those_of_the_files_and_what_has_another_name_frees_nothing(store: Path, tmp_path: Path) -> None:
    folder, manifest = examples.commit(store, "topk_cache")
    (moved,) = put_aside(store / examples.RECIPE, [manifest.partition_key], ["topk_cache"], why="size")
    (item,) = superseded(store / examples.RECIPE)
    files = [path for path in moved.folder.rglob("*") if path.is_file()]
    assert item.n_bytes == sum(path.stat().st_size for path in files)
    assert item.disk_bytes == sum(path.stat().st_blocks * 512 for path in files)
    part = moved.folder / manifest.parts[0].name
    (tmp_path / "kept").hardlink_to(part)
    (after,) = superseded(store / examples.RECIPE)
    assert after.disk_bytes == item.disk_bytes - part.stat().st_blocks * 512
    assert folder == moved.was


def test_the_command_deletes_nothing_and_says_so(
    store: Path, recipe_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plan(recipe_folder, {KEYS[0]: "content"})
    before = sorted(path for path in store.rglob("*") if path.is_file())
    assert cli.main(["gc", str(recipe_folder)]) == 2
    assert "kd-assets deletes nothing: say --dry-run" in capsys.readouterr().err
    assert cli.main(["gc", str(recipe_folder), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 results of partitions that the plan does not name: " in out
    assert "nothing was deleted" in out
    assert cli.main(["gc", str(recipe_folder), "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {item["why"] for item in listed["superseded"]} == {"not planned", "old plan"}
    assert listed["disk_bytes"] == sum(item["disk_bytes"] for item in listed["superseded"])
    assert sorted(path for path in store.rglob("*") if path.is_file()) == before
