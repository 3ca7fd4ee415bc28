"""What the caches keep of a window: steps from its batches, and their results put back into document order.

Used by `kd_assets.teacher` only. Names: D = documents of a window, B = documents of a batch, N = real tokens,
M = positions that have a next token (N - D), H = hidden size, k of top-k, d = draws.

The invariant: only real tokens are read. A step names the rows it keeps, so that padding never goes through the head,
and never into a mean; and what it runs does not depend on what is kept. There is no loop over tokens: positions are
index arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from kd_assets.contract import (
    Asset,
    EmbeddingParams,
    FinalState,
    HiddenStateParams,
    TeacherParams,
    TokenIds,
    TopkParams,
)
from kd_assets.errors import NonFiniteTeacherError
from kd_assets.store import Documents, KeptPositions, Shard, encode_embeddings, encode_hidden_states, encode_topk
from kd_assets.store.positions import kept_positions
from kd_assets.store.schema import HiddenState
from kd_assets.teacher.batch.engine import BlockStates, PooledStates, Step, StepResult, TopkRows, TopkStep
from kd_assets.teacher.batch.sampling import uniforms
from kd_assets.teacher.partition.batching import Batch, concatenated_ranges, padded_ids

Int64Array = npt.NDArray[np.int64]
UnsignedArray = npt.NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRequest:
    """The caches that a window still misses."""

    topk: TopkParams | None = None
    hidden_states: HiddenStateParams | None = None
    embeddings: EmbeddingParams | None = None

    @staticmethod
    def of(params: TeacherParams, assets: set[Asset]) -> CacheRequest:
        return CacheRequest(
            topk=params.topk if "topk_cache" in assets else None,
            hidden_states=params.hidden_states if "hidden_state_cache" in assets else None,
            embeddings=params.embeddings if "embedding_cache" in assets else None,
        )

    @property
    def blocks(self) -> tuple[int, ...]:
        return () if self.hidden_states is None else self.hidden_states.blocks

    @property
    def final(self) -> tuple[FinalState, ...]:
        return () if self.hidden_states is None else self.hidden_states.final


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptRows:
    """The rows of a cache of a window: where each document's begin, and which position each is of."""

    offsets: Int64Array
    """int64 [D + 1]."""
    positions_M: Int64Array | None
    """None: a document's rows are its positions from 0 on."""

    @staticmethod
    def of(documents: Documents, positions: KeptPositions | None, *, has_next: bool) -> KeptRows:
        if positions is not None:
            return KeptRows(offsets=positions.offsets, positions_M=positions.positions_M.astype(np.int64))
        one_less = np.arange(documents.n_documents + 1) if has_next else 0
        return KeptRows(offsets=documents.offsets - one_less, positions_M=None)

    def lengths(self, documents_B: Int64Array) -> Int64Array:
        """int64 [B]: rows of each of these documents."""
        lengths_B: Int64Array = self.offsets[documents_B + 1] - self.offsets[documents_B]
        return lengths_B

    def rows(self, documents_B: Int64Array) -> Int64Array:
        """int64: the rows of these documents, one document after the other."""
        return concatenated_ranges(self.offsets[documents_B], self.lengths(documents_B))

    def positions(self, documents_B: Int64Array) -> Int64Array:
        """int64: the position, in its document, of each of those rows."""
        if self.positions_M is None:
            return concatenated_ranges(np.zeros_like(documents_B), self.lengths(documents_B))
        return self.positions_M[self.rows(documents_B)]

    def batch_rows(self, batch: Batch) -> Int64Array:
        """int64: where each of those rows is in the flattened batch."""
        starts_B = np.arange(len(batch.documents_B), dtype=np.int64) * batch.width
        documents_B = batch.documents_B
        return np.repeat(starts_B, self.lengths(documents_B)) + self.positions(documents_B)


