"""A small store for each codec to damage: a shard and one cache of it, in two parts of several groups of rows.

Everything follows from a seed. What is written goes through the product's own writer, with smaller groups than it makes
otherwise, so that a few kilobytes have all that a container can have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kd_assets.contract import Asset
from kd_assets.store import (
    FORMAT_VERSION,
    Documents,
    ResultWriter,
    coded,
    encode_hidden_states,
    encode_shard,
    encode_topk,
    part_stats,
    plan_output,
    plan_parts,
)
from kd_assets.store.codecs.states import float32_to_bfloat16
from kd_assets.store.computing_versions import computing_versions
from kd_assets.store.document_index import SECTIONS, index_bytes, read_index
from kd_assets.store.fingerprint import data_version, fingerprint
from kd_assets.store.layout import AUDIT_NAME, INDEX_NAME, MANIFEST_NAME
from kd_assets.store.manifest import read_manifest
from kd_assets.store.positions import choice_of, kept_positions
from kd_assets.store.writing.documents import offsets_of
from kd_assets_tests.store.examples import RECOMPUTED, fixed_clock, targets

RECIPE = "coded"
KEY = "coded-00000"
VOCABULARY, K, HIDDEN_SIZE, DRAWS, TOP_P = 211, 8, 128, 3, 0.7
PART_DOCUMENTS, GROUP_TOKENS = 4, 40


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is damaged: a part of a cache of one codec, or an index."""

    name: str
    asset: Asset
    params: Mapping[str, Any]
    lengths: tuple[int, ...]
    is_index: bool = False

    @property
    def codec(self) -> str:
        return str(self.params.get("codec", "plain"))


_TOPK, _STATES = (60, 2, 1, 90, 33, 41, 7, 20), (5, 1, 3, 17, 9, 2, 30, 13)
_COMPACT = {"k": K, "max_length": 64, "codec": "compact"}


def _topk(name: str, **params: Any) -> Subject:
    return Subject(name=name, asset="topk_cache", params={"k": K, "max_length": 64, **params}, lengths=_TOPK)


def _states(name: str, **params: Any) -> Subject:
    params = {"blocks": [1], "final": ["after_norm"], "max_length": 32, **params}
    return Subject(name=name, asset="hidden_state_cache", params=params, lengths=_STATES)


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        _topk("plain", draws=DRAWS, seed=0),
        _topk("top_p", top_p=TOP_P),
        _topk("compact", codec="compact"),
        _topk("compact draws", codec="compact", draws=DRAWS, seed=0),
        _topk("compact top_p", codec="compact", top_p=TOP_P, draws=DRAWS, seed=0),
        _topk("compact without logsumexp", codec="compact", logsumexp=False, positions="learned"),
        _states("raw"),
        _states("split", codec="split", positions="learned"),
        _states("fp8", codec="fp8"),
        _states("int8_32", codec="int8_32"),
        _states("int8_128", codec="int8_128"),
        Subject(name="documents.index", asset="topk_cache", params=_COMPACT, lengths=_TOPK, is_index=True),
    )
}


@dataclass(frozen=True, kw_only=True)
class CodecStore:
    """A recipe's folder in a store, and all its bytes as they were written."""

    subject: Subject
    recipe_folder: Path
    folder: Path
    """The result that is damaged."""
    files: tuple[Path, ...]
    """Those of its files that are."""
    others: tuple[bytes, ...]
    """Files of other results that may come into their place."""
    sound: Mapping[Path, bytes] = field(repr=False)

    def restore(self) -> None:
        """Put back what was damaged, and what was made to agree with it."""
        for path, data in self.sound.items():
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)


def make_store(home: Path, subject: Subject) -> CodecStore:
    """The store of a subject in a new folder."""
    store = home / "store"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GROUP_TOKENS", "CODED_GROUP_TOKENS"):
            patch.setattr(f"kd_assets.store.partfile.{name}", GROUP_TOKENS)
        folder = _commit_both(store, subject, KEY, seed=0)
        elsewhere = [
            _commit_both(home / "of another shard", subject, "coded-00001", seed=1),
            _commit_both(home / "of another commit", subject, KEY, seed=7),
        ]
    parts = tuple(sorted(folder.glob("part-*")))
    files = (folder / INDEX_NAME,) if subject.is_index else parts
    names = [INDEX_NAME] if subject.is_index else [part.name for part in parts]
    others = tuple((other / name).read_bytes() for other in (folder, *elsewhere) for name in names)
    changed = (*parts, folder / INDEX_NAME, folder / MANIFEST_NAME, store / RECIPE / AUDIT_NAME)
    return CodecStore(
        subject=subject,
        recipe_folder=store / RECIPE,
        folder=folder,
        files=files,
        others=others,
        sound={path: path.read_bytes() for path in changed},
    )


def _commit_both(store: Path, subject: Subject, key: str, *, seed: int) -> Path:
    """A shard and the cache of it; the cache's folder."""
    docs = _documents(subject.lengths, key, seed)
    _, shard = _commit(store, "shards_manifest", {}, docs, key, f"source {seed}")
    kept = docs.slice(0, docs.n_documents, subject.params["max_length"])
    folder, _ = _commit(store, subject.asset, subject.params, kept, key, shard)
    return folder


def _documents(lengths: tuple[int, ...], key: str, seed: int) -> Documents:
    rng = np.random.default_rng(seed)
    return Documents(
        document_ids=[f"{key}/document-{i}" for i in range(len(lengths))],
        offsets=offsets_of(np.array(lengths, dtype=np.int64)),
        input_ids=rng.integers(0, VOCABULARY, sum(lengths), dtype=np.uint32),
        loss_mask=rng.random(sum(lengths)) < 0.7,
    )


