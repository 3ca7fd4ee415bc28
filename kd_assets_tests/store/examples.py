"""Small real results to test with: three documents of a made-up shard and a made-up teacher's numbers for them.

Everything follows from a seed, so that two results of the same call are equal to the byte.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kd_assets.contract import CACHES, Asset, Output
from kd_assets.store import (
    FORMAT_VERSION,
    Documents,
    Manifest,
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
from kd_assets.store.computing_versions import computing_versions
from kd_assets.store.schema import HiddenState
from kd_assets.store.writing.documents import offsets_of

RECIPE = "tiny"
PARTITION = "tiny-00000"
LENGTHS = (5, 1, 3, 7)
MAX_LENGTH = 6
VOCABULARY = 11
K = 4
HIDDEN_SIZE = 3
BLOCKS = (0, 2)
DRAWS = 20
TABLES: tuple[Asset, ...] = ("shards_manifest", *CACHES)
PARAMS: dict[Asset, dict[str, Any]] = {
    "shards_manifest": {},
    "topk_cache": {"k": K, "max_length": MAX_LENGTH},
    "hidden_state_cache": {"blocks": list(BLOCKS), "max_length": MAX_LENGTH},
    "embedding_cache": {"max_length": MAX_LENGTH},
}
WITH_DRAWS: dict[str, Any] = {"k": K, "max_length": MAX_LENGTH, "draws": DRAWS, "seed": 0}
"""Parameters of a top-k cache that has random draws besides."""
COMPACT: dict[str, Any] = {"k": K, "max_length": MAX_LENGTH, "codec": "compact"}
"""Parameters of a top-k cache that is coded."""
RECOMPUTED: dict[str, Any] = {
    "n_documents": 2,
    "max_abs_logprob_difference": 1e-4,
    "passed": True,
}


REBUILT: dict[str, Any] = {
    "n_documents": 2,
    "n_positions": 7,
    "max_abs_logprob_difference": 1e-3,
    "mean_kl": 1e-6,
    "worst_over_tolerance": 0.3,
    "passed": True,
}


def fixed_clock() -> datetime.datetime:
    return datetime.datetime(2026, 11, 22, 12, 0, 0, tzinfo=datetime.UTC)


def documents(lengths: Sequence[int] = LENGTHS, *, seed: int = 0) -> Documents:
    """Documents of these lengths with random tokens; ids say the document's number."""
    rng = np.random.default_rng(seed)
    n_tokens = sum(lengths)
    return Documents(
        document_ids=[f"document-{i}" for i in range(len(lengths))],
        offsets=offsets_of(np.array(lengths, dtype=np.int64)),
        input_ids=rng.integers(0, VOCABULARY, n_tokens, dtype=np.uint32),
        loss_mask=rng.random(n_tokens) < 0.5,
    )


def teacher_logits(docs: Documents) -> npt.NDArray[np.float32]:
    """float32 [M, vocabulary]: what the made-up teacher says at every predicted position."""
    rng = np.random.default_rng(int(docs.input_ids.sum()))
    return rng.normal(0, 3, (docs.n_tokens - docs.n_documents, VOCABULARY)).astype(np.float32)


def sampled_ids(docs: Documents, draws: int = DRAWS) -> npt.NDArray[np.uint32]:
    """uint32 [M, draws]: token ids drawn at random from what the made-up teacher says."""
    probabilities = np.exp(teacher_logits(docs).astype(np.float64))
    cumulative = np.cumsum(probabilities / probabilities.sum(axis=1, keepdims=True), axis=1)
    u = np.random.default_rng(int(docs.input_ids.sum())).random((len(cumulative), draws))
    drawn: npt.NDArray[np.int64] = (cumulative[:, None, :] <= u[:, :, None]).sum(axis=2)
    return drawn.clip(max=VOCABULARY - 1).astype(np.uint32)


