"""The benchmark of the orchestration measures what it says it does."""

from __future__ import annotations

import json
import os
import re

import pytest

from kd_assets_tests.benchmarks import orchestration

NAMES = set(
    re.findall(r"^    ([a-z_0-9]+(?:_s|_ms_per_partition|_ratio|_mb_of_run)) ", orchestration.__doc__ or "", re.M)
)


@pytest.mark.slow
def test_every_figure_that_it_explains_is_in_its_last_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", os.environ.get("DAGSTER_HOME", ""))  # which it sets, back as it was
    orchestration.main(["--json", "--partitions", "20", "--materialized", "8", "--compared", "4"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(NAMES) > 12
    assert figures.keys() >= NAMES
    assert {name: figures[name] for name in NAMES if figures[name] <= 0} == {}


def test_a_step_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        orchestration.main(["--only", "card,speed"])
    assert "there is no step speed" in capsys.readouterr().err