def _commit(
    store: Path, asset: Asset, params: Mapping[str, Any], docs: Documents, key: str, made_of: str
) -> tuple[Path, str]:
    """A result's folder and its data version."""
    identity = {
        "asset": asset,
        "format_version": FORMAT_VERSION,
        **computing_versions(asset, params),
        "params": dict(params),
        "input": made_of,
    }
    output = plan_output(asset, identity, recipe_folder=store / RECIPE, partition_key=key)
    with ResultWriter(
        output, recipe=RECIPE, recipe_folder=store / RECIPE, partition_key=key, clock=fixed_clock
    ) as writer:
        plans = plan_parts(docs.n_tokens_D, max_documents=PART_DOCUMENTS, max_tokens=10**9)
        for plan in plans:
            part = docs.slice(plan.first_document, plan.n_documents)
            made = coded(_rows(asset, params, part), str(params.get("codec", "plain")))
            stats = part_stats(asset, made.decoded) | made.error
            writer.write_part(plan.index, made.stored, n_tokens=part.n_tokens, stats=stats)
        manifest = writer.commit(
            parts=len(plans),
            checks={} if asset == "shards_manifest" else {"recomputed": RECOMPUTED},
            provenance={},
            facts={"vocab_size": VOCABULARY},
        )
    return Path(output.path), manifest.data_version


def _rows(asset: Asset, params: Mapping[str, Any], docs: Documents) -> pa.Table:
    if asset == "shards_manifest":
        return encode_shard(docs, ["corpus"] * docs.n_documents, np.arange(docs.n_documents, dtype=np.int64))
    rng = np.random.default_rng(int(docs.input_ids.sum()))
    kept = kept_positions(choice_of(params), docs, has_next=asset == "topk_cache")
    if asset == "hidden_state_cache":
        n = docs.n_tokens if kept is None else len(kept.positions_M)
        bits = [float32_to_bfloat16(rng.normal(0, 1, (n, HIDDEN_SIZE)).astype(np.float32)) for _ in range(2)]
        return encode_hidden_states(docs, {1: bits[0], "after_norm": bits[1]}, kept)
    targets_M = targets(docs)
    if kept is not None:
        firsts = docs.offsets[:-1] - np.arange(docs.n_documents)
        targets_M = targets_M[np.repeat(firsts, np.diff(kept.offsets)) + kept.positions_M]
    logits = rng.normal(0, 3, (len(targets_M), VOCABULARY))
    logsumexp = np.log(np.exp(logits).sum(axis=1)).astype(np.float32)
    logprobs = (logits - logsumexp[:, None]).astype(np.float32)
    top = np.argsort(-logprobs, axis=1, kind="stable")[:, :K]
    draws = params.get("draws")
    return encode_topk(
        docs,
        topk_ids_Mk=top.astype(np.uint32),
        topk_logprobs_Mk=np.take_along_axis(logprobs, top, axis=1).astype(np.float16),
        logsumexp_M=logsumexp if params.get("logsumexp", True) else None,
        target_logprob_M=np.take_along_axis(logprobs, targets_M[:, None], axis=1)[:, 0],
        sampled_ids_Md=rng.integers(0, VOCABULARY, (len(top), draws), dtype=np.uint32) if draws else None,
        positions=kept,
        top_p=params.get("top_p"),
    )


# ------------------------------------------------------------------------------------------------- hashes made anew


def hash_anew(store: CodecStore, *, keep_index: bool) -> None:
    """Make manifest, audit log and index agree with the bytes of the parts that are there, as a writer would whose bug
    made them. Without `keep_index` there is none, as of earlier versions."""
    manifest = read_manifest(store.folder)
    index = read_index(store.folder, manifest)
    raw = json.loads((store.folder / MANIFEST_NAME).read_bytes())
    for part in raw["parts"]:
        data = (store.folder / part["name"]).read_bytes()
        part |= {"n_bytes": len(data), "sha256": _sha256(data)}
    raw["n_bytes"] = sum(part["n_bytes"] for part in raw["parts"])
    raw["data_version"] = data_version(raw["asset"], [part["sha256"] for part in raw["parts"]])
    del raw["manifest_sha256"]
    (store.folder / MANIFEST_NAME).write_text(json.dumps(raw | {"manifest_sha256": fingerprint(raw)}))
    audit = store.recipe_folder / AUDIT_NAME
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    for line in lines:
        if line["path"] == str(store.folder.relative_to(store.recipe_folder)):
            line |= {name: raw[name] for name in ("n_bytes", "data_version")}
    audit.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not keep_index or index is None:
        (store.folder / INDEX_NAME).unlink()
        return
    said = index_bytes(asset=raw["asset"], data_version=raw["data_version"], schema=index.schema(), rows=index.rows())
    (store.folder / INDEX_NAME).write_bytes(said)


def index_hashed_anew(data: bytes) -> bytes:
    """An index whose own hashes agree with its bytes. Raises ValueError for what is none any more."""
    line, _, rest = data.partition(b"\n")
    header = json.loads(line)
    header.pop("index_sha256", None)
    at = 0
    for section in (header["sections"][name] for name in SECTIONS):
        body = rest[at : at + section["n_bytes"]]
        at += section["n_bytes"]
        section["sha256"] = _sha256(body)
    said = json.dumps(header | {"index_sha256": fingerprint(header)}, sort_keys=True, separators=(",", ":"))
    return said.encode() + b"\n" + rest


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
