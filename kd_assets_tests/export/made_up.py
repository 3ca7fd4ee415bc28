"""Caches of random documents and what every number in them is, which exports are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.contract import CACHES, Asset
from kd_assets.store import (
    FORMAT_VERSION,
    Documents,
    KeptPositions,
    ResultWriter,
    coded,
    encode_embeddings,
    encode_hidden_states,
    encode_shard,
    encode_topk,
    part_stats,
    plan_output,
    plan_parts,
)
from kd_assets.store.schema import HiddenState
from kd_assets.store.writing.documents import offsets_of

RECIPE = "made-up"
VOCABULARY = 40
STATES: tuple[HiddenState, ...] = (1, 2, 4, "before_norm", "after_norm")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Truth:
    """One document as the teacher that never was saw it, before anything is cut or left out."""

    partition_key: str
    document_id: str
    ids_L: npt.NDArray[np.uint32]
    mask_L: npt.NDArray[np.bool_]
    topk_ids_Mk: npt.NDArray[np.uint32]
    topk_logprobs_Mk: npt.NDArray[np.float16]
    logsumexp_M: npt.NDArray[np.float32]
    target_logprob_M: npt.NDArray[np.float32]
    bits_LH: Mapping[HiddenState, npt.NDArray[np.uint16]]
    embeddings_2H: npt.NDArray[np.float32]
    topk_positions: npt.NDArray[np.uint32]
    state_positions: npt.NDArray[np.uint32]

    @property
    def length(self) -> int:
        return len(self.ids_L)


def truths(
    seed: int, partition_key: str = "made-up-00000", *, n: int = 9, k: int = 5, hidden: int = 3, kept: float = 1.0
) -> list[Truth]:
    """Documents of 1, 2 and more tokens, some with nothing to learn. `kept`: of the positions."""
    rng = np.random.default_rng([seed, *partition_key.encode()])
    lengths = [1, 2, *rng.integers(1, 24, n - 2).tolist()]
    rng.shuffle(lengths)
    found = []
    for i, length in enumerate(lengths):
        m = length - 1
        bits = {state: random_bits(rng, (length, hidden)) for state in STATES}
        ids_Mk = np.argsort(rng.random((m, VOCABULARY)), axis=1)[:, :k].astype(np.uint32)
        found.append(
            Truth(
                partition_key=partition_key,
                document_id=f"d{seed}-{i} ü",
                ids_L=rng.integers(0, VOCABULARY, length, dtype=np.uint32),
                mask_L=rng.random(length) < (0.0 if i % 4 == 3 else 0.6),
                topk_ids_Mk=ids_Mk,
                topk_logprobs_Mk=(-np.sort(rng.exponential(2, (m, k)), axis=1) - 3).astype(np.float16),
                logsumexp_M=rng.normal(10, 3, m).astype(np.float32),
                target_logprob_M=-rng.exponential(3, m).astype(np.float32),
                bits_LH=bits,
                embeddings_2H=rng.normal(0, 1, (2, hidden)).astype(np.float32),
                topk_positions=np.flatnonzero(rng.random(m) < kept).astype(np.uint32),
                state_positions=np.flatnonzero(rng.random(length) < kept).astype(np.uint32),
            )
        )
    return found


def random_bits(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    """Bits of finite bfloat16 numbers."""
    numbers = rng.normal(0, 2, shape).astype(np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def commit(
    store: Path,
    documents: Sequence[Truth],
    *,
    assets: Sequence[Asset] = CACHES,
    max_lengths: Mapping[Asset, int] | None = None,
    max_documents: Mapping[Asset, int] | None = None,
    positions: bool = False,
    facts: Mapping[str, Any] | None = None,
    made_of: str = "shard",
    provenance: Mapping[str, Any] | None = None,
    identity_besides: Mapping[str, Any] | None = None,
    codecs: Mapping[Asset, str] | None = None,
) -> dict[Asset, Path]:
    """Commit caches of these documents, which are of one partition; asset → folder.

    `max_documents` of a part: parts of caches need not be the same. `positions`: the caches keep those of `Truth` only.
    """
    recipe_folder, key = store / RECIPE, documents[0].partition_key
    folders: dict[Asset, Path] = {}
    for asset in assets:
        cut = (max_lengths or {}).get(asset)
        identity: dict[str, Any] = {
            "asset": asset,
            "format_version": FORMAT_VERSION,
            "input": f"{made_of} of {key}",
            "params": {},
            **(identity_besides or {}),
        }
        identity["params"] = {"max_length": cut, "positions": positions, "k": documents[0].topk_ids_Mk.shape[1]}
        codec = (codecs or {}).get(asset)
        identity["params"] |= {"codec": codec} if codec else {}
        output = plan_output(asset, identity, recipe_folder=recipe_folder, partition_key=key)
        with ResultWriter(output, recipe=RECIPE, recipe_folder=recipe_folder, partition_key=key) as writer:
            lengths = np.array([min(d.length, cut or d.length) for d in documents])
            plans = plan_parts(lengths, max_documents=(max_documents or {}).get(asset, 3), max_tokens=10**6)
            for plan in plans:
                part = documents[plan.first_document : plan.first_document + plan.n_documents]
                table = encoded(asset, part, cut=cut, positions=positions)
                n_tokens = int(lengths[plan.first_document : plan.first_document + plan.n_documents].sum())
                stats = part_stats(asset, table)
                if codec:
                    of_codec = coded(table, codec)
                    table, stats = of_codec.stored, part_stats(asset, of_codec.decoded) | of_codec.error
                writer.write_part(plan.index, table, n_tokens=n_tokens, stats=stats)
            writer.commit(
                parts=len(plans), checks={}, provenance=provenance or {}, facts=facts or {"vocab_size": VOCABULARY}
            )
        folders[asset] = writer.folder
    return folders


def commit_empty(store: Path, partition_key: str, *, assets: Sequence[Asset] = CACHES) -> dict[Asset, Path]:
    """Commit caches of a partition all of whose records were left out; asset → folder."""
    recipe_folder = store / RECIPE
    folders: dict[Asset, Path] = {}
    for asset in assets:
        identity = {"asset": asset, "format_version": FORMAT_VERSION, "input": partition_key, "params": {"k": 5}}
        output = plan_output(asset, identity, recipe_folder=recipe_folder, partition_key=partition_key)
        with ResultWriter(output, recipe=RECIPE, recipe_folder=recipe_folder, partition_key=partition_key) as writer:
            writer.commit(parts=0, checks={}, provenance={}, facts={"vocab_size": VOCABULARY})
        folders[asset] = writer.folder
    return folders


def encoded(asset: Asset, truth: Sequence[Truth], *, cut: int | None, positions: bool) -> Any:
    """The rows of a part."""
    lengths = [min(document.length, cut or document.length) for document in truth]
    documents = Documents(
        document_ids=[document.document_id for document in truth],
        offsets=offsets_of(np.array(lengths, dtype=np.int64)),
        input_ids=np.concatenate([d.ids_L[:n] for d, n in zip(truth, lengths, strict=True)]),
        loss_mask=np.concatenate([d.mask_L[:n] for d, n in zip(truth, lengths, strict=True)]),
    )
    if asset == "shards_manifest":
        return encode_shard(documents, ["corpus"] * len(truth), np.arange(len(truth), dtype=np.int64))
    if asset == "embedding_cache":
        pooled = np.stack([document.embeddings_2H for document in truth])
        return encode_embeddings(documents, mean_DH=pooled[:, 0].copy(), last_token_DH=pooled[:, 1].copy())
    of_topk = asset == "topk_cache"
    rows = [
        positions_of(d, n, topk=of_topk) if positions else np.arange(n - of_topk, dtype=np.uint32)
        for d, n in zip(truth, lengths, strict=True)
    ]
    kept = KeptPositions(offsets=offsets_of(np.array([len(r) for r in rows])), positions_M=np.concatenate(rows))
    chosen = kept if positions else None
    if of_topk:

        def of(name: str) -> npt.NDArray[Any]:
            return np.concatenate([getattr(d, name)[r] for d, r in zip(truth, rows, strict=True)])

        return encode_topk(
            documents,
            topk_ids_Mk=of("topk_ids_Mk"),
            topk_logprobs_Mk=of("topk_logprobs_Mk"),
            logsumexp_M=of("logsumexp_M"),
            target_logprob_M=of("target_logprob_M"),
            positions=chosen,
        )
    states = {
        state: np.concatenate([d.bits_LH[state][r] for d, r in zip(truth, rows, strict=True)]) for state in STATES
    }
    return encode_hidden_states(documents, states, chosen)


def positions_of(document: Truth, length: int, *, topk: bool) -> npt.NDArray[np.uint32]:
    """Which positions a cache of some keeps of the document's first `length` tokens."""
    kept = document.topk_positions if topk else document.state_positions
    return kept[kept < length - topk]


def expected_positions(
    document: Truth, length: int, *, topk: bool, positions: bool = False, learned_only: bool = False
) -> list[int]:
    """Which positions an export is to have of the first `length` tokens, from the document alone."""
    kept = positions_of(document, length, topk=topk).tolist() if positions else list(range(length - topk))
    if not learned_only:
        return kept
    return [position for position in kept if position + 1 < length and document.mask_L[position + 1]]
