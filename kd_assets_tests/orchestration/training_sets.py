"""A training set as people have them: sources of different shapes and formats, of texts that every Python carries.

Tools are really called, so that what a tool says in a chat is what the function returned.
"""

from __future__ import annotations

import calendar
import csv
import inspect
import json
import math
import statistics
import textwrap
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

N_TOPICS = 12
N_COPIES = 3
SYSTEM = "Answer with the help of Python's own functions."

Json = dict[str, Any]

TOOLS: Mapping[str, Callable[..., Any]] = {
    "isleap": calendar.isleap,
    "comb": math.comb,
    "gcd": math.gcd,
    "name": unicodedata.name,
}


def write_manual(path: Path) -> list[str]:
    """Chapters of Python's manual as compressed JSON lines, with a field that nothing is made of; returns the texts."""
    texts = [text[:600] for _, text in sorted(topics.items())[:N_TOPICS]]
    lines = [json.dumps({"text": text, "chapter": i}, ensure_ascii=False) for i, text in enumerate(texts)]
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write("".join(line + "\n" for line in lines).encode())
    return texts


def docstrings(*modules: ModuleType) -> list[Json]:
    found = [
        (f"{module.__name__}.{name}", inspect.getdoc(function))
        for module in modules
        for name, function in sorted(vars(module).items())
        if callable(function) and not name.startswith("_") and inspect.getdoc(function)
    ]
    return [
        {"instruction": "What does this function do?", "input": name, "output": str(doc).partition("\n\n")[0]}
        for name, doc in found
    ]


def write_docstrings(path: Path) -> list[Json]:
    """Questions about functions with their docstrings, as Parquet; the first ones twice."""
    rows = docstrings(calendar, textwrap, statistics)[:24]
    rows = [*rows[:N_COPIES], *rows]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return rows


def tool_chat(name: str, arguments: Json, *, as_text: bool) -> Json:
    """A user asks, the assistant thinks and calls, the tool answers, the assistant says it; and then a second turn."""
    result = json.dumps(TOOLS[name](*arguments.values()))
    call = {"name": name, "arguments": json.dumps(arguments) if as_text else arguments}
    return {
        "id": f"{name}-{'-'.join(map(str, arguments.values()))}",
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": (inspect.getdoc(TOOLS[name]) or "").partition("\n")[0],
                    "parameters": {"type": "object", "properties": {key: {} for key in arguments}},
                },
            }
        ],
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{name} of {', '.join(map(str, arguments.values()))}?"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": f"There is a function {name}.",
                "tool_calls": [{"id": "call_0", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "call_0", "name": name, "content": result},
            {"role": "assistant", "content": f"It is {result}.", "reasoning_content": f"It returned {result}."},
            {"role": "user", "content": "Thank you. Sure?"},
            {"role": "assistant", "content": "Sure, it was computed.", "reasoning_content": "They ask again."},
        ],
    }


def tool_chats() -> list[Json]:
    calls: Sequence[tuple[str, Json]] = [
        *(("isleap", {"year": year}) for year in (1900, 2000, 2024)),
        *(("comb", {"n": n, "k": 2}) for n in (5, 10)),
        *(("gcd", {"a": a, "b": 12}) for a in (8, 18)),
        *(("name", {"chr": character}) for character in "é✓"),
    ]
    return [tool_chat(name, arguments, as_text=i % 2 == 1) for i, (name, arguments) in enumerate(calls)]


def write_tool_chats(path: Path) -> list[Json]:
    chats = tool_chats()
    path.write_text("".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats))
    return chats


def write_names(path: Path, *, first: int = 0x3B1, n: int = 24) -> list[tuple[str, str]]:
    """Characters and their names as a table with columns of its own, in quotes where it takes them."""
    rows = [(f'Which character is "{chr(i)}"?\n', unicodedata.name(chr(i), "none")) for i in range(first, first + n)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("question", "answer", "code point"))
        writer.writerows((question, answer, ord(question[20])) for question, answer in rows)
    return rows


def write_calendar_talk(path: Path) -> list[Json]:
    """Conversations as ShareGPT has them, one array of JSON."""
    talk = [
        {
            "conversations": [
                {
                    "from": "human",
                    "value": f"Which day of the week was the first of {calendar.month_name[month]} {year}?",
                },
                {"from": "gpt", "value": calendar.day_name[calendar.weekday(year, month, 1)]},
            ]
        }
        for year in (1999, 2000, 2001)
        for month in range(1, 13)
    ]
    path.write_text(json.dumps(talk, indent=1))
    return talk
