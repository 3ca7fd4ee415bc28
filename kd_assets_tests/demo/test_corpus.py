"""The corpus, from topics short enough to read here and from the topics of the Python that runs the tests."""

from __future__ import annotations

import json
import os
import platform
import textwrap
from pathlib import Path
from typing import Any

import pytest

from kd_assets.demo.corpus import (
    LONGEST_PASSAGE_CHARACTERS,
    chat_record,
    document_record,
    main,
    passage_of,
    split_passages,
    write_corpus,
)

PASS_TOPIC = textwrap.dedent(
    """\
    The "pass" statement
    ********************

       pass_stmt ::= "pass"

    "pass" is a null operation, for example:

       def f(arg): pass    # a function that does nothing (yet)
    """
)

METHODS_TOPIC = textwrap.dedent(
    """\
    Two Methods
    ***********

    str.a()

       Does the first thing.

       Always.

    str.b(sep=None, *, n=-1)

       Does the second thing.
    """
)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def test_a_short_topic_is_one_passage_with_title_text_and_examples() -> None:
    (passage,) = split_passages({"pass": PASS_TOPIC})
    assert passage.name == "pass.00.00"
    assert document_record(passage) == {
        "id": "pass.00.00",
        "text": 'The "pass" statement\n\n   pass_stmt ::= "pass"\n\n"pass" is a null operation, for example:\n\n'
        "   def f(arg): pass    # a function that does nothing (yet)",
    }
    chat = chat_record(passage)
    assert chat is not None
    assert chat["id"] == "pass.00.00.chat"
    asked, answered = chat["messages"][-2:]
    assert asked["role"] == "user"
    assert 'the "pass" statement' in asked["content"]
    assert answered == {"role": "assistant", "content": passage.text}


def test_methods_are_asked_for_by_name_one_turn_each() -> None:
    (passage,) = split_passages({"methods": METHODS_TOPIC})
    chat = chat_record(passage)
    assert chat is not None
    turns = [m for m in chat["messages"] if m["role"] != "system"]
    assert [m["role"] for m in turns] == ["user", "assistant", "user", "assistant"]
    assert "`str.a`" in turns[0]["content"]
    assert turns[1]["content"] == "`str.a()`\n\nDoes the first thing.\n\nAlways."
    assert "`str.b`" in turns[2]["content"]
    assert turns[3]["content"] == "`str.b(sep=None, *, n=-1)`\n\nDoes the second thing."


def test_a_section_that_two_topics_quote_comes_once() -> None:
    quoted = PASS_TOPIC.replace("*", "=")
    passages = split_passages(
        {"pass": PASS_TOPIC, "simple": f"Simple statements\n****\n\nThere are some.\n\n\n{quoted}"}
    )
    assert [p.name for p in passages] == ["pass.00.00", "simple.00.00"]


def test_documents_and_chats_of_a_passage_are_known_by_their_ids() -> None:
    assert passage_of("with.00.02") == passage_of("with.00.02.chat") == "with.00.02"


def test_pythons_own_topics_make_enough_documents_for_eight_shards(corpus: Path) -> None:
    documents, chats = records(corpus / "documents.jsonl"), records(corpus / "chats.jsonl")
    # At 80 documents a shard, and no shard of both files.
    assert -(-len(documents) // 80) + -(-len(chats) // 80) >= 8
    assert 600 <= len(documents) + len(chats) <= 1500
    lengths = sorted(len(d["text"]) for d in documents)
    assert 300 < lengths[len(lengths) // 2] < LONGEST_PASSAGE_CHARACTERS
    ids = [r["id"] for r in documents + chats]
    assert len(set(ids)) == len(ids)
    assert {passage_of(c["id"]) for c in chats} < {d["id"] for d in documents}


def test_chats_alternate_and_vary(corpus: Path) -> None:
    chats = records(corpus / "chats.jsonl")
    shapes = set()
    for chat in chats:
        roles = [m["role"] for m in chat["messages"]]
        shapes.add(tuple(roles))
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(m["content"].strip() for m in chat["messages"])
    assert {("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 2} <= shapes
    questions = [m["content"] for c in chats for m in c["messages"] if m["role"] == "user"]
    assert len(set(questions)) > len(questions) / 2


def test_provenance_names_python_and_licence(corpus: Path) -> None:
    provenance = json.loads((corpus / "provenance.json").read_bytes())
    assert provenance["source"] == "pydoc_data.topics"
    assert provenance["licence"] == "PSF-2.0"
    assert provenance["python"] == platform.python_version()
    assert provenance["n_documents"] == len(records(corpus / "documents.jsonl"))
    assert provenance["n_chats"] == len(records(corpus / "chats.jsonl"))


def test_writing_again_changes_nothing_not_even_times(corpus: Path) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in corpus.iterdir()}

    for path in corpus.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    before = state()
    write_corpus(corpus)
    assert state() == before
    (corpus / "chats.jsonl").write_text("half a li")
    write_corpus(corpus)
    assert (corpus / "chats.jsonl").read_bytes() == before["chats.jsonl"][1]


def test_command_line_prints_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a corpus"
    assert main(["--out", str(folder)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["corpus"] == str(folder)
    assert printed["n_chats"] == len(records(folder / "chats.jsonl"))


def test_command_line_says_what_is_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["--out", str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
