"""What results that are there have measured: bytes of a token on disk, tokens a second, joules.

Reads a sample of manifests, so that a bill costs the same however many results there are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kd_assets.contract import Asset
from kd_assets.durable import storage_errors
from kd_assets.errors import NotCommittedError, StoreError
from kd_assets.recipes.recipe import SHARDS_MANIFEST, Recipe
from kd_assets.store import Manifest, read_manifest
from kd_assets.store.layout import HEAD_NAME, is_variant_name
from kd_assets.store.manifest import read_head
from kd_assets.store.params_in_identity import params_in_identity

MOST_READ = 64
"""Manifests of an asset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """An asset's results of the recipe as it is now."""

    n_there: int
    """Partitions of the plan that have one."""
    n_bytes: int
    """Of those; of many as a sample has it."""
    bytes_per_token: float | None
    variants: frozenset[str] = frozenset()
    """Folders' names of the variants that they are of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Of the teacher, as the pass that was committed last had it."""

    tokens_per_s: float
    """Of one teacher."""
    n_devices: int
    """That it was spread over."""
    device: str
    """`NVIDIA H100 80GB HBM3`, or `cpu`."""
    joules_per_token: float | None
    partition_key: str


def committed_results(
    recipe: Recipe,
    recipe_folder: Path,
    asset: Asset,
    keys: Sequence[str],
    *,
    caches: Mapping[Asset, Committed] = MappingProxyType({}),
) -> tuple[Committed, Manifest | None]:
    """What is there of these partitions, and the newest of the manifests that were read.

    `caches`: what is there of those that an export takes; an export of other variants of them is none of the recipe's.
    Raises StorageUnreachableError where the files cannot be looked at.
    """
    wanted, there = set(keys), dict[str, list[Path]]()
    for folder in _partition_folders(recipe_folder / asset):
        if folder.name in wanted:
            there.setdefault(folder.parent.name, []).append(folder)
    n_there, n_bytes, n_tokens, n_read_bytes, newest = 0, 0.0, 0, 0, None
    variants = []
    for variant, folders in there.items():
        of_variant = [m for folder in _sample(folders) if (m := _current(folder)) and is_of(recipe, asset, m, caches)]
        if not of_variant:
            continue
        variants.append(variant)
        read_bytes = sum(m.n_bytes for m in of_variant)
        share = len(of_variant) / len(_sample(folders))
        n_there += round(len(folders) * share)
        n_bytes += read_bytes / len(of_variant) * len(folders) * share
        n_tokens, n_read_bytes = n_tokens + sum(m.n_tokens for m in of_variant), n_read_bytes + read_bytes
        newest = max([*of_variant, *([newest] if newest else [])], key=lambda m: m.created_at)
    return (
        Committed(
            n_there=n_there,
            n_bytes=round(n_bytes),
            bytes_per_token=n_read_bytes / n_tokens if n_tokens else None,
            variants=frozenset(variants),
        ),
        newest,
    )


def is_of(
    recipe: Recipe, asset: Asset, manifest: Manifest, caches: Mapping[Asset, Committed] = MappingProxyType({})
) -> bool:
    """Whether a result was made as the recipe has it now, but for the files of teacher and student, which may not be
    here; an export of these `caches`."""
    wanted: dict[str, Any] = {"asset": asset}
    if asset == SHARDS_MANIFEST:
        wanted["max_length"] = recipe.max_length
    elif asset in recipe.export_params:
        made_of = manifest.identity.get("caches") or {}
        if set(made_of) != set(recipe.caches_of([asset])):
            return False
        if any(cache not in caches or variant not in caches[cache].variants for cache, variant in made_of.items()):
            return False
        wanted["params"] = recipe.export_params[asset].content()
    else:
        params = params_in_identity(recipe.cache_params[asset], seed=recipe.teacher.seed)
        if isinstance(params.get("vocabulary"), str):  # its ids stand in those files
            if (known := manifest.params.get("vocabulary")) is None:
                return False
            params["vocabulary"] = known
        wanted |= {"params": params, "dtype": recipe.teacher.dtype, **recipe.teacher.changes_to_the_model}
    return bool({name: manifest.identity.get(name) for name in wanted} == json.loads(json.dumps(wanted)))


def speed_of(recipe: Recipe, newest: Mapping[Asset, Manifest | None]) -> Speed | None:
    """From the cache of the recipe whose pass runs deepest: hidden states alone may come of a shorter one."""
    for asset in ("topk_cache", "embedding_cache", "hidden_state_cache"):
        manifest = newest.get(asset)
        if manifest is None or manifest.provenance.get("teacher") != recipe.teacher.model:
            continue
        provenance, facts = manifest.provenance, manifest.facts
        rate, joules = provenance.get("tokens_per_s"), provenance.get("joules")
        computed = facts.get("computed_tokens")
        if isinstance(rate, (int, float)) and rate > 0:
            return Speed(
                tokens_per_s=float(rate),
                n_devices=int(provenance.get("n_devices") or 1),
                device=str(provenance.get("gpu") or "cpu"),
                joules_per_token=joules / computed if joules and computed else None,
                partition_key=manifest.partition_key,
            )
    return None


def _partition_folders(asset_folder: Path) -> Iterator[Path]:
    with storage_errors(asset_folder, "read"):
        if not asset_folder.is_dir():
            return
        for variant in sorted(asset_folder.iterdir()):
            if is_variant_name(variant.name) and variant.is_dir():
                yield from sorted(variant.iterdir())


def _sample(folders: Sequence[Path]) -> list[Path]:
    """Evenly spread, the last one among them."""
    n = len(folders)
    if n <= MOST_READ:
        return list(folders)
    return [folders[(n - 1) * i // (MOST_READ - 1)] for i in range(MOST_READ)]


def _current(partition_folder: Path) -> Manifest | None:
    """None where nothing is committed; what is damaged is for `verify` to say."""
    try:
        if not (partition_folder / HEAD_NAME).is_file():
            return None
        folder = read_head(partition_folder)
        return None if folder is None else read_manifest(folder)
    except (NotCommittedError, StoreError):
        return None
