"""What it costs to open a cache of a million documents, and how fast a training gets batches of caches.

    python -m kd_assets_tests.benchmarks.loader --json --folder /somewhere/on/a/disk

Figures, the last line with --json: `open_1m_documents_s`, of a recipe with 100 partitions of 10,000 documents, by a
process that has not opened it yet (`open_1m_rss_mb`: by how much it grows); `loader_tokens_per_s`, one worker process
over a compact top-k cache of documents of 512 tokens, k = 16, shuffled, padded (`loader_packed_tokens_per_s`: packed;
`loader_plain_…`: of the same numbers in a plain cache), in the first epoch of a new loader: parts lie in the page
cache, are hashed, and nothing is decoded yet; the best of the rounds, and as `…_tokens_per_cpu_s` by the processor time
of the worker, which other programs do not disturb as much;
`loader_hidden_ratio`: batches of raw states of H = 8,192 made in this process, as a share of the bytes a second that a
plain read of the same files into memory that is there already gives, both from the page cache, in turns
(`loader_hidden_first_ratio`: with the hashing of a first epoch).
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_assets.contract import Asset
from kd_assets.store import (
    Documents,
    ResultWriter,
    coded,
    encode_embeddings,
    encode_hidden_states,
    encode_topk,
    part_stats,
    plan_output,
    plan_parts,
)
from kd_assets.store.codecs.codec import PLAIN
from kd_assets.store.writing.documents import offsets_of
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets.student.loading import TrainingLoader
from kd_assets_tests.benchmarks.store_topk import K, made_up_rows

RECIPE = "loader"
DOCUMENT_TOKENS, PART_TOKENS = 512, 32_768
HIDDEN_SIZE, HIDDEN_DOCUMENT_TOKENS, HIDDEN_PART_TOKENS = 8_192, 2_048, 8_192
N_PARTITIONS = 100


def documents(first: int, n_tokens: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Documents:
    rng = np.random.default_rng(first)
    total = int(n_tokens.sum())
    return Documents(
        document_ids=[f"corpus-00000-of-00100:{i:09d}" for i in range(first, first + len(n_tokens))],
        offsets=offsets_of(n_tokens),
        input_ids=rng.integers(0, 128_256, total, dtype=np.uint32),
        loss_mask=np.ones(total, dtype=np.bool_),
    )


def commit(
    store: Path, asset: Asset, whole: Documents, *, partition_key: str, part_tokens: int, codec: str = PLAIN
) -> None:
    """Made-up numbers; of top-k those of `store_topk`, the same in every part, since a coded part is decompressed."""
    params_of: dict[str, dict[str, Any]] = {
        "topk_cache": {"k": K} | ({} if codec == PLAIN else {"codec": codec}),
        "hidden_state_cache": {"blocks": [0]},
        "embedding_cache": {},
    }
    identity = {"asset": asset, "format_version": 1, "params": params_of[asset], "input": partition_key}
    out = plan_output(asset, identity, recipe_folder=store / RECIPE, partition_key=partition_key)
    rng = np.random.default_rng(1)
    with ResultWriter(out, recipe=RECIPE, recipe_folder=store / RECIPE, partition_key=partition_key) as writer:
        plans = plan_parts(whole.n_tokens_D, max_documents=10**6, max_tokens=part_tokens)
        if asset == "topk_cache":
            ids, logprobs = made_up_rows(min(whole.n_tokens, part_tokens))
        for plan in plans:
            part = whole.slice(plan.first_document, plan.n_documents)
            m = part.n_tokens - part.n_documents
            if asset == "topk_cache":
                rows = encode_topk(
                    part,
                    topk_ids_Mk=np.ascontiguousarray(ids[:m, :K]),
                    topk_logprobs_Mk=logprobs[:m, :K].astype(np.float16),
                    logsumexp_M=rng.normal(20, 2, m).astype(np.float32),
                    target_logprob_M=logprobs[:m, K].astype(np.float32),
                )
            elif asset == "hidden_state_cache":
                bits = rng.integers(0, 1 << 14, (part.n_tokens, HIDDEN_SIZE), dtype=np.uint16)
                rows = encode_hidden_states(part, {0: bits})
            else:
                vectors = np.zeros((part.n_documents, 4), np.float32)
                rows = encode_embeddings(part, mean_DH=vectors, last_token_DH=vectors)
            table = coded(rows, codec)
            stats = part_stats(asset, table.decoded) | table.error
            writer.write_part(plan.index, table.stored, n_tokens=part.n_tokens, stats=stats)
        writer.commit(parts=len(plans), checks={}, provenance={})


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def open_million(store: Path, *, n_documents: int, rounds: int) -> dict[str, float]:
    """Seconds and MB of a new process to open a recipe, and to know the number and lengths of its documents."""
    per_partition = n_documents // N_PARTITIONS
    for i in range(N_PARTITIONS):
        lengths = np.full(per_partition, 2, np.int64)
        whole = documents(i * per_partition, lengths)
        commit(store, "embedding_cache", whole, partition_key=f"p-{i:05d}", part_tokens=max(2, 2 * per_partition // 20))
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from kd_assets.store import CacheReader\n"
        "peak = lambda: int(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1])\n"
        "before = peak()\n"
        "started = time.perf_counter()\n"
        "reader = CacheReader(Path(sys.argv[1]), 'embedding_cache')\n"
        "n, lengths = len(reader), reader.n_tokens_D\n"
        "seconds = time.perf_counter() - started\n"
        "assert n == len(lengths) == int(sys.argv[2])\n"
        "print(seconds, (peak() - before) / 1024)\n"
    )
    found = []
    for _ in range(rounds):
        command = [sys.executable, "-c", script, str(store / RECIPE), str(per_partition * N_PARTITIONS)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        found.append([float(word) for word in said])
    seconds, megabytes = (statistics.median(values) for values in zip(*found, strict=True))
    return {"open_1m_documents_s": round(seconds, 3), "open_1m_rss_mb": round(megabytes, 1)}


def topk_rate(store: Path, *, n_tokens: int, rounds: int) -> dict[str, float]:
    whole = documents(0, np.full(n_tokens // DOCUMENT_TOKENS, DOCUMENT_TOKENS, np.int64))
    figures: dict[str, float] = {}
    for prefix, codec in (("loader", "compact"), ("loader_plain", PLAIN)):
        of_codec = store / codec
        commit(of_codec, "topk_cache", whole, partition_key="p-00000", part_tokens=PART_TOKENS, codec=codec)
        for name, pack_to in ((prefix, None), (f"{prefix}_packed", 4 * DOCUMENT_TOKENS)):
            wall, cpu = [], []
            for _ in range(rounds):
                before = cpu_seconds_of_workers()
                wall.append(timed(lambda: epoch(of_codec / RECIPE, pack_to)))  # noqa: B023
                cpu.append(cpu_seconds_of_workers() - before)
            figures[f"{name}_tokens_per_s"] = round(whole.n_tokens / min(wall))
            figures[f"{name}_tokens_per_cpu_s"] = round(whole.n_tokens / min(cpu))
    return figures


def epoch(recipe_folder: Path, pack_to: int | None) -> None:
    """The first one of a new loader."""
    dataset = TeacherCacheDataset.from_recipe(recipe_folder, assets=["topk_cache"])
    batch_size = 2 if pack_to else 8
    through(TrainingLoader(dataset, batch_size=batch_size, pack_to=pack_to, num_workers=1, prefetch_factor=4))


def cpu_seconds_of_workers() -> float:
    """Of all child processes that have ended: a loader ends its workers when it is let go."""
    gc.collect()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def hidden_ratio(store: Path, *, n_tokens: int, rounds: int) -> dict[str, float]:
    lengths = np.full(n_tokens // HIDDEN_DOCUMENT_TOKENS, HIDDEN_DOCUMENT_TOKENS, np.int64)
    commit(store, "hidden_state_cache", documents(0, lengths), partition_key="p-00000", part_tokens=HIDDEN_PART_TOKENS)
    files = sorted((store / RECIPE / "hidden_state_cache").rglob("part-*"))
    dataset = TeacherCacheDataset.from_recipe(store / RECIPE, assets=["hidden_state_cache"])
    loader = TrainingLoader(dataset, batch_size=1, num_workers=0)
    first = timed(lambda: through(loader))
    plain, ours = [], []
    buffer = bytearray(max(path.stat().st_size for path in files))
    read_into(buffer, files)
    for _ in range(rounds):
        plain.append(timed(lambda: read_into(buffer, files)))
        ours.append(timed(lambda: through(loader)))
    read = statistics.median(plain)
    n_bytes = sum(path.stat().st_size for path in files)
    return {
        "hidden_plain_read_mb_per_s": round(n_bytes / read / 1e6),
        "loader_hidden_ratio": round(read / statistics.median(ours), 2),
        "loader_hidden_first_ratio": round(read / first, 2),
    }


def read_into(buffer: bytearray, files: Sequence[Path]) -> None:
    """The files one after the other, into memory that is there already."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            assert file.readinto(buffer) == path.stat().st_size


