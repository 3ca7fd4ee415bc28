"""From the states of a batch to what the caches keep of its documents, put back into document order.

Used by `kd_assets.teacher` only. Names: D = documents of a window, B = documents of a batch, T = its padded tokens,
F = B x T, N = real tokens, M = positions that have a next token (N - D), H = hidden size, V = vocabulary, k of top-k.

The invariant: only real tokens are read. Rows are gathered by index before anything is computed on them, so that
padding never goes through the head, and never into a mean. There is no loop over tokens: positions are index arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from kd_assets.contract import Asset, EmbeddingParams, HiddenStateParams, TeacherParams, TopkParams
from kd_assets.errors import NonFiniteTeacherError
from kd_assets.store import Documents, Shard, encode_embeddings, encode_hidden_states, encode_topk
from kd_assets.teacher.batching import Batch, batch_rows, concatenated_ranges, padded_ids
from kd_assets.teacher.forward import States, run_forward
from kd_assets.teacher.head import ChunkBuffers
from kd_assets.teacher.load import Teacher
from kd_assets.teacher.topk import TopK, topk_logprobs

Int64Array = npt.NDArray[np.int64]
UnsignedArray = npt.NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The caches that a window still misses."""

    topk: TopkParams | None = None
    hidden_states: HiddenStateParams | None = None
    embeddings: EmbeddingParams | None = None

    @staticmethod
    def of(params: TeacherParams, assets: set[Asset]) -> Wanted:
        return Wanted(
            topk=params.topk if "topk_cache" in assets else None,
            hidden_states=params.hidden_states if "hidden_state_cache" in assets else None,
            embeddings=params.embeddings if "embedding_cache" in assets else None,
        )

    @property
    def blocks(self) -> tuple[int, ...]:
        return () if self.hidden_states is None else self.hidden_states.blocks

    @property
    def needs_final(self) -> bool:
        return self.topk is not None or self.embeddings is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class TopkArrays:
    """The top-k cache of a window, rows in document order."""

    documents: Documents
    ids_Mk: npt.NDArray[np.uint32]
    logprobs_Mk: npt.NDArray[np.float16]
    logsumexp_M: npt.NDArray[np.float32]
    target_logprob_M: npt.NDArray[np.float32]

    @staticmethod
    def empty(documents: Documents, k: int) -> TopkArrays:
        m = documents.n_tokens - documents.n_documents
        return TopkArrays(
            documents=documents,
            ids_Mk=np.empty((m, k), np.uint32),
            logprobs_Mk=np.empty((m, k), np.float16),
            logsumexp_M=np.empty(m, np.float32),
            target_logprob_M=np.empty(m, np.float32),
        )

    @property
    def first_rows_D(self) -> Int64Array:
        """int64 [D]: a document's first row; each document before it has one row less than tokens."""
        return self.documents.offsets[:-1] - np.arange(self.documents.n_documents)

    def table(self) -> pa.Table:
        return encode_topk(
            self.documents,
            topk_ids_Mk=self.ids_Mk,
            topk_logprobs_Mk=self.logprobs_Mk,
            logsumexp_M=self.logsumexp_M,
            target_logprob_M=self.target_logprob_M,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenStateArrays:
    """The hidden-state cache of a window: bits of bfloat16, rows in document order."""

    documents: Documents
    block_NH: dict[int, npt.NDArray[np.uint16]]

    @staticmethod
    def empty(documents: Documents, blocks: tuple[int, ...], hidden_size: int) -> HiddenStateArrays:
        shape = (documents.n_tokens, hidden_size)
        return HiddenStateArrays(documents=documents, block_NH={n: np.empty(shape, np.uint16) for n in blocks})

    def table(self) -> pa.Table:
        return encode_hidden_states(self.documents, self.block_NH)


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
    wanted: Wanted
    topk: TopkArrays | None
    hidden_states: HiddenStateArrays | None
    embeddings: EmbeddingArrays | None

    @staticmethod
    def of(
        shard: Shard, first_document: int, n_documents: int, *, max_length: int, wanted: Wanted, teacher: Teacher
    ) -> Window:
        cut: Callable[[int], Documents] = partial(shard.slice, first_document, n_documents)
        topk, hidden, embeddings = wanted.topk, wanted.hidden_states, wanted.embeddings
        return Window(
            documents=cut(max_length),
            wanted=wanted,
            topk=None if topk is None else TopkArrays.empty(cut(topk.max_length), topk.k),
            hidden_states=None
            if hidden is None
            else HiddenStateArrays.empty(cut(hidden.max_length), hidden.blocks, teacher.hidden_size),
            embeddings=None
            if embeddings is None
            else EmbeddingArrays.empty(cut(embeddings.max_length), teacher.hidden_size),
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
    """Runs batches through a teacher and keeps what a window wants of them."""

    teacher: Teacher
    partition_key: str
    buffers: ChunkBuffers = field(kw_only=True)

    @torch.inference_mode()
    def run(self, window: Window, batch: Batch) -> None:
        """One forward, then every wanted cache from its states. Raises NonFiniteTeacherError naming a document."""
        ids_BT = padded_ids(window.documents.input_ids, window.documents.offsets, batch)
        states = run_forward(
            self.teacher,
            torch.from_numpy(ids_BT).to(self.teacher.device),
            blocks=window.wanted.blocks,
            needs_final=window.wanted.needs_final,
        )
        if window.hidden_states is not None:
            self._keep_hidden_states(window.hidden_states, batch, states)
        if window.embeddings is not None:
            self._keep_embeddings(window.embeddings, batch, states)
        if window.topk is not None:
            self._keep_topk(window.topk, batch, states)

    def _keep_hidden_states(self, kept: HiddenStateArrays, batch: Batch, states: States) -> None:
        lengths_B = kept.documents.n_tokens_D[batch.documents_B]
        rows_N = torch.from_numpy(batch_rows(batch, lengths_B)).to(self.teacher.device)
        to_N = concatenated_ranges(kept.documents.offsets[batch.documents_B], lengths_B)
        for block, kept_NH in kept.block_NH.items():
            state_NH = states.block_FH[block].index_select(0, rows_N)
            self._check_finite(state_NH.isfinite().all(dim=1), kept.documents, batch, lengths_B, f"block {block}")
            kept_NH[to_N] = bfloat16_bits(state_NH)

    def _keep_embeddings(self, kept: EmbeddingArrays, batch: Batch, states: States) -> None:
        assert states.final_FH is not None
        lengths_B = kept.documents.n_tokens_D[batch.documents_B]
        final_BTH = states.final_FH.view(len(lengths_B), batch.width, -1)
        mean_BH, last_BH = pooled(final_BTH, torch.from_numpy(lengths_B).to(self.teacher.device))
        finite_B = mean_BH.isfinite().all(dim=1)  # one NaN or infinity among the tokens is one in their mean
        self._check_finite(finite_B, kept.documents, batch, np.ones_like(lengths_B), "the final hidden state")
        kept.mean_DH[batch.documents_B] = mean_BH.cpu().numpy()
        kept.last_token_DH[batch.documents_B] = last_BH.cpu().numpy()

    def _keep_topk(self, kept: TopkArrays, batch: Batch, states: States) -> None:
        """Through the head in chunks of rows: gathered from the final states, without padding and last tokens."""
        documents = kept.documents
        lengths_B = documents.n_tokens_D[batch.documents_B] - 1
        from_M = batch_rows(batch, lengths_B)
        if not len(from_M):
            return
        to_M = concatenated_ranges(kept.first_rows_D[batch.documents_B], lengths_B)
        next_tokens_M = concatenated_ranges(documents.offsets[batch.documents_B] + 1, lengths_B)
        targets_M = torch.from_numpy(documents.input_ids[next_tokens_M].astype(np.int64)).to(self.teacher.device)
        rows_M = torch.from_numpy(from_M).to(self.teacher.device)
        # chunks of equal size: a short last one would waste the matrix product
        n_chunks = -(-len(from_M) // self.buffers.rows)
        found = [
            topk_logprobs(
                logits_NV := self._logits(states, rows_N),
                targets_N,
                kept.ids_Mk.shape[1],
                self.buffers.scratch(len(logits_NV)),
            )
            for rows_N, targets_N in zip(rows_M.chunk(n_chunks), targets_M.chunk(n_chunks), strict=True)
        ]
        finite_M = torch.cat([(f.logsumexp_N + f.target_logprob_N + f.logprobs_Nk.sum(1)).isfinite() for f in found])
        self._check_finite(finite_M, documents, batch, lengths_B, "the logits")
        _scatter_topk(kept, to_M, found)

    def _logits(self, states: States, rows_N: Tensor) -> Tensor:
        """float32 [N, V] of these rows of the flattened batch."""
        if states.logits_FV is not None:
            return self.buffers.widened(states.logits_FV.index_select(0, rows_N))
        assert states.final_FH is not None
        assert self.teacher.head is not None
        return self.teacher.head.logits(states.final_FH.index_select(0, rows_N), self.buffers)

    def _check_finite(
        self, finite: Tensor, documents: Documents, batch: Batch, lengths_B: Int64Array, where: str
    ) -> None:
        """`finite` [sum of lengths]: one flag a row."""
        if bool(finite.all()):
            return
        row = int((~finite).nonzero()[0])
        document = int(np.repeat(batch.documents_B, lengths_B)[row])
        n_tokens = int(documents.n_tokens_D[document])
        raise NonFiniteTeacherError(
            f"partition {self.partition_key}: the teacher gave NaN or infinity in {where} for document "
            f"{documents.document_ids[document]!r} ({n_tokens} tokens): "
            "look at this document and at the teacher's weights; in float16 a wider dtype (bfloat16) may help"
        )


def _scatter_topk(kept: TopkArrays, to_M: Int64Array, found: list[TopK]) -> None:
    kept.ids_Mk[to_M] = _numpy(torch.cat([f.ids_Nk for f in found]).int()).view(np.uint32)
    kept.logprobs_Mk[to_M] = _numpy(torch.cat([f.logprobs_Nk for f in found]).half())
    kept.logsumexp_M[to_M] = _numpy(torch.cat([f.logsumexp_N for f in found]))
    kept.target_logprob_M[to_M] = _numpy(torch.cat([f.target_logprob_N for f in found]))


def pooled(final_BTH: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [B, H] twice: the mean over each document's tokens, and the state of its last one.

    The mean accumulates in float32 whatever the states' precision; padding is left out, not multiplied by 0 (it may
    be NaN).
    """
    positions_T = torch.arange(final_BTH.shape[1], device=final_BTH.device)
    padding_BT1 = (positions_T >= lengths_B.unsqueeze(1)).unsqueeze(2)
    sum_BH = final_BTH.masked_fill(padding_BT1, 0.0).sum(dim=1, dtype=torch.float32)
    last_BH = final_BTH[torch.arange(len(lengths_B), device=final_BTH.device), lengths_B - 1].float()
    return sum_BH / lengths_B.unsqueeze(1), last_BH


def bfloat16_bits(states: Tensor) -> npt.NDArray[np.uint16]:
    """The states rounded to bfloat16 (to nearest, ties to even), as the bits that numpy can hold."""
    return _numpy(states.to(torch.bfloat16).view(torch.int16)).view(np.uint16)


def _numpy(tensor: Tensor) -> npt.NDArray[np.generic]:
    array: npt.NDArray[np.generic] = tensor.cpu().numpy()
    return array
