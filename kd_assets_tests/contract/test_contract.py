"""The seam: job files and event lines, whole, half-written, foreign and hostile."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from kd_assets.contract import (
    Event,
    JobFile,
    Output,
    RecordRange,
    Reporter,
    ShardsParams,
    TeacherParams,
    TopkParams,
    WorkUnit,
    event_file,
    parse_event,
    read_events,
    read_job,
)
from kd_assets.errors import ContractError


def a_job(**changes: object) -> JobFile:
    unit = WorkUnit(
        partition_key="demo-00000",
        n_tokens=7,
        records=(RecordRange(source="s", path="/x", file_format="jsonl", first_record=0, n_records=2, byte_offset=0),),
        inputs={"shards_manifest": ("/store/a",)},
        outputs=(
            Output(asset="topk_cache", path="/o", variant="v", fingerprint="f", identity={"a": [1, {"b": None}]}),
        ),
    )
    fields: dict[str, object] = {
        "kind": "teacher",
        "recipe": "demo",
        "key": "k" * 32,
        "recipe_folder": "/store/demo",
        "events_folder": "/jobs/events",
        "tasks": ((0,),),
        "units": (unit,),
        "shards": ShardsParams(tokenizer="/t", tokenizer_fingerprint="x", max_length=9),
        "teacher": TeacherParams(
            model="/m", weights_fingerprint="w", tokenizer_fingerprint="x", topk=TopkParams(k=4, max_length=8)
        ),
    }
    return JobFile(**{**fields, **changes})  # type: ignore[arg-type]


def written(path: Path, job: JobFile) -> dict[str, object]:
    path.write_text(job.to_json())
    return dict(json.loads(path.read_text()))


def test_a_job_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    written(tmp_path / "job.json", a_job())
    assert read_job(tmp_path / "job.json") == a_job()


def test_a_job_file_of_another_contract_version_is_refused_with_both_versions(tmp_path: Path) -> None:
    raw = written(tmp_path / "job.json", a_job())
    (tmp_path / "job.json").write_text(json.dumps(raw | {"contract_version": 1}))
    with pytest.raises(ContractError, match=r"version 1, this worker reads version 5"):
        read_job(tmp_path / "job.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"kind": "coffee"}, r"kind: expected .*found 'coffee'"),
        ({"tasks": [["0"]]}, r"tasks\[0\]\[0\]: expected int, found '0'"),
        ({"units": [{"partition_key": "p"}]}, "lacks field 'outputs'"),
        ({"key": None}, "key: expected str, found None"),
    ],
)
def test_a_wrong_field_of_a_job_file_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    raw = written(tmp_path / "job.json", a_job())
    (tmp_path / "job.json").write_text(json.dumps(raw | change))
    with pytest.raises(ContractError, match=message):
        read_job(tmp_path / "job.json")


def test_a_missing_job_file_and_one_that_is_no_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"no job file at .*job\.json"):
        read_job(tmp_path / "job.json")
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(ContractError, match="is not JSON"):
        read_job(tmp_path / "job.json")


def test_a_task_the_job_does_not_have_is_refused() -> None:
    with pytest.raises(ContractError, match=r"tasks 0 to 0.*started as task 3"):
        a_job().units_of_task(3)


def test_a_half_written_event_line_is_left_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "task-00000.jsonl"
    line = Event(type="warning", time=1.0, task=0, attempt=0, data={"message": "ü"}).to_line()
    path.write_text(line + line[:20])
    ((offset, event),) = read_events(path)
    assert isinstance(event, Event)
    assert event.data == {"message": "ü"}
    assert list(read_events(path, offset)) == []
    with path.open("a") as f:
        f.write(line[20:])
    assert [e for _, e in read_events(path, offset)] == [event]


def test_events_can_be_read_again_from_the_beginning(tmp_path: Path) -> None:
    with Reporter(tmp_path / "events" / "task-00000.jsonl", stream=io.StringIO()) as report:
        report.emit("task_started", n=1)
        report.emit("task_finished", status="done")
    first = [e for _, e in read_events(tmp_path / "events" / "task-00000.jsonl")]
    assert first == [e for _, e in read_events(tmp_path / "events" / "task-00000.jsonl")]
    assert len(first) == 2


def test_an_attempt_killed_inside_a_write_costs_its_half_line_and_nothing_else(tmp_path: Path) -> None:
    path = event_file(tmp_path, 0)
    with Reporter(path, stream=io.StringIO()) as report:
        report.emit("warning", message="first")
    with path.open("a") as f:
        f.write('{"v": 1, "type": "commi')
    with Reporter(path, attempt=1, stream=io.StringIO()) as report:
        report.emit("warning", message="second")
    events = [e for _, e in read_events(path)]
    assert [e.data["message"] for e in events if isinstance(e, Event)] == ["first", "second"]
    assert [e for e in events if isinstance(e, str)] == ['{"v": 1, "type": "commi']


def test_numbers_that_json_lacks_become_null_in_an_event() -> None:
    line = Event(
        type="progress", time=0.0, task=0, attempt=0, data={"loss": float("nan"), "x": [float("inf")]}
    ).to_line()
    assert parse_event(line).data == {"loss": None, "x": [None]}


@pytest.mark.parametrize("line", ["", "[]", "null", '{"v": 99}', '{"v": 4, "type": "unheard_of"}', "\x00", "{" * 5000])
def test_a_line_that_is_no_event_is_refused_and_nothing_worse(line: str) -> None:
    with pytest.raises(ContractError):
        parse_event(line)


def test_an_absent_event_file_has_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / "none.jsonl")) == []
