"""What stands beside a chat: tools, a system prompt, variables of the template, and what nothing here reads."""

from __future__ import annotations

from typing import Any

import pytest

from kd_assets.errors import BadRecordError, FieldNotUnderstoodError
from kd_assets_tests.sources.records.parsing import WHERE, parsed

USER = {"role": "user", "content": "q"}
CHAT = [USER, {"role": "assistant", "content": "a"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("beside", "tools"),
    [
        ({"tools": [TOOL]}, (TOOL,)),
        ({"tools": '[{"name": "f"}]'}, ({"name": "f"},)),
        ({"tools": []}, None),
        ({"tools": "[]"}, None),
        ({"tools": None}, None),
        ({"functions": [{"name": "f", "parameters": {}}]}, (TOOL,)),
        ({"functions": '[{"name": "f", "parameters": {}}]'}, (TOOL,)),
        ({"functions": [TOOL]}, (TOOL,)),
    ],
)
def test_tools_are_given_to_the_template(beside: dict[str, Any], tools: tuple[Any, ...] | None) -> None:
    record = parsed({"messages": CHAT, **beside})
    assert (record.tools, record.messages, record.passed_over) == (tools, tuple(CHAT), ())


def test_tools_in_a_column_of_another_name_are_found_by_fields() -> None:
    record = parsed({"messages": CHAT, "apis": [TOOL]}, fields={"tools": "apis"})
    assert (record.tools, record.passed_over) == ((TOOL,), ())


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"tools": "f(x)"}, "'tools' is text that is not JSON"),
        ({"tools": "{}"}, "'tools' is an object; expected a list"),
        ({"tools": 3}, "'tools' is a number; expected a list"),
        ({"tools": ["f"]}, r"tools\[0\] is a string; expected a tool"),
        ({"tools": [TOOL], "functions": [TOOL]}, "both 'tools' and 'functions': leave one out with ignore_fields"),
        ({"documents": "x"}, "'documents' is text that is not JSON"),
        ({"chat_template_kwargs": []}, "'chat_template_kwargs' is a list; expected an object"),
        ({"chat_template_kwargs": {"messages": []}}, "has 'messages', which is no variable that a record can say"),
        ({"system": 3}, "'system' is a number; expected a string"),
        ({"tools": [{"name": "\ud800"}]}, "half a surrogate pair"),
    ],
)
def test_what_stands_beside_and_is_not_what_it_should_be_is_a_bad_record(beside: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecordError, match=rf"^{WHERE}: .*{reason}"):
        parsed({"messages": CHAT, **beside})


def test_ignored_tools_are_left_out_and_counted() -> None:
    record = parsed({"messages": CHAT, "tools": [TOOL]}, ignore_fields=("tools",))
    assert (record.tools, record.passed_over) == (None, ("tools",))


def test_variables_of_the_template_are_the_records_documents_and_what_its_kwargs_say() -> None:
    record = parsed(
        {
            "messages": CHAT,
            "documents": [{"title": "t", "text": "x"}],
            "chat_template_kwargs": '{"enable_thinking": false, "date": null}',
        }
    )
    assert record.variables == {"documents": [{"title": "t", "text": "x"}], "enable_thinking": False}


def test_a_system_prompt_beside_the_messages_is_the_first_of_them() -> None:
    record = parsed({"messages": CHAT, "system": "Be brief."})
    assert record.messages == ({"role": "system", "content": "Be brief."}, *CHAT)


def test_of_two_system_prompts_one_must_be_left_out_unless_they_are_the_same() -> None:
    chat = [{"role": "system", "content": "A"}, *CHAT]
    assert parsed({"messages": chat, "system": "A"}).messages == tuple(chat)
    with pytest.raises(BadRecordError, match=r"'system' is another system prompt .*ignore_fields: \[system\] of sou"):
        parsed({"messages": chat, "system": "B"})
    record = parsed({"messages": chat, "system": "B"}, ignore_fields=("system",))
    assert (record.messages, record.passed_over) == (tuple(chat), ("system",))


@pytest.mark.parametrize("name", ["tool_choice", "function_call", "chat_template"])
def test_a_field_that_no_template_is_given_is_refused_unless_it_is_ignored(name: str) -> None:
    record = {"messages": CHAT, name: "auto"}
    with pytest.raises(FieldNotUnderstoodError) as e:
        parsed(record)
    assert str(e.value).startswith(f"{WHERE}: the chat has '{name}', which")
    assert str(e.value).endswith(f"ignore_fields: [{name}] of source 'web'")
    assert not isinstance(e.value, BadRecordError), "on_bad_record: skip would pass over a whole source"
    assert parsed(record, ignore_fields=(name,)).passed_over == (name,)
    assert parsed({"messages": CHAT, name: None}).passed_over == ()


def test_every_field_that_is_not_understood_is_named_at_once() -> None:
    with pytest.raises(FieldNotUnderstoodError, match=r"ignore_fields: \[tool_choice, chat_template\] of source 'web'"):
        parsed({"messages": CHAT, "chat_template": "x", "tool_choice": "auto", "url": "x"})


def test_fields_beside_a_text_are_counted() -> None:
    assert parsed({"text": "rendered", "tools": [1], "tool_choice": None}).passed_over == ("tools", "tool_choice")


def test_what_a_plan_of_an_earlier_version_did_not_read_of_a_row_is_refused_unless_it_is_ignored() -> None:
    with pytest.raises(
        FieldNotUnderstoodError, match=r"has 'messages\.tool_calls', .* shard_plan again.*\[tool_calls\]"
    ):
        parsed({"messages": CHAT}, others=("messages.tool_calls",))
    record = parsed({"messages": CHAT}, others=("messages.tool_calls",), ignore_fields=("tool_calls",))
    assert record.passed_over == ("messages.tool_calls",)
