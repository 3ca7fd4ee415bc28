"""What is in a store, for people: totals of each cache, and a few of its documents in readable form.

Gathers; `kd_assets.commands` prints, and turns token ids into text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.contract import EXPORTS
from kd_assets.durable import size_if_there
from kd_assets.errors import CorruptManifestError, NotCommittedError
from kd_assets.store.fingerprint import INPUT_KEY
from kd_assets.store.layout import HEAD_NAME, is_variant_name, recipe_folder_of, require_folder, result_folders
from kd_assets.store.manifest import Manifest, merge_stats, read_head, read_manifest
from kd_assets.store.reading.chosen import (
    NOT_THERE,
    PLANNED_ASSETS,
    require_place,
    say_what_is_put_aside,
    why_not_read,
)
from kd_assets.store.reading.planned import planned_partitions
from kd_assets.store.reading.reader import CacheReader
from kd_assets.store.recorded_checks import failed_check, measured_on, not_made_of
from kd_assets.store.schema import hidden_state_of

SHOWN_TOKENS = 48
SHOWN_POSITIONS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSummary:
    """The current results of one variant of one asset."""

    recipe: str
    asset: str
    variant: str
    folders: tuple[Path, ...]
    """In the order of their partition keys."""
    partition_keys: tuple[str, ...]
    n_documents: int
    n_tokens: int
    n_bytes: int
    bytes_per_token: float | None
    params: dict[str, Any]
    identity: dict[str, Any]
    """What the variant's name stands for besides the parameters."""
    stats: dict[str, float]
    checks: dict[str, dict[str, Any]]
    """Of each recorded check: how many partitions have it, how many passed, the largest of its `max_…` numbers."""
    provenance: dict[str, Any]
    """Of the result committed last."""
    first_created_at: str
    last_created_at: str
    has_documents: bool
    n_planned: int | None
    """Partitions that the current plan names; None where there is no plan, or less than a variant was looked at."""
    left_out: dict[str, str]
    """Partition key → why a reader of the recipe has nothing of it: missing, of another shard, or not planned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """All that was found at or below a path."""

    path: Path
    caches: tuple[CacheSummary, ...]
    n_superseded: int
    """Committed results that another one has taken the place of."""
    failed: dict[str, str]
    """Folder of a committed result that is not current → the check that it failed."""
    without_head: tuple[Path, ...]
    """Committed results of partitions that have no current one."""
    unfinished: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """One prediction of the teacher."""

    position: int
    token_id: int
    """The token at `position`; it and those before it are what the teacher saw."""
    target_id: int
    target_probability: float
    top: tuple[tuple[int, float], ...]
    """(token id, probability), most likely first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentView:
    """One document of a cache, for reading by eye."""

    partition_key: str
    document_id: str
    n_tokens: int
    n_loss_tokens: int
    input_ids: tuple[int, ...]
    """The first of them."""
    positions: tuple[Position, ...]
    vectors: dict[str, dict[str, Any]]
    """Of each column of vectors: shape, norm of the first vector and its first values."""
    fields: dict[str, Any]
    """The columns of one number or text."""


def inspect(path: Path, *, seen: Callable[[Manifest], None] = lambda manifest: None) -> Inspection:
    """Summaries of the results at or below `path`, by recipe, asset and variant.

    A result folder counts whether or not it is current; above it only current results do. `seen` is told of every
    committed result, current or not. Raises MissingInputError when there is no such folder, NotCommittedError when it
    holds no committed result.
    """
    require_folder(path)
    groups: dict[tuple[str, str, str], list[tuple[Path, Manifest]]] = {}
    unfinished, without_head, failed, n_superseded = [], [], {}, 0
    for folder in result_folders(path):
        try:
            manifest = read_manifest(folder)
        except NotCommittedError:
            unfinished.append(folder)
            continue
        require_place(folder, manifest)
        seen(manifest)
        if folder != path and not _is_current(folder):
            if why := failed_check(manifest):
                failed[str(folder)] = why
            elif size_if_there(folder.parent / HEAD_NAME) is None:
                without_head.append(folder)
            else:
                n_superseded += 1
            continue
        groups.setdefault((manifest.recipe, manifest.asset, manifest.variant), []).append((folder, manifest))
    if not groups:
        raise NotCommittedError(_nothing_current(path, unfinished, without_head, failed))
    return Inspection(
        path=path,
        caches=tuple(_summary(path, results) for _, results in sorted(groups.items())),
        n_superseded=n_superseded,
        failed=failed,
        without_head=tuple(without_head),
        unfinished=tuple(unfinished),
    )


