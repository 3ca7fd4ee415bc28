"""The codec `compact` of top-k caches: bytes a token, divergence, and speed against plain files and Python lists.

Made-up rows, k = 16 of 128,256 ids. A token's probabilities fall with a power of their rank, each moved by noise; the
power is drawn anew for every token (a median of 1.5, of one token in twenty below 0.7 or above 3.1), and a mass beyond
the 96 candidates is added: 0.41 of the mass is on the first token and 0.20 on those that are not kept, in the mean. Ids
are drawn by Zipf's law, the id being its rank, as tokenizers number their merges: 12 bits of entropy an id, and no
dependence between neighbours that a compressor could use. Three of four targets are drawn from the kept tokens.

- `topk_bytes_per_token` of the files without the column `input_ids`, which is the same in every cache; all else counts;
- `topk_kl`, `topk_max_kl`: KL of the coding alone at temperature 1, over the k and all others as one; `topk_kl_t2`: at
  temperature 2 of the kept tokens, scaled to 1, as losses without a tail have them;
- `compact_draws_bytes_per_token`: what the columns of 50 random draws of a position take in such a file;
  `plain_draws_…`: the two of a plain one; `compact_draws_4096_…`: of rows that are made in the same way of 4,096 ids;
- `topk_top_p_…`: of the same rows with `top_p` = 0.95, plain and compact, and how many tokens a position keeps then;
- `topk_write_speedup`, `topk_read_speedup`: tokens a second over those of the scripts that this project replaces,
  written anew: tensors made into lists, a dict a document, 128 of them into a table and that into a file; and lists
  from pyarrow made into tensors. Ours includes the measurement of the error and the statistics when written, and gives
  arrays of six columns for their four. All in processor time; `topk_encode_tokens_per_s` is of the bytes alone,
  without error, statistics and file, and `topk_file_share` is what Parquet and zstd take of all of our writing: the
  bytes are those of zstd, so that no faster codec would bring the speedup above `topk_write_speedup_of_file`;
- `demo_…`: of the demo's plain cache, coded; `demo_wide_…`: its ids spread over 128,256, which adds 5 bits to each.
"""

from __future__ import annotations

import importlib
import io
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kd_assets.store import CacheReader, Documents, coded, encode_topk, part_stats
from kd_assets.store.arrays import flat
from kd_assets.store.codecs.topk_compact import bands, decode_ids, decode_logprobs, divergence, encode
from kd_assets.store.codecs.topk_rows import list_offsets
from kd_assets.store.partfile import PartFile, write_table
from kd_assets.store.reading.columns import column_of
from kd_assets.store.writing.documents import offsets_of
from kd_assets.store.writing.encode import list_array, vector_array

VOCABULARY, K, DOCUMENT_TOKENS = 128_256, 16, 512
CANDIDATES = 96
DRAWS, TOKENS_WITH_DRAWS = 50, 16_384
READ = ["input_ids", "loss_mask", "topk_ids", "topk_logprobs", "logsumexp", "target_logprob"]
ORIGINAL = ("input_ids", "attn_mask", "topk_ids", "topk_logprobs")
LISTED = 128
"""Documents of a file of the script that this project replaces."""
Floats = npt.NDArray[np.float64]
TensorRows = tuple[list[Any], list[Any], list[Any], list[Any]]
"""By `ORIGINAL`: a tensor for each document."""


def zipf(rng: np.random.Generator, size: int | tuple[int, ...], vocabulary: int = VOCABULARY) -> npt.NDArray[np.int64]:
    """Ids by Zipf's law, their ranks."""
    ranks: npt.NDArray[np.int64] = np.exp(rng.random(size) * np.log(vocabulary + 1)).astype(np.int64)
    return ranks.clip(1, vocabulary) - 1


