"""Which variant of each asset is the recipe's now: what a reader gets that names none, where there are several.

Runs say it (`current_variants.json` in the recipe's folder) with the first result that they record of an asset, made or
reused. A recipe that was changed so leaves the old variant where it is, for whoever names it, and readers follow the
recipe. The invariant: nothing is believed of this file but a choice among variants that are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from kd_assets.contract import parse_json
from kd_assets.durable import read_if_there, replace_file
from kd_assets.store.layout import is_variant_name

CURRENT_NAME = "current_variants.json"


def current_variants(recipe_folder: Path) -> dict[str, str]:
    """Asset → variant; empty where nobody said, or where the file is not one of these.

    Raises StorageUnreachableError where that cannot be told.
    """
    data = read_if_there(recipe_folder / CURRENT_NAME)
    try:
        said = {} if data is None else parse_json(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(said, dict):
        return {}
    return {asset: name for asset, name in said.items() if isinstance(name, str) and is_variant_name(name)}


def say_current(recipe_folder: Path, asset: str, variant: str) -> None:
    """Make this variant the one that readers get who name none. Raises StorageUnavailableError."""
    said = current_variants(recipe_folder)
    if said.get(asset) != variant:
        text = json.dumps({**said, asset: variant}, indent=1, sort_keys=True)
        replace_file(recipe_folder / CURRENT_NAME, text.encode() + b"\n")


def chosen_variant(recipe_folder: Path, asset: str, variants: Iterable[str]) -> str | None:
    """The one to read among several that are there; None where nobody said which, or another one."""
    current = current_variants(recipe_folder).get(asset)
    return current if current in set(variants) else None
