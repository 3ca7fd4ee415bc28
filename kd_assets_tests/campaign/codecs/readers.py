"""Everybody who reads a cache, asked about a damaged one; and what the format says of numbers that are still given.

A reader gives digests of what it read, in its order, or raises. So what is given can be compared with what was given
before the damage.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kd_assets.cli import main as command_line
from kd_assets.errors import CorruptPartError
from kd_assets.export.joined import joined_partition, partitions_of
from kd_assets.replay.cache import ReplayCache
from kd_assets.store import CacheReader, Ragged, ResultFiles, check_all, choose, plain_table, verify
from kd_assets.store.codecs.states import LARGEST_STATE, bfloat16_to_float32
from kd_assets.store.codecs.topk_rows import NO_ID
from kd_assets.store.ragged_topk import with_rows_of_k
from kd_assets.store.reading.parts import damage_named, require_unchanged
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets.student.loading.loader import TrainingLoader
from kd_assets.student.loading.stream import TeacherCacheStream
from kd_assets_tests.campaign.codecs.damages import read_plainly
from kd_assets_tests.campaign.codecs.stores import DRAWS, HIDDEN_SIZE, VOCABULARY, CodecStore, K
from kd_assets_tests.golden.facts import digest
from kd_assets_tests.store.test_codecs import decoder_to_copy

Reading = list[str]
Reader = Callable[[CodecStore], Reading]
_BATCH, _LONGEST = 3, 128


class FoundError(Exception):
    """`verify` or a check names what is wrong."""


def documents(store: CodecStore) -> list[dict[str, Any]]:
    """As a reader of the recipe gives them."""
    reader = CacheReader(store.recipe_folder, store.subject.asset)
    return [reader[i] for i in range(len(reader))]


def _reader(store: CodecStore) -> Reading:
    return [digest(document) for document in documents(store)]


def _data_set(store: CodecStore) -> Reading:
    dataset = _dataset(store)
    return [digest(dataset[i]) for i in range(len(dataset))]


def _loader(store: CodecStore) -> Reading:
    batches = TrainingLoader(_dataset(store), batch_size=_BATCH, num_workers=0, pack_to=_LONGEST)
    return [_digest(batch) for batch in batches]


def _stream(store: CodecStore) -> Reading:
    return [_digest(batch) for batch in TeacherCacheStream(_dataset(store), batch_size=_BATCH)]


def _dataset(store: CodecStore) -> TeacherCacheDataset:
    return TeacherCacheDataset.from_recipe(store.recipe_folder, assets=[store.subject.asset])


def _export(store: CodecStore) -> Reading:
    asset = store.subject.asset
    chosen = {asset: choose(store.recipe_folder, asset)}
    found = []
    for key in partitions_of(chosen):
        states = [1, "after_norm"] if asset == "hidden_state_cache" else []
        joined = joined_partition(chosen, key, states=states, max_length=None)  # type: ignore[arg-type]
        for part in joined.parts:
            rows = joined.documents(part.index, range(part.first, part.stop), first_number=part.first)
            found += [_digest({name: getattr(row, name) for name in row.__slots__}) for row in rows]
        joined.close()
    return found


def _replay(store: CodecStore) -> Reading:
    """Every document as it was asked for before the damage: what its ids are is known to who asks."""
    cache = ReplayCache(choose(store.recipe_folder, store.subject.asset), not_kept="null")
    k = 1 if "top_p" in store.subject.params else K  # a position may keep no more
    found = []
    for ids_L in _sequences(store):
        rows = cache.rows(ids_L, first=1, k=k, name="sequence")
        found.append(digest({name: getattr(rows, name) for name in rows.__slots__ if name != "outside_mass_M"}))
    return found


def _sequences(store: CodecStore) -> list[np.ndarray[Any, np.dtype[np.uint32]]]:
    shard, most = CacheReader(store.recipe_folder, "shards_manifest"), int(store.subject.params["max_length"])
    sequences = [shard[i]["input_ids"][:most] for i in range(len(shard))]
    return [ids_L for ids_L in sequences if len(ids_L) > 1]


def _verify(store: CodecStore) -> Reading:
    report = verify(store.folder)
    if report.problems:
        raise FoundError(" | ".join(f"{problem.kind}: {problem.message}" for problem in report.problems[:3]))
    return [f"{report.n_documents} documents, {report.n_tokens} tokens"]


def _checks(store: CodecStore) -> Reading:
    shard = choose(store.recipe_folder, "shards_manifest").folders[0]
    results = check_all(ResultFiles(store.folder), ResultFiles(shard))
    if failed := [f"{result.name}: {result.description}" for result in results if not result.passed]:
        raise FoundError(" | ".join(failed[:3]))
    return [result.name for result in results]


def _inspect(store: CodecStore) -> Reading:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command_line(["inspect", str(store.recipe_folder), "--documents", "8"])
    if status:
        raise FoundError(err.getvalue())
    told = out.getvalue().splitlines()
    return [line for line in told if "identity" not in line and "bytes" not in line]


def _plain_table(store: CodecStore) -> Reading:
    """Files by pyarrow alone, after their hashes were compared as F22 has it, and the codec's function for tables."""
    found = []
    for record in CacheReader.from_folders([store.folder]).manifests[0].parts:
        path = store.folder / record.name
        require_unchanged(path, record)
        with damage_named(path):
            try:
                table = plain_table(read_plainly(path), vocabulary=VOCABULARY)
            except OSError as e:  # pyarrow's own words of a file that is none
                raise CorruptPartError(str(e)) from e
            found += [repr(row) for row in table.to_pylist()]
    return found


