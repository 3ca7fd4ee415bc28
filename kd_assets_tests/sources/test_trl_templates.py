"""Our masks for chat templates as models have them, compared with marks that others put into the same templates.

trl's wheel carries templates in pairs: `x.jinja`, and `x_training.jinja` with generation marks. What the marks of the
second enclose is what the rules for the first must find, but for what `DIFFERENCES` lists with its reason.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from pathlib import PurePath
from typing import NamedTuple

import pytest

from kd_assets.errors import BadRecordError, FieldNotUnderstoodError
from kd_assets.sources.chats import ChatRenderer
from kd_assets.sources.chats.template_reads import TemplateReads, template_reads
from kd_assets_tests.sources.chats.conversations import CONVERSATIONS, TOOL, chat_of, tokenizer_with


def trl_templates() -> dict[str, str]:
    """Name → text. Read from the wheel's files: trl itself needs packages that are not wanted here."""
    files = importlib.metadata.files("trl") or []
    return {PurePath(f).stem: f.read_text("utf-8") for f in files if f.suffix == ".jinja"}


TEMPLATES = trl_templates()
PAIRS = sorted(name for name in TEMPLATES if f"{name}_training" in TEMPLATES)


class Difference(NamedTuple):
    """What is taken out of the text that one of the two learns before they are compared."""

    of: str
    """`marks` or `ours`."""
    pattern: str
    put: str
    reason: str


HEADER = "its marks take in the header, which the model is given and does not say"
HISTORY = "its training template teaches earlier turns without their reasoning; ours teaches what the model said"
OPENED = "the generation prompt opens the thought, so the model does not say that"
EMPTY_THOUGHT = "a turn without reasoning begins so whatever it says, as the prompt without thinking does"
WHITE_SPACE = "white space between the header and what is said goes to either"
NEMOTRON = [
    Difference("marks", "<think></think>", "", EMPTY_THOUGHT),
    Difference("ours", r"\A\n?hm\n?</think>\n*", "", HISTORY),
    Difference("marks", r"\A(<think></think>)?\n+(?=a one)", "", HISTORY),
    Difference("marks", r"<think>\n(?=ho)", "", OPENED),
]

DIFFERENCES: dict[str, list[Difference]] = {
    "deepseek_r1_distill": [
        Difference("marks", "<｜Assistant｜>|<｜tool▁outputs▁end｜>", "", HEADER),
        Difference(
            "marks", r"<think>\n\w+\n</think>", "", "the template drops all reasoning, the training template none"
        ),
    ],
    "deepseekv3": [Difference("marks", "<｜Assistant｜>|<｜tool▁outputs▁end｜>", "", HEADER)],
    "diffusion_gemma": [
        Difference("ours", r"<\|tool_response>", "", "a turn ends so where a tool is called; its marks leave it out"),
        Difference("ours", r"<\|channel>thought\nhm\n<channel\|>", "", HISTORY),
    ],
    "glm4moe": [
        Difference("marks", r"<\|user\|>|<\|observation\|>", "", "it teaches the next header as the end of a turn"),
        Difference("ours", "hm", "", HISTORY),
    ],
    "gptoss": [
        Difference("ours", r"<\|channel\|>analysis<\|message\|>hm<\|end\|>", "", HISTORY),
        Difference("marks", r"<\|start\|>assistant", "", HEADER),
        Difference("ours", r"<\|start\|>assistant", "", "of two messages within a turn, the second's header"),
        Difference("ours", r"<\|return\|>", "<|end|>", "a last turn ends so, and each of ours was the last"),
        Difference("marks", r"<\|return\|>", "<|end|>", "the same"),
    ],
    "llava_next": [Difference("marks", " ", "", WHITE_SPACE), Difference("ours", " ", "", WHITE_SPACE)],
    "muse_glimmer": [
        Difference("marks", r"<\|start\|>assistant", "", HEADER),
        Difference("ours", r"<\|start\|>assistant", "", "of two messages within a turn, the second's header"),
    ],
    "nemotron_3_5_lightning": NEMOTRON,
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": NEMOTRON,
    "qwen2_5": [Difference("marks", r"\A\n|(?<=<\|im_end\|>\n)\n", "", WHITE_SPACE)],
    "qwen3_5_nothink": [
        Difference("marks", r"<think>\n\n</think>\n\n", "", EMPTY_THOUGHT),
        Difference("marks", r"<think>\n", "", OPENED),
    ],
    "qwen3_5_think": [Difference("marks", r"(?<!</think>\n\n)<think>\n", "", OPENED)],
    "qwen3_6": [Difference("marks", r"(?<!</think>\n\n)<think>\n", "", OPENED)],
    "qwen3_8": [Difference("marks", r"(?<!</think>\n\n)<think>\n", "", OPENED)],
}


@functools.cache
def renderer_of(template: str) -> tuple[ChatRenderer, TemplateReads]:
    return ChatRenderer(tokenizer_with(template)), template_reads(template)


@functools.cache
def learned(template: str, conversation: str) -> str:
    """What of a conversation is learned, or the name of the error of a record that the template cannot hold."""
    renderer, reads = renderer_of(template)
    with_tools = any(message.get("tool_calls") for message in CONVERSATIONS[conversation])
    chat = chat_of(
        *CONVERSATIONS[conversation],
        tools=(TOOL,) if with_tools and "tools" in reads.variables else None,
        ignored=() if reads.reads_key("name") else ("name",),  # of a tool's result
    )
    try:
        documents = renderer.render(chat)
    except FieldNotUnderstoodError:
        assert not reads.reads_key("tool_calls") or not reads.reads_key("reasoning_content")
        return "not understood"
    except BadRecordError as e:
        if not str(e).endswith("the chat template refuses the messages: System role not supported"):
            raise
        return "refused by the template itself"
    return "".join(document.text[a:b] for document in documents for a, b in document.assistant_spans)


def leveled(text: str, of: str, name: str) -> str:
    for difference in DIFFERENCES.get(name, []):
        if difference.of == of:
            text = re.sub(difference.pattern, difference.put, text)
    return text


def test_there_are_pairs_of_templates_to_compare_with() -> None:
    assert len(PAIRS) >= 30
    assert len(CONVERSATIONS) >= 8
    assert set(DIFFERENCES) <= set(PAIRS)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_what_is_learned_under_a_template_is_what_others_mark_in_it(name: str, conversation: str) -> None:
    ours = learned(TEMPLATES[name], conversation)
    marks = learned(TEMPLATES[f"{name}_training"], conversation)
    assert leveled(ours, "ours", name) == leveled(marks, "marks", name)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_each_difference_that_is_listed_is_one(name: str) -> None:
    for difference in DIFFERENCES[name]:
        template = TEMPLATES[name if difference.of == "ours" else f"{name}_training"]
        assert any(re.search(difference.pattern, learned(template, c)) for c in CONVERSATIONS), difference


PLAIN = {
    name: messages
    for name, messages in CONVERSATIONS.items()
    if name not in ("tools", "null content", "reasoning beside")
}


@pytest.mark.parametrize("conversation", PLAIN)
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_chat_is_refused_but_by_the_template_itself(name: str, conversation: str) -> None:
    said = learned(TEMPLATES[name], conversation)
    if said == "refused by the template itself":
        assert name in ("gemma", "gemma_training")
        return
    answers = [m["content"].split("</think>")[-1].strip() for m in PLAIN[conversation] if m["role"] == "assistant"]
    assert all(answer in said for answer in answers)
    assert "q " not in said