def made_up_rows(m: int, *, seed: int = 0, vocabulary: int = VOCABULARY) -> tuple[npt.NDArray[np.uint32], Floats]:
    """Ids uint32 [m, CANDIDATES] and log-probabilities float64 [m, CANDIDATES], most likely first; see the module."""
    rng = np.random.default_rng(seed)
    ids = np.sort(zipf(rng, (m, CANDIDATES), vocabulary), axis=1)
    while (repeated := np.diff(ids, axis=1, prepend=-1) == 0).any():
        ids[repeated] = zipf(rng, int(repeated.sum()), vocabulary)
        ids.sort(axis=1)
    ids = rng.permuted(ids, axis=1)
    power = np.exp(rng.normal(0.4, 0.45, (m, 1)))
    weights = -power * np.log(np.arange(1, CANDIDATES + 1)) + rng.normal(0, 0.4, (m, CANDIDATES))
    weights -= weights.max(axis=1, keepdims=True)
    beyond = np.exp(rng.normal(-3.5, 1.5, (m, 1)))
    logprobs = weights - np.log(np.exp(weights).sum(axis=1, keepdims=True) + beyond)
    order = np.argsort(-logprobs, axis=1)
    return np.take_along_axis(ids, order, axis=1).astype(np.uint32), np.take_along_axis(logprobs, order, axis=1)


def made_up_draws(
    ids: npt.NDArray[np.uint32], logprobs: Floats, vocabulary: int = VOCABULARY
) -> npt.NDArray[np.uint32]:
    """uint32 [m, DRAWS] of rows as `made_up_rows` makes them; what is beyond the candidates is drawn by Zipf's law."""
    rng = np.random.default_rng(2)
    drawn = zipf(rng, (len(ids), DRAWS), vocabulary).astype(np.uint32)
    cumulative = np.exp(logprobs).cumsum(axis=1)
    for row, (ids_of_row, edges) in enumerate(zip(ids, cumulative, strict=True)):
        slots = np.searchsorted(edges, rng.random(DRAWS), side="right")
        drawn[row, slots < CANDIDATES] = ids_of_row[slots[slots < CANDIDATES]]
    return drawn


