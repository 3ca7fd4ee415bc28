"""Shares of sources as shards: one source a shard, or all of them in their proportions; and no more than asked for.

Pure functions over stretches; what has to be cut shorter is cut by a function that is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kd_assets.sources.planning.cutting import Share, Stretch

Shorten = Callable[[Stretch, int], Stretch | None]
"""A stretch without what follows its first so many documents; None where that is nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caps:
    """How much a plan holds at most."""

    max_documents: int | None = None
    max_tokens: int | None = None


def in_drawn_order(shares: Sequence[Share], seed: int | None) -> list[Share]:
    """The shares in an order that is drawn with `seed`, the same on every machine; as they are without one."""
    if seed is None:
        return list(shares)

    def drawn(share: Share) -> bytes:
        first = share.stretches[0].records
        place = f"{seed}\n{first.source}\n{first.file_name}\n{first.first_record}"
        return hashlib.sha256(place.encode()).digest()

    return sorted(shares, key=drawn)


def rest_last(shares: Sequence[Share], seed: int | None) -> list[Share]:
    """The shares of a mixture's source in drawn order; its last one, which may be smaller than the others, stays the
    last, so that no shard before has less of the source than its weight says."""
    return [*in_drawn_order(shares[:-1], seed), *shares[-1:]]


def mixed(
    shares: Mapping[str, Sequence[Share]], amounts: Mapping[str, float], *, by_bytes: bool, shorten: Shorten
) -> Iterator[Share]:
    """Shards that each hold a share of every source, until one of them ends: so that every prefix of the shards has the
    sources in their proportions. The last shard is as small as what that source has left.

    `amounts`: of a whole share, in bytes or documents.
    """
    n_shards = max(map(len, shares.values()), default=0)
    for at in range(n_shards):
        if any(at >= len(of_source) for of_source in shares.values()):
            return
        picked = {source: of_source[at] for source, of_source in shares.items()}
        size = {s: float(share.n_bytes if by_bytes else share.n_documents) for s, share in picked.items()}
        # A share is whole when it has its amount up to a document: the last of a source may have less.
        is_last = {s: at == len(shares[s]) - 1 for s in picked}
        part = min(min(1.0, size[s] / amounts[s]) if is_last[s] else 1.0 for s in picked)
        if part > 0.99:
            yield Share(stretches=tuple(st for share in picked.values() for st in share.stretches))
            continue
        kept = [
            first_documents(share, round(share.n_documents * min(1.0, part * amounts[s] / size[s])), shorten)
            for s, share in picked.items()
        ]
        stretches = tuple(st for share in kept if share is not None for st in share.stretches)
        if len([share for share in kept if share is not None]) == len(picked):
            yield Share(stretches=stretches)
        return


def within(
    shards: Iterator[tuple[str | None, Share]],
    caps: Caps,
    *,
    n_tokens_of: Callable[[Stretch], float],
    shorten: Shorten,
) -> Iterator[tuple[str | None, Share]]:
    """The shards until a cap is reached, the last one cut so that it is kept. Each comes with the key that it has."""
    n_documents, n_tokens = 0, 0.0
    for key, share in shards:
        of_share = sum(map(n_tokens_of, share.stretches))
        part = 1.0
        if caps.max_documents is not None:
            part = min(part, (caps.max_documents - n_documents) / max(share.n_documents, 1))
        if caps.max_tokens is not None:
            part = min(part, (caps.max_tokens - n_tokens) / max(of_share, 1e-9))
        if part >= 1:
            n_documents, n_tokens = n_documents + share.n_documents, n_tokens + of_share
            yield key, share
            continue
        if (cut := proportional(share, part, shorten)) is not None:
            yield key, cut
        return


def proportional(share: Share, part: float, shorten: Shorten) -> Share | None:
    """About this part of a share, of each source the same; None where that is nothing."""
    by_source: dict[str, list[Stretch]] = {}
    for stretch in share.stretches:
        by_source.setdefault(stretch.records.source, []).append(stretch)
    kept: list[Stretch] = []
    for stretches in by_source.values():
        of_source = Share(stretches=tuple(stretches))
        # The small excess is for parts that are meant to be whole numbers of documents.
        cut = first_documents(of_source, int(of_source.n_documents * part + 1e-6), shorten)
        kept += () if cut is None else cut.stretches
    return Share(stretches=tuple(kept)) if kept else None


def first_documents(share: Share, n_documents: int, shorten: Shorten) -> Share | None:
    """A share's first documents; None where these are none."""
    kept: list[Stretch] = []
    for stretch in share.stretches:
        if n_documents <= 0:
            break
        cut = stretch if stretch.n_documents <= n_documents else shorten(stretch, n_documents)
        if cut is not None:
            kept.append(cut)
            n_documents -= cut.n_documents
    return Share(stretches=tuple(kept)) if kept else None
