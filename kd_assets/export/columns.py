"""What a record of an export has, in words, before anything is made: columns of a table, tensors or keys of a file.

A format says it of itself, from what its writer writes by wherever that is declared. Names of dimensions: L = tokens of
a document, M = its predictions, N = its states, H = the teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from kd_assets.contract import Asset
from kd_assets.store.column_words import type_in_words
from kd_assets.store.schema import HiddenState, hidden_state_of, k_of

HIDDEN_SIZE = "hidden_size"
"""In the place of a number, where the teacher's files are not at hand; `k` and others alike."""

Dimension = int | str


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column, tensor or key of a record."""

    name: str
    type: str
    """In the words of `kd_assets.store.column_words`, or of a tensor its dtype and shape: `bfloat16[L, 4096]`."""
    meaning: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CachesOfRecipe:
    """The caches that an export will be made of, as far as a recipe says it."""

    schemas: Mapping[Asset, pa.Schema]
    """Of those that the format takes: the columns that a reader gets of each."""
    n_blocks: int | None = None
    hidden_size: int | None = None
    vocabulary_size: int | None = None
    """Of the teacher; None where only its files say it."""

    @property
    def k(self) -> int:
        """Candidates of a position; where positions keep different numbers, the most that one does."""
        return k_of(self.schemas["topk_cache"])

    @property
    def states(self) -> tuple[HiddenState, ...]:
        schema = self.schemas.get("hidden_state_cache")
        found = [] if schema is None else [hidden_state_of(name) for name in schema.names]
        return tuple(state for state in found if state is not None)

    def hidden(self, n: Dimension = 1) -> Dimension:
        """The width of n states beside each other."""
        if isinstance(n, int) and self.hidden_size is not None:
            return n * self.hidden_size
        size = HIDDEN_SIZE if self.hidden_size is None else self.hidden_size
        return size if n == 1 else f"{n} · {size}"


def columns_of(schema: pa.Schema, meanings: Mapping[str, str]) -> list[Column]:
    """The columns of a table that is written with this schema."""
    return [Column(name=field.name, type=type_in_words(field), meaning=meanings[field.name]) for field in schema]


def tensor(name: str, dtype: str, shape: Sequence[Dimension], meaning: str) -> Column:
    return Column(name=name, type=f"{dtype}[{', '.join(map(str, shape))}]", meaning=meaning)
