"""A recipe's top-k cache as an oracle: token ids in, the teacher's predictions of them out, or why there are none.

Row i of a document depends on its tokens 0 to i alone, so a sequence that a document begins with has the document's
first rows. The invariant: rows are given of a document whose ids are those that were asked, compared id by id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kd_assets.errors import NotCommittedError, NotInCacheError, RecipeError, RefusedRequestError
from kd_assets.replay.index import Int64Array, PrefixIndex, Uint32Array, documents_of
from kd_assets.store import CacheReader, Chosen, Ragged, choose
from kd_assets.store.ragged_topk import with_rows_of_k
from kd_assets.store.schema import k_of, top_p_of
from kd_assets.store.vocabulary import vocabulary_of

NotKept = Literal["refuse", "null"]
"""What to answer for rows that a cache of some positions does not keep."""

OnProgress = Callable[[int, int], None]
"""Is told from time to time how many documents are indexed, and of how many."""

_TOLD_EVERY = 1_000

MAX_CANDIDATES = 2_048
"""Documents that are compared with the sequences of one request before it is given up: seconds of reading."""

_FIELDS = ("input_ids", "topk_ids", "topk_logprobs", "target_logprob", "outside_mass", "positions")
_COMPARED_FIELDS = ("input_ids", "positions")
_NO_ID = np.iinfo(np.uint32).max
"""Behind what a row keeps."""
_CACHE_BYTES = 128 << 20
"""Decoded, of each process."""
_COMPARED_CACHE_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """The teacher's predictions of tokens of one sequence: M rows of the cache's own k. Natural log, temperature 1."""

    ids_L: Uint32Array
    """Of the sequence."""
    tokens_M: npt.NDArray[np.int64]
    """Which tokens of the sequence the rows are about, ascending: token t is predicted from tokens 0 to t − 1."""
    topk_ids_Mk: Uint32Array
    """Most probable first."""
    topk_logprobs_Mk: npt.NDArray[np.float16]
    target_logprob_M: npt.NDArray[np.float32]
    """Of the sequence's own tokens."""
    target_rank_M: npt.NDArray[np.int64]
    """Of the sequence's own tokens, from 1; one more than are kept where it is not among these: then it may be any from
    there on."""
    n_kept_M: npt.NDArray[np.int64]
    """How many tokens a row has: k, or fewer, behind which stand no ids and -inf."""
    outside_mass_M: npt.NDArray[np.float32] | None
    """Of a cache that is cut to a vocabulary: the teacher's probability of all other ids, which is in no other number
    here."""

    @property
    def target_in_topk_M(self) -> npt.NDArray[np.bool_]:
        """Whether the rank of the sequence's own token is known."""
        in_topk: npt.NDArray[np.bool_] = self.target_rank_M <= self.n_kept_M
        return in_topk


class Search:
    """What one request has found, and how many documents may still be compared for it."""

    def __init__(self) -> None:
        self.found: dict[tuple[bytes, int], int] = {}
        """Token ids of a sequence, and the first that is asked for → the number of its document, whose rows are much
        and the reader's to keep."""
        self.n_compared = 0


