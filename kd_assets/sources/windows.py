"""What becomes of documents that are longer than a recipe allows: they are cut, split into windows, or left out.

Used by `tokenise` and by it alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from kd_assets.errors import RecipeError
from kd_assets.sources.tokenised import TokenisedDocument

OnLong = Literal["truncate", "split", "drop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """A recipe's word on long documents. Raises RecipeError for one that cannot be kept."""

    max_length: int
    on_long: OnLong
    overlap: int
    """Tokens that a window has in common with the one before: read again, and not learned again."""

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise RecipeError(f"max_length is {self.max_length}: a document keeps at least one token")
        if self.overlap and self.on_long != "split":
            raise RecipeError(
                f"overlap is {self.overlap}, and on_long is {self.on_long}: only windows overlap (on_long: split)"
            )
        if not 0 <= self.overlap < self.max_length:
            raise RecipeError(
                f"overlap is {self.overlap}, and max_length {self.max_length}: each window has to bring tokens that "
                "the one before does not have, so 0 ≤ overlap < max_length"
            )

    def of(self, document: TokenisedDocument) -> list[TokenisedDocument]:
        """The document as it is where it is short enough; else what the recipe makes of it."""
        n = len(document.input_ids)
        if n <= self.max_length:
            return [document]
        if self.on_long == "truncate":
            return [self._part(document, 0, self.max_length, truncated=True)]
        if self.on_long == "drop":
            return [dataclasses.replace(self._part(document, 0, 0), dropped=True)]
        step = self.max_length - self.overlap
        starts = range(0, n - self.overlap, step)
        return [self._window(document, number, start) for number, start in enumerate(starts, 1)]

    def _window(self, document: TokenisedDocument, number: int, start: int) -> TokenisedDocument:
        window = self._part(document, start, start + self.max_length)
        learned = window.loss_mask.copy()
        if number > 1:
            learned[: self.overlap] = False
        return dataclasses.replace(
            window, loss_mask=learned, window=number, name_in_record=f"{document.name_in_record}/{number}"
        )

    @staticmethod
    def _part(document: TokenisedDocument, start: int, end: int, *, truncated: bool = False) -> TokenisedDocument:
        return dataclasses.replace(
            document,
            input_ids=document.input_ids[start:end],
            loss_mask=document.loss_mask[start:end],
            truncated=truncated,
        )
