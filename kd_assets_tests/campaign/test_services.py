"""The campaign at services sees what goes wrong: faults are planted in what a round has made."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kd_assets_tests.campaign.service_rounds import ROUND_S, ServiceRound
from kd_assets_tests.orchestration.deployment import make_tiny_teacher
from kd_assets_tests.store.examples import flip_byte


@pytest.mark.slow
def test_what_is_lost_changed_or_made_twice_is_counted(tmp_path: Path) -> None:
    round_ = ServiceRound(tmp_path / "round", make_tiny_teacher(tmp_path / "teacher"))
    with round_.deployed():
        round_.start()
        assert round_.is_done(time.monotonic() + ROUND_S), round_.machine.said()[-4000:]
        expected = round_.parts()
        clean = round_.judged(expected)
        assert (clean["lost"], clean["bytes_differing"], clean["made_twice"], clean["bad"]) == (0, 0, 0, [])

        store = round_.deployment.platform.recipe_folder("tiny")
        first, second = sorted(store / name for name in expected)[:2]
        data = first.read_bytes()
        flip_byte(first)
        assert round_.judged(expected)["bytes_differing"] == 1
        first.write_bytes(data)
        second.unlink()
        assert round_.judged(expected)["lost"] > 0
        audit = (store / "audit.jsonl").read_text()
        (store / "audit.jsonl").write_text(audit + audit.splitlines()[0] + "\n")
        assert round_.judged(expected)["made_twice"] == 1
