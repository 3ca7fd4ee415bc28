"""No export has a token id that no tokenizer has: a head may have more rows than its tokenizer has tokens.

A top-k cache that is cut to a vocabulary has no such id where the cut is the tokenizer's. One that keeps all of a
padded head may hold some among its top-k or its draws. Numbers are never changed on the way out: the first such id ends
the export, before it has an `export.json`, with the word of how the cache is to be made.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from kd_assets.contract import Asset, TokenIds
from kd_assets.errors import InputError, RecipeError
from kd_assets.export.documents import JoinedDocument
from kd_assets.export.format import Source
from kd_assets.export.joined import PartDocuments
from kd_assets.model_files.fingerprints import tokenizer_fingerprint
from kd_assets.model_files.vocabulary import teacher_token_ids
from kd_assets.store import Chosen
from kd_assets.store.vocabulary import is_among, vocabulary_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownIds:
    """The ids that may be exported, and who says so. `token_ids` None: nothing is to be looked at."""

    tokenizer: Path | None
    token_ids: TokenIds | None

    @staticmethod
    def of(chosen: Mapping[Asset, Chosen], source: Source) -> KnownIds:
        """What the tokenizer of these caches has; logs a warning where that cannot be told here."""
        nothing = KnownIds(tokenizer=None, token_ids=None)
        topk = chosen.get("topk_cache")
        # A set that is no number was found in the tokenizer itself (F68).
        if topk is None or all(isinstance(m.params.get("vocabulary"), dict) for m in topk.manifests):
            return nothing
        found, why = _ids_of_tokenizer(topk, source)
        if found is None:
            log.warning(
                "whether every id of the top-k cache is one of its tokenizer is not checked: %s. A head may have more "
                "rows than its tokenizer has tokens; `vocabulary: tokenizer` of the cache leaves them out",
                why,
            )
            return nothing
        possible = (_possible_ids(topk, at) for at in range(len(topk.manifests)))
        if all(ids is not None and is_part_of(ids, found) for ids in possible):
            return nothing
        return KnownIds(tokenizer=source.tokenizer_folder, token_ids=found)

    def checked(self, documents: PartDocuments) -> PartDocuments:
        """The same documents. Iterating them raises RecipeError at the first with an id that no tokenizer has."""
        if self.token_ids is None:
            return documents
        token_ids = self.token_ids

        def looked_at() -> Iterator[JoinedDocument]:
            for document in documents:
                self._check(document, token_ids)
                yield document

        return PartDocuments(looked_at, len(documents))

    def _check(self, document: JoinedDocument, token_ids: TokenIds) -> None:
        topk = document.topk
        if topk is None:
            return
        drawn = () if topk.sampled_ids is None else (("random draws", topk.sampled_ids.values),)
        for where, ids in (("top-k", topk.ids_Mk), *drawn):
            if (unknown := first_outside(token_ids, ids)) is not None:
                raise RecipeError(
                    f"document {document.document_id!r} of partition {document.partition_key!r} has the id {unknown} "
                    f"among its {where}, and the tokenizer in {self.tokenizer} has no such token: the teacher's head "
                    "is longer than its vocabulary. Set `vocabulary: tokenizer` in caches.topk of the recipe, which "
                    "leaves such ids out, materialize the cache again, and export that"
                )


def is_part_of(ids: TokenIds, others: TokenIds) -> bool:
    """Whether each of `ids` is among the others."""
    return all(any(first <= run[0] and run[1] <= end for first, end in others.runs) for run in ids.runs)


def first_outside(token_ids: TokenIds, ids: npt.NDArray[Any]) -> int | None:
    """The first of `ids` that is not in the set."""
    size = token_ids.size_if_whole
    if not ids.size or (size is not None and int(ids.max()) < size):
        return None
    is_in = is_among(token_ids, ids)
    return None if is_in.all() else int(ids[~is_in][0])


def _possible_ids(topk: Chosen, at: int) -> TokenIds | None:
    """The ids that a result can hold at all; None where nothing says so."""
    manifest = topk.manifests[at]
    size = manifest.facts.get("vocab_size")
    try:
        cut = vocabulary_of(manifest, topk.folders[at])
    except InputError:
        cut = None
    if not isinstance(size, int) or size < 1:
        return cut
    return TokenIds.below(size) if cut is None else cut.cut(size)


def _ids_of_tokenizer(topk: Chosen, source: Source) -> tuple[TokenIds | None, str]:
    """The ids of the tokenizer that the caches were made with, or why they cannot be told."""
    folder = source.tokenizer_folder
    if folder is None:
        return None, "the tokenizer is not on this machine"
    made_with = {manifest.identity.get("tokenizer_fingerprint") for manifest in topk.manifests}
    try:
        if made_with != {tokenizer_fingerprint(folder, None)}:
            return None, f"the tokenizer in {folder} is another one than the cache was made with"
        return teacher_token_ids(folder), ""
    except InputError as e:
        return None, str(e)
