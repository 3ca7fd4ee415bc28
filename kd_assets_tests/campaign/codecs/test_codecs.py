"""A slice of the campaign at codecs; and that it sees what goes wrong: faults planted in the product are told."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_assets.store import CacheReader, Ragged
from kd_assets_tests.campaign.codecs import rounds as rounds_of
from kd_assets_tests.campaign.codecs.damages import KINDS, damaged, kinds_of
from kd_assets_tests.campaign.codecs.readers import readers_of
from kd_assets_tests.campaign.codecs.rounds import CodecRounds, Ground, ground_of, judge
from kd_assets_tests.campaign.codecs.stores import SUBJECTS, hash_anew, index_hashed_anew, make_store
from kd_assets_tests.campaign.damages import SparedError
from kd_assets_tests.campaign.ledger import BAD

ENOUGH = ("verify", "reader", "checks")


@pytest.fixture(scope="module")
def grounds(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ground]:
    home = tmp_path_factory.mktemp("codecs")
    return {name: ground_of(make_store(home / str(i), subject)) for i, (name, subject) in enumerate(SUBJECTS.items())}


@pytest.fixture(autouse=True)
def _put_back(grounds: Mapping[str, Ground]) -> None:
    for ground in grounds.values():
        ground.store.restore()


def test_a_slice_of_the_campaign_finds_nothing_wrong(tmp_path: Path) -> None:
    """A damage of some kinds to some codecs; the whole is the campaign's command."""
    n = len(SUBJECTS)
    first = [number for number in range(5 * n, 9 * n) if (number // n + number % n) % 2]  # of each subject two kinds
    records = list(CodecRounds(tmp_path, seed=3).rounds(iter(first)))
    assert len(records) == len(first)
    assert [record["bad"] for record in records if any(record.get(name) for name in BAD)] == []
    assert sum(record.get("damages", 0) for record in records) > 24


FOUND_BY_SEED_21 = {
    288: "a negative n_tokens: the loader ended in numpy's words",
    844: "a part with longer documents than its index says: so did packing",
    1641: "offsets of document ids that lead elsewhere: verify named the document by them, and was killed",
    1850: "a target's log-probability above 0: readers gave it",
    3131: "offsets of an index's ids that lead elsewhere: verify ended in Arrow's words",
    4347: "a document without tokens before others with draws: readers ended in an IndexError",
}


def test_damages_that_the_campaign_has_found_are_named(tmp_path: Path) -> None:
    records = list(CodecRounds(tmp_path, seed=21).rounds(iter(FOUND_BY_SEED_21)))
    assert [record["bad"] for record in records] == [[]] * len(FOUND_BY_SEED_21)
    assert all(record.get("found") for record in records)


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_a_whole_cache_is_read_by_everybody_and_is_harmless(name: str, grounds: Mapping[str, Ground]) -> None:
    verdict = judge(grounds[name], list(readers_of(grounds[name].store)), is_forged=False)
    assert (verdict.outcome, verdict.silent, verdict.bare) == ("harmless", [], [])


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_changes_a_file_alike_for_a_seed(kind: str, grounds: Mapping[str, Ground]) -> None:
    stores = [ground.store for ground in grounds.values() if kind in kinds_of(ground.store.subject.is_index)]
    n_done = 0
    for store in stores:
        for seed in range(2):
            made = []
            for _ in range(2):
                try:
                    made.append(damaged(kind, random.Random(seed), store.files[0], store.others))
                except SparedError:
                    break
            assert len(made) in (0, 2)
            assert all(other == made[0] for other in made)
            n_done += len(made)
    assert n_done


def test_hashes_that_are_made_anew_hide_a_change_from_who_compares_hashes_alone(grounds: Mapping[str, Ground]) -> None:
    store = grounds["raw"].store
    part = store.files[0]
    data = part.read_bytes()
    at = data.index(CacheReader.from_folders([store.folder])[0]["hidden_block_1"].tobytes()[:64])
    part.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert "verify finds nothing" not in judge(grounds["raw"], ENOUGH, is_forged=False).silent
    hash_anew(store, keep_index=True)
    assert judge(grounds["raw"], ENOUGH, is_forged=True).outcome == "believed"


def test_the_index_alone_can_be_hashed_anew(grounds: Mapping[str, Ground]) -> None:
    index = grounds["documents.index"].store.files[0]
    assert index_hashed_anew(index.read_bytes()) == index.read_bytes()


# ------------------------------------------------------------------ planted faults


def flipped(ground: Ground) -> None:
    path = ground.store.files[0]
    data = path.read_bytes()
    path.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])