def made_up_table(n_tokens: int, *, draws: bool = False, vocabulary: int = VOCABULARY) -> pa.Table:
    """A plain top-k table of documents of `DOCUMENT_TOKENS`."""
    rng = np.random.default_rng(1)
    n = max(n_tokens // DOCUMENT_TOKENS, 1)
    m = n * (DOCUMENT_TOKENS - 1)
    ids, logprobs = made_up_rows(m, vocabulary=vocabulary)
    # A target among the first ones, and else the candidates that are not kept.
    slots = np.where(rng.random(m) < 0.75, rng.geometric(0.35, m).clip(max=K) - 1, rng.integers(K, CANDIDATES, m))
    input_ids = rng.integers(0, vocabulary, n * DOCUMENT_TOKENS, dtype=np.uint32).reshape(n, DOCUMENT_TOKENS)
    input_ids[:, 1:] = ids[np.arange(m), slots].reshape(n, -1)
    documents = Documents(
        document_ids=[f"document-{i}" for i in range(n)],
        offsets=offsets_of(np.full(n, DOCUMENT_TOKENS, dtype=np.int64)),
        input_ids=input_ids.reshape(-1),
        loss_mask=np.ones(n * DOCUMENT_TOKENS, dtype=np.bool_),
    )
    return encode_topk(
        documents,
        topk_ids_Mk=np.ascontiguousarray(ids[:, :K]),
        topk_logprobs_Mk=logprobs[:, :K].astype(np.float16),
        logsumexp_M=rng.normal(20, 2, m).astype(np.float32),
        target_logprob_M=logprobs[np.arange(m), slots].astype(np.float32),
        sampled_ids_Md=made_up_draws(ids, logprobs, vocabulary) if draws else None,
    )


def measure(*, n_tokens: int = 131_072, rounds: int = 3, layouts: bool = False) -> dict[str, Any]:
    plain = made_up_table(n_tokens)
    n = int(flat(plain["n_tokens"]).sum())
    figures: dict[str, Any] = {"topk_tokens": n, "topk_vocabulary": VOCABULARY, "topk_k": K}
    figures |= coding_figures("topk", plain)
    figures |= top_p_figures(plain, 0.95)
    with_draws = min(n_tokens, TOKENS_WITH_DRAWS)
    figures["compact_draws_bytes_per_token"] = draws_bytes_per_token(with_draws)
    figures["plain_draws_bytes_per_token"] = draws_bytes_per_token(with_draws, codec="plain")
    figures["compact_draws_4096_bytes_per_token"] = draws_bytes_per_token(with_draws, vocabulary=4_096)
    with tempfile.TemporaryDirectory(prefix="kd-assets-store-") as folder:
        path = Path(folder) / "part.parquet"
        lists, plain_path = Path(folder) / "lists", Path(folder) / "plain.parquet"
        tensors = tensor_rows(plain)
        for name, write, read in (
            ("compact", lambda: write_part(plain, path, "compact"), lambda: read_part(path)),
            ("plain", lambda: write_part(plain, plain_path, "plain"), lambda: read_part(plain_path)),
            ("lists", lambda: write_lists(tensors, lists), lambda: read_lists(lists)),
        ):
            # Lists take so long that one round of them is as certain as three of the others.
            n_rounds = rounds if name != "lists" else 1
            figures[f"topk_{name}_write_tokens_per_s"] = round(n / seconds_of(write, n_rounds))
            figures[f"topk_{name}_read_tokens_per_s"] = round(n / seconds_of(read, n_rounds))
    k_rows = flat(plain["topk_ids"]).reshape(-1, K), flat(plain["topk_logprobs"]).reshape(-1, K)
    bytes_of_rows = encode(*k_rows)
    figures["topk_encode_tokens_per_s"] = round(n / seconds_of(lambda: encode(*k_rows), rounds))

    def decode() -> None:
        decode_ids(bytes_of_rows.ids, vocabulary=VOCABULARY)
        decode_logprobs(bytes_of_rows.codes, bytes_of_rows.tails_M)

    figures["topk_decode_tokens_per_s"] = round(n / seconds_of(decode, rounds))
    stored = coded(plain, "compact").stored
    file_s = seconds_of(lambda: write_table(stored, ".parquet", io.BytesIO()), rounds)
    figures["topk_file_share"] = round(file_s * figures["topk_compact_write_tokens_per_s"] / n, 2)
    figures["topk_write_speedup_of_file"] = round(n / file_s / figures["topk_lists_write_tokens_per_s"], 1)
    for way in ("write", "read"):
        ours, theirs = (figures[f"topk_{name}_{way}_tokens_per_s"] for name in ("compact", "lists"))
        figures[f"topk_{way}_speedup"] = round(ours / theirs, 1)
    return figures | (layout_figures(plain, rounds) if layouts else {})


def coding_figures(name: str, plain: pa.Table) -> dict[str, Any]:
    """Bytes and divergence of a plain table's coding."""
    n, k = int(flat(plain["n_tokens"]).sum()), plain.schema.field("topk_ids").type.value_type.list_size
    compact = coded(plain, "compact")
    exact_Mk, coded_Mk = (flat(table["topk_logprobs"]).reshape(-1, k) for table in (plain, compact.decoded))
    without = plain.drop_columns(["logsumexp"])
    return {
        f"{name}_bytes_per_token": round(bytes_of(compact.stored) / n, 2),
        f"{name}_bytes_per_token_without_logsumexp": round(bytes_of(coded(without, "compact").stored) / n, 2),
        f"{name}_plain_bytes_per_token": round(bytes_of(plain) / n, 2),
        f"{name}_kl": compact.error["max_codec_mean_kl"],
        f"{name}_max_kl": compact.error["max_codec_kl"],
        f"{name}_kl_t2": float(softened_kl(exact_Mk, coded_Mk, 2.0).mean()),
        f"{name}_kl_without_tail_byte": kl_without_tail_byte(compact.stored, exact_Mk),
    }


def top_p_figures(plain: pa.Table, top_p: float) -> dict[str, Any]:
    """Of the table with as many tokens of a position as have this mass."""
    n, k = int(flat(plain["n_tokens"]).sum()), plain.schema.field("topk_ids").type.value_type.list_size
    documents = Documents(
        document_ids=plain["document_id"].to_pylist(),
        offsets=list_offsets(plain["input_ids"]),
        input_ids=flat(plain["input_ids"]),
        loss_mask=flat(plain["loss_mask"]),
    )
    ragged = encode_topk(
        documents,
        topk_ids_Mk=flat(plain["topk_ids"]).reshape(-1, k),
        topk_logprobs_Mk=flat(plain["topk_logprobs"]).reshape(-1, k),
        logsumexp_M=flat(plain["logsumexp"]),
        target_logprob_M=flat(plain["target_logprob"]),
        top_p=top_p,
    )
    compact = coded(ragged, "compact")
    return {
        "topk_top_p_mean_kept": round(len(flat(ragged["topk_ids"])) / len(flat(ragged["target_logprob"])), 2),
        "topk_top_p_plain_bytes_per_token": round(bytes_of(ragged) / n, 2),
        "topk_top_p_bytes_per_token": round(bytes_of(compact.stored) / n, 2),
        "topk_top_p_kl": compact.error["max_codec_mean_kl"],
    }


def draws_bytes_per_token(n_tokens: int, *, codec: str = "compact", vocabulary: int = VOCABULARY) -> float:
    """Of the columns of the draws in a part file."""
    table = coded(made_up_table(n_tokens, draws=True, vocabulary=vocabulary), codec).stored
    _, of_columns = bytes_by_column(table)
    n_bytes = sum(n for name, n in of_columns.items() if name.startswith("sampled_"))
    return round(n_bytes / int(flat(table["n_tokens"]).sum()), 2)


def bytes_of(table: pa.Table) -> int:
    """Of the part file of a table, without what its `input_ids` take."""
    n_bytes, of_columns = bytes_by_column(table)
    return n_bytes - of_columns["input_ids"]


def bytes_by_column(table: pa.Table) -> tuple[int, Counter[str]]:
    """Of the part file of a table, and what its columns take of them, compressed."""
    sink = io.BytesIO()
    write_table(table, ".parquet", sink)
    metadata = pq.ParquetFile(io.BytesIO(sink.getvalue())).metadata
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    of_columns: Counter[str] = Counter()
    for chunk in (group.column(at) for group in groups for at in range(metadata.num_columns)):
        of_columns[chunk.path_in_schema.split(".")[0]] += chunk.total_compressed_size
    return len(sink.getvalue()), of_columns


def softened_kl(exact_Mk: npt.NDArray[np.float16], coded_Mk: npt.NDArray[np.float16], temperature: float) -> Floats:
    """float64 [M]: over the kept tokens alone, scaled to 1."""
    p_Mk, q_Mk = (x.astype(np.float64) / temperature for x in (exact_Mk, coded_Mk))
    p_Mk, q_Mk = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (p_Mk, q_Mk))
    kl: Floats = (np.exp(p_Mk) * (p_Mk - q_Mk)).sum(axis=1)
    return kl


