"""Versions of the code that decides a result's bytes. They are part of its identity, as files and parameters are.

A version is raised by one, in the change itself, whenever the same input and parameters give other bytes than before,
beyond the last bits of computed numbers (F2): a mended fault in a loss mask, in top-k, in the draws. Results that the
code before made are then stale, and are made again; what the version says nothing about stays. It is not raised for
code that is faster, clearer or refuses more: all that exists would be computed again for nothing.

Standard library only: the planner reads them, and `kd_assets.sources` and `kd_assets.teacher` own what they stand for.
The golden store (`kd_assets_tests/golden`) tells whether bytes have changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd_assets.contract import CACHES, EXPORTS, Output
from kd_assets.errors import ContractError

TOKENISING_VERSION = 1
"""From a record to token ids and loss mask: `records`, `tokenise` and `shard_parts` of `kd_assets.sources`.
Raised, every shard is made again; a cache only where its shard came out otherwise."""

PASS_VERSION = 1
"""From a shard's tokens to top-k, hidden states and embeddings: `kd_assets.teacher` and the encoders of the store."""

DRAWS_VERSION = 1
"""The random draws of a top-k cache: `kd_assets.teacher.batch.sampling`. Caches without draws do not have it."""

DRAWS_CODEC_VERSION = 2
"""How the codec compact stores random draws: 1, as lists of ids and counts, which readers still know; 2, coded. Caches
that have not both do not have it."""

EXPORT_VERSION = 1
"""Of every export: `kd_assets.export` without its formats, and what stands in `export.json`."""

FORMAT_VERSIONS: Mapping[str, int] = {"export_hf": 2}
"""Export asset → the version of its format's files, where that is not 1: `Needs.version` of the format."""


def computing_versions(asset: str, params: Mapping[str, Any]) -> dict[str, int]:
    """What enters the identity of an asset with these parameters: name → version.

    A version of 1 is left out: what was made before there were versions is of version 1, and keeps its name.
    """
    versions = {}
    if asset == "shards_manifest":
        versions["tokenising_version"] = TOKENISING_VERSION
    if asset in CACHES:
        versions["pass_version"] = PASS_VERSION
    if asset == "topk_cache" and params.get("draws"):
        versions["draws_version"] = DRAWS_VERSION
        if params.get("codec") == "compact":
            versions["draws_codec_version"] = DRAWS_CODEC_VERSION
    if asset in EXPORTS:
        versions |= {"export_version": EXPORT_VERSION, "export_format_version": FORMAT_VERSIONS.get(asset, 1)}
    return {name: version for name, version in versions.items() if version != 1}


def require_same_versions(output: Output) -> None:
    """Raise ContractError where a result was planned by code of another version than this, which is to compute it."""
    names = (
        *("tokenising_version", "pass_version", "draws_version", "draws_codec_version"),
        *("export_version", "export_format_version"),
    )
    planned = {name: output.identity[name] for name in names if name in output.identity}
    here = computing_versions(output.asset, output.identity.get("params") or {})
    if planned != here:
        raise ContractError(
            f"{output.path} was planned with {planned or 'versions of 1'}, this node computes with "
            f"{here or 'versions of 1'}: install the same kd_assets on the cluster nodes and in the Dagster deployment"
        )
