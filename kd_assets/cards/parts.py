"""Which files of a cache a card hands out: the parts of the results that a reader of the recipe gets, and no others.

Beside them lie results that others took the place of, that failed a check or are of an older plan, and unfinished ones;
a pattern over all of a variant's folders would have them, too. So each result is named, however many there are: about
80 bytes a result (of 10,000 shards and two caches `README.md` has 2.5 MB).
"""

from __future__ import annotations

import glob
from pathlib import Path

from kd_assets.cards.contents import CacheCard


def suffix_of(cache: CacheCard) -> str:
    return ".arrow" if cache.asset == "hidden_state_cache" else ".parquet"


def is_plain(cache: CacheCard) -> bool:
    """Whether its columns are what FORMAT.md says of them for any reader of Parquet."""
    return suffix_of(cache) == ".parquet" and cache.summary.params.get("codec", "plain") == "plain"


def current_folders(cache: CacheCard) -> list[Path]:
    """Those of its results that are current, planned and made of the plan's shards."""
    summary = cache.summary
    both = zip(summary.partition_keys, summary.folders, strict=True)
    return [folder for key, folder in both if key not in summary.left_out]


def part_patterns(cache: CacheCard) -> list[str]:
    """Of their part files, from the recipe's folder."""
    return [f"{glob.escape('/'.join(f.parts[-4:]))}/part-*{suffix_of(cache)}" for f in current_folders(cache)]
