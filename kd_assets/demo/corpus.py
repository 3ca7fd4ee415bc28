"""The demo's corpus: the language reference that every CPython carries, as plain documents and as chats.

`pydoc_data.topics` is what `help("with")` prints: about 370 KB of distinct English text under the PSF licence, on every
machine that can run the demo, without a download. Topics quote each other's sections whole, so a section counts once;
what is left repeats almost nothing, and a passage held out from training really is unseen.

The unit is the passage: a few consecutive paragraphs of one section. Every passage becomes a plain document; those that
answer a question one would ask (what a method does, how a statement is written) also become a chat. Both carry the
passage's name in their id (`passage_of`), so that a split by passage separates both.

Everything here is a pure function of the topics: equal Pythons write equal bytes.
"""

from __future__ import annotations

import argparse
import builtins
import hashlib
import json
import platform
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.durable import atomic_write, prepare_folder
from kd_assets.errors import KdAssetsError

DOCUMENTS_FILE = "documents.jsonl"
CHATS_FILE = "chats.jsonl"
PROVENANCE_FILE = "provenance.json"
LICENCE = "PSF-2.0"

PASSAGE_CHARACTERS = 550
"""A passage is closed by the first paragraph that starts after this many characters (about 150 tokens)."""
LONGEST_PASSAGE_CHARACTERS = 1600
"""A single paragraph group longer than this is cut between its paragraphs."""

_UNDERLINE = re.compile(r'^([*=\-~^"])\1{2,}$')
_DEFINITION = re.compile(r"^(?:class |exception |coroutine )?[A-Za-z_][\w.]*(?:\(.*\)|\[.*\])$|^object\.__\w+__\(.*$")
_CHAT_SUFFIX = ".chat"

