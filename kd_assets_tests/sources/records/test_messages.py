"""Messages reach the chat template whole; what no chat can be is a bad record that names the message and the key."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kd_assets.errors import BadRecordError
from kd_assets_tests.sources.records.parsing import WHERE, parsed

USER = {"role": "user", "content": "What is the weather in Oslo?"}
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def test_every_key_of_a_message_that_has_a_value_is_kept() -> None:
    answer = {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Hm.",
        "thinking": "Hm?",
        "name": "ada",
        "odd": [1],
    }
    record = parsed({"messages": [USER, answer]})
    assert record.messages == (USER, answer)
    assert record.passed_over == ()


def test_a_key_that_is_null_is_not_there_since_columns_cannot_tell_them_apart() -> None:
    record = parsed({"messages": [{**USER, "name": None, "tool_calls": None}]})
    assert record.messages == (USER,)


def test_a_chat_with_calls_and_results_of_tools_is_kept_as_it_is() -> None:
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "7 °C", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "It is 7 °C."},
    ]
    assert parsed({"messages": messages}).messages == tuple(messages)


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}, {}, "{}", None])
def test_arguments_are_kept_as_an_object_or_as_json_text(arguments: Any) -> None:
    call = {"name": "weather", "arguments": arguments}
    record = parsed({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert record.messages is not None
    assert record.messages[1]["tool_calls"] == [call]


def test_calls_in_a_column_of_json_text_are_parsed() -> None:
    text = '[{"name": "weather", "arguments": {"city": "Oslo"}}]'
    record = parsed({"messages": [USER, {"role": "assistant", "tool_calls": text}]})
    assert record.messages is not None
    assert record.messages[1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}],
    }


def test_an_empty_list_of_calls_is_no_call() -> None:
    assert parsed({"messages": [{**USER, "tool_calls": []}]}).messages == (USER,)


def test_content_that_is_missing_is_null_where_the_message_says_something_else() -> None:
    record = parsed({"messages": [USER, {"role": "assistant", "reasoning_content": "Hm."}]})
    assert record.messages is not None
    assert record.messages[1] == {"role": "assistant", "content": None, "reasoning_content": "Hm."}


def test_content_may_be_a_list_of_parts() -> None:
    parts = [{"type": "text", "text": "Look:"}, {"type": "image", "url": "x.png", "text": None}]
    record = parsed({"messages": [{"role": "user", "content": parts}]})
    assert record.messages == (
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image", "url": "x.png"}]},
    )


def test_a_key_that_the_source_ignores_is_left_out_of_its_messages_and_counted() -> None:
    record = parsed({"messages": [{**USER, "weight": 0, "meta": {}}]}, ignore_fields=("weight",))
    assert record.messages == ({**USER, "meta": {}},)
    assert (record.ignored, record.passed_over) == (("weight",), ("messages.weight",))


def test_the_source_explains_its_own_words_for_roles() -> None:
    record = parsed({"messages": [{"role": "narrator", "content": "x"}, USER]}, roles={"narrator": "system"})
    assert record.messages == ({"role": "system", "content": "x"}, USER)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "human", "content": "x"}, r"role is 'human'; expected one of system.* roles of source 'web'"),
        ({"role": "user", "content": None}, "content is null; expected a string"),
        ({"role": "user", "content": None, "name": "ada"}, "content is null"),
        ({"role": "user"}, "content is null"),
        ({"role": "user", "content": 3}, "content is a number"),
        ({"role": "user", "content": {"text": "x"}}, "content is an object"),
        ({"role": "user", "content": []}, "content is a list without parts"),
        ({"role": "user", "content": ["x"]}, r"content\[0\] is a string; expected a part"),
        ({"role": "user", "content": [{"text": "x"}]}, r"content\[0\]\.type is null"),
        ({"role": "user", "content": [{"type": "text"}]}, r"content\[0\]\.text is null; expected a string"),
        ({"role": "user", "content": [{"type": "text", "text": "\ud800"}]}, r"content\[0\]\.text holds half a surr"),
        ({"role": "user", "content": "x", "odd": {"a": ["\ud800"]}}, r"odd holds half a surrogate pair"),
        ({"role": "assistant", "tool_calls": "weather()"}, "tool_calls is text that is not JSON"),
        ({"role": "assistant", "tool_calls": {"name": "f"}}, "tool_calls is an object; expected a list"),
        ({"role": "assistant", "tool_calls": ["f"]}, r"tool_calls\[0\] is a string"),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, r"tool_calls\[0\] has no name of a function"),
        ({"role": "assistant", "tool_calls": [{"function": "f"}]}, r"tool_calls\[0\]\.function has no name"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{'city': 1}"}]},
            r"tool_calls\[0\]\.arguments is text that is not JSON",
        ),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}, r"arguments is a list; expected"),
    ],
)
def test_a_message_that_is_none_is_a_bad_record_that_says_why(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecordError, match=rf"^{WHERE}: messages\[1\]\.?.*{reason}"):
        parsed({"messages": [USER, message]})


@pytest.mark.parametrize(("n_levels", "is_bad"), [(100, False), (102, True), (900, True), (100_000, True)])
def test_what_is_nested_too_deeply_is_a_bad_record(n_levels: int, is_bad: bool) -> None:
    line = '{"messages": [{"role": "user", "content": "x", "odd": ' + "[" * n_levels + "]" * n_levels + "}]}"
    if not is_bad:
        parsed(line)
        return
    with pytest.raises(BadRecordError, match="nested too deeply"):
        parsed(line)


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_messages_in_a_column_of_json_text_are_parsed_as_tables_have_them(field: str) -> None:
    messages = [USER, {"role": "assistant", "content": "7 °C"}]
    assert parsed({field: json.dumps(messages)}).messages == tuple(messages)
    with pytest.raises(BadRecordError, match=rf"'{field}' is text that is not JSON .*expected a list"):
        parsed({field: "[{'role': 'user'}]"})