def table(
    asset: Asset,
    docs: Documents,
    *,
    draws: int = 0,
    top_p: float | None = None,
    states: Sequence[HiddenState] = BLOCKS,
) -> pa.Table:
    """The rows of an asset for these documents, from the made-up teacher; a top-k cache with `draws` a position and
    tokens of the mass `top_p`, a hidden-state cache with these `states`."""
    if asset == "shards_manifest":
        return encode_shard(docs, ["corpus"] * docs.n_documents, np.arange(docs.n_documents, dtype=np.int64))
    rng = np.random.default_rng(int(docs.input_ids.sum()))
    if asset == "hidden_state_cache":
        numbers = rng.normal(0, 1, (len(states), docs.n_tokens, HIDDEN_SIZE)).astype(np.float32)
        bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        return encode_hidden_states(docs, dict(zip(states, bits, strict=True)))
    if asset == "embedding_cache":
        vectors = rng.normal(0, 1, (2, docs.n_documents, HIDDEN_SIZE)).astype(np.float32)
        return encode_embeddings(docs, mean_DH=vectors[0], last_token_DH=vectors[1])
    logits = teacher_logits(docs)
    logsumexp = np.log(np.exp(logits.astype(np.float64)).sum(axis=1)).astype(np.float32)
    logprobs = logits - logsumexp[:, None]
    top = np.argsort(-logprobs, axis=1, kind="stable")[:, :K]
    return encode_topk(
        docs,
        topk_ids_Mk=top.astype(np.uint32),
        topk_logprobs_Mk=np.take_along_axis(logprobs, top, axis=1).astype(np.float16),
        logsumexp_M=logsumexp,
        target_logprob_M=np.take_along_axis(logprobs, targets(docs)[:, None], axis=1)[:, 0],
        sampled_ids_Md=sampled_ids(docs, draws) if draws else None,
        top_p=top_p,
    )


def targets(docs: Documents) -> npt.NDArray[np.int64]:
    """int64 [M]: the token that each predicted position is followed by."""
    is_first = np.zeros(docs.n_tokens, dtype=np.bool_)
    is_first[docs.offsets[:-1]] = True
    return docs.input_ids[~is_first].astype(np.int64)


def output(
    store: Path, asset: Asset, *, params: Mapping[str, Any] | None = None, partition_key: str = PARTITION
) -> Output:
    of_params = dict(PARAMS[asset] if params is None else params)
    identity = {
        "asset": asset,
        "format_version": FORMAT_VERSION,
        **computing_versions(asset, of_params),
        "params": of_params,
        "weights_fingerprint": "0" * 64,
        "input": f"shard of {partition_key}",
    }
    return plan_output(asset, identity, recipe_folder=store / RECIPE, partition_key=partition_key)


def writer(store: Path, out: Output, *, partition_key: str = PARTITION) -> ResultWriter:
    return ResultWriter(
        out, recipe=RECIPE, recipe_folder=store / RECIPE, partition_key=partition_key, clock=fixed_clock
    )


def commit(
    store: Path,
    asset: Asset,
    *,
    docs: Documents | None = None,
    params: Mapping[str, Any] | None = None,
    partition_key: str = PARTITION,
    max_documents: int = 2,
    checks: Mapping[str, Any] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> tuple[Path, Manifest]:
    """A committed result of the example documents, two to a part."""
    whole = documents() if docs is None else docs
    max_length = None if asset == "shards_manifest" else MAX_LENGTH
    kept = whole.slice(0, whole.n_documents, max_length)
    out = output(store, asset, params=params, partition_key=partition_key)
    draws = (params or {}).get("draws", 0)
    final = (params or {}).get("final", ())
    states = (*(params or {}).get("blocks", ()), *final) if final else BLOCKS
    with writer(store, out, partition_key=partition_key) as result:
        plans = plan_parts(kept.n_tokens_D, max_documents=max_documents, max_tokens=10**9)
        for plan in plans:
            part = kept.slice(plan.first_document, plan.n_documents)
            rows = table(asset, part, draws=draws, top_p=(params or {}).get("top_p"), states=states)
            if not (params or {}).get("logsumexp", True):
                rows = rows.drop_columns(["logsumexp"])
            made = coded(rows, (params or {}).get("codec", "plain"))
            stats = part_stats(asset, made.decoded) | made.error
            result.write_part(plan.index, made.stored, n_tokens=part.n_tokens, stats=stats)
        for name, data in (beside or {}).items():
            result.write_beside(name, data)
        recorded = {"recomputed": RECOMPUTED} if checks is None else checks
        manifest = result.commit(parts=len(plans), checks=recorded, provenance={"host": "here"})
    return Path(out.path), manifest


def commit_all(store: Path, *, partition_key: str = PARTITION) -> dict[Asset, Path]:
    """A shard and its three caches."""
    return {asset: commit(store, asset, partition_key=partition_key)[0] for asset in TABLES}


def flip_byte(path: Path, offset: int | None = None) -> None:
    """Change one byte in the middle of a file, in place."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if offset is None else offset] ^= 0xFF
    path.write_bytes(bytes(data))