def kl_without_tail_byte(stored: pa.Table, exact_Mk: npt.NDArray[np.float16]) -> float:
    """What the mean KL would be if the codes had to say the mass, too: scaled down where they add up to 1 or more."""
    k = exact_Mk.shape[1]
    names = [name for name in stored.schema.names if name.startswith("topk_codes_")]
    planes = [np.frombuffer(b"".join(stored[name].to_pylist()), np.uint8) for name in names]
    codes = [plane.reshape(-1, stop - first) for plane, (first, stop) in zip(planes, bands(k), strict=True)]
    coded_Mk, _ = decode_logprobs(codes, np.full(len(exact_Mk), 0, np.uint8))
    raw = np.concatenate(codes, axis=1).astype(np.int64)
    raw_M = ((raw[:, :1] - np.concatenate([np.zeros_like(raw[:, :1]), raw[:, 1:].cumsum(axis=1)], axis=1)) / 255) ** 4
    mass_M = np.minimum(raw_M.sum(axis=1), 1 - 1e-6)
    rescaled_Mk = (coded_Mk.astype(np.float64) + np.log(mass_M)[:, None]).astype(np.float16)
    return float(divergence(exact_Mk, rescaled_Mk, 1 - mass_M).mean())


def write_part(plain: pa.Table, path: Path, codec: str) -> None:
    """As the teacher's writer does."""
    table = coded(plain, codec)
    part_stats("topk_cache", table.decoded)
    with path.open("wb") as file:
        write_table(table.stored, ".parquet", file)


