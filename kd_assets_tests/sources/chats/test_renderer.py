"""What becomes of chats under templates of every kind, read off the texts."""

from __future__ import annotations

from typing import Any

import pytest

from kd_assets.errors import BadRecordError, FieldNotUnderstoodError, RecipeError
from kd_assets.sources.chats import ChatRenderer
from kd_assets.sources.records import Message
from kd_assets_tests.sources.chats.conversations import CALL, TOOL, assistant, chat_of, system, tokenizer_with, user

TURN = "{{ '<|im_start|>' + m.role + '\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{{ m.content }}<|im_end|>{% endfor %}" + PROMPT
FORGETFUL = PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
CALLING = PLAIN.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}ARGS{% endfor %}"
)


def rendered(template: str, *messages: Message, fields: Any = None, **recipe: Any) -> list[tuple[str, list[str]]]:
    """Text and what is learned of it, of each document."""
    documents = ChatRenderer(tokenizer_with(template), **recipe).render(chat_of(*messages, **(fields or {})))
    return [(d.text, [d.text[a:b] for a, b in d.assistant_spans]) for d in documents]


def said(template: str, *messages: Message, **options: Any) -> list[list[str]]:
    return [spans for _, spans in rendered(template, *messages, **options)]


def text_of(template: str, *messages: Message, **options: Any) -> str:
    ((text, _),) = rendered(template, *messages, **options)
    return text


# ---------------------------------------------------------------- a document a turn

THOUGHTS = (user("q"), assistant("<think>hm</think>a"), user("q2"), assistant("<think>ho</think>b"))


def test_under_a_template_that_rewrites_history_each_turn_is_a_document_as_the_model_saw_it() -> None:
    one, two = rendered(FORGETFUL, *THOUGHTS, user("q3"))
    assert one == (
        "<|im_start|>user\nq<|im_end|><|im_start|>assistant\n<think>hm</think>a<|im_end|>",
        ["<think>hm</think>a<|im_end|>"],
    )
    assert two == (
        "<|im_start|>user\nq<|im_end|><|im_start|>assistant\na<|im_end|><|im_start|>user\nq2<|im_end|>"
        "<|im_start|>assistant\n<think>ho</think>b<|im_end|>",
        ["<think>ho</think>b<|im_end|>"],
    )


def test_the_recipe_may_ask_for_the_last_turn_alone_and_the_others_are_counted() -> None:
    (document,) = ChatRenderer(tokenizer_with(FORGETFUL), turns="last").render(chat_of(*THOUGHTS))
    ((start, end),) = document.assistant_spans
    assert document.text[start:end] == "<think>ho</think>b<|im_end|>"
    assert document.unlearned_turns == 1


def test_a_template_that_keeps_history_makes_one_document_however_turns_is_set() -> None:
    for turns in ("all", "last", "refuse"):
        assert said(PLAIN, *THOUGHTS, turns=turns) == [["<think>hm</think>a<|im_end|>", "<think>ho</think>b<|im_end|>"]]


def test_assistant_messages_around_a_tools_result_are_two_turns() -> None:
    chat = (
        user("q"),
        assistant("<think>x</think>", tool_calls=[CALL]),
        {"role": "tool", "content": "r"},
        assistant("a"),
    )
    forgetful = CALLING.replace("m.content }", "m.content if loop.last else m.content.split('</think>')[-1] }")
    assert said(forgetful, *chat) == [["<think>x</think>weatherARGS<|im_end|>"], ["a<|im_end|>"]]


def test_consecutive_assistant_messages_are_each_learned_once() -> None:
    assert said(PLAIN, user("q"), assistant("a"), assistant("b")) == [["a<|im_end|>", "b<|im_end|>"]]


def test_control_tokens_that_end_each_rendering_are_learned_at_the_end_alone() -> None:
    ending = PLAIN.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    assert said(ending, user("q"), assistant("a"), user("q"), assistant("b")) == [["a<|im_end|>", "b<|im_end|></s>"]]