def through(batches: Iterable[dict[str, object]]) -> None:
    for batch in batches:
        assert batch


def measure(
    folder: Path | None = None,
    *,
    n_documents: int = 1_000_000,
    n_tokens: int = 1_048_576,
    n_hidden_tokens: int = 32_768,
    rounds: int = 3,
) -> dict[str, float]:
    """All figures. `folder`: on the disk that is to be measured (default: a temporary one); `n_documents` of the cache
    that is opened, `n_tokens` of the top-k caches, `n_hidden_tokens` of the states, 16 KB each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kd-assets-loader-", dir=folder) as name:
        figures = open_million(Path(name) / "open", n_documents=n_documents, rounds=rounds)
        figures |= topk_rate(Path(name) / "topk", n_tokens=n_tokens, rounds=rounds)
        return figures | hidden_ratio(Path(name) / "hidden", n_tokens=n_hidden_tokens, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured (default: a temporary one)")
    parser.add_argument("--documents", type=int, default=1_000_000, help="of the cache that is opened")
    parser.add_argument("--tokens", type=int, default=1_048_576, help="of the top-k caches")
    parser.add_argument("--hidden-tokens", type=int, default=32_768, help="of the states: 16 KB each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="the figures alone, in one line")
    options = parser.parse_args()
    figures = measure(
        options.folder,
        n_documents=options.documents,
        n_tokens=options.tokens,
        n_hidden_tokens=options.hidden_tokens,
        rounds=options.rounds,
    )
    figures["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(figures, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
