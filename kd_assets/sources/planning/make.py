"""Makes a shard plan: finds the sources, cuts them, and goes on from the plan before.

Text is read once, in constant memory; of large files of columns only footers and headers are. What a source had in the
plan before keeps its shards: new records make new ones, after all that there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_assets.errors import InputError, RecipeError
from kd_assets.model_files.digests import DigestCache
from kd_assets.sources.fields import why_not
from kd_assets.sources.planning.before import Before, before_of, key_of
from kd_assets.sources.planning.cut_source import CutSource, SourceCutter
from kd_assets.sources.planning.cutting import Share, Stretch
from kd_assets.sources.planning.duplicates import SeenRecords, seen_records
from kd_assets.sources.planning.mixing import Caps, in_drawn_order, mixed, rest_last, within
from kd_assets.sources.planning.plan import PlannedShard, ShardPlan, SourceCounts, plan_of
from kd_assets.sources.planning.token_rate import CountTokens
from kd_assets.sources.range_hash import shard_hash
from kd_assets.sources.spec import Sharding, SourceSpec

MAX_SHARDS = 100_000
"""Five digits of a partition key: beyond them, sorted keys would no longer be in order."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


def plan_shards(
    sources: Sequence[SourceSpec],
    sharding: Sharding,
    *,
    shard_prefix: str,
    base_folder: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    previous: ShardPlan | None = None,
    seekable_folder: Path | None = None,
    digests: DigestCache | None = None,
    count_tokens: CountTokens | None = None,
    allowed_licences: Sequence[str] | None = None,
) -> ShardPlan:
    """The plan of these sources.

    Relative paths start from `base_folder` (default: the working folder); `environment` says what `$NAME` stands for.
    `previous`: the plan that this one goes on from. `seekable_folder`: where copies of compressed files are kept.
    `digests` spares reading files that have not changed. `count_tokens` measures how many bytes a token takes.

    Raises MissingInputError for a source that is missing, unreadable or without records, InputError for one of another
    format or that changes meanwhile, RecipeError for names, sizes and licences that cannot be, StorageUnreachableError
    where its file system does not answer.
    """
    check_recipe(sources, sharding, shard_prefix=shard_prefix)
    settings = settings_of(sources, sharding)
    before = before_of(previous, settings, sharding)
    cutter = SourceCutter(
        sharding=sharding,
        base_folder=base_folder or Path.cwd(),
        environment=environment,
        before=before,
        seekable_folder=seekable_folder,
        digests=digests,
        count_tokens=count_tokens,
        allowed_licences=allowed_licences,
        known_sources=() if previous is None else {s.name for s in previous.sources},
        total_weight=sum(spec.weight or 0 for spec in sources),
    )
    with contextlib.ExitStack() as opened:
        table = opened.enter_context(seen_records()) if sharding.drop_duplicates else None
        seen = {s.name: None if table is None else SeenRecords(table, s.id_field) for s in sources}
        for spec in sources:
            if (of_source := seen[spec.name]) is not None:
                cutter.see_again(spec, of_source)
        cuts = {spec.name: cutter.cut(spec, seen[spec.name]) for spec in sources}
    tally = _Tally(cuts)
    shards = (
        tally.counted(_planned(key, share, cuts), share)
        for key, share in _assembled(cuts, sharding, before, shard_prefix)
    )
    plan = plan_of(
        shards,
        [cut.pinned for cut in cuts.values()],
        settings=settings,
        counts=tally.counts(),
        said=[line for cut in cuts.values() for line in cut.said],
    )
    if not plan.n_shards:
        raise InputError(f"no shard can be made: {_why_there_is_none(cuts)}")
    return plan


def _why_there_is_none(cuts: Mapping[str, CutSource]) -> str:
    """Why sources with records give no shard, and what to do."""
    copies = [name for name, cut in cuts.items() if not cut.kept and not cut.shares]
    if copies:
        return (
            f"every record of source {copies[0]!r} is a copy of another one (drop_duplicates), and a mixture takes "
            "some of each source: take it out of the recipe, or leave drop_duplicates out"
        )
    return (
        "max_documents or max_tokens leaves room for less than a document of each source, or a source has too few for "
        "its weight: raise them"
    )


def settings_of(sources: Sequence[SourceSpec], sharding: Sharding) -> dict[str, Any]:
    """What decides how records are cut: with other settings a plan begins anew. (Caps are not in it: a plan of more
    records goes on where one of fewer ended.)"""
    return {
        "documents_per_shard": sharding.documents_per_shard,
        "tokens_per_shard": sharding.tokens_per_shard,
        "drop_duplicates": sharding.drop_duplicates,
        "seed": sharding.seed,
        "weights": {spec.name: spec.weight for spec in sources if spec.weight is not None},
    }


