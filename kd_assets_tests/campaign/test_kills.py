"""A kill campaign that cannot fail proves nothing: what it looks for is planted, and is told."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pyarrow as pa
import pytest

from kd_assets.store import partfile
from kd_assets.store.writing import writer
from kd_assets.store.writing.journal import Journal
from kd_assets_tests.campaign import kill_rounds
from kd_assets_tests.campaign.comparison import Undisturbed, compare, undisturbed_facts
from kd_assets_tests.campaign.kill_rounds import CLASSES, KillRounds, traceback_in
from kd_assets_tests.campaign.ledger import Record
from kd_assets_tests.campaign.production import Home, make_home, warm_up


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed_facts(make_home(tmp_path_factory.mktemp("undisturbed") / "home"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


def test_an_undisturbed_home_differs_in_nothing(home: Home, undisturbed: Undisturbed) -> None:
    found = compare(home, undisturbed)
    assert (found.bytes_differing, found.made_twice, found.lost, found.litter) == ([], [], [], [])


def test_one_other_byte_is_told(home: Home, undisturbed: Undisturbed) -> None:
    part = sorted(home.recipe_folder.rglob("part-*"))[0]
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    assert compare(home, undisturbed).bytes_differing


def test_other_statistics_in_a_manifest_are_told(home: Home, undisturbed: Undisturbed) -> None:
    path = next(home.recipe_folder.glob("topk_cache/*/*/*/manifest.json"))
    path.write_text(path.read_text().replace('"min_token_budget": 96.0', '"min_token_budget": 97.0'))
    assert any("stats" in words for words in compare(home, undisturbed).bytes_differing)


def test_a_missing_head_or_result_or_audit_line_is_lost(home: Home, undisturbed: Undisturbed) -> None:
    next(home.recipe_folder.glob("topk_cache/*/*/head.json")).unlink()
    assert compare(home, undisturbed).lost
    shutil.rmtree(home.folder)
    make_home(home.folder)
    audit = home.recipe_folder / "audit.jsonl"
    audit.write_text("".join(audit.read_text().splitlines(keepends=True)[1:]))
    assert any("audit" in words for words in compare(home, undisturbed).lost)


def test_a_result_that_was_committed_twice_is_told(home: Home, undisturbed: Undisturbed) -> None:
    audit = home.recipe_folder / "audit.jsonl"
    audit.write_text(audit.read_text() + audit.read_text().splitlines(keepends=True)[0])
    assert len(compare(home, undisturbed).made_twice) == 1


def test_a_part_that_is_begun_after_it_was_finished_was_made_twice(
    home: Home, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    computed = tmp_path / "computed"
    computed.write_text("begun a\nbegun a\nfinished a\nbegun b\n")
    assert not compare(home, undisturbed, computed).made_twice
    computed.write_text("begun a\nfinished a\nbegun b\nbegun a\n")
    assert compare(home, undisturbed, computed).made_twice == ["part a was computed again"]


def test_what_a_kill_left_behind_is_litter(home: Home, undisturbed: Undisturbed) -> None:
    (next(home.recipe_folder.glob("topk_cache/*/*")) / ".head.json.abc.tmp").write_text("{")
    assert len(compare(home, undisturbed).litter) == 1


def test_a_traceback_is_found_in_a_log_with_its_place() -> None:
    text = (
        'x\nTraceback (most recent call last):\n  File "/a/kd_assets/x.py", line 3, in f\n    g()\nKeyError: 1\nmore\n'
    )
    assert traceback_in(text) == 'KeyError: 1 File "/a/kd_assets/x.py", line 3, in f'
    assert traceback_in("all is well") is None


# ------------------------------------------------------------------ whole rounds, with faults planted in the product


def do(folder: Path, *classes: str, n: int = 1) -> list[Record]:
    """The first `n` rounds of each of these classes; faults that are planted here are in their processes, too."""
    warm_up()
    numbers = [i for name in classes for i in [k for k, c in enumerate(CLASSES) if c == name][:n]]
    return list(KillRounds(folder, 0).rounds(iter(numbers)))


def total(records: list[Record], count: str) -> int:
    return sum(int(record.get(count, 0)) for record in records)


@pytest.mark.slow
def test_a_round_of_each_class_leaves_everything_as_if_undisturbed(tmp_path: Path) -> None:
    records = do(tmp_path, *dict.fromkeys(CLASSES))
    assert len(records) == len(set(CLASSES))
    assert total(records, "kills") > 3
    for count in ("bytes_differing", "made_twice", "lost", "stuck"):
        assert total(records, count) == 0, [record["bad"] for record in records]


@pytest.mark.slow
def test_a_writer_that_forgets_its_parts_makes_them_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "read", lambda self: ([], True, []))
    assert total(do(tmp_path, "worker, exact kill", n=8), "made_twice")


@pytest.mark.slow
def test_bytes_that_depend_on_an_earlier_attempt_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resume, write = writer.ResultWriter._resume, partfile.write_table
    goes_on = False

    def resume_and_remember(self: writer.ResultWriter) -> None:
        nonlocal goes_on
        resume(self)
        goes_on = bool(self.finished)

    def write_otherwise(table: pa.Table, suffix: str, sink: object) -> None:
        write(
            table.replace_schema_metadata({**table.schema.metadata, "again": "1"}) if goes_on else table, suffix, sink
        )

    monkeypatch.setattr(writer.ResultWriter, "_resume", resume_and_remember)
    monkeypatch.setattr(writer, "write_table", write_otherwise)
    assert total(do(tmp_path, "worker, exact kill", n=8), "bytes_differing")


@pytest.mark.slow
def test_a_commit_that_sets_no_head_loses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "write_head", lambda folder, fingerprint: None)
    assert total(do(tmp_path, "worker, exact kill"), "lost")


@pytest.mark.slow
def test_a_worker_that_hangs_is_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_ground = KillRounds._make_ground

    def make_ground_and_hang(self: KillRounds) -> object:
        ground = make_ground(self)
        monkeypatch.setattr(kill_rounds, "ATTEMPT_S", 1.0)
        monkeypatch.setattr(kill_rounds, "worker", lambda *_, **__: time.sleep(300))
        return ground

    monkeypatch.setattr(KillRounds, "_make_ground", make_ground_and_hang)
    assert total(do(tmp_path, "worker, exact kill"), "stuck")