def view_documents(cache: CacheSummary, n_documents: int) -> list[DocumentView]:
    """The first documents of a cache; empty for results that are no tables. Opens only the results they are in."""
    views: list[DocumentView] = []
    for folder in cache.folders if cache.has_documents else ():
        if len(views) >= n_documents:
            break
        reader = CacheReader.from_folders([folder], allow_failed=True)
        views += [_view(reader[i]) for i in range(min(n_documents - len(views), len(reader)))]
    return views


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The numbers whose bfloat16 bits these are; exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _nothing_current(
    path: Path, unfinished: Sequence[Path], without_head: Sequence[Path], failed: Mapping[str, str]
) -> str:
    """That nothing at or below `path` is current, and what is there instead."""
    some = [
        f"{len(found)} {words} such as {next(iter(found))}"
        for found, words in (
            (unfinished, "are unfinished,"),
            (without_head, "are committed and no head names them,"),
            (failed, "failed a check,"),
        )
        if found
    ]
    but = f" ({'; '.join(some)})" if some else ""
    return f"{path} holds no committed results that are current{but}: materialize them, or give another path"


def _is_current(folder: Path) -> bool:
    try:
        return read_head(folder.parent) == folder
    except CorruptManifestError:
        return False


def _summary(path: Path, results: Sequence[tuple[Path, Manifest]]) -> CacheSummary:
    n_planned, left_out = _compared_with_plan(path, results)
    return summary_of(results, n_planned=n_planned, left_out=left_out)


def summary_of(
    results: Sequence[tuple[Path, Manifest]], *, n_planned: int | None, left_out: Mapping[str, str]
) -> CacheSummary:
    """Of these results of one variant, one or more; the other arguments are fields of it."""
    manifests = [manifest for _, manifest in results]
    latest = max(manifests, key=lambda m: m.created_at)
    # The files of an export have none to count, since a document may be in several: its facts say it.
    counted = [
        m.facts if m.asset in EXPORTS else {"n_documents": m.n_documents, "n_tokens": m.n_tokens} for m in manifests
    ]
    n_documents, n_tokens = (
        sum(int(of_one.get(name, 0)) for of_one in counted) for name in ("n_documents", "n_tokens")
    )
    n_bytes = sum(m.n_bytes for m in manifests)
    kept_out = {"asset", "format_version", "params", INPUT_KEY}
    return CacheSummary(
        recipe=latest.recipe,
        asset=latest.asset,
        variant=latest.variant,
        folders=tuple(folder for folder, _ in results),
        partition_keys=tuple(m.partition_key for m in manifests),
        n_documents=n_documents,
        n_tokens=n_tokens,
        n_bytes=n_bytes,
        bytes_per_token=n_bytes / n_tokens if n_tokens else None,
        params=latest.params,
        identity={k: v for k, v in latest.identity.items() if k not in kept_out},
        stats=merge_stats(m.stats for m in manifests),
        checks=_merged_checks(manifests),
        provenance=latest.provenance,
        first_created_at=min(m.created_at for m in manifests),
        last_created_at=latest.created_at,
        has_documents=any(m.n_documents for m in manifests),
        n_planned=n_planned,
        left_out=dict(left_out),
    )