def check_recipe(sources: Sequence[SourceSpec], sharding: Sharding, *, shard_prefix: str) -> None:
    """Raise RecipeError for what no plan can be made of."""
    if not sources:
        raise RecipeError("the recipe names no source: give at least one")
    if sharding.documents_per_shard < 1:
        raise RecipeError(f"documents_per_shard is {sharding.documents_per_shard}: a shard holds at least one document")
    if not _NAME.fullmatch(shard_prefix):
        raise RecipeError(f"shard_prefix {shard_prefix!r}: use letters, digits, '_', '.' and '-' (it names folders)")
    names: set[str] = set()
    for spec in sources:
        if not _NAME.fullmatch(spec.name):
            raise RecipeError(f"source name {spec.name!r}: use letters, digits, '_', '.' and '-' (it names documents)")
        if spec.name in names:
            raise RecipeError(f"two sources are named {spec.name!r}: their documents would have the same ids")
        names.add(spec.name)
        read = {spec.id_field, spec.text_field, spec.messages_field}
        if len(read) < 3:
            raise RecipeError(
                f"source {spec.name!r}: text_field {spec.text_field!r}, messages_field {spec.messages_field!r} and "
                f"id_field {spec.id_field!r} must be three different fields"
            )
        if used := sorted({*read, "role", "content"} & set(spec.ignore_fields)):
            raise RecipeError(
                f"source {spec.name!r}: ignore_fields has {used[0]!r}, which is what documents are made of"
            )
        if (why := why_not(spec)) is not None:
            raise RecipeError(f"source {spec.name!r}: {why}")
        if spec.prefer is not None and spec.shape not in ("auto", "preference"):
            raise RecipeError(f"source {spec.name!r}: prefer is of shape preference, and its shape is {spec.shape}")
    without = [spec.name for spec in sources if spec.weight is None]
    if without and len(without) < len(sources):
        raise RecipeError(
            f"source {without[0]!r} has no weight, and others have one: give each a weight, or none (then each source "
            "has shards of its own)"
        )


def _assembled(
    cuts: Mapping[str, CutSource], sharding: Sharding, before: Before, shard_prefix: str
) -> Iterator[tuple[str, Share]]:
    """The shards that there are, then the new ones, as far as the caps reach; each with its partition key."""

    def shorten(stretch: Stretch, n_documents: int) -> Stretch | None:
        return cuts[stretch.records.source].shorten(stretch, n_documents)

    def keyed() -> Iterator[tuple[str | None, Share]]:
        yield from _kept(cuts, before)
        for share in _new(cuts, sharding, shorten):
            yield None, share

    shards = within(
        keyed(),
        Caps(max_documents=sharding.max_documents, max_tokens=sharding.max_tokens),
        n_tokens_of=lambda stretch: cuts[stretch.records.source].n_tokens(stretch),
        shorten=shorten,
    )
    number = before.n_numbers
    for key, share in shards:
        if key is not None:
            yield key, share
            continue
        if number >= MAX_SHARDS:
            raise RecipeError(
                f"more than {MAX_SHARDS:,} shards: raise documents_per_shard ({sharding.documents_per_shard:,}) or "
                "tokens_per_shard"
            )
        yield f"{shard_prefix}-{number:05d}", share
        number += 1


def _kept(cuts: Mapping[str, CutSource], before: Before) -> Iterator[tuple[str, Share]]:
    """The shards of the plan before, of what is there of them."""
    stretches: dict[str, dict[int, Stretch]] = {}
    for cut in cuts.values():
        for stretch in cut.kept:
            key, position = before.places[key_of(stretch.records)]
            stretches.setdefault(key, {})[position] = stretch
    for key, found in sorted(stretches.items()):
        yield key, Share(stretches=tuple(found[i] for i in sorted(found)))


def _new(
    cuts: Mapping[str, CutSource], sharding: Sharding, shorten: Callable[[Stretch, int], Stretch | None]
) -> Sequence[Share]:
    by_bytes = sharding.tokens_per_shard is not None
    if all(cut.spec.weight is not None for cut in cuts.values()) and len(cuts) > 1:
        shares = {name: rest_last(cut.shares, sharding.seed) for name, cut in cuts.items()}
        amounts = {name: cut.amount for name, cut in cuts.items()}
        return list(mixed(shares, amounts, by_bytes=by_bytes, shorten=shorten))
    return in_drawn_order([share for cut in cuts.values() for share in cut.shares], sharding.seed)


def _planned(key: str, share: Share, cuts: Mapping[str, CutSource]) -> PlannedShard:
    hashes = [str(stretch.records.records_hash) for stretch in share.stretches]
    ranges = [cuts[stretch.records.source].placed(stretch.records) for stretch in share.stretches]
    if len(ranges) == 1:
        ranges = [dataclasses.replace(ranges[0], records_hash=None)]
    return PlannedShard(
        partition_key=key,
        records=tuple(ranges),
        input_hash=shard_hash(hashes),
        n_records=sum(r.n_records for r in ranges),
        n_bytes=share.n_bytes,
        n_tokens=round(sum(cuts[s.records.source].n_tokens(s) for s in share.stretches)),
    )


class _Tally:
    """What became of each source's records, counted shard by shard, so that nobody has to hold all shards."""

    def __init__(self, cuts: Mapping[str, CutSource]) -> None:
        self._cuts = cuts
        self._n_records, self._n_dropped = dict.fromkeys(cuts, 0), dict.fromkeys(cuts, 0)
        self._n_tokens = dict.fromkeys(cuts, 0.0)

    def counted(self, shard: PlannedShard, share: Share) -> PlannedShard:
        for stretch in share.stretches:
            records = stretch.records
            self._n_records[records.source] += records.n_records
            self._n_dropped[records.source] += len(records.dropped)
            self._n_tokens[records.source] += self._cuts[records.source].n_tokens(stretch)
        return shard

    def counts(self) -> Iterator[SourceCounts]:
        """To be taken once all shards are counted."""
        for name, cut in self._cuts.items():
            yield SourceCounts(
                source=name,
                n_documents=self._n_records[name] - self._n_dropped[name],
                n_duplicates=self._n_dropped[name] + cut.n_copies_alone,
                n_left=cut.pinned.n_records - self._n_records[name] - cut.n_copies_alone,
                n_tokens=round(self._n_tokens[name]),
            )
