"""What it costs readers to verify parts on first use, against reading without it.

    python -m kd_assets_tests.benchmarks.reading --folder /somewhere/on/a/disk

One store of made-up numbers: a top-k cache (Parquet) and a hidden-state cache (Arrow). Every document is read once, in
random order as training does, by a reader that is new: with and without verification, from a cold and from a warm page
cache (files are dropped from it by `posix_fadvise`), and a second time by the same reader. Rounds interleave what is
compared; figures are medians. Seconds are of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np

from kd_assets.contract import Asset
from kd_assets.durable import file_sha256
from kd_assets.store import (
    CacheReader,
    Documents,
    ResultWriter,
    encode_hidden_states,
    encode_topk,
    part_stats,
    plan_output,
    plan_parts,
)
from kd_assets.store.reading.parts import VerifiedParts
from kd_assets.store.writing.documents import offsets_of

RECIPE, KEY = "reading", "reading-00000"
DOCUMENT_TOKENS, PART_TOKENS, K, HIDDEN_SIZE = 512, 32_768, 16, 2048
ASSETS: tuple[Asset, ...] = ("topk_cache", "hidden_state_cache")


def documents(n_tokens: int) -> Documents:
    rng = np.random.default_rng(0)
    n = n_tokens // DOCUMENT_TOKENS
    return Documents(
        document_ids=[f"document-{i}" for i in range(n)],
        offsets=offsets_of(np.full(n, DOCUMENT_TOKENS, dtype=np.int64)),
        input_ids=rng.integers(0, 128_256, n * DOCUMENT_TOKENS, dtype=np.uint32),
        loss_mask=np.ones(n * DOCUMENT_TOKENS, dtype=np.bool_),
    )


def commit(store: Path, asset: Asset, whole: Documents) -> None:
    params = {"k": K} if asset == "topk_cache" else {"blocks": [0]}
    identity = {"asset": asset, "format_version": 1, "params": params, "input": "made up"}
    out = plan_output(asset, identity, recipe_folder=store / RECIPE, partition_key=KEY)
    rng = np.random.default_rng(1)
    with ResultWriter(out, recipe=RECIPE, recipe_folder=store / RECIPE, partition_key=KEY) as writer:
        plans = plan_parts(whole.n_tokens_D, max_documents=10**6, max_tokens=PART_TOKENS)
        for plan in plans:
            part = whole.slice(plan.first_document, plan.n_documents)
            if asset == "topk_cache":
                m = part.n_tokens - part.n_documents
                rows = encode_topk(
                    part,
                    topk_ids_Mk=rng.integers(0, 128_256, (m, K), dtype=np.uint32),
                    topk_logprobs_Mk=-np.sort(rng.exponential(3, (m, K))).astype(np.float16) - np.float16(4),
                    logsumexp_M=rng.normal(20, 2, m).astype(np.float32),
                    target_logprob_M=-rng.exponential(3, m).astype(np.float32),
                )
            else:
                states = rng.normal(0, 1, (part.n_tokens, HIDDEN_SIZE)).astype(np.float32)
                rows = encode_hidden_states(part, {0: (states.view(np.uint32) >> 16).astype(np.uint16)})
            writer.write_part(plan.index, rows, n_tokens=part.n_tokens, stats=part_stats(asset, rows))
        writer.commit(parts=len(plans), checks={}, provenance={})


def drop_from_page_cache(folder: Path) -> None:
    """What was written must be on the disk for the kernel to let go of it."""
    for path in folder.rglob("part-*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_all(reader: CacheReader) -> None:
    order = list(range(len(reader)))
    random.Random(0).shuffle(order)
    for i in order:
        document = reader[i]
        for name in ("topk_logprobs", "hidden_block_0"):
            if name in document:
                document[name].sum(dtype=np.float32 if name == "topk_logprobs" else np.uint64)  # touches every page


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def seconds_of(store: Path, asset: Asset, *, verified: bool, cold: bool) -> tuple[float, float]:
    """Of the first and of the second time that a new reader reads everything."""
    if cold:
        drop_from_page_cache(store / RECIPE / asset)
    reader = CacheReader(store / RECIPE, asset)
    if verified:
        return timed(lambda: read_all(reader)), timed(lambda: read_all(reader))
    with patch.object(VerifiedParts, "require", lambda self, index, path, record: None):
        return timed(lambda: read_all(reader)), timed(lambda: read_all(reader))


def measure(store: Path, *, n_tokens: int, rounds: int) -> dict[str, object]:
    whole = documents(n_tokens)
    figures: dict[str, object] = {"n_tokens": whole.n_tokens, "n_documents": whole.n_documents}
    for asset in ASSETS:
        commit(store, asset, whole)
        files = sorted((store / RECIPE / asset).rglob("part-*"))
        n_bytes = sum(path.stat().st_size for path in files)
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds):
            for cold in (False, True):
                for verified in (False, True):
                    name = f"{'cold' if cold else 'warm'}, {'verified' if verified else 'believed'}"
                    first, second = seconds_of(store, asset, verified=verified, cold=cold)
                    seconds.setdefault(f"{name}: first", []).append(first)
                    seconds.setdefault(f"{name}: second", []).append(second)
            seconds.setdefault("hashing alone, warm", []).append(timed(lambda: [file_sha256(path) for path in files]))  # noqa: B023
        figures[asset] = {
            "n_bytes": n_bytes,
            "n_parts": len(files),
            "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured (default: a temporary one)")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kd-assets-reading-", dir=options.folder) as folder:
        print(json.dumps(measure(Path(folder), n_tokens=options.tokens, rounds=options.rounds), indent=1))


if __name__ == "__main__":
    main()
