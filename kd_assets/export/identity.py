"""What an export is made of, as JSON: the options, the caches, and the fingerprint of all that decides its bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kd_assets.contract import Asset
from kd_assets.export.format import ExportOptions, Needs
from kd_assets.store import Chosen, fingerprint
from kd_assets.store.computing_versions import EXPORT_VERSION


def export_fingerprint(export_format: str, chosen: Mapping[Asset, Chosen], needs: Needs, options: ExportOptions) -> str:
    """The fingerprint of what decides an export's bytes: format, options, and the content of the caches."""
    return fingerprint(
        {
            "export_version": EXPORT_VERSION,
            "format": export_format,
            "format_version": needs.version,
            "options": options_as_json(options),
            "states": list(needs.states),
            "sources": sources_as_json(chosen),
        }
    )


def sources_as_json(chosen: Mapping[Asset, Chosen]) -> dict[str, list[dict[str, str]]]:
    """Asset → what was read of each partition."""
    return {
        asset: [
            {
                "partition_key": manifest.partition_key,
                "data_version": manifest.data_version,
                "variant": manifest.variant,
                "fingerprint": manifest.fingerprint,
            }
            for manifest in results.manifests
        ]
        for asset, results in sorted(chosen.items())
    }


def options_as_json(options: ExportOptions) -> dict[str, Any]:
    """What of the options is not left to its default: one that comes later changes no export that lacks it."""
    plain = ExportOptions()
    named = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in named.items()
        if value != getattr(plain, name)
    }
