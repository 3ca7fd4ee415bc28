"""What a format is: what it needs of the caches, and how documents become its files.

An export is written section by section, a section being one part of one partition: the unit that memory is bounded by
and that a killed export goes on from. `ExportWriter.section` writes the files of one section, whole and under their
last names; when all are there, `finish` writes what stands once in the folder (an index, a schema, a card). Equal
documents and options give equal bytes. What came to these classes later has a default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kd_assets.contract import Asset, ExportParams
from kd_assets.export.columns import CachesOfRecipe, Column
from kd_assets.export.documents import JoinedDocument
from kd_assets.store import Manifest
from kd_assets.store.schema import HiddenState


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What a user may choose; a format refuses by name what it cannot do."""

    max_length: int | None = None
    """Cut documents to their first tokens."""
    validation_share: float = 0.0
    """Of the documents, chosen by their ids and `seed`: a data set of its own beside the others."""
    learned_only: bool = False
    """Leave out positions that the loss mask does not ask for, where the format can."""
    draft_vocabulary: int | None = None
    """Size of a draft head's vocabulary, counted from the tokens of the recipe's shards; only of draft formats."""
    seed: int = 0
    assets: tuple[Asset, ...] | None = None
    """Of a format that takes whatever caches there are: only these. Documents are cut to the tokens that all of them
    have, so that caches of different lengths are better exported one by one."""
    states: tuple[HiddenState, ...] | None = None
    """Only these of the hidden-state cache, where the format leaves the choice."""
    pack_to: int | None = None
    """Put whole documents together into rows of this many tokens, where the format keeps them apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How a format puts documents together into rows."""

    dropped_tokens: int = 0
    """At the end of each document: they take no place in a row."""
    min_rows: int = 1
    """Fewer are refused, in each split: 1 or 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a format takes of a recipe's caches."""

    assets: tuple[Asset, ...]
    states: tuple[HiddenState, ...] = ()
    """Of the hidden-state cache."""
    all_positions: bool = True
    """Whether a cache that keeps some positions only is refused."""
    fixed_k: bool = True
    """Whether a top-k cache whose positions keep different numbers of tokens (`top_p`) is refused."""
    min_tokens: int = 1
    """Documents with fewer are left out, counted and named: a format that needs a prediction says 2."""
    expansion: float = 1.0
    """Bytes written for each decoded byte of the caches, about; what the room on the disk is compared with."""
    expansion_of: Mapping[Asset, float] = field(default_factory=dict)
    """Of caches for which that is another."""
    version: int = 1
    """Of the format's files: another one is another export."""
    packing: Packing | None = None
    """None: a row is one document, and `pack_to` is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What is known of the caches before a document is read."""

    recipe: str
    manifests: dict[Asset, tuple[Manifest, ...]]
    """In the order of the partitions."""
    n_blocks: int | None
    """Decoder blocks of the teacher; None where its folder is not here and no manifest says it."""
    hidden_size: int | None
    vocabulary_size: int | None
    """Rows of the teacher's head."""
    teacher_folder: Path | None
    tokenizer_folder: Path | None
    """None where they are not on this machine."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Of the first manifest: teacher, fingerprints, sources with licences."""
    folders: dict[Asset, tuple[Path, ...]] = field(default_factory=dict)
    """Where the results lie, in the order of `manifests`."""
    states: tuple[HiddenState, ...] = ()
    """All that the hidden-state cache has."""
    unclear: tuple[Asset, ...] = ()
    """Of which there are results on disk, and it cannot be told which to read: several variants, or none that passed
    its checks. Choosing them says why."""


_NAMED = 10
"""Documents that are named of those that are left out for one reason."""


@dataclass(kw_only=True, slots=True)
class LeftOut:
    """Documents that the format cannot hold, for one reason."""

    n_documents: int = 0
    first: list[str] = field(default_factory=list)
    """Partition key and document id of a few, with a slash."""

    def add(self, n_documents: int, first: Sequence[str]) -> None:
        self.n_documents += n_documents
        self.first.extend(first[: _NAMED - len(self.first)])


@dataclass(frozen=True, kw_only=True, slots=True)
class SectionFiles:
    """The finished files of one section."""

    index: int
    partition_key: str
    n_documents: int
    n_tokens: int
    names: tuple[str, ...]
    """Relative to the export's folder, with slashes."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Name → hash, of files that were hashed as they were written: the others are read once more."""
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Reason → ids of the documents that are not in the files for it; of what `finish` is given it is empty."""


class ExportWriter(Protocol):
    """An export in one folder (of one split)."""

    def section(self, index: int, partition_key: str, documents: Iterable[JoinedDocument]) -> SectionFiles:
        """Write the documents of one section. Files of an attempt that was killed are written over.

        `documents` may be iterated more than once, and `len` says how many there are. Arrays of states are views of a
        mapped file: they stay valid, but what of them is in memory is let go of when the next document is asked for,
        or with `StatesOfDocument.let_go`. Files are written through `kd_assets.export.aside`, which hashes them, too.
        """
        ...

    def finish(self, sections: Sequence[SectionFiles]) -> Sequence[str]:
        """Write what stands once; returns its names. `sections` are all, in order, whoever wrote them, with the hashes
        of all of their files. Raises NothingToExportError where a reader could do nothing with them."""
        ...


class ExportFormat(Protocol):
    """One consumer's format."""

    @property
    def name(self) -> str: ...

    def needs(self, source: Source, options: ExportOptions) -> Needs:
        """Raises RecipeError for options that it does not have, and for a teacher that it cannot serve."""
        ...

    def writer(self, folder: Path, source: Source, options: ExportOptions) -> ExportWriter: ...

    def columns(self, caches: CachesOfRecipe, options: ExportOptions) -> Sequence[Column]:
        """What a record has that is made of these caches, with these options, which the format has not refused."""
        ...


def options_of(params: ExportParams) -> ExportOptions:
    """What a recipe says of an export, as an option each."""
    return ExportOptions(
        max_length=params.max_length,
        validation_share=params.validation_share,
        learned_only=params.learned_only,
        seed=params.seed,
        assets=params.assets,
        states=params.states,
        pack_to=params.pack_to,
    )