def _compared_with_plan(path: Path, results: Sequence[tuple[Path, Manifest]]) -> tuple[int | None, dict[str, str]]:
    """How many partitions the plan names, and what a reader would leave out; nothing of less than a whole variant."""
    folder, manifest = results[0]
    of_variant = folder.absolute().parent.parent
    if path.absolute() not in (of_variant, *of_variant.parents) or not is_variant_name(of_variant.name):
        return None, {}
    recipe_folder = recipe_folder_of(folder.absolute())
    plan = planned_partitions(recipe_folder) if manifest.asset in PLANNED_ASSETS else None
    left_out = {
        m.partition_key: why for _, m in results if (why := why_not_read(recipe_folder, m.asset, plan, m)) is not None
    }
    if plan is None:
        return None, left_out
    there = {m.partition_key for _, m in results}
    left_out |= {key: NOT_THERE for key in plan.input_hashes if key not in there}
    return len(plan.input_hashes), say_what_is_put_aside(recipe_folder, manifest.asset, of_variant.name, left_out)


def _merged_checks(manifests: Sequence[Manifest]) -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        for name, record in manifest.checks.items():
            if not isinstance(record, dict):
                continue
            total = merged.setdefault(name, {"n_partitions": 0, "n_passed": 0})
            total["n_partitions"] += 1
            total["n_passed"] += record.get("passed") is True
            if not_made_of(record) is not None:
                total["n_not_made"] = total.get("n_not_made", 0) + 1
            if (form := measured_on(manifest, name)) is not None:
                total["measured_on"] = ", ".join(sorted({form, *total.get("measured_on", form).split(", ")}))
            for key, value in record.items():
                if key.startswith("max_") and isinstance(value, (int, float)):
                    total[key] = max(total.get(key, -math.inf), value)
    return merged


def _view(document: dict[str, Any]) -> DocumentView:
    input_ids, loss_mask = document["input_ids"], document["loss_mask"]
    vectors = {}
    for name, values in document.items():
        if hidden_state_of(name) is not None:
            vectors[name] = _vector_view(bfloat16_to_float32(values))
        elif name.endswith("_embedding"):
            vectors[name] = _vector_view(values)
    shown = ("partition_key", "document_id", "n_tokens")
    return DocumentView(
        partition_key=document["partition_key"],
        document_id=document["document_id"],
        n_tokens=len(input_ids),
        n_loss_tokens=int(np.count_nonzero(loss_mask)),
        input_ids=tuple(input_ids[:SHOWN_TOKENS].tolist()),
        positions=_positions(document) if "topk_ids" in document else (),
        vectors=vectors,
        fields={k: v for k, v in document.items() if k not in shown and isinstance(v, (int, str))},
    )


def _vector_view(values: npt.NDArray[np.float32]) -> dict[str, Any]:
    if not len(values):  # a document of which no position is kept
        return {"shape": list(values.shape), "first_norm": 0.0, "first_values": []}
    first = values if values.ndim == 1 else values[0]
    norm = float(np.linalg.norm(first.astype(np.float64)))
    return {"shape": list(values.shape), "first_norm": norm, "first_values": first[:4].tolist()}


def _positions(document: dict[str, Any]) -> tuple[Position, ...]:
    """A few predictions, spread evenly over the document."""
    n_positions = len(document["target_logprob"])
    kept = document.get("positions", np.arange(n_positions))
    chosen = sorted({(i + 1) * n_positions // (SHOWN_POSITIONS + 1) for i in range(SHOWN_POSITIONS)})
    found = []
    for i in (i for i in chosen if i < n_positions):
        logprobs = document["topk_logprobs"][i].astype(np.float32)
        order = np.argsort(-logprobs, kind="stable")
        pairs = zip(document["topk_ids"][i][order].tolist(), np.exp(logprobs[order]).tolist(), strict=True)
        found.append(
            Position(
                position=int(kept[i]),
                token_id=int(document["input_ids"][kept[i]]),
                target_id=int(document["input_ids"][kept[i] + 1]),
                target_probability=float(np.exp(document["target_logprob"][i])),
                top=tuple(pairs),
            )
        )
    return tuple(found)