class ReplayCache:
    """Finds sequences among the documents of a top-k cache. May be forked: processes share what it holds."""

    def __init__(self, chosen: Chosen, *, not_kept: NotKept = "refuse", on_progress: OnProgress | None = None) -> None:
        """Reads the token ids of all documents once. Raises NotCommittedError for a cache without documents."""
        n_documents = sum(manifest.n_documents for manifest in chosen.manifests)
        if not n_documents:
            raise NotCommittedError(f"the top-k cache in {chosen.folders[0]} has no documents to answer from")
        schema = CacheReader.of(chosen).schema
        self.k = k_of(schema)
        """Of each position, or at most where the cache has `top_p`."""
        self.top_p = top_p_of(schema)
        self.keeps_all = "positions" not in schema.names
        self._not_kept = not_kept
        fields, compared = ([n for n in names if n in schema.names] for names in (_FIELDS, _COMPARED_FIELDS))
        self._reader = CacheReader.of(chosen, fields=fields, cache_bytes=_CACHE_BYTES)
        # Most of what is compared is not the document that is asked for, and its predictions are not decoded.
        self._compared = CacheReader.of(chosen, fields=compared, cache_bytes=_COMPARED_CACHE_BYTES)
        first = chosen.manifests[0]
        self.recipe, self.variant = first.recipe, first.variant
        self.provenance: dict[str, Any] = dict(first.provenance)
        vocabulary = first.facts.get("vocab_size")
        self.vocabulary = vocabulary if isinstance(vocabulary, int) else 1 << 32
        """Token ids are below it."""
        token_ids = vocabulary_of(first, chosen.folders[0])
        self.cut_to = None if token_ids is None else len(token_ids)
        """How many ids the cache's numbers are of; None: all of the teacher's."""
        self.n_partitions = len(chosen.manifests)
        documents = documents_of(chosen)
        self.index = PrefixIndex(documents if on_progress is None else _told(documents, n_documents, on_progress))

    @property
    def description(self) -> str:
        """What is served, in a line."""
        cut = "" if self.cut_to is None else f"cut to {self.cut_to:,} token ids, "
        mass = "" if self.top_p is None else f" at most, as many as have a mass of {self.top_p}"
        return (
            f"recipe {self.recipe}, topk_cache {self.variant}, {len(self.index):,} documents of {self.n_partitions:,} "
            f"partitions, k = {self.k}{mass}, {cut}an index of {self.index.n_bytes / 2**20:,.1f} MiB"
        )

    def rows(self, ids_L: Uint32Array, *, first: int, k: int, name: str, search: Search | None = None) -> Rows:
        """The rows about the tokens from `first` on. `name`: of the sequence, in errors. `search`: of its request.

        Of documents that begin with the sequence the first is taken that keeps all of these rows, else the one that
        keeps most. Raises RefusedRequestError for a `k` above the cache's own, NotInCacheError for a sequence that no
        document begins with or that would take too many comparisons, and for rows that are not kept, unless they may be
        left out.
        """
        self.require_k(k)
        document = self._reader[self._found(ids_L, max(first, 1), name, search or Search())]
        wanted = np.arange(max(first, 1), len(ids_L), dtype=np.int64)
        kept = wanted
        at = wanted - 1
        if not self.keeps_all:
            positions = document["positions"].astype(np.int64)
            at = np.flatnonzero((positions >= max(first, 1) - 1) & (positions < len(ids_L) - 1))
            kept = positions[at] + 1
            if len(kept) < len(wanted) and self._not_kept == "refuse":
                absent = np.setdiff1d(wanted, kept)
                raise NotInCacheError(
                    f"{name} asks for the predictions of {len(wanted)} tokens, and the cache keeps some positions "
                    f"only: it has none of token {absent[0]} (counted from 0), and of {len(absent)} in all. Ask for "
                    "the tokens that are learned, make the cache with `positions: all`, or start the server with "
                    "`--not-kept null` where what is asked besides is not used"
                )
        n_kept_M = self._kept(document, at, kept, k=k, name=name)
        document = with_rows_of_k(document, self.k, _NO_ID)
        topk_ids_Mk = document["topk_ids"][at]
        is_target_Mk = topk_ids_Mk == ids_L[kept][:, None]
        found_M = is_target_Mk.any(axis=1)
        return Rows(
            ids_L=ids_L,
            tokens_M=kept,
            topk_ids_Mk=topk_ids_Mk,
            topk_logprobs_Mk=document["topk_logprobs"][at],
            target_logprob_M=document["target_logprob"][at],
            target_rank_M=np.where(found_M, is_target_Mk.argmax(axis=1), n_kept_M) + 1,
            n_kept_M=n_kept_M,
            outside_mass_M=None if self.cut_to is None else document["outside_mass"][at],
        )

    def _kept(
        self,
        document: Mapping[str, Any],
        at: npt.NDArray[np.int64],
        tokens_M: npt.NDArray[np.int64],
        *,
        k: int,
        name: str,
    ) -> npt.NDArray[np.int64]:
        """int64 [M]: how many tokens these rows keep. Raises RefusedRequestError for a `k` above it."""
        ids = document["topk_ids"]
        if not isinstance(ids, Ragged):
            return np.full(len(at), self.k, dtype=np.int64)
        n_M: npt.NDArray[np.int64] = ids.lengths[at].astype(np.int64)
        if (fewer := np.flatnonzero(n_M < k)).size:
            raise RefusedRequestError(
                f"the {k} most probable tokens are asked for, and the cache of recipe {self.recipe} keeps as many as "
                f"have a mass of {self.top_p} (top_p): of token {tokens_M[fewer[0]]} of {name} (counted from 0) "
                f"{n_M[fewer[0]]}. Ask for 1, or make the cache without top_p"
            )
        return n_M

    def require_k(self, k: int) -> None:
        """Raise RefusedRequestError unless the cache has this many log-probabilities of a position."""
        if not 0 <= k <= self.k:
            raise RefusedRequestError(
                f"the {k} most probable tokens are asked for, and the cache of recipe {self.recipe} has {self.k} of "
                f"each position: ask for 0 to {self.k}, or make the cache with a larger k"
            )

    def _found(self, ids_L: Uint32Array, first: int, name: str, search: Search) -> int:
        """The number of the document that answers for the tokens from `first` ≥ 1 on. Raises as `rows` does."""
        key = ids_L.tobytes(), first
        if key not in search.found:
            search.found[key] = self._looked_for(ids_L, first, name, search)
        return search.found[key]

    def _looked_for(self, ids_L: Uint32Array, first: int, name: str, search: Search) -> int:
        n_wanted = max(len(ids_L) - first, 0)
        best, n_best, gave_up = -1, -1, False
        whole = self.index.exact(ids_L)
        for at, number in enumerate(self._candidates(ids_L, whole)):
            # A whole document is found, however much else the request asks.
            if at or not len(whole):
                gave_up = search.n_compared >= MAX_CANDIDATES
                if gave_up:
                    break
                search.n_compared += 1
            n_kept = self._n_kept(number, ids_L, first)
            if n_kept is not None and n_kept > n_best:
                best, n_best = number, n_kept
            if n_best == n_wanted:
                break
        if n_best < 0:
            raise self._miss(ids_L, name, gave_up=gave_up)
        return best

    def _candidates(self, ids_L: Uint32Array, whole: Int64Array) -> Iterator[int]:
        """Documents that may begin with these ids, those in `whole`, which may be these ids and no more, first."""
        yield from whole.tolist()
        # Documents that begin alike have the same rows there, but a cache of some positions keeps others of each.
        begin = self.index.beginning_with(ids_L, one_of_equal=self.keeps_all).documents
        # In the order in which they lie: documents beside each other are decoded together.
        yield from np.setdiff1d(begin[: MAX_CANDIDATES + len(whole) + 1], whole).tolist()

    def _n_kept(self, number: int, ids_L: Uint32Array, first: int) -> int | None:
        """How many of the rows about the tokens from `first` on a document keeps; None: it begins with other ids."""
        document = self._compared[number]
        if not np.array_equal(document["input_ids"][: len(ids_L)], ids_L):
            return None
        if self.keeps_all:
            return max(len(ids_L) - first, 0)
        positions = document["positions"].astype(np.int64)
        return int(np.count_nonzero((positions >= first - 1) & (positions < len(ids_L) - 1)))

    def _miss(self, ids_L: Uint32Array, name: str, *, gave_up: bool) -> NotInCacheError:
        """Why there is no document that begins with these ids, or none that was found."""
        beginning = self.index.beginning_with(ids_L, one_of_equal=self.keeps_all)
        if gave_up:
            return NotInCacheError(
                f"{name} ({len(ids_L)} token ids) is no whole document, and {len(beginning.documents)} documents "
                f"begin with its first {beginning.known_length} ids: with the request's other sequences more than the "
                f"{MAX_CANDIDATES} that are compared for one request. Ask for whole documents, or for fewer sequences "
                "at a time"
            )
        for number in beginning.shorter[:8]:
            held = self._compared[int(number)]["input_ids"]
            if np.array_equal(ids_L[: len(held)], held):
                return NotInCacheError(
                    f"{name} ({len(ids_L)} token ids) is longer than what the cache has: its document ends after "
                    f"{len(held)}. Cut it there, or make the cache with a larger max_length"
                )
        return NotInCacheError(
            f"{name} ({len(ids_L)} token ids) is not in the top-k cache of recipe {self.recipe}, variant "
            f"{self.variant} ({len(self.index)} documents of {self.n_partitions} partitions): "
            f"{_likeness(beginning.known_length)}. "
            "Only sequences that a cached document begins with have an answer; nothing is computed here"
        )


def _told(documents: Iterator[Uint32Array], n_documents: int, tell: OnProgress) -> Iterator[Uint32Array]:
    for number, ids_L in enumerate(documents):
        if number % _TOLD_EVERY == 0:
            tell(number, n_documents)
        yield ids_L


def _likeness(known: int) -> str:
    if not known:
        return "no document begins with its first id (another tokenizer, or no BOS token?)"
    ids = "its first id" if known == 1 else f"its first {known} ids"
    return f"a document begins with {ids}, none with all of them"


def open_cache(
    recipe_folder: Path,
    *,
    variant: str | None = None,
    partition_keys: list[str] | None = None,
    not_kept: NotKept = "refuse",
    on_progress: OnProgress | None = None,
) -> ReplayCache:
    """The top-k cache of a recipe, chosen and refused as readers of a recipe do (see `kd_assets.store.choose`)."""
    chosen = choose(recipe_folder, "topk_cache", variant=variant, partition_keys=partition_keys)
    cache = ReplayCache(chosen, not_kept=not_kept, on_progress=on_progress)
    if cache.keeps_all and not_kept == "null":
        raise RecipeError("--not-kept null is for caches that keep some positions, and this one keeps all")
    return cache
