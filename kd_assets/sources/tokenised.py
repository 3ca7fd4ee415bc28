"""Documents as tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kd_assets.errors import BadRecordError
from kd_assets.sources.chats import RenderedChat
from kd_assets.sources.records import Record


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenisedDocument:
    """The tokens of a document that was made of a record, L of them."""

    record: Record
    """The parent: several documents may be of one record."""
    name_in_record: str = ""
    """Empty, or what makes its id another than its record's: `#2` for the second turn, `/3` for the third window."""
    input_ids: npt.NDArray[np.uint32]
    """uint32 [L]; L = 0 where the record holds nothing but what the tokenizer adds by itself, or was dropped."""
    loss_mask: npt.NDArray[np.bool_]
    """bool [L]."""
    truncated: bool
    """Tokens after `max_length` were cut off."""
    window: int = 0
    """Which window of a document that was split, from 1; 0: it was not."""
    dropped: bool = False
    """It has more than `max_length` tokens, and the recipe leaves out such documents."""
    spells_control_tokens: bool
    """Its text or messages spell out control tokens."""
    control_tokens_as_text: bool = False
    """They were taken as text, not as those tokens."""
    has_own_ends: bool = False
    """Its text has the BOS or EOS that the tokenizer would have added: it was rendered before, and has each once."""
    lacks_bos: bool = False
    """A chat whose template writes no BOS, where the tokenizer begins each text with one."""
    chat: RenderedChat | None = None
    """The rendering that it was made of."""

    @property
    def document_id(self) -> str:
        return self.record.document_id + self.name_in_record


Outcome = list[TokenisedDocument] | BadRecordError
"""What became of a record: its documents, or why there are none."""