def test_a_reader_that_gives_other_numbers_is_silent(
    grounds: Mapping[str, Ground], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = CacheReader._document

    def off_by_one(self: CacheReader, part: int, row: int) -> dict[str, Any]:
        found = document(self, part, row)
        return found | {"topk_ids": found["topk_ids"] + 1}

    monkeypatch.setattr(CacheReader, "_document", off_by_one)
    verdict = judge(grounds["compact"], ["reader", "stream"], is_forged=False)
    assert verdict.silent == ["reader gives other content", "stream gives other content"]


def test_a_verify_that_finds_nothing_is_told(grounds: Mapping[str, Ground], monkeypatch: pytest.MonkeyPatch) -> None:
    flipped(grounds["compact"])
    assert judge(grounds["compact"], ["verify"], is_forged=False).outcome == "found"
    monkeypatch.setattr("kd_assets.store.checking.verify._Verifier._part", lambda *_: None)
    monkeypatch.setattr("kd_assets.store.checking.verify._Verifier._index", lambda *_, **__: None)
    assert judge(grounds["compact"], ["verify"], is_forged=False).silent == ["verify finds nothing"]


def test_an_exception_that_is_no_answer_is_bare(grounds: Mapping[str, Ground], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: CacheReader, i: int) -> Any:
        raise KeyError(i)

    monkeypatch.setattr(CacheReader, "__getitem__", fail)
    (said,) = judge(grounds["fp8"], ["reader"], is_forged=False).bare
    assert "KeyError" in said


def test_numbers_that_no_codec_gives_are_silent_behind_hashes_made_anew(
    grounds: Mapping[str, Ground], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = CacheReader._document

    def infinite(self: CacheReader, part: int, row: int) -> dict[str, Any]:
        found = document(self, part, row)
        return found | {"hidden_block_1": np.full_like(found["hidden_block_1"], 0x7F80)}

    monkeypatch.setattr(CacheReader, "_document", infinite)
    assert "hidden_block_1 has inf" in judge(grounds["int8_32"], ["reader"], is_forged=True).silent[0]


def test_a_reader_that_gives_lists_that_no_position_keeps_is_silent(
    grounds: Mapping[str, Ground], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = CacheReader._document

    def one_short(self: CacheReader, part: int, row: int) -> dict[str, Any]:
        found = document(self, part, row)
        return found | {"topk_logprobs": found["topk_logprobs"][:-1]}

    monkeypatch.setattr(CacheReader, "_document", one_short)
    for name in ("top_p", "compact top_p"):
        assert any("elements, of" in said for said in judge(grounds[name], ["reader"], is_forged=True).silent)

    def none_kept(self: CacheReader, part: int, row: int) -> dict[str, Any]:
        found = document(self, part, row)
        lists = {of: found[of] for of in ("topk_ids", "topk_logprobs")}
        empty = np.zeros_like(lists["topk_ids"].offsets)
        return found | {of: Ragged(values=lists[of].values[:0], offsets=empty) for of in lists}

    monkeypatch.setattr(CacheReader, "_document", none_kept)
    for name in ("top_p", "compact top_p"):
        assert "positions keep 0 to 0 tokens" in judge(grounds[name], ["reader"], is_forged=True).silent[0]


def test_a_verify_that_decodes_nothing_is_told(grounds: Mapping[str, Ground], monkeypatch: pytest.MonkeyPatch) -> None:
    ground = grounds["split"]
    for seed in range(20):
        ground.store.restore()
        data, _ = damaged("values changed", random.Random(seed), ground.store.files[0], ground.store.others)
        ground.store.files[0].write_bytes(data)
        hash_anew(ground.store, keep_index=False)
        with monkeypatch.context() as patch:
            patch.setattr("kd_assets.store.checking.verify._Verifier._rows", lambda *_: None)
            if any(
                "verify passes what reader refuses" in said for said in judge(ground, ENOUGH, is_forged=True).silent
            ):
                return
    raise AssertionError("no damage was refused by the reader")


def test_a_crash_and_a_hang_of_the_child_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    monkeypatch.setattr(rounds_of, "judge", crash)
    (record,) = CodecRounds(tmp_path / "crash", seed=0).rounds(iter([3]))
    assert (record["crashed"], record["bad"][0].endswith("killed by SIGSEGV")) == (1, True)

    def hang(*_: Any, say: Callable[[str], None], **__: Any) -> None:
        say("hang")
        time.sleep(300)

    monkeypatch.setattr(rounds_of, "judge", hang)
    monkeypatch.setattr(rounds_of, "ANSWER_S", 0.3)
    (record,) = CodecRounds(tmp_path / "hang", seed=0).rounds(iter([3]))
    assert record["stuck"] == 1


def test_the_campaign_is_over_when_every_codec_has_had_its_damages(tmp_path: Path) -> None:
    until = rounds_of.N_DAMAGES * len(SUBJECTS)
    assert list(CodecRounds(tmp_path, seed=0).rounds(iter([until, until + 1]))) == []
