"""Where tokens lie in the text they were made of, and which of them a span of it holds.

Used by `tokenise`. Fast tokenizers say it themselves. For slow ones it is found by what their tokens spell: the pieces
must give the text back, byte by byte, or nothing is said. So no mask rests on a guess.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.sources.chats import TextSpan

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def tokens_in_spans(
    offsets: Sequence[TextSpan] | npt.NDArray[np.int64], spans: Sequence[TextSpan]
) -> npt.NDArray[np.bool_]:
    """bool [L]: which of L tokens, at these characters, hold a character of one of the spans.

    Byte-level tokenizers leave spaces out of a token's offsets, so a token of spaces alone is empty at the character
    after it; it counts as holding the character before that.
    """
    start_L, end_L = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    start_L = start_L - (start_L == end_L)
    mask_L = np.zeros(len(start_L), dtype=np.bool_)
    for start, end in spans:
        mask_L |= (start_L < end) & (end_L > start)
    return mask_L


class SlowTokens:
    """Which tokens of a slow tokenizer hold a character of a span."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._whole_tokens = {token.content for token in tokenizer.added_tokens_decoder.values()}

    def in_spans(self, text: str, ids: Sequence[int], spans: Sequence[TextSpan]) -> npt.NDArray[np.bool_] | None:
        """bool [L], for the tokens `ids` of `text`; None where it cannot be told for certain."""
        if (offsets := self.offsets(text, ids)) is not None:
            return tokens_in_spans(offsets, spans)
        return self._between_borders(text, ids, spans)

    def offsets(self, text: str, ids: Sequence[int]) -> list[TextSpan] | None:
        """The characters of each token; None where the tokens do not spell the text (they say "unknown", or are of
        another case)."""
        pieces = self._tokenizer.convert_ids_to_tokens(list(ids))
        for spelling in (_of_sentencepiece, _of_bytes, _of_gpt2):
            spelled = [piece.encode() if piece in self._whole_tokens else spelling(piece) for piece in pieces]
            whole = [piece for piece in spelled if piece is not None]
            if len(whole) == len(spelled) and (offsets := aligned(text, whole)) is not None:
                return offsets
        return None

    def _between_borders(
        self, text: str, ids: Sequence[int], spans: Sequence[TextSpan]
    ) -> npt.NDArray[np.bool_] | None:
        """A border of a span lies between two tokens where those of the text before it begin those of the whole."""
        mask_L = np.zeros(len(ids), dtype=np.bool_)
        for start, end in spans:
            borders = []
            for border in (start, end):
                before = self._tokenizer(text[:border], add_special_tokens=False, verbose=False)["input_ids"]
                if list(ids[: len(before)]) != list(before):
                    return None
                borders.append(len(before))
            mask_L[borders[0] : borders[1]] = True
        return mask_L


def aligned(text: str, pieces: Sequence[bytes]) -> list[TextSpan] | None:
    """The characters of each piece where the pieces, in UTF-8, are the text but for white space; else None.

    White space is what slow tokenizers change: they add a space before a text, make one of several, or leave it out.
    """
    data = text.encode()
    ends = np.cumsum([len(c.encode()) for c in text])  # of each character, in bytes
    offsets, at = [], 0
    for piece in pieces:
        start = at
        for byte in piece:
            if byte in _WHITE:
                at += at < len(data) and data[at] in _WHITE
                continue
            while at < len(data) and data[at] in _WHITE and data[at] != byte:
                start += start == at and not piece[:1].isspace()
                at += 1
            if at == len(data) or data[at] != byte:
                return None
            at += 1
        offsets.append((start, at))
    if data[at:].strip(bytes(_WHITE)):
        return None
    starts_L, ends_L = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    # A character whose bytes are several tokens' is each one's.
    first, last = np.searchsorted(ends, starts_L, side="right"), np.searchsorted(ends, ends_L, side="left")
    return [
        (int(a), int(b) + 1) if e > s else (int(a), int(a))
        for a, b, s, e in zip(first, last, starts_L, ends_L, strict=True)
    ]


_WHITE = b" \t\n\r"


def _of_sentencepiece(piece: str) -> bytes | None:
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("\u2581", " ").encode()


def _of_bytes(piece: str) -> bytes | None:
    """Characters whose numbers are bytes (ByT5)."""
    return bytes(map(ord, piece)) if all(ord(c) < 256 for c in piece) else None


def _of_gpt2(piece: str) -> bytes | None:
    """GPT-2's alphabet for bytes."""
    return bytes(_GPT2_BYTES[c] for c in piece) if all(c in _GPT2_BYTES for c in piece) else None


def _gpt2_bytes() -> dict[str, int]:
    """Character → byte: printable bytes are themselves, the others follow at 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [n for n in range(256) if n not in printable]
    return {**{chr(n): n for n in printable}, **{chr(256 + i): n for i, n in enumerate(others)}}


_GPT2_BYTES = _gpt2_bytes()
