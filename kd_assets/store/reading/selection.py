"""Partitions by the words that people select them with."""

from __future__ import annotations

from collections.abc import Sequence

from kd_assets.errors import RecipeError


def select_partitions(known: Sequence[str], selection: str | None) -> list[str]:
    """Keys of `a..b` (from a to b, both included), `a,b,c`, or one key; None: all.

    Raises RecipeError for a key that is not known, and for a reversed range.
    """
    if selection is None:
        return list(known)
    position = {key: index for index, key in enumerate(known)}
    keys: list[str] = []
    for word in selection.split(","):
        first, dots, last = word.replace("...", "..").partition("..")
        ends = [first, last] if dots else [first]
        if unknown := [key for key in ends if key not in position]:
            there = f"{known[0]} to {known[-1]}" if known else "none"
            raise RecipeError(f"there is no partition {unknown[0]!r}; there are {len(known)}: {there}")
        start, end = position[ends[0]], position[ends[-1]]
        if end < start:
            raise RecipeError(f"the range {word} is reversed: {ends[0]} comes after {ends[-1]}")
        keys += known[start : end + 1]
    return list(dict.fromkeys(keys))
