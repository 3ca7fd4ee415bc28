"""The picture of a recipe's documents: how long they are and how much of each is learned, over all of its shards.

One a recipe and not one a partition: it is drawn from a few numbers in each shard's manifest, never from documents, and
says how many shards it stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import dagster as dg

from kd_assets.durable import listing
from kd_assets.errors import NO_ANSWER, StoreError
from kd_assets.orchestration.driving.waiting import Log
from kd_assets.orchestration.recording.figures import BLUE, INK, as_markdown, in_ink, new_figure
from kd_assets.recipes.recipe import SHARDS_MANIFEST, Recipe
from kd_assets.store import read_head, read_manifest

MOST_SHARDS = 500
"""Manifests that are read for a picture, evenly spread over all: 0.3 s or so. A run of one shard among 100,000 must not
cost what all of them do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Documents of some shards, counted."""

    n_shards: int
    """Those that the counts are of."""
    n_shards_there: int
    """All that are committed."""
    n_documents: int
    n_tokens: int
    n_loss_tokens: int
    length_histogram: tuple[int, ...]
    """Element i: documents of 2^i tokens up to one less than 2^(i+1)."""
    learned_histogram: tuple[int, ...]
    """Element i: documents of which i to i + 1 tenths are learned."""

    @property
    def learned_share(self) -> float:
        return self.n_loss_tokens / self.n_tokens if self.n_tokens else 0.0

    @property
    def in_words(self) -> str:
        """`2 shards, 1,024 documents, 310,000 tokens, 63 % of them learned`."""
        of = f" of {self.n_shards_there:,}" if self.n_shards_there > self.n_shards else ""
        shards = "shard" if self.n_shards_there == 1 else "shards"
        return (
            f"{self.n_shards:,}{of} {shards}, {self.n_documents:,} documents, {self.n_tokens:,} tokens, "
            f"{100 * self.learned_share:.0f} % of them learned"
        )


def lengths_picture(recipe_folder: Path, variant: str) -> str | None:
    """The picture of the current shards of a variant, as Markdown that holds a PNG; None where no shard is there that
    has the numbers for it. Raises StoreError where a manifest cannot be read."""
    lengths = lengths_of(recipe_folder, variant)
    return None if lengths is None else lengths_picture_markdown(lengths)


def lengths_of(recipe_folder: Path, variant: str) -> Lengths | None:
    """The documents of the current shards of a variant; shards that an earlier version made have no such numbers."""
    folder = recipe_folder / SHARDS_MANIFEST / variant
    keys = sorted(name for name, is_folder in listing(folder).items() if is_folder)
    chosen = evenly(keys, MOST_SHARDS)
    heads = [head for key in chosen if (head := read_head(folder / key)) is not None]
    n_there = len(heads) if len(chosen) == len(keys) else len(keys)
    return merged((read_manifest(head).facts for head in heads), n_shards_there=n_there)


def evenly(keys: Sequence[str], n_most: int) -> Sequence[str]:
    """At most so many of them, spread over all."""
    return keys if len(keys) <= n_most else [keys[i * len(keys) // n_most] for i in range(n_most)]


def merged(facts: Iterable[Mapping[str, Any]], *, n_shards_there: int) -> Lengths | None:
    """The sum over the facts of shards; None where none has the numbers."""
    known = [f for f in facts if "length_histogram" in f and "learned_histogram" in f]
    if not any(f["n_documents"] for f in known):
        return None

    def histogram(name: str) -> tuple[int, ...]:
        return tuple(sum(column) for column in zip_longest(*(f[name] for f in known), fillvalue=0))

    return Lengths(
        n_shards=len(known),
        n_shards_there=n_shards_there,
        n_documents=sum(f["n_documents"] for f in known),
        n_tokens=sum(f["n_tokens"] for f in known),
        n_loss_tokens=sum(f["n_loss_tokens"] for f in known),
        length_histogram=histogram("length_histogram"),
        learned_histogram=histogram("learned_histogram"),
    )


def lengths_picture_markdown(lengths: Lengths) -> str:
    """Documents by their lengths and by their learned shares, as Markdown that holds a PNG."""
    figure = new_figure(8.2, 3.0)
    figure.suptitle(lengths.in_words, color=INK, fontsize=10)
    by_length, by_share = figure.subplots(1, 2, width_ratios=[3, 2])
    first = next(i for i, n in enumerate(lengths.length_histogram) if n)
    edges = list(range(first, len(lengths.length_histogram) + 1))
    _bars(by_length, edges[:-1], lengths.length_histogram[first:], xlabel="tokens of a document")
    ticks = edges[:: 1 + len(edges) // 10]
    by_length.set_xticks(ticks, [_short(2**edge) for edge in ticks])
    tenths = list(range(len(lengths.learned_histogram)))
    _bars(by_share, tenths, lengths.learned_histogram, xlabel="learned share of a document")
    by_share.set_xticks(range(0, len(tenths) + 1, 2), [f"{10 * tenth} %" for tenth in range(0, len(tenths) + 1, 2)])
    return as_markdown(figure, "lengths and learned shares")


def _bars(axes: Any, left: Sequence[int], counts: Sequence[int], *, xlabel: str) -> None:
    axes.bar(left, counts, width=0.92, align="edge", color=BLUE)
    in_ink(axes, xlabel=xlabel, ylabel="documents")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: _short(int(value)))


def _short(n: int) -> str:
    """`512`, `2k`, `32k`, `1M`, `1.5M`: in thousands of a power of two where it is one."""
    is_power = n > 0 and n & (n - 1) == 0
    for unit, step in (("M", 20 if is_power else 10**6), ("k", 10 if is_power else 10**3)):
        size = 2**step if is_power else step
        if n >= size:
            return f"{n / size:g}{unit}"
    return str(n)


def observe_lengths(context: dg.AssetExecutionContext, recipe: Recipe, recipe_folder: Path, variant: str) -> None:
    """Put the picture of a recipe's shards into Dagster: metadata of one observation of all of `shards_manifest`.

    It informs: where the manifests cannot be read there is a warning and no picture.
    """
    log: Log = context.log
    try:
        lengths = lengths_of(recipe_folder, variant)
    except (StoreError, *NO_ANSWER) as e:
        log.warning(f"no picture of the lengths of documents: {e}")
        return
    if lengths is not None:
        context.log_event(
            dg.AssetObservation(
                recipe.key(SHARDS_MANIFEST),
                description=lengths.in_words,
                metadata={
                    "lengths": dg.MetadataValue.md(lengths_picture_markdown(lengths)),
                    "shards": lengths.n_shards,
                    "documents": lengths.n_documents,
                    "tokens": lengths.n_tokens,
                    "learned_share": round(lengths.learned_share, 6),
                },
            )
        )
