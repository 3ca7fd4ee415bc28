"""What a campaign remembers, and how it is summed up."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from kd_assets_tests.campaign.ledger import BAD, COUNTS, Ledger, Record, summarise


def record(number: int, **counts: int) -> Record:
    return {"campaign": "damages", "class": "bit of part", "what": "bit 1", "round": number, "wall_s": 0.5, **counts}


def test_a_killed_campaign_goes_on_where_it_was(tmp_path: Path) -> None:
    first = Ledger(tmp_path, seed=7)
    for number in (0, 1, 3):
        first.add(record(number))
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"campaign": "damages", "round": 2, "cl')  # killed inside the line

    second = Ledger(tmp_path, seed=7)
    assert list(islice(second.next_rounds("damages"), 3)) == [2, 4, 5]
    assert list(islice(second.next_rounds("kills"), 2)) == [0, 1]
    assert second.used_s("damages") == 1.5
    second.add(record(2))
    assert [r["round"] for r in Ledger(tmp_path, seed=7).records] == [0, 1, 3, 2]


def test_a_folder_is_of_one_seed(tmp_path: Path) -> None:
    Ledger(tmp_path, seed=7)
    with pytest.raises(ValueError, match="has a campaign of seed 7"):
        Ledger(tmp_path, seed=8)


def test_counts_are_summed_in_all_and_by_class(tmp_path: Path) -> None:
    records = [record(0, damages=1, found=1), record(1, damages=1, harmless=1), record(2, damages=1, found=1)]
    summary = summarise(records, tmp_path, 0)
    assert (summary["damages"], summary["found"], summary["harmless"], summary["ok"]) == (3, 2, 1, True)
    assert summary["by_class"] == {"damages: bit of part": {"damages": 3, "found": 2, "harmless": 1}}
    assert summary["bad"] == []


@pytest.mark.parametrize("count", BAD)
def test_one_bad_round_makes_a_campaign_bad_and_is_named_with_its_repetition(count: str, tmp_path: Path) -> None:
    assert count in COUNTS
    summary = summarise([record(0), record(5) | {count: 1, "bad": ["words"]}], tmp_path / "f", 3)
    assert (summary[count], summary["ok"]) == (1, False)
    (bad,) = summary["bad"]
    assert bad["bad"] == ["words"]
    assert bad["repeat"].endswith("--seed 3 --only damages --round 5")
