"""Texts to token ids, many at once, with what a tokenizer's own call costs beside that left out.

Used by `tokenise`. transformers makes Python lists of everything that a call could be asked for, and of offsets a pair
of numbers a token, which takes as long as tokenising does. Where its call does nothing else (`encoder_of`), the library
below it is asked directly, and for no more offsets than are needed. The ids are the same, as a test of every kind of
tokenizer says.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.library_internals import encoder_of
from kd_assets.sources.chats import TextSpan
from kd_assets.sources.token_offsets import tokens_in_spans


class BatchEncoder:
    """The batch calls of one tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._encoder = tokenizer, encoder_of(tokenizer)

    def ids(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, control_tokens_as_text: bool = False
    ) -> list[list[int]]:
        """The token ids of each text."""
        if not texts:
            return []
        if (encoder := self._prepared(control_tokens_as_text)) is None:
            ids: list[list[int]] = self._call(texts, add_special_tokens, control_tokens_as_text)["input_ids"]
            return ids
        encodings = encoder.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def ids_in_spans(
        self, texts: Sequence[str], spans: Sequence[Sequence[TextSpan]]
    ) -> list[tuple[list[int], npt.NDArray[np.bool_]]]:
        """The token ids of each text without special tokens added, and which of them hold a character of one of its
        spans (`tokens_in_spans`); of fast tokenizers."""
        if not texts:
            return []
        if (encoder := self._prepared(False)) is None:
            called = self._call(texts, False, False, return_offsets_mapping=True)
            return [
                (ids, tokens_in_spans(offsets, of_text))
                for ids, offsets, of_text in zip(called["input_ids"], called["offset_mapping"], spans, strict=True)
            ]
        encodings = encoder.encode_batch(list(texts), add_special_tokens=False)
        in_order = encoder.normalizer is None  # each token is then a piece of the text, one after the other
        return [
            (encoding.ids, _in_spans(encoding, of_text, in_order=in_order))
            for encoding, of_text in zip(encodings, spans, strict=True)
        ]

    def _prepared(self, control_tokens_as_text: bool) -> Any | None:
        """The library's tokenizer as the call prepares it before each batch: it neither cuts nor pads, whatever its
        file says. None where only the call will do."""
        if self._encoder is not None:
            self._encoder.no_truncation()
            self._encoder.no_padding()
            self._encoder.encode_special_tokens = control_tokens_as_text or bool(self._tokenizer.split_special_tokens)
        return self._encoder

    def _call(
        self, texts: Sequence[str], add_special_tokens: bool, control_tokens_as_text: bool, **options: Any
    ) -> Any:
        split = {"split_special_tokens": True} if control_tokens_as_text else {}
        return self._tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **split,
            **options,
        )


def _in_spans(encoding: Any, spans: Sequence[TextSpan], *, in_order: bool) -> npt.NDArray[np.bool_]:
    """As `tokens_in_spans`; where tokens are `in_order`, by the spans' ends alone, a fiftieth of all offsets."""
    mask_L = np.zeros(len(encoding), dtype=np.bool_)
    for span in spans:
        tokens = _tokens_of_span(encoding, span) if in_order and span[0] < span[1] else None
        if tokens is None:
            return tokens_in_spans(np.fromiter(chain.from_iterable(encoding.offsets), np.int64), spans)
        mask_L[tokens] = True
    return mask_L


def _tokens_of_span(encoding: Any, span: TextSpan) -> slice | None:
    """The tokens that hold a character of the span; None where the first or last character is in no token."""
    start, end = span
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is None or last is None:
        return None
    after = last + 1
    while after < len(encoding):  # others may hold a byte of the last character, or be empty after it
        token_start, token_end = encoding.token_to_chars(after)
        if token_start - (token_start == token_end) >= end:
            break
        after += 1
    return slice(first, after)
