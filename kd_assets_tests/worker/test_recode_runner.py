"""Tasks of the kind `recode`: without a control plane, and without torch."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from kd_assets.contract import Asset, Event, JobFile, Output, Reporter, WorkUnit, read_events
from kd_assets.errors import EXIT_FAILED, EXIT_RESUMABLE
from kd_assets.store import committed
from kd_assets.worker.recode_runner import RecodeRunner
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.task import Task
from kd_assets_tests.store import examples
from kd_assets_tests.store.test_recoding import commit_states, wanted_states, wanted_topk


def job_of(store: Path, sources: Mapping[Asset, Path], *outputs: Output) -> JobFile:
    unit = WorkUnit(
        partition_key=examples.PARTITION,
        inputs={asset: (str(folder),) for asset, folder in sources.items()},
        outputs=outputs,
    )
    return JobFile(
        kind="recode",
        recipe=examples.RECIPE,
        key="0" * 32,
        recipe_folder=str(store / examples.RECIPE),
        events_folder=str(store / "events"),
        tasks=((0,),),
        units=(unit,),
        provenance={"code_commit": "c", "dagster_run_id": "r", "submission_key": "s", "teacher": "not this one's"},
    )


def run(job: JobFile, stop: StopFlag | None = None) -> tuple[int, list[Event]]:
    """Exit status, and what the task said."""
    path = Path(job.events_folder) / "events.jsonl"
    with Reporter(path, stream=io.StringIO()) as report:
        status = Task(job, job.units, report, StopFlag() if stop is None else stop).run()
    return status, [event for _, event in read_events(path) if isinstance(event, Event)]


def is_there(output: Output) -> bool:
    return committed(Path(output.path), output.fingerprint) is not None


def test_a_task_recodes_all_of_a_partition_and_says_how_far_it_is(tmp_path: Path) -> None:
    sources: dict[Asset, Path] = {
        "topk_cache": examples.commit(tmp_path, "topk_cache")[0],
        "hidden_state_cache": commit_states(tmp_path, "raw")[0],
    }
    outputs = wanted_topk(tmp_path, codec="compact"), wanted_states(tmp_path, "split")
    status, events = run(job_of(tmp_path, sources, *outputs))
    assert status == 0
    manifest = committed(Path(outputs[1].path), outputs[1].fingerprint)
    assert manifest is not None
    assert is_there(outputs[0])
    own = manifest.provenance["recoded_by"]
    assert (own["code_commit"], own["dagster_run_id"], own["submission_key"]) == ("c", "r", "s")
    assert (own["job_key"], manifest.provenance["teacher"], "teacher" in own) == ("0" * 32, "t", False)
    progress = [event.data for event in events if event.type == "progress"]
    assert (progress[-1]["done_documents"], progress[-1]["n_documents"]) == (4, 4)


def test_one_cache_that_cannot_be_made_keeps_no_other_from_its_turn(tmp_path: Path) -> None:
    sources: dict[Asset, Path] = {
        "topk_cache": examples.commit(tmp_path, "topk_cache")[0],
        "hidden_state_cache": commit_states(tmp_path, "raw")[0],
    }
    examples.flip_byte(sources["topk_cache"] / "part-00000.parquet")
    broken, whole = wanted_topk(tmp_path, codec="compact"), wanted_states(tmp_path, "split")
    status, events = run(job_of(tmp_path, sources, broken, whole))
    assert status == EXIT_FAILED
    assert (is_there(broken), is_there(whole)) == (False, True)
    (failed,) = [event.data for event in events if event.type == "partition_failed"]
    assert failed["error"] == "CorruptPartError"
    assert "part-00000.parquet was changed after its commit" in failed["message"]


def test_a_task_that_is_to_stop_ends_after_a_whole_part_and_the_next_goes_on(tmp_path: Path) -> None:
    class StopsAtTheFirstPart(StopFlag):
        @property
        def signal_name(self) -> str | None:
            return "SIGUSR1" if list(Path(wanted.path).glob("part-*")) else None

        def __bool__(self) -> bool:
            return self.signal_name is not None

    source, _ = commit_states(tmp_path, "raw")
    wanted = wanted_states(tmp_path, "fp8")
    job = job_of(tmp_path, {"hidden_state_cache": source}, wanted)
    status, _ = run(job, StopsAtTheFirstPart())
    assert status == EXIT_RESUMABLE
    assert [p.name for p in Path(wanted.path).glob("part-*")] == ["part-00000.arrow"]
    status, _ = run(job)
    assert (status, is_there(wanted)) == (0, True)


def test_a_source_that_the_job_does_not_name_or_that_is_gone_is_named(tmp_path: Path) -> None:
    wanted = wanted_topk(tmp_path, codec="compact")
    source, _ = examples.commit(tmp_path, "topk_cache")
    (source / "manifest.json").unlink()
    told: list[tuple[dict[Asset, Path], str]] = [
        ({}, "names no source of topk_cache"),
        ({"topk_cache": source}, "there to be recoded"),
    ]
    for sources, words in told:
        _, events = run(job_of(tmp_path, sources, wanted))
        failed = [event.data for event in events if event.type == "partition_failed"][-1]
        assert words in failed["message"]


def test_recoding_needs_no_torch_and_no_dagster() -> None:
    program = f"import sys; import {RecodeRunner.__module__}; print(sorted({{'torch', 'dagster'}} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.stdout == "[]\n", ran.stderr
