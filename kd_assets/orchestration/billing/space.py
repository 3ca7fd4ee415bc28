"""Bytes of a plan's caches, and the disk where they will lie."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_assets.contract import Asset, PositionChoice
from kd_assets.recipes.recipe import SHARDS_MANIFEST, Recipe
from kd_assets.store.codecs.sizes import bytes_a_draw, bytes_a_number, bytes_a_topk
from kd_assets.store.codecs.state_codec import bytes_a_state


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """What a source gives."""

    n_documents: int
    n_tokens: int

    def cut_at(self, max_length: int) -> int:
        """Tokens of documents of at most so many, at most: how long each is, is not known before it is tokenised."""
        return min(self.n_tokens, self.n_documents * max_length)


def in_windows(recipe: Recipe, amount: Amount) -> Amount:
    """With documents that are split counted as their windows, whose overlaps are tokens again."""
    tokenising, longest = recipe.tokenising, recipe.max_length
    if tokenising.on_long != "split":
        return amount
    step = max(longest - tokenising.overlap, 1)
    return Amount(n_documents=amount.n_documents + amount.n_tokens // step, n_tokens=amount.n_tokens * longest // step)


def kept_length(recipe: Recipe, asset: Asset) -> int:
    """Tokens of a document that an asset keeps."""
    return recipe.max_length if asset == SHARDS_MANIFEST else recipe.cache_params[asset].max_length


def tokens_kept(recipe: Recipe, asset: Asset, amounts: Sequence[Amount]) -> int:
    return sum(amount.cut_at(kept_length(recipe, asset)) for amount in amounts)


def bytes_at_most(recipe: Recipe, amounts: Sequence[Amount], hidden_size: int | None) -> dict[Asset, int | None]:
    """Asset → bytes before compression; None where they depend on a hidden size that is not known."""
    found: dict[Asset, int | None] = {SHARDS_MANIFEST: 0, **dict.fromkeys(recipe.caches, 0)}
    for amount in amounts:
        of_source = bytes_needed(recipe, amount.n_tokens, amount.n_documents, hidden_size or 0)
        found = {asset: (n_bytes or 0) + of_source[asset] for asset, n_bytes in found.items()}
    if hidden_size is None:
        found |= dict.fromkeys(found.keys() & {"hidden_state_cache", "embedding_cache"})
    return found


def bytes_needed(recipe: Recipe, n_tokens: int, n_documents: int, hidden_size: int) -> dict[str, int]:
    """Asset → bytes at most, from the columns of FORMAT.md: every cache carries ids (4) and mask (1) of its tokens."""
    per_token = {SHARDS_MANIFEST: 5.0}
    per_document = {SHARDS_MANIFEST: 100.0}
    kept = {SHARDS_MANIFEST: recipe.max_length}
    if (topk := recipe.topk) is not None:
        # What every position has; ids and counts of the draws; what is outside of a student's vocabulary.
        is_cut = topk.vocabulary is not None or topk.token_ids is not None
        # Of a cache with `top_p` k is the most: how many tokens have that mass is known once the teacher has run.
        of_k = bytes_a_topk(topk.codec, topk.k, logsumexp=topk.logsumexp)
        of_k += 0 if topk.top_p is None else bytes_a_number(topk.codec)
        a_position = of_k + bytes_a_draw(topk.codec, topk.draws, topk.k) + (4 if is_cut else 0)
        per_token["topk_cache"] = 5 + _of_positions(a_position, topk.positions)
        kept["topk_cache"] = topk.max_length
    if (hidden := recipe.hidden_states) is not None:
        n_states = len(hidden.blocks) + len(hidden.final)
        of_states = n_states * bytes_a_state(hidden.codec, hidden_size)
        per_token["hidden_state_cache"] = 5 + _of_positions(of_states, hidden.positions)
        kept["hidden_state_cache"] = hidden.max_length
    if (embeddings := recipe.embeddings) is not None:
        per_token["embedding_cache"], per_document["embedding_cache"] = 5.0, 2 * hidden_size * 4
        kept["embedding_cache"] = embeddings.max_length
    return {
        str(asset): int(
            min(n_tokens, n_documents * kept[asset]) * a_token + n_documents * per_document.get(asset, 100.0)
        )
        for asset, a_token in per_token.items()
    }


def _of_positions(bytes_a_position: float, choice: PositionChoice) -> float:
    """Bytes a token at most: of learned positions it may be every one, as only the shards say which are."""
    if choice.kept == "all":
        return bytes_a_position
    share = choice.share if choice.share is not None else 1.0
    return (bytes_a_position + 4) * share


def free_bytes(folder: Path) -> int:
    """Free for this user on the disk where `folder` lies or will lie. Raises OSError."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free
