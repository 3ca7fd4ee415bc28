"""The input hash of a shard changes when its documents would, and stays what it was for what could be said before."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

from kd_assets.contract import RecordRange
from kd_assets.sources.range_hash import ShardHash, hash_by_identity, shard_hash
from kd_assets.sources.records import Record, read_records
from kd_assets_tests.sources.records.parsing import parsed, range_of

LINES = ['{"text": "a"}', '{"text": "b"}', '{"text": "a"}']


@pytest.fixture
def whole(tmp_path: Path) -> RecordRange:
    path = tmp_path / "web.jsonl"
    path.write_text("\n".join(LINES))
    return range_of(path=str(path), n_records=3)


def hash_of(*ranges: RecordRange) -> str:
    found = ShardHash()
    list(read_records(ranges, found))
    return found.hexdigest()


def test_the_hash_is_that_of_the_first_version(whole: RecordRange) -> None:
    first = '["web", 0, "text", "messages"]\n' + "".join(f"{line}\n" for line in LINES)
    assert hash_of(whole) == hashlib.sha256(first.encode()).hexdigest()
    ignoring = dataclasses.replace(whole, ignore_fields=("tools",))
    first = first.replace('"messages"]', '"messages", "id", ["tools"]]')
    assert hash_of(ignoring) == hashlib.sha256(first.encode()).hexdigest()


@pytest.mark.parametrize(
    "used",
    [
        {"shape": "text"},
        {"fields": {"tools": "apis"}},
        {"prefer": "chosen"},
        {"roles": {"narrator": "system"}},
        {"file_name": "a.jsonl"},
        {"control_tokens": "text"},
        {"dropped": (2,)},
        {"dropped": (0,)},
    ],
)
def test_whatever_is_used_of_what_came_later_is_in_the_hash(whole: RecordRange, used: dict[str, Any]) -> None:
    hashes = {hash_of(whole), hash_of(dataclasses.replace(whole, **used))}
    assert len(hashes) == 2
    assert hash_of(dataclasses.replace(whole, dropped=(0,))) != hash_of(dataclasses.replace(whole, dropped=(2,)))


@pytest.mark.parametrize("elsewhere", [{"seekable_path": "/x"}, {"first_line": 1}])
def test_what_documents_are_not_made_of_is_not_in_the_hash(whole: RecordRange, elsewhere: dict[str, Any]) -> None:
    assert hash_of(dataclasses.replace(whole, **elsewhere)) == hash_of(whole)


def test_the_order_of_fields_and_roles_in_the_recipe_changes_nothing(whole: RecordRange) -> None:
    one = dataclasses.replace(whole, fields={"tools": "a", "system": "b"})
    other = dataclasses.replace(whole, fields={"system": "b", "tools": "a"})
    assert hash_of(one) == hash_of(other)


def test_records_that_are_left_out_are_passed_by_and_the_others_keep_their_names(whole: RecordRange) -> None:
    records = list(read_records([dataclasses.replace(whole, dropped=(1,))], ShardHash()))
    assert [(r.number, r.document_id) for r in records if isinstance(r, Record)] == [
        (0, "web-000000000"),
        (2, "web-000000002"),
    ]


def test_a_shard_of_several_ranges_is_named_by_the_hashes_of_each(whole: RecordRange) -> None:
    """So a plan of several ranges a shard can be made source by source."""
    one, two = dataclasses.replace(whole, n_records=1), dataclasses.replace(whole, source="other")
    assert hash_of(one, two) == shard_hash([hash_of(one), hash_of(two)]) != hash_of(two, one)


def test_a_range_of_a_file_that_is_not_read_is_hashed_without_its_records(whole: RecordRange) -> None:
    by_file = dataclasses.replace(whole, file_identity="f00", hashed="file")
    found = hash_by_identity(by_file)
    for other in ({"file_identity": "f01"}, {"n_records": 2}, {"first_record": 1}, {"dropped": (1,)}):
        assert hash_by_identity(dataclasses.replace(by_file, **other)) != found


# ---------------------------------------------------------------- sample ids


def test_a_sample_is_the_same_wherever_it_lies() -> None:
    one = parsed({"id": "x", "text": "a", "url": "u"}, path="/elsewhere/b.jsonl", file_name="b.jsonl")
    other = parsed({"body": "a"}, text_field="body")
    assert one.sample_id == other.sample_id == hashlib.sha256(b'["web",{"text":"a"}]').hexdigest()[:32]


def test_null_and_absent_are_one_sample_as_in_columns() -> None:
    call = {"name": "f", "arguments": {"a": None, "b": 1}}
    chat = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    row = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"b": 1}}], "name": None}]
    assert parsed({"messages": chat}).sample_id == parsed({"messages": row}).sample_id


def test_ignored_fields_are_not_in_the_id_and_all_that_is_used_is() -> None:
    chat = [{"role": "user", "content": "q"}]
    ids = {
        parsed({"messages": chat}).sample_id,
        parsed({"messages": chat, "tools": [{"name": "f"}]}).sample_id,
        parsed({"messages": chat, "documents": [{"text": "x"}]}).sample_id,
        parsed({"messages": [{**chat[0], "name": "ada"}]}).sample_id,
        parsed({"messages": chat}, source="books").sample_id,
        parsed({"prompt": chat, "completion": "a"}).sample_id,
        parsed({"messages": [*chat, {"role": "assistant", "content": "a"}]}).sample_id,
    }
    assert len(ids) == 7
    ignoring = parsed({"messages": [{**chat[0], "weight": 1}]}, ignore_fields=("weight",))
    assert ignoring.sample_id == parsed({"messages": chat}).sample_id
