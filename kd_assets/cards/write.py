"""Writing a recipe's card beside its caches: `README.md` for people (with a picture), `croissant.json` for machines.

Each file says that it is ours, and what we wrote: one that somebody else wrote, or changed since, stays as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.cards.contents import Contents
from kd_assets.cards.croissant import croissant
from kd_assets.cards.page import WORTH_PICTURE, card, has_worth, readme, worth_picture
from kd_assets.durable import read_if_there, replace_file
from kd_assets.store import fingerprint

README_NAME, CROISSANT_NAME = "README.md", "croissant.json"
CONTENT_KEY = "kd_assets_content"
"""Of `croissant.json`: the hash of all else in it."""
_MARK = "<!-- written by kd_assets, which replaces it as long as nobody changes it: "
_TITLE = b"<title>loss against bytes a token</title>"


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenCard:
    """What became of a card."""

    page: str
    """The card as Markdown, without front matter."""
    files: tuple[Path, ...]
    """Those that say it now."""
    kept: tuple[Path, ...]
    """Those of its names that somebody else wrote, or changed: they are as they were."""

    @property
    def kept_in_words(self) -> str | None:
        if not self.kept:
            return None
        return (
            f"{', '.join(map(str, self.kept))}: not written by kd_assets, or changed since, and kept; remove to have it"
        )


def write_card(contents: Contents, *, description: str | None = None) -> WrittenCard:
    """Write them into the recipe's folder, and leave those alone that say it already, or are none of ours.

    Raises CorruptPartError and StorageUnavailableError.
    """
    page = card(contents, description=description)
    said: dict[str, tuple[bytes, Callable[[bytes], bool]]] = {
        README_NAME: (_marked(readme(contents, page)), is_our_readme),
        CROISSANT_NAME: (_as_json(croissant(contents, description=description)), is_our_croissant),
    }
    if has_worth(contents):
        said[WORTH_PICTURE] = (worth_picture(), lambda there: _TITLE in there)
    files, kept = [], []
    for name, (data, is_ours) in said.items():
        path = contents.folder / name
        there = read_if_there(path)
        if there is not None and there != data and not is_ours(there):
            kept.append(path)
            continue
        if there != data:
            replace_file(path, data)
        files.append(path)
    return WrittenCard(page=page, files=tuple(files), kept=tuple(kept))


def is_our_readme(data: bytes) -> bool:
    """Whether a `README.md` is as a card's writing left it."""
    text, _, mark = data.rpartition(_MARK.encode())
    return mark == _end_of_mark(text)


def is_our_croissant(data: bytes) -> bool:
    """Whether a `croissant.json` is as a card's writing left it, but for its spaces."""
    try:
        found = json.loads(data)
        return isinstance(found, dict) and found.pop(CONTENT_KEY, None) == fingerprint(found)
    except (ValueError, RecursionError):
        return False


def _marked(text: str) -> bytes:
    data = f"{text}\n".encode()
    return data + _MARK.encode() + _end_of_mark(data)


def _end_of_mark(text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()} -->\n".encode()


def _as_json(found: dict[str, Any]) -> bytes:
    return json.dumps(found | {CONTENT_KEY: fingerprint(found)}, indent=1).encode() + b"\n"