_SYSTEM_PROMPTS = (
    "You answer questions about Python from its language reference.",
    "You are a patient Python tutor. Quote the reference where it is precise.",
)
_DEFINITION_QUESTIONS = (
    "What does `{name}` do?",
    "How does `{name}` work in Python?",
    "Can you explain `{name}`?",
    "I came across `{name}`. What is it for?",
)
_NEXT_DEFINITION_QUESTIONS = ("And `{name}`?", "What about `{name}`?", "Thanks. How does `{name}` differ?")
_OPENING_QUESTIONS = (
    "What does the Python reference say about {subject}?",
    "Explain {subject} in Python.",
    "I am new to Python. Tell me about {subject}.",
    "Give me an introduction to {subject}.",
)
_GRAMMAR_QUESTIONS = ("What is the grammar of {subject}?", "Which syntax rules define {subject}?")
_EXAMPLE_QUESTIONS = ("Show me an example of {subject}.", "How is that written? I mean {subject}.")
_FOLLOW_UPS = ("Go on.", "What else should I know?", "Is there more to it?", "Please continue.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """A few consecutive paragraphs of one section."""

    name: str
    """`<topic>.<section>.<passage>`, for instance `with.00.02`."""
    title: str
    """Of the section."""
    groups: tuple[str, ...]
    """Paragraphs at the margin, each with the indented ones that belong to it (examples, a definition's text)."""
    opens_section: bool

    @property
    def text(self) -> str:
        return "\n\n".join(self.groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSummary:
    """What `write_corpus` left in its folder."""

    n_documents: int
    n_chats: int
    n_characters: int
    sha256: str
    """Over the bytes of both files."""


def split_passages(topics: Mapping[str, str]) -> tuple[Passage, ...]:
    """All passages of all topics in the order of their names; a section that several topics quote comes once."""
    seen: set[str] = set()
    passages: list[Passage] = []
    for topic in sorted(topics):
        for section, (title, body) in enumerate(_sections(topics[topic])):
            if body in seen:
                continue
            seen.add(body)
            for i, groups in enumerate(_grouped(_margin_groups(body))):
                name = f"{topic}.{section:02d}.{i:02d}"
                passages.append(Passage(name=name, title=title, groups=tuple(groups), opens_section=i == 0))
    return tuple(passages)


def document_record(passage: Passage) -> dict[str, Any]:
    """The passage as a plain document, under its section's title."""
    return {"id": passage.name, "text": f"{passage.title}\n\n{passage.text}"}


def chat_record(passage: Passage) -> dict[str, Any] | None:
    """The passage as questions and answers, or None when nobody would ask for it by itself."""
    turns = _turns(passage)
    if not turns:
        return None
    messages = [
        {"role": role, "content": content}
        for question, answer in turns
        for role, content in (("user", question), ("assistant", answer))
    ]
    # One chat in five has a system message, so that loss masks and templates meet all three roles.
    if _number(passage.name, "system") % 5 == 0:
        messages.insert(0, {"role": "system", "content": _choose(_SYSTEM_PROMPTS, passage.name)})
    return {"id": passage.name + _CHAT_SUFFIX, "messages": messages}


def passage_of(document_id: str) -> str:
    """The passage that a document or chat was made from."""
    return document_id.removesuffix(_CHAT_SUFFIX)


def write_corpus(folder: Path, topics: Mapping[str, str] | None = None) -> CorpusSummary:
    """Write documents, chats and their provenance into `folder`; files that already hold these bytes are not touched.

    Raises StorageUnavailableError when the folder cannot be written.
    """
    if topics is None:
        from pydoc_data.topics import topics as python_topics

        topics = python_topics
    passages = split_passages(topics)
    documents = [document_record(p) for p in passages]
    chats = [chat for p in passages if (chat := chat_record(p)) is not None]
    files = {DOCUMENTS_FILE: _jsonl(documents), CHATS_FILE: _jsonl(chats)}
    summary = CorpusSummary(
        n_documents=len(documents),
        n_chats=len(chats),
        n_characters=sum(len(p.text) for p in passages),
        sha256=hashlib.sha256(files[DOCUMENTS_FILE] + files[CHATS_FILE]).hexdigest(),
    )
    provenance = {
        "source": "pydoc_data.topics",
        "licence": LICENCE,
        "python": platform.python_version(),
        "n_documents": summary.n_documents,
        "n_chats": summary.n_chats,
        "sha256": summary.sha256,
    }
    files[PROVENANCE_FILE] = (json.dumps(provenance, indent=1, sort_keys=True) + "\n").encode()
    prepare_folder(folder)
    for name, content in files.items():
        path = folder / name
        if not (path.is_file() and path.read_bytes() == content):
            atomic_write(path, content)
    return summary


def _sections(topic: str) -> list[tuple[str, str]]:
    """(title, body) of every section of a topic; a heading is a line underlined with one repeated character."""
    lines = topic.split("\n")
    heads = [i for i in range(len(lines) - 1) if _is_heading(lines[i], lines[i + 1])]
    ends = [*heads[1:], len(lines)]
    sections = [
        (lines[head].strip(), "\n".join(lines[head + 2 : end]).strip("\n"))
        for head, end in zip(heads, ends, strict=True)
    ]
    return [(title, body) for title, body in sections if body.strip()]


def _is_heading(line: str, underline: str) -> bool:
    return bool(line.strip()) and not line.startswith(" ") and bool(_UNDERLINE.match(underline.rstrip()))


def _margin_groups(body: str) -> list[str]:
    """A section's paragraphs, indented ones joined to the one at the margin that introduces them."""
    groups: list[list[str]] = []
    for paragraph in re.split(r"\n{2,}", body.rstrip()):
        if _UNDERLINE.match(paragraph):  # a rule across the page
            continue
        indented = paragraph.startswith(" ")
        size = sum(len(p) for p in groups[-1]) if groups else 0
        if groups and indented and size + len(paragraph) <= LONGEST_PASSAGE_CHARACTERS:
            groups[-1].append(paragraph)
        else:
            groups.append([paragraph])
    return ["\n\n".join(group) for group in groups]


def _grouped(groups: Iterable[str]) -> list[list[str]]:
    """Consecutive groups put together until they are worth a document of their own."""
    passages: list[list[str]] = []
    size = 0
    for group in groups:
        # A paragraph ending in a colon introduces the next one: they stay together.
        introduced = bool(passages) and passages[-1][-1].endswith(":")
        if passages and ((size < PASSAGE_CHARACTERS and size + len(group) <= LONGEST_PASSAGE_CHARACTERS) or introduced):
            passages[-1].append(group)
            size += len(group)
        else:
            passages.append([group])
            size = len(group)
    return passages


def _turns(passage: Passage) -> list[tuple[str, str]]:
    """Questions and answers that the passage gives; empty when it gives none."""
    definitions = [_definition(group) for group in passage.groups]
    if definitions[0] is not None:
        named = [d for d in definitions if d is not None]
        questions = [_DEFINITION_QUESTIONS, *[_NEXT_DEFINITION_QUESTIONS] * (len(named) - 1)]
        return [
            (_choose(choices, passage.name, name).format(name=name), answer)
            for choices, (name, answer) in zip(questions, named[:3], strict=False)
        ]
    subject = _subject(passage.title)
    if passage.opens_section:
        choices = _GRAMMAR_QUESTIONS if "::=" in passage.groups[0] else _OPENING_QUESTIONS
        question = _choose(choices, passage.name).format(subject=subject)
        if len(passage.groups) < 2:
            return [(question, passage.text)]
        first, rest = passage.groups[0], "\n\n".join(passage.groups[1:])
        if len(first) < 100 or first.endswith(":") or _number(passage.name, "turns") % 2:
            return [(question, passage.text)]
        return [(question, first), (_choose(_FOLLOW_UPS, passage.name), rest)]
    if "\n\n   " in passage.text:
        return [(_choose(_EXAMPLE_QUESTIONS, passage.name).format(subject=subject), passage.text)]
    return []


def _definition(group: str) -> tuple[str, str] | None:
    """(name, description) when the group documents a function, method or attribute; else None."""
    signature, _, description = group.partition("\n\n")
    first_line = signature.split("\n")[0].rstrip()
    if not _DEFINITION.match(first_line) or not description.startswith("   "):
        return None
    name = re.split(r"[(\[]", first_line, maxsplit=1)[0].split()[-1]
    return name, f"`{first_line}`\n\n{textwrap.dedent(description)}"


def _subject(title: str) -> str:
    """A section's title as it would stand inside a sentence."""
    # "Lists" becomes "lists"; "None" and "NotImplemented" are names and stay.
    words = [w.lower() if w.istitle() and w != "Python" and not hasattr(builtins, w) else w for w in title.split()]
    subject = " ".join(words)
    return f"the {subject}" if subject.startswith('"') else subject


def _choose(options: Sequence[str], *key: str) -> str:
    return options[_number(*key) % len(options)]


def _number(*key: str) -> int:
    """A number that depends on the key alone: the variety is arbitrary and every run makes the same."""
    return int.from_bytes(hashlib.sha256("\0".join(key).encode()).digest()[:8], "big")


def _jsonl(records: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kd_assets.demo.corpus", description="Write the demo's corpus.")
    parser.add_argument("--out", type=Path, required=True, help="folder for documents.jsonl and chats.jsonl")
    options = parser.parse_args(arguments)
    try:
        summary = write_corpus(options.out)
    except KdAssetsError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(json.dumps({"corpus": str(options.out), "n_documents": summary.n_documents, "n_chats": summary.n_chats}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