def read_part(path: Path) -> None:
    """All columns of all groups as arrays, as the reader of a cache has them."""
    with PartFile(path) as part:
        for group in range(part.n_groups):
            table = part.read_group(group, READ)
            for name in READ:
                column_of(table[name])


def write_lists(rows: TensorRows, path: Path) -> None:
    """As that script does with what its teacher gave: a dict of lists for each document, a table of `LISTED` of them,
    and zstd, which it asks for (by a misspelt name; so it never wrote a file, and what it meant is measured)."""
    for first in range(0, len(rows[0]), LISTED):
        listed = []
        for input_ids, attn_mask, topk_ids, topk_logprobs in zip(
            *(of[first : first + LISTED] for of in rows), strict=True
        ):
            n = int(attn_mask.sum().item())
            values = (input_ids[:n], attn_mask[:n], topk_ids[: n - 1], topk_logprobs[: n - 1])
            listed.append({name: value.tolist() for name, value in zip(ORIGINAL, values, strict=True)})
        pq.write_table(pa.Table.from_pylist(listed), path.with_suffix(f".{first}.parquet"), compression="zstd")


def tensor_rows(plain: pa.Table) -> TensorRows:
    """Of each document what a teacher in bfloat16 leaves: ids and mask int64, and log-probabilities bfloat16."""
    torch = importlib.import_module("torch")
    ids_Mk = flat(plain["topk_ids"]).reshape(-1, K).astype(np.int64)
    logprobs_Mk = flat(plain["topk_logprobs"]).reshape(-1, K).astype(np.float32)
    input_ids = flat(plain["input_ids"]).astype(np.int64)
    tokens, positions = (itertools.pairwise(list_offsets(plain[name]).tolist()) for name in ("input_ids", "topk_ids"))
    rows: TensorRows = ([], [], [], [])
    for (start, stop), (first, last) in zip(tokens, positions, strict=True):
        rows[0].append(torch.from_numpy(input_ids[start:stop]))
        rows[1].append(torch.ones(stop - start, dtype=torch.int64))
        rows[2].append(torch.from_numpy(ids_Mk[first:last]))
        rows[3].append(torch.from_numpy(logprobs_Mk[first:last]).to(torch.bfloat16))
    return rows


def read_lists(path: Path) -> None:
    """A group of rows as lists, and of each row tensors, as its trainer has them."""
    for written in sorted(path.parent.glob(f"{path.stem}.*.parquet")):
        _read_lists(written)


def _read_lists(path: Path) -> None:
    torch = importlib.import_module("torch")
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            lists = file.read_row_group(group, use_threads=False).to_pydict()
            for at in range(len(lists["input_ids"])):
                for name in ORIGINAL:
                    torch.tensor(lists[name][at], dtype=torch.float32 if name == "topk_logprobs" else torch.long)


def seconds_of(work: Callable[[], object], rounds: int) -> float:
    """Of this process on a core, the median: what else runs on the machine is not counted."""

    def once() -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    return statistics.median(once() for _ in range(rounds))


def layout_figures(plain: pa.Table, rounds: int) -> dict[str, Any]:
    """The same bytes as lists of fixed-size binaries, and the same numbers as lists of unsigned integers with
    BYTE_STREAM_SPLIT: bytes a token, and tokens a second from and to arrays of numbers, coding included for all."""
    n = int(flat(plain["n_tokens"]).sum())
    figures: dict[str, Any] = {}
    for name, layout in (("binary", coded(plain, "compact").stored), *other_layouts(plain)):
        sink = io.BytesIO()
        write_table(layout, ".parquet", sink)
        whole = sink.getvalue()

        def read(whole: bytes = whole) -> None:
            with pq.ParquetFile(io.BytesIO(whole)) as file:
                for group in range(file.num_row_groups):
                    file.read_row_group(group, use_threads=False)

        figures[f"layout_{name}_bytes_per_token"] = round(bytes_of(layout) / n, 2)
        write_s = seconds_of(partial(write_table, layout, ".parquet", io.BytesIO()), rounds)
        figures[f"layout_{name}_write_tokens_per_s"] = round(n / write_s)
        figures[f"layout_{name}_read_tokens_per_s"] = round(n / seconds_of(read, rounds))
    return figures


