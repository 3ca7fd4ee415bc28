"""Token ids as text, for people to read, where the tokenizer and its library are there."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from kd_assets.errors import MissingInputError

Decode = Callable[[Sequence[int]], str]
"""Text of token ids."""


def decoder_of(given: Path | None, of_manifest: object) -> tuple[Decode | None, str | None]:
    """A function from token ids to text, or None and the reason. A tokenizer that was named by hand must be there."""
    named = given if given is not None else of_manifest
    if not isinstance(named, (str, Path)):
        return None, "the manifest names no tokenizer; give --tokenizer"
    path = Path(named)
    file = path if path.is_file() else path / "tokenizer.json"
    if not file.is_file():
        if given is not None:
            raise MissingInputError(f"no tokenizer.json at {given}")
        return None, f"no tokenizer.json in {named} on this machine; give --tokenizer"
    try:
        # By name: the library is an extra that a machine which only verifies does not need.
        tokenizers = importlib.import_module("tokenizers")
    except ImportError:
        return None, "the tokenizers library is not installed: pip install tokenizers"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # noqa: BLE001 - the library raises plain Exception for a file it cannot read
        return None, f"{file} is no tokenizer: {e}"

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    return decode, None