def test_a_prompt_that_changes_once_the_answer_is_there_is_put_before_the_answer() -> None:
    """Mistral's templates write the system message before the last message, where that is the user's."""
    template = (
        "{{ bos_token }}{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST]"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    assert rendered(template, system("Be brief."), user("q"), assistant("a")) == [
        ("<s>[INST]Be brief. q[/INST] a</s>", [" a</s>"])
    ]


def test_the_first_messages_are_not_learned_where_the_record_says_so() -> None:
    chat = (user("q"), assistant("shot"), user("q2"), assistant("a"))
    marked = PLAIN.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    assert said(PLAIN, *chat, fields={"n_prompt_messages": 2}) == [["a<|im_end|>"]]
    assert said(marked, *chat, fields={"n_prompt_messages": 3}) == [["a"]]
    assert said(FORGETFUL, *THOUGHTS, fields={"n_prompt_messages": 2}) == [["<think>ho</think>b<|im_end|>"]]


# ---------------------------------------------------------------- what a message carries


@pytest.mark.parametrize("field", ["weight", "train", "tool_call_id", "mood"])
def test_what_the_template_never_reads_of_a_message_is_an_error_that_says_how_to_leave_it_out(field: str) -> None:
    chat = (user("q"), assistant("a", **{field: 0}))
    with pytest.raises(
        FieldNotUnderstoodError, match=rf"web\.jsonl:1: .*'{field}' \(messages\[1\] of role 'assistant'"
    ):
        rendered(PLAIN, *chat)
    with pytest.raises(FieldNotUnderstoodError, match=rf"ignore_fields: \[{field}\] of source 'web'"):
        rendered(PLAIN, *chat)
    assert said(PLAIN, *chat, fields={"ignored": (field,)}) == [["a<|im_end|>"]]


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_a_key_without_a_value_is_as_good_as_none(empty: Any) -> None:
    assert said(PLAIN, user("q"), assistant("a", tool_calls=empty)) == [["a<|im_end|>"]]


def test_reasoning_goes_by_the_name_that_the_template_has_for_it() -> None:
    thinking = PLAIN.replace("{{ m.content }}", "{{ '[' + m.thinking + ']' if m.thinking }}{{ m.content }}")
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert said(thinking, user("q"), assistant("a", **{name: "hm"})) == [["[hm]a<|im_end|>"]]


@pytest.mark.parametrize("template", ["{{ m | tojson }}", "{% for k in m %}{{ m[k] }}{% endfor %}", "{{ m.items() }}"])
def test_a_template_that_takes_messages_whole_reads_every_key(template: str) -> None:
    assert "happy" in text_of(PLAIN.replace("{{ m.content }}", template), user("q"), assistant("a", mood="happy"))


@pytest.mark.parametrize("given", [{"city": "Oslo"}, '{"city": "Oslo"}'])
@pytest.mark.parametrize(
    ("way", "written"),
    [
        ("{{ c.function.arguments | tojson }}", '{"city": "Oslo"}'),
        ("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}", "city=Oslo"),
        ("{{ '' + c.function.arguments }}", '{"city": "Oslo"}'),
        (
            "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
            "{{ c.function.arguments | tojson }}{% endif %}",
            '{"city": "Oslo"}',
        ),
    ],
)
def test_arguments_of_a_call_have_the_form_that_the_template_takes(way: str, written: str, given: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": given}}
    assert said(CALLING.replace("ARGS", way), user("q"), assistant("", tool_calls=[call])) == [
        [f"weather{written}<|im_end|>"]
    ]


def test_content_that_is_null_stays_null_where_the_template_knows_that() -> None:
    knows = CALLING.replace("{{ m.content }}", "{% if m.content is none %}[none]{% else %}{{ m.content }}{% endif %}")
    assert said(knows, user("q"), assistant(None, tool_calls=[CALL])) == [["[none]weatherARGS<|im_end|>"]]


@pytest.mark.parametrize("written", ["{{ '' + m.content }}", "{{ m.content }}", "{{ m.content | trim }}"])
def test_content_that_is_null_is_empty_where_the_template_fails_on_it_or_spells_it(written: str) -> None:
    template = CALLING.replace("{{ m.content }}", written)
    (document,) = ChatRenderer(tokenizer_with(template)).render(chat_of(user("q"), assistant(None, tool_calls=[CALL])))
    assert document.text.endswith("assistant\nweatherARGS<|im_end|>")
    assert document.emptied_null_content


PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
TAKES_PARTS = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}({{ p.text }}){% endfor %}{% endif %}",
)