@dataclass(frozen=True, kw_only=True, slots=True)
class TopkArrays:
    """The top-k cache of a window, rows in document order."""

    documents: Documents
    positions: KeptPositions | None
    """None: all that have a next token."""
    ids_Mk: npt.NDArray[np.uint32]
    logprobs_Mk: npt.NDArray[np.float16]
    logsumexp_M: npt.NDArray[np.float32]
    target_logprob_M: npt.NDArray[np.float32]
    sampled_ids_Md: UnsignedArray | None
    token_ids: TokenIds | None
    """The ids that distributions are cut to; None: all."""
    outside_mass_M: npt.NDArray[np.float32] | None
    keeps_logsumexp: bool
    top_p: float | None
    """Where given, the rows are cut to it once they are all there."""

    @staticmethod
    def empty(documents: Documents, params: TopkParams) -> TopkArrays:
        positions = kept_positions(params.positions, documents, has_next=True)
        m = documents.n_tokens - documents.n_documents if positions is None else len(positions.positions_M)
        return TopkArrays(
            documents=documents,
            positions=positions,
            ids_Mk=np.empty((m, params.k), np.uint32),
            logprobs_Mk=np.empty((m, params.k), np.float16),
            logsumexp_M=np.empty(m, np.float32),
            target_logprob_M=np.empty(m, np.float32),
            sampled_ids_Md=np.empty((m, params.draws), np.uint32) if params.draws else None,
            token_ids=params.token_ids,
            outside_mass_M=None if params.token_ids is None else np.empty(m, np.float32),
            keeps_logsumexp=params.logsumexp,
            top_p=params.top_p,
        )

    @property
    def rows(self) -> KeptRows:
        return KeptRows.of(self.documents, self.positions, has_next=True)

    def table(self) -> pa.Table:
        return encode_topk(
            self.documents,
            topk_ids_Mk=self.ids_Mk,
            topk_logprobs_Mk=self.logprobs_Mk,
            logsumexp_M=self.logsumexp_M if self.keeps_logsumexp else None,
            target_logprob_M=self.target_logprob_M,
            sampled_ids_Md=self.sampled_ids_Md,
            outside_mass_M=self.outside_mass_M,
            positions=self.positions,
            top_p=self.top_p,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenStateArrays:
    """The hidden-state cache of a window: bits of bfloat16, rows in document order."""

    documents: Documents
    positions: KeptPositions | None
    """None: all."""
    block_NH: dict[HiddenState, npt.NDArray[np.uint16]]

    @staticmethod
    def empty(documents: Documents, params: HiddenStateParams, hidden_size: int) -> HiddenStateArrays:
        positions = kept_positions(params.positions, documents, has_next=False)
        shape = (documents.n_tokens if positions is None else len(positions.positions_M), hidden_size)
        states: tuple[HiddenState, ...] = (*params.blocks, *params.final)
        return HiddenStateArrays(
            documents=documents, positions=positions, block_NH={n: np.empty(shape, np.uint16) for n in states}
        )

    @property
    def rows(self) -> KeptRows:
        return KeptRows.of(self.documents, self.positions, has_next=False)

    def table(self) -> pa.Table:
        return encode_hidden_states(self.documents, self.block_NH, self.positions)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingArrays:
    """The embedding cache of a window, a row a document."""

    documents: Documents
    mean_DH: npt.NDArray[np.float32]
    last_token_DH: npt.NDArray[np.float32]

    @staticmethod
    def empty(documents: Documents, hidden_size: int) -> EmbeddingArrays:
        shape = (documents.n_documents, hidden_size)
        return EmbeddingArrays(
            documents=documents, mean_DH=np.empty(shape, np.float32), last_token_DH=np.empty(shape, np.float32)
        )

    def table(self) -> pa.Table:
        return encode_embeddings(self.documents, mean_DH=self.mean_DH, last_token_DH=self.last_token_DH)


CacheArrays = TopkArrays | HiddenStateArrays | EmbeddingArrays


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A run of documents whose results become one part of each wanted cache; filled batch by batch."""

    documents: Documents
    """Cut to the longest `max_length` of the recipe: what the batches run."""
    wanted: CacheRequest
    topk: TopkArrays | None
    hidden_states: HiddenStateArrays | None
    embeddings: EmbeddingArrays | None

    @staticmethod
    def of(
        shard: Shard, first_document: int, n_documents: int, *, max_length: int, wanted: CacheRequest, hidden_size: int
    ) -> Window:
        cut: Callable[[int], Documents] = partial(shard.slice, first_document, n_documents)
        topk, hidden, embeddings = wanted.topk, wanted.hidden_states, wanted.embeddings
        return Window(
            documents=cut(max_length),
            wanted=wanted,
            topk=None if topk is None else TopkArrays.empty(cut(topk.max_length), topk),
            hidden_states=None
            if hidden is None
            else HiddenStateArrays.empty(cut(hidden.max_length), hidden, hidden_size),
            embeddings=None if embeddings is None else EmbeddingArrays.empty(cut(embeddings.max_length), hidden_size),
        )

    def arrays(self) -> dict[Asset, CacheArrays]:
        """What was captured, by asset."""
        captured: dict[Asset, CacheArrays | None] = {
            "topk_cache": self.topk,
            "hidden_state_cache": self.hidden_states,
            "embedding_cache": self.embeddings,
        }
        return {asset: arrays for asset, arrays in captured.items() if arrays is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Capture:
    """One batch of one window: the step it asks for, and where the step's result goes."""

    window: Window
    batch: Batch
    partition_key: str
    seed: int
    """Of the draws."""

    def step(self) -> Step:
        """What the devices have to do. The forward is the same whichever caches are wanted."""
        window, batch = self.window, self.batch
        hidden, embeddings, topk = window.hidden_states, window.embeddings, window.topk
        return Step(
            ids_BT=padded_ids(window.documents.input_ids, window.documents.offsets, batch),
            blocks=window.wanted.blocks,
            final=window.wanted.final,
            rows_N=hidden.rows.batch_rows(batch) if hidden else np.zeros(0, np.int64),
            pooled_lengths_B=self._lengths_B(embeddings.documents) if embeddings else None,
            topk=self._topk_step(topk) if topk else None,
        )

    def keep(self, result: StepResult) -> None:
        """Put a result, in memory that numpy can read, into the window. Raises NonFiniteTeacherError naming a document.

        Never while another result of the same window is being put there from another thread.
        """
        if self.window.hidden_states is not None:
            for n, block in result.blocks.items():
                self._keep_block(self.window.hidden_states, n, block)
        if self.window.embeddings is not None and result.pooled is not None:
            self._keep_embeddings(self.window.embeddings, result.pooled)
        if self.window.topk is not None and result.topk is not None:
            self._keep_topk(self.window.topk, result.topk)

    def _lengths_B(self, documents: Documents) -> Int64Array:
        """Tokens of the batch's documents as a cache has them."""
        lengths_B: Int64Array = documents.n_tokens_D[self.batch.documents_B]
        return lengths_B

    def _topk_step(self, kept: TopkArrays) -> TopkStep:
        documents, documents_B, rows = kept.documents, self.batch.documents_B, kept.rows
        positions_M = rows.positions(documents_B)
        next_tokens_M = np.repeat(documents.offsets[documents_B] + 1, rows.lengths(documents_B)) + positions_M
        drawn = None
        if kept.sampled_ids_Md is not None:
            draws = kept.sampled_ids_Md.shape[1]
            lengths_B = self._lengths_B(documents) - 1
            # A position's numbers are its own, whichever others are kept.
            drawn = np.concatenate(
                [
                    uniforms(self.seed, documents.document_ids[i], int(n), draws)[rows.positions(np.array([i]))]
                    for i, n in zip(documents_B, lengths_B, strict=True)
                ]
            )
        return TopkStep(
            k=kept.ids_Mk.shape[1],
            rows_M=rows.batch_rows(self.batch),
            targets_M=documents.input_ids[next_tokens_M].astype(np.int64),
            uniforms_Md=drawn,
            token_ids=kept.token_ids,
        )

    def _keep_block(self, kept: HiddenStateArrays, block: HiddenState, found: BlockStates) -> None:
        rows, documents_B = kept.rows, self.batch.documents_B
        where = f"block {block}" if isinstance(block, int) else f"the final state {block}"
        self._check_finite(found.finite_N, kept.documents, rows.lengths(documents_B), where)
        kept.block_NH[block][rows.rows(documents_B)] = found.bits_NH.numpy().view(np.uint16)

    def _keep_embeddings(self, kept: EmbeddingArrays, found: PooledStates) -> None:
        documents_B = self.batch.documents_B
        self._check_finite(found.finite_B, kept.documents, np.ones_like(documents_B), "the final hidden state")
        kept.mean_DH[documents_B] = found.mean_BH.numpy()
        kept.last_token_DH[documents_B] = found.last_BH.numpy()

    def _keep_topk(self, kept: TopkArrays, found: TopkRows) -> None:
        rows, documents_B = kept.rows, self.batch.documents_B
        self._check_finite(found.finite_M, kept.documents, rows.lengths(documents_B), "the logits")
        to_M = rows.rows(documents_B)
        kept.ids_Mk[to_M] = found.ids_Mk.numpy().view(np.uint32)
        kept.logprobs_Mk[to_M] = found.logprobs_Mk.numpy()
        kept.logsumexp_M[to_M] = found.logsumexp_M.numpy()
        kept.target_logprob_M[to_M] = found.target_logprob_M.numpy()
        if kept.sampled_ids_Md is not None and found.sampled_ids_Md is not None:
            kept.sampled_ids_Md[to_M] = found.sampled_ids_Md.numpy().view(np.uint32)
        if kept.outside_mass_M is not None and found.outside_mass_M is not None:
            kept.outside_mass_M[to_M] = found.outside_mass_M.numpy()

    def _check_finite(self, finite: Tensor, documents: Documents, lengths_B: Int64Array, where: str) -> None:
        """`finite` [sum of lengths]: one flag a row."""
        if bool(finite.all()):
            return
        row = int((~finite).nonzero()[0])
        document = int(np.repeat(self.batch.documents_B, lengths_B)[row])
        n_tokens = int(documents.n_tokens_D[document])
        raise NonFiniteTeacherError(
            f"partition {self.partition_key}: the teacher gave NaN or infinity in {where} for document "
            f"{documents.document_ids[document]!r} ({n_tokens} tokens): "
            "look at this document and at the teacher's weights; in float16 a wider dtype (bfloat16) may help"
        )
