"""What an export will hold, known before anything is written: sections, their documents, and the numbers of these.

Which documents go into the validation set depends on their ids and the seed alone, so that equal documents are on one
side in every export, whatever partitions it has. Sections and documents are numbered in each split for itself.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kd_assets.contract import CACHES, Asset
from kd_assets.errors import NotCommittedError, RecipeError, StorageUnavailableError
from kd_assets.export.documents import Int64Array
from kd_assets.export.format import ExportOptions, LeftOut, Needs
from kd_assets.export.joined import JoinedPartition, PartSpan, joined_partition, partitions_of
from kd_assets.store import Chosen
from kd_assets.store.codecs.sizes import decoded_per_byte

log = logging.getLogger(__name__)

TRAIN, VALIDATION = "train", "validation"
WHOLE = ""
"""The split of an export that has no validation set: its files lie in the folder itself."""

_ROOM_TO_SPARE = 64 << 20
"""Bytes that are to stay free on the disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSection:
    """Documents of one part that go into one split."""

    split: str
    index: int
    partition_key: str
    part: int
    first_number: int
    n_documents: int
    n_tokens: int


@dataclass(kw_only=True, slots=True)
class ExportPlan:
    """All sections in the order they are written."""

    splits: tuple[str, ...]
    sections: list[PlannedSection] = field(default_factory=list)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    n_cut: int = 0
    """Documents that are cut, as a cache that is read has only their first tokens."""
    n_documents: dict[str, int] = field(default_factory=dict)
    n_tokens: int = 0
    n_tokens_of_caches: int = 0
    """Before they were cut, and before any were left out."""


def check_options(options: ExportOptions) -> None:
    """Raise RecipeError for what no format can do."""
    if options.max_length is not None and options.max_length < 1:
        raise RecipeError(f"max_length is {options.max_length}: a document needs at least one token")
    if not 0 <= options.validation_share < 1:
        raise RecipeError(f"validation_share is {options.validation_share}: it is at least 0 and below 1")
    if options.draft_vocabulary is not None and options.draft_vocabulary < 1:
        raise RecipeError(f"draft_vocabulary is {options.draft_vocabulary}: it needs at least one token")
    if options.pack_to is not None and options.pack_to < 1:
        raise RecipeError(f"pack_to is {options.pack_to}: a row needs at least one token")


def require_can_pack(format_name: str, needs: Needs, options: ExportOptions) -> None:
    """Raise RecipeError where packing is asked of a format whose rows are one document each."""
    if options.pack_to is not None and needs.packing is None:
        raise RecipeError(
            f"{format_name}: a row of it is one document, and its reader has no way to keep several apart: pack_to is "
            "not for it"
        )


def plan_export(
    chosen: Mapping[Asset, Chosen], needs: Needs, options: ExportOptions, *, leave_out_empty: bool = False
) -> ExportPlan:
    """Go through all ids and lengths; holds those of one partition at a time.

    Raises NotCommittedError where a split has no document or too few for packed rows, unless that is to be left out,
    and RecipeError for a document that no packed row has room for.
    """
    splits = (TRAIN, VALIDATION) if options.validation_share else (WHOLE,)
    plan = ExportPlan(splits=splits, n_documents=dict.fromkeys(splits, 0))
    indexes = dict.fromkeys(splits, 0)
    for key in partitions_of(chosen):
        partition = joined_partition(chosen, key, states=needs.states, max_length=options.max_length)
        _require_room_in_rows(partition, needs, options)
        _count(plan, partition, needs, options)
        for part in partition.parts:
            for split, rows in rows_of(partition, part, needs, options).items():
                section = PlannedSection(
                    split=split,
                    index=indexes[split],
                    partition_key=key,
                    part=part.index,
                    first_number=plan.n_documents[split],
                    n_documents=len(rows),
                    n_tokens=int(partition.lengths_D[rows].sum()),
                )
                plan.sections.append(section)
                indexes[split] += 1
                plan.n_documents[split] += section.n_documents
                plan.n_tokens += section.n_tokens
    empty = [split for split in splits if not plan.n_documents[split]]
    if leave_out_empty:
        plan.splits = tuple(split for split in splits if split not in empty)
        plan.n_documents = {split: plan.n_documents[split] for split in plan.splits}
    elif empty:
        what = f"the split {empty[0]!r} would have no document" if empty[0] else "there is no document to export"
        raise NotCommittedError(f"{what}: {sum(plan.n_documents.values())} documents in all, {_reasons(plan)}")
    else:
        _require_rows(plan, needs, options)
    return plan


def rows_of(partition: JoinedPartition, part: PartSpan, needs: Needs, options: ExportOptions) -> dict[str, Int64Array]:
    """Split → int64 rows in their partition of the documents of this part that go there; without empty splits."""
    rows = np.arange(part.first, part.stop)
    rows = rows[partition.lengths_D[rows] >= needs.min_tokens]
    if not options.validation_share:
        return {WHOLE: rows} if len(rows) else {}
    validation = in_validation([partition.document_ids[row] for row in rows], options)
    chosen = {TRAIN: rows[~validation], VALIDATION: rows[validation]}
    return {split: of_split for split, of_split in chosen.items() if len(of_split)}