def test_parts_of_text_go_to_the_template_as_they_are_where_it_takes_parts_and_joined_where_not() -> None:
    chat = (user(PARTS), assistant(PARTS))
    assert said(TAKES_PARTS, *chat) == [["(one )(two)<|im_end|>"]]
    assert said(PLAIN, *chat) == [["one two<|im_end|>"]]


def test_text_becomes_a_part_for_a_template_that_takes_nothing_else() -> None:
    only_parts = PLAIN.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    assert said(only_parts, user("question"), assistant("answer")) == [["answer<|im_end|>"]]


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"type": "image", "image": "x.png"}, "part of type 'image', and only text is learned here"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "part of type 'image_url', and only text"),
        ({"type": "refusal", "refusal": "no"}, "part of type 'refusal'"),
    ],
)
def test_a_part_that_is_no_text_is_an_error_that_names_its_type(part: Any, error: str) -> None:
    for template in (PLAIN, TAKES_PARTS):
        with pytest.raises(BadRecordError, match=error):
            rendered(template, user([*PARTS, part]), assistant("a"))


def test_a_message_that_the_template_does_not_write_is_counted() -> None:
    deaf = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}")
    chat = chat_of({"role": "developer", "content": "Be brief."}, user("q"), assistant("a"))
    (document,) = ChatRenderer(tokenizer_with(deaf)).render(chat)
    assert document.unrendered_messages == 1


# ---------------------------------------------------------------- the recipe's word


WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}" + PLAIN


def test_a_records_own_tools_and_variables_go_before_the_recipes() -> None:
    recipe: dict[str, Any] = {"tools": [{"name": "recipe"}], "variables": {"mood": "calm "}}
    assert text_of(WITH_TOOLS, user("q"), **recipe).startswith('[{"name": "recipe"}]calm <|im_start|>')
    own = {"tools": ({"name": "own"},), "variables": {"mood": "glad "}}
    assert text_of(WITH_TOOLS, user("q"), fields=own, **recipe).startswith('[{"name": "own"}]glad <|im_start|>')


@pytest.mark.parametrize("fields", [{"tools": (TOOL,)}, {"variables": {"documents": ["x"]}}])
def test_what_stands_beside_the_messages_and_is_never_read_is_an_error(fields: Any) -> None:
    with pytest.raises(FieldNotUnderstoodError, match=r"'(tools|documents)' beside its messages"):
        rendered(PLAIN, user("q"), fields=fields)


@pytest.mark.parametrize("recipe", [{"tools": [TOOL]}, {"variables": {"enable_thinking": False}}])
def test_a_setting_that_the_template_never_reads_is_an_error_of_the_recipe(recipe: Any) -> None:
    with pytest.raises(RecipeError, match=r"'(tools|enable_thinking)', which it never reads \(it reads add_gen"):
        rendered(PLAIN, user("q"), **recipe)


def test_the_recipes_template_takes_the_place_of_the_tokenizers() -> None:
    assert text_of("unused", user("q"), chat_template=PLAIN) == "<|im_start|>user\nq<|im_end|>"


def test_of_several_templates_the_recipe_names_one_and_tools_have_their_own() -> None:
    several: Any = {"default": "plain{{ messages[0].content }}", "tool_use": "tools{{ tools | tojson }}", "rag": "rag"}
    chat, with_tools = chat_of(user("q")), chat_of(user("q"), tools=("t",))
    assert ChatRenderer(tokenizer_with(several)).render(chat)[0].text == "plainq"
    assert ChatRenderer(tokenizer_with(several)).render(with_tools)[0].text == 'tools["t"]'
    assert ChatRenderer(tokenizer_with(several), template_name="rag").render(chat)[0].text == "rag"
    with pytest.raises(RecipeError, match="has the chat templates default, rag, tool_use, and none is called 'x'"):
        ChatRenderer(tokenizer_with(several), template_name="x")
    with pytest.raises(RecipeError, match="and no chat_template_name is given"):
        ChatRenderer(tokenizer_with({"a": "x", "b": "y"}))
