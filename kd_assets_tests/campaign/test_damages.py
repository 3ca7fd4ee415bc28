"""A damage campaign whose judge cannot be wrong proves nothing: faults are planted in the product, and are told."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from kd_assets.store.checking.report import VerifyReport
from kd_assets_tests.campaign import judge as judging
from kd_assets_tests.campaign.damages import CLASSES, SparedError
from kd_assets_tests.campaign.judge import Undamaged, Verdict, judge, undamaged
from kd_assets_tests.campaign.mirror import Mirror
from kd_assets_tests.campaign.production import Home, make_home, remember_digests
from kd_assets_tests.campaign.readings import results_on_disk


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = make_home(tmp_path_factory.mktemp("campaign") / "home")
    remember_digests(made)
    return made


@pytest.fixture(scope="module")
def mirror(home: Home) -> Mirror:
    return Mirror(home.folder)


@pytest.fixture(scope="module")
def before(home: Home) -> Undamaged:
    return undamaged(home)


@pytest.fixture(autouse=True)
def _put_back(mirror: Mirror) -> None:
    mirror.restore()


def judged(home: Home, before: Undamaged) -> Verdict:
    return judge(home, before, lambda words, patience_s: None)


def parts_of(home: Home, asset: str) -> list[Path]:
    return sorted((home.recipe_folder / asset).rglob("part-*"))


def test_a_home_without_damage_is_harmless(home: Home, before: Undamaged) -> None:
    assert judged(home, before) == Verdict(verdict="harmless")


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_changes_the_home_and_is_put_back(name: str, home: Home, mirror: Mirror) -> None:
    as_it_was = contents(home.folder)
    for seed in range(2):
        try:
            words = CLASSES[name](random.Random(seed), home)
        except SparedError:
            continue
        assert words
        assert contents(home.folder) != as_it_was
        mirror.restore()
        assert contents(home.folder) == as_it_was


def contents(folder: Path) -> dict[str, object]:
    """Everything below a folder, without following anything."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        is_file = path.is_file() and not path.is_symlink()
        found[str(path)] = (status.st_mode, status.st_mtime_ns if is_file else 0, path.read_bytes() if is_file else b"")
    return found


def test_the_same_seed_does_the_same_damage(home: Home, mirror: Mirror) -> None:
    said = []
    for _ in range(2):
        said.append(CLASSES["byte of part"](random.Random("3/damages/25"), home))
        mirror.restore()
    assert said[0] == said[1]


def test_what_lies_on_disk_is_told_without_the_product(home: Home, before: Undamaged) -> None:
    assert len(before.results) == 8
    part = parts_of(home, "topk_cache")[0]
    part.write_bytes(part.read_bytes()[:-1] + b"?")  # a part ends with its container's name
    changed = {path for path, result in results_on_disk(home).items() if before.results[path] != result}
    assert changed == {str(part.parent.relative_to(home.recipe_folder))}
    part.unlink()
    assert before.results.keys() - results_on_disk(home).keys() == changed


# ------------------------------------------------------------------ planted faults


def test_a_reader_that_ignores_the_last_document_is_silent(
    home: Home, before: Undamaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_assets.store.reading.reader.CacheReader.__len__", lambda self: 6)
    verdict = judged(home, before)
    assert verdict.verdict == "silent"
    assert "reader of topk_cache" in verdict.silent_by


def test_a_verify_that_finds_nothing_is_silent(home: Home, before: Undamaged, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(path: Path) -> VerifyReport:
        return VerifyReport(
            path=path, n_results=8, n_parts=0, n_documents=0, n_tokens=0, n_bytes=0, problems=(), notes=()
        )

    parts_of(home, "topk_cache")[0].unlink()
    assert "verify" not in judged(home, before).silent_by
    monkeypatch.setattr("kd_assets.commands.verify.verify", nothing)
    assert "verify" in judged(home, before).silent_by


def test_a_forged_manifest_is_verifys_to_tell(home: Home, before: Undamaged) -> None:
    CLASSES["all parts dropped, hashed anew"](random.Random(1), home)
    verdict = judge(home, before, lambda words, patience_s: None, is_forged=True)
    assert ("verify" in verdict.silent_by) == (verdict.verdict == "silent")


def test_a_reader_that_hands_out_what_failed_its_check_is_silent(
    home: Home, before: Undamaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    CLASSES["check failed, hashed anew"](random.Random(0), home)
    (asset,) = {r.asset for path, r in before.results.items() if results_on_disk(home).get(path) != r}
    monkeypatch.setattr(judging, "read_asset", lambda home, asset: before.readings[asset])
    assert f"reader of {asset}" in judged(home, before).silent_by


def test_checks_that_pass_whatever_the_bytes_are_silent(
    home: Home, before: Undamaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = parts_of(home, "hidden_state_cache")[0]
    part.write_bytes(part.read_bytes()[:-9] + b"?" + part.read_bytes()[-8:])
    monkeypatch.setattr(judging, "check_all", lambda folder, shard: [])
    assert "checks" in judged(home, before).silent_by


def test_a_planner_that_asks_for_other_results_is_silent(
    home: Home, before: Undamaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_assets.orchestration.planning.planner.weights_fingerprint", lambda *_, **__: "f" * 64)
    assert "planner" in judged(home, before).silent_by


def test_a_planner_that_does_not_see_another_teacher_is_silent(
    home: Home, before: Undamaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, _ = before.fingerprints
    monkeypatch.setattr("kd_assets.orchestration.planning.planner.weights_fingerprint", lambda *_, **__: weights)
    file = home.folder / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    assert "planner" in judged(home, before).silent_by


def test_an_exception_that_is_no_answer_is_bare(home: Home, before: Undamaged, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(folder: Path, shard: Path) -> None:
        raise KeyError("k")

    monkeypatch.setattr(judging, "check_all", check)
    assert judged(home, before).bare_by == ["checks"]


def test_an_answer_that_does_not_come_is_hung(home: Home, before: Undamaged, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(folder: Path, shard: Path) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.1)  # that it takes too long is seen sooner, and of this one alone
        time.sleep(300)

    monkeypatch.setattr(judging, "check_all", hang)
    verdict = judged(home, before)
    assert verdict.hung_by == ["checks"]
    assert verdict.verdict != "harmless"


def test_a_run_that_succeeds_and_leaves_damage_is_silent(home: Home, before: Undamaged) -> None:
    parts_of(home, "topk_cache")[0].unlink()
    verdict = judge(
        home,
        before,
        lambda words, patience_s: None,
        run=lambda: judging.run_says(home, before, lambda: (True, "", True)),
    )
    assert "run" in verdict.silent_by


def test_a_run_that_fails_with_a_traceback_is_bare(home: Home, before: Undamaged) -> None:
    answer = judging.run_says(home, before, lambda: (False, "AttributeError", False))
    assert answer.kind == "bare"
    assert judging.run_says(home, before, lambda: (False, "CorruptPartError", True)).kind == "named"
