"""Data sets through `datasets`: folders, save_to_disk, the hub, and the local cache where the hub does not answer.

What the hub's client reads of the environment it reads on import, so that each question to the hub is a process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kd_assets.contract import RecordRange
from kd_assets.errors import InputError, MissingInputError
from kd_assets.sources.fields import fields_read
from kd_assets.sources.files.find import find_source
from kd_assets.sources.files.found import FoundSource, SourceFile
from kd_assets.sources.files.read import iter_raw
from kd_assets.sources.files.scan import scan_columns
from kd_assets.sources.range_hash import ShardHash
from kd_assets.sources.records import Record, read_records
from kd_assets.sources.spec import DatasetSpec, SourceSpec
from kd_assets_tests.sources.files.conftest import found, lines
from kd_assets_tests.sources.files.hub import Hub, running_hub

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def texts_of(files: tuple[SourceFile, ...]) -> list[str]:
    found = []
    for file in files:
        plain = RecordRange(source="w", path=file.path, file_format="arrow", first_record=0, n_records=0)
        scan = scan_columns(file, columns_read=fields_read(plain))
        records = RecordRange(
            source="w",
            path=file.path,
            file_format=file.file_format,
            first_record=0,
            n_records=scan.n_records,
            file_identity=scan.identity,
        )
        found += [json.loads(record.content)["text"] for record in iter_raw(records)]
    return found


def data_set(tmp_path: Path, name: str, **spec: Any) -> FoundSource:
    source = SourceSpec(name="w", dataset=DatasetSpec(name=name, **spec), licence="x")
    return find_source(source, base_folder=tmp_path, environment={"HF_DATASETS_CACHE": str(tmp_path / "cache")})


# ---------------------------------------------------------------- save_to_disk


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    splits = {
        "train": datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(50)]}),
        "test": datasets.Dataset.from_dict({"text": ["x"]}),
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"), num_shards={"train": 12, "test": 1})
    return tmp_path / "saved"


def test_a_folder_of_save_to_disk_is_its_arrow_files_in_the_order_of_its_rows(saved: Path, tmp_path: Path) -> None:
    expected = [f"t{i}" for i in range(50)]
    result = found(saved / "train")
    assert [file.name for file in result.files] == [f"data-{i:05d}-of-00012.arrow" for i in range(12)]
    assert texts_of(result.files) == expected
    assert data_set(tmp_path, str(saved)).files == result.files
    assert data_set(tmp_path, "./saved/train").files == result.files
    assert texts_of(data_set(tmp_path, "./saved", split="test").files) == ["x"]


def test_which_split_of_several_is_meant_must_be_said(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="holds the splits train, test, and which of them is meant is not said"):
        found(saved)
    with pytest.raises(MissingInputError, match="holds the splits train, test, and 'dev' is not among them"):
        data_set(tmp_path, str(saved), split="dev")


def test_a_file_of_a_saved_data_set_that_vanished_is_named(saved: Path) -> None:
    (saved / "train" / "data-00003-of-00012.arrow").unlink()
    with pytest.raises(MissingInputError, match=r"data-00003-of-00012\.arrow is not there"):
        found(saved / "train")


def test_a_selection_of_rows_is_saved_as_the_rows_that_it_is(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).select([2, 0])
    rows.save_to_disk(str(tmp_path / "selected"))
    assert texts_of(found(tmp_path / "selected").files) == ["c", "a"]


# ---------------------------------------------------------------- a folder of files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_bytes(lines(["a", "b"]))
    (folder / "data" / "test.jsonl").write_bytes(lines(["c"]))
    (folder / "README.md").write_text("---\nlicense: [mit, cc0-1.0]\n---\n")
    return folder


def test_a_folder_is_loaded_as_datasets_loads_it_with_the_licence_of_its_card(folder: Path, tmp_path: Path) -> None:
    result = data_set(tmp_path, "./set")
    assert texts_of(result.files) == ["a", "b"]
    assert result.licence == "mit, cc0-1.0"
    assert result.revision is None
    assert texts_of(data_set(tmp_path, "./set", split="test").files) == ["c"]
    (folder / "data" / "train.jsonl").write_bytes(lines(["a", "b", "d"]))
    assert texts_of(data_set(tmp_path, "./set").files) == ["a", "b", "d"]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"name": "./set", "split": "dev"}, "has no split 'dev'; it has test, train"),
        ({"name": "./set", "split": "train[:10%]"}, "is not the name of one: slices"),
        ({"name": "./set", "config": "de"}, "cannot be read by datasets .*de"),
        ({"name": "./nothing"}, "nothing is no folder"),
        ({"name": "./code"}, "needs code of its own to be read, which is not run"),
        ({"name": "./broken"}, "cannot be read by datasets"),
    ],
)
def test_what_cannot_be_loaded_is_told_with_what_to_do(
    folder: Path, tmp_path: Path, spec: dict[str, Any], reason: str
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text("raise SystemExit('this must not run')\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=reason):
        data_set(tmp_path, **spec)


# ---------------------------------------------------------------- the hub

OLD, NEW = "a" * 40, "b" * 40

ASK = """
import json, sys, dataclasses, os
from pathlib import Path
from kd_assets.sources.files.find import find_source
from kd_assets.sources.spec import DatasetSpec, SourceSpec
from kd_assets.errors import KdAssetsError
spec = SourceSpec(name="w", dataset=DatasetSpec(**json.loads(sys.argv[1])), licence="x")
try:
    found = find_source(spec, base_folder=Path("/"), environment=os.environ)
    print(json.dumps(dataclasses.asdict(found)))
