"""Caches of a made-up teacher that a student can learn from: what it says depends on the token before, and only on it.

Every number is known without the store: `BigramTeacher` is what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd_assets.contract import CACHES, Asset, PositionChoice, TokenIds
from kd_assets.store import (
    FORMAT_VERSION,
    Documents,
    ResultWriter,
    encode_embeddings,
    encode_hidden_states,
    encode_topk,
    part_stats,
    plan_output,
    plan_parts,
)
from kd_assets.store.positions import ALL, kept_positions
from kd_assets.store.writing.documents import KeptPositions

RECIPE = "made-up"
VOCABULARY = 32
K = 8
HIDDEN_SIZE = 16
BLOCK = 3
MAX_LENGTHS: dict[Asset, int] = {"topk_cache": 24, "hidden_state_cache": 12, "embedding_cache": 24}


@dataclass(frozen=True, slots=True)
class BigramTeacher:
    """Logits and states are looked up by token."""

    seed: int = 0
    logits_VV: Tensor = field(init=False)
    states_VH: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        logits = torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 2
        states = torch.randn(VOCABULARY, HIDDEN_SIZE, generator=generator)
        object.__setattr__(self, "logits_VV", logits)
        object.__setattr__(self, "states_VH", states)

    def drawn(self, logits_MV: Tensor, draws: int) -> npt.NDArray[np.uint32]:
        """uint32 [M, draws]: token ids drawn at random with replacement."""
        if not len(logits_MV):
            return np.zeros((0, draws), np.uint32)
        generator = torch.Generator().manual_seed(self.seed)
        ids_Md = logits_MV.softmax(-1).multinomial(draws, replacement=True, generator=generator)
        return ids_Md.numpy().astype(np.uint32)


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeUpDocument:
    document_id: str
    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


def made_up_documents(n: int, *, seed: int = 0, longest: int = 20) -> list[MadeUpDocument]:
    """Documents of 1 to `longest` tokens; the first halves of their tokens are not to be learned."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        length = int(rng.integers(1, longest + 1))
        ids = tuple(rng.integers(0, VOCABULARY, length).tolist())
        found.append(
            MadeUpDocument(
                document_id=f"doc-{i}", input_ids=ids, loss_mask=tuple(j >= length // 2 for j in range(length))
            )
        )
    return found


def commit_caches(
    store: Path,
    partition_key: str,
    documents: Sequence[MadeUpDocument],
    *,
    teacher: BigramTeacher | None = None,
    assets: Sequence[Asset] = CACHES,
    shard: str = "shard",
    facts: Mapping[str, Any] | None = None,
    draws: int = 0,
    positions: PositionChoice = ALL,
    token_ids: TokenIds | None = None,
) -> dict[Asset, Path]:
    """Commit caches of these documents, in this order and two documents to a part; asset → folder.

    With `draws` the top-k cache has as many random draws of each position; `positions`: which are kept; `token_ids`:
    the student's, to which the top-k cache is cut.
    """
    teacher = teacher or BigramTeacher()
    recipe_folder = store / RECIPE
    folders: dict[Asset, Path] = {}
    for asset in assets:
        identity = {"asset": asset, "format_version": FORMAT_VERSION, "input": f"{shard} of {partition_key}"}
        output = plan_output(asset, identity, recipe_folder=recipe_folder, partition_key=partition_key)
        cut = _flat(documents).slice(0, len(documents), MAX_LENGTHS[asset])
        plans = plan_parts(cut.n_tokens_D, max_documents=2, max_tokens=10**6)
        with ResultWriter(output, recipe=RECIPE, recipe_folder=recipe_folder, partition_key=partition_key) as writer:
            for plan in plans:
                part = cut.slice(plan.first_document, plan.n_documents)
                table = _encoded(asset, part, teacher, draws, positions, token_ids)
                writer.write_part(plan.index, table, n_tokens=part.n_tokens, stats=part_stats(asset, table))
            writer.commit(parts=len(plans), checks={}, provenance={}, facts=facts or {"vocab_size": VOCABULARY})
        folders[asset] = writer.folder
    return folders


def _flat(documents: Sequence[MadeUpDocument]) -> Documents:
    return Documents(
        document_ids=[d.document_id for d in documents],
        offsets=np.cumsum([0] + [len(d.input_ids) for d in documents]).astype(np.int64),
        input_ids=np.array([i for d in documents for i in d.input_ids], dtype=np.uint32),
        loss_mask=np.array([m for d in documents for m in d.loss_mask], dtype=np.bool_),
    )


def of_window(documents: Documents, kept: KeptPositions) -> Any:
    """int64: where the kept positions are among the tokens of all documents."""
    starts = np.repeat(documents.offsets[:-1], np.diff(kept.offsets))
    return torch.from_numpy(starts + kept.positions_M.astype(np.int64))


def _encoded(
    asset: Asset,
    documents: Documents,
    teacher: BigramTeacher,
    draws: int,
    choice: PositionChoice,
    token_ids: TokenIds | None,
) -> Any:
    kept = None if asset == "embedding_cache" else kept_positions(choice, documents, has_next=asset == "topk_cache")
    ids = torch.from_numpy(documents.input_ids.astype(np.int64))
    if asset == "topk_cache":
        last = torch.zeros(len(ids), dtype=torch.bool)
        last[torch.from_numpy(documents.offsets[1:] - 1)] = True
        wanted = torch.arange(len(ids))[~last] if kept is None else of_window(documents, kept)
        logits = teacher.logits_VV[ids[wanted]]
        mass = None
        if token_ids is not None:
            is_out_V = torch.tensor([i not in token_ids for i in range(logits.shape[1])])
            mass = logits.softmax(-1)[:, is_out_V].sum(-1).numpy()
            logits = logits.masked_fill(is_out_V, -torch.inf)
        top = logits.log_softmax(-1).topk(K)
        targets = ids[wanted + 1]
        return encode_topk(
            documents,
            topk_ids_Mk=top.indices.numpy().astype(np.uint32),
            topk_logprobs_Mk=top.values.numpy().astype(np.float16),
            logsumexp_M=logits.logsumexp(-1).numpy(),
            target_logprob_M=logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].numpy(),
            sampled_ids_Md=teacher.drawn(logits, draws) if draws else None,
            outside_mass_M=mass,
            positions=kept,
        )
    states = teacher.states_VH[ids]
    if asset == "hidden_state_cache":
        of_kept = states if kept is None else states[of_window(documents, kept)]
        return encode_hidden_states(documents, {BLOCK: of_kept.bfloat16().view(torch.uint16).numpy()}, kept)
    of_documents = torch.split(states, documents.n_tokens_D.tolist())
    return encode_embeddings(
        documents,
        mean_DH=torch.stack([s.mean(0) for s in of_documents]).numpy(),
        last_token_DH=torch.stack([s[-1] for s in of_documents]).numpy(),
    )