def decoded_by_the_copy(store: CodecStore) -> dict[str, dict[str, Any]]:
    """Document → what FORMAT.md's decoders of `compact` make of its rows."""
    decode, decode_draws, found = decoder_to_copy(), decoder_to_copy("decode_draws"), {}
    for file in store.files:
        for row in read_plainly(file).to_pylist():
            ids, logprobs, target, sums = decode(row, K)
            columns = {"topk_ids": ids, "topk_logprobs": logprobs, "target_logprob": target}
            if sums is not None:
                columns["logsumexp"] = sums
            if "draws" in store.subject.params:
                drawn = decode_draws(row, ids, DRAWS)
                for at, name in enumerate(("sampled_ids", "sampled_counts")):
                    columns[name] = np.concatenate([np.zeros(0, np.int64), *(of[at] for of in drawn)])
            found[row["document_id"]] = columns
    return found


def as_by_the_copy(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document of a reader as `decoded_by_the_copy` has it."""
    rows = with_rows_of_k(document, K, NO_ID)
    return {name: value.values if isinstance(value, Ragged) else value for name, value in rows.items()}


def readers_of(store: CodecStore) -> dict[str, Reader]:
    """By name."""
    readers: dict[str, Reader] = {
        "verify": _verify,
        "checks": _checks,
        "reader": _reader,
        "data set": _data_set,
        "loader": _loader,
        "stream": _stream,
        "export": _export,
        "inspect": _inspect,
    }
    if store.subject.asset == "topk_cache":
        readers["replay"] = _replay
    if not store.subject.is_index:
        readers["plain table"] = _plain_table
    return readers


def _digest(values: Mapping[str, Any]) -> str:
    """Of anything that a reader gives: arrays by their bits, the rest as text."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if hasattr(value, "__slots__") and not isinstance(value, Ragged):
            parts = {slot: getattr(value, slot) for slot in value.__slots__ if slot != "let_go"}
            flat[name] = _digest(parts)
        elif isinstance(value, dict):
            flat[name] = _digest({str(key): item for key, item in value.items()})
        else:
            flat[name] = (
                json.dumps(value, default=repr) if value is None or isinstance(value, (list, bool, int)) else value
            )
    return digest(flat)


# ------------------------------------------------------------------------------------- what the format says of numbers


def broken_rule(store: CodecStore, document: Mapping[str, Any]) -> str | None:
    """What of a document cannot be, whatever its numbers are: a shape, or a number that no codec gives."""
    n_tokens = int(document["n_tokens"])
    if not len(document["input_ids"]) == len(document["loss_mask"]) == n_tokens > 0:
        return f"n_tokens is {n_tokens}, of {len(document['input_ids'])} ids and {len(document['loss_mask'])} mask bits"
    has_next = store.subject.asset == "topk_cache"
    n_rows = len(document["positions"]) if "positions" in document else n_tokens - has_next
    for name in document.keys() - {"partition_key", "document_id", "n_tokens", "input_ids", "loss_mask", "positions"}:
        if len(document[name]) != n_rows:
            return f"{name} has {len(document[name])} elements, of {n_rows} positions"
    return _broken_topk(store, document) if has_next else _broken_states(store, document)


def _broken_states(store: CodecStore, document: Mapping[str, Any]) -> str | None:
    for name in (name for name in document if name.startswith("hidden_")):
        bits = document[name]
        if bits.dtype != np.uint16 or bits.shape[1:] != (HIDDEN_SIZE,):
            return f"{name} is {bits.dtype} {bits.shape}"
        if store.subject.codec not in ("plain", "split"):
            magnitude = np.abs(bfloat16_to_float32(bits))
            if not (magnitude <= LARGEST_STATE * (1 + 2.0**-7)).all():
                return f"{name} has {magnitude.max()}, which {store.subject.codec} does not hold"
    return None


def _broken_topk(store: CodecStore, given: Mapping[str, Any]) -> str | None:
    document = given
    if "top_p" in store.subject.params:
        if why := _broken_lists(document["topk_ids"], document["topk_logprobs"]):
            return why
        document = with_rows_of_k(document, K)
    ids, logprobs = document["topk_ids"], document["topk_logprobs"]
    if ids.shape != logprobs.shape or ids.shape[1:] != (K,):
        return f"topk_ids are {ids.shape}, topk_logprobs {logprobs.shape}"
    if store.subject.codec == "plain":
        return None  # nothing is decoded, and so nothing is looked at
    if ids.max(initial=0) >= VOCABULARY:
        return f"an id is {ids.max()}"
    wide = logprobs.astype(np.float64)
    kept = lists.values if isinstance(lists := given["topk_logprobs"], Ragged) else logprobs
    if not np.isfinite(kept).all() or (wide > 0).any() or (wide[:, 1:] > wide[:, :-1]).any():
        return "log-probabilities that are not finite, above 0 or not descending"
    if (np.exp(wide).sum(axis=1) > 1 + 4e-3).any():
        return "probabilities add up to more than 1"
    if not (document["target_logprob"] <= 4e-3).all() or not np.isfinite(document["target_logprob"]).all():
        return f"target_logprob is {document['target_logprob'].max()}"
    if "logsumexp" in document and not np.isfinite(document["logsumexp"]).all():
        return "logsumexp is not finite"
    return None


def _broken_lists(ids: Ragged, logprobs: Ragged) -> str | None:
    """Of positions that keep different numbers of tokens."""
    if not np.array_equal(ids.offsets, logprobs.offsets):
        return "topk_ids and topk_logprobs have lists of different lengths"
    n_M = ids.lengths
    if not ((n_M >= 1) & (n_M <= K)).all():
        return f"positions keep {n_M.min()} to {n_M.max()} tokens"
    return None


def twice_in_a_position(document: Mapping[str, Any]) -> bool:
    """Whether a position has an id twice, which readers leave to `verify`."""
    ids = document["topk_ids"]
    return any(len(np.unique(ids[at])) < len(ids[at]) for at in range(len(ids)))