except KdAssetsError as e:
    print(json.dumps({"error": type(e).__name__, "message": str(e)}))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        for commit, texts in ((OLD, ["a"]), (NEW, ["a", "b"])):
            folder = tmp_path / "hub" / commit
            folder.mkdir(parents=True)
            (folder / "train.jsonl").write_bytes(lines(texts))
            (folder / "README.md").write_text("---\nlicense: other\nlicense_name: our-terms\n---\n")
            hub.data_sets.setdefault("some/WebTexts", {})[commit] = folder
        yield hub


def ask(tmp_path: Path, hub: Hub, *, environment: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    home = tmp_path / "hf"
    home.mkdir(exist_ok=True)
    (home / "token").write_text("hf_of_a_file")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **(environment or {})}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps({"name": "some/WebTexts", **spec})],
        env={**kept, **settings, "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    if "files" in answer:
        answer["texts"] = texts_of(tuple(SourceFile(**file) for file in answer["files"]))
    return answer


def test_a_data_set_of_the_hub_is_pinned_to_its_commit_and_taken_from_the_cache_without_the_hub(
    tmp_path: Path, hub: Hub
) -> None:
    answer = ask(tmp_path, hub)
    assert (answer["texts"], answer["revision"], answer["licence"]) == (["a", "b"], NEW, "our-terms")
    assert answer["said"] == []
    assert set(hub.tokens) == {None}, "the token comes of the environment alone, not of a file"
    old = ask(tmp_path, hub, revision=OLD, environment={"HF_TOKEN": "hf_secret"})
    assert (old["texts"], old["revision"]) == (["a"], OLD)
    assert "Bearer hf_secret" in hub.tokens
    assert "hf_secret" not in json.dumps(old)

    offline = {"HF_HUB_OFFLINE": "1"}
    again = ask(tmp_path, hub, revision=NEW, environment=offline)
    assert (again["texts"], again["revision"]) == (["a", "b"], NEW)
    assert again["files"] == answer["files"]
    assert again["said"] == [
        f"data set some/WebTexts: HF_HUB_OFFLINE is set; taken from the local cache, as of commit {NEW}"
    ]
    away = ask(tmp_path, hub, revision=OLD, environment={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert away["texts"] == ["a"]
    assert "the hub cannot be reached (ConnectError); taken from the local cache" in away["said"][0]
    branch = ask(tmp_path, hub, revision="v2", environment=offline)
    assert branch["error"] == "StorageUnreachableError"
    assert "has no copy of v2" in branch["message"]


@pytest.mark.parametrize(
    ("spec", "error", "reason"),
    [
        ({"name": "gated/set"}, "MissingInputError", "is gated: ask for access .* set HF_TOKEN"),
        ({"name": "some/nothing"}, "MissingInputError", "is not on the hub, or HF_TOKEN does not open it"),
        ({"revision": "v9"}, "MissingInputError", "has no revision 'v9'"),
    ],
)
def test_a_data_set_that_the_hub_does_not_give_is_told(
    tmp_path: Path, hub: Hub, spec: dict[str, Any], error: str, reason: str
) -> None:
    import re

    answer = ask(tmp_path, hub, **spec)
    assert answer["error"] == error
    assert re.search(reason, answer["message"])


def test_messages_that_differ_in_their_keys_come_through_datasets_as_they_are(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "train.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (file,) = data_set(tmp_path, "./chats").files
    plain = RecordRange(source="w", path=file.path, file_format="arrow", first_record=0, n_records=1)
    scan = scan_columns(file, columns_read=fields_read(plain))
    (record,) = read_records([dataclasses.replace(plain, file_identity=scan.identity)], ShardHash())
    assert isinstance(record, Record)
    assert record.messages == tuple(messages)
