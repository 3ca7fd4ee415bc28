"""Instructions, prompts with their completions, and preferences."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kd_assets.errors import BadRecordError, FieldNotUnderstoodError, RecipeError
from kd_assets_tests.sources.records.parsing import WHERE, parsed


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# ---------------------------------------------------------------- instruction


def test_an_instruction_with_its_input_and_output_becomes_a_chat() -> None:
    record = parsed({"instruction": "Add.", "input": "1 2", "output": "3", "meta": 1})
    assert record.messages == (user("Add.\n\n1 2"), assistant("3"))
    assert record.passed_over == ("meta",)


@pytest.mark.parametrize("about", [{}, {"input": ""}, {"input": None}])
def test_an_instruction_without_input_stands_alone(about: dict[str, Any]) -> None:
    assert parsed({"instruction": "Hi.", "output": "Hello.", **about}).messages == (user("Hi."), assistant("Hello."))


def test_an_instruction_may_have_a_system_prompt_and_fields_of_other_names() -> None:
    record = parsed(
        {"question": "Add.", "context": "1 2", "answer": "3", "system_prompt": "Be brief."},
        fields={"instruction": "question", "input": "context", "output": "answer", "system": "system_prompt"},
    )
    assert record.messages == ({"role": "system", "content": "Be brief."}, user("Add.\n\n1 2"), assistant("3"))
    assert record.passed_over == ()


@pytest.mark.parametrize("name", ["instruction", "input", "output"])
def test_a_number_where_a_string_belongs_is_a_bad_record(name: str) -> None:
    record = {"instruction": "Add.", "input": "1 2", "output": "3", name: 3}
    with pytest.raises(BadRecordError, match=rf"^{WHERE}: '{name}' is a number; expected a string"):
        parsed(record)


# ---------------------------------------------------------------- prompt and completion


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_two_strings_are_one_text_whose_prompt_is_not_learned(answer: str) -> None:
    record = parsed({"prompt": "2 + 2 =", answer: " 4"})
    assert (record.text, record.messages, record.n_prompt_characters) == ("2 + 2 = 4", None, 7)
    assert record.passed_over == ()


def test_two_lists_of_messages_are_one_chat_whose_prompt_is_not_learned() -> None:
    prompt = [user("a"), assistant("b"), user("c")]
    record = parsed({"prompt": prompt, "completion": [assistant("d")]})
    assert (record.messages, record.n_prompt_messages) == ((*prompt, assistant("d")), 3)


def test_a_string_beside_messages_is_a_message() -> None:
    record = parsed({"prompt": [user("a")], "completion": "b"})
    assert (record.messages, record.n_prompt_messages) == ((user("a"), assistant("b")), 1)
    record = parsed({"prompt": "a", "completion": [assistant("b")]})
    assert (record.messages, record.n_prompt_messages) == ((user("a"), assistant("b")), 1)


def test_a_system_prompt_beside_is_of_the_prompt() -> None:
    record = parsed({"prompt": [user("a")], "completion": "b", "system": "Be brief."})
    assert record.messages is not None
    assert (record.messages[0]["role"], record.n_prompt_messages) == ("system", 2)


def test_a_system_prompt_beside_two_strings_has_no_place_and_is_refused_unless_it_is_ignored() -> None:
    given = {"prompt": "a", "completion": "b", "system": "Be brief."}
    with pytest.raises(FieldNotUnderstoodError, match=r"the text has 'system'.*ignore_fields: \[system\] of source"):
        parsed(given)
    assert parsed(given, ignore_fields=("system",)).passed_over == ("system",)


# ---------------------------------------------------------------- chosen and rejected


def test_a_preference_must_be_chosen_from_by_the_recipe() -> None:
    with pytest.raises(RecipeError, match=rf"^{WHERE}: .*'chosen' and 'rejected'.*prefer: chosen"):
        parsed({"prompt": "a", "chosen": "b", "rejected": "c"})


@pytest.mark.parametrize(("prefer", "text", "left"), [("chosen", "ab", "rejected"), ("rejected", "ac", "chosen")])
def test_the_preferred_of_two_strings_follows_the_prompt_and_the_other_is_counted(
    prefer: str, text: str, left: str
) -> None:
    record = parsed({"prompt": "a", "chosen": "b", "rejected": "c"}, prefer=prefer)
    assert (record.text, record.n_prompt_characters, record.passed_over) == (text, 1, (left,))


def test_a_preference_without_a_prompt_is_learned_whole() -> None:
    record = parsed({"chosen": "b", "rejected": "c"}, prefer="chosen")
    assert (record.text, record.n_prompt_characters) == ("b", 0)
    record = parsed({"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}, prefer="chosen")
    assert (record.messages, record.n_prompt_messages) == ((user("a"), assistant("b")), 0)


@pytest.mark.parametrize("prompt", ["a", [{"role": "user", "content": "a"}]])
@pytest.mark.parametrize(
    "chosen", ["b", [{"role": "assistant", "content": "b"}], [user("a"), {"role": "assistant", "content": "b"}]]
)
def test_a_prompt_that_the_answer_repeats_stands_once(prompt: Any, chosen: Any) -> None:
    record = parsed({"prompt": prompt, "chosen": chosen, "rejected": "c"}, prefer="chosen")
    if isinstance(prompt, str) and isinstance(chosen, str):
        assert record.text == "ab"
    else:
        assert (record.messages, record.n_prompt_messages) == ((user("a"), assistant("b")), 1)


def test_an_answer_of_the_prompt_alone_is_a_bad_record() -> None:
    with pytest.raises(BadRecordError, match="'chosen' has nothing after the messages of 'prompt'"):
        parsed({"prompt": [user("a")], "chosen": [user("a")], "rejected": "c"}, prefer="chosen")


@pytest.mark.parametrize("field", ["completion", "response", "chosen"])
def test_messages_in_columns_of_json_text_are_a_chat_as_tables_have_them(field: str) -> None:
    asked, answered = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    prefer: dict[str, Any] = {"prefer": "chosen"} if field == "chosen" else {}
    record = parsed({"prompt": json.dumps([asked]), field: json.dumps([answered])}, **prefer)
    assert record.messages == (asked, answered)
    assert record.n_prompt_messages == 1


@pytest.mark.parametrize("text", ['[{"a": 1}]', "[{not JSON", '[{"role": "user"}, 3]'])
def test_other_json_in_a_prompt_or_an_answer_is_text(text: str) -> None:
    assert parsed({"prompt": text, "completion": text}).text == text + text
