"""Control tokens: those that are structure, not text, so that a document which spells one out may pose as another
speaker.

They are those that a tokenizer calls special, and those of its added tokens that its chat template writes in brackets:
DeepSeek's `<｜User｜>` is not special to its own tokenizer. Used by `tokenise` and `chats`, in jobs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

_BRACKETED = re.compile(r"<.+>|\[.+\]", re.DOTALL)


def control_tokens_of(tokenizer: Any, template: str | None) -> dict[int, str]:
    """Id → control token of a tokenizer whose chats are rendered by `template`."""
    return {
        int(token_id): token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or (template is not None and token.content in template and _BRACKETED.fullmatch(token.content))
    }


def special_tokens_of(tokenizer: Any) -> list[str]:
    """Those that the tokenizer itself calls special."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds these tokens in a text, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(set(tokens), key=len, reverse=True))) or "(?!)")


def all_special(tokenizer: Any, control: Mapping[int, str]) -> Any:
    """A copy of a fast tokenizer that calls all of its control tokens special, and so splits each as text where it is
    told to (`split_special_tokens`)."""
    others = [
        token
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if int(token_id) in control and not token.special
    ]
    if not others:
        return tokenizer
    copied = copy.deepcopy(tokenizer)
    for token in others:
        token.special = True
    copied.add_tokens(others, special_tokens=True)
    return copied