def in_validation(document_ids: Sequence[str], options: ExportOptions) -> npt.NDArray[np.bool_]:
    """bool [D]: which documents are in the validation set."""
    limit = int(options.validation_share * 2**64)
    seed = f"{options.seed}\0".encode()

    def drawn(document_id: str) -> int:
        data = seed + document_id.encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")

    if not limit:
        return np.zeros(len(document_ids), dtype=np.bool_)
    return np.fromiter((drawn(document_id) < limit for document_id in document_ids), np.bool_, len(document_ids))


def require_room(
    to: Path, chosen: Mapping[Asset, Chosen], needs: Needs, plan: ExportPlan, *, hidden_size: int | None
) -> None:
    """Raise StorageUnavailableError where the disk has less room than the export takes, about."""
    there = to
    while not there.exists():
        there = there.parent
    n_bytes = bytes_written(chosen, needs, hidden_size)
    share = plan.n_tokens / max(plan.n_tokens_of_caches, 1)
    already = sum(path.stat().st_size for path in to.rglob("*") if path.is_file()) if to.exists() else 0
    wanted = int(n_bytes * share) - already
    free = shutil.disk_usage(there).free
    if wanted + _ROOM_TO_SPARE > free:
        raise StorageUnavailableError(
            f"{to} needs about {wanted / 2**30:,.2f} GiB, and its disk has {free / 2**30:,.2f} GiB free: free some "
            "space, choose another disk, or export fewer partitions"
        )


def bytes_written(chosen: Mapping[Asset, Chosen], needs: Needs, hidden_size: int | None) -> float:
    """Of whole documents, about: a format writes what is coded in a cache decoded."""
    return sum(
        manifest.n_bytes
        * decoded_per_byte(asset, manifest.params, hidden_size)
        * needs.expansion_of.get(asset, needs.expansion)
        for asset in CACHES
        if asset in chosen
        for manifest in chosen[asset].manifests
    )


def say_what_is_cut(plan: ExportPlan, chosen: Mapping[Asset, Chosen]) -> None:
    """Log what of the caches is not in the export."""
    if plan.n_cut:
        lengths = {
            asset: manifest.params.get("max_length")
            for asset, results in chosen.items()
            for manifest in results.manifests[:1]
            if asset in CACHES
        }
        log.warning(
            "%d documents are cut to the tokens that all caches of the export have (max_length: %s); exported "
            "one by one the caches keep theirs",
            plan.n_cut,
            ", ".join(f"{asset} {length}" for asset, length in lengths.items()),
        )
    for why, left_out in plan.left_out.items():
        log.warning("%d documents are left out: %s (%s)", left_out.n_documents, why, ", ".join(left_out.first[:3]))


def _require_room_in_rows(partition: JoinedPartition, needs: Needs, options: ExportOptions) -> None:
    if options.pack_to is None or needs.packing is None:
        return
    too_long = np.flatnonzero(partition.lengths_D - needs.packing.dropped_tokens > options.pack_to)
    if len(too_long):
        row = int(too_long[0])
        raise RecipeError(
            f"{len(too_long)} documents of partition {partition.partition_key!r} have more tokens than a row "
            f"(pack_to: {options.pack_to}), {partition.document_ids[row]!r} {partition.lengths_D[row]}: documents are "
            f"never divided; cut them (max_length: {options.pack_to}), or choose longer rows"
        )


def _require_rows(plan: ExportPlan, needs: Needs, options: ExportOptions) -> None:
    """Sections are packed each for itself: only a split of one section can have a single row."""
    if options.pack_to is None or needs.packing is None or needs.packing.min_rows < 2:
        return
    for split in plan.splits:
        sections = [section for section in plan.sections if section.split == split]
        dropped = needs.packing.dropped_tokens * plan.n_documents[split]
        if len(sections) == 1 and sections[0].n_tokens - dropped <= options.pack_to:
            of_split = f" of the split {split!r}" if split else ""
            raise NotCommittedError(
                f"all documents{of_split} fit into one row of {options.pack_to} tokens (pack_to), and the format's "
                "loader takes two or more: export more partitions, or choose shorter rows"
            )


def _count(plan: ExportPlan, partition: JoinedPartition, needs: Needs, options: ExportOptions) -> None:
    """What is cut and left out of one partition."""
    too_short_D = partition.lengths_D < needs.min_tokens
    for row in np.flatnonzero(too_short_D):
        named = f"{partition.partition_key}/{partition.document_ids[row]}"
        plan.left_out.setdefault(f"fewer than {needs.min_tokens} tokens", LeftOut()).add(1, [named])
    asked_D = np.minimum(partition.whole_D, options.max_length or np.iinfo(np.int64).max)
    plan.n_cut += int((partition.lengths_D < asked_D)[~too_short_D].sum())
    plan.n_tokens_of_caches += int(partition.whole_D.sum())


def _reasons(plan: ExportPlan) -> str:
    return "; ".join(f"{n.n_documents} left out, {why}" for why, n in plan.left_out.items()) or "none left out"
