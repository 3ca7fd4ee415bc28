"""What `make demo` says of what it made."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import yaml  # type: ignore[import-untyped]

from kd_assets.demo import run
from kd_assets.demo.run import bytes_a_token
from kd_assets.orchestration.driving.progress import counts_in_words
from kd_assets.recipes.project import PROJECT_FOLDER
from kd_assets.store import CacheReader
from kd_assets_tests.benchmarks import loader


def test_bytes_a_token_are_said_with_the_codec_that_made_them(tmp_path: Path) -> None:
    documents = loader.documents(0, np.full(2, 64, np.int64))
    said = {}
    for codec in ("compact", "plain"):
        loader.commit(tmp_path / codec, "topk_cache", documents, partition_key="p-0", part_tokens=128, codec=codec)
        manifests = CacheReader(tmp_path / codec / loader.RECIPE, "topk_cache").manifests
        said[codec] = bytes_a_token(manifests)
        assert said[codec].startswith(f"{manifests[0].n_bytes / 128:,.1f}")
    assert said["compact"].endswith(" (codec compact)")
    assert "codec" not in said["plain"]


def test_the_card_of_a_run_is_none_of_what_was_asked_for() -> None:
    stream = io.StringIO()
    progress = run.RunProgress("[2/3]", run.Display(stream=stream), n_expected=1)
    said = "2026-11-29 - dagster - DEBUG - __ASSET_JOB - id - 1 - demo__teacher_caches - ASSET_MATERIALIZATION - "
    for name in ("topk_cache", "cache_card"):
        progress.read(f"{said}Materialized value demo {name}.\n")
    progress.finish()
    assert "1 of 1 materialized" in stream.getvalue().splitlines()[-1]


def test_progress_shows_how_far_the_shards_are_and_the_steps_of_a_training() -> None:
    stream = io.StringIO()
    progress = run.RunProgress("[3/4]", run.Display(stream=stream, quiet_s=0.0))
    said = "2026-11-29 00:00:00 +0000 - dagster - INFO - demo_caches - 1f2e - demo__teacher_caches - "
    progress.read(f"{said}teacher: 3 of 10 shards, 41 % of tokens, 4,887 tokens/s, about 6 min left\n")
    progress.read(f"{said}task 0: step 20 of 60, loss 3.214, 5,120 tokens/s\n")
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("· teacher: 3 of 10 shards, 41 % of tokens, 4,887 tokens/s, about 6 min left")
    assert lines[1].endswith("· step 20 of 60, loss 3.214, 5,120 tokens/s")


def test_a_run_over_partitions_ends_with_what_became_of_them_and_counts_nothing_that_is_not_printed() -> None:
    stream = io.StringIO()
    progress = run.RunProgress("[3/4]", run.Display(stream=stream))
    said = "2026-11-29 00:00:00 +0000 - dagster - INFO - demo_caches - 1f2e - demo__teacher_caches - "
    progress.read(f"{said}{counts_in_words(10, 0, 0, 42.0)}\n")
    progress.finish()
    last = stream.getvalue().splitlines()[-1]
    assert last.endswith(" s · 10 made, 0 reused, 0 failed")
    assert "materialized" not in last


def test_the_demos_runs_are_of_the_code_location_that_the_web_ui_loads() -> None:
    (loaded,) = yaml.safe_load((PROJECT_FOLDER / "workspace.yaml").read_text())["load_from"]
    assert loaded["python_module"] == {"module_name": run.DEFINITIONS_MODULE, "location_name": run.CODE_LOCATION}