def other_layouts(plain: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    stored = coded(plain, "compact").stored
    offsets, m = list_offsets(plain["topk_ids"]), int(list_offsets(plain["topk_ids"])[-1])
    fixed: dict[str, pa.Array] = {}
    numbers: dict[str, pa.Array] = {}
    for field in stored.schema:
        if field.type != pa.binary():
            continue
        data = b"".join(stored[field.name].to_pylist())
        width, rest = divmod(len(data), m)
        if rest:  # of the positions whose target is outside
            fixed[field.name] = numbers[field.name] = stored[field.name].combine_chunks()
            continue
        of_width = pa.Array.from_buffers(pa.binary(width), m, [None, pa.py_buffer(data)])
        fixed[field.name] = list_array(offsets, of_width)
        if not field.name.startswith("topk_ids_"):
            wide = np.frombuffer(data, np.uint8).reshape(m, width).astype(np.uint16)
            numbers[field.name] = list_array(offsets, vector_array(wide))
    numbers["topk_ids"] = plain["topk_ids"].combine_chunks()
    common = {name: stored[name] for name in ("document_id", "n_tokens", "input_ids", "loss_mask")}
    for name, columns in (("fixed_size_binary", fixed), ("uint_lists", numbers)):
        yield name, pa.table({**common, **columns}).replace_schema_metadata(stored.schema.metadata)


def demo_figures(recipe_folder: Path) -> dict[str, Any]:
    """Of a plain cache with k = 16 on this machine, as it is and with its ids spread over `VOCABULARY`."""
    reader = CacheReader(recipe_folder, "topk_cache")
    if reader.manifests[0].params.get("codec", "plain") != "plain":
        raise SystemExit(f"{recipe_folder} has a coded cache: what is rounded already says nothing of a codec")
    tables = [
        PartFile(folder / record.name).read(reader.schema.names)
        for folder, manifest in zip(reader.folders, reader.manifests, strict=True)
        for record in manifest.parts
    ]
    table = pa.concat_tables(tables).combine_chunks()
    return coding_figures("demo", table) | coding_figures("demo_wide", spread_ids(table))


def spread_ids(table: pa.Table) -> pa.Table:
    """The table with ids of a vocabulary of `VOCABULARY`: those of single bytes stay, of the others each goes somewhere
    in its share of the larger one, by a hash of its position and itself, as the target does."""
    ids_Mk = flat(table["topk_ids"]).reshape(-1, K).astype(np.uint64)
    share = VOCABULARY // (int(ids_Mk.max()) + 1)

    def wide(ids: npt.NDArray[np.uint64], position: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
        hashed = (ids * np.uint64(0x9E3779B97F4A7C15) + position * np.uint64(0xC2B2AE3D27D4EB4F)) >> np.uint64(33)
        return np.where(ids < 256, ids, ids * np.uint64(share) + hashed % np.uint64(share)).astype(np.uint32)

    position_M = np.arange(len(ids_Mk), dtype=np.uint64)
    wide_Mk = wide(ids_Mk, position_M[:, None])
    input_ids, offsets = flat(table["input_ids"]).astype(np.uint64), list_offsets(table["input_ids"])
    is_next = np.ones(len(input_ids), np.bool_)
    is_next[offsets[:-1]] = False
    of_token = np.zeros(len(input_ids), np.uint64)
    of_token[is_next] = position_M
    for name, values in (
        ("topk_ids", list_array(list_offsets(table["topk_ids"]), vector_array(wide_Mk))),
        ("input_ids", list_array(offsets, pa.array(wide(input_ids, of_token)))),
    ):
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)
    return table
