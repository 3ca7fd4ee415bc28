"""Text of token ids and token ids of text, by the teacher's own tokenizer, where it lies on this machine."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_assets.errors import MissingInputError, RefusedRequestError
from kd_assets.replay.index import Uint32Array


class Tokens:
    """A tokenizer, or the reason why there is none."""

    def __init__(self, tokenizer: Any | None, why_not: str = "") -> None:
        self._tokenizer = tokenizer
        self._why_not = why_not
        self._as_json: dict[int, str] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> Uint32Array:
        """uint32 [L]. Raises RefusedRequestError where there is no tokenizer, and for what is no Unicode text."""
        tokenizer = self._required("a prompt that is text")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise RefusedRequestError(
                f"a prompt has half of a surrogate pair at character {e.start}, which no text has: send the whole pair"
            ) from e
        encoding = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return np.array(encoding.ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """Raises RefusedRequestError where there is no tokenizer."""
        return str(self._required("text").decode(list(ids), skip_special_tokens=False))

    def decoded_json(self, token_id: int) -> str:
        """The text of one token as a JSON string; `null` where there is no tokenizer."""
        if self._tokenizer is None:
            return "null"
        found = self._as_json.get(token_id)
        if found is None:
            found = self._as_json[token_id] = json.dumps(self.decode([token_id]))
        return found

    def _required(self, what: str) -> Any:
        if self._tokenizer is None:
            raise RefusedRequestError(f"{what} needs the teacher's tokenizer, and {self._why_not}: send token ids")
        return self._tokenizer


def open_tokens(given: Path | None, provenance: Mapping[str, Any]) -> Tokens:
    """The tokenizer that was given, or that of the cache's provenance where it lies here.

    Raises MissingInputError for one that was given and cannot be read.
    """
    named = given if given is not None else provenance.get("tokenizer")
    if not isinstance(named, (str, Path)):
        return Tokens(None, "the cache's manifest names none")
    file = Path(named) if Path(named).is_file() else Path(named) / "tokenizer.json"
    try:
        # By name: the library is not needed to answer token ids.
        tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises plain Exception for a file it cannot read
        missing = isinstance(e, ImportError)
        why = "the tokenizers library is not installed here" if missing else "it is not on the server's machine"
        if given is not None:
            raise MissingInputError(f"no tokenizer could be read from {file}: {why} ({e})") from e
        return Tokens(None, why)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Tokens(tokenizer)
