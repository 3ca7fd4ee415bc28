"""Names of content: an identity (everything that determines a result's bytes) and its hashes.

The identity is a JSON object. Its key `input` holds the hash of the input shard; what is left without it names the
variant, so results of many shards made in the same way share one. Pure functions; standard library only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_assets.contract import Asset, Output
from kd_assets.store.layout import VARIANT_LENGTH, result_folder

FORMAT_VERSION = 1
"""Version of everything FORMAT.md says; part of every identity, manifest and data_version."""

INPUT_KEY = "input"


def canonical_json(identity: Mapping[str, Any]) -> str:
    """The identity as the one JSON text that is hashed: keys sorted, no spaces, ASCII only.

    Raises ValueError for NaN and infinity, which JSON lacks, and TypeError for what is no JSON value.
    """
    return json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def variant_of(identity: Mapping[str, Any]) -> str:
    """The variant an identity belongs to: the fingerprint of all of it but its `input`, 12 hexadecimal digits."""
    return fingerprint({key: value for key, value in identity.items() if key != INPUT_KEY})[:VARIANT_LENGTH]


def plan_output(asset: Asset, identity: Mapping[str, Any], *, recipe_folder: Path, partition_key: str) -> Output:
    """The `Output` of a partition whose identity is known: path, variant and fingerprint follow from it."""
    digest, variant = fingerprint(identity), variant_of(identity)
    return Output(
        asset=asset,
        path=str(result_folder(recipe_folder, asset, variant, partition_key, digest)),
        variant=variant,
        fingerprint=digest,
        identity=dict(identity),
    )


def data_version(asset: str, part_sha256: Sequence[str]) -> str:
    """The content's hash: SHA-256 over asset, format version and the parts' hashes in order, one a line."""
    lines = [asset, str(FORMAT_VERSION), *part_sha256]
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
