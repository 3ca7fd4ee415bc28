"""Teacher caches as a torch dataset: a student's training data, joined across caches by document.

Used by training code; needs torch and `kd_assets.store`. A sample is a document with everything the teacher's caches
say about it. Documents are joined by (partition key, document id), never by position, and only caches that were made
from the same shards can be joined. The dataset is map-style with random access: any sampler, any number of loader
workers and ranks see each document exactly as often as the sampler asks for it.

Legend: B documents of a batch, L tokens of a document, T tokens of the longest document of a batch, k of top-k,
s different ids among the random draws of a position (the most of a document or batch), H hidden size of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_assets.contract import CACHES, Asset
from kd_assets.errors import NotCommittedError, RecipeError, UnknownFieldError, VariantConflictError
from kd_assets.store import CacheReader, Chosen, Missing, Ragged, choose
from kd_assets.store.ragged_topk import with_rows_of_k
from kd_assets.store.schema import hidden_state_of, k_of
from kd_assets.student.fields import (
    KEY_FIELDS,
    POSITIONS_FIELDS,
    TOKEN_FIELDS,
    cut,
    hidden_fields,
    is_over_tokens,
    padded_length,
    positions_field,
)

Sample = dict[str, Any]
"""`partition_key` and `document_id` are str, everything else is a tensor."""

Rows = np.ndarray[Any, np.dtype[np.int64]]
"""int64 [documents]: where in a cache each document is."""


_MOST_DECODED_BYTES = 1 << 30


class TeacherCacheDataset(Dataset[Sample]):
    """The documents that all given caches hold, in the order of the first cache.

    A sample has `partition_key`, `document_id`, `input_ids` int64 [L], `loss_mask` bool [L], and of the caches that
    are given:

    - topk_cache: `topk_ids` int64 [L-1, k], `topk_logprobs` float32 [L-1, k] (exact: read as float16; -inf, and the
      first id again, behind what a position of a cache with `top_p` keeps, which the losses leave out), `logsumexp`
      (unless the cache leaves it out) and `target_logprob` float32 [L-1]. Row i is about token i + 1. With random
      draws also `sampled_ids` and `sampled_counts` int64 [L-1, s]: the different ids that were drawn and how often; a
      count of 0 is padding. Of a cache that is cut to a student's vocabulary also `outside_mass` float32 [L-1]: the
      teacher's probability of all other ids. Everything else is of the distribution over the student's ids, which sums
      to 1 without them, so that losses on it are right as they are. Of a cache that keeps some positions only, these
      have M rows, and `topk_positions` int64 [M] says which.
    - hidden_state_cache: `hidden_block_<n>`, `hidden_final_before_norm`, `hidden_final_after_norm` bfloat16 [L, H],
      bit for bit as the teacher gave it; or [N, H] and `hidden_positions` int64 [N].
    - embedding_cache: `mean_embedding`, `last_token_embedding` float32 [H], and `embedded_tokens` int64 []: how many
      tokens they were pooled over.

    Caches may have been cut at different lengths; L is the longest, and shorter fields end early.
    """

    def __init__(self, readers: Mapping[Asset, CacheReader], *, max_length: int | None = None) -> None:
        """Join `readers` (asset name → reader). `max_length` cuts every document to its first tokens.

        Raises RecipeError without readers, VariantConflictError when the caches were made from different shards, and
        NotCommittedError when a cache lacks documents that another has.
        """
        if not readers:
            raise RecipeError(f"a student needs at least one cache of {', '.join(CACHES)}")
        if max_length is not None and max_length < 1:
            raise RecipeError(f"max_length is {max_length}: a document needs at least one token")
        self._readers = dict(readers)
        self._max_length = max_length
        self._k: dict[Asset, int] = {}
        for asset, reader in self._readers.items():
            if absent := [name for name in TOKEN_FIELDS if name not in reader.fields]:
                raise UnknownFieldError(f"the reader of {asset} leaves out {absent[0]!r}: a student needs it")
        _require_same_shards(self._readers)
        first, *others = self._readers
        # Only rows are kept, and as arrays: the dataset is pickled to every loader worker.
        self._rows = {first: np.arange(len(self._readers[first]))}
        for asset in others:
            self._rows[asset] = self._joined(first, asset)

    def _joined(self, first: Asset, asset: Asset) -> Rows:
        """Where in `asset` the documents of the first cache are. Raises as the constructor does."""
        of_both = [self._readers[name].ids_sha256() for name in (first, asset)]
        if list(of_both[0].items()) == list(of_both[1].items()):
            return np.arange(len(self._readers[first]))
        keys, held = self._readers[first].keys(), self._readers[asset].keys()
        if differing := set(keys).symmetric_difference(held):
            # Ids that rotted differ, too, and then it is the file that is to be mended.
            readers = (self._readers[first], self._readers[asset])
            in_both = set.intersection(*(set(reader.partition_keys) for reader in readers))
            for reader in readers:
                reader.require_unchanged(in_both & {partition_key for partition_key, _ in differing})
        return _rows_of(keys, held, asset=asset, first=first)

    @classmethod
    def from_folders(
        cls, folders: Mapping[Asset, Sequence[Path]], *, max_length: int | None = None, allow_failed: bool = False
    ) -> TeacherCacheDataset:
        """The dataset over committed result folders (asset name → one folder a shard).

        Raises FailedCheckError for one whose recorded checks failed, unless `allow_failed`.
        """
        readers = {
            asset: CacheReader.from_folders(paths, allow_failed=allow_failed) for asset, paths in folders.items()
        }
        return cls(readers, max_length=max_length)

    @classmethod
    def from_recipe(
        cls,
        recipe_folder: Path,
        *,
        assets: Iterable[Asset] = CACHES,
        partition_keys: Iterable[str] | None = None,
        max_length: int | None = None,
        missing: Missing = "refuse",
        allow_failed: bool = False,
        variants: Mapping[Asset, str] | None = None,
    ) -> TeacherCacheDataset:
        """The dataset over the partitions that the current plan of a recipe in a store names.

        A partition is missing when one of its caches is: not committed, made of another shard than the one that is
        planned now, or recorded to have failed a check (unless `allow_failed`). Raises NotCommittedError or
        FailedCheckError for the first; with `missing="skip"` they are left out and named in `left_out`. Of caches with
        several variants `variants` names one; else it is that of the recipe's last run.
        """
        keys = None if partition_keys is None else tuple(partition_keys)
        chosen = {
            asset: choose(
                recipe_folder,
                asset,
                variant=(variants or {}).get(asset),
                partition_keys=keys,
                missing=missing,
                allow_failed=allow_failed,
            )
            for asset in assets
        }
        if missing == "skip":
            chosen = _in_all(chosen, recipe_folder)
        return cls({asset: CacheReader.of(results) for asset, results in chosen.items()}, max_length=max_length)

    def __len__(self) -> int:
        return len(next(iter(self._rows.values())))

    def __getitem__(self, i: int) -> Sample:
        documents = {
            asset: self._with_rows_of_k(asset, reader[int(self._rows[asset][i])])
            for asset, reader in self._readers.items()
        }
        longest = max(documents.values(), key=lambda document: len(document["input_ids"]))
        sample: Sample = {name: longest[name] for name in KEY_FIELDS}
        sample["input_ids"] = torch.from_numpy(longest["input_ids"].astype(np.int64))
        sample["loss_mask"] = torch.from_numpy(longest["loss_mask"].copy())
        for asset, document in documents.items():
            sample |= _tensors_of(asset, document)
        return sample if self._max_length is None else cut(sample, self._max_length)

    def documents(self, indices: Sequence[int] | Rows) -> list[dict[str, Any]]:
        """These samples as numpy arrays, most of them views of what is read: what batches are made of.

        Fields are those of a sample, with the store's dtypes (bfloat16 as uint16, lists of draws as `Ragged`; top-k
        lists of different lengths are filled up to k).
        """
        chosen = np.asarray(indices, dtype=np.int64)
        of_assets = {
            asset: [self._with_rows_of_k(asset, document) for document in reader.documents(self._rows[asset][chosen])]
            for asset, reader in self._readers.items()
        }
        return [
            self._joined_document({asset: documents[i] for asset, documents in of_assets.items()})
            for i in range(len(chosen))
        ]

    def _with_rows_of_k(self, asset: Asset, document: Mapping[str, Any]) -> Mapping[str, Any]:
        if not any(isinstance(document.get(name), Ragged) for name in ("topk_ids", "topk_logprobs")):
            return document
        if asset not in self._k:
            self._k[asset] = k_of(self._readers[asset].schema)
        return with_rows_of_k(document, self._k[asset])

    def _joined_document(self, documents: Mapping[Asset, Mapping[str, Any]]) -> dict[str, Any]:
        longest = max(documents.values(), key=lambda document: len(document["input_ids"]))
        joined: dict[str, Any] = {name: longest[name] for name in (*KEY_FIELDS, *TOKEN_FIELDS)}
        for asset, document in documents.items():
            for name, value in document.items():
                if name not in joined and name != "n_tokens":
                    joined[POSITIONS_FIELDS[asset] if name == "positions" else name] = value
            if asset == "embedding_cache":
                joined["embedded_tokens"] = len(document["input_ids"])
        return joined if self._max_length is None else cut(joined, self._max_length)

    @property
    def n_tokens_D(self) -> Rows:
        """int64 [D]: tokens of every sample. Reads indexes, and no part that has one."""
        lengths = [reader.n_tokens_D[self._rows[asset]] for asset, reader in self._readers.items()]
        longest: Rows = np.maximum.reduce(lengths)
        return longest if self._max_length is None else np.minimum(longest, self._max_length)

    def ids_sha256(self) -> dict[str, str]:
        """Partition key → a hash of its documents' ids in their order."""
        return next(iter(self._readers.values())).ids_sha256()

    def keep_decoded(self, *, tokens: int, per_stored_byte: int) -> None:
        """Let a process keep so many tokens of each cache decoded, at so many bytes for each one on disk; of all caches
        together 1 GiB at most, of which those that take less have theirs first, and what their readers keep anyway."""
        wanted = []
        for reader in self._readers.values():
            n_bytes, n_tokens = (sum(getattr(m, name) for m in reader.manifests) for name in ("n_bytes", "n_tokens"))
            wanted.append((tokens * per_stored_byte * n_bytes // max(n_tokens, 1), reader))
        left = _MOST_DECODED_BYTES
        for i, (n_bytes, reader) in enumerate(sorted(wanted, key=lambda of_cache: of_cache[0])):
            given = min(n_bytes, left // (len(wanted) - i))
            reader.keep_decoded(given)
            left -= given

    @property
    def keys(self) -> list[tuple[str, str]]:
        """(partition key, document id) of every sample."""
        return next(iter(self._readers.values())).keys()

    @property
    def left_out(self) -> Mapping[str, str]:
        """Partition key → why the dataset has nothing of it, though it is planned or committed."""
        return {
            key: f"{asset}: {why}" for asset, reader in self._readers.items() for key, why in reader.left_out.items()
        }

    @property
    def readers(self) -> Mapping[Asset, CacheReader]:
        return self._readers


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """A batch: fields over tokens padded on the right to the longest document, others stacked.

    `partition_key` and `document_id` become lists of str. Added to the samples' fields: `attention_mask` bool [B, T]
    (False on padding), `topk_mask` bool [B, T-1] (rows that hold a teacher's prediction of a token the loss mask asks
    for), `sampled_mask` bool [B, T-1, s] (ids that were drawn, whatever the loss mask asks for) and `hidden_mask` bool
    [B, T] (tokens with hidden states). Padded values are zero, and no mask is True there. Of caches that keep some
    positions only, M or N of the batch's longest stand in the place of T-1 or T: `at_topk_positions` and
    `at_hidden_positions` bring a student's values to them.
    """
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in KEY_FIELDS}
    n_tokens = max(len(sample["input_ids"]) for sample in samples)
    for name in samples[0]:
        if name in KEY_FIELDS:
            continue
        values: list[Tensor] = [sample[name] for sample in samples]
        if not is_over_tokens(name):
            batch[name] = torch.stack(values)
        elif positions_field(name) in samples[0]:
            batch[name] = _pad(values, max(map(len, values)))
        else:
            batch[name] = _pad(values, padded_length(name, n_tokens))
    batch["attention_mask"] = _lengths_mask([len(s["input_ids"]) for s in samples], n_tokens)
    if "topk_ids" in batch:
        predicted = _lengths_mask([len(s["topk_ids"]) for s in samples], batch["topk_ids"].shape[1])
        batch["topk_mask"] = predicted & at_topk_positions(batch["loss_mask"][:, 1:], batch)
    if "sampled_counts" in batch:
        batch["sampled_mask"] = batch["sampled_counts"] > 0
    if names := hidden_fields(batch):
        batch["hidden_mask"] = _lengths_mask([len(s[names[0]]) for s in samples], batch[names[0]].shape[1])
    return batch


def at_topk_positions(values_BT: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """[B, M, ...]: of values at the positions 0 to T - 2 of a batch, those at the positions of its top-k rows."""
    return _at(values_BT, batch.get("topk_positions"))


def at_hidden_positions(values_BT: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """[B, N, ...]: of values at the positions 0 to T - 1 of a batch, those at the positions of its hidden states."""
    return _at(values_BT, batch.get("hidden_positions"))


def _at(values_BT: Tensor, positions_BM: Tensor | None) -> Tensor:
    if positions_BM is None:
        return values_BT
    rows_B1 = torch.arange(len(values_BT), device=values_BT.device)[:, None]
    return values_BT[rows_B1, positions_BM]


def _tensors_of(asset: str, document: Mapping[str, Any]) -> Sample:
    """A cache's own fields of one document as tensors that own their memory."""
    tensors: Sample = {}
    for name, value in document.items():
        if name in (*KEY_FIELDS, *TOKEN_FIELDS, "n_tokens"):
            continue
        if hidden_state_of(name) is not None:
            # The bits of bfloat16 as numpy knows them: a view, never a conversion.
            tensors[name] = torch.from_numpy(value.copy()).view(torch.bfloat16)
        elif name == "positions":
            tensors[POSITIONS_FIELDS[asset]] = torch.from_numpy(value.astype(np.int64))
        elif name == "topk_ids":
            tensors[name] = torch.from_numpy(value.astype(np.int64))
        elif isinstance(value, Ragged):
            tensors[name] = torch.from_numpy(padded_lists(value))
        else:
            tensors[name] = torch.from_numpy(value.astype(np.float32))
    if asset == "embedding_cache":
        tensors["embedded_tokens"] = torch.tensor(len(document["input_ids"]))
    return tensors


def _pad(values: Sequence[Tensor], length: int) -> Tensor:
    """Stacked, filled up with zeros to `length` rows and, where rows are lists of draws, to the longest of them."""
    row_shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = values[0].new_zeros(len(values), length, *row_shape)
    for row, value in zip(padded, values, strict=True):
        row[tuple(slice(size) for size in value.shape)] = value
    return padded


def padded_lists(lists: Ragged) -> Rows:
    """int64 [lists, elements of the longest], filled up with zeros."""
    lengths = lists.lengths
    padded = np.zeros((len(lists), int(lengths.max(initial=0))), dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = lists.values
    return padded


def _lengths_mask(lengths: Sequence[int], n: int) -> Tensor:
    """bool [len(lengths), n]: True on the first `lengths[i]` columns of row i."""
    return torch.arange(n) < torch.tensor(lengths)[:, None]


def _require_same_shards(readers: Mapping[Asset, CacheReader]) -> None:
    """Raise VariantConflictError unless every partition was made from one and the same shard in all caches."""
    shards: dict[str, tuple[Any, str]] = {}
    for asset, reader in readers.items():
        for manifest in reader.manifests:
            made_from = manifest.identity.get("input")
            known, known_asset = shards.setdefault(manifest.partition_key, (made_from, asset))
            if made_from != known:
                raise VariantConflictError(
                    f"partition {manifest.partition_key!r}: {asset} was made from shard {made_from!r:.20}, "
                    f"{known_asset} from {known!r:.20}: materialize the older one again, they cannot teach together"
                )


def _in_all(chosen: Mapping[Asset, Chosen], recipe_folder: Path) -> dict[Asset, Chosen]:
    """The partitions that every cache has. Raises NotCommittedError where there are none."""
    there = {asset: {m.partition_key for m in results.manifests} for asset, results in chosen.items()}
    in_all = set.intersection(*there.values()) if there else set()
    if there and not in_all:
        raise NotCommittedError(f"no partition of {recipe_folder} has all of {', '.join(there)}: materialize some")
    anywhere = set.union(*there.values()) if there else set()
    return {
        asset: results.only(in_all, lacking=anywhere - there[asset] - set(results.left_out))
        for asset, results in chosen.items()
    }


def _rows_of(wanted: Sequence[tuple[str, str]], held: Sequence[tuple[str, str]], *, asset: str, first: str) -> Rows:
    """Where each of the `wanted` documents is among those `held`. Raises NotCommittedError for a difference."""
    index = {key: row for row, key in enumerate(held)}
    different = set(wanted).symmetric_difference(index)
    if different:
        partition_key, document_id = min(different)
        raise NotCommittedError(
            f"{first} and {asset} differ by {len(different)} documents, the first is {document_id!r} of partition "
            f"{partition_key!r}: materialize the same partitions of both, or name the partitions to read"
        )
    return np.array([index[key] for key in wanted], dtype=np.int64)
