"""Values of a record, checked: what is none that a document can be made of is a `NoDocumentError` that says why."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100
"""Levels of lists and objects in a message, tool or variable. Whoever walks them (a template, `tojson`) recurses, and
what is accepted must not depend on how deep the caller's stack is."""


class NoDocumentError(ValueError):
    """Why a record cannot become a document. `kind`: the few words that such records are counted under."""

    def __init__(self, message: str, *, kind: str = "not of its shape") -> None:
        super().__init__(message)
        self.kind = kind


def parse_object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise NoDocumentError(
            f"not UTF-8: byte 0x{content[e.start]:02x} at position {e.start + 1} of the record", kind="not UTF-8"
        ) from e
    except json.JSONDecodeError as e:
        raise NoDocumentError(f"not JSON: {e.msg} at column {e.colno}", kind="not JSON") from e
    except ValueError as e:  # an integer of more digits than Python converts
        raise NoDocumentError(f"not JSON that can be read: {e}", kind="not JSON") from e
    except RecursionError as e:
        raise NoDocumentError("nested too deeply", kind="not JSON") from e
    if not isinstance(value, dict):
        raise NoDocumentError(
            f'expected an object such as {{"text": "..."}}, found {kind_of(value)}', kind="not an object"
        )
    return value


def string(value: Any, name: str) -> str:
    """`value` if it is a text; `name` is what messages call it."""
    if not isinstance(value, str):
        raise NoDocumentError(f"{name} is {kind_of(value)}; expected a string")
    return unicode_text(value, name)


def unicode_text(value: str, name: str) -> str:
    """`value` if it is text. JSON can spell half a surrogate pair, and bytes that are not UTF-8 arrive as such."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        code = ord(value[e.start])
        if 0xDC80 <= code <= 0xDCFF:  # how rows of columns spell a byte that is not UTF-8
            raise NoDocumentError(
                f"{name} is not UTF-8: byte 0x{code - 0xDC00:02x} or a lone surrogate", kind="not UTF-8"
            ) from e
        raise NoDocumentError(
            f"{name} holds half a surrogate pair (\\u{code:04x}), which is no character", kind="not Unicode"
        ) from e
    return value


def unicode_all(value: Any, name: str) -> None:
    """Raise NoDocumentError unless every text within a JSON value is one, and it is nested as data are."""
    if isinstance(value, str):
        unicode_text(value, name)
    elif _is_deeper(value, MAX_DEPTH):
        raise NoDocumentError(f"{name} is nested too deeply: more than {MAX_DEPTH} levels")
    else:
        unicode_text(json.dumps(value, ensure_ascii=False), name)


def _is_deeper(value: Any, n_levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return n_levels < 0 or any(_is_deeper(item, n_levels - 1) for item in items if isinstance(item, (dict, list)))


def json_list(value: Any, name: str) -> list[Any]:
    """A list, or what the JSON text of one says: columns that differ from row to row are kept as text."""
    value = _parsed(value, name, "a list")
    if not isinstance(value, list):
        raise NoDocumentError(f"{name} is {kind_of(value)}; expected a list, or JSON text of it")
    unicode_all(value, name)
    return value


def json_object(value: Any, name: str) -> dict[str, Any]:
    """An object, or what the JSON text of one says."""
    value = _parsed(value, name, "an object")
    if not isinstance(value, dict):
        raise NoDocumentError(f"{name} is {kind_of(value)}; expected an object, or JSON text of it")
    unicode_all(value, name)
    return value


def _parsed(value: Any, name: str, wanted: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as e:
        raise NoDocumentError(f"{name} is text that is not JSON ({e}); expected {wanted}") from e


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def named_list(names: Any) -> str:
    """`'a', 'b'`, the first of them, each short: a record may have as many as it likes."""
    shown = [f"{name!r:.60}" for name in list(names)]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
