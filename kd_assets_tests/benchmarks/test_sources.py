"""The benchmark of sources measures what it says it does, at a size where its figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kd_assets_tests.benchmarks.sources import WANTED


@pytest.mark.slow
def test_every_figure_is_measured() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "kd_assets_tests.benchmarks.sources", "--json", "--tiny"]
    figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert set(WANTED) <= set(figures)
    assert set(figures["late_shard_cost_ratio"]) == {"jsonl", "jsonl.zst", "parquet"}
    assert figures["n_shards"] == 1500
    assert figures["run_reads_plan_s"] < figures["plan_100k_shards_s"] + 5


def test_one_figure_can_be_asked_for() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "kd_assets_tests.benchmarks.sources", "--tiny"]
    found = subprocess.run([*command, "--only", "late_shard_cost_ratio"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("late_shard_cost_ratio: {'jsonl': ")
    assert "wanted <= 1.2 each" in found.stdout
