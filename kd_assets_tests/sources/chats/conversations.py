"""Chats and a tokenizer to look at templates with, character by character."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kd_assets.sources.records import Message, Record

CONTROL_TOKENS = (
    *("<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    *("<|turn>", "<turn|>", "<|tool_response>", "<tool_response|>", "<start_of_turn>", "<end_of_turn>"),
)


def tokenizer_with(template: str | dict[str, str] | None) -> Any:
    """What a renderer asks of a tokenizer."""
    return SimpleNamespace(
        name_or_path="a tokenizer",
        chat_template=template,
        special_tokens_map={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        added_tokens_decoder={i: SimpleNamespace(content=t, special=True) for i, t in enumerate(CONTROL_TOKENS)},
    )


def chat_of(*messages: Message, **fields: Any) -> Record:
    return Record(where="web.jsonl:1", source="web", number=0, document_id="d0", messages=messages, **fields)


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}},
}
RESULT: Message = {"role": "tool", "content": "12 degrees", "name": "weather"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where"}},
            "required": ["city"],
        },
    },
}

CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "two turns": (user("q one"), assistant("a one"), user("q two"), assistant("a two")),
    "three turns": (
        *(user("q one"), assistant("a one"), user("q two"), assistant("a two")),
        *(user("q three"), assistant("a three")),
    ),
    "a system message": (system("Be brief."), user("q one"), assistant("a one")),
    "a last user turn": (user("q one"), assistant("a one"), user("q two")),
    "unicode": (user("où 🙂?"), assistant("là‑bas 日本語 é\n\n  indented")),
    "tools": (user("q one"), assistant("", tool_calls=[CALL]), RESULT, assistant("It is 12.")),
    "null content": (
        *(user("q one"), assistant(None, tool_calls=[CALL]), RESULT, assistant("It is 12.")),
        *(user("q two"), assistant("a two")),
    ),
    "reasoning beside": (
        *(user("q one"), assistant("a one", reasoning_content="hm")),
        *(user("q two"), assistant("a two", reasoning_content="ho")),
    ),
    "reasoning in the content": (
        *(user("q one"), assistant("<think>\nhm\n</think>\n\na one")),
        *(user("q two"), assistant("<think>\nho\n</think>\n\na two")),
    ),
}
